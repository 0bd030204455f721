"""The closure proof: what an artifact names, it has.

A machine in the datacenter cannot fetch what was forgotten, so the bake fails instead. Known is what the artifact
brings, what its Debian packages bring, and what system.yaml lists: what Debian's minimal system has, and what the
machine itself makes at run time.
"""

from __future__ import annotations

import gzip
import json
import lzma
import posixpath
import re
import subprocess
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from io import BufferedIOBase, BufferedReader, BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from recipes.kit import manifest, shell
from recipes.kit.errors import BakeError, BakeErrors
from recipes.kit.model import USERS, Arch, Cluster, Fetched, File, Image, Node, Role

SYSTEM = Path(__file__).with_name("system.yaml")
MACHINES: dict[Arch, int] = {"amd64": 62, "arm64": 183}  # ELF's e_machine

_UNIT_LIST = (
    *("After", "BindsTo", "OnFailure", "OnSuccess", "PartOf", "RequiredBy", "Requires", "Requisite", "Sockets"),
    *("Unit", "Upholds", "WantedBy", "Wants"),
)
_TOPS = "bin|dev|etc|home|lib|mnt|opt|proc|root|run|sbin|srv|sys|tmp|usr|var"
# An absolute path below a folder of the file hierarchy; what stands before tells it from the tail of a URL or variable.
_PATH = re.compile(rf"(?<![\w.+/:}}\])@%-])(-?)(/(?:{_TOPS})(?![\w.-])(?:/[A-Za-z0-9._+@:*?-]*)*)([$%{{<@\\]?)")
_MADE = re.compile(rb"^[dDf]!? +(/\S+)", re.MULTILINE)
_ASKED = re.compile(r"""(?:\[|\btest) (?:! )?-[a-z] "?(/[^\s"]+)""")
_SANDBOX = re.compile(r"""^\s*sandbox(?:_image)?\s*=\s*['"]([^'"]+)['"]""", re.MULTILINE)
_NO_TEXT = (manifest.FOLDER, "/etc/nodebake/objects", "/etc/nodebake/inventory.json", "/etc/ssh")
_OBJECTS = "/etc/nodebake/objects"
_UNITS = "/etc/systemd/system"
_ARCHIVES = re.compile(r"/opt/nodebake/[0-9a-f]+/images/[^/]+")
_PROGRAMS = re.compile(r"/opt/nodebake/[0-9a-f]+/(?:bin|cni)/[^/]+")
_DEBS = re.compile(r"/opt/nodebake/[0-9a-f]+/packages/[^/]+\.deb")
_SMALL = 1 << 16  # bytes of a package that is quickly unpacked; small ones are made of links (/usr/bin/python3)
_NAME = "io.containerd.image.name"
_MERGED = {f"/{name}": f"usr/{name}" for name in ("bin", "sbin", "lib")}
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_CREDENTIAL = re.compile(r"%d/([\w.-]+)")
_SHELLS = ("#!/bin/sh", "#!/bin/bash")
_CONSTANT = re.compile(r"^\s*(\w+)=(/[\w./-]+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Ask:
    """What a file names. It is met where one of any_of is there: paths on the machine, or full names of images; never
    where there is none. With a reader, a user, it is met unless the one path is a file of ours that this user may not
    read."""

    what: str  # told when it is not met
    where: str  # the file that names it
    any_of: tuple[str, ...] = ()
    reader: str | None = None
    remedy: str = "bake what is named, or correct the name"


@dataclass(frozen=True, slots=True)
class Proven:
    """A payload as far as it can be proven without a machine: what it brings, and what it leaves to each machine."""

    # Paths of files and folders, those that its Debian packages list too (of small ones all); full names of images.
    there: frozenset[str]
    links: Mapping[str, str]  # path -> target
    asks: tuple[Ask, ...]

    def as_record(self) -> dict[str, Any]:
        """As JSON has it; read back by from_record()."""
        return {"there": sorted(self.there), "links": dict(self.links), "asks": [asdict(ask) for ask in self.asks]}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Proven:
        asks = (Ask(**{**ask, "any_of": tuple(ask["any_of"])}) for ask in record["asks"])
        return cls(frozenset(record["there"]), record["links"], tuple(asks))


def prove_payload(
    files: Sequence[File],
    cluster: Cluster,
    role: Role,
    arch: Arch,
    images: Sequence[Image] = (),
    packages: Sequence[str] = (),
) -> Proven:
    """Proves what all machines of one role and architecture share (its manifest may be left out).

    images: what the payload was given; each of its references must be a name that an archive really has. packages:
    Debian packages that the overlays ask for; programs call what is in them unseen (kube-proxy calls nft), so each must
    be there, or a part of the minimal system. BakeErrors name every hole that no machine can fill.
    """
    asks = [ask for file in files for ask in _asks(file, cluster)]
    asks += [ask for file in files for ask in _foreign(file, arch)]
    asks += _missing(files, role, arch, packages)
    if role in ("control-plane", "worker"):
        asks += [_listed(image) for image in images]
    brought = _brought(files)
    machine = _Machine(brought.there, brought.links, files)
    unmet = {ask for ask in asks if not machine.met(ask)}
    _raise([ask for ask in asks if ask in unmet and (not ask.any_of or ask.reader)])
    unmet |= {ask for ask in asks if ask.reader and not machine.has(ask.any_of[0])}
    return replace(brought, asks=tuple(dict.fromkeys(ask for ask in asks if ask in unmet)))


def prove(
    proven: Proven,
    cluster: Cluster,
    node: Node,
    identity: Sequence[File],
    debs: Callable[[], Iterable[Fetched]] = tuple,
) -> None:
    """Proves one machine: its identity upon its proven payload. BakeErrors name every hole in the two together.

    debs: the payload's Debian packages, asked for only when something is missing that none of them lists: a link.
    """
    brought = _brought(identity)
    machine = _Machine(proven.there | brought.there, {**proven.links, **brought.links}, identity, debs)
    asks = [*proven.asks, *(ask for file in identity for ask in _asks(file, cluster))]
    asks += [
        Ask("the payload, or a package in it, brings this file too", file.path, remedy="take it out of one of the two")
        for file in identity
        if file.path in proven.there
    ]
    _raise([ask for ask in asks if not machine.met(ask)], of=f"{node.name}:")


def _raise(unmet: Sequence[Ask], of: str = "") -> None:
    if unmet:
        raise BakeErrors([BakeError(ask.what, where=f"{of}{ask.where}", remedy=ask.remedy) for ask in unmet])


def _brought(files: Sequence[File]) -> Proven:
    there: set[str] = set()
    for file in files:
        there.update((file.path, *_folders(file.path)))
        if file.path.startswith("/etc/tmpfiles.d/"):  # what systemd-tmpfiles makes there
            there.update(path.decode() for path in _MADE.findall(file.data or b""))
        elif file.source is not None and _DEBS.fullmatch(file.path):
            small = file.source.stat().st_size <= _SMALL
            for path in (_deb_members if small else _deb_listed)(file.source, file.sha256):
                there.update((path, *_folders(path)))
        elif file.source is not None and _ARCHIVES.fullmatch(file.path):
            there |= _archive(file.source, file.sha256).names
    return Proven(frozenset(there), {file.path: file.link for file in files if file.link is not None}, ())


def _folders(path: str) -> Iterator[str]:
    """The folders that a path lies in, from the root on, without the root itself."""
    return (path[: slash.start()] for slash in re.finditer("/", path) if slash.start())


class _Machine:
    """What there is on the machine once the artifact is unpacked and its packages are installed."""

    def __init__(
        self,
        there: Set[str],
        links: Mapping[str, str],
        files: Iterable[File],
        debs: Callable[[], Iterable[Fetched]] = tuple,
    ) -> None:
        self._there = there
        self._debs = debs
        self._links = {**_MERGED, **links}
        self._files = {file.path: file for file in files}  # whose modes are known

    def met(self, ask: Ask) -> bool:
        if ask.reader is None:
            return any(map(self.has, ask.any_of)) or self._unlisted(set(map(self._place, ask.any_of)))
        read = self._files.get(self.resolve(ask.any_of[0]))
        return read is None or bool(read.mode & 0o004) or read.owner == ask.reader

    def has(self, name: str) -> bool:
        if not name.startswith("/"):  # an image
            return name in self._there
        path = posixpath.normpath(name)
        if path in _system("paths") or f"{path}/".startswith(_runtime()):
            return True
        found = self._place(path)
        folder, _, last = found.rpartition("/")
        return (
            (found in self._there and found not in self._links)  # a link that resolve() gave up on goes in circles
            or found in _system("paths")
            or (folder in ("/usr/bin", "/usr/sbin") and last in _system("programs"))
        )

    def _place(self, path: str) -> str:
        """Where a path leads. Of a pattern that matches nothing today, which may stay so, its folder."""
        found = self.resolve(posixpath.normpath(path))
        return self._place(_folder(found)) if _is_pattern(found) else found

    def _unlisted(self, paths: Set[str]) -> bool:
        """Whether a package contains one of the paths though it does not list it (a link): the smallest are unpacked
        first, for all of them take seconds."""
        debs = sorted(self._debs(), key=lambda deb: deb.size) if paths else ()
        return any(not paths.isdisjoint(_deb_members(deb.path, deb.sha256)) for deb in debs)

    def resolve(self, path: str) -> str:
        """The path behind the artifact's own links and Debian's merged /usr."""
        for _ in range(40):
            folder = next((each for each in (*_folders(path), path) if each in self._links), None)
            if folder is None:
                break
            target = posixpath.join(posixpath.dirname(folder), self._links[folder])
            path = posixpath.normpath(target + path[len(folder) :])
        return path


@cache
def _system(key: str) -> frozenset[str]:
    """A list of system.yaml."""
    return frozenset(yaml.load(SYSTEM.read_text(encoding="utf-8"), Loader=_LOADER)[key].split())  # noqa: S506 - safe


@cache
def _runtime() -> tuple[str, ...]:
    return tuple(f"{known}/" for known in _system("runtime"))


def _is_pattern(path: str) -> bool:
    return "*" in path or "?" in path


def _folder(pattern: str) -> str:
    return str(PurePosixPath(re.split(r"[^/]*[*?]", pattern)[0]))


def _asks(file: File, cluster: Cluster) -> Iterator[Ask]:
    """All that a file names."""
    if file.link is not None:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(file.path), file.link))
        yield Ask(f"the link points at {file.link}, which is not there", file.path, (target,))
    text = _text(file)
    if text is not None:
        text = _constants_filled_in(text) if text.startswith(_SHELLS) else text
        yield from _paths(file, text)
        if text.startswith(_SHELLS) or file.path.startswith("/etc/profile.d/"):
            yield from _commands(file, (file.data or b"").decode())
        if str(PurePosixPath(file.path).parent) == _UNITS or re.search(r"\.(service|timer|path)\.d/", file.path):
            yield from _unit(file, text)
    pullable = tuple(f"{registry.host}/" for registry in cluster.registries)
    for what, reference, always in _images(file):
        name = reference_name(reference)
        if name.startswith(pullable):
            continue
        yield Ask(f"{what} {reference} is named here, but no archive in the artifact has it", file.path, (name,))
        if always:
            told = f"{what} {reference} would be asked of a registry each time, which is the default for the tag latest"
            yield Ask(told, file.path, remedy="say imagePullPolicy: IfNotPresent there, or give the image another tag")


