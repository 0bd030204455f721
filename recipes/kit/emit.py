"""Plain data -> YAML that every reader takes for the same, whether it reads YAML 1.1, as Python's does, or 1.2, as Go's
does: a bare word that one of them takes for a number or a truth is quoted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import yaml

from recipes.kit import places

if TYPE_CHECKING:
    from yaml import SafeDumper as Emitter
else:  # libyaml where PyYAML was built with it: the same bytes, 40 times faster, which tells with 5,000 machines
    Emitter = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def document(content: Any) -> bytes:
    """One document, keys in the given order."""
    return _dumped([content], explicit_start=False)


def documents(contents: Iterable[Any]) -> bytes:
    """A stream of documents, each behind a line ---."""
    return _dumped(contents, explicit_start=True)


def _dumped(contents: Iterable[Any], *, explicit_start: bool) -> bytes:
    text: str = yaml.dump_all(
        contents,
        Dumper=_Dumper,
        explicit_start=explicit_start,
        sort_keys=False,
        width=1 << 20,
    )
    return text.encode()


class _Dumper(Emitter):
    """No anchors: the same dict may stand in several places."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: Emitter, text: str) -> yaml.ScalarNode:
    """Text of several lines as a block, which a person can read."""
    style = "|" if "\n" in text else None if places.is_text(text) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
