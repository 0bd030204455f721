"""The closure proof: what an artifact names, it has.

A machine in the datacenter cannot fetch what was forgotten, so the bake fails instead. Known is what the artifact
brings, what its Debian packages bring, and what system.yaml lists: what Debian's minimal system has, and what the
machine itself makes at run time.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import re
import subprocess
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property, lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from recipes.kit import manifest, shell
from recipes.kit.errors import BakeError, BakeErrors
from recipes.kit.model import USERS, Arch, Cluster, File, Image, Node

SYSTEM = Path(__file__).with_name("system.yaml")
MACHINES: dict[Arch, int] = {"amd64": 62, "arm64": 183}  # ELF's e_machine

_UNIT_LIST = (
    *("After", "BindsTo", "OnFailure", "OnSuccess", "PartOf", "RequiredBy", "Requires", "Requisite", "Sockets"),
    *("Unit", "Upholds", "WantedBy", "Wants"),
)
_TOPS = "bin|dev|etc|home|lib|mnt|opt|proc|root|run|sbin|srv|sys|tmp|usr|var"
# An absolute path below a folder of the file hierarchy; what stands before tells it from the tail of a URL or variable.
_PATH = re.compile(rf"(?<![\w.+/:}}\])@%-])(-?)(/(?:{_TOPS})(?![\w.-])(?:/[A-Za-z0-9._+@:*?-]*)*)([$%{{<@\\]?)")
_MADE = re.compile(rb"^d +(/\S+)", re.MULTILINE)
_ASKED = re.compile(r"""(?:\[|\btest) (?:! )?-[a-z] "?(/[^\s"]+)""")
_SANDBOX = re.compile(r"""^\s*sandbox(?:_image)?\s*=\s*['"]([^'"]+)['"]""", re.MULTILINE)
_NO_TEXT = (manifest.FOLDER, "/etc/nodebake/objects", "/etc/nodebake/inventory.json", "/etc/ssh")
_OBJECTS = "/etc/nodebake/objects"
_UNITS = "/etc/systemd/system"
_ARCHIVES = re.compile(r"/opt/nodebake/[0-9a-f]+/images/[^/]+")
_PROGRAMS = re.compile(r"/opt/nodebake/[0-9a-f]+/(?:bin|cni)/[^/]+")
_DEBS = re.compile(r"/opt/nodebake/[0-9a-f]+/packages/[^/]+\.deb")
_NAME = "io.containerd.image.name"
_SHELLS = ("#!/bin/sh", "#!/bin/bash")
_CONSTANT = re.compile(r"^\s*(\w+)=(/[\w./-]+)$", re.MULTILINE)


def prove(
    files: Sequence[File],
    cluster: Cluster,
    node: Node,
    images: Sequence[Image] = (),
    packages: Sequence[str] = (),
) -> None:
    """Raises BakeErrors that name every hole in one node's artifact.

    files: payload and identity together (manifests may be left out). images: what the payload was given; each of its
    references must be a name that an archive really has. packages: Debian packages that the overlays ask for; programs
    call what is in them unseen (kube-proxy calls nft), so each must be there, or a part of the minimal system.
    """
    machine = _Machine(files)
    holes: list[BakeError] = []
    for file in files:
        if file.link is not None:
            holes += _link(machine, file)
        elif _PROGRAMS.fullmatch(file.path):
            holes += _program(file, node.arch)
        elif _DEBS.fullmatch(file.path):
            holes += _deb(file, node.arch)
        text = _text(file)
        if text is not None:
            text = _constants_filled_in(text) if text.startswith(_SHELLS) else text
            holes += _paths(machine, file, text)
            if text.startswith(_SHELLS) or file.path.startswith("/etc/profile.d/"):
                holes += _commands(machine, file, (file.data or b"").decode())
            if str(PurePosixPath(file.path).parent) == _UNITS or re.search(r"\.(service|timer|path)\.d/", file.path):
                holes += _unit(machine, file, text)
    holes += _images(files, cluster, node, images)
    holes += _packages(files, node, packages)
    if holes:
        raise BakeErrors(holes)


class _Machine:
    """What there is on the machine once the artifact is unpacked and its packages are installed."""

    def __init__(self, files: Sequence[File]) -> None:
        self.files = {file.path: file for file in files}
        self.folders = {str(folder) for path in self.files for folder in PurePosixPath(path).parents}
        for file in files:  # what systemd-tmpfiles makes there
            if file.path.startswith("/etc/tmpfiles.d/"):
                self.folders |= {path.decode() for path in _MADE.findall(file.data or b"")}
        self._links = {file.path: file.link for file in files if file.link is not None}
        self._debs = [
            (file.source, file.sha256) for file in files if _DEBS.fullmatch(file.path) and file.source is not None
        ]

    def resolve(self, path: str, depth: int = 0) -> str:
        """The path behind the artifact's own links and Debian's merged /usr."""
        parts = PurePosixPath(path).parts
        for count in range(2, len(parts) + 1):
            folder = str(PurePosixPath(*parts[:count]))
            link = self._links.get(folder)
            if link is None and count == 2 and folder in ("/bin", "/sbin", "/lib"):
                link = f"usr{folder}"
            if link is not None and depth < 40:
                target = _normal_path(f"{PurePosixPath(folder).parent}/{link}" if link[0] != "/" else link)
                return self.resolve(str(PurePosixPath(target, *parts[count:])), depth + 1)
        return path

    def has(self, *paths: str) -> bool:
        """Whether one of the paths is there; unpacking packages comes last, for it takes seconds."""
        return any(self._known(path) for path in paths) or any(self._place(path) in self._unpacked for path in paths)

    def _place(self, path: str) -> str:
        """Where a path leads. Of a pattern that matches nothing today, which may stay so, its folder."""
        found = self.resolve(_normal_path(path))
        return self._place(_folder(found)) if _is_pattern(found) else found

    def _known(self, path: str) -> bool:
        """Whether it is there, by all that is quick to ask."""
        path = _normal_path(path)
        if path in _system("paths") or any(f"{path}/".startswith(f"{known}/") for known in _system("runtime")):
            return True
        found = self.resolve(path)
        if _is_pattern(found):
            return self._known(_folder(found))
        if found in self.files or found in self.folders or found in _system("paths"):
            return True
        pure = PurePosixPath(found)
        if str(pure.parent) in ("/usr/bin", "/usr/sbin") and pure.name in _system("programs"):
            return True
        return found in self._listed

    def has_command(self, name: str) -> bool:
        folders = ("/opt/nodebake/current/bin", "/usr/bin", "/usr/sbin")
        return name in _system("programs") or self.has(*(f"{folder}/{name}" for folder in folders))

    def has_unit(self, name: str) -> bool:
        if name in _system("units") or "%" in name:
            return True
        names = {name, re.sub(r"@[^.]*\.", "@.", name)}
        folders = (_UNITS, "/usr/lib/systemd/system")
        return self.has(*(f"{folder}/{each}" for folder in folders for each in names))

    @cached_property
    def _listed(self) -> frozenset[str]:
        """Regular files of the packages, by their lists of checksums: quick."""
        return frozenset(path for source, digest in self._debs for path in _deb_listed(source, digest))

    @cached_property
    def _unpacked(self) -> frozenset[str]:
        """All that the packages contain, links too: only looked at when something is missing."""
        return frozenset(path for source, digest in self._debs for path in _deb_members(source, digest))


@cache
def _system(key: str) -> frozenset[str]:
    """A list of system.yaml."""
    return frozenset(yaml.safe_load(SYSTEM.read_text(encoding="utf-8"))[key].split())


def _is_pattern(path: str) -> bool:
    return "*" in path or "?" in path


def _folder(pattern: str) -> str:
    return str(PurePosixPath(re.split(r"[^/]*[*?]", pattern)[0]))


def _hole(what: str, file: File, remedy: str = "bake what is named, or correct the name") -> BakeError:
    return BakeError(what, where=file.path, remedy=remedy)


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


def _link(machine: _Machine, file: File) -> list[BakeError]:
    target = machine.resolve(file.path)
    if target == file.path or not machine.has(target):
        return [_hole(f"the link points at {file.link}, which is not there", file)]
    return []


def _paths(machine: _Machine, file: File, text: str) -> Iterator[BakeError]:
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
            if path not in said and not machine.has(path):
                said.add(path)
                yield _hole(f"{path} is named here, but is not in the artifact", file)


def _commands(machine: _Machine, file: File, text: str) -> Iterator[BakeError]:
    for name in sorted(shell.commands(text)):
        if not machine.has_command(name):
            yield _hole(f"the program {name} is called here, but is not in the artifact", file)


def _unit(machine: _Machine, file: File, text: str) -> Iterator[BakeError]:
    name = re.sub(r"\.d/.*", "", file.path.removeprefix(f"{_UNITS}/"))
    if "/" not in name and not machine.has_unit(name):
        yield _hole(f"this is a part of the unit {name}, which is not there", file)
    settings = [line.partition("=") for line in text.replace("\\\n", " ").splitlines()]
    for key, _, value in settings:
        if key.strip() in _UNIT_LIST:
            for other in value.split():
                if other == name:
                    yield _hole(f"the unit names itself in {key}=: systemd drops it from the boot without a word", file)
                elif not machine.has_unit(other):
                    yield _hole(f"the unit {other} is named in {key}=, but is not in the artifact", file)
    user = next((value.strip() for key, _, value in settings if key.strip() == "User"), "root")
    if user == "root" or user not in USERS:
        return
    for key, _, value in settings:
        if not key.startswith("Exec"):
            continue
        for _, path, _ in _PATH.findall(value):
            read = machine.files.get(machine.resolve(path.rstrip("/")))
            if read is not None and read.link is None and not read.mode & 0o004 and read.owner != user:
                yield _hole(f"{path} is {read.owner}'s alone, and this unit runs as {user}", file)


def _program(file: File, arch: Arch) -> list[BakeError]:
    head = _first_bytes(file)
    if head[:2] == b"#!":
        return []
    if head[:4] != b"\x7fELF":
        return [_hole("this is no program: neither ELF nor a script", file, "look at the component's source")]
    machine = int.from_bytes(head[18:20], "little" if head[5] == 1 else "big")
    if machine != MACHINES[arch]:
        names = {number: name for name, number in MACHINES.items()}
        found = names.get(machine, f"machine type {machine}")
        return [_hole(f"this program is for {found}, the node is {arch}", file, "look at the component's source")]
    return []


def _first_bytes(file: File) -> bytes:
    if file.data is not None:
        return file.data[:20]
    return _head_of(file.source, file.sha256) if file.source is not None else b""


@lru_cache(maxsize=4096)
def _head_of(source: Path, _digest: str | None) -> bytes:
    with source.open("rb") as stream:
        return stream.read(20)


def _deb(file: File, arch: Arch) -> list[BakeError]:
    if file.path.endswith((f"_{arch}.deb", "_all.deb")):
        return []
    return [_hole(f"this package is not for {arch}", file, "look at the lock of the Debian packages")]


# -- images -----------------------------------------------------------------------------------------------------------


def _images(files: Sequence[File], cluster: Cluster, node: Node, images: Sequence[Image]) -> Iterator[BakeError]:
    there: set[str] = set()
    for file in files:
        if _ARCHIVES.fullmatch(file.path) and file.source is not None:
            try:
                names, arches = _archive(file.source, file.sha256)
            except (tarfile.TarError, OSError, ValueError, KeyError) as error:
                yield _hole(f"this image archive cannot be read: {error}", file, "look at where it came from")
                continue
            there |= names
            if not names:
                yield _hole(f"no image in this archive has a name ({_NAME})", file, "name it where it was made")
            for arch in sorted(arches - {node.arch}):
                yield _hole(f"this image is for {arch}, the node is {node.arch}", file, "take the node's architecture")
    if not node.runs_kubelet:
        return
    pullable = tuple(f"{registry.host}/" for registry in cluster.registries)
    for file, what, reference in _wanted(files):
        name = reference_name(reference)
        if name not in there and not name.startswith(pullable):
            yield _hole(f"{what} {reference} is named here, but no archive in the artifact has it", file)
    for image in images:
        if reference_name(image.reference) not in there:
            yield BakeError(
                f"the image {image.reference} is in the list, but no archive in the artifact has that name",
                where=node.name,
                remedy="look at the image's archive",
            )


def _wanted(files: Iterable[File]) -> Iterator[tuple[File, str, str]]:
    """(file, kind, reference) of each image that containerd's configuration or a cluster object names."""
    for file in files:
        if file.data is None:
            continue
        if file.path.startswith("/etc/containerd/") and file.path.endswith(".toml"):
            for reference in _SANDBOX.findall(file.data.decode()):
                yield file, "the sandbox image", reference
        elif file.path.startswith(f"{_OBJECTS}/") and not file.path.endswith("-tokens.yaml"):
            # Objects may be many (a volume per machine): only documents with an image in them are parsed.
            for document in re.split(rb"^---.*$", file.data, flags=re.MULTILINE):
                if b"image" in document:
                    for reference in sorted(set(_references(yaml.load(document, Loader=_LOADER)))):  # noqa: S506 - safe
                        yield file, "the image", reference


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key in ("containers", "initContainers", "ephemeralContainers") and isinstance(inner, list):
                yield from (each["image"] for each in inner if isinstance(each, Mapping) and "image" in each)
            else:
                yield from _references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _references(inner)


