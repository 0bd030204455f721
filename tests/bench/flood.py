"""The first hour of a large cluster: its machines ask for their certificates as fast as they can be answered.

Etcd, API server, controller-manager and our daemon are the bake's own, on one control plane; the machines are threads
that do what a kubelet does until it has its certificates. README.md says what exactly is measured.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from recipes.kit.model import Address, Cluster, Network, Node
from tests import samples
from tests.bench import table
from tests.bench.measure import Goal
from tests.conftest import ROOT, copy_project
from tests.layout import Running, on_loopback

sys.path.insert(0, str(ROOT / "overlays" / "control-plane" / "usr" / "local" / "lib" / "nodebake"))

from tests import plane

MACHINES = 5_000
AT_ONCE = 48  # machines that wait for an answer at the same time
HOSTILE = 10  # each tenth machine asks for another's name as well
SECONDS = 600.0
PATIENCE = "--retire-after=60"  # as on a machine
REQUESTS = "/apis/certificates.k8s.io/v1/certificatesigningrequests"


@dataclass
class Flood:
    """waited: seconds from each request to its certificate; refused: names of hostile requests."""

    waited: list[float] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def main(desk: str) -> None:
    """Writes build/bench/flood.md and flood.json, and prints the former."""
    folder = ROOT / "build" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="flood-", dir=folder) as made:
        programs = unpacked(Path(made))
        with plane.begun(Path(made), programs, cluster_of(MACHINES)) as (stand, server):
            server.until_true(lambda: plane.is_ready(stand.admin), "ready")
            goals, facts = measured(stand, server)
    text = "\n".join([*table.rows(goals), "", f"One round; {desk}.", "", *(f"- {k}: {v}" for k, v in facts.items())])
    (folder / "flood.md").write_text(text + "\n")
    told = {"goals": table.facts(goals), "facts": facts, "desk": desk}
    (folder / "flood.json").write_text(json.dumps(told, indent=1) + "\n")
    print(text)


def unpacked(folder: Path) -> Path:
    """The control plane's programs, as they are baked."""
    project = copy_project(folder / "project")
    project.remember("ha")
    project.doit("payload:control-plane-amd64")
    programs = folder / "programs"
    programs.mkdir()
    tarball = project.root / "build" / "ha" / "payloads" / "control-plane-amd64.tar.gz"
    inside = ["--wildcards", "--strip-components=4", "opt/nodebake/*/bin/*"]
    subprocess.run(["tar", "-xzf", tarball, "-C", programs, *inside], check=True)
    return programs


def cluster_of(machines: int) -> Cluster:
    """One control plane on loopback, and workers that only their certificates know."""
    control = samples.node("control-1", "control-plane", 11, runs_etcd=True)
    cluster = on_loopback(samples.ha(nodes=(control,)), os.getpid())

    def worker(number: int) -> Node:
        address = Address(IPv4Address(0xAC100800 + number), IPv4Network("172.16.0.0/16"))  # 172.16.8.0 and on
        return samples.node(f"worker-{number}", "worker", 1, network=Network((), (address,)))

    return replace(cluster, nodes=(*cluster.nodes, *(worker(number) for number in range(1, machines + 1))), scale=5_000)


def measured(stand: plane.Stand, server: Running) -> tuple[list[Goal], dict[str, str]]:
    artifact = stand.artifact(1)
    flood = Flood()
    with stand.machine.running("kube-controller-manager.service") as manager:
        manager.until(r"[Ss]uccessfully acquired lease")
        with stand.daemon(artifact, PATIENCE):
            started = time.monotonic()
            stand.applied(1, 600)
            plane.eventually(lambda: len(stand.brought()) == len(stand.cluster.kubelets), "all tokens are there", 600)
            brought = time.monotonic() - started
        with stand.daemon(artifact, PATIENCE) as running:
            started = time.monotonic()
            running.until(r"inventory: the cluster holds generation 1")
            again = time.monotonic() - started
            tell(f"{len(stand.cluster.kubelets)} tokens in {brought:.0f} s; again {again:.1f} s")
            used = {"API server": server.process, "controller-manager": manager.process, "daemon": running.process}
            before = {name: processor(process) for name, process in used.items()}
            started = time.monotonic()
            workers = [node for node in stand.cluster.nodes if node.role == "worker"]
            half = len(workers) // 2
            run(stand, flood, workers[:half])
            first = time.monotonic() - started
            work = {name: processor(process) - before[name] for name, process in used.items()}
            most = memory(running.process)
        with ThreadPoolExecutor(1) as aside:  # nobody decides until the daemon is back
            restart = aside.submit(run, stand, flood, workers[half:])
            time.sleep(5)
            with stand.daemon(artifact, PATIENCE) as running:
                restart.result()
                total = time.monotonic() - started
                most = max(most, memory(running.process))
    wrong = check(stand, flood)
    certificates = 2 * len(workers)
    assert len(flood.waited) == certificates and not wrong, wrong
    longest = sorted(flood.waited)
    goals = [
        Goal(f"{certificates} certificates", total, SECONDS, 1, "the goal"),
        Goal("the objects and all tokens, on a new cluster", brought, 180, 1, "the goal"),
        Goal("the same again", again, brought, 0.05, "at first"),
        Goal("the daemon's memory", most, 200e6, 1, "200 MB", "MB"),
    ]
    facts = {
        "certificates a second": f"{certificates / total:.1f}",
        "waited for one": f"{longest[len(longest) // 2]:.2f} s in the middle, {longest[-1]:.1f} s at the longest",
        "refused, as they had to be": f"{len(flood.refused)}",
        "processor for the first half": ", ".join(f"{name} {spent:.0f} s" for name, spent in work.items())
        + f", of {first:.0f} s",
    }
    return goals, facts


