"""One holder at a time, across processes and threads."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from recipes.kit.errors import BakeError


@contextmanager
def locked(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Wait for, then hold, the lock that the file at path stands for. A holder that dies lets go of it.

    waiting() is called if somebody else holds it. Raises BakeError where the file is another user's.
    The file stays: removing it would let a third process lock another file of the same name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except PermissionError as error:
        raise BakeError(
            "this is another user's",
            where=path,
            remedy="work as its owner; what root left in your folder, `sudo .venv/bin/doit list` gives back",
        ) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is not None:
                waiting()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
