"""Five machines with kernels of their own as one cluster. One lab for all tests; they leave it as it was."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest

from tests.lab import checks
from tests.lab.checks import Clock, get, items, ready_nodes, wait_ready
from tests.lab.lab import Lab
from tests.lab.scenario import BOOT, Baker, holder, power_on, say, settled, switched_on, tell, writing
from tests.lab.virtual import Slowed

pytestmark = pytest.mark.matrix


@pytest.fixture(scope="module")
def five(bake: Baker) -> Iterator[Lab]:
    """From power-on, in any order, to a cluster whose machines share a workload."""
    with switched_on(bake, "five", Slowed) as lab:
        order = random.sample(sorted(lab.machines), len(lab.machines))
        say(f"switched on in this order: {' '.join(order)}")
        clock = power_on(lab, *order)
        settled(lab, clock)
        yield lab


def test_five_machines_become_a_cluster(five: Lab) -> None:
    assert ready_nodes(five) == set(five.machines)
    for machine in five.machines.values():
        assert machine.run("systemctl --failed --no-legend --plain").stdout == ""


@pytest.mark.parametrize("what", ["/etc/machine-id", "/etc/ssh/ssh_host_ed25519_key.pub"])
def test_no_two_machines_are_one(five: Lab, what: str) -> None:
    assert len({machine.read(what) for machine in five.machines.values()}) == len(five.machines)


def test_a_control_plane_is_switched_off_under_load(five: Lab) -> None:
    """By its power button, while writes go through a worker's balancer; then it comes back by itself."""
    leader = holder(five, "kube-controller-manager")
    with writing(five, "worker-2") as load:
        time.sleep(20)
        five.machine(leader).shutdown()
        five.wait(lambda: holder(five, "kube-controller-manager") not in ("", leader), 60, "another one leads")
        time.sleep(20)
    say(f"{leader} off: {len(load.acknowledged)} writes acknowledged, {len(load.failed)} failed: {load.failed}")
    kept = {int(each["metadata"]["name"].removeprefix("write-")) for each in items(five, "cm", "-l", "app=writer")}
    assert load.acknowledged <= kept, "an acknowledged write is gone"
    assert len(load.acknowledged) > len(load.failed)
    five.kubectl("delete", "cm", "-l", "app=writer", "--wait=false")
    clock = power_on(five, leader)
    wait_ready(five, BOOT, {leader}, clock)
    tell(clock)


def test_all_machines_reboot_at_once(five: Lab) -> None:
    boots = {name: boot(five, name) for name in five.machines}
    clock = Clock()
    for machine in five.machines.values():
        machine.run("systemctl --no-block reboot")
    for name, before in boots.items():
        five.machine(name).wait(lambda: boot(five, name) != before, 150, "it has rebooted")  # noqa: B023
    wait_ready(five, BOOT, None, clock)
    names = checks.runs_pods(five)
    checks.wait_pods(five, "app=web", len(names), 180)
    address = get(five, "service", "web")["spec"]["clusterIP"]
    five.wait(lambda: checks.fetch_from_machine(five, "worker-1", f"http://{address}/"), 120, "the Service answers")
    clock.mark("Service answers")
    tell(clock)
    checks.nothing_was_asked_outside(five)


def boot(lab: Lab, name: str) -> str:
    return lab.machine(name).read("/proc/sys/kernel/random/boot_id")
