"""`nodebake apply` on running machines, one of each role: a later artifact, wrong ones, power cuts, the way back."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from recipes import payload
from recipes.kit import inventory
from tests.conftest import Project, copy_project
from tests.lab import checks, workload
from tests.lab.checks import get, items, wait_ready
from tests.lab.lab import Lab
from tests.lab.machine import Machine
from tests.lab.scenario import BOOT, CLUSTERS, etcdctl, members, power_on, settled, snapshot, tell

CLUSTER = "roles"
STEPS = ["medium", "verify", "machine", "place", "users", "packages", "units", "health", "clean", "report"]
RACK = "example.internal/rack"
UNIT = """\
[Service]
ExecStart=/usr/bin/sleep infinity

[Install]
WantedBy=multi-user.target
"""


@dataclass(frozen=True)
class Baked:
    """What one bake gave. nodes: the folder of the nodes' tarballs; digests: role -> name of the payload's folder;
    unit: that this bake brings and the other one does not."""

    nodes: Path
    digests: dict[str, str]
    unit: str
    generation: int
    pods: int  # that a node may have


def bake(project: Project, unit: str, generation: int, pods: int) -> Baked:
    build = project.root / "build" / CLUSTER
    overlay = project.root / "overlays/common/etc/systemd/system" / unit
    overlay.write_text(UNIT)
    project.doit(f"cluster=recipes/clusters/{CLUSTER}.yaml")
    overlay.unlink()
    kept = project.root / f"nodes-{generation}"
    shutil.copytree(build / "nodes", kept)
    told = (payload.read_record(tarball, "role", "digest") for tarball in (build / "payloads").glob("*.tar.gz"))
    return Baked(kept, dict(told), unit, generation, pods)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """With a cluster that was not baked yet, in a file of its own."""
    copy = copy_project(tmp_path)
    workload.archive(copy.clusters / "busybox.tar")
    for name in (CLUSTER, "single"):
        shutil.copy(CLUSTERS / f"{name}.yaml", copy.clusters)
        copy.remember(name)
    return copy


def change(project: Project) -> None:
    """A label, a setting of the kubelet, and a Debian package, so that each role's payload is another."""
    file = project.clusters / f"{CLUSTER}.yaml"
    text = file.read_text().replace("storage: nvme\n", f"storage: nvme\n    labels: {{{RACK}: r07}}\n")
    file.write_text(f"{text}maxPods: 90\n")
    packages = project.root / "overlays/packages.yaml"
    packages.write_text(packages.read_text().replace("common:\n", "common:\n  - tree\n"))


def bring(machine: Machine, tarball: Path) -> str:
    """The folder on the machine where it lies as node.tar.gz."""
    machine.run("mkdir -p /root/later")
    shutil.copyfile(tarball, f"/proc/{machine.first}/root/root/later/node.tar.gz")
    return "/root/later"


def apply(machine: Machine, baked: Baked) -> None:
    folder = bring(machine, baked.nodes / f"{machine.name}.tar.gz")
    machine.run("nodebake", "apply", folder, timeout=BOOT)
    assert machine.run("ls", folder).stdout == "", "the copy held secrets"


@contextmanager
def half_applied(machine: Machine, baked: Baked) -> Iterator[None]:
    """What happens in this block comes when the machine's files are no longer all the earlier artifact's."""
    folder = bring(machine, baked.nodes / f"{machine.name}.tar.gz")
    machine.start("nodebake", "apply", folder)
    machine.wait(lambda: machine.run("test -e /var/lib/nodebake/installed", check=False).returncode == 1, 60, "begun")
    yield
    if not machine.is_on:
        machine.power_on()
    checks.wait_machine_installed(machine, BOOT)


def status(machine: Machine) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(machine.run("nodebake status --json").stdout)  # not healthy: another exit code
    return told


def running(told: dict[str, Any]) -> dict[str, str]:
    """Service -> since when."""
    services = (unit for unit in told["units"] if unit["name"].endswith(".service"))
    return {unit["name"]: unit["since"] for unit in services if unit["state"] == "active (running)"}


