"""`doit lab`, as an operator meets it. One machine is booted, once; what needs none is tested without."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
import yaml

from recipes.kit import inventory
from tests.conftest import ROOT, Project, copy_project
from tests.lab import host, trial, workload
from tests.lab.host import LabError

CLUSTER = """\
name: trial
machineNetwork: {subnet: 192.168.10.0/24}
nodes:
  - {name: only, role: control-plane, address: 192.168.10.11, mac: "52:54:00:00:10:0b"}
"""
ADMIN = {
    "apiVersion": "v1",
    "kind": "Config",
    "clusters": [
        {"name": f"c-{name}", "cluster": {"server": f"https://{name}:6443", "certificate-authority-data": "Q0E="}}
        for name in ("one", "two")
    ],
    "contexts": [{"name": name, "context": {"cluster": f"c-{name}", "user": "admin"}} for name in ("one", "two")],
    "current-context": "two",
    "users": [{"name": "admin", "user": {"client-key-data": "S0VZ"}}],
}


# ---- without a machine


def test_the_kubeconfig_is_the_desks_for_the_loopback(tmp_path: Path) -> None:
    (tmp_path / "admin.conf").write_text(yaml.safe_dump(ADMIN))
    config = yaml.safe_load(trial.kubeconfig(tmp_path, 4711))
    assert config["clusters"] == [
        {"name": "c-one", "cluster": {"server": "https://127.0.0.1:4711", "certificate-authority-data": "Q0E="}}
    ]
    assert [context["name"] for context in config["contexts"]] == [config["current-context"]] == ["one"]
    assert config["users"] == ADMIN["users"]


def test_image_archives_are_found_by_their_names(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar.gz", "c.tgz", "notes.txt", "d.tar.sig"):
        (tmp_path / name).touch()
    assert [path.name for path in trial.archives(tmp_path)] == ["a.tar.gz", "b.tar", "c.tgz"]


def test_machines_that_the_lab_has_not_are_told(tmp_path: Path) -> None:
    (tmp_path / "arm.yaml").write_text(CLUSTER.replace("role:", "arch: arm64, role:"))
    cluster = inventory.load(tmp_path / "arm.yaml", now=datetime.now(UTC))
    with pytest.raises(LabError, match=r"amd64, these are not: only \(arm64\)"):
        trial.check(cluster, None)


def test_what_first_boot_refuses_is_found_on_the_console() -> None:
    console = (
        "[  OK  ] Reached target basic.target.\r\n"
        "[   12.1] sh[297]: first-boot: checking that this machine is only\r\n"
        "[   12.3] sh[297]: first-boot: swap is on: /dev/vdb\r\n"
        "[   12.3] sh[297]:   -> turn it off (swapoff -a)\r\n"
        "[   32.4] sh[301]: first-boot: looking for this machine's artifact\r\n"
    )
    assert trial._REFUSED.findall(console) == [("swap is on: /dev/vdb", "  -> turn it off (swapoff -a)")]


@pytest.fixture
def relayed() -> Iterator[socket.socket]:
    """A connection through the relay to a server that gives back all that it got, once that has ended. The first
    control plane does not answer."""

    def serve(server: socket.socket) -> None:
        taken, _ = server.accept()
        with taken:
            got = b"".join(iter(lambda: taken.recv(1 << 16), b""))
            taken.sendall(b"got " + got)

    with socket.create_server(("127.0.0.99", 6443)) as plane, socket.create_server(("127.0.0.1", 0)) as server:
        listening = os.dup(server.fileno())
        threading.Thread(target=serve, args=(plane,), daemon=True).start()
        threading.Thread(target=trial.relay, args=(listening, ["127.0.0.98", "127.0.0.99"]), daemon=True).start()
        with socket.create_connection(server.getsockname(), timeout=10) as client:
            yield client


def test_the_relay_passes_on_both_ways(relayed: socket.socket) -> None:
    sent = os.urandom(3_000_000)
    relayed.sendall(sent)
    relayed.shutdown(socket.SHUT_WR)
    assert b"".join(iter(lambda: relayed.recv(1 << 16), b"")) == b"got " + sent


def test_a_connection_may_be_silent_for_long(relayed: socket.socket) -> None:
    """As a watch is: longer than connecting may take."""
    relayed.sendall(b"a")
    time.sleep(3.5)
    relayed.sendall(b"b")
    relayed.shutdown(socket.SHUT_WR)
    assert b"".join(iter(lambda: relayed.recv(1 << 16), b"")) == b"got ab"


# ---- with one


@dataclass(frozen=True)
class Trial:
    project: Project

    @property
    def folder(self) -> Path:
        return self.project.root / "build" / "trial" / "lab"

    def doit(self, *words: str, fails: bool = False, **environment: str) -> str:
        told = self.project.doit(*words, self.cluster, fails=fails, PYTHONPATH=str(ROOT), **environment).stdout
        assert "Traceback" not in told
        return told

    @property
    def cluster(self) -> str:
        return "cluster=recipes/clusters/trial.yaml"

    def kubectl(self, *words: str, stdin: str | None = None) -> str:
        command = [f"{self.folder}/kubectl", f"--kubeconfig={self.folder}/kubeconfig", *words]
        return host.run(command, stdin=stdin, timeout=90).stdout

    def coming_up(self) -> subprocess.Popen[str]:
        """`doit lab` as a shell starts it, once a machine is switched on."""
        process = subprocess.Popen(
            ["env", "--default-signal=INT", *self.project.command("lab", self.cluster)],
            cwd=self.project.root,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert process.stdout is not None
        assert any("switching on only" in line for line in process.stdout)
        return process

    def processes(self) -> list[str]:
        """Command lines of this trial's own processes."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if "tests.lab.trial" in line and str(self.folder.parent) in line:
                found.append(line)
        return found


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    project = copy_project(tmp_path_factory.mktemp("trial"))
    (project.clusters / "trial.yaml").write_text(CLUSTER)
    project.remember("trial")
    operator = Trial(project)
    yield operator
    operator.doit("lab:down")