def run(stand: plane.Stand, flood: Flood, workers: Sequence[Node]) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for joined in [pool.submit(Machine(stand, node, flood).join) for node in workers]:
            joined.result()


class Machine:
    """What a kubelet does until it has its certificates, and its Node is Ready."""

    _lock = threading.Lock()

    def __init__(self, stand: plane.Stand, node: Node, flood: Flood) -> None:
        self._stand, self._node, self._flood = stand, node, flood
        self._name = f"system:node:{node.name}"
        self._key = ec.generate_private_key(ec.SECP256R1())

    def join(self) -> None:
        bearer = {"Authorization": f"Bearer {self._stand.bearer(self._node.name)}"}
        by_token = Connection(self._stand, bearer)
        if int(self._node.name.rpartition("-")[2]) % HOSTILE == 0:
            self._ask_for_another(by_token)
        pem = plane.request_pem(self._name, signed_with=self._key)
        certificate = self._ask(by_token, f"client-{self._node.name}", pem, plane.CLIENT, "client auth")
        by_token.close()
        own = Connection(self._stand, {}, certificate, self._key)
        kind = {"apiVersion": "v1", "kind": "Node"}
        own.call("POST", "/api/v1/nodes", {**kind, "metadata": {"name": self._node.name}})
        sans = [x509.DNSName(self._node.name), plane.address(str(self._node.address))]
        pem = plane.request_pem(self._name, sans=sans, signed_with=self._key)
        self._ask(own, f"serving-{self._node.name}", pem, plane.SERVING, "server auth")
        ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": ""}
        own.call("PATCH", f"/api/v1/nodes/{self._node.name}/status", {"status": {"conditions": [ready]}})
        own.close()

    def _ask(self, connection: Connection, name: str, pem: bytes, signer: str, usage: str) -> bytes:
        """Asks, and watches the request until its certificate is there."""
        started = time.monotonic()
        connection.request(name, pem, signer, usage)
        status = connection.watch(name, "certificate")
        certificate = base64.b64decode(status["certificate"])
        subject = x509.load_pem_x509_certificate(certificate).subject
        assert {attribute.value for attribute in subject} == {"system:nodes", self._name}, subject
        with self._lock:
            self._flood.waited.append(time.monotonic() - started)
        return certificate

    def _ask_for_another(self, connection: Connection) -> None:
        name = f"hostile-{self._node.name}"
        connection.request(name, plane.request_pem("system:node:worker-1"), plane.CLIENT, "client auth")
        with self._lock:
            self._flood.refused.append(name)


class Connection:
    """To the API server, with a bearer token or a certificate."""

    def __init__(
        self,
        stand: plane.Stand,
        headers: dict[str, str],
        certificate: bytes | None = None,
        key: ec.EllipticCurvePrivateKey | None = None,
    ) -> None:
        context = ssl.create_default_context(cafile=stand.authority.certificate)
        if certificate is not None and key is not None:
            private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            with tempfile.NamedTemporaryFile(dir=stand.folder, suffix=".pem") as file:
                file.write(certificate + private)
                file.flush()
                context.load_cert_chain(file.name)
        self._headers = {**headers, "Content-Type": "application/json"}
        self._http = http.client.HTTPSConnection(stand.machine.localhost, 6443, context=context, timeout=600)

    def close(self) -> None:
        self._http.close()

    def request(self, name: str, pem: bytes, signer: str, usage: str) -> None:
        spec = {"request": base64.b64encode(pem).decode(), "signerName": signer, "usages": ["digital signature", usage]}
        kind = {"apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest"}
        self.call("POST", REQUESTS, {**kind, "metadata": {"name": name}, "spec": spec})

    def call(self, method: str, path: str, body: dict[str, Any]) -> None:
        kind = "application/strategic-merge-patch+json" if method == "PATCH" else "application/json"
        self._http.request(method, path, json.dumps(body), {**self._headers, "Content-Type": kind})
        answer = self._http.getresponse()
        said = answer.read()
        assert answer.status in (200, 201), said

    def watch(self, name: str, wanted: str) -> dict[str, Any]:
        """The request's status, once it has that."""
        self._http.request("GET", f"{REQUESTS}?watch=1&fieldSelector=metadata.name={name}", headers=self._headers)
        answer = self._http.getresponse()
        assert answer.status == 200, answer.read()
        for line in answer:
            status: dict[str, Any] = json.loads(line)["object"].get("status", {})
            if wanted in status:
                break
        else:
            raise AssertionError(f"the watch of {name} ended")
        self._http.close()  # the next call opens another
        return status


def check(stand: plane.Stand, flood: Flood) -> list[str]:
    """What was decided wrongly, or twice, or never."""
    wrong = []
    seen = Counter[str]()
    for item in stand.admin.call("GET", REQUESTS)["items"]:
        name = item["metadata"]["name"]
        told = [each["type"] for each in item.get("status", {}).get("conditions") or ()]
        expected = ["Denied"] if name.startswith("hostile-") else ["Approved"]
        if told != expected:
            wrong.append(f"{name}: {told}")
        seen[name.partition("-")[0]] += 1
    workers = len(stand.cluster.kubelets) - 1
    if (seen["client"], seen["serving"], seen["hostile"]) != (workers, workers, len(flood.refused)):
        wrong.append(f"{dict(seen)}")
    return wrong


def processor(process: subprocess.Popen[bytes]) -> float:
    """Seconds of processor that a program has had."""
    words = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def memory(process: subprocess.Popen[bytes]) -> int:
    """The most that a program has had, bytes."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM:"))) * 1024


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
