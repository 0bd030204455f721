"""First boot on a machine with a kernel of its own, when power, clock or swap are not as they should be."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.lab.lab import Lab
from tests.lab.scenario import BOOT, Baker, power_on, say, settled, switched_on
from tests.lab.test_machines import virtual
from tests.lab.virtual import VirtualMachine

pytestmark = pytest.mark.matrix
# What the console says when something begins, in the order of boot.
STEPS = (
    "running 'init-local'",
    "running 'modules:final'",
    "first-boot: looking for",
    "first-boot: unpacking",
    "first-boot: checking that",
    "first-boot: putting files",
    "first-boot: making folders",
    "first-boot: installing Debian",
    "first-boot: starting",
    "first-boot: waiting until",
)


def test_power_is_cut_at_each_step(bake: Baker) -> None:
    """QEMU is killed: what the machine had not synced is lost."""
    with switched_on(bake, "single", VirtualMachine) as lab:
        machine = virtual(lab, "only")
        for step in STEPS:
            before = len(machine.console)
            machine.power_on()
            machine.wait(lambda: step in machine.console[before:], BOOT, f"it says: {step}")  # noqa: B023
            machine.crash()
        settled(lab, power_on(lab))


def test_a_wrong_clock_is_set_by_the_clusters_own_time_server(bake: Baker) -> None:
    """First boot refuses a clock of 2020 by name, and goes on by itself once the time server has answered."""
    with switched_on(bake, "timed", VirtualMachine) as lab:
        machine = virtual(lab, "only")
        machine.clock = "2020-01-01T00:00:00"
        clock = power_on(lab)
        machine.wait(lambda: "which is before the bake" in machine.console, BOOT, "first boot tells of the clock")
        serve_time(lab, *lab.cluster.ntp)
        machine.wait(lambda: abs(float(machine.run("date +%s").stdout) - time.time()) < 5, 120, "the clock is right")
        clock.mark("clock set")
        settled(lab, clock)
        assert "NTPSynchronized=yes" in machine.run("timedatectl show").stdout


def serve_time(lab: Lab, address: str) -> None:
    lab.inside.run(["ip", "address", "add", f"{address}/24", "dev", "lab"])
    lab.inside.start(["python3", Path(__file__).with_name("timeserver.py"), address])


def test_swap_is_turned_off_where_the_cluster_file_says_so(bake: Baker) -> None:
    """On for the boot by the machine's own fstab, off from then on. The seed is a disk, as a USB stick is."""
    with switched_on(bake, "timed", VirtualMachine) as lab:
        machine = virtual(lab, "only")
        machine.eject("cidata")
        machine.disks.append(lab.build / "seeds" / "only.iso")
        power_on(lab)
        machine.wait(lambda: "first-boot: unpacking" in machine.console, BOOT, "first boot has begun")
        make = "fallocate -l 64M /swap && chmod 600 /swap && mkswap -q /swap && swapon /swap"
        machine.run(make + " && echo '/swap none swap sw 0 0' >>/etc/fstab && sync")
        assert "/swap" in machine.read("/proc/swaps")
        machine.wait(lambda: "first-boot: installing" in machine.console, BOOT, "first boot has changed the machine")
        assert "/swap" not in machine.read("/proc/swaps")
        machine.crash()
        settled(lab, power_on(lab))
        assert "/swap" not in machine.read("/proc/swaps")
        say("swap stays off after a power cut")