def is_what_was_baked(machine: Machine, baked: Baked, other: Baked) -> None:
    """Files, units and programs that run, and what `nodebake status` tells."""
    digest = baked.digests[machine.node.role]
    assert digest != other.digests[machine.node.role]
    assert machine.run("readlink /opt/nodebake/current").stdout.strip() == digest
    told = status(machine)
    assert told["healthy"] and told["problems"] == []
    assert [(step["name"], step["state"]) for step in told["first_boot"]["steps"]] == [(name, "done") for name in STEPS]
    if machine.node.role == "control-plane":
        assert told["machine"]["generation"] == baked.generation
    assert baked.unit in running(told)
    for name in running(told):
        pid = machine.run("systemctl", "show", "--property=MainPID", "--value", name).stdout.strip()
        program = machine.run("readlink", f"/proc/{pid}/exe").stdout.strip()
        assert not program.startswith("/opt/nodebake/") or program.startswith(f"/opt/nodebake/{digest}/"), program
    assert machine.run("systemctl", "is-active", other.unit, check=False).stdout.strip() == "inactive"
    assert machine.run("systemctl --failed --no-legend --plain").stdout == ""


def nodes_take(lab: Lab, name: str, pods: int) -> None:
    lab.wait(lambda: int(get(lab, "node", name)["status"]["capacity"]["pods"]) == pods, 60, f"{name} takes {pods} pods")


def is_refused(machine: Machine, tarball: Path | None, code: int, why: str) -> None:
    """Nothing of it stays but a word in first boot's journal."""
    before, units = unchanged(machine), running(status(machine))
    folder = bring(machine, tarball) if tarball else "/root"
    done = machine.run("nodebake", "apply", folder, check=False, timeout=120)
    assert (done.returncode, why in done.stderr) == (code, True), done.stdout + done.stderr
    assert unchanged(machine) == before
    told = status(machine)
    assert told["healthy"] and running(told) == units
    assert machine.name in told["first_boot"]["steps"][1]["text"]


def unchanged(machine: Machine) -> list[str]:
    own = ("/var/lib/nodebake/journal ", "/var/lib/nodebake/lock ")
    return [line for line in snapshot(machine).splitlines() if not line.startswith(own)]


def with_another_byte(tarball: Path, folder: Path) -> Path:
    damaged = folder / "damaged.tar.gz"
    shutil.copyfile(tarball, damaged)
    with damaged.open("r+b") as file:
        file.seek(1_000_000)
        byte = file.read(1)[0]
        file.seek(1_000_000)
        file.write(bytes([byte ^ 1]))
    return damaged


@pytest.mark.matrix
def test_a_later_artifact_is_applied_to_running_machines(project: Project, tmp_path: Path) -> None:
    earlier = bake(project, "lab-earlier.service", 1, 100)
    cluster = inventory.load(project.clusters / f"{CLUSTER}.yaml", now=datetime.now(UTC))
    with Lab(project.root / "build" / CLUSTER, cluster) as lab:
        etcd, balancer, plane, worker = (
            lab.machine(name) for name in ("etcd-1", "balancer-1", "control-1", "worker-1")
        )
        settled(lab, power_on(lab))
        change(project)
        later = bake(project, "lab-later.service", 2, 90)
        project.doit("cluster=recipes/clusters/single.yaml")
        stranger = project.root / "build/single/nodes/only.tar.gz"

        is_refused(worker, later.nodes / "control-1.tar.gz", 80, "no network card has the MAC address")
        is_refused(worker, stranger, 67, "signed by another cluster's key")
        is_refused(worker, with_another_byte(later.nodes / "worker-1.tar.gz", tmp_path), 65, "is damaged")
        is_refused(worker, None, 66, "there is no /root/node.tar.gz")

        ran = checks.containers(lab)
        apply(etcd, later)
        with half_applied(balancer, later):
            balancer.crash()
        apply(plane, later)
        with half_applied(worker, later):
            worker.run("systemctl kill --kill-whom=main --signal=SIGKILL nodebake-apply.service")
        for machine in lab.machines.values():
            is_what_was_baked(machine, later, earlier)
            assert machine.run("tree --version").stdout
        for name in (plane.name, worker.name):
            nodes_take(lab, name, later.pods)
        assert get(lab, "node", worker.name)["metadata"]["labels"][RACK] == "r07"
        assert checks.containers(lab) == ran, "no container was started anew"
        checks.everything_works(lab)

        # Back: the files, not what the cluster holds.
        ran = {each for each in checks.containers(lab) if each[0] in pods_of(lab, worker.name)}
        with half_applied(plane, earlier):
            plane.crash()
        apply(worker, earlier)
        for machine in (plane, worker):
            is_what_was_baked(machine, earlier, later)
            nodes_take(lab, machine.name, earlier.pods)
        assert ran <= checks.containers(lab), "the worker's containers ran on"
        plane.wait(
            lambda: "this machine's artifact at 1" in plane.journal, 60, "the controller says that it applies nothing"
        )
        assert get(lab, "cm", "nodebake-inventory", "-n", "kube-system")["data"]["generation"] == "2"
        assert get(lab, "node", worker.name)["metadata"]["labels"][RACK] == "r07"
        checks.everything_works(lab)


