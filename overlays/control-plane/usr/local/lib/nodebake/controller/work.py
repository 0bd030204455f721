"""What is to be looked at: names, each at most once in the queue, now or later."""

from __future__ import annotations

import heapq
import random
import threading
import time
from collections.abc import Callable, Iterable
from typing import NoReturn

from controller.api import Refused
from controller.log import Trouble, described, say

_LONGEST = 60.0
_NOW = float("-inf")


class Work:
    """A queue of names. Each is taken before or among those that come while as many as it found there are taken: none
    waits for ever, and control planes seldom look at the same one."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._when: dict[str, float] = {}
        self._later: list[tuple[float, str]] = []
        self._ready: list[tuple[float, str]] = []
        self._count = 0
        self._changed = threading.Condition()
        self._failures: dict[str, int] = {}

    def add(self, name: str, delay: float = 0.0) -> None:
        """delay: seconds. A name that is already to be looked at sooner stays as it is."""
        when = time.monotonic() + delay if delay > 0 else _NOW
        with self._changed:
            if name in self._when and self._when[name] <= when:
                return
            self._when[name] = when
            if when == _NOW:
                self._queue(name)
            else:
                heapq.heappush(self._later, (when, name))
            self._changed.notify()

    def add_all(self, names: Iterable[str]) -> None:
        ordered = list(names)
        random.shuffle(ordered)
        for name in ordered:
            self.add(name)

    def take(self) -> str:
        """Waits for a name that is due."""
        with self._changed:
            while True:
                now = time.monotonic()
                while self._later and self._later[0][0] <= now:
                    when, name = heapq.heappop(self._later)
                    if self._when.get(name) == when:  # it was not wanted sooner since
                        self._when[name] = _NOW
                        self._queue(name)
                if self._ready:
                    _, name = heapq.heappop(self._ready)
                    del self._when[name]
                    return name
                self._changed.wait(self._later[0][0] - now if self._later else None)

    def _queue(self, name: str) -> None:
        self._count += 1
        place = self._count + random.uniform(0, len(self._ready))  # noqa: S311
        heapq.heappush(self._ready, (place, name))

    def run(self, look: Callable[[str], float | None]) -> NoReturn:
        """Looks at each name for ever. look returns the seconds after which it shall see the name again, or None."""
        trouble = Trouble(self._what)
        while True:
            name = self.take()
            try:
                again = look(name)
            except Refused as refused:
                if not refused.passing:
                    self._failed(name, refused)
                    continue
                self.add(name, 0.1)
                time.sleep(trouble.wait(refused))
            except OSError as error:
                self.add(name, 0.1)
                time.sleep(trouble.wait(error))
            except Exception as error:
                self._failed(name, error)
            else:
                trouble.over()
                self._failures.pop(name, None)
                if again is not None:
                    self.add(name, again)

    def _failed(self, name: str, error: Exception) -> None:
        """It is this name's own failure: the others go on."""
        count = self._failures[name] = self._failures.get(name, 0) + 1
        if not (isinstance(error, Refused) and error.code in (404, 409)):  # somebody else was quicker
            say(f"{self._what}: {name}: {described(error)}; trying again")
        self.add(name, min(0.25 * 2 ** min(count, 10), _LONGEST))
