"""YAML text -> a tree that knows the line and column of every key and value. Stricter than YAML, and knows no shape.

What YAML 1.1 and 1.2 read differently (no, 0644, 12:34:56, 1.10, 2027-02-01 without quotes) is kept as Odd, so that
whoever knows which type is meant can say what to write instead. Duplicate keys, aliases, anchors, merge keys, tags,
control characters and several documents are mistakes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from recipes.kit.errors import BakeError, Place

MAX_DEPTH: Final = 20  # a cluster file needs 5; bounds the recursion over the tree
LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml where PyYAML was built with it: 8 times faster

_INTEGER: Final = re.compile(r"0|-?[1-9][0-9]{0,17}")
# C0, DEL and C1, line separators, and marks that reverse the direction of writing and so hide what is written.
_CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")
_SEPARATOR: Final = re.compile("[\x85\u2028\u2029]")  # line breaks of YAML 1.1, and none of 1.2
# First match wins; what a YAML reader (1.1 or 1.2) may take the bare word for.
_ODD: Final = tuple(
    (re.compile(pattern, re.IGNORECASE), meaning)
    for pattern, meaning in (
        (r"~|null|", "nothing"),
        (r"y|n|yes|no|on|off|true|false", "true or false"),
        (r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([Tt\s].*)?", "a date"),
        (r"[-+]?[0-9][0-9_]*(:[0-9]{1,2})+(\.[0-9_]*)?", "a number to base 60"),
        (r"[-+]?0[0-9_]+|[-+]?0o[0-7_]+", "an octal number"),
        (r"[-+]?0x[0-9a-f_]+|[-+]?0b[01_]+", "a number to another base"),
        (r"[-+]?([0-9][0-9_]*)(\.[0-9_]*)?(e[-+]?[0-9]+)?|[-+]?\.[0-9][0-9_]*(e[-+]?[0-9]+)?", "a number"),
        (r"[-+]?\.(inf|nan)", "a number"),
    )
)


@dataclass(frozen=True, slots=True)
class Odd:
    """A bare word that YAML readers do not take for text: raw as written, meaning what they take it for."""

    raw: str
    meaning: str


@dataclass(slots=True)
class Leaf:
    value: str | int | bool | Odd
    raw: str
    line: int
    column: int


@dataclass(slots=True)
class Table:
    """A mapping; lost holds the keys whose values were taken out because they were mistakes."""

    line: int
    column: int
    items: dict[str, Tree] = field(default_factory=dict)
    keys: dict[str, Leaf] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)


@dataclass(slots=True)
class Row:
    """A sequence; lost when items were taken out because they were mistakes."""

    line: int
    column: int
    items: list[Tree] = field(default_factory=list)
    lost: bool = False


@dataclass(slots=True)
class Broken:
    """A value that is a mistake and was told as one: prune() takes it out."""

    line: int
    column: int


Tree = Leaf | Table | Row | Broken


def plain(tree: Tree) -> Any:
    """The tree as dict, list, str, int, bool and Odd."""
    if isinstance(tree, Table):
        return {key: plain(item) for key, item in tree.items.items()}
    if isinstance(tree, Row):
        return [plain(item) for item in tree.items]
    return tree.value if isinstance(tree, Leaf) else None


def prune(tree: Tree) -> None:
    """Take Broken values out, in place; each parent remembers that it lost something."""
    if isinstance(tree, Table):
        for key in [key for key, item in tree.items.items() if isinstance(item, Broken)]:
            del tree.items[key]
            tree.lost.add(key)
        for item in tree.items.values():
            prune(item)
    elif isinstance(tree, Row):
        kept: list[Tree] = [item for item in tree.items if not isinstance(item, Broken)]
        tree.lost = tree.lost or len(kept) < len(tree.items)
        tree.items = kept
        for item in tree.items:
            prune(item)


def read_text(file: Path) -> str:
    """The text of a file that a person edits; BakeError when it is missing, no file, unreadable or not UTF-8."""
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise BakeError("There is no such file", where=file, remedy="Give the path of a cluster file.") from None
    except IsADirectoryError:
        raise BakeError("This is a directory, not a file", where=file, remedy="Name the file in it.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BakeError(f"Cannot be read: {reason}", where=file, remedy="Check the path and its permissions.") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line, column = before.count(b"\n") + 1, error.start - (before.rfind(b"\n") + 1) + 1
        raise BakeError(
            f"Is not UTF-8: byte 0x{data[error.start]:02x} cannot stand here",
            where=Place(file, line, column),
            remedy="Save the file as UTF-8.",
        ) from None


def parse(file: Path, text: str) -> tuple[Tree | None, list[BakeError]]:
    """The tree (None when the file is empty or not YAML at all) and every mistake of YAML itself."""
    builder = _Builder(file)
    if separator := _SEPARATOR.search(text):
        what = f"U+{ord(separator[0]):04X} stands here, which ends a line to some YAML readers only"
        builder.errors.append(BakeError(what, where=_at_offset(file, text, separator.start()), remedy="Remove it."))
        return None, builder.errors
    try:
        for event in yaml.parse(text, Loader=LOADER):
            if not builder.take(event):
                return None, builder.errors
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(file, mark.line + 1, mark.column + 1) if mark else Place(file)
        said = ", ".join(part for part in (error.context, error.problem) if part)
        builder.errors.append(
            BakeError(
                f"This is not YAML: {said}",
                where=place,
                remedy="Check indentation (spaces, no tabs), brackets and quotes here and in the line above.",
            )
        )
        return None, builder.errors
    except yaml.reader.ReaderError as error:
        place = _at_offset(file, text, error.position if isinstance(error.position, int) else 0)
        builder.errors.append(
            BakeError("A control character stands here", where=place, remedy="Remove the invisible character.")
        )
        return None, builder.errors
    return builder.root, builder.errors


def _at_offset(file: Path, text: str, offset: int) -> Place:
    return Place(file, text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset))


def is_text(raw: str) -> bool:
    """Whether every YAML reader takes this bare word for text (if it can stand there without quotes at all)."""
    return isinstance(_resolve(raw), str)


def _resolve(raw: str) -> str | int | bool | Odd:
    if raw in ("true", "false"):
        return raw == "true"
    if _INTEGER.fullmatch(raw):
        return int(raw)
    if raw and raw[0] not in "~.+-0123456789nNyYoOtTfF":  # what no pattern can match: saves most of the time
        return raw
    return next((Odd(raw, meaning) for pattern, meaning in _ODD if pattern.fullmatch(raw)), raw)


def _at(event: Any) -> tuple[int, int]:
    """Line and column, from 1."""
    return event.start_mark.line + 1, event.start_mark.column + 1


_DROPPED: Final = Leaf("", "", 0, 0)  # stands for a key whose value is read and not kept


class _Builder:
    """Events -> tree, without recursion."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.root: Tree | None = None
        self.errors: list[BakeError] = []
        self._open: list[Table | Row] = []
        self._keys: list[Leaf | None] = []  # of each open container: the key that waits for its value
        self._documents = 0

    def _refuse(self, event: Any, what: str, remedy: str) -> None:
        self.errors.append(BakeError(what, where=Place(self.file, *_at(event)), remedy=remedy))

    def take(self, event: yaml.Event) -> bool:
        """False: there is no use in reading on."""
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event)
        if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            return self._start(event)
        if isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            self._open.pop()
            self._keys.pop()
        elif isinstance(event, yaml.AliasEvent):
            self._refuse(event, f"*{event.anchor} is a YAML alias: they are refused here", "Write the value out.")
            if self._awaits_key():
                return False
            self._put(Broken(*_at(event)))
        elif isinstance(event, yaml.DocumentStartEvent):
            self._documents += 1
            if self._documents > 1:
                self._refuse(event, "A second YAML document begins here", "Keep one cluster in one file: remove ---.")
                return False
        return True

    def _awaits_key(self) -> bool:
        return bool(self._open) and isinstance(self._open[-1], Table) and self._keys[-1] is None

    def _check_marks(self, event: Any) -> None:
        if event.anchor:
            self._refuse(event, f"&{event.anchor} is a YAML anchor: they are refused here", "Remove it.")
        if event.tag:
            self._refuse(event, f"{event.tag} is a YAML tag: they are refused here", "Remove it.")

    def _start(self, event: Any) -> bool:
        if self._awaits_key():
            self._refuse(event, "A list or mapping stands where a key is meant", "Write a word as the key.")
            return False
        if len(self._open) >= MAX_DEPTH:
            self._refuse(event, f"Nested deeper than {MAX_DEPTH} levels", "Check brackets and indentation.")
            return False
        self._check_marks(event)
        line, column = _at(event)
        made: Table | Row = Table(line, column) if isinstance(event, yaml.MappingStartEvent) else Row(line, column)
        self._put(made)
        self._open.append(made)
        self._keys.append(None)
        return True

    def _scalar(self, event: Any) -> bool:
        self._check_marks(event)
        raw, (line, column) = event.value, _at(event)
        bare = event.implicit[0] and event.style in (None, "")
        bad = _CONTROL.search(raw)
        if bad:
            what = f"The text holds the control character U+{ord(bad[0]):04X}"
            self._refuse(event, what, "Write it on one line, without that character.")
        leaf = Leaf(_resolve(raw) if bare else raw, raw, line, column)
        parent = self._open[-1] if self._open else None
        if isinstance(parent, Table) and self._keys[-1] is None:
            self._keys[-1] = _DROPPED if bad else self._key(event, parent, leaf)
        else:
            self._put(Broken(line, column) if bad else leaf)
        return True

    def _key(self, event: Any, table: Table, key: Leaf) -> Leaf:
        if key.raw == "<<" and key.value == "<<":
            self._refuse(event, "<< is YAML's merge key: it is refused here", "Write the keys out.")
            return _DROPPED
        if key.raw in table.keys:
            what = f"{key.raw} stands here a second time; the first is in line {table.keys[key.raw].line}"
            self._refuse(event, what, "Remove one of the two.")
            return _DROPPED
        if not isinstance(key.value, str):
            meaning = key.value.meaning if isinstance(key.value, Odd) else "not text"
            self._refuse(
                event,
                f"The key {key.raw} without quotes is {meaning} to YAML readers",
                f'Write "{key.raw}", with quotes.',
            )
        return key

    def _put(self, tree: Tree) -> None:
        if not self._open:
            self.root = tree
            return
        parent = self._open[-1]
        if isinstance(parent, Row):
            parent.items.append(tree)
            return
        key = self._keys[-1]
        self._keys[-1] = None
        if key is not None and key is not _DROPPED:
            parent.items[key.raw] = tree
            parent.keys[key.raw] = key


def walk(tree: Tree, loc: tuple[str | int, ...]) -> Iterator[Tree]:
    """The values from the root along loc, as far as they exist (the root itself first)."""
    yield tree
    for step in loc:
        found: Tree | None = None
        if isinstance(tree, Table) and isinstance(step, str):
            found = tree.items.get(step)
        elif isinstance(tree, Row) and isinstance(step, int) and step < len(tree.items):
            found = tree.items[step]
        if found is None:
            return
        tree = found
        yield tree
