"""One bake: a cluster file, a desk and the folders that what is made goes to.

The recipes are imported where something is made: finding out that nothing is to be made must not wait for them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cache, cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from recipes import records
from recipes.components import load_components
from recipes.kit import atomic, distribution, formats, overlay, sizing, store
from recipes.kit.choices import Choices
from recipes.kit.distribution import Fetch, Repository
from recipes.kit.download import Desk
from recipes.kit.errors import BakeError
from recipes.kit.hashing import sha256_of
from recipes.kit.model import Arch, BaseImage, Cluster, Fetched, File, Node, Role
from recipes.kit.profiles import DESK
from recipes.kit.vault import Key

if TYPE_CHECKING:
    from recipes.audit import Audit
    from recipes.closure import Proven
    from recipes.disk import Layout
    from recipes.payload import Baked

PACKAGE = Path(__file__).parent
LIBRARIES = ("cryptography", "deflate", "jinja2", "pycdlib", "pyyaml")  # that write what is baked


@dataclass
class Bake:
    """A cluster, a desk and a store. The make_* methods write what the inputs_of_* methods give the digest of."""

    cluster: Cluster
    desk: Desk
    where: Path  # the secret store
    now: datetime
    minting: bool = True  # False: only look
    key: Key = field(default_factory=Key, repr=False)  # what opens the store, where it is encrypted
    _proofs: dict[tuple[Role, Arch], tuple[Proven, Baked]] = field(default_factory=dict, init=False, repr=False)

    # ---- where things lie

    @cached_property
    def folder(self) -> Path:
        return self.desk.build / self.cluster.name

    @cached_property
    def _nodes(self) -> Path:
        return self.folder / "nodes"

    @cached_property
    def _seeds(self) -> Path:
        return self.folder / "seeds"

    @property
    def admin_conf(self) -> Path:
        return self.folder / "admin.conf"

    @property
    def known_hosts(self) -> Path:
        return self.folder / "known_hosts"

    @property
    def trust(self) -> Path:
        """What an operating system is given, so that it takes this cluster's media alone."""
        return self.folder / "trust.tar.gz"

    @property
    def volume(self) -> Path:
        return self.folder / "payloads" / "payloads.iso"

    @property
    def schema(self) -> Path:
        return self.desk.build / "cluster-file.schema.json"

    @property
    def desk_files(self) -> list[Path]:
        return [self.admin_conf, self.trust, *([self.known_hosts] if self.cluster.bake_ssh_host_keys else [])]

    def record(self, kind: str, name: str) -> Path:
        """Where a task writes down what it obtained (JSON), for the tasks behind it."""
        return self.folder / kind / f"{name}.json"

    def payload(self, role: Role, arch: Arch) -> Path:
        return self.folder / "payloads" / f"{role}-{arch}.tar.gz"

    def payload_record(self, role: Role, arch: Arch) -> Path:
        """The JSON that payload.write() puts beside the tarball."""
        return self.payload(role, arch).with_name(f"{role}-{arch}.json")

    def payload_bom(self, role: Role, arch: Arch) -> Path:
        """What the payload is made of (CycloneDX), as it lies in the payload too."""
        return self.payload(role, arch).with_name(f"{role}-{arch}.cdx.json")

    def tarball(self, node: Node) -> Path:
        return self._nodes / f"{node.name}.tar.gz"

    def seed(self, node: Node) -> Path:
        return self._seeds / f"{node.name}.iso"

    def base(self, arch: Arch) -> Path:
        """The disk that disk images begin with, where it is made here."""
        return self.folder / "bases" / f"{arch}.raw"

    def base_bom(self, arch: Arch) -> Path:
        """What that disk is made of (CycloneDX)."""
        return self.base(arch).with_name(f"{arch}.cdx.json")

    def base_files(self, arch: Arch) -> list[Path]:
        made = [] if self.cluster.base_image(arch) else [self.base(arch), self.base_bom(arch)]
        return [self.record("bases", arch), *made]

    def certs(self, node: Node) -> Path:
        return self.folder / "certs" / f"{node.name}.tar.gz"

    def disk(self, node: Node) -> Path:
        return self.folder / "disks" / f"{node.name}.raw.gz"

    @property
    def artifacts(self) -> list[Path]:
        """What lies in the folders of what machines get, whoever's it is; and copies that a killed check left."""
        folders = (self.folder / kind for kind in ("payloads", "nodes", "seeds", "bases", "disks", "certs"))
        beside = (self.admin_conf, self.known_hosts, self.trust, *self.folder.glob(".verify-*"))
        found = [path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir())]
        return [*found, *(path for path in beside if path.exists())]

    # ---- what everything depends on

    @cached_property
    def secrets(self) -> store.Secrets:
        """Minted on first use, as far as something is missing."""
        return store.open(self.where, self.cluster, now=self.now, mint=self.minting, key=self.key)

    @property
    def minted(self) -> bool:
        """Whether the store has been minted, which looking at a cluster does not do."""
        return store.is_minted(self.where)

    @cached_property
    def mtime(self) -> int:
        """The one time that all files bear, in seconds since 1970: SOURCE_DATE_EPOCH, or the time of minting."""
        epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
        if not epoch:
            return int(self.secrets.minted.timestamp())
        if not epoch.isdecimal():
            raise BakeError(f"SOURCE_DATE_EPOCH={epoch} is no time", remedy="give whole seconds since 1970")
        return int(epoch)

    @cached_property
    def shared(self) -> Cluster:
        return self.cluster.shared

    @cached_property
    def generation(self) -> int:
        """Counts the versions of what the control planes bring: 1, 2 ... Kept in the store, so that it never falls."""
        known = digest(code(), self._machines, self._operators_bytes(), self._references())
        kept = Choices(self.where / "generation.json")  # not with the choices, which may be thrown away
        last = kept.get("generation", "objects") or {"of": None, "number": 0}
        if last["of"] == known:
            return int(last["number"])
        number = int(last["number"]) + 1
        kept.remember("generation", "objects", {"of": known, "number": number})
        return number

    @cached_property
    def founders(self) -> frozenset[str]:
        """The etcd members that begin the cluster: those of its first bake that were never away. Any other joins it."""
        present = sorted(node.name for node in self.cluster.etcd_members)
        kept = Choices(self._members)
        first, seen = kept.get("etcd", "first") or [], kept.get("etcd", "seen") or []
        first = [name for name in first if name in present] if set(seen) & set(present) else present
        if self.minting:
            kept.remember("etcd", "first", first)
            kept.remember("etcd", "seen", sorted({*seen, *present}))
        return frozenset(first)

    @property
    def _members(self) -> Path:
        return self.where / "members.json"

    def joins(self, node: Node) -> bool:
        return node.runs_etcd and node.name not in self.founders

    @cached_property
    def _machines(self) -> str:
        """What control planes know of all machines, and of the cluster as a whole."""
        return digest(self._named_alike, self._tokens())

    @property
    def _named_alike(self) -> Cluster:
        """The cluster without the desk's paths: a project that was moved or copied bakes the same."""
        registries = tuple(replace(registry, ca=None, password_file=None) for registry in self.cluster.registries)
        nowhere = Path(self.cluster.file.name)
        return replace(self.cluster.unwired, file=nowhere, images=(), extra_objects=(), registries=registries)

    def _tokens(self) -> list[tuple[str, str, datetime]]:
        secrets = self.secrets
        return [
            (node.name, secrets.tokens[node.name].id, secrets.life(node.name).install_by)
            for node in self.cluster.kubelets
        ]

    def _authorities(self) -> list[tuple[str, int, int]]:
        return [_stamp(registry.ca) for registry in self.cluster.registries if registry.ca is not None]

    def _operators_bytes(self) -> list[str]:
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in self.cluster.extra_objects]

    def _references(self) -> list[tuple[str, str]]:
        """The images' names, which objects say: another source gives others. The same on every architecture."""
        there = [path for path in (self.folder / "images").glob("*.json") if path.exists()]
        return sorted({(image.name, image.reference) for path in there for image in records.read_images(path)})

    def _passwords(self) -> list[tuple[str, int, int]]:
        """By time and size only: a digest of a password would be a way to guess it."""
        return [_stamp(registry.password_file) for registry in self.cluster.registries if registry.password_file]

    def _hidden(self) -> list[Path]:
        """Hidden files in the bake's folders. Not by glob(), which is slow among the files of thousands of machines."""
        folders = [folder for folder in self.folder.iterdir() if folder.is_dir()]
        return [Path(entry) for folder in folders for entry in os.scandir(folder) if entry.name.startswith(".")]

    # ---- one pair of methods for each kind of task

    def begin(self) -> None:
        """Runs first, alone in build/: so every temporary file in there was left by a bake that was killed."""
        alone = (*self.desk_files, self.schema)  # of their folders, which hold more than artifacts
        desk = (left for path in alone for left in path.parent.glob(f".{path.name}.*"))
        for left in [*self._hidden(), *desk]:
            left.unlink()
        for left in self.folder.glob(".verify-*"):
            shutil.rmtree(left)
        for warning in self.cluster.warnings:
            self.desk.progress.warn(warning)
        if joining := [node.name for node in self.cluster.etcd_members if self.joins(node)]:
            self.desk.progress.warn(
                f"etcd on {some(joining)} came after the first bake: it joins the cluster that runs, by etcdctl member "
                'add (README, "etcd members that come and go"). '
                f"Once it has, or for a cluster on empty disks: rm {self._members}"
            )
        late = [node.name for node in self.cluster.nodes if self.secrets.life(node.name).install_by <= self.now]
        if late:
            dated = isinstance(self.cluster.install_by, datetime)
            anew = "write a later date, which is everybody's" if dated else "doit rekey NODE ..."
            self.desk.progress.warn(
                f"installBy has passed for {some(late)}: what is baked for them renews a machine that runs "
                f"(nodebake apply), and installs none. Those that were not installed: {anew}"
            )
        _ = self.secrets, self.mtime  # what is wrong with them is told here, once

    def inputs_of_binaries(self, arch: Arch) -> str:
        modules = [path for path in (PACKAGE / "modules").rglob("*") if path.is_file()]
        return digest(code(), digest_of_files(modules, PACKAGE), self.desk.source, arch)

    def make_binaries(self, arch: Arch) -> None:
        from recipes import binaries, packages

        mirror = self.cluster.debian_mirror
        obtained = binaries.obtain_all(
            load_components().values(), arch, self.desk, headers=lambda: packages.headers(arch, self.desk, mirror)
        )
        records.write(self.record("binaries", arch), [file for files in obtained.values() for file in files])

    def inputs_of_packages(self, role: Role, arch: Arch) -> str:
        wanted = overlay.packages(self.cluster, role)
        return digest(code(), wanted, arch, self.cluster.debian_mirror, self.cluster.packages)

    def make_packages(self, role: Role, arch: Arch) -> None:
        from recipes import packages

        obtained = packages.obtain(overlay.packages(self.cluster, role), arch, self.cluster, self.desk)
        records.write(self.record("packages", f"{role}-{arch}"), obtained)

    def inputs_of_images(self, arch: Arch) -> str:
        archives = [Path(image) for image in self.cluster.images if image.startswith("/")]
        return digest(code(), self.desk.source, arch, self.cluster.images, [_stamp(path) for path in archives])

    def make_images(self, arch: Arch) -> None:
        from recipes import images

        coredns = next(file for file in records.read_fetched(self.record("binaries", arch)) if file.name == "coredns")
        records.write(self.record("images", arch), images.obtain(self.cluster, arch, self.desk, coredns))

    def inputs_of_payload(self, role: Role, arch: Arch) -> str:
        trees = _digest_of_trees(*overlay.layers(self.cluster, role))
        identity = self.secrets.cluster_id
        return digest(code(), trees, self.shared, role, arch, self.mtime, identity, self._authorities())

    def make_payload(self, role: Role, arch: Arch) -> None:
        from recipes import bom, closure, payload

        by_component: dict[str, list[Fetched]] = {}
        for file in records.read_fetched(self.record("binaries", arch)):
            by_component.setdefault(file.origin.component, []).append(file)
        debs = records.read_fetched(self.record("packages", f"{role}-{arch}"))
        archives = records.read_images(self.record("images", arch))
        contents = payload.files(self.shared, role, arch, by_component, archives, debs)
        title, release = payload.title(self.cluster, role, arch), payload.digest_of(contents)
        parts = bom.payload(title, release, arch, contents, by_component, archives, mtime=self.mtime)
        contents.append(parts)
        wanted = overlay.packages(self.cluster, role)
        proven = closure.prove_payload(contents, self.cluster, role, arch, archives, wanted)
        self._audit.payload(contents, f"payload {role} {arch}")
        # Every machine is proven before it is baked; one of them now, so that a hole in all is told before the packing.
        example = next(node for node in self.cluster.nodes if (node.role, node.arch) == (role, arch))
        identity = self.identity(example, sums="0" * 64)
        closure.prove(proven, self.cluster, example, identity, lambda: debs)
        self._audit.identity(identity, example)
        self._proofs.pop((role, arch), None)
        payload.write(
            self.cluster,
            role,
            arch,
            contents,
            self.payload(role, arch),
            mtime=self.mtime,
            sign=lambda data: store.sign(self.secrets, data),
            progress=self.desk.progress,
            hashed=self.cluster.payload_server is not None,
            beside={"proven": proven.as_record()},
        )
        atomic.write(self.payload_bom(role, arch), parts.data or b"")

    def identity(self, node: Node, *, sums: str, fetch: Fetch | None = None) -> list[File]:
        from recipes import node as node_recipe

        if node.role != "control-plane":
            joins = self.joins(node)
            return node_recipe.identity(self.shared, node, self.secrets, sums=sums, fetch=fetch, joins=joins)
        image = {image.name: image.reference for image in records.read_images(self.record("images", node.arch))}
        return node_recipe.identity(
            self.cluster.unwired,
            node,
            self.secrets,
            sums=sums,
            fetch=fetch,
            joins=self.joins(node),
            image=image,
            generation=self.generation,
        )

    def inputs_of_node(self, node: Node) -> str:
        """A control plane knows every machine (tokens, addresses, labels); any other machine what all may know."""
        known = self._known_to_all if node.role != "control-plane" else self._known_to_control_planes
        token = self.secrets.tokens.get(node.name)
        minted = (self.secrets.cluster_id, self.secrets.life(node.name), token.id if token else None)
        crowd = sizing.crowd(len(self.cluster.fetching)) if node.media == "thin" else 0
        passwords = self._passwords() if node.runs_kubelet else ()
        return digest(code(), known, node, self.mtime, minted, passwords, crowd, self.joins(node))

    @cached_property
    def _known_to_all(self) -> str:
        return digest(self.shared, self.cluster.users, _digest_of_trees(overlay.IDENTITY))

    @cached_property
    def _known_to_control_planes(self) -> str:
        objects = [_stamp(path) for path in self.cluster.extra_objects]
        return digest(self._known_to_all, self._machines, self.cluster.registries, objects, self.generation)

    def make_node(self, node: Node) -> None:
        from recipes import node as node_recipe
        from recipes import seed
        from recipes.kit import manifest

        contents = self._proven_identity(node)
        sums = manifest.digest_of_sums(contents, "node")
        documents = seed.documents(self.cluster, node, sums=sums, sign=partial(store.sign, self.secrets))
        self._audit.seed(documents, node)
        tarball = self.payload(node.role, node.arch)
        node_recipe.write(node, contents, self.tarball(node), mtime=self.mtime, payload_tarball=tarball)
        seed.write(documents, self.tarball(node), self.seed(node), mtime=self.mtime)

    def make_certs(self, node: Node) -> None:
        from recipes import node as node_recipe

        contents = self._proven_identity(node)
        node_recipe.write(node, contents, self.certs(node), mtime=self.mtime, payload_tarball=None)

    def _proven_identity(self, node: Node) -> list[File]:
        """A machine's identity, complete upon its payload, and nothing in it that it may not have."""
        from recipes import closure

        proven, baked = self._proven(node.role, node.arch)
        fetch = distribution.fetch(self.cluster, node, sha256=baked.sha256, size=baked.size) if baked.sha256 else None
        contents = self.identity(node, sums=baked.sums, fetch=fetch)
        debs = partial(records.read_fetched, self.record("packages", f"{node.role}-{node.arch}"))
        closure.prove(proven, self.cluster, node, contents, debs)
        self._audit.identity(contents, node)
        return contents

    @cached_property
    def _audit(self) -> Audit:
        from recipes.audit import Audit

        return Audit(self.cluster, self.secrets)

    def _proven(self, role: Role, arch: Arch) -> tuple[Proven, Baked]:
        """The proof of a payload, and what it is: read once, however many machines there are."""
        from recipes import closure, payload

        if (role, arch) not in self._proofs:
            [proven] = payload.read_record(self.payload(role, arch), "proven")
            self._proofs[role, arch] = closure.Proven.from_record(proven), self.baked(role, arch)
        return self._proofs[role, arch]

    def baked(self, role: Role, arch: Arch) -> Baked:
        """A payload that was baked."""
        from recipes import payload

        path = self.payload(role, arch)
        sums, sha256 = payload.read_record(path, "sums", "sha256")
        return payload.Baked(path, path.stat().st_size, sums, sha256)

    def inputs_of_base(self, arch: Arch) -> str:
        if (image := self.cluster.base_image(arch)) is None:
            return digest(code(), arch, self.mtime, self.cluster.debian_mirror, self.cluster.packages)
        return digest(code(), image, None if _is_url(image) else _stamp(Path(image.location)))

    def check_base(self, arch: Arch) -> None:
        from recipes import base

        if self.cluster.base_image(arch) is None and not self.base(arch).exists():
            base.check(arch)

    def make_base(self, arch: Arch) -> None:
        from recipes import base, bom

        if (image := self.cluster.base_image(arch)) is not None:
            made = base.fetched(image, self.desk)
        else:
            made = base.make(self.cluster, arch, self.base(arch), self.desk, mtime=self.mtime)
            debs = base.packages_in(self.cluster, arch, self.desk)
            document = bom.system(f"debian-{arch}", made.sha256[:16], arch, debs, mtime=self.mtime)
            atomic.write(self.base_bom(arch), document)
        records.write(self.record("bases", arch), [made])

    def disk_layout(self, node: Node, seed: Path | None = None) -> Layout:
        """The disk of a machine, with its seed as it was baked or with another copy of it."""
        from recipes import disk

        [base] = records.read_fetched(self.record("bases", node.arch))
        if sha256_of(base.path) != base.sha256:
            own = self.cluster.base_image(node.arch)
            remedy = f"{'' if own and not _is_url(own) else 'remove it, and '}bake again: doit base:{node.arch}"
            raise BakeError("this disk is not as it was when it was taken", where=base.path, remedy=remedy)
        ours = self.cluster.base_image(node.arch) is None
        owner = f"{self.secrets.cluster_id}/{node.name}"
        return disk.layout(base.path, seed or self.seed(node), node.arch, owner, renew=ours)

    def make_disk(self, node: Node) -> None:
        from recipes import disk

        planned = self.disk_layout(node)
        with self.desk.progress.step(f"disk image of {node.name}", planned.size, "bytes") as advance:
            disk.write(planned, self.disk(node), advance)

    def inputs_of_desk(self) -> str:
        secrets = self.secrets
        hosts = [(name, key.public) for name, key in sorted(secrets.ssh_host_keys.items())]
        trees = _digest_of_trees(overlay.TRUST)
        return digest(code(), trees, self.cluster, secrets.cluster_id, secrets.life(DESK), self.mtime, hosts)

    def make_desk(self) -> None:
        from recipes import certificates, trust
        from recipes import node as node_recipe

        atomic.write(self.admin_conf, certificates.admin_conf(self.cluster, self.secrets), mode=0o600)
        if self.cluster.bake_ssh_host_keys:
            atomic.write(self.known_hosts, node_recipe.known_hosts(self.cluster, self.secrets))
        trust.write(self.cluster, self.secrets, self.trust, mtime=self.mtime)

    def make_schema(self) -> None:
        from recipes.kit import inventory

        text = json.dumps(inventory.json_schema(), indent=1)
        atomic.write(self.schema, text.encode() + b"\n")

    def registry(self, named: str | None) -> Repository:
        """The one that was named (oci://HOST/REPOSITORY), or else the cluster file's payloadServer."""
        try:
            server = formats.payload_server(named) if named else self.cluster.payload_server
        except formats.Malformed as error:
            raise BakeError(f"registry={named}: {error.what}", remedy=error.remedy) from error
        repository = distribution.repository(server or "")
        if repository is None:
            what = f"{server} is no registry" if server else "no registry is named"
            remedy = "say registry=oci://HOST/REPOSITORY, or name it in the cluster file: payloadServer: oci://HOST/REPOSITORY"
            raise BakeError(what, where=None if named else self.cluster.file, remedy=remedy)
        return repository

    def publish(self, role: Role, arch: Arch, registry: str | None) -> str:
        """Pushes a payload there; returns what it is called."""
        from recipes import publish

        baked = self.baked(role, arch)
        baked = replace(baked, sha256=baked.sha256 or sha256_of(baked.path))
        return publish.publish(self.cluster, role, arch, baked, self.registry(registry), self.desk)

    def make_volume(self) -> None:
        from recipes import seed

        tarballs = {f"{role}-{arch}": self.payload(role, arch) for role, arch in self.cluster.payloads}
        seed.write_payloads(tarballs, self.volume, mtime=self.mtime)


