"""The CIS Kubernetes Benchmark as kube-bench has it: built once from its Go module, run on machines that are on."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from recipes.kit.gotool import find_go
from recipes.kit.locks import locked
from recipes.kit.overlay import OVERLAYS
from tests.lab import host
from tests.lab.container import Container
from tests.lab.host import LAB, LabError

PROFILE = "cis-1.12"
_MODULE = "github.com/aquasecurity/kube-bench@v0.15.6"
_SUM = "h1:r1p/dGN8IxGowV+hfTw5Lk2IaRV79dZcq0xd6MincJ8="  # as in a go.sum; the module's own pins the rest
_CONFIG = Path(__file__).with_name("kube-bench.yaml")
_THERE = "/root/kube-bench"  # on the machine, while it runs


def judge(machine: Container, *targets: str) -> dict[str, str]:
    """What it says of a machine, check -> PASS, FAIL, WARN or INFO (skipped): {"1.2.1": "WARN"}. Leaves nothing behind.

    targets: master, etcd, controlplane, node.
    """
    there = Path(f"/proc/{machine.first}/root{_THERE}")
    shutil.copytree(_obtain(), there)
    shutil.copyfile(_CONFIG, there / "cfg/config.yaml")
    try:
        options = f"--config-dir {_THERE}/cfg --benchmark {PROFILE} --json"
        told = machine.run(f"{_THERE}/kube-bench {options} run --targets {','.join(targets)}").stdout
    finally:
        shutil.rmtree(there)
    groups = [group for target in json.loads(told)["Controls"] for group in target["tests"]]
    return {result["test_number"]: result["status"] for group in groups for result in group["results"]}


def explained() -> set[str]:
    """The checks that overlays/README.md has a row for: those that our machines are warned of."""
    return set(re.findall(r"^\| (\d+\.\d+\.\d+) \|", (OVERLAYS / "README.md").read_text(), re.MULTILINE))


def _obtain(folder: Path = LAB / "kube-bench") -> Path:
    """A folder with the program and its checks, made now if it is not there."""
    go = [find_go().program]
    made = folder / _MODULE.rpartition("@")[2]
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock"):
        if not made.exists():
            module = json.loads(host.run([*go, "mod", "download", "-json", _MODULE]).stdout)
            if module["Sum"] != _SUM:
                raise LabError(f"{_MODULE} is not as pinned: {module['Sum']}")
            part = made.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            command = [
                *go,
                "build",
                "-C",
                module["Dir"],
                "-trimpath",
                "-buildvcs=false",
                "-o",
                part / "kube-bench",
                ".",
            ]
            host.run(command, timeout=1800, environment={**os.environ, "CGO_ENABLED": "0"})
            shutil.copytree(
                Path(module["Dir"]) / "cfg" / PROFILE, part / "cfg" / PROFILE, copy_function=shutil.copyfile
            )
            part.rename(made)
    return made
