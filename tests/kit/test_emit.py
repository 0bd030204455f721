"""YAML as it is written for machines: the same to every reader, and the same bytes from every desk."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recipes.kit import emit


class Slower(yaml.SafeDumper):
    ignore_aliases = emit._Dumper.ignore_aliases


Slower.add_representer(str, emit._text)
LINE = st.text(st.characters(codec="utf-8", exclude_characters="\n"))
LINES = st.lists(LINE.filter(str.strip), min_size=1).map(lambda lines: "\n".join([*lines, ""]))
PLAIN = LINE | LINES | st.booleans() | st.integers()


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(["a", "b"]), st.lists(PLAIN) | PLAIN))
def test_the_bytes_do_not_depend_on_the_desks_libyaml(data: Any) -> None:
    """PyYAML has two emitters, and a desk may lack the faster one."""
    assert emit.document(data).decode() == yaml.dump(data, Dumper=Slower, sort_keys=False, width=1 << 20)


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(text: str) -> None:
    assert yaml.safe_load(emit.document({text: [text]})) == {text: [text]}


@pytest.mark.parametrize(
    "word", ["1e3", "0o17", "12e03", ".5e1", "y", "n", "yes", "1.e+3", "0x1", "017", "~", "null", "=", "<<"]
)
def test_what_one_reader_takes_for_something_else_is_quoted(word: str) -> None:
    """Go's reader takes 1e3 for a number, and Python's for a word."""
    (scalar,) = [event for event in yaml.parse(emit.document([word])) if isinstance(event, yaml.ScalarEvent)]
    assert scalar.value == word and scalar.style in ("'", '"')


def test_other_words_are_not() -> None:
    assert (
        emit.document({"name": "worker-1", "list": ["10.0.0.1", "a: b"]})
        == b"name: worker-1\nlist:\n- 10.0.0.1\n- 'a: b'\n"
    )


def test_several_documents() -> None:
    assert emit.documents([{"a": 1}, {"b": "x\ny\n"}]) == b"---\na: 1\n---\nb: |\n  x\n  y\n"
