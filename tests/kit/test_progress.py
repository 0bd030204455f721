from __future__ import annotations

import io
import time

import pytest

from recipes.kit import progress
from recipes.kit.progress import Bars, Lines, amount


@pytest.mark.parametrize(
    ("count", "unit", "told"),
    [
        (0, "bytes", "0 bytes"),
        (999, "bytes", "999 bytes"),
        (1_500, "bytes", "1.5 kB"),
        (96_000_000, "bytes", "96 MB"),
        (4_200_000_000, "bytes", "4.2 GB"),
        (812, "packages", "812 packages"),
    ],
)
def test_amounts_are_for_people(count: int, unit: progress.Unit, told: str) -> None:
    assert amount(count, unit) == told


def test_a_short_step_leaves_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Lines().step("packing", 10, "files") as advance:
        advance(10)
    assert capsys.readouterr().err == ""


def test_a_long_step_is_told_on_its_way_and_at_its_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lines, "EVERY", 0.01)
    monkeypatch.setattr(Lines, "WORTH_TELLING", 0.02)
    with Lines().step("packing", 2_000_000, "bytes") as advance:
        time.sleep(0.02)
        advance(1_000_000)
        advance(2_000_000)
    assert capsys.readouterr().err.splitlines() == ["packing: 1.0 MB of 2.0 MB, 0 s", "packing: 2.0 MB, 0 s"]
    with Lines().step("resolving", None, "files"):
        time.sleep(0.02)
    assert capsys.readouterr().err == "resolving: 0 s\n"


def test_where_no_terminal_is_there_are_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert isinstance(progress.for_this_terminal(), Lines)


def test_on_a_terminal_there_are_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stderr", Terminal())
    assert isinstance(progress.for_this_terminal(), Bars)
