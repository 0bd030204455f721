"""Work of one kind, side by side in processes of their own, since Python computes on one core only."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from recipes.kit.errors import BakeError

if TYPE_CHECKING:  # imported where it is used: a bake of few machines does not wait for it
    from concurrent.futures import ProcessPoolExecutor

T = TypeVar("T")

_work: Callable[[str], object]

CORES = len(os.sched_getaffinity(0))
_PR_SET_PDEATHSIG = 1  # prctl(2)
_AHEAD = 2  # names that wait for each process


class Crew(Generic[T]):
    """Does work(name) for names, in as many processes as there are cores. They are copies of this one as it is at the
    first begin(), so work may use whatever is there by then, and only names and results travel.

    A context: leaving it lets what has begun come to its end. They never outlive this process, however it ends.
    """

    def __init__(self, work: Callable[[str], T]) -> None:
        self._work = work
        self._pool: ProcessPoolExecutor | None = None
        self._running: dict[Future[T], str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def __len__(self) -> int:
        """How many have begun and are not fetched."""
        return len(self._running)

    @property
    def busy(self) -> bool:
        return len(self._running) >= _AHEAD * CORES

    def begin(self, name: str) -> None:
        if self._pool is None:
            from concurrent.futures import ProcessPoolExecutor
            from multiprocessing import get_context

            self._pool = ProcessPoolExecutor(CORES, get_context("fork"), _begin, (os.getpid(), self._work))
        self._running[self._pool.submit(_do, name)] = name

    def next(self) -> tuple[str, T]:
        """A name and its result, once there is one. Raises BakeError when a process was killed."""
        done, _ = wait(self._running, return_when=FIRST_COMPLETED)
        future = next(iter(done))
        name = self._running.pop(future)
        try:
            return name, future.result()
        except BrokenExecutor:
            raise BakeError(
                f"a process that baked {name} or another machine was killed",
                remedy="look whether memory ran out (dmesg), then run doit once more",
            ) from None


def _begin(parent: int, work: Callable[[str], object]) -> None:
    global _work
    _work = work
    # Whoever kills the parent does not think of its processes, which would hold its locks.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent hears them, and lets what has begun come to its end
        signal.signal(number, signal.SIG_IGN)


def _do(name: str) -> Any:
    return _work(name)
