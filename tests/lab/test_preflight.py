"""What a machine lacks is told by first boot, by name, before anything of the machine was changed.

One machine is switched on several times, each time with another defect that only power-on can give; in between
defects are made and mended by its administrator.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.lab.machine import Machine
from tests.lab.scenario import Baker, power_on, settled, switched_on
from tests.lab.test_machines import virtual
from tests.lab.virtual import VirtualMachine

FIRST_BOOT = "sh /var/lib/nodebake/first-boot install"
STOP = "systemctl stop nodebake-first-boot.service"  # it would try again by itself
PORT = "import socket, time; s = socket.create_server(('', 10250)); time.sleep(1000)"
OTHER_PACKAGE = """mkdir -p /root/other/DEBIAN && cd /root/other && cat >DEBIAN/control <<END
Package: other
Version: 1
Architecture: all
Maintainer: nobody
Conflicts: conntrack
Description: keeps conntrack away
END
dpkg-deb --build . /root/other.deb && dpkg --install /root/other.deb"""
# Everything that first boot may change, but for its own notes.
SNAPSHOT = (
    "find /etc /usr /opt /var/lib -xdev -path /var/lib/nodebake -prune -o -path /var/lib/systemd -prune"
    " -o -path /var/lib/cloud -prune -o ! -type d -printf '%p %s %T@\\n' | sort | sha256sum; cat /proc/modules | wc -l"
)


def refuses(machine: Machine, code: int, *told: str) -> None:
    before = machine.run(SNAPSHOT).stdout
    done = machine.run(FIRST_BOOT, check=False, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    assert all(text in done.stderr for text in told), done.stderr
    assert machine.run(SNAPSHOT).stdout == before


@contextmanager
def made(machine: Machine, defect: str, remedy: str) -> Iterator[None]:
    machine.run(defect)
    try:
        yield
    finally:
        machine.run(remedy)


def begin(machine: VirtualMachine) -> None:
    """On, with cloud-init through and first boot not at work."""
    machine.power_on()
    machine.wait(lambda: "first-boot: " in machine.console, 120, "first boot has begun")
    machine.wait(lambda: machine.run(STOP).returncode == 0, 60, "it is stopped")
    machine.wait_booted()


@pytest.mark.matrix
def test_whatever_a_machine_lacks_is_told_before_anything_is_changed(bake: Baker) -> None:
    with switched_on(bake, "single", VirtualMachine) as lab:
        machine = virtual(lab, "only")
        enough, machine.memory = machine.memory, 1536
        begin(machine)
        refuses(machine, 89, "MiB of memory; a machine of the role control-plane needs 1700")
        with made(machine, "mv /usr/bin/openssl /root", "mv /root/openssl /usr/bin"):
            refuses(machine, 69, "the program openssl is missing")
        with made(machine, "fallocate -l 7G /full || true", "rm /full"):
            refuses(machine, 88, "MiB are free where /var/lib/nodebake lies")
        # systemd does not let a clock go back over a restart: it remembers the latest time by a file's,
        # touched every minute.
        right = f"date -s @{machine.run('date +%s').stdout.strip()} && touch /var/lib/systemd/timesync/clock && sync"
        with made(machine, "date -s 2020-01-01", right):
            refuses(machine, 85, "the clock says Wed Jan  1", "which is before the bake")
        with made(machine, "date -s 2036-01-01", right):
            refuses(machine, 86, "installBy was")
        machine.crash()

        machine.memory, machine.kernel_options = enough, "cgroup_disable=memory"
        begin(machine)
        with made(
            machine,
            "fallocate -l 64M /swap && chmod 600 /swap && mkswap -q /swap && swapon /swap",
            "swapoff -a && rm /swap",
        ):
            refuses(machine, 90, "swap is on: /swap")
        with made(machine, "useradd --uid 801 --no-create-home other", "userdel other"):
            refuses(machine, 92, "801 is 'other'")
        module = "/lib/modules/$(uname -r)/kernel/drivers/net/vxlan/vxlan.ko*"
        with made(machine, f"mv {module} /root && depmod", "mv /root/vxlan.ko* $(dirname " + module + ") && depmod"):
            refuses(machine, 94, "has no module vxlan")
        refuses(machine, 95, "no control group controller memory")
        machine.crash()

        machine.kernel_options = ""
        begin(machine)
        with made(machine, "mkdir -p /var/lib/etcd/member", "rmdir /var/lib/etcd/member /var/lib/etcd"):
            refuses(machine, 87, "/var/lib/etcd holds data")
        with made(machine, f"systemd-run --unit taken python3 -c {PORT!r} && sleep 3", "systemctl stop taken"):
            refuses(machine, 91, "port 10250, which kubelet needs, is taken")
        with made(machine, OTHER_PACKAGE, "dpkg --purge other"):
            refuses(machine, 93, "the artifact's packages do not fit this machine's", "conntrack")
        machine.crash()
        settled(lab, power_on(lab))
