"""A control plane that runs here: etcd, API server, controller-manager and our daemon by their units' own command
lines, and what machines and people do to it."""

from __future__ import annotations

import base64
import json
import os
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from types import MappingProxyType

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from recipes import node as nodes
from recipes.kit import store
from recipes.kit.model import Cluster, Node
from tests.layout import IMAGES, Layout, Running

sys.dont_write_bytecode = True  # the overlays' folder is baked as it is

from controller import approve, credentials, inventory, judge, lease, objects, tokens  # noqa: E402
from controller.api import MERGE, Api, Json, Refused  # noqa: E402

CLIENT, SERVING = judge.CLIENT, judge.SERVING
PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


def key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


KEY = key()


def request_pem(
    common_name: str,
    organizations: Iterable[str] = ("system:nodes",),
    *,
    sans: Iterable[x509.GeneralName] = (),
    more: Iterable[x509.NameAttribute[str]] = (),
    extension: x509.ExtensionType | None = None,
    signed_with: PrivateKey = KEY,
) -> bytes:
    """A certificate request as a kubelet makes them, or nearly."""
    names = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, each) for each in organizations]
    names += [x509.NameAttribute(NameOID.COMMON_NAME, common_name), *more]
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(names))
    if listed := list(sans):
        builder = builder.add_extension(x509.SubjectAlternativeName(listed), critical=False)
    if extension is not None:
        builder = builder.add_extension(extension, critical=True)
    return builder.sign(signed_with, hashes.SHA256()).public_bytes(Encoding.PEM)


def address(text: str) -> x509.IPAddress:
    return x509.IPAddress(ip_address(text))


