"""First boot's checks of the machine: a real Debian 13 in a chroot whose kernel is described by plain files.

What the checks read of the kernel (/proc, /sys) is laid out as files there, so that each lack can be provoked alone.
That a machine as it should be is accepted is shown by the lab, which boots some.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from recipes.kit import store
from recipes.kit.model import Cluster, Node
from tests import artifacts, samples, servers
from tests.lab import host, rootfs
from tests.servers import Server

NOW = datetime.now(tz=UTC)
PROGRAM = Path(__file__).parents[1] / "overlays/common/opt/nodebake/first-boot"
FIB_TRIE = """Local:
  +-- 0.0.0.0/0 3 0 5
     |-- {address}
        /32 host LOCAL
"""
PROC = {
    "meminfo": "MemTotal:        4000000 kB\nMemFree:         3000000 kB\n",
    "swaps": "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n",
    "net/tcp": "  sl  local_address rem_address   st\n   0: 00000000:0016 00000000:0000 0A\n",
    "net/tcp6": "  sl  local_address rem_address   st\n",
}


@pytest.fixture(autouse=True, scope="module")
def what_the_lab_needs() -> None:
    if (lack := host.lacking()) is not None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(lack)


@dataclass(frozen=True)
class Machine:
    """A chroot, and the medium that it is given."""

    root: Path

    def path(self, name: str) -> Path:
        return self.root / name.lstrip("/")

    def write(self, name: str, text: str) -> None:
        self.path(name).parent.mkdir(parents=True, exist_ok=True)
        self.path(name).write_text(text)

    def command(self) -> list[str]:
        return ["chroot", str(self.root), "/bin/sh", "/medium/first-boot", "install", "--medium", "/medium"]

    @property
    def journal(self) -> str:
        return self.path("/var/lib/nodebake/journal").read_text()

    def first_boot(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(), capture_output=True, text=True, timeout=120)

    def version(self, package: str) -> str:
        query = ["dpkg-query", f"--root={self.root}", "--show", "--showformat=${Version}", package]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout

    def files(self) -> set[tuple[str, int, int]]:
        """Path, size and time of every file but first boot's own notes."""
        found = (path for path in self.root.rglob("*") if not path.is_dir() or path.is_symlink())
        stats = ((path.relative_to(self.root).as_posix(), path.lstat()) for path in found)
        return {
            (name, stat.st_size, stat.st_mtime_ns) for name, stat in stats if not name.startswith("var/lib/nodebake/")
        }


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> artifacts.Parts:
    return artifacts.Parts(tmp_path_factory.mktemp("parts"))


def bake(folder: Path, parts: artifacts.Parts, cluster: Cluster, node: Node, minted: datetime = NOW) -> Path:
    secrets = store.open(folder / "secrets", cluster, now=minted)
    _, tarball = artifacts.bake(folder, cluster, node, parts, secrets)
    return tarball


def renewal(folder: Path, parts: artifacts.Parts, cluster: Cluster, node: Node) -> Path:
    """What renews a machine that was baked in this folder: rekeyed, without the payload."""
    secrets = store.rekey(folder / "secrets", cluster, [node.name], now=NOW)
    _, tarball = artifacts.bake(folder / "renewal", cluster, node._replace(media="thin"), parts, secrets)
    return tarball


def with_another_name(cluster: Cluster, node: Node) -> Cluster:
    others = (each for each in cluster.nodes if each != node)
    return replace(cluster, nodes=(*others, node._replace(name="worker-9")))


