"""One folder for each lab that runs, and what a killed lab left behind.

A run holds the lock of its folder. Whoever starts one removes those whose lock nobody holds; the others are alive.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recipes.kit.locks import locked
from tests.lab import cgroups
from tests.lab.host import LAB

RUNS = LAB / "runs"


@contextmanager
def begun(runs: Path = RUNS) -> Iterator[Path]:
    """A folder with a random name, removed at the end with all that still runs in its control groups."""
    runs.mkdir(parents=True, exist_ok=True)
    with locked(runs / "lock"):
        _clean(runs)
        folder = runs / secrets.token_hex(4)
        folder.mkdir(mode=0o700)
        held = _lock(folder)
    assert held is not None, "nobody else knows the name"
    try:
        yield folder
    finally:
        _remove(folder)
        os.close(held)


def _clean(runs: Path) -> None:
    for folder in runs.iterdir():
        if folder.is_dir() and (held := _lock(folder)) is not None:
            _remove(folder)
            os.close(held)


def _lock(folder: Path) -> int | None:
    """Its lock, until it is closed or this process ends; None when somebody else holds it."""
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle


def _remove(folder: Path) -> None:
    cgroups.remove(folder.name)
    for attempt in range(20):  # the last process of a killed lab may still be writing
        try:
            shutil.rmtree(folder)
            return
        except OSError:
            if attempt == 19:
                raise
            time.sleep(0.1)
