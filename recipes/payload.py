"""Role -> payload tar.gz: what all machines of one role and architecture share. No secret, no worker's name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from recipes import images as container_images
from recipes.components import load_components
from recipes.kit import archive, atomic, manifest, overlay
from recipes.kit.archive import Entry
from recipes.kit.errors import BakeError
from recipes.kit.hashing import sha256_of
from recipes.kit.model import Arch, Cluster, Fetched, File, Image, Role
from recipes.kit.progress import Progress

BAKED = "/opt/nodebake"
UNITS = "/etc/systemd/system"
# Folders that are ours alone on the machine; everything below them gets its mode from the tarball, not from a umask.
OWN_FOLDERS = (BAKED, "/etc/nodebake", "/etc/kubernetes", "/etc/etcd")

_ETCD = ("etcd", "etcdctl", "etcdutl")
_KUBELET = ("containerd", "containerd-shim-runc-v2", "crictl", "ctr", "kube-proxy", "kubelet", "runc")
_CONTROL_PLANE = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl")


@dataclass(frozen=True, slots=True)
class Baked:
    """A payload on disk; its manifest lies beside it for the tasks behind it (record_beside). size: in bytes; sums: the
    name of its content (SHA-256 of the manifest's sums); sha256: of the tarball itself, where that was asked for."""

    path: Path
    size: int
    sums: str
    sha256: str | None


def programs(cluster: Cluster, role: Role) -> tuple[str, ...]:
    """The binaries in /opt/nodebake/current/bin of a role, sorted (CNI plugins not among them)."""
    needed: set[str] = set()
    if role in ("control-plane", "worker"):
        needed.update(_KUBELET)
        if cluster.pod_network == "flannel":
            needed.add("flanneld")
    if role == "control-plane":
        needed.update(_CONTROL_PLANE)
    if role == "etcd" or (role == "control-plane" and cluster.etcd == "stacked"):
        needed.update(_ETCD)
    return tuple(sorted(needed))


def files(
    cluster: Cluster,
    role: Role,
    arch: Arch,
    binaries: Mapping[str, Sequence[Fetched]],
    images: Sequence[Image],
    packages: Sequence[Fetched],
) -> list[File]:
    """Everything of the payload but its manifest, sorted by path.

    binaries: component -> its files, of this architecture.
    BakeError when a binary that the role needs is not among them.
    """
    baked = _baked(cluster, role, arch, binaries, images if role in ("control-plane", "worker") else (), packages)
    rendered = overlay.payload(cluster, role, arch, {image.name: image.reference for image in images})
    found = [*baked, *rendered, _package_list(packages)]
    if role in ("control-plane", "worker"):
        found += [_image_list(images), *container_images.registry_files(cluster)]
    return sorted([*found, *wanted_links(found)], key=lambda file: file.path)


def write(
    cluster: Cluster,
    role: Role,
    arch: Arch,
    contents: Sequence[File],
    target: Path,
    *,
    mtime: int,
    sign: Callable[[bytes], bytes],
    progress: Progress,
    hashed: bool = False,
    beside: Mapping[str, Any] = MappingProxyType({}),
) -> Baked:
    """Packs files() with its manifest into target (<role>-<arch>.tar.gz), and <role>-<arch>.json beside it: the same
    manifest, what is given as `beside`, under "sums" what a node's manifest vouches for, and under "sha256" the
    tarball's own digest, by which those know it who fetch it (null, unless it is to be hashed)."""
    about = {"cluster": cluster.name, "role": role, "arch": arch, "digest": digest_of(contents)}
    made: list[File] = []

    def last(entries: Sequence[Entry]) -> list[File]:
        made.extend(manifest.files("payload", entries, about, sign))
        return made

    total = sum(_size(file) for file in contents)
    with progress.step(f"packing {role} {arch}", total, "bytes") as advance:
        packed = archive.write_payload(contents, target, mtime=mtime, last=last, own=OWN_FOLDERS, advance=advance)
    sums = manifest.digest_of_sums(made, "payload")
    described = next(file.data for file in made if file.path.endswith("/payload.json"))
    sha256 = sha256_of(target) if hashed else None
    document = {**json.loads(described or b"{}"), **beside, "sums": sums, "sha256": sha256}
    atomic.write(record_beside(target), json.dumps(document, indent=1, sort_keys=True).encode() + b"\n")
    return Baked(target, packed.size, sums, sha256)


def record_beside(target: Path) -> Path:
    """The JSON beside a payload, as write() puts it there."""
    return target.with_name(target.name.removesuffix(".tar.gz") + ".json")


def read_record(target: Path, *keys: str) -> list[Any]:
    """The values of some keys of the record beside a payload. BakeError: it is not as it was written."""
    record = record_beside(target)
    try:
        known = json.loads(record.read_text())
        return [known[key] for key in keys]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BakeError(
            "the payload's record cannot be read", where=record, remedy="remove it and run doit once more"
        ) from error


def title(cluster: Cluster, role: Role, arch: Arch) -> str:
    """What a payload is called: "ha/worker-amd64"."""
    return f"{cluster.name}/{role}-{arch}"


def digest_of(contents: Iterable[File]) -> str:
    """The name of the folder below /opt/nodebake that these files lie in."""
    link = next((file.link for file in contents if file.path == f"{BAKED}/current"), None)
    return link or ""


def wanted_links(contents: Iterable[File]) -> list[File]:
    """What `systemctl enable` would do for these units: a link for each WantedBy=, RequiredBy= and Alias=."""
    files = list(contents)
    there = {file.path for file in files}
    links: dict[str, str] = {}
    for file in files:
        path = PurePosixPath(file.path)
        if str(path.parent) != UNITS or file.data is None or path.stem.endswith("@"):
            continue
        install = install_section(file.data.decode())
        for key, ending in (("WantedBy", "wants"), ("RequiredBy", "requires")):
            links |= {f"{UNITS}/{target}.{ending}/{path.name}": f"../{path.name}" for target in install.get(key, ())}
        links |= {f"{UNITS}/{alias}": path.name for alias in install.get("Alias", ())}
    return [File(path, link=target) for path, target in sorted(links.items()) if path not in there]


def install_section(text: str) -> dict[str, tuple[str, ...]]:
    """The lists of a unit's [Install] section: {"WantedBy": ("multi-user.target",)}."""
    section, found = "", dict[str, tuple[str, ...]]()
    for line in text.splitlines():
        line = line.strip()
        if line.startswith("["):
            section = line
        elif section == "[Install]" and "=" in line and not line.startswith(("#", ";")):
            key, _, value = line.partition("=")
            found[key.strip()] = (*found.get(key.strip(), ()), *value.split())
    return found


def _baked(
    cluster: Cluster,
    role: Role,
    arch: Arch,
    binaries: Mapping[str, Sequence[Fetched]],
    images: Sequence[Image],
    packages: Sequence[Fetched],
) -> list[File]:
    """Binaries, images and packages below /opt/nodebake/<digest>, and the link `current` to it."""
    components = load_components()
    by_name = {file.name: file for name, some in binaries.items() if components[name].install == "bin" for file in some}
    missing = [name for name in programs(cluster, role) if name not in by_name]
    placed = [(f"bin/{name}", 0o755, by_name[name]) for name in programs(cluster, role) if name in by_name]
    if role in ("control-plane", "worker"):
        plugins = [file for name, some in binaries.items() if components[name].install == "cni" for file in some]
        missing += [] if plugins else ["CNI plugins"]
        placed += [(f"cni/{fetched.name}", 0o755, fetched) for fetched in plugins]
    if missing:
        raise BakeError(
            f"the payload {role} {arch} lacks {', '.join(missing)}",
            where="components.yaml",
            remedy="let a component bring each of these files",
        )
    placed += [(f"images/{name}", 0o644, fetched) for name, fetched in _archives(images).items()]
    placed += [(f"packages/{fetched.name}", 0o644, fetched) for fetched in packages]
    placed.sort(key=lambda place: place[0])
    total = hashlib.sha256()
    for path, mode, fetched in placed:
        total.update(f"{path}\0{mode:o}\0{fetched.sha256}\n".encode())
    digest = total.hexdigest()[:16]
    if not placed:
        return []
    return [
        File(f"{BAKED}/current", link=digest),
        *(
            File(
                f"{BAKED}/{digest}/{path}",
                source=fetched.path,
                mode=mode,
                sha256=fetched.sha256,
                origin=fetched.origin,
            )
            for path, mode, fetched in placed
        ),
    ]


def _image_list(images: Sequence[Image]) -> File:
    """What import-images keeps in containerd's store: SHA-256 of the archive, its file name, reference; one a line."""
    archives = {fetched.sha256: name for name, fetched in _archives(images).items()}
    lines = [
        f"{image.archive.sha256} {archives[image.archive.sha256]} {reference}\n"
        for image in images
        for reference in container_images.names_in_containerd(image.reference)
    ]
    return File("/etc/nodebake/images", data="".join(sorted(set(lines))).encode())


def _package_list(packages: Sequence[Fetched]) -> File:
    """What first boot compares with what the machine has: name, version and file of each Debian package; one a line."""
    lines = [f"{deb.origin.component} {deb.origin.version} {deb.name}\n" for deb in packages]
    return File("/etc/nodebake/packages", data="".join(sorted(lines)).encode())


def _archives(images: Sequence[Image]) -> dict[str, Fetched]:
    """File name -> archive, each archive once (one may hold several images), in the images' order."""
    found: dict[str, Fetched] = {}
    for image in images:
        if image.archive.sha256 in {fetched.sha256 for fetched in found.values()}:
            continue
        allowed = (char if char.isascii() and (char.isalnum() or char in "._-") else "_" for char in image.archive.name)
        name = "".join(allowed).removesuffix(".tar").lstrip(".")
        found[f"{name}.tar" if f"{name}.tar" not in found else f"{name}-{image.archive.sha256[:12]}.tar"] = (
            image.archive
        )
    return found


def _size(file: File) -> int:
    return len(file.data or b"") if file.source is None else file.source.stat().st_size
