"""All that `nodebake status` tells, as data."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from machine import certificates, endpoints, firstboot, units
from machine.certificates import Certificate
from machine.endpoints import Endpoint
from machine.firstboot import FirstBoot, Wait
from machine.system import System
from machine.units import Unit

_MANIFEST = "/opt/nodebake/manifest/node.json"
_ENVIRONMENT = "/etc/nodebake/node.env"
_INVENTORY = "etc/nodebake/inventory.json"  # on control planes only
SLOW = 10  # milliseconds for one synchronous write of etcd's (etcd.io, FAQ)


@dataclass(frozen=True)
class Machine:
    """Which one it is; "" and None where the artifact is not in place yet, or does not say."""

    node: str = ""
    role: str = ""
    cluster: str = ""
    arch: str = ""
    minted: datetime | None = None
    install_by: datetime | None = None
    generation: int | None = None


@dataclass(frozen=True)
class Status:
    """problems: why it is not healthy, or not installed; warnings: what will be one; unseen: what could not be looked
    at, and why. All for people. etcd_write: milliseconds for a synchronous write, as first boot measured it."""

    machine: Machine
    first_boot: FirstBoot
    units: list[Unit]
    endpoints: list[Endpoint]
    certificates: list[Certificate]
    problems: list[str]
    warnings: list[str]
    unseen: list[str]
    etcd_write: float | None = None

    @property
    def healthy(self) -> bool:
        """And installed."""
        return not self.problems

    def json(self) -> str:
        return json.dumps({"healthy": self.healthy, **asdict(self)}, default=_plain, indent=1)


def gather(system: System, now: datetime | None = None) -> Status:
    now = now or datetime.now(UTC)
    first_boot = firstboot.look(system)
    wanted = units.names(system)
    asked, answers, problems, warnings = _health(system, wanted)
    machine = identity(system)
    if system.live:
        known = {wait.what: wait.since for wait in first_boot.waits}
        waits = [Wait(what, known.get(what)) for what in problems] if first_boot.waits else []
        first_boot = FirstBoot(first_boot.installed, first_boot.steps, waits)
        ways = [answer for answer in answers if answer.name in ("kube-apiserver", "api-balancer")]
        if asked and machine.node and not any(way.problem for way in ways):
            node = endpoints.ask_node(system, machine.node)
            answers += [node] if node else []
            problems += [f"node: {node.problem}"] if node and node.problem else []
    else:
        problems.append(f"the machine in {system.root} does not run: its units were not asked")
    if not first_boot.installed:
        problems.insert(0, _not_installed(first_boot))
    found = certificates.look(system, now)
    problems += [f"{each.path} {each.problem}" for each in found if each.problem]
    warnings += [f"{each.path} {each.warning}" for each in found if each.warning]
    etcd_write = firstboot.etcd_write(system)
    if etcd_write is not None and etcd_write >= SLOW:
        warnings.append(
            f"etcd's disk was slow before etcd began: {etcd_write} ms a synchronous write, {SLOW} are the most"
        )
    return Status(machine, first_boot, asked, answers, found, problems, warnings, system.unseen, etcd_write)


def health(system: System) -> list[str]:
    """Why this machine is not healthy, one line each, without anything that changes by the second; [] when it is.

    Quick: first boot asks again and again, for hours where other machines are off.
    """
    return _health(system, units.names(system))[2]


def _health(system: System, wanted: list[str]) -> tuple[list[Unit], list[Endpoint], list[str], list[str]]:
    """(units, endpoints, problems, warnings)"""
    if not wanted:
        return [], [], ["no artifact is in place"], []
    if not system.live:
        return [], [], [], []
    asked = units.ask(system, wanted)
    if not asked:
        return [], [], ["systemd cannot be asked for the units"], []
    # Who does not run need not be asked how it is. Who is starting may be able to say what keeps it.
    running = [unit.name for unit in asked if unit.state.startswith(("active", "activating", "reloading"))]
    answers = endpoints.ask(system, running)
    problems = []
    told = {answer.name: answer.problem for answer in answers if answer.problem}
    joining = _joining(system, asked, answers)
    for unit in asked:
        name = unit.name.removesuffix(".service")
        if joining and unit.problem in (units.STARTING, units.QUEUED) and name in ("kubelet", "kube-proxy", "flanneld"):
            continue  # they wait for the kubelet's certificate, which is told
        if unit.problem:
            problems.append(f"{name} {unit.problem}")
        elif name in told:
            problems.append(f"{name}: {told[name]}")
    problems += [joining] if joining else []
    warnings = []
    kubelet = any(unit.name == "kubelet.service" for unit in asked)
    if kubelet and not joining and system.exists(certificates.SERVER) is False:
        warnings.append("the kubelet has no serving certificate yet: kubectl logs and exec do not reach this node")
    return asked, answers, problems, warnings


def _joining(system: System, asked: list[Unit], answers: list[Endpoint]) -> str | None:
    """What the kubelet waits for, if it has not joined yet."""
    names = {unit.name for unit in asked}
    if "kubelet.service" not in names or system.exists(certificates.CLIENT) is not False:
        return None
    ways = names & {"kube-apiserver.service", "api-balancer.service"}
    if not ways:
        return "kubelet: it has no certificate yet: no API server answers, or no control plane has approved it"
    if any(answer.problem is None for answer in answers if f"{answer.name}.service" in ways):
        return (
            "kubelet: it waits for a control plane that knows its token and approves its certificate "
            "(journalctl -u kubelet says when the token is not known)"
        )
    return "kubelet: it has no certificate yet, and no API server answers to ask for one"


def _not_installed(first_boot: FirstBoot) -> str:
    if first_boot.installed is None:
        return "whether first boot has ended is not to be seen"
    step = first_boot.current
    if step is None:
        return "first boot has not run yet" if not first_boot.steps else "first boot has not ended"
    return f"first boot: {step.name}: {step.state}" + (f": {step.text}" if step.state == "refused" else "")


def identity(system: System) -> Machine:
    """From the node's manifest; without it from its environment file."""
    told: dict[str, Any] = {}
    environment = _environment(system.text(_ENVIRONMENT) or "")
    for key, name in (
        *(("node", "NODE_NAME"), ("role", "ROLE"), ("cluster", "CLUSTER_NAME"), ("arch", "ARCH")),
        *(("minted", "MINTED"), ("installBy", "INSTALL_BY")),
    ):
        told[key] = environment.get(name, "")
    told |= _object(system.text(_MANIFEST, 64 << 20))
    # Not every manifest tells the generation; on a control plane the inventory does.
    generation = told.get("generation")
    if generation is None and told["role"] == "control-plane":
        generation = _object(system.text(_INVENTORY)).get("generation")
    return Machine(
        node=str(told["node"]),
        role=str(told["role"]),
        cluster=str(told["cluster"]),
        arch=str(told["arch"]),
        minted=firstboot.moment_of(told["minted"]),
        install_by=firstboot.moment_of(told["installBy"]),
        generation=generation if isinstance(generation, int) else None,
    )


def _object(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _environment(text: str) -> dict[str, str]:
    found = {}
    for name, value in re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE):
        try:
            found[name] = " ".join(shlex.split(value))
        except ValueError:
            continue
    return found


def _plain(value: object) -> str:
    return value.strftime("%Y-%m-%dT%H:%M:%SZ") if isinstance(value, datetime) else str(value)
