"""Somebody has a copy of a worker's ISO and is on the machines' network: what that is good for, and until when."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes.kit import inventory
from tests.conftest import Project, copy_project
from tests.lab import checks, host
from tests.lab.checks import get, items, wait_ready
from tests.lab.host import Argument
from tests.lab.lab import Lab
from tests.lab.machine import Machine
from tests.lab.scenario import BOOT, CLUSTERS, power_on, say
from tests.lab.test_apply import bring

CLIENT, SERVING = "kubernetes.io/kube-apiserver-client-kubelet", "kubernetes.io/kubelet-serving"
FORBIDDEN = "[Ff]orbidden"
REFUSED = "InternalError|Internal Server Error|error on the server"


class Thief:
    """With what is on a worker's ISO, and no machine of the cluster."""

    def __init__(self, lab: Lab, name: str, folder: Path) -> None:
        self.lab, self.name, self.folder = lab, name, folder
        folder.mkdir()
        host.run(["bsdtar", "-xf", lab.build / "seeds" / f"{name}.iso", "-C", folder])
        host.run(["tar", "-xzf", folder / "node.tar.gz", "-C", folder, "--wildcards", "etc/*"])
        config: dict[str, Any] = yaml.safe_load((folder / "etc/kubernetes/bootstrap-kubelet.conf").read_text())
        config["clusters"][0]["cluster"]["server"] = f"https://{lab.cluster.control_planes[0].address}:6443"
        self._config, self.credential = config, config["users"][0]["user"]
        self._tries = 0

    @property
    def address(self) -> IPv4Address:
        return self.lab.cluster.node(self.name).address

    def kubectl(self, *words: str, stdin: object = None) -> str:
        """What it answers, an error or not."""
        self._config["users"][0]["user"] = self.credential
        file = self.folder / "kubeconfig"
        file.write_text(yaml.safe_dump(self._config))
        command: list[Argument] = ["env", f"HOME={self.folder}", self.lab.folder / "kubectl", f"--kubeconfig={file}"]
        text = None if stdin is None else json.dumps(stdin)
        done = self.lab.inside.run([*command, *words], check=False, stdin=text)
        return done.stdout + done.stderr

    def is_refused(self, *words: str, stdin: object = None, why: str = FORBIDDEN) -> None:
        told = self.kubectl(*words, stdin=stdin)
        assert re.search(why, told), f"{' '.join(words)}: {told}"

    def request(
        self, node: str, signer: str = CLIENT, organization: str = "system:nodes", sans: str = ""
    ) -> dict[str, Any]:
        """For a certificate, with another key each time."""
        self._tries += 1
        key, csr = self.folder / f"key-{self._tries}", self.folder / f"csr-{self._tries}"
        names: list[Argument] = ["-addext", f"subjectAltName={sans}"] if sans else []
        subject = f"/O={organization}/CN=system:node:{node}"
        curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
        host.run(["openssl", "req", "-new", *curve, "-keyout", key, "-subj", subject, *names, "-out", csr])
        return {
            "apiVersion": "certificates.k8s.io/v1",
            "kind": "CertificateSigningRequest",
            "metadata": {"name": f"{self.name}-{self._tries}"},
            "spec": {
                "request": base64.b64encode(csr.read_bytes()).decode(),
                "signerName": signer,
                "usages": ["digital signature", "server auth" if signer == SERVING else "client auth"],
            },
        }

    def asks(self, *words: str, **more: str) -> str:
        """Makes such a request; its name."""
        told = self.kubectl("create", "-f", "-", stdin=self.request(*words, **more))
        assert "created" in told, told
        return f"{self.name}-{self._tries}"

    def outcome(self, request: str) -> tuple[str, str]:
        """Approved or Denied, and why."""

        def decided() -> list[dict[str, str]]:
            return list(get(self.lab, "csr", request)["status"].get("conditions", []))

        (condition, *_) = self.lab.wait(decided, 60, f"{request} is decided")
        return condition["type"], condition["message"]

    def becomes(self, request: str) -> None:
        """Goes on with the certificate that it was given."""
        signed = self.lab.wait(
            lambda: get(self.lab, "csr", request)["status"].get("certificate"), 60, f"{request} is signed"
        )
        key = (self.folder / f"key-{request.rpartition('-')[2]}").read_bytes()
        self.credential = {"client-certificate-data": signed, "client-key-data": base64.b64encode(key).decode()}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    copy = copy_project(tmp_path)
    (copy.clusters / "stolen.yaml").write_text((CLUSTERS / "stolen.yaml").read_text())
    copy.remember("stolen")
    copy.doit("cluster=recipes/clusters/stolen.yaml")
    return copy


