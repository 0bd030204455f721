"""Runs doit as `python -m doit WORDS` does, and writes down what nothing else could be sure to see.

    python spy.py FOLDER WORDS ...

`FOLDER/events` gets a line for each program that is started, with its arguments and environment, and for each file that
is opened for writing; what is removed, or replaced by a rename, stays as a hard link in `FOLDER/kept`.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

STARTS = ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "os.putenv")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def spy(folder: Path) -> Callable[[str, tuple[Any, ...]], None]:
    """The audit hook: it hears of every such call of this process, from every thread, before it is made."""
    kept, number = folder / "kept", count()
    kept.mkdir()
    events = os.open(folder / "events", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def tell(*what: object) -> None:
        os.write(events, f"{' '.join(map(str, what))}\n".encode(errors="surrogateescape"))

    def keep(path: str | bytes, folder: int) -> None:
        name = f"{next(number)}"
        with suppress(FileNotFoundError):
            os.link(path, kept / name, src_dir_fd=folder if folder >= 0 else None, follow_symlinks=False)
            parent = Path(f"/proc/self/fd/{folder}").readlink() if folder >= 0 else Path.cwd()
            tell("kept", name, parent / os.fsdecode(path))

    def hear(event: str, words: tuple[Any, ...]) -> None:
        if event in STARTS:
            tell(event, repr(words), repr(dict(os.environ)))
        elif event == "os.remove":
            keep(*words)
        elif event == "os.rename":
            keep(words[1], words[3])
        elif event == "open" and words[2] & WRITES and not isinstance(words[0], int):
            tell("written", Path.cwd() / os.fsdecode(words[0]))

    return hear


if __name__ == "__main__":
    sys.addaudithook(spy(Path(sys.argv[1])))
    sys.argv = ["doit", *sys.argv[2:]]
    sys.path[0] = ""
    runpy.run_module("doit", run_name="__main__", alter_sys=True)