def _text(file: File) -> str | None:
    """A configuration, unit or program without comments; None for what is not searched (secrets, objects, binaries)."""
    if file.data is None or file.path.startswith(_NO_TEXT) or b"-----BEGIN" in file.data:
        return None
    try:
        text = file.data.decode("utf-8")
    except UnicodeDecodeError:
        return None
    first, _, _ = text.partition("\n")
    lines = (re.sub(r"(^|\s)#.*$|^\s*[;!].*$", r"\1", line) for line in text.splitlines())
    return "\n".join([first, *list(lines)[1:]] if first.startswith("#!") else lines)


def _constants_filled_in(text: str) -> str:
    """A shell program in which variables that only ever are one path are that path: "$payload/bin/ctr"."""
    for name, path in _CONSTANT.findall(text):
        if len(re.findall(rf"\b{name}=|\bread\b.*\b{name}\b|\bfor {name}\b", text)) == 1:
            text = re.sub(rf"\$(?:{name}\b|{{{name}}})", path, text)
    return text


def _paths(file: File, text: str) -> Iterator[Ask]:
    said: set[str] = set()
    if text.startswith("#!") or file.path.endswith(".sh"):
        said.update(_ASKED.findall(text))  # a program that asks whether a file is there can do without it
    for line in text.splitlines():
        if re.match(r"\s*(Condition|Assert)\w+=", line):
            continue
        for optional, path, behind in _PATH.findall(line.replace("unix://", " ")):
            if optional:
                continue
            # What a variable or a specifier completes: its folder must be there.
            path = path.rpartition("/")[0] if behind else path
            if ":/" in path:  # a PATH: no folder of it must be there
                continue
            path = path.partition(":")[0].rstrip("/.") or "/"
            if path not in said:
                said.add(path)
                yield Ask(f"{path} is named here, but is not in the artifact", file.path, (path,))


