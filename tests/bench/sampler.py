"""Runs doit as `python -m doit` would, and looks every few milliseconds at what it does: `sampler.py OUT WORD ...`.

Each process appends one line of JSON to OUT: its seconds by the clock (of its main thread) and of processor (of all of
its threads, and of programs that it ran) by the phase that it was in. It is run by its path, in a copied project.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import defaultdict
from functools import cache
from multiprocessing import util
from pathlib import Path
from types import CodeType, FrameType

SECONDS = 0.005
REST = "doit and all else"
WAITING = "waiting for other processes"
COMPRESS = "compress"
PACK = "read and tar"
PROGRAMS = "resolve packages"
IDLE = "idle"  # a process of the crew that has nothing to do
# (a part of the file's path, a function or "") -> the phase. The innermost frame that is in here decides.
PHASES = {
    ("/recipes/kit/hashing.py", ""): "hash",
    ("/recipes/binaries.py", "_from_cache"): "hash",
    ("/recipes/images.py", ""): "make images",
    ("/recipes/kit/archive.py", "compress"): COMPRESS,
    ("/recipes/kit/archive.py", "copy_range"): "copy payloads",
    ("/recipes/kit/archive.py", "keep_alike"): "copy payloads",
    ("/recipes/kit/archive.py", ""): PACK,
    ("/recipes/kit/manifest.py", ""): PACK,
    ("/recipes/kit/atomic.py", "settle"): "sync to the disk",
    ("/recipes/kit/atomic.py", "_sync"): "sync to the disk",
    ("/recipes/kit/download.py", "_sync"): "sync to the disk",
    ("/recipes/kit/atomic.py", ""): "make and rename files",
    ("/recipes/kit/store.py", "_mint_tokens"): "keys, certificates, tokens",
    ("/recipes/kit/pki.py", ""): "keys, certificates, tokens",
    ("/recipes/certificates.py", ""): "keys, certificates, tokens",
    ("/recipes/kit/overlay.py", ""): "render",
    ("/recipes/kit/emit.py", ""): "render",
    ("/recipes/kit/kubeconfig.py", ""): "render",
    ("/recipes/node.py", ""): "render",
    ("/recipes/tokens.py", ""): "render",
    ("/recipes/objects.py", ""): "render",
    ("/recipes/closure.py", ""): "proof and audit",
    ("/recipes/audit.py", ""): "proof and audit",
    ("/recipes/kit/search.py", ""): "proof and audit",
    ("/recipes/bom.py", ""): "bill of materials",
    ("/recipes/seed.py", ""): "write ISOs",
    ("/recipes/packages.py", ""): PROGRAMS,
    ("/recipes/kit/store.py", ""): "secret store",
    ("/recipes/kit/vault.py", ""): "secret store",
    ("/recipes/kit/crew.py", "next"): WAITING,
    ("/multiprocessing/queues.py", "get"): IDLE,
    ("/multiprocessing/process.py", "_bootstrap"): REST,
    ("/importlib/", ""): "imports",
    ("<frozen importlib._bootstrap>", ""): "imports",
}


def phase_of(frame: FrameType | None) -> str:
    waits = False  # for another thread
    while frame is not None:
        if phase := _phase_in(frame.f_code):
            return COMPRESS if waits and phase == PACK else phase
        waits = waits or "/concurrent/futures/" in frame.f_code.co_filename
        frame = frame.f_back
    return REST


@cache
def _phase_in(code: CodeType) -> str | None:
    found = (phase for (part, name), phase in PHASES.items() if part in code.co_filename and name in ("", code.co_name))
    return next(found, None)


class Sampler:
    """Of this process, from now on."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._main = threading.get_ident()
        self._clock: defaultdict[str, float] = defaultdict(float)
        self._processor: defaultdict[str, float] = defaultdict(float)
        self._seen: dict[int, float] = {}
        self._children = 0.0
        self._last = time.monotonic()
        self._until = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Writes what was seen."""
        self._until.set()
        self._thread.join()
        self._look()
        told = {"clock": self._clock, "processor": self._processor}
        with self._out.open("a") as out:
            out.write(json.dumps(told) + "\n")

    def _run(self) -> None:
        while not self._until.wait(SECONDS):
            self._look()

    def _look(self) -> None:
        phases = {ident: phase_of(frame) for ident, frame in sys._current_frames().items()}
        now = time.monotonic()
        here = phases[self._main]
        self._clock[here] += now - self._last
        self._last = now
        times = os.times()
        programs = times.children_user + times.children_system
        if here == PROGRAMS:  # elsewhere it is the crew that has come to its end, which tells for itself
            self._processor[here] += programs - self._children
        self._children = programs
        for thread in threading.enumerate():
            if thread is self._thread or thread.ident is None or thread.ident not in phases:
                continue
            spent = _processor_of(thread.native_id)
            self._processor[phases[thread.ident]] += max(0.0, spent - self._seen.get(thread.ident, 0.0))
            self._seen[thread.ident] = spent


def _processor_of(thread: int | None) -> float:
    """Seconds that a thread of this process has had a processor."""
    try:
        return int(Path(f"/proc/self/task/{thread}/schedstat").read_text().split()[0]) / 1e9
    except OSError:  # it has come to its end
        return 0.0


def main() -> None:
    out = Path(sys.argv[1])
    running = Sampler(out)
    util.register_after_fork(running, lambda _: util.Finalize(None, Sampler(out).end, exitpriority=0))
    sys.path[0] = str(Path.cwd())
    from doit.doit_cmd import DoitMain

    code = DoitMain().run(sys.argv[2:])
    running.end()
    sys.exit(code)


if __name__ == "__main__":
    main()
