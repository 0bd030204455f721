"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from recipes.kit.errors import BakeError

WORTH_SYNCING_ALL = 16  # files; fewer are synced one by one, whatever else the desk has to write
WORTH_KEEPING = 16 << 20  # bytes; a smaller file is as quickly written anew

_unsettled: list[Path] = []


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """What keeps this program from writing below a folder, as a BakeError: the disk is full, or not ours to write."""
    try:
        yield
    except OSError as trouble:
        if trouble.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BakeError("the disk is full", where=where, remedy="make room, then run again") from trouble
        at = Path(os.fsdecode(trouble.filename)) if trouble.filename is not None else where
        ours = where.is_relative_to(at) or at.is_relative_to(where)  # not a source that cannot be read
        if trouble.errno == errno.EROFS or (trouble.errno in (errno.EACCES, errno.EPERM) and ours):
            raise BakeError(
                f"may not write here: {trouble.strerror}", where=where, remedy="mend the folder's owner or mode"
            ) from trouble
        raise


@contextmanager
def replacing(target: Path, *, mode: int = 0o600, keep: bool = False, later: bool = False) -> Iterator[IO[bytes]]:
    """A file beside target that takes its place, synced, when the block ends well; else it is removed.

    later: it is not synced before settle() is called, so that many files cost the disk hardly more than one.
    keep: a large target is itself taken away from its name, and the block gets it with all that it holds, so that only
    what differs need be written; the block leaves no byte of it that it does not mean, and cuts off what is behind.
    Names are unique, so two bakes at once do no harm; what a killed bake left begins with ".", and the next one removes
    it: to look for it here would cost more with every file in the folder. BakeError as of disk_errors().
    """
    with disk_errors(target.parent):
        yield from _replacing(target, mode, keep, later)


def _replacing(target: Path, mode: int, keep: bool, later: bool) -> Iterator[IO[bytes]]:
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    temporary = Path(name)
    try:
        if keep and _may_be_taken(target):
            os.close(descriptor)
            descriptor = _taken(target, temporary)
        with os.fdopen(descriptor, "r+b") as out:
            os.fchmod(descriptor, mode)
            yield out
            out.flush()
            if not later:
                os.fsync(out.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if later:
        _unsettled.append(target)
    else:
        _sync(target.parent)


def unsettled() -> list[Path]:
    """What replacing() left for later in this process, which forgets it: for to_settle() in another one."""
    told = [*_unsettled]
    _unsettled.clear()
    return told


def to_settle(others: Iterable[Path]) -> None:
    _unsettled.extend(others)


def settle() -> None:
    """Returns when all that replacing() left for later is on the disk."""
    if len(_unsettled) > WORTH_SYNCING_ALL:
        os.sync()
    else:
        for path in dict.fromkeys([*_unsettled, *(target.parent for target in _unsettled)]):
            with suppress(FileNotFoundError):
                _sync(path)
    _unsettled.clear()


def _may_be_taken(target: Path) -> bool:
    """A large file of ours that has no other name: a copy made of hard links must not change with it."""
    try:
        known = target.lstat()
    except OSError:
        return False
    ours = stat.S_ISREG(known.st_mode) and known.st_nlink == 1 and known.st_uid == os.geteuid()
    return ours and known.st_size >= WORTH_KEEPING


def _taken(target: Path, temporary: Path) -> int:
    """target, open, under the temporary name; an empty file where somebody else has it open, and would see it change: a
    machine may boot from it at this moment."""
    target.replace(temporary)
    descriptor = os.open(temporary, os.O_RDWR)
    try:
        # The kernel grants a lease for writing only where nobody else has the file open; from now on nobody can.
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError:  # or this file system knows no leases
        os.close(descriptor)
        temporary.replace(target)
        return os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    _sync(target.parent)  # before a byte changes: not even a power cut may find it changed under its name
    return descriptor


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(target: Path, data: bytes, *, mode: int = 0o644) -> None:
    """A small file, in one go."""
    with replacing(target, mode=mode) as out:
        out.write(data)