def _commands(file: File, text: str) -> Iterator[Ask]:
    for name in sorted(shell.commands(text) - _system("programs")):
        places = tuple(f"{folder}/{name}" for folder in ("/opt/nodebake/current/bin", "/usr/bin", "/usr/sbin"))
        yield Ask(f"the program {name} is called here, but is not in the artifact", file.path, places)


def _unit(file: File, text: str) -> Iterator[Ask]:
    name = re.sub(r"\.d/.*", "", file.path.removeprefix(f"{_UNITS}/"))
    if "/" not in name and name not in _system("units"):
        yield Ask(f"this is a part of the unit {name}, which is not there", file.path, _places_of_unit(name))
    settings = [line.partition("=") for line in text.replace("\\\n", " ").splitlines()]
    for key, _, value in settings:
        if key.strip() in _UNIT_LIST:
            for other in value.split():
                if other == name:
                    told = f"the unit names itself in {key}=: systemd drops it from the boot without a word"
                    yield Ask(told, file.path)
                elif other not in _system("units") and "%" not in other:
                    told = f"the unit {other} is named in {key}=, but is not in the artifact"
                    yield Ask(told, file.path, _places_of_unit(other))
    loaded = dict(value.strip().partition(":")[::2] for key, _, value in settings if key.strip() == "LoadCredential")
    for path in loaded.values():
        yield Ask(f"{path} is named here, but is not in the artifact", file.path, (path,))
    for wanted in sorted(set(_CREDENTIAL.findall(text)) - set(loaded)):
        yield Ask(f"the credential {wanted} is named here, but not loaded (LoadCredential=)", file.path)
    user = next((value.strip() for key, _, value in settings if key.strip() == "User"), "root")
    if user == "root" or user not in USERS:
        return
    for key, _, value in settings:
        for _, path, _ in _PATH.findall(value) if key.startswith("Exec") else ():
            told = f"this unit runs as {user}, which may not read {path}"
            yield Ask(told, file.path, (path.rstrip("/"),), reader=user)