def some(names: Sequence[str]) -> str:
    """For people: all of them, or the first few and how many more."""
    return ", ".join(names) if len(names) <= 5 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def _is_url(image: BaseImage) -> bool:
    return image.location.startswith("http")


def _stamp(path: Path) -> tuple[str, int, int]:
    stat = path.stat()
    return str(path), stat.st_size, stat.st_mtime_ns


@cache
def code() -> str:
    """Digest of all code that decides about bytes, so that a newer Nodebake, or a newer library, bakes anew."""
    own = digest_of_files([*PACKAGE.rglob("*.py"), *PACKAGE.glob("*.yaml")], PACKAGE)
    return digest(own, [(name, version(name)) for name in LIBRARIES])


def digest(*inputs: object) -> str:
    """SHA-256 (hex) over the inputs' representations: frozen nouns, bytes, text and numbers have one that is stable."""
    total = hashlib.sha256()
    for value in inputs:
        total.update(value if isinstance(value, bytes) else repr(value).encode())
        total.update(b"\0")
    return total.hexdigest()


def digest_of_files(paths: Iterable[Path], root: Path) -> str:
    """SHA-256 (hex) over names below root, execute bits and contents; of a symbolic link, over where it leads."""
    total = hashlib.sha256()
    for path in sorted(paths):
        link = path.is_symlink()
        kind = "link" if link else path.stat().st_mode & 0o100
        total.update(f"{path.relative_to(root)}\0{kind}\0".encode())
        total.update(hashlib.sha256(os.fsencode(path.readlink()) if link else path.read_bytes()).digest())
    return total.hexdigest()


def _digest_of_trees(*names: str) -> str:
    return digest_of_files(overlay.inputs(names), overlay.OVERLAYS)
