"""Overlays: trees of files whose paths are the paths on the machine; `.j2` files are templates (overlays/README.md).

Payload templates see cluster, sizing, role, arch and image; identity templates (the tree `node`) see cluster, node,
minted, install_by, fetch and joins. An unknown name is an error, never an empty string.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.kit import sizing
from recipes.kit.distribution import Fetch
from recipes.kit.errors import BakeError, Place
from recipes.kit.model import USERS, Cluster, File, Node, Role

if TYPE_CHECKING:  # imported where it is used: a bake that renders nothing does not wait for it
    from jinja2 import Environment

OVERLAYS = Path(__file__).resolve().parents[2] / "overlays"
IDENTITY = "node"  # the one tree whose templates may say `node`
TRUST = "trust"  # what an operating system is given beforehand; of no payload
SNIPPETS = "snippets"  # beside the trees: what several templates include; never on a machine itself

# Forward secret and authenticated; TLS 1.3 brings its own, which Go does not let one choose.
CIPHERS = tuple(
    f"TLS_ECDHE_{key}_WITH_{cipher}"
    for key in ("ECDSA", "RSA")
    for cipher in ("AES_128_GCM_SHA256", "AES_256_GCM_SHA384", "CHACHA20_POLY1305_SHA256")
)

# What root's own daemons and systemd read, nobody else: the CIS Kubernetes Benchmark wants it so (1.1, 4.1).
_ROOTS_ALONE = re.compile(
    r"/etc/systemd/system/(etcd|kube-[acs].*|kubelet)\.service|/etc/kubernetes/(flannel|kube-proxy|kubelet).*"
)

# What an EnvironmentFile of systemd and a POSIX shell read the same way between single quotes.
_PLAIN = re.compile(r"[^'\\\x00-\x1f\x7f]*")
# What every configuration takes for one word without quotes, and for nothing else.
_WORD = re.compile(r"[A-Za-z0-9/][A-Za-z0-9._:/-]*")


def layers(cluster: Cluster, role: Role) -> tuple[str, ...]:
    """The trees that make up the payload of a role, in the order in which they are laid over each other."""
    chosen = ["common"]
    if role in ("control-plane", "worker"):
        chosen.append("worker")
    if role == "control-plane":
        chosen.append("control-plane")
    if role == "etcd" or (role == "control-plane" and cluster.etcd == "stacked"):
        chosen.append("etcd")
    if role == "load-balancer" or (role == "worker" and cluster.load_balancer == "local"):
        chosen.append("load-balancer")
    if role == vip_role(cluster):
        chosen.append("virtual-address")
    return tuple(chosen)


def vip_role(cluster: Cluster) -> Role | None:
    """The role whose machines hold the cluster's virtual address, if there is one."""
    if cluster.vip is None or cluster.load_balancer == "external":
        return None
    return "load-balancer" if cluster.load_balancer == "nodes" else "control-plane"


def packages(cluster: Cluster, role: Role, root: Path = OVERLAYS) -> tuple[str, ...]:
    """Debian packages that a machine of this role needs (overlays/packages.yaml), sorted, without their closure."""
    import yaml  # here, as jinja2 below: a bake that renders nothing does not wait for it

    from recipes.kit.places import LOADER

    text = (root / "packages.yaml").read_text(encoding="utf-8")
    listed: dict[str, list[str]] = yaml.load(text, Loader=LOADER)  # noqa: S506 - a safe one
    return tuple(sorted({name for layer in layers(cluster, role) for name in listed[layer]}))


def payload(cluster: Cluster, role: Role, arch: str, image: Mapping[str, str], root: Path = OVERLAYS) -> list[File]:
    """Every layer of a role, rendered; a later layer replaces a file of an earlier one. Sorted by path."""
    context = {"cluster": cluster, "sizing": sizing.of(cluster), "role": role, "arch": arch, "image": image}
    files = {file.path: file for layer in layers(cluster, role) for file in render(root / layer, context)}
    return [files[path] for path in sorted(files)]


def identity(
    cluster: Cluster,
    node: Node,
    *,
    minted: str,
    install_by: str,
    fetch: Fetch | None = None,
    joins: bool = False,
    root: Path = OVERLAYS,
) -> list[File]:
    """The services' part of a machine's identity. minted and install_by are ISO 8601, UTC; joins: its etcd is a member
    that came to the cluster later."""
    return render(
        root / IDENTITY,
        {"cluster": cluster, "node": node, "minted": minted, "install_by": install_by, "fetch": fetch, "joins": joins},
    )


