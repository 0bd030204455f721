"""First boot's journal: what is done, what is under way, and what it waits for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime

from machine.system import System

JOURNAL, INSTALLED = "/var/lib/nodebake/journal", "/var/lib/nodebake/installed"
DISK = "/var/lib/nodebake/etcd-disk"
STEPS = (
    *("medium", "verify", "machine", "place", "users", "packages", "units"),
    *("health", "clean", "report"),
)
_LINE = re.compile(r"(\S+) ([\w-]+) (begun|done|waiting|refused)(?: (.*))?")


@dataclass(frozen=True)
class Step:
    """state: "done", "under way", "waiting", "refused" or "not yet"."""

    name: str
    state: str
    since: datetime | None
    text: str


@dataclass(frozen=True)
class Wait:
    what: str
    since: datetime | None


@dataclass(frozen=True)
class FirstBoot:
    """installed: None where it is not to be seen. waits: as they were last told."""

    installed: bool | None
    steps: list[Step]
    waits: list[Wait]

    @property
    def current(self) -> Step | None:
        return next((step for step in self.steps if step.state not in ("done", "not yet")), None)


@dataclass(frozen=True)
class _Event:
    moment: datetime
    step: str
    state: str
    text: str


def look(system: System) -> FirstBoot:
    installed = system.exists(INSTALLED)
    events = _events(system.text(JOURNAL, tail=True) or "")
    if not events:
        return FirstBoot(installed, [], [])
    if installed:  # a later artifact that was refused since then changed nothing
        ends = [place for place, event in enumerate(events) if (event.step, event.state) == (STEPS[-1], "done")]
        events = events[: ends[-1] + 1] if ends else events
    # Each run begins anew with the first step, and goes over what an earlier one has done.
    begins = [place for place, event in enumerate(events) if (event.step, event.state) == (STEPS[0], "begun")]
    last_run = events[begins[-1] :] if begins else events
    order = [*STEPS, *dict.fromkeys(event.step for event in events if event.step not in STEPS)]
    current = order.index(last_run[-1].step)
    steps = []
    for place, name in enumerate(order):
        own = [event for event in events if event.step == name]
        if place < current or (installed and own):
            if own:  # a step without a word was none of this machine's
                done = [event for event in own if event.state == "done"] or own
                steps.append(Step(name, "done", done[-1].moment, done[-1].text))
        elif place == current:
            steps.append(_current(name, [event for event in last_run if event.step == name]))
        elif not installed:
            steps.append(Step(name, "not yet", None, ""))
    return FirstBoot(installed, steps, _waits(last_run))


def etcd_write(system: System) -> float | None:
    """Milliseconds that a synchronous write to etcd's disk took before etcd began; None where that was not measured."""
    try:
        return float(system.text(DISK, 100) or "")
    except ValueError:
        return None


def _current(name: str, own: list[_Event]) -> Step:
    last = own[-1]
    begun = next((event for event in own if event.state == "begun"), own[0])
    if last.state == "begun":
        return Step(name, "under way", last.moment, last.text)
    return Step(name, last.state, begun.moment if last.state == "waiting" else last.moment, last.text)


def _waits(run: list[_Event]) -> list[Wait]:
    """The last words on what is waited for, each since it was first told. All that is missing is told at once,
    whenever it changes."""
    told = [event for event in run if event.state == "waiting" and event.step == run[-1].step]
    if not told or run[-1].state != "waiting":
        return []
    last = [event.text for event in told if (told[-1].moment - event.moment).total_seconds() < 1]
    first = {event.text: event.moment for event in reversed(told)}
    return [Wait(text, first[text]) for text in dict.fromkeys(last)]


def _events(text: str) -> list[_Event]:
    events = []
    for line in text.splitlines():
        found = _LINE.fullmatch(line.strip())
        moment = moment_of(found[1]) if found else None
        if found and moment:
            events.append(_Event(moment, found[2], found[3], (found[4] or "").strip()))
    return events


def moment_of(text: object) -> datetime | None:
    """ISO 8601; what names no time zone is UTC."""
    try:
        moment = datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
