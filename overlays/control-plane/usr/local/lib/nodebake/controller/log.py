"""Plain lines for the journal, and how long a loop waits after a failure."""

from __future__ import annotations

import random
import sys
import time

REPEATED = 300.0  # seconds after which a failure that lasts is told again


def say(text: str) -> None:
    print(shown(text, 1000), file=sys.stderr, flush=True)


def shown(text: object, limit: int = 200) -> str:
    """What others wrote, as one printable line of at most limit characters."""
    line = "".join(char if char.isprintable() else "?" for char in str(text))
    return line if len(line) <= limit else f"{line[:limit]}..."


def described(error: Exception) -> str:
    """An exception for people; for one that nobody foresaw, where it came from too."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError | Expected):
        return text
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f" ({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})" if trace is not None else ""
    return f"{type(error).__name__}: {text}{place}"


class Expected(Exception):
    """A failure that may happen, with a message for people."""


class Trouble:
    """The failures of one loop: told when they are new, and now and then while they last."""

    def __init__(self, what: str, longest: float = 15.0) -> None:
        """longest: seconds; waits double until there."""
        self._what, self._longest = what, longest
        self._count, self._text, self._told = 0, "", 0.0

    def wait(self, error: Exception) -> float:
        """Tells the failure, if need be. Returns the seconds to wait before the next try."""
        text = described(error)
        now = time.monotonic()
        if text != self._text or now - self._told > REPEATED:
            say(f"{self._what}: {text}; trying again")
            self._text, self._told = text, now
        delay = min(0.5 * 2.0 ** min(self._count, 10), self._longest)
        self._count += 1
        return delay * random.uniform(0.8, 1.2)  # noqa: S311 - so that control planes do not keep step

    def over(self) -> None:
        """It worked."""
        if self._text:
            say(f"{self._what}: works again")
        self._count, self._text = 0, ""