@pytest.fixture(scope="module")
def tarballs(tmp_path_factory: pytest.TempPathFactory, parts: artifacts.Parts) -> dict[str, Path]:
    """Of worker-1 and control-1: what the sample cluster gives; and what was baked at other times or for others."""
    folder = tmp_path_factory.mktemp("tarballs")
    cluster = samples.ha()
    worker = cluster.workers[0]
    return {
        "worker": bake(folder / "now", parts, cluster, worker),
        "control-plane": bake(folder / "now", parts, cluster, cluster.control_planes[0]),
        "renewal": renewal(folder / "now", parts, cluster, worker),
        "tomorrow": bake(folder / "tomorrow", parts, cluster, worker, NOW + timedelta(days=1)),
        "last year": bake(folder / "past", parts, cluster, worker, NOW - timedelta(days=365)),
        "renamed": bake(folder / "now", parts, with_another_name(cluster, worker), worker._replace(name="worker-9")),
        "with a serial": bake(folder / "serial", parts, cluster, worker._replace(serial="CZ1900AA01")),
        "arm64": bake(
            folder / "arm64",
            artifacts.Parts(folder / "arm64" / "parts", "arm64"),
            cluster,
            worker._replace(arch="arm64"),
        ),
    }


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """worker-1 as it should be, and control-1 too."""
    for name in ("upper", "work", "root"):
        (tmp_path / name).mkdir()
    root = tmp_path / "root"
    layers = f"lowerdir={rootfs.obtain()},upperdir={tmp_path / 'upper'},workdir={tmp_path / 'work'}"
    host.run(["mount", "-t", "overlay", "overlay", "-o", layers, root])
    try:
        machine = Machine(root)
        for name, text in PROC.items():
            machine.write(f"/proc/{name}", text)
        machine.write("/proc/net/fib_trie", FIB_TRIE.format(address="192.168.10.21"))
        machine.write("/sys/class/net/eth0/address", "52:54:00:00:10:15\n")
        machine.write("/sys/class/dmi/id/product_serial", "VM-1\n")
        machine.path("/run/systemd/system").mkdir(parents=True)
        for module in ("overlay", "br_netfilter", "nf_conntrack", "nf_tables", "vxlan"):
            machine.path(f"/sys/module/{module}").mkdir(parents=True)
        machine.write("/sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory hugetlb pids rdma misc\n")
        for name, minor in (("null", "3"), ("zero", "5")):
            if not machine.path(f"/dev/{name}").exists():
                host.run(["mknod", "-m", "666", machine.path(f"/dev/{name}"), "c", "1", minor])
        machine.path("/medium").mkdir()
        shutil.copy(PROGRAM, machine.path("/medium/first-boot"))
        yield machine
    finally:
        host.run(["umount", "--lazy", root])


def another_card(machine: Machine) -> None:
    machine.write("/sys/class/net/eth0/address", "52:54:00:00:10:16\n")


def another_address(machine: Machine) -> None:
    machine.write("/proc/net/fib_trie", FIB_TRIE.format(address="192.168.10.22"))


def another_system(machine: Machine) -> None:
    machine.path("/etc/os-release").unlink()
    machine.write("/etc/os-release", 'ID=debian\nVERSION_ID="12"\n')


def no_systemd(machine: Machine) -> None:
    machine.path("/run/systemd/system").rmdir()


def little_memory(machine: Machine) -> None:
    machine.write("/proc/meminfo", "MemTotal:         500000 kB\n")


def swap(machine: Machine) -> None:
    machine.write("/proc/swaps", PROC["swaps"] + "/dev/vda2 partition 1000 0 -2\n")


def taken_port(machine: Machine) -> None:
    machine.write("/proc/net/tcp", PROC["net/tcp"] + "   1: 00000000:280A 00000000:0000 0A\n")


def taken_number(machine: Machine) -> None:
    with machine.path("/etc/passwd").open("a") as file:
        file.write("somebody:x:801:801::/:/bin/sh\n")


def taken_group(machine: Machine) -> None:
    with machine.path("/etc/group").open("a") as file:
        file.write("kube-scheduler:x:77:\n")


def lacking_controller(machine: Machine) -> None:
    machine.write("/sys/fs/cgroup/cgroup.controllers", "cpuset cpu io hugetlb pids rdma misc\n")


def lacking_module(machine: Machine) -> None:
    machine.path("/sys/module/vxlan").rmdir()


def as_control_plane(machine: Machine) -> None:
    machine.write("/proc/net/fib_trie", FIB_TRIE.format(address="192.168.10.11"))
    machine.write("/sys/class/net/eth0/address", "52:54:00:00:10:0b\n")


