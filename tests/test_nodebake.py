"""The program `nodebake`: on machines of every role, whole and broken, before, during and after first boot."""

from __future__ import annotations

import base64
import gzip
import http.server
import json
import os
import pty
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from machine import diagnose, endpoints, firstboot, report, status, units
from machine import main as program
from machine.endpoints import Probe
from machine.scrub import HIDDEN, Scrubber
from machine.system import System, run

from recipes import certificates
from recipes.kit import overlay, sizing, store
from recipes.kit.model import Cluster, Node, Registry
from tests import artifacts, samples
from tests.layout import Layout, on_loopback

NODEBAKE = overlay.OVERLAYS / "common/usr/local/bin/nodebake"
PASSWORD = "pa55 w:ord/@x"
CLIENT, SERVER = (f"var/lib/kubelet/pki/kubelet-{name}-current.pem" for name in ("client", "server"))
KUBELET_UNITS = ["containerd.service", "flanneld.service", "kube-proxy.service", "kubelet.service"]
OPENSSL = shutil.which("openssl")


def nodebake(*words: object, fails: int = 0, **environment: str) -> str:
    """Runs it as a machine does; what it says on both channels."""
    done = subprocess.run(
        [NODEBAKE, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    assert "Traceback" not in done.stdout, done.stdout
    assert done.returncode == fails, done.stdout
    return done.stdout


class Live(System):
    """A folder that is taken for the running machine."""

    live = True


@dataclass(frozen=True)
class Baked:
    """A node's artifact, unpacked."""

    root: Path
    cluster: Cluster
    node: Node
    secrets: store.Secrets

    @property
    def system(self) -> Live:
        return Live(self.root)

    def journal(self, *lines: str) -> None:
        path = self.root / firstboot.JOURNAL.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in lines))

    def put(self, name: str, text: str | bytes) -> Path:
        path = self.root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    def install(self) -> None:
        """As after first boot; the kubelet has joined."""
        self.put(firstboot.INSTALLED, "0" * 64)
        if self.node.runs_kubelet:
            for name in (CLIENT, SERVER):
                self.put(name, kubelet_certificate(self.root.parent, days=365))


def kubelet_certificate(folder: Path, days: int, age: int = 1) -> bytes:
    """A certificate and its key in one file, as the kubelet keeps them; it began `age` days ago."""
    now = datetime.now(UTC)
    dates = [f"{now + timedelta(days=each):%Y%m%d%H%M%SZ}" for each in (-age, days - age)]
    request = folder / "kubelet.csr"
    key = folder / "kubelet.key"
    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", str(key)]
    config = folder / "ca.cnf"
    (folder / "index").write_text("")
    (folder / "serial").write_text("01")
    config.write_text(
        f"[ca]\ndefault_ca=x\n[x]\ndatabase={folder}/index\nserial={folder}/serial\nnew_certs_dir={folder}\n"
        "default_md=sha256\npolicy=p\nunique_subject=no\n[p]\ncommonName=supplied\norganizationName=optional\n"
    )
    quiet: dict[str, Any] = {"check": True, "capture_output": True}
    subprocess.run(["openssl", "req", *new, "-subj", "/CN=system:node:x", "-out", str(request)], **quiet)
    sign = ["-selfsign", "-batch", "-notext", "-in", str(request), "-keyfile", str(key)]
    made = ["-startdate", dates[0], "-enddate", dates[1], "-out", str(folder / "kubelet.crt")]
    subprocess.run(["openssl", "ca", "-config", str(config), *sign, *made], **quiet)
    return (folder / "kubelet.crt").read_bytes() + key.read_bytes()


