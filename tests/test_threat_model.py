"""The threat model names tests, and they are there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "recipes" / "README.md"
NAMED = re.compile(r"`([\w/.]+\.py)::(\w+)`")


def model() -> str:
    """The section, which is the last one there."""
    return README.read_text().partition("\n## Threat model\n")[2]


@cache
def defined_in(file: Path) -> frozenset[str]:
    return frozenset(
        statement.name
        for statement in ast.parse(file.read_text()).body
        if isinstance(statement, ast.FunctionDef) and statement.name.startswith("test_")
    )


def rows() -> list[list[str]]:
    """Of the first table, without its head."""
    table = model().partition("\n|")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def missing(text: str) -> list[str]:
    """What it names and nobody has written."""
    return [
        f"{file}::{test}"
        for file, test in NAMED.findall(text)
        if not (ROOT / "tests" / file).is_file() or test not in defined_in(ROOT / "tests" / file)
    ]


def test_every_test_that_it_names_exists() -> None:
    assert missing(model()) == []
    assert missing("`lab/test_stolen.py::test_nothing` `no.py::test_x`") == [
        "lab/test_stolen.py::test_nothing",
        "no.py::test_x",
    ]


def test_every_row_says_what_remains_and_names_a_test() -> None:
    made = rows()
    assert len(made) >= 14
    for who, wants, stops, remains, shown in made:
        assert all((who, wants, stops, remains)), who
        assert NAMED.findall(shown), who
        assert NAMED.sub("", shown).replace("<br>", "").strip() == "", f"{who}: {shown}"


def test_it_is_found() -> None:
    assert "(recipes/README.md#threat-model)" in (ROOT / "README.md").read_text()


def test_its_links_lead_somewhere() -> None:
    for path, anchor in re.findall(r"\]\(([^)#]*)#([^)]+)\)", model()):
        text = ((README.parent / path) if path else README).read_text()
        heads = [re.sub(r"[^\w -]", "", head).strip().lower() for head in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
        assert anchor in {head.replace(" ", "-") for head in heads}, anchor