def foreign_data(machine: Machine) -> None:
    machine.path("/var/lib/etcd/member").mkdir(parents=True)
    as_control_plane(machine)


def unfit_package(machine: Machine) -> None:
    """haproxy may not be installed here: something that is there says that it conflicts with it."""
    status = machine.path("/var/lib/dpkg/status")
    stanza = "Package: odd\nStatus: install ok installed\nMaintainer: x\nArchitecture: all\nVersion: 1\n"
    text = f"{stanza}Conflicts: haproxy\nEssential: yes\nProtected: yes\nDescription: odd\n\n"
    status.write_text(status.read_text().rstrip("\n") + "\n\n" + text)


def nothing(machine: Machine) -> None:
    pass


REFUSED: list[tuple[int, str, Callable[[Machine], None], str]] = [
    (80, "worker", another_card, "no network card has the MAC address 52:54:00:00:10:15 of worker-1"),
    (81, "with a serial", nothing, "serial number is 'VM-1', worker-1's is 'CZ1900AA01'"),
    (82, "worker", another_address, "has no address 192.168.10.21"),
    (83, "arm64", nothing, "this machine is amd64, the artifact is for arm64"),
    (84, "worker", another_system, "runs 'debian 12'"),
    (84, "worker", no_systemd, "systemd does not run"),
    (85, "tomorrow", nothing, "before the bake"),
    (86, "last year", nothing, "installBy was"),
    (87, "control-plane", foreign_data, "/var/lib/etcd holds data"),
    (89, "worker", little_memory, "has 488 MiB of memory; a machine of the role worker needs 900"),
    (90, "worker", swap, "swap is on: /dev/vda2"),
    (91, "worker", taken_port, "port 10250, which kubelet needs, is taken"),
    (92, "worker", taken_number, "801 is 'somebody'"),
    (92, "worker", taken_group, "kube-scheduler is '77'"),
    (93, "worker", unfit_package, "packages do not fit"),
    (94, "worker", lacking_module, "has no module vxlan"),
    (95, "worker", lacking_controller, "has no control group controller memory"),
]


@pytest.mark.parametrize(
    ("code", "which", "change", "said"), REFUSED, ids=[f"{code}-{change.__name__}" for code, _, change, _ in REFUSED]
)
def test_a_machine_that_does_not_fit_is_refused_unchanged(
    machine: Machine,
    tarballs: dict[str, Path],
    code: int,
    which: str,
    change: Callable[[Machine], None],
    said: str,
) -> None:
    shutil.copy(tarballs[which], machine.path("/medium/node.tar.gz"))
    change(machine)
    before = machine.files()
    done = machine.first_boot()
    assert done.returncode == code, done.stdout + done.stderr
    assert said in done.stderr and "->" in done.stderr
    assert machine.files() == before, "a refused machine is as it was"
    left = {path.name for path in machine.path("/var/lib/nodebake").iterdir()}
    assert left == {"lock", "journal", "first-boot"}
    refusal = done.stderr.splitlines()[0].removeprefix("first-boot: ")
    assert f"machine refused {refusal}\n" in machine.journal


def test_too_small_a_disk_is_refused(machine: Machine, tarballs: dict[str, Path]) -> None:
    shutil.copy(tarballs["worker"], machine.path("/medium/node.tar.gz"))
    os.truncate(machine.path("/medium/node.tar.gz"), 1 << 40)  # a sparse file that nothing could hold
    done = machine.first_boot()
    assert done.returncode == 88 and "MiB are needed" in done.stderr, done.stderr


@pytest.fixture
def served(machine: Machine, parts: artifacts.Parts, tmp_path: Path) -> Iterator[tuple[Server, bytes]]:
    """worker-1's thin medium, its server, and the payload that this has to bring."""
    with servers.serving() as server:
        cluster = samples.ha(payload_server=server.url)
        folder = tmp_path / "baked"
        tarball = bake(folder, parts, cluster, cluster.workers[0]._replace(media="thin"))
        shutil.copy(tarball, machine.path("/medium/node.tar.gz"))
        yield server, (folder / "payloads/worker-amd64.tar.gz").read_bytes()