@pytest.fixture
def lab(project: Project) -> Iterator[Lab]:
    """Without worker-1, which is not switched on yet."""
    cluster = inventory.load(project.clusters / "stolen.yaml", now=datetime.now(UTC))
    with Lab(project.root / "build/stolen", cluster) as lab:
        for name in ("control", "worker-2"):
            lab.machine(name)
        wait_ready(lab, BOOT, {"control", "worker-2"}, power_on(lab))
        yield lab


@pytest.mark.matrix
def test_a_stolen_iso_is_one_worker_until_it_is_denied(project: Project, lab: Lab, tmp_path: Path) -> None:
    thief = Thief(lab, "worker-1", tmp_path / "thief")
    held = [path for path in thief.folder.rglob("*") if path.is_file() and b"PRIVATE KEY" in path.read_bytes()]
    assert held == [], "no key is on it, only a token"
    a_token_lets_one_ask_for_its_certificate_and_nothing_else(lab, thief)
    its_certificate_is_that_of_one_worker(lab, thief)
    the_machine_itself_is_kept_out(lab)

    # One line in the cluster file, another artifact for each control plane.
    file = project.clusters / "stolen.yaml"
    file.write_text(file.read_text() + "denied: [worker-1]\n")
    project.doit(f"cluster={file}")
    control = lab.machine("control")
    folder = bring(control, lab.build / "nodes" / "control.tar.gz")
    started = time.monotonic()
    applying = control.start("nodebake", "apply", folder)
    asked = ("get", "--raw=/api/v1/nodes", "--request-timeout=3s")
    lab.wait(lambda: re.search(REFUSED, thief.kubectl(*asked)), BOOT, "the API server knows of it")
    say(f"refused {time.monotonic() - started:.0f} s after `nodebake apply` began on the control plane")
    assert applying.wait(BOOT) == 0
    say(f"which took {time.monotonic() - started:.0f} s; it waited for: {waited_for(control)}")
    for path in ("/api/v1/nodes/worker-1", "/api/v1/services", "/api/v1/secrets", "/version"):
        thief.is_refused("get", f"--raw={path}", why=REFUSED)
    lab.kubectl("delete", "node", "worker-1")
    assert checks.ready_nodes(lab) == {"control", "worker-2"}


def waited_for(machine: Machine) -> str:
    """By first boot, in the end."""
    return ", ".join(dict.fromkeys(re.findall(r"first-boot: waiting: (.*)", machine.journal)[-12:]))


def a_token_lets_one_ask_for_its_certificate_and_nothing_else(lab: Lab, thief: Thief) -> None:
    for words in (
        ("get", "secrets", "-A"),
        ("get", "configmaps", "-n", "kube-system"),
        ("get", "nodes"),
        ("get", "pods", "-A"),
        ("get", "services", "-A"),
        ("create", "token", "default"),
        ("create", "serviceaccount", "mine"),
        ("get", "--raw", "/metrics"),
    ):
        thief.is_refused(*words)
    for request, why in (
        (thief.asks("worker-2"), "for the name system:node:worker-2"),
        (thief.asks("worker-1", organization="system:masters"), "organization system:masters"),
        (thief.asks("worker-1", SERVING, sans=f"IP:{thief.address}"), "a client certificate only"),
    ):
        outcome, told = thief.outcome(request)
        assert outcome == "Denied" and why in told, told
        thief.is_refused("patch", "csr", request, "--subresource=approval", "--type=merge", "--patch={}")


