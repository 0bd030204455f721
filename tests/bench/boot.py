"""How long machines need from power-on until all nodes are Ready, against the bare start of the same components.

Both are measured on the same machines of the lab, one after the other; README.md says what exactly is compared.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import yaml

from recipes.kit import inventory
from recipes.kit.errors import BakeError
from tests.bench import measure, table, watcher
from tests.bench.measure import Goal
from tests.conftest import ROOT, Project, copy_project
from tests.lab import cgroups, checks, host, workload
from tests.lab.host import LabError
from tests.lab.lab import Lab
from tests.lab.machine import Machine, wait

CLUSTERS = {"single": "one machine", "ha": "3 + 3 machines at once"}  # of tests/lab/clusters
MINUTES = 10  # that a cluster may take
# What a step ends with, in the order of boot: texts of the machine's journal.
MARKS = {
    "machine, systemd": "Journal started",
    "cloud-init": "first-boot: looking for",
    "medium": "first-boot: verifying",
    "unpack and verify": "first-boot: checking that",
    "check the machine": "first-boot: putting files",
    "place": "first-boot: making folders",
    "users, modules, sysctl": "first-boot: installing Debian",
    "packages": "first-boot: starting",
}
API, READY = "units to API ready", "API ready to all Ready"
# By hand: each wave once the one before is up. Not in it: what a node does not need to be Ready (kube-proxy, images).
WAVES = (
    ("etcd", "containerd", "api-balancer", "api-vip"),
    ("kube-apiserver",),
    ("kube-controller-manager", "kube-scheduler", "nodebake-controller", "kubelet", "flanneld"),
)
AGAINST = "its components started by hand"
_BOOTED = ("running\n", "degraded\n")
# Everything that the cluster wrote on a machine.
_WIPE = """
find /var/lib/etcd /var/lib/kubelet /var/lib/containerd /etc/cni/net.d /var/lib/kube-controller-manager /run/flannel \
    -mindepth 1 -delete 2>/dev/null || true
