"""What a person sees of long work: a live bar on a terminal, plain lines elsewhere. NO_COLOR is honoured by rich."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, Protocol

from recipes.kit.errors import printable

Unit = Literal["bytes", "packages", "files", "machines"]
Advance = Callable[[int], None]


class Progress(Protocol):
    """Where recipes tell how far they are; advance() takes the absolute count that is done."""

    def note(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    @contextmanager
    def step(self, title: str, total: int | None, unit: Unit) -> Iterator[Advance]: ...


def amount(count: int, unit: Unit) -> str:
    """A count for people: "96 MB", "812 packages"."""
    if unit != "bytes":
        return f"{count} {unit}"
    for size, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= size:
            return f"{count / size:.1f} {name}" if count < 10 * size else f"{count // size} {name}"
    return f"{count} bytes"


class Lines:
    """Plain lines for logs: of a step that takes longer than a second a word every 15 seconds, and the end."""

    EVERY = 15.0
    WORTH_TELLING = 1.0

    def note(self, text: str) -> None:
        print(printable(text), file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        print(printable(f"warning: {text}"), file=sys.stderr, flush=True)

    @contextmanager
    def step(self, title: str, total: int | None, unit: Unit) -> Iterator[Advance]:
        started = told = time.monotonic()
        last = 0

        def advance(done: int) -> None:
            nonlocal told, last
            last = done
            if time.monotonic() - told >= self.EVERY:
                told = time.monotonic()
                of = f" of {amount(total, unit)}" if total else ""
                self.note(f"{title}: {amount(done, unit)}{of}, {told - started:.0f} s")

        yield advance
        if time.monotonic() - started >= self.WORTH_TELLING:
            counted = f"{amount(last, unit)}, " if last else ""
            self.note(f"{title}: {counted}{time.monotonic() - started:.0f} s")


class Bars:
    """A live bar per step on a terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)

    def note(self, text: str) -> None:
        self._console.print(printable(text), markup=False, highlight=False)

    def warn(self, text: str) -> None:
        self._console.print(printable(f"warning: {text}"), style="yellow", markup=False, highlight=False)

    @contextmanager
    def step(self, title: str, total: int | None, unit: Unit) -> Iterator[Advance]:
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Live

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[said]}", markup=False),
            TimeElapsedColumn(),
        )
        with Live(*columns, console=self._console, transient=True) as live:
            task = live.add_task(title, total=total, said="")

            def advance(done: int) -> None:
                of = f" / {amount(total, unit)}" if total else ""
                live.update(task, completed=done, said=amount(done, unit) + of)

            yield advance


def for_this_terminal() -> Progress:
    return Bars() if sys.stderr.isatty() else Lines()