def reference_name(reference: str) -> str:
    """A reference as containerd files it: "nginx" is docker.io/library/nginx:latest."""
    first, slash, _ = reference.partition("/")
    if not slash or not ("." in first or ":" in first or first == "localhost"):
        reference = f"docker.io/{reference}" if slash else f"docker.io/library/{reference}"
    return reference if re.search(r"[:@][^/]+$", reference) else f"{reference}:latest"


@lru_cache(maxsize=1024)
def _archive(source: Path, _digest: str | None) -> tuple[frozenset[str], frozenset[str]]:
    """An image archive's names and architectures, from its index (OCI) or its manifest (docker save)."""
    names: set[str] = set()
    arches: set[str] = set()
    with tarfile.open(source) as tar:
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
    return frozenset(names), frozenset(arches)


# -- Debian packages --------------------------------------------------------------------------------------------------


def _packages(files: Sequence[File], node: Node, wanted: Iterable[str]) -> Iterator[BakeError]:
    there = {PurePosixPath(file.path).name.partition("_")[0] for file in files if _DEBS.fullmatch(file.path)}
    for name in sorted(set(wanted) - there - _system("packages")):
        yield BakeError(
            f"the Debian package {name} is asked for, but is not in the artifact",
            where=f"overlays/packages.yaml, for {node.name}",
            remedy="bake what is named, or correct the name",
        )