test ! -e /var/lib/etcd/member -a ! -e /var/lib/kubelet/pki
"""


@dataclass
class Boots:
    """Of one cluster, one entry a round: seconds from power-on, seconds by hand, seconds of processor that all machines
    together had in each of the two, seconds of each step."""

    power_on: list[float] = field(default_factory=list)
    by_hand: list[float] = field(default_factory=list)
    processor: list[tuple[float, float]] = field(default_factory=list)
    steps: list[Mapping[str, float]] = field(default_factory=list)


def main(rounds: int, desk: str) -> None:
    """Writes build/bench/boot.md and boot.json, and prints the former."""
    load = os.getloadavg()[0]
    folder = ROOT / "build" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        host.prepare()
        with tempfile.TemporaryDirectory(prefix="project-", dir=folder) as copy:
            project = copy_project(Path(copy))
            workload.archive(project.clusters / "busybox.tar")
            boots = {name: measured(project, name, rounds) for name in CLUSTERS}
    except BakeError as error:
        sys.exit(f"ERROR: {error}")
    goals, steps = summed_up(boots)
    text = markdown(goals, steps, processor(boots), rounds, f"{desk}; load {load:.1f} at the start")
    (folder / "boot.md").write_text(text)
    facts = {"goals": table.facts(goals), "steps": steps, "rounds": {name: vars(each) for name, each in boots.items()}}
    (folder / "boot.json").write_text(json.dumps({**facts, "desk": desk, "load": load}, indent=1) + "\n")
    print(text, end="")


def measured(project: Project, name: str, rounds: int) -> Boots:
    file = project.clusters / f"{name}.yaml"
    file.write_text((ROOT / "tests" / "lab" / "clusters" / file.name).read_text())
    project.remember(name)
    project.doit(f"cluster={file}")
    cluster = inventory.load(file, now=datetime.now(UTC))
    boots = Boots()
    for number in range(rounds):
        measure.warm((project.root / "build" / name / "seeds").iterdir())
        with Lab(project.root / "build" / name, cluster) as lab:
            for node in cluster.nodes:
                lab.machine(node.name)
            measure.settle()
            total, work, steps = power_on(lab)
            boots.power_on.append(total)
            boots.steps.append(steps)
            seconds, least = by_hand(lab)
            boots.by_hand.append(seconds)
            boots.processor.append((work, least))
        tell(f"{name} {number + 1} of {rounds}: {total:.1f} s from power-on, {boots.by_hand[-1]:.1f} s by hand")
    return boots


# ---- from power-on


def power_on(lab: Lab) -> tuple[float, float, Mapping[str, float]]:
    """Seconds until all are Ready, of processor, and of each step; waits until first boot is over everywhere."""
    with watching(lab) as watch:
        started = time.time()
        for machine in lab.machines.values():
            machine.power_on()
        seen = watch.wait(node_names(lab))
        work = cgroups.processor(lab.folder.name)
    checks.wait_installed(lab, 60 * MINUTES)
    journals = [journal(machine) for machine in lab.machines.values()]
    return seen[-1][1] - started, work, steps_of(started, journals, seen)


def journal(machine: Machine) -> list[tuple[float, str]]:
    """(seconds since the epoch, text) of all that the machine has logged."""
    entries = map(json.loads, machine.run("journalctl --output=json --output-fields=MESSAGE").stdout.splitlines())
    return [(int(entry["__REALTIME_TIMESTAMP"]) / 1e6, str(entry.get("MESSAGE"))) for entry in entries]


def steps_of(
    started: float, journals: Iterable[Sequence[tuple[float, str]]], seen: Sequence[tuple[str, float]]
) -> dict[str, float]:
    """Seconds of each step: from the moment when the last machine was through with the one before until the last was
    through with it. seen: the API and the nodes, as they came."""
    journals, reached = list(journals), started
    steps = {}
    for step, text in MARKS.items():
        ends = [next((moment for moment, said in lines if said.startswith(text)), None) for lines in journals]
        through = max((end for end in ends if end is not None), default=reached)
        steps[step], reached = through - reached, through
    # The API may be ready before the last unit is started: it begins while packages are installed.
    api = max(reached, next(moment for what, moment in seen if what == "API"))
    return {**steps, API: api - reached, READY: seen[-1][1] - api}


# ---- by hand


def by_hand(lab: Lab) -> tuple[float, float]:
    """Seconds from the start of etcd until all are Ready, and of processor, on the same machines: installed, on,
    without any state."""
    everyone = list(lab.machines.values())
    together(everyone, switch_on_empty)
    measure.settle()
    time.sleep(3)
    with watching(lab) as watch:
        started, before = time.time(), cgroups.processor(lab.folder.name)
        first, second, third = WAVES
        together(everyone, lambda machine: start(machine, first))
        together(everyone, lambda machine: start(machine, second))
        # An API server that has started is not ready yet: what came now would fail, and be started again later.
        watch.wait({"API"})
        together(everyone, lambda machine: start(machine, third))
        ready = watch.wait(node_names(lab))[-1][1]
        return ready - started, cgroups.processor(lab.folder.name) - before


def switch_on_empty(machine: Machine) -> None:
    """After a power cut, on again: nothing of the cluster runs, and nothing is left of what it wrote."""
    names = " ".join(f"{name}.service" for name in [*sum(WAVES, ()), "kube-proxy"])
    # The kubelet's unit calls for it.
    machine.run(
        "mkdir -p /etc/systemd/system/nodebake-images.service.d; systemctl disable nodebake-images.timer 2>/dev/null"
    )
    machine.run(
        "tee /etc/systemd/system/nodebake-images.service.d/off.conf", stdin="[Unit]\nConditionPathExists=/none\n"
    )
    machine.run(f"for unit in {names}; do systemctl disable $unit 2>/dev/null || true; done; sync")
    machine.crash()
    machine.power_on()
    machine.wait(lambda: machine.run("systemctl is-system-running", check=False).stdout in _BOOTED, 60, "has booted")
    if "activ" in (told := machine.run(f"systemctl is-active {names} | grep -v inactive", check=False).stdout):
        raise LabError(f"Units run that should not: {told}", where=machine.name)
    machine.run(_WIPE)


def start(machine: Machine, wave: Sequence[str]) -> None:
    """The units of this wave that the machine has; comes back when they have started. One that fails tries again."""
    there = " ".join(f"{name}.service" for name in wave)
    machine.run(
        f"cd /etc/systemd/system; found=$(ls {there} 2>/dev/null); systemctl start $found", check=False, timeout=120
    )


def together(machines: Sequence[Machine], work: Callable[[Machine], None]) -> None:
    with ThreadPoolExecutor(len(machines)) as pool:
        list(pool.map(work, machines))


# ---- watching


@dataclass(frozen=True)
class Watch:
    """What the watcher has told so far: the API, and nodes that are Ready."""

    told: Path

    def seen(self) -> list[tuple[str, float]]:
        lines = [line.split() for line in self.told.read_text().splitlines()]
        return [(line[0], float(line[1])) for line in lines if len(line) == 2]

    def wait(self, names: set[str]) -> list[tuple[str, float]]:
        """In the order in which they came, once these are there."""
        what = f"there are {' '.join(sorted(names))}; the watcher says: {self.told}"
        wait(lambda: names <= {name for name, _ in self.seen()}, 60 * MINUTES, what)
        return self.seen()


@contextmanager
def watching(lab: Lab) -> Iterator[Watch]:
    """A watcher on the machines' network; it ends when it has seen all nodes Ready, or with the lab."""
    config = yaml.safe_load((lab.build / "admin.conf").read_text())
    user, cluster = config["users"][0]["user"], config["clusters"][0]["cluster"]
    data = (cluster["certificate-authority-data"], user["client-certificate-data"], user["client-key-data"])
    folder = Path(tempfile.mkdtemp(prefix="watcher-", dir=lab.folder))
    paths = [folder / name for name in ("ca", "certificate", "key")]
    for path, text in zip(paths, data, strict=True):
        path.write_bytes(base64.b64decode(text))
    planes = [str(node.address) for node in lab.cluster.control_planes]
    command: list[host.Argument] = [sys.executable, watcher.__file__, *paths, str(len(lab.cluster.kubelets)), *planes]
    with (folder / "told").open("wb") as out:
        process = lab.inside.start(command, stdout=out)
    yield Watch(folder / "told")
    process.wait(60)


