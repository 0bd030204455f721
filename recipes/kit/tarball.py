"""A tarball of ours against its manifests: read once, and never unpacked. What first boot checks, at the desk.

Whatever this project does not write is refused, so that no two programs can see different things in a tarball.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from recipes.kit import manifest, pki
from recipes.kit.archive import CHUNK
from recipes.kit.bounds import Damaged, members, opened
from recipes.kit.errors import BakeError

Part = Literal["node", "payload"]

_FOLDER = manifest.FOLDER.lstrip("/")
_ENDINGS = ("json", "tree", "SHA256SUMS", "SHA256SUMS.sig")
_LARGEST_MANIFEST = 64 << 20  # bytes; of one with 5,000 files it has 1 MiB
_AGAIN = "do not use it: copy it again, or bake it again"


@dataclass
class Contents:
    """What is in a tarball; paths are those on the machine without the first slash."""

    where: Path
    lines: dict[str, str] = field(default_factory=dict)  # of all but folders, as the manifests' .tree have them
    sha256: dict[str, str] = field(default_factory=dict)  # of every file
    folders: dict[str, bool] = field(default_factory=dict)  # whether it is as ours are: 0755 and root's
    manifests: dict[str, bytes] = field(default_factory=dict)  # what lies in the manifests' folder, by name
    mtime: int = 0  # of everything, in seconds since 1970

    @property
    def parts(self) -> tuple[Part, ...]:
        parts: tuple[Part, ...] = ("node", "payload")
        return tuple(part for part in parts if f"{part}.SHA256SUMS" in self.manifests)

    def sums(self, part: Part) -> str:
        """SHA-256 (hex) of that part's SHA256SUMS, which names its whole content."""
        return hashlib.sha256(self.manifests[f"{part}.SHA256SUMS"]).hexdigest()

    def about(self, part: Part) -> dict[str, Any]:
        """That part's .json; to be believed once check() has."""
        told: dict[str, Any] = json.loads(self.manifests[f"{part}.json"])
        return told


def read(tarball: Path, where: Path) -> Contents:
    """Everything in a tarball. BakeError: it is damaged, or holds what none of ours does. where: what people know it
    by."""
    found = Contents(where)
    try:
        with opened(tarball) as tar:
            for member in members(tar):
                _take(tar, member, found)
            if tar.fileobj is None or tar.fileobj.read(2 * tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise Damaged("it does not end as it should")
    except Damaged as trouble:
        raise BakeError(f"this is no tarball as it was baked: {trouble}", where=where, remedy=_AGAIN) from trouble
    return found


def check(parts: Sequence[Contents], key: bytes) -> None:
    """What was read, in all tarballs of one artifact together, is what this key (public, PEM) signed: every byte, mode,
    owner and link, nothing more and nothing less. BakeError says what is not."""
    seen: set[str] = set()
    for each in parts:
        _refuse(each, seen & each.lines.keys(), "stand twice in it")
        seen |= each.lines.keys()
        for part in each.parts:
            _signature(each, part, key)
    for each in parts:
        for part in each.parts:
            _bytes(each, part, parts)
    _tree(parts)


def signed_about(contents: Contents, part: Part, key: bytes) -> dict[str, Any]:
    """A part's .json, as this key signed it; the rest is not looked at yet."""
    _signature(contents, part, key)
    lines = contents.manifests[f"{part}.SHA256SUMS"].decode().splitlines()
    name = f"{_FOLDER}/{part}.json"
    if f"{contents.sha256[name]}  {name}" not in lines:
        raise BakeError(f"{name} is not as it was baked", where=contents.where, remedy=_AGAIN)
    return contents.about(part)


def _take(tar: tarfile.TarFile, member: tarfile.TarInfo, found: Contents) -> None:
    name, mode = member.name, member.mode
    plain = str(PurePosixPath(name)) == name and not name.startswith("/") and ".." not in name.split("/")
    folder = member.type == tarfile.DIRTYPE  # the payload's and the machine's own part may both bring one
    twice = name in found.lines or (name in found.folders and not folder)
    if not plain or twice or member.pax_headers or member.uid != member.gid:
        raise Damaged(f"{name[:200]!r} is not as ours are written")
    found.mtime = int(member.mtime)
    if folder:
        found.folders[name] = found.folders.get(name, True) and mode == 0o755 and member.uid == 0
    elif member.type == tarfile.SYMTYPE:
        found.lines[name] = f"l {member.uid} {name} -> {member.linkname}"
    elif member.type == tarfile.REGTYPE:
        content = tar.extractfile(member)
        if content is None:
            raise Damaged(f"{name[:200]!r} cannot be read")
        digest, kept = hashlib.sha256(), bytearray()
        keep = str(PurePosixPath(name).parent) == _FOLDER and member.size <= _LARGEST_MANIFEST
        while chunk := content.read(CHUNK):
            digest.update(chunk)
            kept += chunk if keep else b""
        found.sha256[name] = digest.hexdigest()
        found.lines[name] = f"f {mode:o} {member.uid} {name}"
        if keep:
            found.manifests[PurePosixPath(name).name] = bytes(kept)
    else:
        raise Damaged(f"{name[:200]!r} is neither a file nor a folder nor a link")


def _signature(contents: Contents, part: Part, key: bytes) -> None:
    lacking = [ending for ending in _ENDINGS if f"{part}.{ending}" not in contents.manifests]
    if lacking:
        raise BakeError(f"its {part} manifest is not whole", where=contents.where, remedy=_AGAIN)
    signature = contents.manifests[f"{part}.SHA256SUMS.sig"]
    if not pki.signed(key, signature, contents.manifests[f"{part}.SHA256SUMS"]):
        raise BakeError(f"the signature of the {part} manifest is wrong", where=contents.where, remedy=_AGAIN)


def _bytes(contents: Contents, part: Part, parts: Sequence[Contents]) -> None:
    there = {path: sha256 for each in parts for path, sha256 in each.sha256.items()}
    lines = contents.manifests[f"{part}.SHA256SUMS"].decode().splitlines()
    told = {path: sha256 for sha256, _, path in (line.partition("  ") for line in lines)}
    _refuse(
        contents, (path for path, sha256 in told.items() if there.get(path) != sha256), "are not as they were baked"
    )


def _tree(parts: Sequence[Contents]) -> None:
    told = {
        line
        for each in parts
        for part in each.parts
        for line in (
            *each.manifests[f"{part}.tree"].decode().splitlines(),
            *(f"f 644 0 {_FOLDER}/{part}.{ending}" for ending in _ENDINGS),
        )
    }
    found = {line for each in parts for line in each.lines.values()}
    [first, *_] = parts
    _refuse(first, told ^ found, "are not as they were baked (kind, mode, owner, path)")
    for each in parts:
        used = {str(folder) for path in each.lines for folder in PurePosixPath(path).parents}
        odd = (name for name, whole in each.folders.items() if not whole or name not in used)
        _refuse(each, odd, "are folders that are not as they were baked")


def _refuse(contents: Contents, odd: Iterable[str], why: str) -> None:
    listed = sorted(odd)
    if listed:
        more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
        raise BakeError(f"{', '.join(listed[:3])}{more} {why}", where=contents.where, remedy=_AGAIN)
