"""The daemon on control planes: what it decides, as a table, and the whole of it against a real API server."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from recipes import node as nodes
from recipes.kit import overlay, store
from recipes.kit.model import Cluster, Node
from tests import samples
from tests.layout import IMAGES, Layout, Running, on_loopback

sys.dont_write_bytecode = True  # the overlays' folder is baked as it is

from controller import approve, credentials, inventory, judge, labels, lease, objects, tokens, work  # noqa: E402
from controller.api import Api, Json, Refused  # noqa: E402
from controller.mirror import Mirror  # noqa: E402

NOW = datetime(2026, 12, 1, tzinfo=UTC)
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


# ---- judging


def document(cluster: Cluster, generation: int = 7, **changes: Any) -> bytes:
    """An inventory as it is baked, with tokens that one can tell by their machine."""
    listed = [
        {
            "name": node.name,
            "role": node.role,
            "addresses": [str(address) for address in node.addresses],
            "tokenId": f"token{place}",
            "labels": dict(node.labels),
            "storage": node.storage,
            "denied": node.denied,
        }
        for place, node in enumerate(cluster.kubelets)
    ]
    told = {"generation": generation, "approval": cluster.approval, "installBy": "2027-02-21T12:00:00Z"}
    return json.dumps({**told, "kubelets": listed, **changes}).encode()


def named(cluster: Cluster, name: str, **changes: Any) -> Cluster:
    """The cluster with one machine changed."""
    return replace(cluster, nodes=tuple(replace(n, **changes) if n.name == name else n for n in cluster.nodes))


INVENTORY = inventory.parse(document(samples.ha()))  # worker-1 is token3 at 192.168.10.21
DENIED = inventory.parse(document(named(samples.ha(), "worker-1", denied=True)))
GROUP = inventory.parse(document(samples.ha(approval="group")))

BY_TOKEN = judge.Request(
    name="node-csr-1",
    signer=CLIENT,
    username="system:bootstrap:token3",
    groups=("system:bootstrappers", "system:authenticated"),
    usages=frozenset(("digital signature", "client auth")),
    pem=request_pem("system:node:worker-1"),
)
RENEWAL = replace(BY_TOKEN, username="system:node:worker-1", groups=("system:nodes", "system:authenticated"))
SERVED = [x509.DNSName("worker-1"), address("192.168.10.21")]
SERVING_REQUEST = replace(
    RENEWAL,
    signer=SERVING,
    usages=frozenset(("digital signature", "server auth")),
    pem=request_pem("system:node:worker-1", sans=SERVED),
)


def verdict(
    request: judge.Request, known: inventory.Inventory = INVENTORY, now: datetime = NOW, **changes: Any
) -> judge.Verdict:
    return judge.judge(replace(request, **changes), known, now)


def test_what_kubelets_ask_for_is_approved() -> None:
    first = verdict(BY_TOKEN)
    assert (first.decision, first.why) == ("approve", "client certificate of worker-1, as baked")
    assert first.pin is not None and first.pin.token_id == "token3" and re.fullmatch("[0-9a-f]{64}", first.pin.key)
    renewed = verdict(RENEWAL)
    assert (renewed.decision, renewed.pin) == ("approve", None)
    assert verdict(SERVING_REQUEST) == judge.Verdict("approve", "serving certificate of worker-1, as baked")


def test_keys_of_other_kinds_too() -> None:
    pem = request_pem("system:node:worker-1", signed_with=rsa.generate_private_key(65537, 2048))
    usages = frozenset(("digital signature", "key encipherment", "client auth"))
    assert verdict(BY_TOKEN, usages=usages, pem=pem).decision == "approve"


def test_the_pin_is_of_the_key_alone() -> None:
    other = verdict(BY_TOKEN, pem=request_pem("system:node:worker-1", signed_with=key())).pin
    again = verdict(BY_TOKEN, pem=request_pem("system:node:worker-1")).pin  # ECDSA signs differently each time
    assert again == verdict(BY_TOKEN).pin != other


@pytest.mark.parametrize("which", [["worker-1"], ["192.168.10.21"]])
def test_a_serving_certificate_may_have_fewer_names(which: list[str]) -> None:
    sans = [name for name in SERVED if str(name.value) in which]
    assert verdict(SERVING_REQUEST, pem=request_pem("system:node:worker-1", sans=sans)).decision == "approve"


BROKEN = request_pem("system:node:worker-1").replace(b"\n-----END", b"\nAAAA\n-----END")
USAGES = BY_TOKEN.usages
URI = x509.UniformResourceIdentifier("spiffe://worker-1")


def forged() -> bytes:
    """A request whose signature was made with another key: the last bytes of another one."""
    ours = base64.b64decode(b"".join(request_pem("system:node:worker-1").splitlines()[1:-1]))
    parsed = x509.load_der_x509_csr(ours)
    broken = ours.replace(parsed.signature, parsed.signature[:-1] + bytes([parsed.signature[-1] ^ 1]))
    encoded = base64.encodebytes(broken)
    return b"-----BEGIN CERTIFICATE REQUEST-----\n" + encoded + b"-----END CERTIFICATE REQUEST-----\n"


@pytest.mark.parametrize(
    ("request_", "changes", "why"),
    [
        # Whose name it is
        (BY_TOKEN, {"pem": request_pem("system:node:worker-2")}, "for the name system:node:worker-2"),
        (BY_TOKEN, {"pem": request_pem("worker-1")}, "for the name worker-1"),
        (BY_TOKEN, {"pem": request_pem("system:node:worker-1\n")}, "for the name"),
        (BY_TOKEN, {"pem": request_pem("system:admin")}, "for the name system:admin"),
        (RENEWAL, {"pem": request_pem("system:node:worker-2")}, "for the name system:node:worker-2"),
        (SERVING_REQUEST, {"pem": request_pem("system:node:worker-2", sans=SERVED)}, "for the name"),
        # Organizations
        (BY_TOKEN, {"pem": request_pem("system:node:worker-1", ["system:masters"])}, "organization system:masters"),
        (BY_TOKEN, {"pem": request_pem("system:node:worker-1", [])}, "organization of nobody"),
        (
            BY_TOKEN,
            {"pem": request_pem("system:node:worker-1", ["system:nodes", "system:masters"])},
            "organization system:nodes, system:masters",
        ),
        (SERVING_REQUEST, {"pem": request_pem("system:node:worker-1", ["x"], sans=SERVED)}, "organization x"),
        (
            BY_TOKEN,
            {"pem": request_pem("system:node:worker-1", more=[x509.NameAttribute(NameOID.COMMON_NAME, "root")])},
            "for the name system:node:worker-1, root",
        ),
        (
            BY_TOKEN,
            {
                "pem": request_pem(
                    "system:node:worker-1", more=[x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "x")]
                )
            },
            "more than a name and an organization",
        ),
        # Alternative names
        (BY_TOKEN, {"pem": request_pem("system:node:worker-1", sans=SERVED)}, "no alternative names"),
        (RENEWAL, {"pem": request_pem("system:node:worker-1", sans=SERVED)}, "no alternative names"),
        (SERVING_REQUEST, {"pem": request_pem("system:node:worker-1")}, "needs an address or a name"),
        (
            SERVING_REQUEST,
            {"pem": request_pem("system:node:worker-1", sans=[*SERVED, address("192.168.10.22")])},
            "192.168.10.22 is no address of worker-1",
        ),
        (
            SERVING_REQUEST,
            {"pem": request_pem("system:node:worker-1", sans=[address("::ffff:192.168.10.21")])},
            "is no address of worker-1",
        ),
        (
            SERVING_REQUEST,
            {"pem": request_pem("system:node:worker-1", sans=[*SERVED, x509.DNSName("kubernetes.default.svc")])},
            "kubernetes.default.svc is not the name worker-1",
        ),
        (
            SERVING_REQUEST,
            {"pem": request_pem("system:node:worker-1", sans=[x509.DNSName("192.168.10.22")])},
            "192.168.10.22 is not the name worker-1",
        ),
        (SERVING_REQUEST, {"pem": request_pem("system:node:worker-1", sans=[*SERVED, URI])}, "of the kind Uniform"),
        (
            SERVING_REQUEST,
            {"pem": request_pem("system:node:worker-1", sans=[*SERVED, x509.RFC822Name("a@worker-1")])},
            "of the kind RFC822Name",
        ),
        # Extensions
        (
            BY_TOKEN,
            {"pem": request_pem("system:node:worker-1", extension=x509.BasicConstraints(ca=True, path_length=None))},
            "extensions that no kubelet asks for: 2.5.29.19",
        ),
        # Usages
        (BY_TOKEN, {"usages": USAGES | {"server auth"}}, "usages that no kubelet has: server auth"),
        (BY_TOKEN, {"usages": USAGES | {"any"}}, "usages that no kubelet has: any"),
        (BY_TOKEN, {"usages": frozenset({"digital signature"})}, "client auth is missing"),
        (SERVING_REQUEST, {"usages": SERVING_REQUEST.usages | {"client auth"}}, "no kubelet has: client auth"),
        (SERVING_REQUEST, {"usages": USAGES}, "server auth is missing"),
        # Who asks
        (BY_TOKEN, {"groups": ("system:authenticated",)}, "not in the group system:bootstrappers"),
        (RENEWAL, {"groups": ("system:authenticated",)}, "not in the group system:nodes"),
        (SERVING_REQUEST, {"groups": ("system:bootstrappers",)}, "not in the group system:nodes"),
        (
            SERVING_REQUEST,
            {"username": BY_TOKEN.username, "groups": BY_TOKEN.groups},
            "a bootstrap token may ask for a client certificate only",
        ),
        # What is no request
        (BY_TOKEN, {"pem": b""}, "not one PEM block"),
        (BY_TOKEN, {"pem": b"x" + BY_TOKEN.pem}, "not one PEM block"),
        (BY_TOKEN, {"pem": BY_TOKEN.pem * 2}, "not one PEM block"),
        (BY_TOKEN, {"pem": BY_TOKEN.pem.replace(b"CERTIFICATE REQUEST", b"CERTIFICATE")}, "not one PEM block"),
        (BY_TOKEN, {"pem": BROKEN}, "cannot be read"),
        (BY_TOKEN, {"pem": forged()}, "signature is wrong"),
    ],
)
def test_what_is_refused(request_: judge.Request, changes: dict[str, Any], why: str) -> None:
    found = verdict(request_, **changes)
    assert (found.decision, found.pin) == ("refuse", None), found.why
    assert why in found.why
    assert found.why.isprintable()


@pytest.mark.parametrize("request_", [BY_TOKEN, RENEWAL, SERVING_REQUEST])
def test_denied_machines_get_nothing(request_: judge.Request) -> None:
    assert verdict(request_, DENIED) == judge.Verdict("refuse", "worker-1 is denied")


def test_tokens_end_and_renewals_do_not() -> None:
    end = INVENTORY.install_by
    assert verdict(BY_TOKEN, now=end - timedelta(seconds=1)).decision == "approve"
    late = verdict(BY_TOKEN, now=end)
    assert (late.decision, late.why) == ("refuse", "worker-1 was to be installed by 2027-02-21T12:00:00+00:00")
    assert verdict(RENEWAL, now=end + timedelta(days=999)).decision == "approve"


@pytest.mark.parametrize(
    ("request_", "username", "why"),
    [
        (BY_TOKEN, "system:bootstrap:tokenx", "the token tokenx is not in the inventory of generation 7"),
        (RENEWAL, "system:node:worker-9", "the node worker-9 is not in the inventory of generation 7"),
        (RENEWAL, "system:node:", "the node  is not in the inventory"),
        (BY_TOKEN, "kubernetes-admin", "only a person may approve this"),
    ],
)
def test_what_a_later_inventory_may_know_is_left_waiting(request_: judge.Request, username: str, why: str) -> None:
    found = verdict(request_, username=username)
    assert found.decision == "wait"
    assert why in found.why


def test_in_group_mode_client_certificates_are_anothers() -> None:
    assert verdict(BY_TOKEN, GROUP).decision == "ignore"
    assert verdict(RENEWAL, GROUP).decision == "ignore"
    assert verdict(SERVING_REQUEST, GROUP).decision == "approve"
    assert verdict(SERVING_REQUEST, GROUP, username=BY_TOKEN.username).decision == "refuse"


def test_only_what_waits_for_one_of_two_signers_is_looked_at() -> None:
    waiting = {"spec": {"signerName": CLIENT}, "status": {}}
    assert approve.undecided(waiting) is waiting
    assert approve.undecided({"spec": {"signerName": "kubernetes.io/kube-apiserver-client"}}) is None
    for kind in ("Approved", "Denied", "Failed"):
        assert approve.undecided({**waiting, "status": {"conditions": [{"type": kind}]}}) is None


# ---- the inventory, labels, the queue


def test_the_inventory_goes_through_a_config_map() -> None:
    made = inventory.config_map(INVENTORY, 6, "42")
    assert made == inventory.config_map(INVENTORY, 6, "42"), "the same bytes"
    assert made["data"] == {"generation": "7", "applied": "6"}
    assert inventory.published(made) == inventory.Published(INVENTORY, 6, "42")
    assert inventory.published(made).generation == 7


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"generation": "8"}},
        {"binaryData": {}},
        {"binaryData": {"inventory.json.gz": "x"}},
        {"binaryData": {"inventory.json.gz": base64.b64encode(b"no gzip").decode()}},
        {"data": {"generation": "7", "applied": "soon"}, "binaryData": {"inventory.json.gz": ""}},
    ],
)
def test_a_config_map_that_cannot_be_read_is_as_good_as_the_oldest(changes: Json) -> None:
    found = inventory.published({**inventory.config_map(INVENTORY, 0, "42"), **changes})
    assert (found.inventory, found.generation, found.applied, found.version) == (None, 0, 0, "42")


def test_the_baked_inventory_is_what_the_daemon_reads(tmp_path: Path) -> None:
    cluster = named(samples.ha(), "worker-2", storage="fast", labels=(("a/b", "c"),), denied=True)
    secrets = store.open(tmp_path / "secrets", cluster, now=NOW)
    read = inventory.read_artifact(bake(tmp_path / "artifact", cluster, cluster.control_planes[0], secrets, 3))
    assert read.inventory.generation == 3
    assert read.inventory.install_by == secrets.install_by
    kubelet = read.inventory.kubelets["worker-2"]
    assert kubelet == read.inventory.by_token[secrets.tokens["worker-2"].id]
    assert kubelet.addresses == frozenset(("192.168.10.22",)) and kubelet.denied
    assert kubelet.labels == {
        "a/b": "c",
        "node-role.kubernetes.io/worker": "",
        "node-restriction.kubernetes.io/storage": "fast",
    }
    assert set(read.tokens) == {secrets.tokens[node.name].id for node in cluster.kubelets if node.name != "worker-2"}


def test_the_inventory_of_the_largest_cluster_fits_into_a_config_map() -> None:
    """A mebibyte is what the API server takes; token ids are what does not compress."""
    workers = [samples.node(f"worker-{i}", "worker", i % 250) for i in range(5000)]
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    told = json.loads(document(samples.ha(nodes=(*samples.ha().nodes[:3], *workers))))
    for place, kubelet in enumerate(told["kubelets"]):
        kubelet["tokenId"] = "".join(letters[place * prime % 36] for prime in (7919, 104729, 1299709, 15485863, 31, 7))
    made = inventory.config_map(inventory.parse(json.dumps(told).encode()), 1)
    assert len(json.dumps(made)) < 1 << 18


@pytest.mark.parametrize(
    ("has", "wanted", "patch"),
    [
        ({}, {"a": ""}, {"a": ""}),
        ({"a": ""}, {"a": ""}, {}),
        ({"a": "1", "other": "x"}, {"a": "2"}, {"a": "2"}),
        ({inventory.STORAGE: "fast"}, {"a": ""}, {"a": "", inventory.STORAGE: None}),
        ({inventory.STORAGE: "fast"}, {inventory.STORAGE: "slow"}, {inventory.STORAGE: "slow"}),
    ],
)
def test_labels_are_patched_where_they_differ(has: Json, wanted: Json, patch: Json) -> None:
    assert labels.differing(has, wanted) == patch


def test_the_queue_holds_a_name_once_and_brings_the_sooner_time() -> None:
    queue = work.Work("test")
    queue.add("later", 0.2)
    queue.add("a")
    queue.add("a", 5)
    queue.add("a")
    started = time.monotonic()
    assert [queue.take(), queue.take()] == ["a", "later"]
    assert 0.15 < time.monotonic() - started < 2
    queue.add("b", 5)
    queue.add("b")
    assert queue.take() == "b"


# ---- the whole daemon


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
    def daemon(self, artifact: Path, *more: str, node: str = "control-1") -> Iterator[Running]:
        """The unit's real command line, here."""
        runtime = self.folder / f"runtime-{node}"
        log = self.folder / f"{node}-{time.monotonic_ns()}.log"
        command = [sys.executable, *self.machine.command("nodebake-controller.service")]
        command += [f"--kubectl={self.machine.binaries}/kubectl", f"--authority-key={self.authority.key}"]
        command += [f"--runtime={runtime}", f"--artifact={artifact}", f"--node={node}", "--retire-after=1", *more]
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
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
        return self._or_none(f"{tokens.SECRETS}/bootstrap-token-{self.secrets.tokens[node].id}")

    def brought(self) -> set[str]:
        """The machines whose tokens the cluster has."""
        listed = self.admin.call("GET", tokens.SECRETS, query=tokens.TYPE)["items"]
        names = {token.id: node for node, token in self.secrets.tokens.items()}
        return {names[item["metadata"]["name"].removeprefix("bootstrap-token-")] for item in listed}

    def published(self) -> inventory.Published | None:
        found = self._or_none(f"{objects.CONFIG_MAPS}/{inventory.NAME}")
        return inventory.published(found) if found is not None else None

    def applied(self, generation: int, seconds: float = 60) -> None:
        def check() -> bool:
            found = self.published()
            return found is not None and found.generation == found.applied == generation

        eventually(check, f"generation {generation} is applied", seconds)

    def register(self, name: str, ready: bool = False, **labelled: str) -> None:
        """A Node, as a kubelet registers it."""
        self.admin.call(
            "POST",
            labels.NODES,
            {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": {"plain": "x", **labelled}}},
        )
        if ready:
            self.ready(name)

    def ready(self, name: str, status: str = "True") -> None:
        condition = {"type": "Ready", "status": status, "reason": "Test", "message": ""}
        patch = {"status": {"conditions": [condition]}}
        self.admin.call("PATCH", f"{labels.NODES}/{name}/status", patch, kind="application/strategic-merge-patch+json")

    def labels(self, name: str) -> Mapping[str, str]:
        found: dict[str, str] = self.admin.call("GET", f"{labels.NODES}/{name}")["metadata"]["labels"]
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
        for collection, query in ((labels.NODES, {}), (approve.REQUESTS, {}), (tokens.SECRETS, tokens.TYPE)):
            self.admin.call("DELETE", collection, query=query)

    def _or_none(self, path: str) -> Json | None:
        try:
            found: Json = self.admin.call("GET", path)
        except Refused as refused:
            assert refused.code == 404
            return None
        return found


def eventually(check: Callable[[], bool], what: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, f"it never came about that {what}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def running_plane(binaries: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    plane = samples.node("control-1", "control-plane", 11, runs_etcd=True)
    workers = [samples.node(f"worker-{i}", "worker", 20 + i) for i in (1, 2, 3, 4)]
    cluster = on_loopback(samples.ha(nodes=(plane, *workers)), os.getpid() + 7)
    folder = tmp_path_factory.mktemp("plane")
    machine = Layout(folder / "root", cluster, cluster.nodes[0], binaries)
    secrets = store.open(folder / "secrets", cluster, now=datetime.now(UTC))
    authority = credentials.Authority(
        machine.path("/etc/kubernetes/pki/kubernetes-ca.crt"), machine.path("/etc/kubernetes/pki/kubernetes-ca.key")
    )
    identity = credentials.Identity(authority, folder / "admin.pem", "tester", "system:masters")
    admin = Api(f"https://{machine.localhost}:6443", authority.certificate, identity)
    with ExitStack() as stack:
        etcd = stack.enter_context(machine.running("etcd.service"))
        etcd.until("ready to serve client requests")
        server = stack.enter_context(machine.running("kube-apiserver.service"))
        server.until_true(lambda: is_ready(admin), "ready")
        manager = stack.enter_context(machine.running("kube-controller-manager.service"))
        manager.until(r"[Ss]uccessfully acquired lease")
        yield Stand(machine, cluster, secrets, admin, folder)


def is_ready(api: Api) -> bool:
    try:
        api.ready()
    except (Refused, OSError):
        return False
    return True


@pytest.fixture(scope="module")
def first_start(running_plane: Stand) -> str:
    """What the first daemon says that a new cluster sees, which knows nothing of its rights."""
    with running_plane.daemon(running_plane.artifact(1)) as running:
        running_plane.applied(1)
        running.until(r"inventory: the cluster holds generation 1")
        return running.said


@pytest.fixture
def plane(running_plane: Stand, first_start: str) -> Stand:
    running_plane.clean()
    return running_plane


def test_a_new_cluster_gets_its_objects(running_plane: Stand, first_start: str) -> None:
    lines = first_start.splitlines()
    assert "cluster objects: generation 1 is applied" in lines
    assert not [line for line in lines if "trying again" in line and "namespaces" not in line], first_start
    coredns = running_plane.admin.call("GET", "/apis/apps/v1/namespaces/kube-system/deployments/coredns")
    assert {each["manager"] for each in coredns["metadata"]["managedFields"]} >= {"nodebake"}
    assert not list((running_plane.folder / "runtime-control-1").glob("apply*")), "the privileged certificate is gone"
