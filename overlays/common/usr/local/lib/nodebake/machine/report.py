"""A status as lines for people."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from machine.status import Machine, Status

_GOOD, _BAD, _SOON, _FAINT = "32", "31", "33", "2"


def may_colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"


def lines(status: Status, *, colour: bool, now: datetime | None = None) -> list[str]:
    now = now or datetime.now(UTC)
    page = _Page(colour)
    page.say(_headline(status.machine))
    if about := _about(status.machine):
        page.say(f"  {about}")
    page.say("healthy" if status.healthy else "not healthy", _GOOD if status.healthy else _BAD)
    page.listed("problems", [[problem] for problem in status.problems], _BAD)
    page.listed("warnings", [[warning] for warning in status.warnings], _SOON)
    page.listed("not to be seen", [[line] for line in status.unseen], _FAINT)
    steps = [
        (step.state, [step.name, step.state, _since(step.since, now), step.text]) for step in status.first_boot.steps
    ]
    page.table("first boot", steps, {"done": _GOOD, "refused": _BAD, "not yet": _FAINT})
    page.listed("first boot waits for", [[wait.what, _since(wait.since, now)] for wait in status.first_boot.waits], "")
    if status.etcd_write is not None:
        page.listed("etcd's disk, before etcd began", [[f"{status.etcd_write} ms a synchronous write"]], "")
    units = [
        (
            "bad" if unit.problem else "good",
            [
                unit.name.removesuffix(".service"),
                unit.state if unit.problem or not unit.state.startswith("inactive") else "idle (ran well)",
                _since(unit.since, now),
                unit.result if unit.result not in ("", "success") else "",
                f"restarts: {unit.restarts}" if unit.restarts else "",
            ],
        )
        for unit in status.units
    ]
    page.table("units", units, {"good": _GOOD, "bad": _BAD})
    endpoints = [
        ("bad" if each.problem else "good", [each.name, each.problem or f"{each.url} is well"])
        for each in status.endpoints
    ]
    page.table("endpoints", endpoints, {"good": _GOOD, "bad": _BAD})
    certificates = [
        (
            "bad" if each.problem else "soon" if each.warning else "good",
            [each.path, each.problem or f"until {_day(each.end)}", _left(each.end, now)],
        )
        for each in status.certificates
    ]
    page.table("certificates", certificates, {"good": _GOOD, "bad": _BAD, "soon": _SOON})
    return page.said


def _headline(machine: Machine) -> str:
    if not machine.node:
        return "no artifact is in place on this machine"
    arch = f", {machine.arch}" if machine.arch else ""
    return f"{machine.node}: {machine.role} of cluster {machine.cluster}{arch}"


def _about(machine: Machine) -> str:
    told = [
        f"baked {_day(machine.minted)}" if machine.minted else "",
        f"generation {machine.generation}" if machine.generation is not None else "",
        f"to be installed by {_day(machine.install_by)}" if machine.install_by else "",
    ]
    return ", ".join(filter(None, told))


def _day(moment: datetime | None) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC" if moment else "?"


def _since(moment: datetime | None, now: datetime) -> str:
    return f"since {moment:%Y-%m-%d %H:%M:%S} UTC ({_span(now - moment)})" if moment else ""


def _left(end: datetime | None, now: datetime) -> str:
    return f"{_span(end - now)} left" if end and end > now else ""


def _span(span: timedelta) -> str:
    """In one unit: "41 s", "3 min", "5 h", "89 days"."""
    seconds = int(span.total_seconds())
    if seconds < 0:
        return "in the future"
    if seconds < 120:
        return f"{seconds} s"
    if seconds < 2 * 3600:
        return f"{seconds // 60} min"
    if seconds < 2 * 86400:
        return f"{seconds // 3600} h"
    return f"{seconds // 86400} days"


class _Page:
    def __init__(self, colour: bool) -> None:
        self.said: list[str] = []
        self._colour = colour

    def say(self, text: str, code: str = "") -> None:
        # What the machine's files say is shown as it is, but never as commands to the terminal.
        text = "".join(char if char.isprintable() else "?" for char in text).rstrip()
        self.said.append(f"\x1b[{code}m{text}\x1b[0m" if self._colour and code else text)

    def listed(self, title: str, rows: Sequence[Sequence[str]], code: str) -> None:
        self.table(title, [("", row) for row in rows], {"": code})

    def table(self, title: str, rows: Sequence[tuple[str, Sequence[str]]], codes: dict[str, str]) -> None:
        """rows: (kind, cells); codes: kind -> colour of the row."""
        if not rows:
            return
        self.say("")
        self.say(title)
        widths = [max(map(len, column)) for column in zip(*(cells for _, cells in rows), strict=True)]
        for kind, cells in rows:
            padded = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True) if width)
            self.say(f"  {padded}", codes.get(kind, ""))