def node_names(lab: Lab) -> set[str]:
    return {node.name for node in lab.cluster.kubelets}


# ---- telling


def summed_up(boots: Mapping[str, Boots]) -> tuple[list[Goal], dict[str, dict[str, float]]]:
    """Rows with medians; and medians of the steps, by cluster."""
    goals = [
        Goal(f"power-on to all Ready, {what}", median(boots[name].power_on), median(boots[name].by_hand), 1.3, AGAINST)
        for name, what in CLUSTERS.items()
    ]
    steps = {
        name: {step: median(each[step] for each in found.steps) for step in found.steps[0]}
        for name, found in boots.items()
    }
    return goals, steps


def processor(boots: Mapping[str, Boots]) -> list[str]:
    """How much work each is: divided by the processors it is the least time that any order of it could take."""
    lines = []
    for name, each in boots.items():
        work, least = (median(round_[side] for round_ in each.processor) for side in (0, 1))
        lines.append(
            f"{name}: {work:.1f} s of processor until all are Ready, by hand {least:.1f} s: {work / least:.2f}x"
        )
    return lines


def markdown(
    goals: Sequence[Goal], steps: Mapping[str, Mapping[str, float]], work: Sequence[str], rounds: int, desk: str
) -> str:
    head = ["| Step, until the last machine is through | " + " | ".join(steps) + " |", "|---" * (len(steps) + 1) + "|"]
    lines = [
        f"| {step} | " + " | ".join(f"{each[step]:.2f} s" for each in steps.values()) + " |"
        for step in next(iter(steps.values()))
    ]
    told = [f"Medians of {rounds} rounds; {desk}.", "", *(f"- {line}" for line in work), ""]
    return "\n".join([*table.rows(goals), "", *told, *head, *lines]) + "\n"


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
