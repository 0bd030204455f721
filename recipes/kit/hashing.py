"""SHA-256 of files, each file hashed once per run: as long as its inode, size and times stay, its bytes do."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_known: dict[tuple[int, ...], str] = {}


def hash_file(path: Path, algorithm: str = "sha256") -> str:
    """The file's digest, lower-case hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def sha256_of(path: Path) -> str:
    """The file's SHA-256 (hex), computed unless this run knows it."""
    stat = path.stat()  # before the bytes: a change while they are read shows the next time
    if (found := known(stat)) is None:
        found = hash_file(path)
        remember(stat, found)
    return found


def known(stat: os.stat_result) -> str | None:
    """The SHA-256 (hex) of the file that stat tells of; None: this run has not hashed it as it is."""
    return _known.get(signature(stat))


def remember(stat: os.stat_result, sha256: str) -> None:
    """Says what the caller has just computed."""
    _known[signature(stat)] = sha256


def signature(stat: os.stat_result) -> tuple[int, ...]:
    """What changes with a file's bytes, mode or owner."""
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
