"""What only machines with a kernel of their own can show: drives, cards, limits, modules, reboots.

One machine is switched on for all tests of this file; they leave it as it was.
"""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from recipes import seed
from tests.lab import checks, workload
from tests.lab.checks import get, wait_ready
from tests.lab.lab import Lab
from tests.lab.machine import Machine
from tests.lab.scenario import BOOT, Baker, power_on, settled, switched_on, tell
from tests.lab.virtual import VirtualMachine

OTHER_CARD = "52:54:00:00:99:01"


def virtual(lab: Lab, name: str) -> VirtualMachine:
    machine = lab.machine(name)
    assert isinstance(machine, VirtualMachine)
    return machine


@pytest.fixture(scope="module")
def single(bake: Baker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """One machine that is everything, from power-on to a Service that answers. Its seed is in the second drive, behind
    another medium, and beside its own card and disk are others."""
    folder = tmp_path_factory.mktemp("media")
    with switched_on(bake, "single", VirtualMachine) as lab:
        machine = virtual(lab, "only")
        machine.disks.append(filled_disk(folder / "other.raw"))
        machine.other_cards.append(OTHER_CARD)
        machine.eject("cidata")
        machine.insert(medium(folder / "other.iso", "OTHER"))
        machine.insert(lab.build / "seeds" / "only.iso")
        settled(lab, power_on(lab))
        yield lab


def filled_disk(path: Path) -> Path:
    with path.open("xb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-L", "data", path], check=True)
    return path


def medium(path: Path, label: str, **documents: str) -> Path:
    """A volume that is not this machine's."""
    note = path.with_suffix(".note")
    note.write_text("of another")
    contents: dict[str, bytes | Path] = {name.replace("_", "-"): text.encode() for name, text in documents.items()}
    seed.write_iso({**contents, "note": note}, path, label=label, mtime=1_790_000_000)
    return path


def test_the_medium_is_found_by_its_label_among_other_disks(single: Lab) -> None:
    machine = single.machine("only")
    listed = json.loads(machine.run("lsblk --json --output NAME,LABEL,FSTYPE,MOUNTPOINT").stdout)["blockdevices"]
    labels = {each["name"]: each["label"] for each in listed}
    assert labels["sr0"] == "OTHER" and labels["sr1"] == "cidata" and "data" in labels.values(), labels
    assert "first-boot: verifying /run/nodebake/media/cidata/node.tar.gz" in machine.journal
    assert machine.run("findmnt --noheadings /run/nodebake/media/cidata", check=False).stdout == "", "left mounted"


def test_the_card_is_found_by_its_address(single: Lab) -> None:
    machine = single.machine("only")
    (link,) = machine.node.network.links
    cards = {card["ifname"]: card for card in json.loads(machine.run("ip -json address").stdout)}
    assert cards[link.name]["address"] == link.mac
    own = [each["local"] for each in cards[link.name]["addr_info"] if each["scope"] == "global"]
    assert own == [str(machine.node.address)]
    (other,) = [card for card in cards.values() if card.get("address") == OTHER_CARD]
    assert other["addr_info"] == [] and other["operstate"] == "DOWN"
    assert machine.run("netplan get ethernets").stdout.count("macaddress") == 1


def test_a_machine_has_what_only_it_can_have(single: Lab) -> None:
    machine = single.machine("only")
    assert len(machine.read("/etc/machine-id").strip()) == 32
    assert machine.run("ls /etc/ssh").stdout.count("ssh_host_") == 2, "one key and its public half"
    assert machine.run("systemd-detect-virt").stdout == "qemu\n"
    assert machine.run("stat -f -c %T /sys/fs/cgroup").stdout == "cgroup2fs\n"


def test_first_boot_leaves_the_kernel_and_its_initrd_as_they_are(single: Lab) -> None:
    """A Debian package that has its initrd made anew takes longer than all others together."""
    booted = "@$(sed -n 's/^btime //p' /proc/stat)"
    assert single.machine("only").run(f'find /boot -newermt "{booted}"').stdout == ""


def test_what_a_pod_may_use_is_enforced(single: Lab) -> None:
    too_much = "busybox dd if=/dev/zero of=/dev/null bs=200M count=1"
    spin = "while :; do :; done"
    checks.apply(
        single,
        pod("hungry", too_much, memory="32Mi"),
        pod("busy", spin, cpu="100m"),
    )
    single.wait(lambda: exit_code(single, "hungry") == 128 + 9, 60, "the pod over its memory limit is killed")
    killed = single.machine("only").run("journalctl --dmesg --grep=CONSTRAINT_MEMCG --output=cat").stdout
    assert f"kubepods-burstable-pod{uid(single, 'hungry')}.slice" in killed, killed
    single.wait(lambda: "nr_throttled" in cgroup(single, "busy", "cpu.stat"), 60, "the busy pod runs")
    before, ticks = used(single)
    single.machine("only").run("sleep 5")
    after, later = used(single)
    assert 0.02 < (after - before) / (later - ticks) < 0.15, "a tenth of a processor"
    assert cgroup(single, "busy", "pids.max").strip() == "4096"
    single.kubectl("delete", "pod", "hungry", "busy", "--wait=false")


def pod(name: str, command: str, **limits: str) -> dict[str, object]:
    spec = workload.pod(command, restartPolicy="Never")
    spec["containers"][0]["resources"] = {"limits": limits}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}