@pytest.mark.parametrize("change", [another_card, another_address, another_system, little_memory, swap])
def test_a_machine_that_does_not_fit_fetches_nothing(
    machine: Machine, served: tuple[Server, bytes], change: Callable[[Machine], None]
) -> None:
    change(machine)
    before = machine.files()
    done = machine.first_boot()
    assert done.returncode in (80, 82, 84, 89, 90), done.stdout + done.stderr
    assert "machine refused" in machine.journal
    assert machine.files() == before and served[0].requests == []


def test_a_forged_identity_asks_no_server(machine: Machine, served: tuple[Server, bytes], tmp_path: Path) -> None:
    """Nor does one whose bytes are not those that were signed."""
    unpacked = tmp_path / "unpacked"
    for name in ("etc/nodebake/node.env", "opt/nodebake/manifest/node.SHA256SUMS"):
        host.run(["mkdir", unpacked])
        host.run(["tar", "-xzpf", tmp_path / "baked/nodes/worker-1.tar.gz", "-C", unpacked])
        with (unpacked / name).open("a") as file:
            file.write("#\n")
        host.run(["tar", "-czf", machine.path("/medium/node.tar.gz"), "-C", unpacked, "."])
        host.run(["rm", "-r", unpacked])
        done = machine.first_boot()
        assert done.returncode in (65, 67), done.stdout + done.stderr
    assert served[0].requests == []


