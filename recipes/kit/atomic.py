"""Files that are there whole or not at all."""

from __future__ import annotations

import glob
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def replacing(target: Path, *, mode: int = 0o600) -> Iterator[IO[bytes]]:
    """A file beside target that takes its place, synced, when the block ends well; else it is removed.

    Names are unique, so two bakes at once do no harm; what a killed bake left is removed after an hour.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{glob.escape(target.name)}.*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink()
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w+b") as out:
            os.fchmod(descriptor, mode)
            yield out
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write(target: Path, data: bytes, *, mode: int = 0o644) -> None:
    """A small file, in one go."""
    with replacing(target, mode=mode) as out:
        out.write(data)
