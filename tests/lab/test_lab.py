"""The lab itself, with machines whose seeds carry nothing worth installing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from recipes import seed
from recipes.kit.model import Cluster, Node
from tests import samples
from tests.lab import cgroups, host, rootfs, runs
from tests.lab import lab as labs
from tests.lab.host import LabError
from tests.lab.lab import Lab
from tests.lab.machine import Machine, WentOff, wait
from tests.lab.wire import Stray

ROOT = Path(__file__).parents[2]


def two() -> Cluster:
    worker = samples.node("worker-1", "worker", 21, serial="CZ1900AA01")
    return samples.ha(name="two", nodes=(samples.node("control-1", "control-plane", 11, runs_etcd=True), worker))


def baked(cluster: Cluster, folder: Path) -> Path:
    """Seeds whose tarball is no tarball: first boot refuses it, and changes nothing."""
    tarball = folder / "node.tar.gz"
    tarball.write_bytes(b"nothing worth installing")
    (folder / "seeds").mkdir()
    for node in cluster.nodes:
        documents = seed.documents(cluster, node, sums="0", sign=bytes)
        seed.write(documents, tarball, folder / "seeds" / f"{node.name}.iso", mtime=1_790_000_000)
    return folder


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return baked(two(), tmp_path_factory.mktemp("build"))


@pytest.fixture(scope="module")
def lab(build: Path) -> Iterator[Lab]:
    """Two machines that are on. Tests leave them so."""
    with Lab(build, two()) as made:
        for node in made.cluster.nodes:
            made.machine(node.name).power_on()
        for one in made.machines.values():
            one.wait_booted()
        yield made


def reaches(one: Machine, node: Node) -> bool:
    return one.run("ping", "-c1", "-W1", str(node.address), check=False).returncode == 0


def test_a_machine_is_what_its_seed_says(lab: Lab) -> None:
    one = lab.machine("control-1")
    assert one.run("hostname").stdout == "control-1\n"
    (card,) = json.loads(one.run("ip -json -4 address show nic0").stdout)
    assert [address["local"] for address in card["addr_info"]] == ["192.168.10.11"]
    assert one.run("ip route show default").stdout == ""
    assert one.run("cat /sys/class/net/nic0/address").stdout == "52:54:00:00:10:0b\n"
    assert one.run("systemctl is-enabled nodebake-first-boot").stdout == "enabled\n"
    assert reaches(one, lab.machine("worker-1").node)


def test_no_unit_of_a_machine_fails_but_first_boot(lab: Lab) -> None:
    failed = lab.machine("control-1").run("systemctl --failed --output=json").stdout
    assert {unit["unit"] for unit in json.loads(failed)} <= {"nodebake-first-boot.service"}


def test_the_root_lacks_what_an_artifact_brings(lab: Lab) -> None:
    brought = ("haproxy", "keepalived", "conntrack", "nft", "iptables", "ethtool", "modprobe", "containerd")
    found = lab.machine("control-1").run(f"command -v {' '.join(brought)}", check=False).stdout
    assert found == ""


def test_a_medium_is_mounted_by_its_label_and_read_only(lab: Lab, build: Path) -> None:
    one = lab.machine("worker-1")
    one.run("mkdir -p /mnt/medium && mount -o ro,nosuid,nodev,noexec /dev/disk/by-label/cidata /mnt/medium")
    listed = one.run("cd /mnt/medium && sha256sum node.tar.gz && ls").stdout
    assert {"first-boot", "meta-data", "network-config", "node.tar.gz", "user-data"} <= {*listed.split()[2:]}
    assert host.run(["sha256sum", build / "node.tar.gz"]).stdout.split()[0] == listed.split()[0]
    assert "Read-only file system" in one.run("touch /mnt/medium/new", check=False).stderr
    one.run('umount /mnt/medium && test -z "$(ls /mnt/medium)"')


def test_media_come_and_go_while_a_machine_runs(lab: Lab, tmp_path: Path) -> None:
    one = lab.machine("worker-1")
    (tmp_path / "payload").write_text("payload")
    seed.write_payloads({"worker-amd64": tmp_path / "payload"}, tmp_path / "payloads.iso", mtime=1_790_000_000)
    one.insert(tmp_path / "payloads.iso")
    one.run("mkdir -p /mnt/shared && mount -o ro /dev/disk/by-label/nodebake /mnt/shared")
    assert one.run("cat /mnt/shared/worker-amd64.tar.gz && umount /mnt/shared").stdout == "payload"
    one.eject("nodebake")
    assert one.run("ls /dev/disk/by-label").stdout == "cidata\n"


def test_an_unreadable_medium_is_not_mounted(lab: Lab, tmp_path: Path) -> None:
    one = lab.machine("worker-1")
    (tmp_path / "whole").write_bytes(os.urandom(1 << 20))
    seed.write_payloads({"worker-amd64": tmp_path / "whole"}, tmp_path / "payloads.iso", mtime=1_790_000_000)
    with (tmp_path / "payloads.iso").open("r+b") as iso:
        iso.truncate(1 << 19)
    one.insert(tmp_path / "payloads.iso")
    done = one.run("mkdir -p /mnt/bad && mount -o ro /dev/disk/by-label/nodebake /mnt/bad", check=False)
    assert done.returncode != 0
    assert one.run("mountpoint /mnt/bad", check=False).returncode != 0
    one.eject("nodebake")


def test_shared_settings_of_the_kernel_are_a_machines_own(lab: Lab) -> None:
    one, host_has = lab.machine("control-1"), Path("/proc/sys/vm/overcommit_memory").read_text()
    one.run("echo 1 >/proc/sys/vm/overcommit_memory; echo 131072 >/proc/sys/net/netfilter/nf_conntrack_max")
    assert one.run("cat /proc/sys/vm/overcommit_memory").stdout == "1\n"
    assert lab.machine("worker-1").run("cat /proc/sys/vm/overcommit_memory").stdout == host_has
    assert Path("/proc/sys/vm/overcommit_memory").read_text() == host_has


def test_every_setting_that_a_payload_wants_can_be_made(lab: Lab) -> None:
    """Without the few that exist in the host's own network alone."""
    one = lab.machine("control-1")
    files = sorted((ROOT / "overlays").glob("*/etc/sysctl.d/*.conf"))
    wanted = "".join(file.read_text() for file in files)
    lines = [
        line for line in wanted.splitlines() if "=" in line and not line.startswith("#") and "gc_thresh" not in line
    ]
    for line in lines:
        key, _, value = line.partition("=")
        path = f"/proc/sys/{key.strip().replace('.', '/')}"
        one.run(f"echo '{value.strip()}' >{path}")
        assert one.run("cat", path).stdout.split() == value.split(), key