def test_a_payload_is_fetched_checked_and_put_in_place(machine: Machine, served: tuple[Server, bytes]) -> None:
    """A run that is cut off while it fetches goes on with what has come, and nothing of it is left at the end."""
    server, payload = served
    path = "/worker-amd64.tar.gz"
    server.answers[path] = [servers.status(404)]
    before = machine.files()
    done = machine.first_boot()
    assert done.returncode == 66 and "the server says 404 Not Found" in done.stderr, done.stderr
    server.answers[path] = [servers.body(payload[:-1])]
    assert machine.first_boot().returncode == 65
    server.answers[path] = [servers.body(payload, cut=len(payload) // 2), servers.status(404)]
    assert machine.first_boot().returncode == 66
    assert machine.files() == before, "nothing is changed until all has come"
    assert len(list(machine.path("/var/lib/nodebake").glob("payload-*"))) == 1
    server.answers[path] = [servers.body(payload)]
    said = until_it_waits(machine)
    assert server.requests[-1][1]["Range"] == f"bytes={len(payload) // 2}-"
    assert "fetching the payload" in said and machine.path("/opt/nodebake/current/bin/kubelet").exists()
    assert not list(machine.path("/var/lib/nodebake").glob("payload-*"))


def until_it_waits(machine: Machine) -> str:
    """Runs first boot until it waits for health; what it said."""
    with subprocess.Popen(
        machine.command(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            said = []
            for line in process.stdout:
                said.append(line)
                if "waiting until this machine is healthy" in line:
                    break
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # with what it runs, as a power cut would
    return "".join(said)


@pytest.mark.parametrize("which", ["worker", "control-plane"])
def test_a_machine_that_fits_goes_on_to_its_units(machine: Machine, tarballs: dict[str, Path], which: str) -> None:
    """No systemd runs in a chroot, so nothing is started there; what comes before has been done."""
    older = "Package: nftables\nStatus: install ok installed\nMaintainer: x\nArchitecture: amd64\nVersion: 0.9\n"
    status = machine.path("/var/lib/dpkg/status")
    status.write_text(f"{status.read_text().rstrip()}\n\n{older}Description: older than the artifact's\n")
    machine.path("/var/lib/dpkg/info/nftables.list").write_text("/.\n")
    had = machine.version("openssl")
    shutil.copy(tarballs[which], machine.path("/medium/node.tar.gz"))
    if which == "control-plane":
        foreign_data(machine)
        machine.path("/var/lib/etcd/member").rmdir()
    machine.path("/usr/local/bin").mkdir(exist_ok=True)
    said = until_it_waits(machine)
    steps = [tuple(line.split(" ", 3)[1:3]) for line in machine.journal.splitlines()]
    order = ["medium", "verify", "machine", "place", "users", "packages", "units"]
    assert steps[:14] == [(step, state) for step in order for state in ("begun", "done")], said
    assert "etcd:x:801:801:" in machine.path("/etc/passwd").read_text()
    measured = machine.path("/var/lib/nodebake/etcd-disk")
    assert measured.exists() == (which == "control-plane") == ("etcd's disk" in said)
    assert not list(machine.path("/var/lib").rglob("*writes")), "nothing is left of the measurement"
    assert machine.version("haproxy") == machine.version("nftables") == "1", "what was lacking or older is installed"
    assert machine.version("openssl") == had != "1", "nothing becomes older"
    assert not machine.path("/var/lib/nodebake/installed").exists(), "it is not healthy yet"
    assert machine.path("/var/lib/nodebake/placed").exists()


DD = """#!/bin/sh
echo 'NUMBER+0 records out' >&2
echo 'NUMBER bytes (x kB, x KiB) copied, 1.5 s, x kB/s' >&2
exit 130
"""


@pytest.mark.parametrize(
    ("written", "told"),
    [
        (2300 * 100, "WARNING: etcd's disk is slow: a synchronous write takes 15.00 ms"),
        (2300 * 150, "WARNING: etcd's disk is slow: a synchronous write takes 10.00 ms"),
        (2300 * 151, "etcd's disk: a synchronous write takes 9.93 ms"),
        (0, ""),
    ],
)
def test_a_slow_disk_is_told_and_keeps_nothing_from_going_on(
    machine: Machine, tarballs: dict[str, Path], written: int, told: str
) -> None:
    """Also where dd was stopped since the disk was that slow, or could not write at all."""
    machine.write("/usr/local/bin/dd", DD.replace("NUMBER", str(written)))
    machine.path("/usr/local/bin/dd").chmod(0o755)
    as_control_plane(machine)
    shutil.copy(tarballs["control-plane"], machine.path("/medium/node.tar.gz"))
    said = until_it_waits(machine)
    assert told in said
    assert ("etcd's disk" in said) == bool(told)
    assert machine.path("/var/lib/nodebake/etcd-disk").exists() == bool(told)


def test_a_disk_that_etcd_writes_to_is_not_measured(machine: Machine, tarballs: dict[str, Path]) -> None:
    """A run that goes on after a power cut, and a later artifact, would measure etcd itself."""
    as_control_plane(machine)
    shutil.copy(tarballs["control-plane"], machine.path("/medium/node.tar.gz"))
    assert "etcd's disk" in until_it_waits(machine)
    machine.path("/var/lib/etcd/member").mkdir(parents=True)
    assert "etcd's disk" not in until_it_waits(machine)
    assert machine.path("/var/lib/nodebake/etcd-disk").exists(), "what was measured is still told"


# ---- a later artifact


@pytest.fixture
def installed(machine: Machine, tarballs: dict[str, Path]) -> Machine:
    """worker-1 with the sample cluster's artifact; systemctl only writes down what it is told."""
    machine.write("/usr/local/sbin/systemctl", '#!/bin/sh\necho "$*" >>/var/lib/nodebake/systemctl.log\n')
    machine.path("/usr/local/sbin/systemctl").chmod(0o755)
    shutil.copy(tarballs["worker"], machine.path("/medium/node.tar.gz"))
    until_it_waits(machine)
    shutil.copy(machine.path("/var/lib/nodebake/placed"), machine.path("/var/lib/nodebake/installed"))
    return machine


def no_artifact(machine: Machine) -> None:
    machine.path("/medium/node.tar.gz").unlink()


def damaged_artifact(machine: Machine) -> None:
    path = machine.path("/medium/node.tar.gz")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def unfit_packages(machine: Machine) -> None:
    """Another artifact than the one that is installed, with a package that may not be installed here."""
    machine.write("/var/lib/nodebake/installed", "of an earlier one\n")
    machine.write("/var/lib/nodebake/placed", "of an earlier one\n")
    status = machine.path("/var/lib/dpkg/status")
    kept = [each for each in status.read_text().split("\n\n") if not each.startswith("Package: haproxy\n")]
    status.write_text("\n\n".join(kept))
    unfit_package(machine)


def test_a_node_keeps_its_name(installed: Machine, tarballs: dict[str, Path]) -> None:
    """Once it has joined; the kubelet's certificate would stay the old name's."""
    shutil.copy(tarballs["renamed"], installed.path("/medium/node.tar.gz"))
    installed.write("/var/lib/kubelet/pki/kubelet-client-current.pem", "")
    before = installed.files()
    done = installed.first_boot()
    assert done.returncode == 96 and "this machine is the node worker-1" in done.stderr, done.stdout + done.stderr
    assert installed.files() == before
    installed.path("/var/lib/kubelet/pki/kubelet-client-current.pem").unlink()
    until_it_waits(installed)
    assert "NODE_NAME='worker-9'" in installed.path("/etc/nodebake/node.env").read_text()


@pytest.mark.parametrize(("code", "change"), [(66, no_artifact), (65, damaged_artifact), (93, unfit_packages)])
def test_a_wrong_artifact_leaves_an_installed_machine_as_it_is(
    installed: Machine, code: int, change: Callable[[Machine], None]
) -> None:
    change(installed)
    before = installed.files()
    done = installed.first_boot()
    assert done.returncode == code, done.stdout + done.stderr
    assert installed.files() == before
    assert installed.path("/var/lib/nodebake/installed").exists()


def test_a_renewal_changes_the_identity_and_restarts_the_units(installed: Machine, tarballs: dict[str, Path]) -> None:
    config, program = "/etc/kubernetes/bootstrap-kubelet.conf", "/opt/nodebake/current/bin/kubelet"
    old = installed.path(config).read_text()
    inode = installed.path(program).stat().st_ino
    shutil.copy(tarballs["renewal"], installed.path("/medium/node.tar.gz"))
    installed.path("/var/lib/nodebake/systemctl.log").unlink()
    said = until_it_waits(installed)
    assert "taking the payload that this machine has" in said
    assert installed.path(config).read_text() != old and installed.path(program).stat().st_ino == inode
    assert (installed.path(config).stat().st_mode & 0o777, installed.path(config).stat().st_nlink) == (0o600, 1)
    told = installed.path("/var/lib/nodebake/systemctl.log").read_text()
    assert "--no-block restart" in told and "kubelet.service" in told and "stop" not in told
    steps = [tuple(line.split(" ", 3)[1:3]) for line in installed.journal.splitlines()]
    assert ("place", "done") in steps[steps.index(("place", "done")) + 1 :], "placed twice"


def test_a_machine_that_has_joined_takes_what_was_to_be_installed_by_then(
    installed: Machine, tarballs: dict[str, Path]
) -> None:
    """It needs no token: so is the way back to an earlier artifact, or an identity of a machine that nobody rekeyed."""
    shutil.copy(tarballs["last year"], installed.path("/medium/node.tar.gz"))
    for name in ("opt/nodebake/manifest/signing.pub", "var/lib/nodebake/installed", "var/lib/nodebake/placed"):
        installed.path(f"/{name}").unlink()  # as if the same cluster had baked it
    said = until_it_waits(installed)
    assert "waiting until this machine is healthy" in said
    past = f"INSTALL_BY='{NOW - timedelta(days=365 - 90):%Y-%m-%dT}"
    assert past in installed.path("/etc/nodebake/node.env").read_text()


def test_a_run_that_goes_on_needs_no_medium_any_more(installed: Machine) -> None:
    installed.path("/var/lib/nodebake/installed").unlink()
    damaged_artifact(installed)
    command = ["chroot", str(installed.root), "/bin/sh", "/medium/first-boot", "install"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "looking for this machine's artifact" in process.stdout.readline()
        assert "making folders" in process.stdout.readline()
        process.kill()


@pytest.mark.parametrize(("placed", "code", "says"), [(True, 0, "making folders"), (False, 66, "put it there again")])
def test_what_was_named_and_is_gone_is_not_replaced_by_an_older_medium(
    installed: Machine, tarballs: dict[str, Path], placed: bool, code: int, says: str
) -> None:
    """As the machine's first ISO, which may be in the drive for ever."""
    installed.path("/var/lib/nodebake/installed").unlink()
    if not placed:
        installed.path("/var/lib/nodebake/placed").unlink()
    installed.path("/medium/node.tar.gz").unlink()
    installed.path("/older").mkdir()
    shutil.copy(tarballs["renewal"], installed.path("/older/node.tar.gz"))
    functions = PROGRAM.read_text().removesuffix('main "$@"\n')
    in_the_drive = 'find_medium() { [ -n "$MEDIUM" ] || MEDIUM=/older; }\nprepare_system() { exit 0; }\nmain install\n'
    installed.write("/program", functions + in_the_drive)
    command: list[str | Path] = ["chroot", installed.root, "/bin/sh", "/program"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == code and says in done.stdout, done.stdout
    assert "verifying" not in done.stdout


def test_what_is_installed_already_leaves_no_copy_either(installed: Machine) -> None:
    done = installed.first_boot()
    assert done.returncode == 0 and "installed already" in done.stdout, done.stdout + done.stderr
    assert not installed.path("/medium/node.tar.gz").exists()


def test_units_that_only_an_earlier_artifact_brought_are_stopped(installed: Machine) -> None:
    for name in ("installed", "placed"):
        installed.write(f"/var/lib/nodebake/{name}", "of an earlier one\n")
    old = ("etc/systemd/system/old.service", "etc/systemd/system/old.timer", "etc/old")
    with installed.path("/opt/nodebake/manifest/payload.tree").open("a") as tree:
        for name in old:
            installed.write(name, "")
            tree.write(f"f 644 0 {name}\n")
    said = until_it_waits(installed)
    told = installed.path("/var/lib/nodebake/systemctl.log").read_text().splitlines()
    assert "--no-block stop old.service old.timer" in told, said
    assert not any(installed.path(name).exists() for name in old)


# ---- after success --------------------------------------------------------------------------------------------------

STAND_INS = """
mount_label() { echo /seed; }
mountpoint() { if [ "$2" = / ]; then echo 254:2; else echo {number}; fi; }
umount() { echo "umount $*"; }
blkdiscard() { echo "blkdiscard $*"; }
sync() { echo sync; }
udevadm() { :; }
wipe_own_seed
"""
OVERWRITTEN = [
    "umount /seed",
    "blkdiscard --zeroout --offset 1MiB /dev/block/254:3",
    "sync",
    "blkdiscard --zeroout --length 1MiB /dev/block/254:3",
    "first-boot: overwrote this disk's seed, which held secrets",
]


@pytest.mark.parametrize(
    ("number", "name", "told"),
    [
        ("254:3", "node.tar.gz", OVERWRITTEN),
        ("254:3", "user-data", []),
        ("254:18", "node.tar.gz", []),
        ("11:0", "node.tar.gz", []),
        ("0:52", "node.tar.gz", []),
    ],
    ids=["on the disk of /", "of another", "on another disk", "a CD", "no device"],
)
def test_the_seed_is_overwritten_on_the_disk_of_the_root_alone(
    machine: Machine, number: str, name: str, told: list[str]
) -> None:
    """Whatever medium the artifact came from that the machine was made of in the end."""
    machine.write(f"/seed/{name}", "")
    for block, device in (("254:2", "vda/vda2"), ("254:3", "vda/vda3"), ("254:18", "vdb/vdb2"), ("11:0", "sr0")):
        machine.write(f"/sys/devices/{device}/size", "585728\n")
        if "/" in device:
            machine.write(f"/sys/devices/{device}/partition", f"{device[-1]}\n")
        link = machine.path(f"/sys/dev/block/{block}")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(f"../../devices/{device}")
    functions = PROGRAM.read_text().removesuffix('main "$@"\n')
    program = functions + STAND_INS.replace("{number}", number)
    done = subprocess.run(["chroot", machine.root, "sh", "-c", program], capture_output=True, text=True)
    assert (done.stdout.splitlines(), done.stderr, done.returncode) == (told, "", 0)