def pods_of(lab: Lab, node: str) -> set[str]:
    return {pod["metadata"]["name"] for pod in items(lab, "pods", "-A") if pod["spec"].get("nodeName") == node}


@pytest.mark.matrix
def test_nodes_follow_the_api_to_another_address(project: Project) -> None:
    """Whose certificates stay: what the kubelet wrote about the API when it joined is of yesterday."""
    bake(project, "lab-earlier.service", 1, 100)
    file = project.clusters / f"{CLUSTER}.yaml"
    cluster = inventory.load(file, now=datetime.now(UTC))
    with Lab(project.root / "build" / CLUSTER, cluster) as lab:
        settled(lab, power_on(lab, *(node.name for node in cluster.nodes)))
        worker = lab.machine("worker-1")
        certificate = worker.run("readlink /var/lib/kubelet/pki/kubelet-client-current.pem").stdout
        moved = f"{cluster.vip}0"
        file.write_text(file.read_text().replace(f"virtualIP: {cluster.vip}\n", f"virtualIP: {moved}\nmaxPods: 90\n"))
        later = bake(project, "lab-later.service", 2, 90)
        for name in ("balancer-1", "control-1", "worker-1"):
            apply(lab.machine(name), later)
        nodes_take(lab, "worker-1", later.pods)
        assert f"server: https://{moved}:6443" in worker.run("cat /var/lib/kubelet/kubeconfig").stdout
        assert worker.run("readlink /var/lib/kubelet/pki/kubelet-client-current.pem").stdout == certificate
        checks.everything_works(lab)


def is_told_of(machine: Machine, word: str) -> bool:
    return word in machine.run("nodebake status", check=False).stdout


@pytest.mark.matrix
def test_one_control_plane_becomes_three(project: Project) -> None:
    """Two that came later are a majority, and could begin a cluster of their own with an empty store."""
    file, build = project.clusters / "single.yaml", project.root / "build/single"
    project.doit(f"cluster={file}")
    later = 'role: control-plane, address: 192.168.10.1{0}, mac: "52:54:00:00:10:0{0}"'
    file.write_text(file.read_text() + "".join(f"  - {{name: control-{n}, {later.format(n)}}}\n" for n in (2, 3)))
    with Lab(build, inventory.load(file, now=datetime.now(UTC))) as lab:
        first = lab.machine("only")
        wait_ready(lab, BOOT, {"only"}, power_on(lab, "only"))
        checks.wait_machine_installed(first, BOOT)
        lab.kubectl("create", "configmap", "before")
        project.doit(f"cluster={file}")
        first.run("nodebake", "apply", bring(first, build / "nodes/only.tar.gz"), timeout=BOOT)
        for name in ("control-2", "control-3"):
            clock, machine = power_on(lab, name), lab.machine(name)
            machine.wait(partial(is_told_of, machine, "etcd"), BOOT, "etcd is waited for")
            time.sleep(10)
            assert len(members(first)) == len(lab.machines) - 1, "it has begun nothing by itself"
            added = etcdctl(first, f"member add {name} --peer-urls=https://{machine.node.address}:2380")
            known = re.search(r'^ETCD_INITIAL_CLUSTER="(.*)"$', added, re.MULTILINE)
            assert known, added
            machine.run("tee", "/etc/nodebake/member.env", stdin=f"INITIAL_CLUSTER={known[1]}\n")
            wait_ready(lab, BOOT, {name}, clock)
            checks.wait_machine_installed(machine, BOOT)
            tell(clock)
        for machine in lab.machines.values():
            etcdctl(machine, "endpoint health --cluster")
            assert "default/before" in etcdctl(machine, "get --keys-only --prefix /registry/configmaps/default/before")
        assert {(state, name) for _, state, name in members(first)} == {("started", name) for name in lab.machines}