def test_a_machine_has_the_serial_number_of_the_cluster_file(lab: Lab) -> None:
    one = lab.machine("worker-1")
    assert one.run("cat /sys/class/dmi/id/product_serial").stdout == "CZ1900AA01\n"
    assert one.run("readlink -f /sys/class/net/nic0").stdout == "/sys/devices/virtual/net/nic0\n"


def test_a_crashed_machine_finds_its_disk_again(lab: Lab) -> None:
    one = lab.machine("worker-1")
    boot = one.run("cat /proc/sys/kernel/random/boot_id").stdout
    one.run("echo kept >/root/kept; echo kept >/var/lib/etcd/kept; ip link add lost type bridge; echo lost >/run/lost")
    before = one.run("cat /etc/machine-id").stdout
    one.crash()
    assert not one.is_on
    with pytest.raises(LabError, match="It is off"):
        one.run("true")
    assert one.read("/root/kept") == "kept\n", "also while it is off"
    assert "Reached target" in one.journal
    one.power_on()
    one.wait_booted()
    assert one.run("cat /root/kept /var/lib/etcd/kept").stdout == "kept\nkept\n"
    assert one.run("cat /etc/machine-id").stdout == before
    assert one.run("cat /proc/sys/kernel/random/boot_id").stdout != boot
    assert one.run("test -e /run/lost || ip link show lost", check=False).returncode != 0
    assert reaches(one, lab.machine("control-1").node)


def test_a_machine_that_goes_off_is_waited_for_no_longer(lab: Lab) -> None:
    one = lab.machine("worker-1")
    one.run("systemctl poweroff")
    with pytest.raises(WentOff, match=r"(?s)worker-1.*etcd answers.*Reached target"):
        one.wait(lambda: False, 60, "etcd answers")
    one.power_on()
    one.wait_booted()


def test_the_power_button_ends_what_runs_in_order(lab: Lab) -> None:
    one = lab.machine("worker-1")
    unit = "[Service]\nExecStart=sleep infinity\nExecStop=sh -c 'echo in order >/root/stopped'\n"
    one.run("tee", "/etc/systemd/system/runs.service", stdin=unit)
    one.run("systemctl daemon-reload; systemctl start runs")
    one.shutdown(30)
    assert one.read("/root/stopped") == "in order\n"
    one.power_on()
    one.wait_booted()


