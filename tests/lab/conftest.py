"""Where machines cannot run, their tests say what is lacking; where one fails, what its machines logged is kept."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

from tests.lab import checks, host, lab
from tests.lab.scenario import bake  # noqa: F401 # a fixture


def pytest_runtest_setup(item: pytest.Item) -> None:
    if (lack := host.lacking({**host.PROGRAMS, **host.VIRTUAL_PROGRAMS})) is not None:
        if os.environ.get("CI") == "true":
            pytest.fail(lack, pytrace=False)
        pytest.skip(lack)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Of labs that outlive the test; one that ends with it keeps its logs by itself."""
    report = yield
    if report.failed:
        for one in lab.alive:
            report.sections.append(("lab", f"What the machines logged is kept in {one.keep_logs(item.nodeid)}"))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if checks.told:
        terminalreporter.section("the lab's figures")
        for line in checks.told:
            terminalreporter.write_line(line)