def its_certificate_is_that_of_one_worker(lab: Lab, thief: Thief) -> None:
    request = thief.asks("worker-1")
    assert thief.outcome(request)[0] == "Approved"
    thief.becomes(request)
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "worker-1"}}
    assert "created" in thief.kubectl("create", "-f", "-", stdin=node)

    # What it can: what each worker can. It sees nodes, services, and what is meant for pods that are sent to it.
    assert "worker-2" in thief.kubectl("get", "nodes") and "kubernetes" in thief.kubectl("get", "services", "-A")
    lab.kubectl("create", "secret", "generic", "for-worker-1", "--from-literal=word=shown")
    lab.kubectl("create", "secret", "generic", "for-worker-2", "--from-literal=word=shown")
    for number in (1, 2):
        source = {"secretRef": {"name": f"for-worker-{number}"}}
        container = {"name": "reader", "image": "none", "imagePullPolicy": "Never", "envFrom": [source]}
        spec = {"nodeName": f"worker-{number}", "containers": [container]}
        metadata = {"name": f"reader-{number}"}
        checks.apply(lab, {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
    lab.wait(lambda: "word" in thief.kubectl("get", "secret", "for-worker-1", "-o", "yaml"), 20, "its pod's Secret")

    # What it cannot.
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "mine"}}
    container = {"name": "mine", "image": "none"}
    (token,) = [
        each["metadata"]["name"]
        for each in items(lab, "secrets", "-n", "kube-system")
        if each["type"] == "bootstrap.kubernetes.io/token" and "worker-1" in decoded(each, "description")
    ] or [""]
    for words in (
        ("get", "secret", "for-worker-2"),
        ("get", "secrets", "-A"),
        ("get", "secret", token or "any", "-n", "kube-system"),
        ("get", "configmap", "nodebake-inventory", "-n", "kube-system"),
        ("create", "token", "default"),
        ("delete", "node", "worker-2"),
        ("delete", "pod", "reader-2"),
        ("label", "node", "worker-2", "a=b"),
        ("label", "node", "worker-1", "node-role.kubernetes.io/control-plane="),
        ("label", "node", "worker-1", "node-restriction.kubernetes.io/storage=nvme"),
        ("create", "namespace", "mine"),
    ):
        thief.is_refused(*words)
    thief.is_refused("create", "-f", "-", stdin={**pod, "spec": {"containers": [container]}})
    elsewhere = {"nodeName": "worker-2", "containers": [container]}
    thief.is_refused("create", "-f", "-", stdin={**pod, "spec": elsewhere})
    thief.is_refused("create", "-f", "-", stdin=thief.request("worker-2"))
    control = lab.cluster.control_planes[0].address
    outcome, told = thief.outcome(thief.asks("worker-1", SERVING, sans=f"IP:{control}"))
    assert outcome == "Denied" and f"{control} is no address of worker-1" in told, told
    for machine in lab.machines.values():
        answer = kubelet_says(thief, str(machine.node.address))
        assert answer == "403", f"the kubelet of {machine.name} lets it look: {answer}"


def decoded(secret: dict[str, Any], key: str) -> str:
    return base64.b64decode(secret["data"].get(key, "")).decode()


def kubelet_says(thief: Thief, address: str) -> str:
    """HTTP status of another machine's kubelet, asked with the certificate."""
    crt, key = thief.folder / "now.crt", thief.folder / "now.key"
    for path, name in ((crt, "client-certificate-data"), (key, "client-key-data")):
        path.write_bytes(base64.b64decode(thief.credential[name]))
    program = (
        "import http.client, ssl, sys; c = ssl._create_unverified_context(); c.load_cert_chain(*sys.argv[2:]);"
        "h = http.client.HTTPSConnection(sys.argv[1], 10250, context=c, timeout=5); h.request('GET', '/pods');"
        "print(h.getresponse().status)"
    )
    return thief.lab.inside.run(["python3", "-c", program, address, crt, key]).stdout.strip()


def the_machine_itself_is_kept_out(lab: Lab) -> None:
    """It is told why, and so is who reads the log: that is how the theft is noticed."""
    lab.machine("worker-1").power_on()
    control = lab.machine("control")
    said = r"request \S+ of system:bootstrap:\S+: refused: .*was first used with the key"
    lab.wait(lambda: re.search(said, control.journal), BOOT, "a second key is refused")


@pytest.mark.matrix
def test_a_stolen_iso_is_worth_nothing_after_its_machine(lab: Lab, tmp_path: Path) -> None:
    thief = Thief(lab, "worker-2", tmp_path / "thief")
    outcome, told = thief.outcome(thief.asks("worker-2"))
    assert outcome == "Denied" and "was first used with the key" in told, told
    started = time.monotonic()
    lab.wait(lambda: "Unauthorized" in thief.kubectl("get", "csr"), 120, "its token is retired")
    say(f"the token was retired {time.monotonic() - started:.0f} s after the node was Ready")
    thief.is_refused("get", "nodes", why="Unauthorized")