def hears(listener: Machine, speaker: Machine) -> bool:
    """One way. Their addresses are known to each other."""
    listen = "import socket; s = socket.socket(type=socket.SOCK_DGRAM); s.bind(('', 4000)); s.settimeout(3)"
    process = listener.start("python3", "-c", f"{listen}; print('listening', flush=True); print(s.recv(9))")
    assert process.stdout is not None and process.stdout.readline() == "listening\n"
    speak = f"s.sendto(b'hello', ('{listener.node.address}', 4000))"
    speaker.run("python3", "-c", f"import socket; s = socket.socket(type=socket.SOCK_DGRAM); {speak}")
    return "hello" in process.communicate()[0]


def test_a_cut_machine_is_alone_until_healed(lab: Lab) -> None:
    one, other = lab.machine("control-1"), lab.machine("worker-1")
    assert reaches(one, other.node) and hears(one, other) and hears(other, one)
    one.cut()
    assert not hears(one, other)
    assert not hears(other, one)
    assert one.run("cat /sys/class/net/nic0/carrier").stdout == "1\n"
    one.crash()
    one.power_on()
    one.wait_booted()
    assert not reaches(other, one.node), "a power cycle mends no switch"
    one.heal()
    assert reaches(other, one.node)


def test_what_is_asked_outside_is_counted_by_machine_and_kind(lab: Lab) -> None:
    one = lab.machine("control-1")
    before = set(lab.strays())
    one.run("ip route add default via 192.168.10.254")
    asks = "import socket; s = socket.socket(type=socket.SOCK_DGRAM); [s.sendto(b'?', to) for to in {}]"
    to = [("8.8.8.8", 53), ("9.9.9.9", 123), ("203.0.113.7", 4000), ("203.0.113.7", 4000), ("192.168.10.21", 53)]
    one.run("python3", "-c", asks.format([*to, ("10.96.0.10", 53), ("10.244.1.1", 53)]))
    one.run("ping -c1 -W1 203.0.113.8", check=False)
    one.run("ip route replace default via 192.168.10.1")
    one.run("ping -c1 -W1 203.0.113.8", check=False)
    one.run("ip route delete default")
    asked = {replace(stray, packets=1) if stray.kind == "arp" else stray for stray in set(lab.strays()) - before}
    assert asked == {
        Stray("control-1", "dns", "8.8.8.8", 53, 1),
        Stray("control-1", "ntp", "9.9.9.9", 123, 1),
        Stray("control-1", "udp", "203.0.113.7", 4000, 2),
        Stray("control-1", "icmp", "203.0.113.8", None, 1),
        Stray("control-1", "arp", "192.168.10.1", None, 1),
    }


def test_chatter_by_ipv6_is_told_apart(lab: Lab) -> None:
    one = lab.machine("control-1")
    before = set(lab.strays())
    one.run("ip address add fe80::1/64 dev nic0")
    solicitation = "s = socket.socket(socket.AF_INET6, socket.SOCK_RAW, 58); s.sendto(bytes([133]) + bytes(7), to)"
    to = 'to = ("ff02::2", 0, 0, socket.if_nametoindex("nic0"))'
    one.wait(lambda: "tentative" not in one.run("ip address show nic0").stdout, 5, "has the address")
    one.run("python3", "-c", f"import socket; {to}; {solicitation}")
    one.run("ip address delete fe80::1/64 dev nic0")
    kinds = {stray.kind for stray in set(lab.strays()) - before if ":" in stray.to}
    assert kinds - {"llmnr"} == {"mld", "neighbour solicitation", "router solicitation"}  # that is systemd-resolved's


