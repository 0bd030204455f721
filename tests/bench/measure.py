"""What the bench measures with: one run of a command, and the least work that any bake would have to do."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from recipes.kit import archive, crew

CORES = min(crew.CORES, 4)  # as many threads as archive compresses on


@dataclass(frozen=True)
class Run:
    """One run of a command: seconds by the clock, seconds of processor (children too), peak memory in bytes."""

    seconds: float
    processor: float
    peak: int


@dataclass(frozen=True)
class Floor:
    """Seconds by the clock that each part of the least work took, and seconds of processor of all of it."""

    hashing: float
    compressing: float
    writing: float
    processor: float

    @property
    def seconds(self) -> float:
        return self.hashing + self.compressing + self.writing


@dataclass(frozen=True)
class Goal:
    """One row: what was measured against what, medians in seconds (of memory: bytes), and the ratio aimed at."""

    name: str
    measured: float
    reference: float
    limit: float
    against: str
    unit: str = "s"

    @property
    def ratio(self) -> float:
        return self.measured / self.reference

    @property
    def met(self) -> bool:
        return self.ratio <= self.limit


def run(command: Sequence[str | Path], folder: Path) -> Run:
    """Runs a command in a folder; its output is dropped unless it fails (CalledProcessError, with what it said).
    Compiled modules are kept, as Python does it unless told otherwise.

    The peak is the largest of the command and of what it started: wait4() tells it of this process's child alone.
    It is never less than what this process itself held when it started the command (Linux counts from the fork on).
    """
    started = time.perf_counter()
    with subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, said)
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def warm(paths: Iterable[Path]) -> int:
    """Reads files, so that they lie in the page cache; returns how many bytes."""
    total = 0
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while data := file.read(archive.CHUNK):
                total += len(data)
    return total


def settle() -> None:
    """Lets what earlier runs wrote reach the disk, so that nobody pays for another's bytes."""
    os.sync()


def floor(distinct: Sequence[Path], every: Sequence[Path], artifacts: Sequence[Path], target: Path) -> Floor:
    """The least work: each distinct input read and hashed once, what each payload is packed from compressed once, each
    artifact's bytes written once.

    The parts run one after the other, the first two on as many threads as the bake has; compressed by the bake's own
    compressor, level and block size. Artifacts are copied into the folder target, each synced, as the bake does it,
    and removed after the clock has stopped.
    """
    target.mkdir(parents=True)
    before = time.process_time()
    with ThreadPoolExecutor(CORES) as pool:
        hashing = _timed(lambda: list(pool.map(_hash, distinct)))
        compressing = _timed(lambda: list(pool.map(_compress, _blocks(every))))
    copies = [(path, target / f"{number}") for number, path in enumerate(artifacts)]
    try:
        writing = _timed(lambda: _write_all(copies))
        processor = time.process_time() - before
    finally:
        for _, copy in copies:
            copy.unlink(missing_ok=True)
        target.rmdir()
    return Floor(hashing, compressing, writing, processor)


def change_mac(text: str, node: str) -> str:
    """A cluster file's text with one machine's MAC address changed: its last byte counts up."""
    pattern = re.compile(rf"(name: {re.escape(node)},.*mac: \"(?:..:){{5}})(..)(\")")
    changed, count = pattern.subn(lambda found: f"{found[1]}{(int(found[2], 16) + 0x40) % 256:02x}{found[3]}", text)
    if count != 1:
        raise ValueError(f"{node} has no MAC address in its line")
    return changed


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _blocks(paths: Iterable[Path]) -> list[tuple[Path, int]]:
    return [(path, start) for path in paths for start in range(0, path.stat().st_size, archive.BLOCK)]


def _compress(place: tuple[Path, int]) -> int:
    path, start = place
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        return len(archive.compress(file.read(archive.BLOCK)))


def _write_all(copies: Iterable[tuple[Path, Path]]) -> None:
    for source, target in copies:
        _write(source, target)


def _write(source: Path, target: Path) -> None:
    with source.open("rb") as file, target.open("wb") as out:
        archive.copy_range(file, out, source.stat().st_size)
        os.fsync(out.fileno())