def bake(folder: Path, cluster: Cluster, node: Node, secrets: store.Secrets, generation: int) -> Path:
    """What a control plane's artifact brings for the daemon, as /etc/nodebake."""
    made = nodes.identity(cluster, node, secrets, sums="5" * 64, image=IMAGES, generation=generation)
    for file in made:
        if file.path.startswith(("/etc/nodebake/objects/", "/etc/nodebake/inventory.json")):
            assert (file.mode, file.owner) == (0o600, "nodebake")
            path = folder / file.path.removeprefix("/etc/nodebake/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.data or b"")
    return folder


@dataclass
class Stand:
    """A control plane under a folder: etcd, API server and controller-manager, and what speaks with them."""

    machine: Layout
    cluster: Cluster
    secrets: store.Secrets
    admin: Api
    folder: Path

    @property
    def pki(self) -> Path:
        return self.machine.path("/etc/kubernetes/pki")

    @property
    def server(self) -> str:
        return f"https://{self.machine.localhost}:6443"

    @property
    def authority(self) -> credentials.Authority:
        return credentials.Authority(self.pki / "kubernetes-ca.crt", self.pki / "kubernetes-ca.key")

    def artifact(self, generation: int, cluster: Cluster | None = None, secrets: store.Secrets | None = None) -> Path:
        cluster = cluster or self.cluster
        folder = self.folder / f"artifact-{generation}-{time.monotonic_ns()}"
        return bake(folder, cluster, cluster.control_planes[0], secrets or self.secrets, generation)

    @contextmanager
    def daemon(self, artifact: Path, *more: str, node: str = "control-1", **environment: str) -> Iterator[Running]:
        """The unit's real command line, here."""
        runtime = self.folder / f"runtime-{node}"
        log = self.folder / f"{node}-{time.monotonic_ns()}.log"
        command = [sys.executable, *self.machine.command("nodebake-controller.service")]
        command += [f"--kubectl={self.machine.binaries}/kubectl", f"--authority-key={self.authority.key}"]
        command += [f"--runtime={runtime}", f"--artifact={artifact}", f"--node={node}", "--retire-after=1", *more]
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **environment})
        running = Running(process, log)
        try:
            yield running
        finally:
            process.kill()
            process.wait()
            for token in self.secrets.tokens.values():
                assert token.secret not in running.said
            assert "PRIVATE KEY" not in running.said and "Traceback" not in running.said, running.said

    # What machines and people do

    def ask(
        self,
        name: str,
        pem: bytes,
        *,
        token: str | None = None,
        node: str | None = None,
        signer: str = CLIENT,
        usages: Iterable[str] | None = None,
    ) -> None:
        """Sends a certificate request, with a bearer token or as a node."""
        needed = "client auth" if signer == CLIENT else "server auth"
        spec = {"request": base64.b64encode(pem).decode(), "signerName": signer}
        spec |= {"usages": list(usages or ("digital signature", needed))}  # type: ignore[dict-item]
        body = {"apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest"}
        self.as_machine("POST", approve.REQUESTS, {**body, "metadata": {"name": name}, "spec": spec}, token, node)

    def as_machine(self, method: str, path: str, body: Json | None, token: str | None, node: str | None) -> Json:
        context = ssl.create_default_context(cafile=self.authority.certificate)
        if node is not None:
            file = self.folder / f"{node}.pem"
            now = datetime.now(UTC)
            pem = credentials.mint(
                self.authority,
                f"system:node:{node}",
                "system:nodes",
                now - timedelta(minutes=1),
                now + timedelta(hours=1),
            )
            credentials.write_private(file, pem)
            context.load_cert_chain(file)
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(f"{self.server}{path}", data=data, method=method)  # noqa: S310
        asked.add_header("Content-Type", "application/json")
        if token is not None:
            asked.add_header("Authorization", f"Bearer {token}")
        with urllib.request.urlopen(asked, context=context, timeout=20) as answer:  # noqa: S310
            told: Json = json.loads(answer.read())
            return told

    def can_ask(
        self, name: str, node: str, secrets: store.Secrets | None = None, *, signed_with: PrivateKey = KEY
    ) -> bool:
        """Asks with a machine's token, which the API server may not know yet, or not let ask."""
        try:
            bearer = (secrets or self.secrets).tokens[node].bearer
            self.ask(name, request_pem(f"system:node:{node}", signed_with=signed_with), token=bearer)
        except urllib.error.HTTPError as error:
            assert error.code in (401, 403)
            return False
        return True

    def request(self, name: str) -> Json:
        found: Json = self.admin.call("GET", f"{approve.REQUESTS}/{name}")
        return found

    def outcome(self, name: str, seconds: float = 20) -> tuple[str, str]:
        """("Approved" or "Denied", why) of a request, once it is decided."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            conditions = self.request(name).get("status", {}).get("conditions") or ()
            decided = [each for each in conditions if each["type"] in ("Approved", "Denied")]
            if decided:
                assert len(decided) == 1
                return decided[0]["type"], decided[0]["message"]
            time.sleep(0.05)
        raise AssertionError(f"{name} was not decided")

    def certificate(self, name: str) -> x509.Certificate:
        """The certificate that the controller-manager issued."""
        eventually(lambda: "certificate" in self.request(name).get("status", {}), f"{name} is signed")
        return x509.load_pem_x509_certificate(base64.b64decode(self.request(name)["status"]["certificate"]))

    def bearer(self, node: str) -> str:
        return self.secrets.tokens[node].bearer

    def secret(self, node: str) -> Json | None:
        return self.found(f"{tokens.SECRETS}/bootstrap-token-{self.secrets.tokens[node].id}")

    def pin(self, node: str, key_digest: str) -> None:
        """As if the token had first asked with this key."""
        annotations = {approve.FIRST_KEY: key_digest}
        path = f"{tokens.SECRETS}/bootstrap-token-{self.secrets.tokens[node].id}"
        self.admin.call("PATCH", path, {"metadata": {"annotations": annotations}}, kind=MERGE)

    def brought(self) -> set[str]:
        """The machines whose tokens the cluster has."""
        listed = self.admin.call("GET", tokens.SECRETS, query=tokens.TYPE)["items"]
        names = {token.id: node for node, token in self.secrets.tokens.items()}
        return {names[item["metadata"]["name"].removeprefix("bootstrap-token-")] for item in listed}

    def published(self) -> inventory.Published | None:
        found = self.found(f"{objects.CONFIG_MAPS}/{inventory.NAME}")
        return inventory.published(found) if found is not None else None

    def applied(self, generation: int, seconds: float = 60) -> None:
        def check() -> bool:
            found = self.published()
            return found is not None and found.generation == found.applied == generation

        eventually(check, f"generation {generation} is applied", seconds)

    def register(self, name: str, ready: bool = False, more: Mapping[str, str] = MappingProxyType({})) -> None:
        """A Node, as a kubelet registers it."""
        self.admin.call(
            "POST",
            inventory.NODES,
            {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": {"plain": "x", **more}}},
        )
        if ready:
            self.ready(name)

    def ready(self, name: str, status: str = "True") -> None:
        condition = {"type": "Ready", "status": status, "reason": "Test", "message": ""}
        patch = {"status": {"conditions": [condition]}}
        self.admin.call(
            "PATCH", f"{inventory.NODES}/{name}/status", patch, kind="application/strategic-merge-patch+json"
        )

    def labels(self, name: str) -> Mapping[str, str]:
        found: dict[str, str] = self.admin.call("GET", f"{inventory.NODES}/{name}")["metadata"]["labels"]
        return {key: value for key, value in found.items() if not key.startswith(("beta.", "kubernetes.io/"))}

    def remove(self, path: str) -> None:
        try:
            self.admin.call("DELETE", path)
        except Refused as refused:
            assert refused.code == 404

    def clean(self) -> None:
        """As a cluster in which objects were applied at some time and nothing has happened since."""
        self.remove(f"{objects.CONFIG_MAPS}/{inventory.NAME}")
        self.remove(f"/apis/coordination.k8s.io/v1/namespaces/kube-system/leases/{lease.NAME}")
        for collection, query in ((inventory.NODES, {}), (approve.REQUESTS, {}), (tokens.SECRETS, tokens.TYPE)):
            self.admin.call("DELETE", collection, query=query)

    def found(self, path: str) -> Json | None:
        try:
            found: Json = self.admin.call("GET", path)
        except Refused as refused:
            assert refused.code == 404
            return None
        return found


def pause(seconds: float) -> bool:
    time.sleep(seconds)
    return True


def eventually(check: Callable[[], bool], what: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, f"it never came about that {what}"
        time.sleep(0.1)


def is_ready(api: Api) -> bool:
    try:
        api.ready()
    except (Refused, OSError):
        return False
    return True


@contextmanager
def begun(folder: Path, binaries: Path, cluster: Cluster) -> Iterator[tuple[Stand, Running]]:
    """A new cluster of one control plane, whose first machine it is: etcd, and an API server that has yet to get ready.
    Yields its output too."""
    machine = Layout(folder / "root", cluster, cluster.nodes[0], binaries)
    secrets = store.open(folder / "secrets", cluster, now=datetime.now(UTC))
    authority = credentials.Authority(
        machine.path("/etc/kubernetes/pki/kubernetes-ca.crt"), machine.path("/etc/kubernetes/pki/kubernetes-ca.key")
    )
    identity = credentials.Identity(authority, folder / "admin.pem", "tester", "system:masters")
    admin = Api(f"https://{machine.localhost}:6443", authority.certificate, identity)
    with machine.running("etcd.service") as etcd:
        etcd.until("ready to serve client requests")
        with machine.running("kube-apiserver.service") as server:
            server.until("Serving securely")
            yield Stand(machine, cluster, secrets, admin, folder), server