def test_a_server_on_the_machines_network(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("served")
    url = lab.serve(tmp_path)
    fetch = f"import urllib.request as u; print(u.urlopen('{url}file', timeout=3).read().decode())"
    assert lab.machine("worker-1").run("python3", "-c", fetch).stdout == "served\n"


def test_what_is_waited_for_in_vain_is_told() -> None:
    def never() -> bool:
        raise LabError("etcd: connection refused")

    with pytest.raises(LabError, match=r"Not after 0\.1 s: etcd answers: etcd: connection refused"):
        wait(never, 0.1, "etcd answers")


def test_a_failing_program_is_told_with_its_output(lab: Lab) -> None:
    with pytest.raises(LabError, match=r"(?s)exit code 3.*said out.*said err"):
        lab.machine("control-1").run("echo said out; echo said err >&2; exit 3")
    with pytest.raises(LabError, match=r"(?s)no end after 1 s.*so far"):
        lab.machine("control-1").run("echo so far; sleep 60", timeout=1)


# -- several labs, and what killed ones leave behind ------------------------------------------------------------------

_OTHER = """
import sys, time
from pathlib import Path
from tests.lab.lab import Lab
from tests.lab.test_lab import two

with Lab(Path(sys.argv[1]), two()) as lab:
    machine = lab.machine("control-1")
    machine.power_on()
    print(lab.folder.name, lab.inside.first, machine.first, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other(build: Path) -> Iterator[tuple[subprocess.Popen[str], str, list[int]]]:
    """Another process with a lab of the same cluster: (it, its run, PIDs of its first process and its machine's)."""
    process = subprocess.Popen(
        [sys.executable, "-c", _OTHER, build], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    run, *pids = process.stdout.readline().split()
    yield process, run, [int(pid) for pid in pids]
    process.kill()
    process.wait()


def gone(pid: int) -> bool:
    """Whether it runs no more; who has to reap it is another question."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def left_of(run: str) -> list[Path]:
    return [path for path in (runs.RUNS / run, *cgroups.folders(run)) if path.exists()]


def test_two_labs_of_one_cluster_do_not_meet(lab: Lab, other: tuple[subprocess.Popen[str], str, list[int]]) -> None:
    one, namespaces = lab.machine("control-1"), ["mnt", "net", "pid", "ipc"]
    for kind in namespaces:
        assert Path(f"/proc/{one.first}/ns/{kind}").readlink() != Path(f"/proc/{other[2][1]}/ns/{kind}").readlink()
    assert Path("/run/netns").is_dir() is False or not any(Path("/run/netns").glob("m[0-9]*"))
    assert not [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(runs.RUNS) in line]
    assert reaches(one, lab.machine("worker-1").node)


@pytest.mark.parametrize("victim", ["the tests", "the first process in the namespaces"])
def test_what_a_killed_lab_left_is_gone_and_others_live(
    lab: Lab, build: Path, other: tuple[subprocess.Popen[str], str, list[int]], victim: str
) -> None:
    process, run, pids = other
    assert len(left_of(run)) >= 2
    os.kill(process.pid if victim == "the tests" else pids[0], signal.SIGKILL)
    wait(lambda: all(map(gone, pids)), 10, "every machine of the killed lab ended")
    if victim != "the tests":
        assert left_of(run), "its owner is alive and may look at it"
        process.kill()
    process.wait()
    with Lab(build, two()):
        assert left_of(run) == []
        assert (runs.RUNS / lab.folder.name).is_dir()
    assert all(one.is_on and one.run("true").returncode == 0 for one in lab.machines.values())
    assert reaches(lab.machine("control-1"), lab.machine("worker-1").node)


def test_a_lab_leaves_nothing(build: Path) -> None:
    with Lab(build, two()) as made:
        one = made.machine("control-1")
        one.power_on()
        pids, run = [one.first, made.inside.first], made.folder.name
        assert len(left_of(run)) >= 2
    assert left_of(run) == []
    assert all(map(gone, pids))


def test_logs_are_kept_when_a_test_fails(
    build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(labs, "FAILED", tmp_path)
    with pytest.raises(RuntimeError, match="a test's own"), Lab(build, two()) as made:
        one = made.machine("control-1")
        one.power_on()
        one.wait_booted()
        one.run("mkdir -p /var/log/pods/web && echo said >/var/log/pods/web/0.log")
        one.run("logger -t unit told")
        raise RuntimeError("a test's own")
    (kept,) = tmp_path.glob("*/two/control-1")
    assert "test_logs_are_kept_when_a_test_fails" in str(kept)
    assert str(kept.parent) in capsys.readouterr().err
    assert "unit[" in (kept / "journal.log").read_text() or "unit:" in (kept / "journal.log").read_text()
    assert "cloud-init" in (kept / "console.log").read_text()
    assert (kept / "pods/web/0.log").read_text() == "said\n"
    assert "192.168.10.11" in (kept / "state.log").read_text()


def test_the_root_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a mirror that is a folder without anything, so that it is told."""
    monkeypatch.setattr(rootfs, "mirrors", lambda: [f"file:{tmp_path}/none"])
    with pytest.raises(LabError, match=r"No Debian 13 \(trixie\)") as told:
        rootfs.obtain(folder=tmp_path / "made")
    assert f"file:{tmp_path}/none" in str(told.value)
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["lock"]
    root = rootfs.obtain()
    assert (root / "etc/debian_version").read_text().startswith("13")
    assert not list(root.glob("etc/ssh/ssh_host_*"))
