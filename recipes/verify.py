"""`doit verify FILE ...`: whether artifacts are as they were baked for this cluster, byte for byte.

Of a tarball everything is signed. What lies around one, in an ISO or on a disk, is a pure function of the cluster file
and the tarball: it is made once more, and compared.
"""

from __future__ import annotations

import filecmp
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from recipes.bake import Bake
from recipes.kit import archive, bounds, gpt, iso, store
from recipes.kit.atomic import disk_errors
from recipes.kit.bounds import Damaged
from recipes.kit.errors import BakeError
from recipes.kit.gpt import SECTOR
from recipes.kit.tarball import Contents, check, read, signed_about

_AGAIN = "do not use it: copy it again, or bake it again"


class Verifier:
    """Checks artifacts of one cluster, one after the other: payloads first, where thin ones need them."""

    def __init__(self, bake: Bake) -> None:
        self._bake = bake
        self._key = bake.secrets.signing.public_pem
        self._payloads: dict[str, Contents] = {}  # those that were checked, by what machines' manifests call them

    def of(self, path: Path) -> str:
        """What the artifact is. BakeError: it is not as it was baked, or another cluster's."""
        try:
            with path.open("rb") as file:
                gzipped = file.read(2) == b"\x1f\x8b"
            volume = not gzipped and iso.is_volume(path)
        except OSError as error:
            raise BakeError(
                f"it cannot be read: {error.strerror}", where=path, remedy="name a file that is there"
            ) from error
        try:
            with disk_errors(self._bake.folder):  # copies go there
                if gzipped and _begins(path, 512, b"EFI PART"):
                    return self._disk(path)
                if gzipped:
                    return _told(self._tarball(path, path))
                if volume:
                    return self._volume(path, path)
        except OSError as error:
            remedy = "see that the medium is whole, and what it is compared with is in build/"
            raise BakeError(f"it cannot be checked: {error}", where=path, remedy=remedy) from error
        raise BakeError(
            "this is no artifact",
            where=path,
            remedy="name a tarball, a seed ISO, payloads.iso or a disk image (.raw.gz)",
        )

    def _tarball(self, path: Path, where: Path) -> Contents:
        contents = read(path, where)
        if (key := contents.manifests.get("signing.pub", self._key)) != self._key:
            raise BakeError(
                f"it is another cluster's: its key is {store.fingerprint_of(key)}, this cluster's is "
                f"{store.fingerprint_of(self._key)}",
                where=where,
                remedy="name its own cluster file (cluster=FILE)",
            )
        if "payload" in contents.parts:
            check([contents], self._key)
        elif "node" in contents.parts:
            check([contents, self._payload_of(contents)], self._key)
        else:
            raise BakeError("it has no manifest", where=where, remedy="name a tarball of Nodebake's")
        if "node" not in contents.parts:
            self._payloads[contents.sums("payload")] = contents
        return contents

    def _payload_of(self, contents: Contents) -> Contents:
        """The payload that a thin artifact belongs to: one that was checked before, or the one that lies here."""
        about = signed_about(contents, "node", self._key)
        if (known := self._payloads.get(about["payload"])) is not None:
            return known
        here = self._bake.payload(about["role"], about["arch"])
        if here.exists() and self._tarball(here, here).sums("payload") == about["payload"]:
            return self._payloads[about["payload"]]
        raise BakeError(
            "its payload was not named before it, nor does it lie here",
            where=contents.where,
            remedy=f"name it first: doit verify .../{here.name} {contents.where}",
        )

    def _volume(self, path: Path, where: Path) -> str:
        """A machine's seed, or the volume of payloads."""
        from recipes import seed

        with self._scratch() as folder:
            tarballs: list[tuple[Path, Contents]] = []
            for number, (start, length) in enumerate(iso.files(path, where)):
                tarball = _cut(path, start, length, folder / f"{number}.tar.gz")
                if _begins(tarball, 257, b"ustar"):
                    tarballs.append((tarball, self._tarball(tarball, where)))
            made = folder / "made.iso"
            if not tarballs:
                raise BakeError("there is no tarball in it", where=where, remedy="name an ISO of Nodebake's")
            tarball, contents = tarballs[0]
            if "node" in contents.parts:
                node = self._bake.cluster.node(contents.about("node")["node"])
                sign = partial(store.sign, self._bake.secrets)
                documents = seed.documents(self._bake.cluster, node, sums=contents.sums("node"), sign=sign)
                seed.write(documents, tarball, made, mtime=contents.mtime)
            else:
                named = {_payload_name(contents): tarball for tarball, contents in tarballs}
                seed.write_payloads(named, made, mtime=contents.mtime)
            _alike(path, made, where, "what lies around the tarball")
            return "; ".join(_told(contents) for _, contents in tarballs)

    def _disk(self, path: Path) -> str:
        """A disk image: the seed on it, and all of it made once more of that seed and the base that lies here."""
        from recipes import disk

        with self._scratch() as folder:
            raw = _inflated(path, folder / "disk.raw")
            part = next((part for part in gpt.read(raw).partitions.values() if part.name == disk.SEED), None)
            whole = _cut(raw, part.start * SECTOR, part.length * SECTOR, folder / "seed.iso") if part else raw
            if part is None or not iso.is_volume(whole):
                raise BakeError("there is no seed on this disk", where=path, remedy=_AGAIN)
            raw.unlink()
            os.truncate(whole, min(iso.size(whole), part.length * SECTOR))
            told = self._volume(whole, path)
            node = self._bake.cluster.node(told.partition(" ")[0])
            if not self._bake.record("bases", node.arch).exists():
                what = "the Debian that it began with is not here, to compare it with"
                raise BakeError(what, where=path, remedy=f"bake it: doit base:{node.arch}")
            made = folder / "made.raw.gz"
            disk.write(self._bake.disk_layout(node, whole), made)
            _alike(path, made, path, "the Debian on it, or how it is divided,")
            return told

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        """A folder for what is secret, where copies of what was baked cost least."""
        self._bake.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".verify-", dir=self._bake.folder) as folder:
            yield Path(folder)