@lru_cache(maxsize=4096)
def _deb_listed(source: Path, _digest: str | None) -> frozenset[str]:
    found: set[str] = set()
    with _deb_tar(source, "control.tar") as tar:
        for member in tar:
            name = member.name.removeprefix("./")
            stream = tar.extractfile(member) if name in ("md5sums", "conffiles") else None
            for line in stream.read().decode("utf-8", "replace").splitlines() if stream is not None else ():
                path = line.split(maxsplit=1)[-1] if name == "md5sums" else line.split()[-1]
                found.add(_merged(path))
    return frozenset(found)


@lru_cache(maxsize=4096)
def _deb_members(source: Path, _digest: str | None) -> frozenset[str]:
    with _deb_tar(source, "data.tar") as tar:
        return frozenset(_merged(member.name.removeprefix("./")) for member in tar)


def _merged(path: str) -> str:
    path = "/" + path.strip("/")
    return f"/usr{path}" if path.startswith(("/bin/", "/sbin/", "/lib/")) else path


def _deb_tar(source: Path, part: str) -> tarfile.TarFile:
    """control.tar or data.tar of a .deb (an ar archive: 60 bytes of header a member)."""
    with source.open("rb") as stream:
        stream.seek(8)
        while header := stream.read(60):
            name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
            if not name.startswith(part):
                stream.seek(size + size % 2, 1)
                continue
            data = stream.read(size)
            if name.endswith(".xz"):
                data = lzma.decompress(data)
            elif name.endswith(".gz"):
                data = gzip.decompress(data)
            elif name.endswith(".zst"):
                option = "--ctrl-tarfile" if part == "control.tar" else "--fsys-tarfile"
                data = subprocess.run(["dpkg-deb", option, source], check=True, capture_output=True).stdout
            return tarfile.open(fileobj=io.BytesIO(data))
    raise BakeError(f"this Debian package has no {part}", where=source, remedy="remove it and run doit once more")


def _normal_path(path: str) -> str:
    parts: list[str] = []
    for part in PurePosixPath(path).parts[1:]:
        if part == "..":
            parts = parts[:-1]
        else:
            parts.append(part)
    return "/" + "/".join(parts)
