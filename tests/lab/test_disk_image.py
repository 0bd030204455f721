"""A disk image, and nothing else: firmware, boot loader, kernel, cloud-init, first boot. Not in every run."""

from __future__ import annotations

import json

import pytest

from tests.lab.checks import wait_ready
from tests.lab.lab import Lab
from tests.lab.scenario import BOOT, Baker, power_on, settled, switched_on
from tests.lab.virtual import VirtualMachine

pytestmark = pytest.mark.matrix
SIZE = 12 << 30  # of the machine's disk, bytes


def written(lab: Lab, *, secure_boot: bool) -> VirtualMachine:
    """The machine with its disk image on its disk, and no medium in a drive."""
    machine = lab.machine("only")
    assert isinstance(machine, VirtualMachine)
    machine.eject("cidata")
    machine.write_disk(lab.build / "disks" / "only.raw.gz", SIZE, secure_boot=secure_boot)
    return machine


@pytest.mark.parametrize("secure_boot", [True, False], ids=["secure boot", "any boot loader"])
def test_from_a_disk_image_to_a_service_that_answers(bake: Baker, secure_boot: bool) -> None:
    bake("single").doit("cluster=recipes/clusters/single.yaml", "image:only")
    with switched_on(bake, "single", VirtualMachine) as lab:
        machine = written(lab, secure_boot=secure_boot)
        settled(lab, power_on(lab))

        assert ("Secure boot enabled" in machine.run("dmesg").stdout) == secure_boot

        # The root file system has grown, and no other machine's disk can be taken for it.
        parts = json.loads(machine.run("lsblk --json --bytes --output PARTLABEL,PARTUUID,SIZE /dev/vda").stdout)
        by_name = {part["partlabel"]: part for part in parts["blockdevices"]}
        assert by_name["root"]["size"] > SIZE - (1 << 30)
        assert f"root=PARTUUID={by_name['root']['partuuid']}" in machine.read("/proc/cmdline")
        assert int(machine.run("df --output=size -B1 / | tail -1").stdout) > SIZE - (2 << 30)

        # Nothing is left of the seed, and what comes up without it comes up the same.
        seed = "/dev/disk/by-partlabel/seed"
        assert machine.run(f"blkid --probe --match-tag TYPE {seed}", check=False).stdout.strip() == ""
        machine.run(f"cmp --bytes={by_name['seed']['size']} {seed} /dev/zero", timeout=300)
        assert not machine.run("ls /dev/disk/by-label | grep cidata", check=False).stdout
        (link,) = machine.node.network.links
        itself = f"hostname; ip -brief address show dev {link.name}; cat /etc/machine-id /etc/ssh/*.pub"
        before, booted = machine.run(itself).stdout, machine.read("/proc/sys/kernel/random/boot_id")
        machine.shutdown()
        machine.power_on()
        wait_ready(lab, BOOT)
        assert machine.run(itself).stdout == before
        assert machine.read("/proc/sys/kernel/random/boot_id") != booted
