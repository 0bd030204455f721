"""Shelf life: a machine that was not installed in time, and certificates that are renewed while the cluster works."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Project
from tests.lab import checks
from tests.lab.checks import get, items, wait_ready
from tests.lab.lab import Lab
from tests.lab.machine import Machine
from tests.lab.scenario import BOOT, Baker, power_on, say, switched_on, writing

PLANES = ("control-1", "control-2", "control-3")
LATE = "worker-3"
FILES = ("/etc/kubernetes/pki/kube-apiserver.crt", "/etc/etcd/pki/server.crt", "/etc/etcd/pki/peer.crt")
PORTS = (6443, 2379, 2380)
PROGRAM = "/opt/nodebake/current/bin/kube-apiserver"


@pytest.fixture(scope="module")
def project(bake: Baker) -> Project:
    return bake("ha")


@pytest.fixture(scope="module")
def lab(bake: Baker) -> Iterator[Lab]:
    """Five machines that work, and one that lies in its box."""
    with switched_on(bake, "ha") as lab:
        names = {name for name in lab.machines if name != LATE}
        power_on(lab, *sorted(names))
        wait_ready(lab, BOOT, names)
        for name in sorted(names):
            checks.wait_machine_installed(lab.machine(name), BOOT)
        yield lab


def serials(machine: Machine) -> list[str]:
    """Of the certificates on the disk, then of those that its daemons show: they must be the same."""
    on_disk = [machine.run(f"openssl x509 -noout -serial -in {file}").stdout.strip() for file in FILES]
    client = f"openssl s_client -cert {FILES[2]} -key {FILES[2].removesuffix('crt')}key -connect {machine.node.address}"
    shown = [
        machine.run(f"{client}:{port} </dev/null 2>/dev/null | openssl x509 -noout -serial").stdout for port in PORTS
    ]
    assert [each.strip() for each in shown] == on_disk
    return on_disk


def renew(machine: Machine, renewal: Path) -> None:
    machine.run("mkdir -p -m 700 /root/renewal")
    shutil.copyfile(renewal, f"/proc/{machine.first}/root/root/renewal/node.tar.gz")
    said = machine.run("nodebake", "apply", "/root/renewal", timeout=BOOT).stdout
    assert "journalctl" in said and machine.run("ls /root/renewal").stdout == ""


def tokens(lab: Lab) -> dict[str, str]:
    """Machine -> id of the token that the cluster has for it."""
    found = items(lab, "secrets", "-n", "kube-system", "--field-selector=type=bootstrap.kubernetes.io/token")
    return {
        each["metadata"]["labels"]["nodebake.local/machine"]: each["metadata"]["name"].removeprefix("bootstrap-token-")
        for each in found
    }


@pytest.mark.matrix
def test_certificates_are_renewed_while_the_cluster_works_and_a_late_machine_has_another_token(
    lab: Lab, project: Project
) -> None:
    cluster, build = "cluster=recipes/clusters/ha.yaml", project.root / "build" / "ha"
    lab.wait(lambda: set(tokens(lab)) == {LATE}, 120, "the others' tokens are retired")
    old = tokens(lab)[LATE]
    before = {name: serials(lab.machine(name)) for name in PLANES}
    programs = {name: lab.machine(name).run(f"stat -L -c %i {PROGRAM}").stdout for name in PLANES}
    generation = int(get(lab, "cm", "nodebake-inventory", "-n", "kube-system")["data"]["generation"])
    ran = checks.containers(lab)

    told = project.doit("rekey", LATE, *PLANES, "admin.conf", cluster).stdout
    new = re.search(rf"Secret bootstrap-token-(\w+): comes, unless {LATE} is a Node", told)
    assert new is not None and f"Secret bootstrap-token-{old}: goes" in told, told
    project.doit(*(f"certs:{name}" for name in PLANES), "desk", f"node:{LATE}", cluster)
    sizes = {(build / "certs" / f"{name}.tar.gz").stat().st_size for name in PLANES}
    assert max(sizes) < 100_000
    with writing(lab, "worker-1") as load:
        time.sleep(3)
        for name in PLANES:
            begun = time.monotonic()
            renew(lab.machine(name), build / "certs" / f"{name}.tar.gz")
            say(f"{name} renewed in {time.monotonic() - begun:.1f} s")
        time.sleep(3)
    say(
        f"{max(sizes)} bytes; {len(load.acknowledged)} writes acknowledged, {load.longest:.1f} s between two at most,"
        f" {len(load.failed)} failed: {load.failed}"
    )
    kept = {int(each["metadata"]["name"].removeprefix("write-")) for each in items(lab, "cm", "-l", "app=writer")}
    assert load.acknowledged <= kept, "an acknowledged write is gone"
    assert len(load.failed) <= 2 * len(PLANES), "the API was there all the time, but for a connection that was cut off"
    lab.kubectl("delete", "cm", "-l", "app=writer", "--wait=false")
    for name in PLANES:
        machine = lab.machine(name)
        assert not set(serials(machine)) & set(before[name])
        assert machine.run(f"stat -L -c %i {PROGRAM}").stdout == programs[name], "the payload is where it was"
    assert checks.containers(lab) == ran, "no container was started anew"
    published = get(lab, "cm", "nodebake-inventory", "-n", "kube-system")["data"]["generation"]
    assert int(published) == generation + 1

    # The late machine: its token is another now.
    lab.wait(lambda: tokens(lab) == {LATE: new[1]}, 60, "the new token is there, the old one is not")
