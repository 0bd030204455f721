"""What the scenarios of whole clusters are told in: clusters that are baked once, power-on, loads, figures."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from recipes.kit import inventory
from tests.conftest import Project, copy_project
from tests.lab import checks, workload
from tests.lab.checks import Clock, everything_works, get, wait_installed, wait_ready
from tests.lab.container import Container
from tests.lab.lab import Lab
from tests.lab.machine import Machine
from tests.lab.virtual import access

CLUSTERS = Path(__file__).parent / "clusters"
BOOT = 300  # seconds until a cluster of containers is Ready at the latest; what it took is told
Baker = Callable[[str], Project]


@pytest.fixture(scope="session")
def bake(tmp_path_factory: pytest.TempPathFactory) -> Baker:
    """Name of a cluster file in tests/lab/clusters -> the project in which it is baked."""
    project = copy_project(tmp_path_factory.mktemp("clusters"))
    workload.archive(project.clusters / "busybox.tar")

    def baked(name: str) -> Project:
        file = project.clusters / f"{name}.yaml"
        if not (project.root / "build" / name / "seeds").exists():
            file.write_text((CLUSTERS / f"{name}.yaml").read_text() + access())
            project.remember(name)
            project.doit(f"cluster=recipes/clusters/{name}.yaml")
        return project

    return baked


@contextmanager
def switched_on(bake: Baker, name: str, kind: type[Machine] = Container) -> Iterator[Lab]:
    """A lab of this cluster, all machines with their seeds, none on."""
    project = bake(name)
    cluster = inventory.load(project.clusters / f"{name}.yaml", now=datetime.now(UTC))
    with Lab(project.root / "build" / name, cluster, kind) as lab:
        for node in cluster.nodes:
            lab.machine(node.name)
        yield lab


def tell(clock: Clock) -> None:
    say("seconds since power-on: " + ", ".join(f"{what} {seconds}" for what, seconds in clock.reached.items()))


def say(figure: str) -> None:
    """For the end of the report, beside the test's name."""
    name = os.environ["PYTEST_CURRENT_TEST"].rpartition("::")[2].partition(" ")[0]
    checks.told.append(f"{name}: {figure}")


def power_on(lab: Lab, *names: str) -> Clock:
    clock = Clock()
    for name in names or tuple(lab.machines):
        lab.machine(name).power_on()
    return clock


def snapshot(machine: Machine) -> str:
    """Every file that is not a workload's or a log's, one a line: its path, then what changes when it is written."""
    return machine.run(
        "find /etc /usr /opt /var/lib/nodebake -xdev ! -type d -printf '%p %s %T@ %i\\n' | sort", timeout=120
    ).stdout


def settled(lab: Lab, clock: Clock) -> None:
    """Ready, everything works, first boot is over, nobody asked outside."""
    wait_ready(lab, BOOT, None, clock)
    everything_works(lab, clock)
    wait_installed(lab, 120)
    clock.mark("first boot over")
    tell(clock)
    checks.nothing_was_asked_outside(lab)


@dataclass
class Load:
    """Writes through one worker's balancer: what was acknowledged, and what failed when."""

    acknowledged: set[int]
    failed: list[tuple[float, str]]
    moments: list[float] = field(default_factory=list)  # of what was acknowledged, in order

    @property
    def longest(self) -> float:
        """Seconds between two acknowledged writes, at most."""
        return max(after - before for before, after in pairwise(self.moments))


@contextmanager
def writing(lab: Lab, name: str) -> Iterator[Load]:
    machine, load = lab.machine(name), Load(set(), [])
    config = yaml.safe_load((lab.build / "admin.conf").read_text())
    user, cluster = config["users"][0]["user"], config["clusters"][0]["cluster"]
    machine.run("mkdir -p -m 700 /run/writer")
    for file, value in (
        ("ca", cluster["certificate-authority-data"]),
        ("crt", user["client-certificate-data"]),
        ("key", user["client-key-data"]),
    ):
        machine.run(f"umask 077; cat >/run/writer/{file}", stdin=base64.b64decode(value).decode())
    program = (Path(__file__).parent / "writer.py").read_text()
    paths = [f"/run/writer/{file}" for file in ("ca", "crt", "key")]
    process = machine.start("python3", "-c", program, "https://127.0.0.1:6443", *paths)
    try:
        yield load
    finally:
        machine.run("pkill -f run/writer/[k]ey", check=False)
        machine.run("rm -rf /run/writer")
        told, _ = process.communicate(timeout=30)
    for line in told.splitlines():
        moment, number, outcome = line.split(" ", 2)
        if outcome == "ok":
            load.acknowledged.add(int(number))
            load.moments.append(float(moment))
        else:
            load.failed.append((float(moment), outcome))


def holder(lab: Lab, lease: str) -> str:
    return str(get(lab, "lease", lease, "-n", "kube-system")["spec"]["holderIdentity"]).split("_")[0]


def wait_moved(lab: Lab, lease: str, leader: str) -> None:
    lab.wait(lambda: holder(lab, lease) not in ("", leader), 60, f"the lease {lease} moves")


def members(machine: Machine) -> list[list[str]]:
    """Identity, state and name of each."""
    return [line.split(", ")[:3] for line in etcdctl(machine, "member list").splitlines()]


def etcdctl(machine: Machine, words: str) -> str:
    """As root's own shell has it, which knows where etcd is and by what key."""
    return machine.run("bash", "-l", "-c", f"etcdctl {words}").stdout
