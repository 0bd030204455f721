"""Archives and documents that a stranger may have written, read within bounds.

Python's tarfile believes headers: a negative size sends it back for ever, extended headers and lists of holes go into
memory however large they are. Its entry points for other kinds of members are used here to refuse such.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn, cast

from isal import igzip, isal_zlib

LEAST = 1 << 30  # bytes that any archive may unpack to
RATIO = 200  # beyond that, bytes for each byte of it: tarballs of programs have 2 to 4, a bomb 1000
MOST = 100_000  # members
LARGEST_HEADER = 1 << 16  # bytes of a long name or an extended header
LARGEST_DOCUMENT = 4 << 20  # bytes; the image specification's bound for manifests

_IN_MEMORY = (*(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK), tarfile.XHDTYPE, tarfile.XGLTYPE, b"X")


class Damaged(Exception):
    """Why an archive is not read on, for people."""


@contextmanager
def inflated(path: Path) -> Iterator[IO[bytes]]:
    """The content of a file, unpacked if it is gzip of one or several members. Within the block whatever is wrong with
    it is Damaged."""
    try:
        with path.open("rb") as file:
            gzipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            limit = LEAST + RATIO * os.fstat(file.fileno()).st_size
            plain = cast(IO[bytes], igzip.open(file)) if gzipped else file  # type: ignore[no-untyped-call]
            yield cast(IO[bytes], _Bounded(plain, limit))
    except (tarfile.TarError, EOFError, zlib.error, isal_zlib.IsalError, gzip.BadGzipFile) as error:  # type: ignore[misc]
        raise Damaged(f"it is damaged or no archive ({error})") from error
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise Damaged(f"it is not as archives are made ({error})") from error


@contextmanager
def opened(archive: Path) -> Iterator[tarfile.TarFile]:
    """A tar or tar.gz, as inflated() reads it."""
    with inflated(archive) as plain, tarfile.open(fileobj=plain, mode="r:", tarinfo=_Member) as tar:
        yield tar


def members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Every member, in order; Damaged: there are too many."""
    for count, member in enumerate(tar):
        if count >= MOST:
            raise Damaged(f"it has more than {MOST} members")
        yield member


def document(data: bytes) -> Any:
    """JSON; ValueError: it is none, or nested too deeply."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None


class _Bounded(io.RawIOBase):
    """A file that is not read beyond `limit`."""

    def __init__(self, file: IO[bytes], limit: int) -> None:
        super().__init__()
        self._file, self._limit = file, limit

    def read(self, size: int | None = -1, /) -> bytes:
        left = self._limit - self._file.tell()
        data = self._file.read(left + 1 if size is None or size < 0 else min(size, left + 1))
        if len(data) > left:
            raise Damaged(f"it unpacks to more than {self._limit >> 20} MiB, as a bomb does")
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        if whence != os.SEEK_SET or offset > self._limit:
            raise Damaged("a member is larger than the archive can be")
        return self._file.seek(offset)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True


class _Member(tarfile.TarInfo):
    """A member whose headers cost no more than they are worth."""

    def _block(self, count: int) -> int:
        if count < 0:
            raise Damaged("a member has a negative size")
        return -(-count // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _IN_MEMORY and not 0 <= self.size <= LARGEST_HEADER:
            raise Damaged("a member's header is too large")
        if self.type == tarfile.GNUTYPE_SPARSE:
            self._refuse_holes()
        made: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]
        return made

    def _refuse_holes(self, *_: object) -> NoReturn:
        raise Damaged("a member is sparse")

    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_holes