def test_images_that_are_not_there_are_told_before_anything_is_baked(operator: Trial, tmp_path: Path) -> None:
    assert "There is no such folder" in operator.doit("lab", f"images={tmp_path}/none", fails=True)
    told = operator.doit("lab", f"images={tmp_path}", fails=True)
    assert "No image archive lies there" in told and "\n  -> " in told
    assert not (operator.folder.parent / "seeds").exists()


def test_what_root_wrote_under_sudo_is_the_persons(operator: Trial) -> None:
    """And what the person has, root opens for them, and nobody else."""
    root, stores = operator.project.root, operator.project.clusters / "trial.yaml.secrets"
    lab = root / "build" / "lab"
    lab.mkdir()
    under_sudo = partial(operator.doit, "desk", SUDO_UID="4711", SUDO_GID="4712")
    under_sudo()
    assert (stores / "cluster.json").stat().st_uid == 0, "the folders are not the person's"
    for path in (root, operator.project.clusters):
        os.chown(path, 4711, 4712)
    for _ in range(2):
        under_sudo()
        for path in (operator.folder.parent / ".state.db", root / "build", stores, *stores.iterdir()):
            assert (path.stat().st_uid, path.stat().st_gid) == (4711, 4712), path
    assert lab.stat().st_uid == 0, "machines' disks are root's"
    assert "belongs to user 4711" in operator.doit("desk", fails=True)
    for path in (root, operator.project.clusters, root / "build", stores, *stores.rglob("*")):
        os.chown(path, 0, 0)


def test_nobody_but_root_is_let_in(operator: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    cluster = inventory.load(operator.project.clusters / "trial.yaml", now=datetime.now(UTC))
    with pytest.raises(LabError, match="needs root") as error:
        trial.up(operator.folder.parent, cluster, None)
    assert error.value.remedy == "run it with sudo"


def test_one_that_was_ended_is_not_in_the_way_of_the_next(operator: Trial, tmp_path: Path) -> None:
    """Ctrl-C and SIGKILL while it comes up; then a whole one, with an image of the operator's; another is refused
    meanwhile; down ends it, and is content where there is none."""
    interrupted = operator.coming_up()
    os.killpg(interrupted.pid, signal.SIGINT)
    told, _ = interrupted.communicate(timeout=60)
    assert interrupted.returncode == 130 and "The lab is down." in told and "Traceback" not in told
    assert operator.processes() == []

    killed = operator.coming_up()
    os.kill(int((operator.folder / "pid").read_text()), signal.SIGKILL)
    told, _ = killed.communicate(timeout=60)
    assert killed.returncode != 0 and "The lab did not come up" in told
    assert operator.processes() == []

    (tmp_path / "busybox.tar.gz").write_bytes(gzip.compress(workload.archive(tmp_path / "busybox").read_bytes(), 1))
    told = operator.doit("lab", f"images={tmp_path}")
    assert "switching on only" in told and "only is Ready after" in told and "loading busybox.tar.gz on only" in told
    assert "only   Ready    control-plane" in told, "kubectl's own answer, through the loopback"
    assert (operator.folder / "kubeconfig").stat().st_mode & 0o777 == 0o600

    told = operator.doit("lab", fails=True)
    assert "is up already" in told and "doit lab:down" in told

    spec = workload.pod("echo loaded; busybox sleep 600", tolerations=[{"operator": "Exists"}])
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "mine"}, "spec": spec}
    operator.kubectl("apply", "-f", "-", stdin=json.dumps(pod))
    operator.kubectl("wait", "--for=condition=Ready", "--timeout=60s", "pod/mine")
    assert operator.kubectl("logs", "mine") == "loaded\n"
    assert operator.kubectl("exec", "mine", "--", "busybox", "echo", "hello") == "hello\n"

    assert "The lab is down." in operator.doit("lab:down")
    assert operator.processes() == [] and not (operator.folder / "kubeconfig").exists()
    assert "No lab of this cluster is up." in operator.doit("lab:down")
    shutil.rmtree(tmp_path)