def _places_of_unit(name: str) -> tuple[str, ...]:
    names = dict.fromkeys((name, re.sub(r"@[^.]*\.", "@.", name)))
    return tuple(f"{folder}/{each}" for folder in (_UNITS, "/usr/lib/systemd/system") for each in names)


# -- what no machine can mend -----------------------------------------------------------------------------------------


def _foreign(file: File, arch: Arch) -> Iterator[Ask]:
    """What is not for this architecture, or not what it should be."""
    if _PROGRAMS.fullmatch(file.path):
        yield from _program(file, arch)
    elif _DEBS.fullmatch(file.path) and not file.path.endswith((f"_{arch}.deb", "_all.deb")):
        told = f"this package is not for {arch}"
        yield Ask(told, file.path, remedy="look at the lock of the Debian packages")
    elif _ARCHIVES.fullmatch(file.path) and file.source is not None:
        archive = _archive(file.source, file.sha256)
        if archive.trouble:
            told = f"this image archive cannot be read: {archive.trouble}"
            yield Ask(told, file.path, remedy="look at where it came from")
        elif not archive.names:
            yield Ask(f"no image in this archive has a name ({_NAME})", file.path, remedy="name it where it was made")
        for other in sorted(archive.arches - {arch}):
            told = f"this image is for {other}, the node is {arch}"
            yield Ask(told, file.path, remedy="take the node's architecture")