def inputs(names: Iterable[str], root: Path = OVERLAYS) -> list[Path]:
    """The files that rendering these trees reads: the trees' own and the snippets. Sorted."""
    return sorted(path for name in {*names, SNIPPETS} for path in _walk(root / name))


def render(tree: Path, context: Mapping[str, Any]) -> list[File]:
    """A tree as Files, sorted by path, owned by root.

    A file that ends in `.j2` is rendered and loses the ending; where only white space comes out, the file is left out.
    Mode is 0755 for an executable file, 0600 for what root alone reads, else 0644, whatever the umask of the checkout;
    symbolic links stay links.
    Raises BakeError for a template that does not render, with its place.
    """
    environment = _environment(tree)
    files: list[File] = []
    for path in _walk(tree):
        name = path.relative_to(tree).as_posix()
        if path.is_symlink():
            files.append(File(path=f"/{name}", link=str(path.readlink())))
            continue
        place = f"/{name.removesuffix('.j2')}"
        mode = 0o755 if path.stat().st_mode & 0o100 else 0o600 if _ROOTS_ALONE.fullmatch(place) else 0o644
        if path.suffix != ".j2":
            files.append(File(path=place, data=path.read_bytes(), mode=mode))
            continue
        text = _render(environment, tree, name, context)
        if text.strip():
            files.append(File(path=place, data=text.encode(), mode=mode))
    return sorted(files, key=lambda file: file.path)


def _walk(tree: Path) -> list[Path]:
    if not tree.is_dir():
        raise BakeError("this overlay does not exist", where=tree, remedy="restore the folder from the repository")
    found: list[Path] = []
    for place, folders, names in os.walk(tree):
        folder = Path(place)
        if folder.name != "__pycache__":  # made by whoever runs a program from here
            found += [folder / name for name in names]
        found += [path for path in map(folder.joinpath, folders) if path.is_symlink()]
    return sorted(found)


@cache  # and with it the compiled templates: each machine's identity is rendered from the same
def _environment(tree: Path) -> Environment:
    from jinja2 import ChoiceLoader, Environment, FileSystemLoader, StrictUndefined

    environment = Environment(  # noqa: S701 - units and configuration, not HTML; every value has a filter of its own
        loader=ChoiceLoader([FileSystemLoader(tree), FileSystemLoader(tree.parent / SNIPPETS)]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(env=_env, unit=_unit, quoted=quoted, word=word, taint=_taint)
    environment.globals.update(USERS=USERS, CIPHERS=CIPHERS, vip_role=vip_role)
    return environment


def _render(environment: Environment, tree: Path, name: str, context: Mapping[str, Any]) -> str:
    from jinja2 import TemplateError

    try:
        return environment.get_template(name).render(**context)
    except (TemplateError, ValueError) as error:
        line, trace = getattr(error, "lineno", None), error.__traceback__
        while trace is not None:  # the innermost template's line
            if trace.tb_frame.f_code.co_filename.endswith(".j2"):
                line = trace.tb_lineno
            trace = trace.tb_next
        raise BakeError(
            f"the template does not render: {error}",
            where=Place(tree / name, line),
            remedy="correct the template, or the value that it was given",
        ) from error


def word(value: object) -> str:
    """A word in a configuration that knows no quotes, or its own. ValueError: it might be read as something else."""
    text = str(value)
    if not _WORD.fullmatch(text):
        raise ValueError(f"{text!r} cannot stand there without quotes")
    return text


def quoted(value: object) -> str:
    """A scalar that JSON, YAML and TOML read as the same string. ValueError: it holds a control character."""
    text = str(value)
    if not text.isprintable():
        raise ValueError(f"{text!r} cannot stand in a configuration file")
    return json.dumps(text, ensure_ascii=False)


def _env(value: object) -> str:
    """A value in an environment file that systemd and sh read alike."""
    text = str(value)
    if not _PLAIN.fullmatch(text):
        raise ValueError(f"{text!r} cannot stand in an environment file")
    return f"'{text}'"


def _unit(value: object) -> str:
    """One argument in a unit's Exec line: quoted, with systemd's specifiers and variables taken literally."""
    text = str(value)
    if any(ord(char) < 32 for char in text):
        raise ValueError(f"{text!r} cannot stand in a unit")
    escaped = text.replace("%", "%%").replace("$", "$$")
    if re.fullmatch(r"[\w@%+=:,./$-]+", escaped, re.ASCII):
        return escaped
    escaped = escaped.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _taint(text: str) -> dict[str, str]:
    """key[=value]:Effect as the API's object."""
    left, _, effect = text.rpartition(":")
    key, _, value = left.partition("=")
    return {"key": key, "value": value, "effect": effect} if value else {"key": key, "effect": effect}