def bake(folder: Path, cluster: Cluster, node: Node, parts: artifacts.Parts) -> Baked:
    secrets = artifacts.secrets(folder, cluster)
    _, tarball = artifacts.bake(folder, cluster, node, parts, secrets)
    root = folder / "root"
    root.mkdir()
    subprocess.run(["tar", "-xzf", tarball, "-C", root, "--no-same-owner"], check=True)
    return Baked(root, cluster, node, secrets)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> artifacts.Parts:
    return artifacts.Parts(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def whole_worker(tmp_path_factory: pytest.TempPathFactory, parts: artifacts.Parts) -> Baked:
    cluster = samples.ha()
    return bake(tmp_path_factory.mktemp("worker"), cluster, cluster.workers[0], parts)


@pytest.fixture(scope="module")
def whole_plane(tmp_path_factory: pytest.TempPathFactory, parts: artifacts.Parts) -> Baked:
    folder = tmp_path_factory.mktemp("plane")
    (folder / "password").write_text(f"{PASSWORD}\n")
    registry = Registry(host="registry.example", username="user", password_file=folder / "password")
    cluster = samples.ha(bake_ssh_host_keys=True, registries=(registry,))
    return bake(folder, cluster, cluster.control_planes[0], parts)


@pytest.fixture
def worker(tmp_path: Path, whole_worker: Baked) -> Baked:
    return replace(whole_worker, root=shutil.copytree(whole_worker.root, tmp_path / "root", symlinks=True))


@pytest.fixture
def plane(tmp_path: Path, whole_plane: Baked) -> Baked:
    """A control plane with all the secrets that there can be on a machine."""
    return replace(whole_plane, root=shutil.copytree(whole_plane.root, tmp_path / "root", symlinks=True))


def programs(folder: Path, texts: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes these the only programs on the PATH, but for openssl."""
    folder.mkdir(parents=True)
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    assert OPENSSL is not None
    (folder / "openssl").symlink_to(OPENSSL)
    monkeypatch.setenv("PATH", str(folder))


def systemctl(states: dict[str, dict[str, str]]) -> str:
    """A stand-in that answers `show`. Units that are not in states are well."""
    return f"""#!{sys.executable} -I
import sys
states = {states!r}
assert sys.argv[1] == "show"
for unit in sys.argv[2:]:
    if unit.startswith("-"):
        continue
    told = {{"Id": unit, "LoadState": "loaded", "ActiveState": "active", "SubState": "running", "Type": "notify",
             "RemainAfterExit": "no", "Result": "success", "NRestarts": "0", "StateChangeTimestamp": "@1795000000",
             "InactiveEnterTimestamp": "", "ConditionResult": "yes", "ConditionTimestamp": "@1795000000"}}
    if unit == "nodebake-images.service":
        told |= {{"Type": "oneshot", "ActiveState": "inactive", "SubState": "dead",
                  "InactiveEnterTimestamp": "@1795000000"}}
    told |= states.get(unit, {{}})
    print("".join(f"{{key}}={{value}}\\n" for key, value in told.items()))
"""


@pytest.fixture
def well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """well(unit={...}): systemd says that all units are well but those; every endpoint is well."""

    def set_up(states: dict[str, dict[str, str]] | None = None, answers: dict[str, str] | None = None) -> None:
        folder = tmp_path / "bin"
        shutil.rmtree(folder, ignore_errors=True)
        programs(folder, {"systemctl": systemctl(states or {})}, monkeypatch)
        monkeypatch.setattr(endpoints, "_ask", lambda system, probe: (answers or {}).get(probe.unit))
        monkeypatch.setattr(endpoints, "_ask_node", lambda system, url: (answers or {}).get("node"))

    return set_up


# ---- which machine


@pytest.mark.parametrize("make", [samples.ha, samples.external_etcd, samples.balanced, samples.single])
def test_every_role_is_told(make: Callable[[], Cluster], tmp_path: Path, parts: artifacts.Parts) -> None:
    cluster = make()
    for role in sorted({node.role for node in cluster.nodes}):
        node = cluster.with_role(role)[0]
        (tmp_path / role).mkdir()
        baked = bake(tmp_path / role, cluster, node, parts)
        text = nodebake("status", "--root", baked.root, fails=1)
        assert text.startswith(f"{node.name}: {role} of cluster {cluster.name}, amd64\n  baked 2026-11-01 12:00 UTC, ")
        assert "to be installed by 2027-01-30 12:00 UTC" in text
        told = json.loads(nodebake("status", "--json", "--root", baked.root, fails=1))
        assert told["machine"]["role"] == role
        assert told["machine"]["generation"] == (7 if role == "control-plane" else None)
        assert told["machine"]["minted"] == "2026-11-01T12:00:00Z"
        baked.install()
        system = baked.system
        wanted = units.names(system)
        assert ("kubelet.service" in wanted) == node.runs_kubelet
        assert ("etcd.service" in wanted) == node.runs_etcd
        assert "nodebake-first-boot.service" not in wanted
        assert not [
            unit for unit in wanted if unit.endswith(".service") and unit not in PROBED and unit not in UNPROBED
        ]


PROBED = {probe.unit for probe in endpoints.PROBES}
# Daemons without a health endpoint of their own, and what is no daemon.
UNPROBED = {"containerd.service", "nodebake-images.service", "nodebake-controller.service", "api-vip.service"}


def test_without_a_manifest_the_environment_tells(worker: Baked) -> None:
    (worker.root / "opt/nodebake/manifest/node.json").unlink()
    machine = status.identity(worker.system)
    assert (machine.node, machine.role, machine.cluster, machine.arch) == ("worker-1", "worker", "ha", "amd64")
    assert machine.minted == artifacts.NOW


# ---- health


def test_installed_and_healthy(worker: Baked, well: Callable[..., None]) -> None:
    well()
    worker.install()
    found = status.gather(worker.system)
    assert (found.problems, found.warnings, found.unseen) == ([], [], [])
    assert found.healthy and status.health(worker.system) == []
    assert {unit.name for unit in found.units} > {*KUBELET_UNITS, "nodebake-images.timer", "api-balancer.service"}
    assert {each.name for each in found.endpoints} == {"api-balancer", "flanneld", "kube-proxy", "kubelet", "node"}
    text = "\n".join(report.lines(found, colour=False))
    assert "\nhealthy\n" in text and "problems" not in text
    assert re.search(r"^  nodebake-images +idle \(ran well\)", text, re.MULTILINE)
    assert json.loads(found.json())["healthy"] is True


STARTING = {"ActiveState": "activating", "SubState": "start", "Type": "notify"}
AGAIN = {"ActiveState": "activating", "SubState": "auto-restart", "Result": "exit-code", "NRestarts": "7"}


@pytest.mark.parametrize(
    ("unit", "state", "problem"),
    [
        ("containerd.service", STARTING, "containerd is starting"),
        ("containerd.service", AGAIN, "containerd has failed (exit-code), and is started again"),
        ("containerd.service", {"ActiveState": "failed", "Result": "oom-kill"}, "containerd has failed (oom-kill)"),
        ("containerd.service", {"ActiveState": "inactive", "SubState": "dead"}, "containerd does not run"),
        ("containerd.service", {"ActiveState": "inactive", "Job": "7"}, "containerd is to be started"),
        ("containerd.service", {"ActiveState": "inactive", "Job": "0"}, "containerd does not run"),
        ("containerd.service", {"LoadState": "masked", "ActiveState": "inactive"}, "containerd is masked"),
        ("kubelet.service", {"LoadState": "not-found", "ActiveState": "inactive"}, "kubelet is not known to systemd"),
        ("nodebake-images.timer", {"ActiveState": "inactive"}, "nodebake-images.timer does not run"),
        ("nodebake-images.service", {"InactiveEnterTimestamp": ""}, "nodebake-images does not run"),
        (
            "nodebake-images.service",
            {"InactiveEnterTimestamp": "", **STARTING, "Type": "oneshot"},
            "images is starting",
        ),
        ("nodebake-images.service", {**STARTING, "Type": "oneshot"}, None),
        ("nodebake-images.service", {"InactiveEnterTimestamp": "", "ConditionResult": "no"}, None),
        ("nodebake-images.service", {**AGAIN, "Type": "oneshot"}, "nodebake-images has failed (exit-code), and"),
        ("containerd.service", {"ActiveState": "reloading"}, None),
    ],
)
def test_units(worker: Baked, well: Callable[..., None], unit: str, state: dict[str, str], problem: str | None) -> None:
    worker.install()
    well({unit: state})
    problems = status.health(worker.system)
    assert [problem in each for each in problems] == [True] if problem else not problems, problems
    assert status.gather(worker.system).problems == problems


def test_endpoints_of_units_that_run(worker: Baked, well: Callable[..., None]) -> None:
    worker.install()
    well({"flanneld.service": {"ActiveState": "inactive"}}, dict.fromkeys(PROBED, "the endpoint answers 500"))
    assert status.health(worker.system) == [
        "api-balancer: the endpoint answers 500",
        "flanneld does not run",
        "kube-proxy: the endpoint answers 500",
        "kubelet: the endpoint answers 500",
    ]


APPROVAL = (
    "kubelet: it waits for a control plane that knows its token and approves its certificate "
    "(journalctl -u kubelet says when the token is not known)"
)
NO_SERVER = "kubelet: it has no certificate yet, and no API server answers to ask for one"


@pytest.mark.parametrize(
    ("balancer", "answer", "problems"),
    [
        ({}, None, [APPROVAL]),
        ({}, "it does not answer", ["api-balancer: it does not answer", NO_SERVER]),
        (STARTING, "it does not answer", ["api-balancer is starting", NO_SERVER]),
        ({"ActiveState": "inactive"}, None, ["api-balancer does not run", NO_SERVER]),
    ],
)
def test_a_kubelet_that_has_not_joined(
    worker: Baked, well: Callable[..., None], balancer: dict[str, str], answer: str | None, problems: list[str]
) -> None:
    """What waits for its certificate is not told as well."""
    waiting = {
        "kubelet.service": STARTING,
        "kube-proxy.service": STARTING,
        "flanneld.service": {**STARTING, "Job": "7"},
    }
    well({**waiting, "api-balancer.service": balancer}, {"api-balancer.service": answer})
    assert status.health(worker.system) == problems


def test_a_kubelet_without_a_way_of_its_own_to_the_api(
    tmp_path: Path, parts: artifacts.Parts, well: Callable[..., None]
) -> None:
    cluster = samples.balanced()
    baked = bake(tmp_path, cluster, cluster.workers[0], parts)
    well()
    [problem] = status.health(baked.system)
    assert problem == "kubelet: it has no certificate yet: no API server answers, or no control plane has approved it"


def test_a_kubelet_without_a_serving_certificate(worker: Baked, well: Callable[..., None]) -> None:
    worker.install()
    (worker.root / SERVER).unlink()
    well()
    found = status.gather(worker.system)
    assert found.healthy and "the kubelet has no serving certificate yet" in found.warnings[0]


def test_without_systemd(worker: Baked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker.install()
    for text in (None, "#!/bin/sh\necho 'System has not been booted with systemd' >&2\nexit 1\n"):
        programs(tmp_path / f"bin{text is None}", {} if text is None else {"systemctl": text}, monkeypatch)
        found = status.gather(worker.system)
        assert found.problems == ["systemd cannot be asked for the units"]
        assert found.unseen == [
            "the units: systemctl is not installed"
            if text is None
            else "the units: systemctl does not answer: systemd does not run here"
        ]


def test_files_of_the_kernel_are_read() -> None:
    """Which refuses to make room for a large answer."""
    system = System()
    assert (system.text("/proc/sys/kernel/pid_max") or "").strip().isdecimal()
    assert system.unseen == []


def test_a_program_that_hangs_is_left(tmp_path: Path) -> None:
    path = tmp_path / "hangs"
    path.write_text("#!/bin/sh\necho said\nsleep 60 &\nsleep 60\n")
    path.chmod(0o755)
    ran = run([str(path)], seconds=0.3)
    assert (ran.text, ran.trouble) == ("said\n", f"{path} did not answer within 0 s")
    path.write_text("#!/bin/sh\nyes\n")
    ran = run([str(path)], limit=1000)
    assert len(ran.text) == 1000 and "said more than 1000 bytes" in ran.trouble


# ---- endpoints


@contextmanager
def server(handler: type[http.server.BaseHTTPRequestHandler], trust: ssl.SSLContext | None = None) -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as made:
        if trust is not None:
            made.socket = trust.wrap_socket(made.socket, server_side=True)
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        try:
            yield made.server_address[1]
        finally:
            made.shutdown()
            thread.join()


def answering(code: int) -> type[http.server.BaseHTTPRequestHandler]:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(b"ok")

        def log_message(self, *words: object) -> None:
            pass

    return Answer


def probed(system: System, port: int, monkeypatch: pytest.MonkeyPatch, tls: str = "") -> str | None:
    monkeypatch.setattr(endpoints, "PROBES", (Probe("x.service", port, "/healthz", tls),))
    [found] = endpoints.ask(system, ["x.service", "other.service"])
    return found.problem


def test_plain_endpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = System(tmp_path)
    for code in (200, 500):
        with server(answering(code)) as port:
            problem = probed(system, port, monkeypatch)
            assert problem == (None if code == 200 else f"http://127.0.0.1:{port}/healthz answers 500")
    assert probed(system, port, monkeypatch) == f"http://127.0.0.1:{port}/healthz does not answer"


def test_an_endpoint_that_says_nothing_or_nonsense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        for tls in ("", "unverified"):
            assert str(probed(System(tmp_path), port, monkeypatch, tls)).endswith("/healthz does not answer")

        def nonsense() -> None:
            while True:
                try:
                    connected, _ = listening.accept()
                except OSError:
                    return
                connected.sendall(b"\x00\xff nonsense\r\n" * 10)
                connected.close()

        threading.Thread(target=nonsense, daemon=True).start()
        assert str(probed(System(tmp_path), port, monkeypatch)).endswith("/healthz does not answer")
        listening.shutdown(socket.SHUT_RDWR)


def test_the_api_server_is_verified(plane: Baked, monkeypatch: pytest.MonkeyPatch) -> None:
    """As strictly as Python 3.13 does by itself."""
    made = ssl.create_default_context

    def strict(**given: Any) -> ssl.SSLContext:
        context = made(**given)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        return context

    monkeypatch.setattr(ssl, "create_default_context", strict)
    trust = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    pki = plane.root / "etc/kubernetes/pki"
    trust.load_cert_chain(pki / "kube-apiserver.crt", pki / "kube-apiserver.key")
    with server(answering(200), trust) as port:
        assert probed(plane.system, port, monkeypatch, "verified") is None
        assert probed(plane.system, port, monkeypatch, "unverified") is None
        shutil.copy(pki / "etcd-ca.crt", pki / "kubernetes-ca.crt")
        assert "is not to be trusted" in str(probed(plane.system, port, monkeypatch, "verified"))
        assert probed(plane.system, port, monkeypatch, "unverified") is None
        (pki / "kubernetes-ca.crt").unlink()
        assert "does not answer" in str(probed(plane.system, port, monkeypatch, "verified"))


def test_the_node_is_asked_for_as_itself(plane: Baked, monkeypatch: pytest.MonkeyPatch) -> None:
    plane.install()
    node = plane.node.name
    pki = plane.root / "etc/kubernetes/pki"
    trust = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trust.load_cert_chain(pki / "kube-apiserver.crt", pki / "kube-apiserver.key")
    trust.verify_mode = ssl.CERT_REQUIRED
    trust.load_verify_locations(plane.root / CLIENT)
    says: dict[str, Any] = {}

    class Api(answering(200)):  # type: ignore[misc]
        def do_GET(self) -> None:
            self.send_response(200 if self.path == f"/api/v1/nodes/{node}" else 404)
            self.end_headers()
            self.wfile.write(json.dumps(says).encode())

    config = plane.root / endpoints._AS_NODE
    with server(Api, trust) as port:
        config.write_text(config.read_text().replace("127.0.0.1:6443", f"127.0.0.1:{port}"))
        url = f"https://127.0.0.1:{port}/api/v1/nodes/{node}"

        def told(*conditions: tuple[str, str, str]) -> str | None:
            says["status"] = {"conditions": [{"type": a, "status": b, "message": c} for a, b, c in conditions]}
            found = endpoints.ask_node(plane.system, node)
            assert found is not None and (found.name, found.url) == ("node", url)
            return found.problem

        well = ("MemoryPressure", "False", "enough")
        others = ("EtcdIsVoter", "True", "somebody else's, and good")
        assert told(well, others, ("Ready", "True", "kubelet is posting ready status")) is None
        assert (
            told(well, ("Ready", "False", "cni plugin not initialized")) == "is not Ready: cni plugin not initialized"
        )
        assert told(("Ready", "Unknown", "gone")) == "is not Ready: gone"
        assert told() == "is not Ready: the kubelet has not said so yet"
        full = ("DiskPressure", "True", "kubelet has disk pressure")
        assert told(full, ("Ready", "True", "")) == "DiskPressure: kubelet has disk pressure"
        says["status"] = {"conditions": "none"}
        assert endpoints._ask_node(plane.system, url) == f"{url} tells no conditions"
        assert endpoints._ask_node(plane.system, f"{url}x") == f"{url}x answers 404"
        shutil.copy(pki / "etcd-ca.crt", pki / "kubernetes-ca.crt")
        assert "is not to be trusted" in str(endpoints._ask_node(plane.system, url))
    assert endpoints._ask_node(plane.system, url) == f"{url} does not answer"
    (plane.root / CLIENT).unlink()
    assert endpoints.ask_node(plane.system, node) is None


def test_a_node_that_is_not_ready_is_told(worker: Baked, well: Callable[..., None]) -> None:
    """By status; first boot's wait is not for it, since a pod network of one's own may come later."""
    worker.install()
    well(answers={"node": "is not Ready: cni plugin not initialized"})
    found = status.gather(worker.system)
    assert found.problems == ["node: is not Ready: cni plugin not initialized"]
    assert status.health(worker.system) == []
    waiting = "flanneld: http://127.0.0.1:10271/healthz does not answer"
    worker.journal(*lines("health begun waiting", f"health waiting {waiting}"))
    well(answers={"node": "is not Ready", "flanneld.service": waiting.removeprefix("flanneld: ")})
    assert [wait.what for wait in status.gather(worker.system).first_boot.waits] == [waiting]
    away = "https://127.0.0.1:6443/readyz does not answer"
    well(answers={"node": "x", "api-balancer.service": away})
    assert status.gather(worker.system).problems == [f"api-balancer: {away}"], "told once"


def test_the_real_daemons_answer(
    binaries: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = on_loopback(samples.single(), os.getpid() + 2)
    machine = Layout(tmp_path_factory.mktemp("n") / "root", cluster, cluster.nodes[0], binaries)
    monkeypatch.setattr(endpoints, "_ADDRESS", machine.localhost)
    system = System(machine.root)
    asked = [f"{name}.service" for name in ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")]
    assert [bool(each.problem) for each in endpoints.ask(system, asked)] == [True] * 4

    def well(count: int) -> bool:
        problems = [each.problem for each in endpoints.ask(system, asked)]
        print(problems)
        return problems[:count] == [None] * count

    with machine.running(asked[0]) as etcd, machine.running(asked[1]) as api_server:
        etcd.until_true(lambda: well(1), "answered")
        api_server.until_true(lambda: well(2), "answered")
        with machine.running(asked[2]), machine.running(asked[3]) as last:
            last.until_true(lambda: well(4), "answered, and the others too")


# ---- first boot

AT = "2026-12-01T10:00:{:02}Z"


def lines(*events: str) -> list[str]:
    return [f"{AT.format(second)} {event}" for second, event in enumerate(events)]


def steps(system: System) -> dict[str, str]:
    return {step.name: step.state for step in firstboot.look(system).steps}


def test_before_first_boot(tmp_path: Path) -> None:
    text = nodebake("status", "--root", tmp_path, fails=1)
    assert "no artifact is in place on this machine" in text and "first boot has not run yet" in text
    assert "Traceback" not in text


def test_steps_of_first_boot(worker: Baked, well: Callable[..., None]) -> None:
    well({"containerd.service": STARTING})
    worker.journal(
        *lines("medium begun looking", "medium done /run/x", "verify begun checking", "verify done all is well")
    )
    found = firstboot.look(worker.system)
    assert steps(worker.system)["verify"] == "done"
    assert steps(worker.system)["health"] == "not yet"
    assert found.installed is False
    worker.journal(*lines("medium begun looking", "medium done x", "verify begun checking node.tar.gz"))
    current = firstboot.look(worker.system).current
    assert current is not None
    assert (current.name, current.state, current.text) == ("verify", "under way", "checking node.tar.gz")
    assert current.since == datetime(2026, 12, 1, 10, 0, 2, tzinfo=UTC)
    assert "first boot: verify: under way" in status.gather(worker.system).problems


def test_a_refusal_is_told(worker: Baked, well: Callable[..., None]) -> None:
    well()
    worker.journal(
        *lines("medium begun looking", "medium done x", "machine begun checking", "machine refused swap is on")
    )
    found = status.gather(worker.system)
    assert "first boot: machine: refused: swap is on" in found.problems
    text = "\n".join(report.lines(found, colour=False))
    assert re.search(r"machine +refused +since 2026-12-01 10:00:03 UTC \(.*\) +swap is on", text)


def test_a_later_artifact_that_was_refused_is_not_what_is_installed(worker: Baked, well: Callable[..., None]) -> None:
    well()
    worker.install()
    worker.journal(
        *lines("medium begun looking", "medium done /run/x", "verify begun checking", "verify done as worker-1"),
        *lines("report begun worker-1 is up", "report done"),
        *lines("medium begun looking", "medium done /root", "verify begun checking", "verify refused a signature"),
    )
    found = status.gather(worker.system)
    assert found.healthy
    texts = {step.name: (step.state, step.text) for step in found.first_boot.steps}
    assert texts == {"medium": ("done", "/run/x"), "verify": ("done", "as worker-1"), "report": ("done", "")}


def test_what_first_boot_waits_for_and_since_when(worker: Baked, well: Callable[..., None]) -> None:
    """Everything that is missing is told anew whenever it changes."""
    well({"containerd.service": STARTING, "kubelet.service": AGAIN})
    (worker.root / CLIENT).parent.mkdir(parents=True)
    (worker.root / CLIENT).write_bytes(kubelet_certificate(worker.root.parent, 365))
    worker.journal(
        f"{AT.format(0)} health begun waiting",
        f"{AT.format(1)} health waiting containerd is starting",
        f"{AT.format(1)} health waiting etcd is starting",
        f"{AT.format(9)} health waiting containerd is starting",
    )
    found = status.gather(worker.system).first_boot
    assert [(wait.what, wait.since and wait.since.second) for wait in found.waits] == [
        ("containerd is starting", 1),
        ("kubelet has failed (exit-code), and is started again", None),
    ]
    assert [step.state for step in found.steps if step.name == "health"] == ["waiting"]
    quiet = firstboot.look(System(worker.root)).waits  # as told last, where nobody can be asked
    assert [(wait.what, wait.since and wait.since.second) for wait in quiet] == [("containerd is starting", 1)]


def test_a_later_run_goes_over_what_is_done(worker: Baked) -> None:
    earlier = ["place begun putting", "place done", "packages begun apt", "packages done", "units begun", "units done"]
    worker.journal(
        *lines("medium begun looking", "medium done x", *earlier, "medium begun looking", "users begun making")
    )
    assert steps(worker.system) == {
        "medium": "done",
        "place": "done",
        "users": "under way",
        **dict.fromkeys(["packages", "units", "health", "clean", "report"], "not yet"),
    }


def test_after_first_boot_all_is_done(worker: Baked) -> None:
    worker.journal(*lines("medium begun looking", "medium done", "units done", "report begun up", "report done"))
    worker.install()
    assert steps(worker.system) == dict.fromkeys(["medium", "units", "report"], "done")


@pytest.mark.parametrize(("took", "slow"), [("0.41", False), ("9.99", False), ("10.00", True), ("231.07", True)])
def test_what_etcds_disk_took_is_told(took: str, slow: bool, plane: Baked, well: Callable[..., None]) -> None:
    well()
    plane.put(firstboot.DISK, f"{took}\n")
    found = status.gather(plane.system)
    assert found.etcd_write == float(took)
    assert any("etcd's disk was slow" in warning for warning in found.warnings) == slow
    assert f"{float(took)} ms a synchronous write" in "\n".join(report.lines(found, colour=False))


@pytest.mark.parametrize("text", [None, "", "what\n"])
def test_without_a_measurement_nothing_is_told_of_etcds_disk(
    text: str | None, plane: Baked, well: Callable[..., None]
) -> None:
    well()
    if text is not None:
        plane.put(firstboot.DISK, text)
    found = status.gather(plane.system)
    assert found.etcd_write is None
    assert "etcd's disk" not in "\n".join(report.lines(found, colour=False))


def test_etcds_disk_is_slow_from_what_the_documentation_says() -> None:
    assert status.SLOW == sizing.SYNC_LIMIT


# ---- certificates


@pytest.mark.parametrize(
    ("left", "told"),
    [(timedelta(days=91), ""), (timedelta(days=89), "warnings"), (timedelta(seconds=-1), "problems")],
)
def test_baked_certificates_are_warned_of(plane: Baked, well: Callable[..., None], left: timedelta, told: str) -> None:
    well()
    plane.install()
    end = plane.secrets.minted + plane.cluster.validity.leaf
    found = status.gather(plane.system, now=end - left)
    lists = {"warnings": found.warnings, "problems": found.problems}
    for name, lines in lists.items():
        of_leaf = [line for line in lines if "kube-apiserver.crt" in line or "scheduler.conf" in line]
        assert len(of_leaf) == (2 if name == told else 0)
        assert not [line for line in lines if "-ca.crt" in line]
    assert found.healthy == (told != "problems") or "var/lib/kubelet" in str(found.problems)
    assert {each.path for each in found.certificates} >= {
        "/etc/kubernetes/pki/kube-apiserver.crt",
        "/etc/kubernetes/controller-manager.conf",
        "/etc/etcd/pki/peer.crt",
        f"/{CLIENT}",
    }


def test_every_certificate_of_a_machine_is_told(
    tmp_path: Path, parts: artifacts.Parts, well: Callable[..., None]
) -> None:
    """Baked ones by what a machine is given, the kubelet's own, and until when a machine may join."""
    machines = []
    for cluster in (samples.ha(), samples.external_etcd(), samples.balanced()):
        for role in sorted({node.role for node in cluster.nodes}):
            folder = tmp_path / f"{cluster.name}-{role}"
            folder.mkdir()
            machines.append(bake(folder, cluster, cluster.with_role(role)[0], parts))
            machines[-1].install()
    well()
    for baked in machines:
        given = [file.path for file in certificates.for_node(baked.cluster, baked.node, baked.secrets)]
        wanted = {path for path in given if path.endswith((".crt", ".conf"))}
        wanted |= {f"/{CLIENT}", f"/{SERVER}"} if baked.node.runs_kubelet else set()
        found = status.gather(baked.system)
        assert {each.path for each in found.certificates} == wanted
        told = report.lines(found, colour=False)
        for path in wanted:
            assert any(path in line and "until 20" in line for line in told), path
        assert any("to be installed by 2027-01-30" in line for line in told)


@pytest.mark.parametrize(("age", "warned"), [(327, False), (330, True)])
def test_kubelets_certificates_rotate(worker: Baked, well: Callable[..., None], age: int, warned: bool) -> None:
    """They are renewed long before; what has less than a tenth of its life left is not renewed any more."""
    well()
    worker.install()
    worker.put(CLIENT, kubelet_certificate(worker.root.parent, days=365, age=age))
    found = status.gather(worker.system)
    assert [CLIENT in line for line in found.warnings] == ([True] if warned else [])
    assert found.healthy


def test_a_clock_that_is_behind_is_told(worker: Baked, well: Callable[..., None]) -> None:
    well()
    worker.install()
    found = status.gather(worker.system, now=datetime(2026, 10, 1, tzinfo=UTC))
    assert any("look at the clock" in problem for problem in found.problems)


def test_without_openssl(worker: Baked, well: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    well()
    worker.install()
    (Path(os.environ["PATH"]) / "openssl").unlink()
    found = status.gather(worker.system)
    assert found.unseen == ["the certificates: openssl is not installed"]
    assert found.healthy


# ---- how it is told


def terminal(*words: object, **environment: str) -> str:
    """What it shows on a terminal."""
    ours, its = pty.openpty()
    process = subprocess.Popen(
        [NODEBAKE, *map(str, words)], stdout=its, env={**os.environ, "TERM": "xterm", "NO_COLOR": "", **environment}
    )
    os.close(its)
    said = b""
    try:
        while chunk := os.read(ours, 1 << 16):
            said += chunk
    except OSError:
        pass
    os.close(ours)
    process.wait()
    return said.decode()


def test_colour_is_for_terminals(worker: Baked) -> None:
    assert "\x1b[31mnot healthy\x1b[0m" in terminal("status", "--root", worker.root)
    assert "\x1b" not in terminal("status", "--root", worker.root, NO_COLOR="1")
    assert "\x1b" not in terminal("status", "--root", worker.root, TERM="dumb")
    assert "\x1b" not in nodebake("status", "--root", worker.root, fails=1)


def test_what_files_say_is_no_command_to_the_terminal(worker: Baked) -> None:
    worker.journal(*lines("medium begun looking", "medium refused \x1b]0;owned\x07 \x1b[2J"))
    assert "\x1b" not in nodebake("status", "--root", worker.root, fails=1)


def test_columns_are_aligned(worker: Baked, well: Callable[..., None]) -> None:
    well({"containerd.service": AGAIN})
    worker.install()
    text = report.lines(status.gather(worker.system), colour=False)
    start = text.index("units")
    rows = text[start + 1 : text.index("", start)]
    assert len({row.index("since") for row in rows}) == 1
    assert "restarts: 7" in text[start + 1 + [row.split()[0] for row in rows].index("containerd")]


@pytest.mark.parametrize(
    "words", [(), ("nonsense",), ("status", "--nonsense"), ("apply",), ("status", "--root", "/no")]
)
def test_wrong_usage(words: tuple[str, ...]) -> None:
    assert nodebake(*words, fails=2)


def test_a_closed_pipe_is_no_mistake(worker: Baked) -> None:
    command = f"{NODEBAKE} status --root {worker.root} | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


def test_a_server_that_hangs_up_does_not_end_it(worker: Baked) -> None:
    """HAProxy does so when no API server is there: a write to that connection must be an error, not a signal."""
    program.main(["health"])
    assert signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN


def test_apply_hands_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first_boot, calls = "/opt/nodebake/first-boot", list[list[str]]()

    def called(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(list(map(str, command)))
        return subprocess.CompletedProcess(command, 73)

    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "run", called)
        assert program.main(["apply", str(tmp_path)]) == 73
    assert ["systemctl", "stop", "nodebake-first-boot.service"] in calls
    began = next(call for call in calls if call[0] == "systemd-run")
    assert began[-4:] == [first_boot, "install", "--medium", str(tmp_path)]
    goes_on = "ExecStopPost=-/usr/bin/systemctl start --no-block nodebake-first-boot.service"
    assert f"--property={goes_on}" in began, "when it is killed"
    assert calls[-1][0] == "journalctl" and "--unit=nodebake-apply.service" in calls[-1], "it tells why it failed"
    assert (overlay.OVERLAYS / "common" / first_boot.lstrip("/")).exists()
    assert nodebake("apply", tmp_path / "gone", fails=2).startswith("nodebake: there is no folder")


# ---- what a machine may look like


def spoil_bytes(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 40)


def spoil_text(path: Path) -> None:
    path.write_text('{"a": [' * 20_000 + "token: x\nl 0 etc/systemd/system/x.target.wants/ -> \n")


def spoil_empty(path: Path) -> None:
    path.write_bytes(b"")


def spoil_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def spoil_circle(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def spoil_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def spoil_missing(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    "spoil", [spoil_bytes, spoil_text, spoil_empty, spoil_folder, spoil_circle, spoil_fifo, spoil_missing]
)
def test_nothing_that_is_spoilt_makes_a_traceback(
    plane: Baked, well: Callable[..., None], tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    plane.install()
    plane.journal(*lines("medium begun x"))
    paths = [path for path in plane.root.rglob("*") if path.is_file() and not path.is_symlink()]
    for path in paths:
        if path.stat().st_size < 1 << 20 and "/packages/" not in str(path):
            spoil(path)
    assert "Traceback" not in nodebake("status", "--root", plane.root, fails=1)
    json.loads(nodebake("status", "--json", "--root", plane.root, fails=1))
    nodebake("diagnose", "--root", plane.root, "--output", tmp_path / "d.tar.gz")
    well()
    assert status.gather(plane.system).problems
    assert status.health(plane.system)


def test_manifests_of_another_shape(worker: Baked) -> None:
    for text in ("[]", '"x"', "7", '{"node": [1], "generation": "x", "minted": 5, "installBy": null}', "{"):
        worker.put("opt/nodebake/manifest/node.json", text)
        machine = status.identity(worker.system)
        assert machine.generation is None


def test_units_that_systemd_tells_strangely(worker: Baked, well: Callable[..., None]) -> None:
    worker.install()
    strange = {"NRestarts": "many", "StateChangeTimestamp": "@99999999999999999999", "Result": ""}
    well({"kubelet.service": strange, "containerd.service": {"Id": "another.service"}})
    assert status.gather(worker.system).units


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become an ordinary user")
def test_an_ordinary_user_is_told_what_he_cannot_see(plane: Baked, tmp_path: Path) -> None:
    plane.install()
    plane.journal(*lines("medium begun x"))
    for name in ("var/lib/nodebake", "var/lib/kubelet"):
        (plane.root / name).chmod(0o700)
    for folder in (tmp_path, *tmp_path.parents):
        if "pytest" in str(folder):
            folder.chmod(0o755)
    shutil.copytree(overlay.OVERLAYS / "common/usr", tmp_path / "program")
    command = [str(tmp_path / "program/local/bin/nodebake"), "status", "--root", str(plane.root)]
    told = subprocess.run(command, user=65534, group=65534, extra_groups=[], capture_output=True, text=True)
    assert (told.returncode, told.stderr) == (1, "")
    assert "whether first boot has ended is not to be seen" in told.stdout
    for what in ("/var/lib/nodebake/installed", "/var/lib/kubelet/pki", "/etc/kubernetes/scheduler.conf"):
        assert f"  {what}: only root may look" in told.stdout
    assert "/etc/kubernetes/pki/kube-apiserver.crt" in told.stdout


# ---- diagnose


def needles(baked: Baked) -> dict[str, bytes]:
    """Every secret value of the cluster, in the forms that it has on a machine; name -> bytes."""
    secrets = baked.secrets
    keys = {
        **{f"ca {name}": pair.key_pem for name, pair in secrets.authorities.items()},
        **{f"key {name}": pem for name, pem in secrets.leaf_keys.items()},
        "service account": secrets.service_account.private_pem,
        "signing": secrets.signing.private_pem,
        **{f"ssh {name}": pair.private for name, pair in secrets.ssh_host_keys.items()},
        "kubelet": (baked.root / CLIENT).read_bytes().partition(b"-----END CERTIFICATE-----")[2],
    }
    found: dict[str, bytes] = {}
    for name, pem in keys.items():
        body = b"".join(line for line in pem.splitlines() if not line.startswith(b"-----"))
        # The last line is no secret's fault to share: of an OpenSSH key it is the comment and padding.
        found |= {f"{name} line {number}": line for number, line in enumerate(pem.splitlines()[1:-2]) if len(line) > 40}
        found[f"{name} raw"] = (
            base64.b64decode(body)[-24:] if name.startswith("ssh") is False else base64.b64decode(body)
        )
    for node, token in secrets.tokens.items():
        found[f"token {node}"] = token.secret.encode()
    found["encryption key"] = base64.b64encode(secrets.encryption_keys[1])
    found["encryption key, raw"] = secrets.encryption_keys[1]
    found["serial seed"] = base64.b64encode(secrets.serial_seed)
    found["registry's password"] = PASSWORD.encode()
    return found


def haystacks(archive: Path) -> Iterator[bytes]:
    """The archive, unpacked, and what base64 hides in it, twice over and wherever it begins."""
    yield archive.read_bytes()
    texts = [gzip.decompress(archive.read_bytes())]
    yield texts[0]
    for _ in range(2):
        texts = [
            base64.b64decode(word[shift : len(word) - (len(word) - shift) % 4])
            for text in texts
            for word in re.findall(rb"[A-Za-z0-9+/]{16,}", text)
            for shift in range(4)
        ]
        yield from texts


def members(archive: Path) -> dict[str, str]:
    with tarfile.open(archive) as tar:
        found = {}
        for member in tar:
            content = tar.extractfile(member)
            assert content is not None and member.isreg()
            found[member.name.partition("/")[2]] = content.read().decode()
        return found


def leaks(archive: Path, baked: Baked) -> list[str]:
    whole = b"\n".join(haystacks(archive))
    return [name for name, needle in needles(baked).items() if needle in whole]


def confessions(baked: Baked) -> str:
    """What a talkative program might say: every secret, in many forms."""
    secrets = baked.secrets
    key = secrets.leaf_keys[baked.node.name, "kube-apiserver"].decode()
    other = secrets.service_account.private_pem.decode()
    body = key.splitlines()
    token = secrets.tokens["worker-2"]
    encryption = base64.b64encode(secrets.encryption_keys[1]).decode()
    pair = base64.b64encode(f"user:{PASSWORD}".encode()).decode()
    prefixed = "".join(f"2026-12-01T10:00:00+0000 x kubelet[7]: {line}\n" for line in other.splitlines())
    return "\n".join(
        [
            "\n".join([*body[2:], "the end of a key, and what comes after it"]),
            key,
            prefixed,
            json.dumps({"key": key, "msg": "in JSON"}),
            f"client-key-data: {base64.b64encode(key.encode()).decode()}",
            f"x={base64.b64encode(b'ab' + other.encode()).decode()} shifted",
            "\n".join(secrets.ssh_host_keys[baked.node.name].private.decode().splitlines()),
            f"Authorization: Bearer {token.bearer}",
            f'"authorization":["Basic {pair}"]',
            f"token={token.bearer} and {token.bearer}, and {token.secret} alone",
            f"token-secret: {token.secret}",
            f"the key {encryption} alone; secret: {encryption}",
            f'  "auth": "{pair}"',
            f"the password is {PASSWORD}.",
            f"password: '{PASSWORD}'",
            "HTTPS_PROXY=http://user:pr0xy-pa55@proxy.example:3128/",
            "PrivateKey = wgwgwgwg",
            body[1],
            "WORDS THAT STAY",
            "\n".join(key.splitlines()[:-1]),  # one that was cut off
        ]
    )


def test_secrets_are_left_out(plane: Baked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole control plane whose programs and logs tell all that they know."""
    plane.install()
    told = confessions(plane)
    for path in (
        *(
            "var/log/cloud-init.log",
            "var/log/cloud-init-output.log",
            "var/log/apt/term.log",
            "run/cloud-init/status.json",
        ),
        "var/log/pods/kube-system_coredns-x_1/coredns/0.log",
        *("etc/systemd/system/kubelet.service.d/10-own.conf", "etc/netplan/50.yaml", "etc/systemd/network/wg.netdev"),
        *("var/lib/nodebake/journal", "etc/nodebake/haproxy.cfg", "etc/containerd/config.toml"),
    ):
        plane.put(path, f"{told}\n")
    plane.put("var/log/pods/default_app-x_1/app/0.log", "A WORKLOAD'S OWN WORDS")
    plane.put("etc/containerd/certs.d/registry.example/hosts.toml", f'[header]\nauthorization = "{PASSWORD}"\n')
    plane.put("root/.kube/config", told)
    plane.put("etc/shadow", "root:$y$j9T$abc:1:::::")
    secret = tmp_path / "said"
    secret.write_text(told)
    talk = f"#!/bin/sh\nwhile IFS= read -r line; do printf '%s\\n' \"$line\"; done <{secret}\necho $0 >&2\n"
    asked = {command[0] for command in diagnose.COMMANDS.values() if "/" not in command[0]}
    talkers = asked | {"journalctl", "systemctl", *(command[0] for command in diagnose.SYSTEM_VERSIONS)}
    programs(tmp_path / "bin", dict.fromkeys(talkers - {"openssl"}, talk), monkeypatch)
    for name in (*diagnose.VERSIONS, "ctr", "crictl"):
        binary = plane.root / "opt/nodebake/current/bin" / name
        if binary.exists():
            binary.write_text(talk)
    made = diagnose.write(plane.system, tmp_path / "d.tar.gz")
    found = members(made.path)
    for name in (
        *(
            "journal/kubelet.service.txt",
            "journal/kernel.txt",
            "containers/pods.txt",
            "network/nft.txt",
            "versions.txt",
        ),
        *("files/var/log/cloud-init.log", "files/var/log/pods/kube-system_coredns-x_1/coredns/0.log", "status.json"),
        *("systemd/ours.txt", "files/etc/systemd/system/kubelet.service.d/10-own.conf", "files/etc/netplan/50.yaml"),
    ):
        assert name in found, sorted(found)
        if name != "status.json":
            assert "WORDS THAT STAY" in found[name], name
            assert "and what comes after it" in found[name]
            assert HIDDEN in found[name]
    assert leaks(made.path, plane) == []
    text = "\n".join(found.values())
    for word in ("pr0xy-pa55", "wgwgwgwg", "OWN WORDS", "$y$j9T", PASSWORD):
        assert word not in text
    assert "etc/shadow" not in text
    files = {name.removeprefix("files/") for name in found if name.startswith("files/")}
    assert not files & {
        *("etc/kubernetes/encryption.yaml", "etc/kubernetes/bootstrap-kubelet.conf", "etc/kubernetes/scheduler.conf"),
        *("etc/nodebake/objects/90-tokens.yaml", "etc/nodebake/objects/10-cluster.yaml", "var/lib/kubelet/config.json"),
        "etc/containerd/certs.d/registry.example/hosts.toml",
    }
    assert not [name for name in files if name.endswith((".key", ".pem", ".crt"))]
    assert {"etc/nodebake/node.env", "etc/kubernetes/kubelet.yaml", "opt/nodebake/manifest/node.json"} <= files
    listed = found["listing.txt"]
    assert re.search(r"^100600 .* /etc/kubernetes/encryption.yaml$", listed, re.MULTILINE)
    assert "CN = kube-apiserver" in found["certificates.txt"]


def test_a_rescue_system_packs_a_worker(worker: Baked, tmp_path: Path) -> None:
    worker.install()
    worker.put("var/log/cloud-init.log", f"joined with {worker.secrets.tokens['worker-1'].bearer}\n")
    target = tmp_path / "d.tar.gz"
    said = nodebake("diagnose", "--root", worker.root, "--output", target)
    assert said.splitlines()[0] == str(target)
    assert target.stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.glob("*d.tar.gz*")) == ["d.tar.gz"]
    found = members(target)
    assert found["files/var/log/cloud-init.log"] == f"joined with {HIDDEN}\n"
    assert "network/nft" in found["about.txt"] and f"that in {worker.root} does not run" in found["about.txt"]
    assert "network/nft.txt" not in found
    assert leaks(target, worker) == []
    nodebake("diagnose", "--root", worker.root, "--output", target)  # over an older one


def test_links_lead_nowhere_else(worker: Baked, tmp_path: Path) -> None:
    """A machine's disk may hold links to what on the rescue system is something else."""
    (tmp_path / "mine").write_text("THE RESCUER'S OWN")
    (worker.root / "etc/hosts").symlink_to(tmp_path / "mine")
    nodebake("diagnose", "--root", worker.root, "--output", tmp_path / "d.tar.gz")
    found = members(tmp_path / "d.tar.gz")
    assert "RESCUER" not in "".join(found.values())
    assert "/etc/hosts: the link leads out of" in found["about.txt"]


def test_where_the_archive_goes(worker: Baked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.chdir(tmp_path)
    made = diagnose.write(System(worker.root), None)
    assert re.fullmatch(r"nodebake-worker-1-\d{8}T\d{6}Z\.tar\.gz", made.path.name)
    assert made.path.parent == tmp_path
    said = nodebake("diagnose", "--root", worker.root, "--output", tmp_path / "no" / "d.tar.gz", fails=1)
    assert said.startswith("nodebake: the archive cannot be written: No such file or directory")


def test_a_part_that_fails_keeps_no_other_back(worker: Baked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*words: object) -> None:
        raise RuntimeError("nobody foresaw this")

    monkeypatch.setattr(status, "gather", fail)
    made = diagnose.write(System(worker.root), tmp_path / "d.tar.gz")
    found = members(made.path)
    assert "status: RuntimeError: nobody foresaw this" in found["about.txt"]
    assert "files/etc/nodebake/node.env" in found


@pytest.mark.parametrize(
    "text",
    [
        "--enable-bootstrap-token-auth=true",
        "--initial-cluster-token=ha",
        "    --service-account-signing-key-file=/etc/kubernetes/pki/sa.key \\",
        "authentication:\n  anonymous:\n    enabled: false\nauthorization:\n  mode: Webhook\n",
        "sha256:e6a6cec3b6ab5dcec64a278de109fb294da9df758060b2a89a897e85a995ba03",
        "d8e8fca2dc0f896fd7cb4cb0031ba2494b6d3f8f5c9e0a1b2c3d4e5f60718293  etc/nodebake/node.env",
        "-----BEGIN CERTIFICATE-----\nMIIBszCCAVmgAwIBAgIUb2Zm\n-----END CERTIFICATE-----\n",
        "2026-12-01T10:00:00+0000 worker-1 kubelet[7]: I1201 10:00:00.000000 7 server.go:1] Started kubelet",
        "nodebake-images.service loaded active",
        "https://192.168.10.11:2379,https://192.168.10.12:2379",
        "secretName: tls-app",
        "no token was found",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert Scrubber().scrub(text) == text


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("a abcdef.0123456789abcdef b", f"a {HIDDEN} b"),
        ('{"token":"x y", "a": 1}', f'{{"token":{HIDDEN}, "a": 1}}'),
        ("Authorization: Basic dXNlcjpwdw==\nnext", f"Authorization: {HIDDEN}\nnext"),
        ("curl -H 'authorization: Bearer x.y.z'", f"curl -H 'authorization: {HIDDEN}"),
        ("bearer abc.def next", f"bearer {HIDDEN} next"),
        ("http://user:pw@host/", f"http://{HIDDEN}@host/"),
        ("PrivateKey = abc=", f"PrivateKey = {HIDDEN}"),
        ("client-key-data: LS0tLS1CRUdJTg==", f"client-key-data: {HIDDEN}"),
        ("x eyJhbGciOiJSUzI1NiJ9.eyJpc3MiOiJrdWJlIn0.c2ln y", f"x {HIDDEN} y"),
        ("auth_pass 1\nauth_pass: geheim", f"auth_pass {HIDDEN}\nauth_pass: {HIDDEN}"),
        ("  wpa-psk geheim\n", f"  wpa-psk {HIDDEN}\n"),
        ("ctl --password geheim --token abc run", f"ctl --password {HIDDEN} --token {HIDDEN} run"),
        ("curl -u admin:geheim host", f"curl -u admin:{HIDDEN} host"),
        ("-----BEGIN EC PRIVATE KEY-----\nabc", HIDDEN),
        ("AgEAMBMGByq\nGSM49\n-----END PRIVATE KEY-----\nnext", f"{HIDDEN}\nnext"),
    ],
)
def test_what_looks_like_a_secret_goes(text: str, left: str) -> None:
    assert Scrubber().scrub(text) == left


def test_programs_are_linted_and_typed() -> None:
    """What has no ending is found by its first line, and must be named in pyproject.toml."""
    project = (overlay.OVERLAYS.parent / "pyproject.toml").read_text()
    found = [
        path.relative_to(overlay.OVERLAYS.parent).as_posix()
        for path in overlay.OVERLAYS.rglob("*")
        if path.is_file() and re.match(rb"#!.*python", path.read_bytes()[:80])
    ]
    assert "overlays/common/usr/local/bin/nodebake" in found
    assert [name for name in found if project.count(f'"{name}"') != 2] == []


def test_it_leaves_no_compiled_files_behind(worker: Baked) -> None:
    """Nothing on the machine is changed by looking."""

    def tree() -> Sequence[tuple[str, float]]:
        return sorted((str(path), path.lstat().st_mtime) for path in worker.root.rglob("*"))

    before = tree()
    installed = worker.root / "usr/local/bin/nodebake"
    done = subprocess.run([installed, "status", "--root", worker.root], capture_output=True, text=True)
    assert done.stdout.startswith("worker-1: worker")
    assert tree() == before