def _program(file: File, arch: Arch) -> Iterator[Ask]:
    head = _first_bytes(file)
    remedy = "look at the component's source"
    if head[:4] == b"\x7fELF":
        machine = int.from_bytes(head[18:20], "little" if head[5] == 1 else "big")
        if machine != MACHINES[arch]:
            names = {number: name for name, number in MACHINES.items()}
            found = names.get(machine, f"machine type {machine}")
            yield Ask(f"this program is for {found}, the node is {arch}", file.path, remedy=remedy)
    elif head[:2] != b"#!":
        yield Ask("this is no program: neither ELF nor a script", file.path, remedy=remedy)


def _first_bytes(file: File) -> bytes:
    if file.source is None:
        return (file.data or b"")[:20]
    with file.source.open("rb") as stream:
        return stream.read(20)


def _missing(files: Sequence[File], role: Role, arch: Arch, wanted: Iterable[str]) -> Iterator[Ask]:
    there = {PurePosixPath(file.path).name.partition("_")[0] for file in files if _DEBS.fullmatch(file.path)}
    for name in sorted(set(wanted) - there - _system("packages")):
        told = f"the Debian package {name} is asked for, but is not in the artifact"
        yield Ask(told, f"overlays/packages.yaml, for {role} {arch}")


# -- images -----------------------------------------------------------------------------------------------------------


def _images(file: File) -> Iterator[tuple[str, str, bool]]:
    """(kind, reference, whether it is pulled each time) of each image that containerd's configuration or a cluster
    object names."""
    if file.data is None:
        return
    if file.path.startswith("/etc/containerd/") and file.path.endswith(".toml"):
        for reference in _SANDBOX.findall(file.data.decode()):
            yield "the sandbox image", reference, False
    elif file.path.startswith(f"{_OBJECTS}/") and not file.path.endswith("-tokens.yaml"):
        # Objects may be many (a volume per machine): only documents with an image in them are parsed.
        for document in re.split(rb"^---.*$", file.data, flags=re.MULTILINE):
            if b"image" in document:
                for reference, always in sorted(set(_references(yaml.load(document, Loader=_LOADER)))):  # noqa: S506 - safe
                    yield "the image", reference, always


def _listed(image: Image) -> Ask:
    told = f"the image {image.reference} is in the list, but no archive in the artifact has that name"
    return Ask(told, f"the image {image.name}", (reference_name(image.reference),), remedy="look at its archive")


def _references(value: Any) -> Iterator[tuple[str, bool]]:
    """Of containers, and of volumes that are images; with whether the kubelet asks a registry each time."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            listed = [each for each in inner if isinstance(each, Mapping)] if isinstance(inner, list) else []
            if key in ("containers", "initContainers", "ephemeralContainers"):
                yield from (_pulled(each["image"], each.get("imagePullPolicy")) for each in listed if "image" in each)
                continue
            for volume in listed if key == "volumes" else ():
                if isinstance(image := volume.get("image"), Mapping) and "reference" in image:
                    yield _pulled(image["reference"], image.get("pullPolicy"))
            yield from _references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _references(inner)


def _pulled(reference: object, policy: object) -> tuple[str, bool]:
    """What the API server makes of no policy: Always for the tag latest, also where no tag is said."""
    latest = reference_name(str(reference)).endswith(":latest")
    return str(reference), policy == "Always" or (policy is None and latest)


def reference_name(reference: str) -> str:
    """A reference as containerd files it: "nginx" is docker.io/library/nginx:latest."""
    first, slash, _ = reference.partition("/")
    if not slash or not ("." in first or ":" in first or first == "localhost"):
        reference = f"docker.io/{reference}" if slash else f"docker.io/library/{reference}"
    return reference if re.search(r"[:@][^/]+$", reference) else f"{reference}:latest"


@dataclass(frozen=True, slots=True)
class _Archive:
    """An image archive's names and architectures; trouble: why it cannot be read."""

    names: frozenset[str] = frozenset()
    arches: frozenset[str] = frozenset()
    trouble: str = ""