def _told(contents: Contents) -> str:
    if "node" not in contents.parts:
        about = contents.about("payload")
        return f"the payload {_payload_name(contents)} of the cluster {about['cluster']}, whole"
    about = contents.about("node")
    minted, until = (about[key][:10] for key in ("minted", "installBy"))
    kind = f"{about['role']}, {about['arch']}"
    return f"{about['node']} ({kind}) of the cluster {about['cluster']}, whole; minted {minted}, to install by {until}"


def _payload_name(contents: Contents) -> str:
    about = contents.about("payload")
    return f"{about['role']}-{about['arch']}"


def _begins(path: Path, at: int, sign: bytes) -> bool:
    """Whether the sign stands there in a gzip file."""
    try:
        with bounds.inflated(path) as file:
            return file.read(at + len(sign))[at:] == sign
    except Damaged:
        return False


def _cut(path: Path, start: int, length: int, target: Path) -> Path:
    """A part of a file, as a file."""
    with path.open("rb", buffering=0) as source, target.open("wb") as out:
        source.seek(start)
        archive.copy_range(source, out, length)
    return target


def _inflated(path: Path, target: Path) -> Path:
    """The content of a gzip file, as a file; where it is zero, the file has holes."""
    try:
        with bounds.inflated(path) as file, target.open("wb") as out:
            while chunk := file.read(archive.CHUNK):
                if chunk.strip(b"\0"):
                    out.write(chunk)
                else:
                    out.seek(len(chunk), os.SEEK_CUR)
            out.truncate()
    except Damaged as damage:
        raise BakeError(f"this is no disk image as it was baked: {damage}", where=path, remedy=_AGAIN) from damage
    return target


def _alike(path: Path, made: Path, where: Path, what: str) -> None:
    if not filecmp.cmp(path, made, shallow=False):
        raise BakeError(
            f"{what} is not as it is baked from this cluster file: it was changed, or the cluster file was",
            where=where,
            remedy="do not use it, unless you know what it was: bake it again",
        )
