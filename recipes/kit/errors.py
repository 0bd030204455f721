"""Errors meant for people: what is wrong, where, and how to mend it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Place:
    """A place in a file that a person edits; lines and columns count from 1."""

    file: Path
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        return ":".join(str(part) for part in (self.file, self.line, self.column) if part is not None)


def printable(text: str) -> str:
    """Text in which a stranger may have had a word, for a terminal: nothing in it moves the cursor or hides a word."""
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


class BakeError(Exception):
    """The one base of every error that a person can mend; shown without a traceback.

    what: one sentence. where: the file (and line), machine or URL. remedy: what to do, as an imperative.
    """

    def __init__(self, what: str, *, where: Place | Path | str | None = None, remedy: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.remedy = remedy

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where is not None else self.what
        return printable(f"{text}\n  -> {self.remedy}" if self.remedy else text)


class BakeErrors(BakeError):
    """Several mistakes found in one look (every mistake in a cluster file, every hole that the closure proof found)."""

    def __init__(self, errors: list[BakeError]) -> None:
        super().__init__(f"{len(errors)} mistakes" if len(errors) != 1 else "1 mistake")
        self.errors = tuple(errors)

    def __str__(self) -> str:
        return "\n".join(str(error) for error in self.errors)
