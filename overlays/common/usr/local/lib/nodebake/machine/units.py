"""The units that the artifact enables, and how systemd says they fare."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from machine.system import System, run

_MANIFEST = "/opt/nodebake/manifest"
_WANTED = re.compile(r"^l \d+ etc/systemd/system/[\w.-]+\.target\.wants/(\S+) -> ", re.MULTILINE)
FIRST_BOOT = "nodebake-first-boot.service"
STARTING, QUEUED = "is starting", "is to be started"
_PROPERTIES = (
    "Id,LoadState,ActiveState,SubState,Type,RemainAfterExit,Result,NRestarts,"
    "StateChangeTimestamp,InactiveEnterTimestamp,ConditionResult,ConditionTimestamp,Job"
)


@dataclass(frozen=True)
class Unit:
    """problem: what is wrong, without anything that changes by the second; None: nothing."""

    name: str
    state: str  # "active (running)"
    result: str  # of its last run: "success", "exit-code", ...
    restarts: int
    since: datetime | None  # of this state
    problem: str | None


def names(system: System) -> list[str]:
    """Sorted. Empty before the artifact is in place."""
    texts = [system.text(f"{_MANIFEST}/{part}.tree", 64 << 20) or "" for part in ("node", "payload")]
    return sorted({name for text in texts for name in _WANTED.findall(text)} - {FIRST_BOOT})


def ask(system: System, wanted: list[str]) -> list[Unit]:
    """In the order of wanted; empty where there is nobody to ask."""
    if not wanted:
        return []
    told = run(["systemctl", "show", "--timestamp=unix", f"--property={_PROPERTIES}", *wanted])
    if told.code != 0:
        why = told.trouble or "systemctl does not answer: systemd does not run here"
        system.cannot_see("the units", why)
        return []
    found = {}
    for block in told.text.split("\n\n"):
        properties = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        if "Id" in properties:
            found[properties["Id"]] = _unit(properties)
    return [found[name] for name in wanted if name in found]


def _unit(properties: Mapping[str, str]) -> Unit:
    get = properties.get
    restarts = get("NRestarts", "")
    return Unit(
        name=properties["Id"],
        state=f"{get('ActiveState', 'unknown')} ({get('SubState', '')})",
        result=get("Result", ""),
        restarts=int(restarts) if restarts.isdecimal() else 0,
        since=_moment(get("StateChangeTimestamp", "")),
        problem=_problem(properties),
    )


def _problem(properties: Mapping[str, str]) -> str | None:
    get = properties.get
    active, sub = get("ActiveState", ""), get("SubState", "")
    if get("LoadState") == "masked":
        return "is masked"
    if get("LoadState") != "loaded":
        return "is not known to systemd (systemctl daemon-reload)"
    if active in ("active", "reloading", "refreshing"):
        return None
    # What runs now and then is well between its runs, as soon as the first one has ended well.
    if get("Type") == "oneshot" and get("RemainAfterExit") != "yes":
        if get("ConditionResult") == "no" and _moment(get("ConditionTimestamp", "")):
            return None
        ran = _moment(get("InactiveEnterTimestamp", "")) is not None
        if ran and active != "failed" and sub != "auto-restart" and get("Result") == "success":
            return None
    if sub == "auto-restart" or active == "failed":
        return f"has failed ({get('Result', '')})" + (", and is started again" if sub == "auto-restart" else "")
    idle = QUEUED if get("Job", "0") not in ("", "0") else "does not run"
    return {"activating": STARTING, "deactivating": "is stopping"}.get(active, idle)


def _moment(text: str) -> datetime | None:
    """systemd's "@1767225600"; never: "", "0" or "@0"."""
    number = text.removeprefix("@")
    if not number.isdecimal() or int(number) == 0:
        return None
    try:
        return datetime.fromtimestamp(int(number), UTC)
    except (OverflowError, OSError, ValueError):
        return None