def exit_code(lab: Lab, name: str) -> int:
    """Of the pod's container, once it has ended. Not the reason: of a kill that early containerd may hear too late."""
    statuses = get(lab, "pod", name)["status"].get("containerStatuses", [{}])
    return int(statuses[0].get("state", {}).get("terminated", {}).get("exitCode", -1))


def uid(lab: Lab, name: str) -> str:
    """As it stands in the names of control groups."""
    return str(get(lab, "pod", name)["metadata"]["uid"]).replace("-", "_")


def cgroup(lab: Lab, name: str, file: str) -> str:
    """A file of the pod's control group, as the machine's kernel has it."""
    path = f"/sys/fs/cgroup/kubepods.slice/*/kubepods-*-pod{uid(lab, name)}.slice/{file}"
    return lab.machine("only").run(f"cat {path}").stdout


def used(lab: Lab) -> tuple[float, float]:
    """Seconds of processor that the busy pod has had, and the machine's own clock."""
    words = cgroup(lab, "busy", "cpu.stat").split()
    return int(words[words.index("usage_usec") + 1]) / 1e6, float(lab.machine("only").read("/proc/uptime").split()[0])


def settings(machine: Machine) -> dict[str, str]:
    """What the artifact's sysctl.d asks for."""
    lines = machine.run("cat /etc/sysctl.d/9?-*.conf").stdout.splitlines()
    pairs = [line.split("=", 1) for line in lines if "=" in line and not line.startswith("#")]
    return {name.strip(): value.strip() for name, value in pairs}


def kernel_is_as_baked(machine: Machine) -> None:
    asked = [line for line in machine.read("/etc/modules-load.d/nodebake.conf").split() if line[0] != "#"]
    loaded = {line.split()[0] for line in machine.read("/proc/modules").splitlines()}
    assert set(asked) <= loaded and {"vxlan", "br_netfilter", "overlay"} <= set(asked), asked
    wanted = settings(machine)
    told = machine.run("cat", *(f"/proc/sys/{name.replace('.', '/')}" for name in wanted)).stdout.splitlines()
    assert {name: " ".join(value.split()) for name, value in zip(wanted, told, strict=True)} == wanted


@pytest.mark.matrix
def test_a_full_disk_costs_no_image_of_the_artifact(single: Lab, tmp_path: Path) -> None:
    """Where less than 15 % is left the kubelet deletes images of ten minutes ago: a stranger's, never a baked one."""
    machine = single.machine("only")
    listed = "/opt/nodebake/current/bin/ctr -n k8s.io images ls -q"
    own = set(machine.run(listed).stdout.split())
    other = workload.archive(tmp_path / "other.tar", "lab.local/other:1")
    machine.run("base64 -d >/root/other.tar", stdin=base64.b64encode(other.read_bytes()).decode())
    machine.run("/opt/nodebake/current/bin/ctr -n k8s.io images import /root/other.tar && rm /root/other.tar")
    assert "lab.local/other:1" in machine.run(listed).stdout
    machine.run("fallocate -l $(($(stat -f -c '%a * %S' /) * 9 / 10)) /full")
    machine.wait(lambda: "lab.local/other:1" not in machine.run(listed).stdout, 240, "the other image is deleted")
    assert own <= set(machine.run(listed).stdout.split())
    machine.run("rm /full")
    single.wait(lambda: not checks.condition(get(single, "node", "only"), "DiskPressure"), 180, "there is room again")
    checks.wait_pods(single, "app=web", 1)


@pytest.mark.matrix
def test_a_reboot_keeps_the_node_and_takes_nothing_from_a_stranger(single: Lab, tmp_path: Path) -> None:
    """The machine's own medium is gone by then, and a stranger's is in the drive."""
    machine = single.machine("only")
    kernel_is_as_baked(machine)
    kept = ("/etc/machine-id", "/var/lib/nodebake/journal", "/var/lib/nodebake/installed", "/proc/sys/kernel/hostname")
    before = {path: machine.read(path) for path in kept}
    boot = machine.read("/proc/sys/kernel/random/boot_id")
    machine.eject("cidata")
    strange = {
        "user_data": "#cloud-config\nhostname: stranger\nbootcmd: [touch /stranger]\nruncmd: [touch /stranger]\n",
        "meta_data": "instance-id: stranger\n",
        "network_config": "version: 2\nethernets: {any: {match: {name: 'e*'}, dhcp4: true}}\n",
    }
    machine.insert(medium(tmp_path / "stranger.iso", "cidata", **strange))
    machine.wait(lambda: machine.run("test -e /dev/disk/by-label/cidata").returncode == 0, 20, "the medium is seen")
    machine.run("systemctl --no-block reboot")
    clock = checks.Clock()
    machine.wait(lambda: machine.read("/proc/sys/kernel/random/boot_id") != boot, 60, "it has rebooted")
    clock.mark("programs run again")
    wait_ready(single, BOOT, None, clock)
    checks.wait_pods(single, "app=web", 1, 180)
    address = get(single, "service", "web")["spec"]["clusterIP"]
    single.wait(lambda: checks.fetch_from_machine(single, "only", f"http://{address}/"), 120, "the Service answers")
    clock.mark("Service answers")
    tell(clock)
    assert {path: machine.read(path) for path in kept} == before
    assert machine.run("test -e /stranger", check=False).returncode == 1
    assert "cloud-init" not in machine.run("journalctl --boot --identifier=cloud-init --quiet").stdout
    assert "disabled" in machine.run("cloud-init status", check=False).stdout
    assert machine.run("systemctl --failed --no-legend --plain").stdout == ""
    kernel_is_as_baked(machine)
    checks.nothing_was_asked_outside(single)