@lru_cache(maxsize=1024)
def _archive(source: Path, _digest: str | None) -> _Archive:
    """From its index (OCI) or its manifest (docker save)."""
    try:
        with tarfile.open(source) as tar:
            return _read_archive(tar)
    except (tarfile.TarError, OSError, ValueError, KeyError) as error:
        return _Archive(trouble=str(error))


def _read_archive(tar: tarfile.TarFile) -> _Archive:
    names: set[str] = set()
    arches: set[str] = set()
    members = {member.name.removeprefix("./"): member for member in tar}

    def read(name: str) -> Any:
        stream = tar.extractfile(members[name])
        return json.loads(stream.read()) if stream is not None else {}

    if "index.json" in members:
        for top in read("index.json")["manifests"]:
            name = top.get("annotations", {}).get(_NAME)
            names |= {reference_name(name)} if name else set()
            config = read(f"blobs/{top['digest'].replace(':', '/')}").get("config")
            if config is not None:
                arches.add(read(f"blobs/{config['digest'].replace(':', '/')}").get("architecture", "none"))
    if "manifest.json" in members:
        for top in read("manifest.json"):
            names |= {reference_name(name) for name in top.get("RepoTags") or ()}
            arches.add(read(top["Config"]).get("architecture", "none"))
    return _Archive(frozenset(names), frozenset(arches))


# -- Debian packages --------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def _deb_listed(source: Path, _digest: str | None) -> frozenset[str]:
    """The regular files of a Debian package, by its lists of checksums and configuration: quick."""
    found: set[str] = set()
    with source.open("rb") as deb, _deb_part(deb, "control.tar") as data, tarfile.open(fileobj=data, mode="r|") as tar:
        for member in tar:
            name = member.name.removeprefix("./")
            stream = tar.extractfile(member) if name in ("md5sums", "conffiles") else None
            for line in stream.read().decode("utf-8", "replace").splitlines() if stream is not None else ():
                found.add(_merged(line.split(maxsplit=1)[-1] if name == "md5sums" else line.split()[-1]))
    return frozenset(found)


@lru_cache(maxsize=4096)
def _deb_members(source: Path, _digest: str | None) -> frozenset[str]:
    """All that a Debian package contains."""
    with source.open("rb") as deb, _deb_part(deb, "data.tar") as data, tarfile.open(fileobj=data, mode="r|") as tar:
        return frozenset(_merged(member.name.removeprefix("./")) for member in tar)


def _merged(path: str) -> str:
    path = "/" + path.strip("/")
    return f"/usr{path}" if path.startswith(("/bin/", "/sbin/", "/lib/")) else path


def _deb_part(deb: BufferedReader, part: str) -> BufferedIOBase:
    """control.tar or data.tar of a .deb (an ar archive: 60 bytes of header a member), unpacked while it is read."""
    deb.seek(8)
    while header := deb.read(60):
        name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
        if name == f"{part}.xz":
            return lzma.open(deb)
        if name == f"{part}.gz":
            return gzip.open(deb)
        if name == f"{part}.zst":
            option = "--ctrl-tarfile" if part == "control.tar" else "--fsys-tarfile"
            return BytesIO(subprocess.run(["dpkg-deb", option, deb.name], check=True, capture_output=True).stdout)
        deb.seek(size + size % 2, 1)
    raise BakeError(f"this Debian package has no {part}", where=deb.name, remedy="remove it and run doit once more")
