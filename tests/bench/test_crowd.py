"""The measuring of a crowd, on a small one; no time is asserted."""

from __future__ import annotations

import os

import pytest

from tests.bench import crowd
from tests.bench.crowd import Told, Way
from tests.lab import host


@pytest.fixture(autouse=True, scope="module")
def what_the_lab_needs() -> None:
    if (lack := host.lacking()) is not None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(lack)


@pytest.mark.parametrize("way", [Way("at once", 0, 0), Way("spread, to one that takes one", 1, 1)])
def test_all_get_their_payload(way: Way) -> None:
    told = crowd.run(way, 6, 2_000_000, 3)
    assert told.failed == 0 and 0 < told.first <= told.median <= told.last
    assert told.peak <= 6
    assert (told.retried > 0) <= (way.limit > 0)


def test_the_table_has_a_row_for_each() -> None:
    told = Told(Way("at once", 0, 0), 1, 2, 3, 500, 4, 5, 6, 0)
    assert "| at once | 1 s, 2 s, 3 s | 500 | 4 machines, 5 times | 6 |" in crowd.markdown([told], "a desk")
