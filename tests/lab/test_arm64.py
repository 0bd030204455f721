"""A machine of another architecture than the host's, from its disk image to a node with pods. Not in every run: its
Debian is installed, and then booted, in emulation."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from recipes.kit import inventory
from tests.lab import checks
from tests.lab.checks import Clock, get, items, wait_machine_installed, wait_ready
from tests.lab.container import Container
from tests.lab.lab import Lab
from tests.lab.scenario import BOOT, Baker, tell
from tests.lab.virtual import VirtualMachine


@pytest.mark.matrix
def test_a_worker_on_arm64_joins_a_control_plane_on_amd64(bake: Baker) -> None:
    project = bake("arm")
    file = project.clusters / "arm.yaml"
    project.doit(f"cluster={file}", "image:worker")
    build = project.root / "build" / "arm"
    with Lab(build, inventory.load(file, now=datetime.now(UTC)), VirtualMachine) as lab:
        lab.machine("control", Container).power_on()
        wait_ready(lab, BOOT, {"control"})
        worker = lab.machine("worker")
        assert isinstance(worker, VirtualMachine)
        worker.eject("cidata")
        worker.write_disk(build / "disks" / "worker.raw.gz")
        clock = Clock()
        worker.power_on()
        lab.wait(lambda: get(lab, "node", "worker"), 2 * BOOT, "the kubelet has registered")
        clock.mark("registered")
        wait_ready(lab, BOOT, {"worker"}, clock)
        lab.wait(lambda: runs_dns(lab), BOOT, "CoreDNS runs there")
        clock.mark("CoreDNS Ready")
        wait_machine_installed(worker, BOOT)
        tell(clock)
        about = get(lab, "node", "worker")["status"]["nodeInfo"]
        assert about["architecture"] == "arm64" and worker.run("uname -m").stdout == "aarch64\n"
        checks.nothing_was_asked_outside(lab)


def runs_dns(lab: Lab) -> bool:
    pods = items(lab, "pods", "-n", "kube-system", "-l", "k8s-app=kube-dns")
    return any(pod["spec"].get("nodeName") == "worker" and checks.condition(pod, "Ready") for pod in pods)
