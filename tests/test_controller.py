"""The daemon on control planes: what it decides, as a table, and the whole of it against a real API server."""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import os
import random
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from recipes.kit import store
from recipes.kit.model import Cluster
from tests import samples
from tests.layout import on_loopback
from tests.plane import (
    CLIENT,
    KEY,
    SERVING,
    PrivateKey,
    Stand,
    address,
    bake,
    begun,
    eventually,
    is_ready,
    key,
    pause,
    request_pem,
)

sys.dont_write_bytecode = True  # the overlays' folder is baked as it is

from controller import approve, credentials, inventory, judge, labels, lease, objects, tokens, work  # noqa: E402
from controller.api import MERGE, Api, Json, Refused  # noqa: E402
from controller.mirror import Mirror  # noqa: E402

NOW = datetime(2026, 12, 1, tzinfo=UTC)
RBAC = "/apis/rbac.authorization.k8s.io/v1"
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
    return replace(cluster, nodes=tuple(n._replace(**changes) if n.name == name else n for n in cluster.nodes))


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


def packed(**changes: Any) -> str:
    return base64.b64encode(gzip.compress(document(samples.ha(), **changes))).decode()


def verdict(
    request: judge.Request, known: inventory.Inventory = INVENTORY, now: datetime = NOW, **changes: Any
) -> judge.Verdict:
    return judge.judge(replace(request, **changes), known, now)


def test_what_kubelets_ask_for_is_approved() -> None:
    first = verdict(BY_TOKEN)
    assert (first.decision, first.why) == ("approve", "client certificate of worker-1, as baked")
    assert first.pin is not None and re.fullmatch("[0-9a-f]{64}", first.pin.key)
    assert (first.pin.token_id, first.pin.node) == ("token3", "worker-1")
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
    end = INVENTORY.kubelets["worker-1"].install_by
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
        {"binaryData": {"inventory.json.gz": base64.b64encode(gzip.compress(b"[]")).decode()}},
        {"binaryData": {"inventory.json.gz": base64.b64encode(gzip.compress(b"[]" * 99)[:-12]).decode()}},
        {"binaryData": {"inventory.json.gz": base64.b64encode(gzip.compress(b"")[:10] + b"x" * 99).decode()}},
        {"binaryData": {"inventory.json.gz": packed(installBy="2027-02-21T12:00:00")}},
        {"binaryData": {"inventory.json.gz": packed(approval="anybody")}},
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
    assert {kubelet.install_by for kubelet in read.inventory.kubelets.values()} == {secrets.install_by}
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
    assert time.monotonic() - started < 3


def test_no_name_waits_while_ever_more_come() -> None:
    queue, arrived = work.Work("test"), itertools.count()
    queue.add_all(f"{next(arrived)}" for _ in range(50))
    overtaken = []
    for taken in range(2_000):
        overtaken.append(taken - int(queue.take()))
        queue.add(f"{next(arrived)}")
    assert max(overtaken) < 100


def test_several_take_the_same_names_in_another_order() -> None:
    orders = []
    for _ in range(2):
        queue = work.Work("test")
        queue.add_all(map(str, range(1_000)))
        orders.append([queue.take() for _ in range(1_000)])
    assert sorted(orders[0]) == sorted(orders[1])
    assert sum(one == other for one, other in zip(*orders, strict=True)) < 100


class Scripted:
    """An API server that answers lists and watches with what it was given, and then is gone."""

    def __init__(self, lists: Iterable[Json], watches: Iterable[list[tuple[str, Json]] | Exception]) -> None:
        self.lists, self.watches = iter(lists), iter(watches)
        self.asked: list[str] = []

    def call(self, method: str, path: str, *, query: Mapping[str, str], accept: str) -> Json:
        self.asked.append("list" + (f" from {query['continue']}" if "continue" in query else ""))
        return next(self.lists)

    def watch(self, path: str, query: Mapping[str, str], accept: str) -> Iterator[tuple[str, Json]]:
        self.asked.append(f"watch from {query['resourceVersion']}")
        for events in self.watches:
            if isinstance(events, Exception):
                raise events
            return iter(events)
        raise SystemExit


def thing(name: str, version: int, **fields: Any) -> Json:
    return {"metadata": {"name": name, "resourceVersion": str(version)}, **fields}


def page(version: int, *items: Json, follow: str = "") -> Json:
    return {"metadata": {"resourceVersion": str(version), "continue": follow}, "items": list(items)}


def test_a_mirror_lists_once_and_again_only_when_its_version_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    server = Scripted(
        [page(5, thing("a", 1, x=1), follow="here"), page(5, thing("b", 2, x=2)), page(20, thing("b", 2, x=2))],
        [
            [("MODIFIED", thing("a", 6, x=9)), ("ADDED", thing("c", 7, x=None)), ("BOOKMARK", thing("", 8))],
            ConnectionError("away"),
            [("DELETED", thing("b", 9, x=2)), ("ADDED", thing("b", 10, x=2)), ("MODIFIED", thing("b", 11))],
            Refused(410, "too old"),
            [],
        ],
    )
    seen: list[tuple[str, int | None, int | None]] = []
    complete: list[str] = []
    copy: Mirror[int] = Mirror(
        "things",
        cast(Api, server),
        "/things",
        lambda item: cast("int | None", item["x"]),  # None is not kept, a missing one cannot be read
        lambda *change: seen.append(change),
        lambda: complete.append("list"),
    )
    with pytest.raises(SystemExit):
        copy.run()
    assert server.asked == [
        *("list", "list from here", "watch from 5", "watch from 8", "watch from 8", "watch from 11"),
        *("list", "watch from 20", "watch from 20"),
    ]
    assert seen == [("a", None, 1), ("b", None, 2), ("a", 1, 9), ("b", 2, None), ("b", None, 2), ("a", 9, None)]
    assert (copy.names(), copy.get("b"), complete) == (["b"], 2, ["list", "list"])


# ---- the whole daemon


@pytest.fixture(scope="module")
def started(binaries: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stand, str]]:
    """A new cluster, and what its first daemon says, which begins before the API server is ready."""
    plane = samples.node("control-1", "control-plane", 11, runs_etcd=True)
    workers = [samples.node(f"worker-{i}", "worker", 20 + i) for i in (1, 2, 3, 4)]
    cluster = on_loopback(samples.ha(nodes=(plane, *workers)), os.getpid() + 7)
    folder = tmp_path_factory.mktemp("plane")
    with begun(folder, binaries, cluster) as (stand, server):
        with stand.daemon(stand.artifact(1)) as running:
            server.until_true(lambda: is_ready(stand.admin), "ready")
            stand.applied(1)
            running.until(r"inventory: the cluster holds generation 1")
            said = running.said
        with stand.machine.running("kube-controller-manager.service") as manager:
            manager.until(r"[Ss]uccessfully acquired lease")
            yield stand, said


@pytest.fixture
def plane(started: tuple[Stand, str]) -> Stand:
    stand, _ = started
    stand.clean()
    return stand


def test_a_new_cluster_gets_its_objects(started: tuple[Stand, str]) -> None:
    stand, said = started
    lines = said.splitlines()
    assert "cluster objects: generation 1 is applied" in lines
    # One that is a moment old may lack its own namespaces.
    assert not [line for line in lines if "trying again" in line and "namespaces" not in line], said
    binding = stand.admin.call("GET", f"{RBAC}/clusterrolebindings/nodebake:node-bootstrapper")
    coredns = stand.admin.call("GET", "/apis/apps/v1/namespaces/kube-system/deployments/coredns")
    for one in (binding, coredns):
        assert {(each["manager"], each["operation"]) for each in one["metadata"]["managedFields"]} >= {
            ("nodebake", "Apply")
        }
    assert not list((stand.folder / "runtime-control-1").glob("apply*")), "the privileged certificate is gone"


def kubelets_request(stand: Stand, node: str, signed_with: PrivateKey, serving: bool = False) -> bytes:
    """As the kubelet of a machine asks."""
    addresses = next(each for each in stand.cluster.nodes if each.name == node).addresses
    sans = [x509.DNSName(node), *map(x509.IPAddress, addresses)] if serving else []
    return request_pem(f"system:node:{node}", sans=sans, signed_with=signed_with)


def digest(signed_with: PrivateKey) -> str:
    pem = request_pem("x", signed_with=signed_with)
    asked = judge._parse(pem)
    assert not isinstance(asked, str)
    return judge._digest(asked)


def test_a_machine_joins(plane: Stand) -> None:
    with plane.daemon(plane.artifact(1)) as running:
        eventually(lambda: plane.brought() == {node.name for node in plane.cluster.nodes}, "every machine has a token")
        plane.ask("first", kubelets_request(plane, "worker-1", KEY), token=plane.bearer("worker-1"))
        assert plane.outcome("first") == ("Approved", "client certificate of worker-1, as baked")
        client = plane.certificate("first")
        authority = x509.load_pem_x509_certificate(plane.authority.certificate.read_bytes())
        client.verify_directly_issued_by(authority)
        assert client.public_key() == KEY.public_key()
        assert client.subject.rfc4514_string() == "CN=system:node:worker-1,O=system:nodes"

        plane.ask("serving", kubelets_request(plane, "worker-1", KEY, serving=True), node="worker-1", signer=SERVING)
        assert plane.outcome("serving") == ("Approved", "serving certificate of worker-1, as baked")
        served = plane.certificate("serving")
        served.verify_directly_issued_by(
            x509.load_pem_x509_certificate((plane.pki / "kubelet-serving-ca.crt").read_bytes())
        )
        names = served.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == ["worker-1"]

        plane.ask("renewal", kubelets_request(plane, "worker-1", key()), node="worker-1")
        assert plane.outcome("renewal") == ("Approved", "client certificate of worker-1, as baked")
        for name, who in (("first", f"bootstrap:{plane.secrets.tokens['worker-1'].id}"), ("renewal", "node:worker-1")):
            running.until(rf"(?m)^request {name} of system:{who}: approved: client certificate of worker-1, as baked$")


def test_what_no_kubelet_asks_for_is_refused_with_its_reason(plane: Stand) -> None:
    bad: dict[str, tuple[bytes, dict[str, Any], str]] = {
        "anothers-name": (request_pem("system:node:worker-2"), {}, "for the name system:node:worker-2"),
        "organization": (request_pem("system:node:worker-1", ["x"]), {}, "for the organization x"),
        "usages": (
            request_pem("system:node:worker-1"),
            {"usages": ["digital signature", "client auth", "server auth"]},
            "usages that no kubelet has: server auth",
        ),
        "sans": (kubelets_request(plane, "worker-1", KEY, serving=True), {}, "has no alternative names"),
        "by-token": (
            kubelets_request(plane, "worker-1", KEY, serving=True),
            {"signer": SERVING},
            "a bootstrap token may ask for a client certificate only",
        ),
        "foreign-address": (
            request_pem("system:node:worker-1", sans=[x509.DNSName("worker-1"), address("192.0.2.1")]),
            {"signer": SERVING, "token": None, "node": "worker-1"},
            "192.0.2.1 is no address of worker-1",
        ),
    }
    with plane.daemon(plane.artifact(1)) as running:
        eventually(lambda: "worker-1" in plane.brought(), "it has a token")
        for name, (pem, how, _) in bad.items():
            plane.ask(name, pem, **{"token": plane.bearer("worker-1"), **how})
        for name, (_, _, why) in bad.items():
            decision, told = plane.outcome(name)
            assert (decision, why in told) == ("Denied", True), told
            running.until(rf"request {name} of system:\S+: refused: .*{re.escape(why)}", 5)
        secret = plane.secret("worker-1")
        assert secret is not None and approve.FIRST_KEY not in secret["metadata"].get("annotations", {})

        plane.ask("good", kubelets_request(plane, "worker-1", KEY), token=plane.bearer("worker-1"))
        assert plane.outcome("good")[0] == "Approved"
        plane.ask("second-key", kubelets_request(plane, "worker-1", key()), token=plane.bearer("worker-1"))
        decision, told = plane.outcome("second-key")
        assert decision == "Denied" and "was first used with the key" in told and digest(KEY)[:16] in told
        assert "it is the first one's" in told
        plane.ask("first-key-again", kubelets_request(plane, "worker-1", KEY), token=plane.bearer("worker-1"))
        assert plane.outcome("first-key-again")[0] == "Approved"
        plane.ask("stranger", request_pem("system:node:worker-9"), node="worker-9")
        running.until(
            r"request stranger of system:node:worker-9: left waiting: the node worker-9 is not in the inventory of"
            r" generation 1; if it shall join, bake the cluster"
        )
        assert plane.request("stranger").get("status", {}) == {}


def test_what_comes_of_a_token_after_its_time(plane: Stand) -> None:
    """Its Secret is gone, or installBy has passed, while a request that was made with it still waits."""
    late = replace(plane.secrets, install_by=datetime.now(UTC).replace(microsecond=0) - timedelta(hours=1))
    artifact = plane.artifact(2, secrets=late)
    secrets = {each["metadata"]["name"]: each for each in inventory.read_artifact(plane.artifact(1)).tokens.values()}
    for name in ("worker-1", "worker-2"):
        plane.admin.call("POST", tokens.SECRETS, secrets[f"bootstrap-token-{plane.secrets.tokens[name].id}"])
        eventually(lambda name=name: plane.can_ask(f"of-{name}", name), "the token is known")  # type: ignore[misc]
    plane.register("worker-1")
    plane.remove(f"{tokens.SECRETS}/bootstrap-token-{plane.secrets.tokens['worker-1'].id}")
    with plane.daemon(plane.artifact(1)) as running:
        decision, told = plane.outcome("of-worker-1", 60)
        assert (decision, told.endswith("was retired, or its time is over")) == ("Denied", True)
        assert plane.outcome("of-worker-2")[0] == "Approved"
        assert plane.brought() == {"control-1", "worker-2", "worker-3", "worker-4"}, "a Node needs none"
        # The API server remembers for some seconds that it took a token.
        names = (f"retired-{i}" for i in range(99))
        asked = list(itertools.takewhile(lambda name: pause(0.5) and plane.can_ask(name, "worker-1"), names))
        assert len(asked) < 60 and {plane.outcome(name)[0] for name in asked} <= {"Denied"}
        plane.ask("waits", kubelets_request(plane, "worker-3", KEY), token=plane.bearer("worker-3"))
        assert plane.outcome("waits")[0] == "Approved"
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(10) == 0
    plane.ask("too-late", kubelets_request(plane, "worker-2", KEY), token=plane.bearer("worker-2"))
    plane.remove(f"{tokens.SECRETS}/bootstrap-token-{plane.secrets.tokens['worker-4'].id}")
    with plane.daemon(artifact):
        decision, told = plane.outcome("too-late", 60)
        assert (decision, "worker-2 was to be installed by" in told) == ("Denied", True)
        plane.applied(2)
        assert plane.brought() == {"control-1", "worker-2", "worker-3"}, "none is brought any more"
    with plane.daemon(plane.artifact(1)) as running:  # whose Secrets say that there is time
        running.until("the cluster is at generation 2")
        running.until("inventory: the cluster holds generation 2")
        time.sleep(1)
        assert plane.brought() == {"control-1", "worker-2", "worker-3"}


def test_a_denied_machine_gets_nothing_and_loses_its_token(plane: Stand) -> None:
    denied = named(plane.cluster, "worker-1", denied=True)
    with plane.daemon(plane.artifact(1)) as running:
        eventually(lambda: "worker-1" in plane.brought(), "it has a token")
        running.process.kill()
    plane.ask("of-denied", kubelets_request(plane, "worker-1", KEY), token=plane.bearer("worker-1"))
    plane.ask("renewal-of-denied", kubelets_request(plane, "worker-1", KEY), node="worker-1")
    plane.ask("served-of-denied", kubelets_request(plane, "worker-1", KEY, True), node="worker-1", signer=SERVING)
    plane.ask("of-other", kubelets_request(plane, "worker-2", KEY), node="worker-2")
    with plane.daemon(plane.artifact(2, denied)) as running:
        for name in ("of-denied", "renewal-of-denied", "served-of-denied"):
            assert plane.outcome(name, 60) == ("Denied", "worker-1 is denied")
        assert plane.outcome("of-other")[0] == "Approved"
        eventually(lambda: plane.secret("worker-1") is None, "its token is gone")
        running.until(rf"token {plane.secrets.tokens['worker-1'].id} of worker-1: deleted, for it is denied")
    assert plane.brought() == {"control-1", "worker-2", "worker-3", "worker-4"}


def test_a_machine_that_was_rekeyed_loses_its_old_token(plane: Stand) -> None:
    """Also where a daemon that has an older artifact may see the new token first."""
    anew = store.Token("newone", "0123456789abcdef")
    rekeyed = replace(plane.secrets, tokens={**plane.secrets.tokens, "worker-1": anew})
    path = {name: f"{tokens.SECRETS}/{tokens.PREFIX}{token.id}" for name, token in plane.secrets.tokens.items()}
    path |= {"new": f"{tokens.SECRETS}/{tokens.PREFIX}newone", "a person's": f"{tokens.SECRETS}/{tokens.PREFIX}people"}
    mine = {"metadata": {"name": "bootstrap-token-people"}, "type": "bootstrap.kubernetes.io/token"}
    plane.admin.call("POST", tokens.SECRETS, {"apiVersion": "v1", "kind": "Secret", **mine})
    with plane.daemon(plane.artifact(1), node="control-2"):
        eventually(lambda: all(plane.found(path[f"worker-{i}"]) for i in (1, 2)), "they have tokens")
        with plane.daemon(plane.artifact(2, secrets=rekeyed)):
            eventually(lambda: plane.found(path["worker-1"]) is None, "the old one goes")
            eventually(lambda: plane.found(path["new"]) is not None, "the new one comes")
            time.sleep(1)
            assert all(plane.found(path[one]) is not None for one in ("new", "worker-2", "a person's"))


def test_three_daemons_and_two_keys_for_each_token(plane: Stand) -> None:
    """Whoever looks first decides, and all the others agree with him."""
    artifact = plane.artifact(1)
    machines = [f"worker-{i}" for i in (1, 2, 3, 4)]
    with ExitStack() as stack:
        daemons = [stack.enter_context(plane.daemon(artifact, node=f"control-{i}")) for i in (1, 2, 3)]
        for running in daemons:
            running.until("the cluster holds generation 1")
        eventually(lambda: plane.brought() >= set(machines), "they have tokens")
        keys = {(name, which): key() for name in machines for which in "ab"}
        senders = [
            threading.Thread(
                target=plane.ask,
                args=(f"{name}-{which}", kubelets_request(plane, name, keys[name, which])),
                kwargs={"token": plane.bearer(name)},
            )
            for name, which in keys
        ]
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join()
        outcomes = {key: plane.outcome("-".join(key))[0] for key in keys}
        time.sleep(1)  # a second look of one of them would come by now
        for name in machines:
            assert sorted(outcomes[name, which] for which in "ab") == ["Approved", "Denied"]
            winner = "a" if outcomes[name, "a"] == "Approved" else "b"
            secret = plane.secret(name)
            assert secret is not None
            assert secret["metadata"]["annotations"][approve.FIRST_KEY] == digest(keys[name, winner])

        def told(pattern: str) -> int:
            return sum(len(re.findall(pattern, running.said)) for running in daemons)

        eventually(lambda: told(r": (?:approv|refus)ed: ") >= len(keys), "each decision is told")
        assert told(r": (?:approv|refus)ed: ") == len(keys), "each was decided once"
        eventually(lambda: told(r": brought, until") >= 5, "each token that was brought is told")
        assert told(r": brought, until") == 5, "and was brought once"


def test_an_older_artifact_applies_nothing_and_judges_by_the_newer_inventory(plane: Stand) -> None:
    newer = named(plane.cluster, "worker-1", denied=True)
    with plane.daemon(plane.artifact(5, newer)) as running:
        plane.applied(5)
        running.process.kill()
    held = plane.published()
    with plane.daemon(plane.artifact(4), "--kubectl=/nonexistent", node="control-2") as running:
        running.until(
            r"the cluster is at generation 5, this machine's artifact at 4: it applies nothing, and judges by the"
            r" cluster's inventory"
        )
        eventually(lambda: plane.brought() == {"control-1", "worker-2", "worker-3", "worker-4"}, "by the newer one")
        plane.ask("denied-by-now", kubelets_request(plane, "worker-1", KEY), node="worker-1")
        assert plane.outcome("denied-by-now") == ("Denied", "worker-1 is denied")
    assert plane.published() == held, "nothing was written"


def test_a_control_plane_whose_artifact_is_broken_judges_by_the_clusters_inventory(plane: Stand) -> None:
    with plane.daemon(plane.artifact(1)) as running:
        plane.applied(1)
        eventually(lambda: "worker-1" in plane.brought(), "it has a token")
        running.process.kill()
    broken = plane.artifact(2)
    (broken / "objects" / "90-tokens.yaml").write_text("[]")
    with plane.daemon(broken) as running:
        running.until(r"cluster objects: the artifact in \S+ cannot be read: ValueError; trying again")
        assert plane.can_ask("of-broken", "worker-1")
        assert plane.outcome("of-broken")[0] == "Approved"


def test_a_worker_is_added_to_a_running_cluster_by_two_objects(plane: Stand) -> None:
    """Its token and the inventory; no control plane has the artifact that they come from."""
    extra = samples.node("worker-5", "worker", 25)
    more = replace(plane.cluster, nodes=(*plane.cluster.nodes, extra))
    secrets = store.open(plane.folder / "secrets", more, now=datetime.now(UTC))
    made = inventory.read_artifact(plane.artifact(2, more, secrets))
    pem = request_pem("system:node:worker-5")
    with plane.daemon(plane.artifact(1)):
        plane.applied(1)
        plane.admin.call("POST", tokens.SECRETS, made.tokens[secrets.tokens["worker-5"].id])
        eventually(lambda: plane.can_ask("early", "worker-5", secrets), "the token is known")
        time.sleep(1)
        assert plane.request("early").get("status", {}) == {}, "the inventory does not know it yet"
        whole = inventory.config_map(made.inventory, 0)
        patch = {"data": {"generation": "2"}, "binaryData": whole["binaryData"]}
        plane.admin.call("PATCH", f"{objects.CONFIG_MAPS}/{inventory.NAME}", patch, kind=MERGE)
        assert plane.outcome("early")[0] == "Approved"
        assert plane.certificate("early").public_key() == x509.load_pem_x509_csr(pem).public_key()
    held = plane.published()
    assert held is not None and (held.generation, held.applied) == (2, 1), (
        "so that the artifact is applied when it comes"
    )


def test_a_reinstall_begins_with_deleting_the_node(plane: Stand) -> None:
    with plane.daemon(plane.artifact(1)) as running:
        eventually(lambda: plane.brought() >= {"worker-1", "worker-2"}, "they have tokens")
        for name in ("worker-1", "worker-2"):
            plane.ask(f"{name}-first", kubelets_request(plane, name, KEY), token=plane.bearer(name))
            assert plane.outcome(f"{name}-first")[0] == "Approved"
        # worker-1 joins wholly, worker-2 is taken back before it is Ready.
        before = plane.secret("worker-2")
        plane.register("worker-1", ready=True)
        plane.register("worker-2")
        eventually(lambda: plane.secret("worker-1") is None, "the token of a Ready node is retired")
        running.until(r"of worker-1: deleted, for it has joined")
        assert plane.secret("worker-2") is not None, "that of one that is not is kept"
        for name in ("worker-1", "worker-2"):
            plane.remove(f"{inventory.NODES}/{name}")
            eventually(lambda name=name: is_fresh(plane.secret(name)), f"{name} has a fresh token")  # type: ignore[misc]
            new = key()
            eventually(lambda name=name, new=new: plane.can_ask(f"{name}-again", name, signed_with=new), "it is known")  # type: ignore[misc]
            assert plane.outcome(f"{name}-again")[0] == "Approved"
        after = plane.secret("worker-2")
        assert before is not None and after is not None and before["metadata"]["uid"] != after["metadata"]["uid"]


def is_fresh(secret: Json | None) -> bool:
    return secret is not None and approve.FIRST_KEY not in secret["metadata"].get("annotations", {})


def test_a_node_that_is_not_ready_for_long_keeps_its_token(plane: Stand) -> None:
    with plane.daemon(plane.artifact(1), "--retire-after=3"):
        eventually(lambda: "worker-1" in plane.brought(), "it has a token")
        plane.register("worker-1", ready=True)
        time.sleep(1.5)
        plane.ready("worker-1", "False")
        time.sleep(2.5)
        assert plane.secret("worker-1") is not None
        plane.ready("worker-1")
        eventually(lambda: plane.secret("worker-1") is None, "it is retired")


# ---- objects


def recording(stand: Stand, name: str) -> Path:
    """A kubectl that writes down when it is called."""
    program = stand.folder / f"kubectl-{name}"
    program.write_text(f'#!/bin/sh\necho "$@" >>{program}.calls\nexec {stand.machine.binaries}/kubectl "$@"\n')
    program.chmod(0o755)
    return program


def stuck(stand: Stand, name: str) -> tuple[Path, Path]:
    """A kubectl that never ends, and a file with its process id."""
    program = recording(stand, name)
    own_id = stand.folder / f"{name}.pid"
    program.write_text(f"#!/bin/sh\necho $$ >{own_id}\necho $@ >>{program}.calls\nexec sleep 600\n")
    return program, own_id


def calls(program: Path) -> int:
    file = Path(f"{program}.calls")
    return len(file.read_text().splitlines()) if file.exists() else 0


def test_objects_are_applied_once_and_again_with_a_newer_artifact(plane: Stand) -> None:
    kubectl = recording(plane, "once")
    artifact = plane.artifact(1)
    with plane.daemon(artifact, f"--kubectl={kubectl}"):
        plane.applied(1)
    with plane.daemon(artifact, f"--kubectl={kubectl}") as running:
        running.until("generation 1 is applied")
        assert calls(kubectl) == 1
        newer = plane.artifact(2)
        for name in ("objects/00-rights.yaml", "objects/10-cluster.yaml", "objects/90-tokens.yaml", "inventory.json"):
            (newer / name).replace(artifact / name)
        plane.applied(2)
        assert calls(kubectl) == 2
        running.until(r"the artifact on this machine is generation 2\n(.*\n)*.*generation 2 is applied")
    text = Path(f"{kubectl}.calls").read_text()
    assert "--server-side" in text and "PRIVATE" not in text


CRD = """
apiVersion: example.com/v1
kind: Widget
metadata: {name: one, namespace: kube-system}
---
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: widgets.example.com}
spec:
  group: example.com
  scope: Namespaced
  names: {kind: Widget, plural: widgets}
  versions:
    - {name: v1, served: true, storage: true, schema: {openAPIV3Schema: {type: object}}}
"""
ORPHAN = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: x, namespace: nowhere}\n"


def test_a_definition_and_its_object_in_one_artifact(plane: Stand) -> None:
    extra = plane.folder / "crd.yaml"
    extra.write_text(CRD)
    with plane.daemon(plane.artifact(1, replace(plane.cluster, extra_objects=(extra,)))) as running:
        plane.applied(1)
        assert "kubectl could not apply everything" in running.said
    assert plane.admin.call("GET", "/apis/example.com/v1/namespaces/kube-system/widgets/one")["kind"] == "Widget"
    plane.remove("/apis/apiextensions.k8s.io/v1/customresourcedefinitions/widgets.example.com")


def test_an_object_that_is_never_taken_keeps_no_machine_from_joining(plane: Stand) -> None:
    extra = plane.folder / "orphan.yaml"
    extra.write_text(ORPHAN)
    with plane.daemon(plane.artifact(1, replace(plane.cluster, extra_objects=(extra,)))) as running:
        running.until(r'kubectl could not apply everything: .*namespaces "nowhere" not found; trying again')
        eventually(lambda: "worker-1" in plane.brought(), "it has a token")
        plane.ask("joins", kubelets_request(plane, "worker-1", KEY), token=plane.bearer("worker-1"))
        assert plane.outcome("joins")[0] == "Approved"
        held = plane.published()
        assert held is not None and (held.generation, held.applied) == (1, 0)
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "nowhere"}}
        plane.admin.call("POST", "/api/v1/namespaces", namespace)
        plane.applied(1, 90)
        running.until("cluster objects: works again")


RIGHTS = (
    f"{RBAC}/clusterrolebindings/nodebake:controller",
    f"{RBAC}/namespaces/kube-system/rolebindings/nodebake:controller",
)


def test_machines_join_while_other_objects_are_being_applied(plane: Stand) -> None:
    slow, own_id = stuck(plane, "slow")
    bootstrapper = f"{RBAC}/clusterrolebindings/nodebake:node-bootstrapper"
    for path in (*RIGHTS, bootstrapper):
        plane.remove(path)
    with plane.daemon(plane.artifact(1), f"--kubectl={slow}"):
        eventually(lambda: "worker-1" in plane.brought(), "it has a token")
        eventually(lambda: plane.can_ask("early", "worker-1"), "the token is known, and it may ask")
        assert plane.outcome("early") == ("Approved", "client certificate of worker-1, as baked")
        assert calls(slow) == 1
        held = plane.published()
        assert held is not None and (held.generation, held.applied) == (1, 0)
    os.kill(int(own_id.read_text()), signal.SIGKILL)


def test_rights_that_were_taken_away_are_applied_again(plane: Stand) -> None:
    artifact = plane.artifact(1)
    with plane.daemon(artifact):
        plane.applied(1)
    binding, role = RIGHTS
    plane.remove(binding)
    plane.remove(role)
    with plane.daemon(artifact):
        eventually(lambda: None not in (plane.found(binding), plane.found(role)), "they are back", 60)


def test_a_control_plane_that_was_killed_while_applying(plane: Stand) -> None:
    """It finds its lease again at once; another one waits until that is over."""
    kubectl, own_id = stuck(plane, "stuck")
    artifact = plane.artifact(1)

    def kill_one(node: str) -> None:
        count = calls(kubectl)
        with plane.daemon(artifact, f"--kubectl={kubectl}", node=node) as running:
            eventually(lambda: calls(kubectl) > count, "it applies", 60)
            assert (plane.folder / f"runtime-{node}" / "apply.pem").stat().st_mode & 0o777 == 0o600
            running.process.kill()
        os.kill(int(own_id.read_text()), signal.SIGKILL)  # as systemd does with what is left of a unit

    kill_one("control-1")
    held = plane.published()
    assert held is not None and (held.generation, held.applied) == (1, 0)
    assert (plane.folder / "runtime-control-1" / "apply.pem").exists()
    started = time.monotonic()
    with plane.daemon(artifact):
        plane.applied(1)
        assert time.monotonic() - started < lease.SECONDS
        assert not (plane.folder / "runtime-control-1" / "apply.pem").exists()

    artifact = plane.artifact(2)
    kill_one("control-1")
    started = time.monotonic()
    with plane.daemon(artifact, node="control-2"):
        plane.applied(2)
        assert lease.SECONDS - 3 < time.monotonic() - started < lease.SECONDS + 20


def test_daemons_that_are_killed_again_and_again(plane: Stand) -> None:
    """At no time that one could choose; what was begun is finished, and nothing is decided twice."""
    artifact, chance = plane.artifact(1), random.Random(7)  # noqa: S311
    secrets = {each["metadata"]["name"]: each for each in inventory.read_artifact(artifact).tokens.values()}
    machines = [f"worker-{i}" for i in (1, 2, 3, 4)]
    for name in machines:
        plane.admin.call("POST", tokens.SECRETS, secrets[f"bootstrap-token-{plane.secrets.tokens[name].id}"])
    for name in machines:
        eventually(lambda name=name: plane.can_ask(name, name), "the token is known")  # type: ignore[misc]
    for kill in range(8):
        with plane.daemon(artifact, node=f"control-{kill % 2 + 1}") as running:
            time.sleep(0.6 + chance.random() * 1.6)
            running.process.kill()
    with plane.daemon(artifact) as running:
        for name in machines:
            assert plane.outcome(name, 60)[0] == "Approved"
            secret = plane.secret(name)
            assert secret is not None and secret["metadata"]["annotations"][approve.FIRST_KEY] == digest(KEY)
        plane.applied(1)
        eventually(lambda: plane.brought() == {"control-1", *machines}, "all tokens are there")


def test_one_that_was_killed_between_pinning_and_approving(plane: Stand) -> None:
    with plane.daemon(plane.artifact(1)) as running:
        eventually(lambda: plane.brought() >= {"worker-1", "worker-2"}, "they have tokens")
        running.process.kill()
    for name, first in (("worker-1", KEY), ("worker-2", key())):
        plane.pin(name, digest(first))
        assert plane.can_ask(name, name)
    with plane.daemon(plane.artifact(1)):
        assert plane.outcome("worker-1", 60)[0] == "Approved"
        assert plane.outcome("worker-2", 60)[0] == "Denied"


def test_a_first_key_that_nothing_came_of_is_forfeit(plane: Stand) -> None:
    """A kubelet that ends before it has its certificate comes back with another key."""
    lost = digest(key())
    with plane.daemon(plane.artifact(1), "--forfeit-after=3") as running:
        eventually(lambda: plane.brought() >= {"worker-1", "worker-2", "worker-3"}, "they have tokens")
        plane.pin("worker-1", lost)
        plane.pin("worker-2", lost)
        plane.register("worker-2")
        time.sleep(4)
        for name in ("worker-1", "worker-2"):
            assert plane.can_ask(name, name)
        assert plane.outcome("worker-1")[0] == "Approved"
        decision, told = plane.outcome("worker-2")
        assert decision == "Denied" and "the Node worker-2 has joined with the first" in told
        assert "delete its Node" in told
        running.until(rf"of worker-1: nothing came of its first key {lost[:16]}...; it is forfeit")
        secret = plane.secret("worker-1")
        assert secret is not None and secret["metadata"]["annotations"][approve.FIRST_KEY] == digest(KEY)
        assert plane.can_ask("worker-1-again", "worker-1", signed_with=key())
        assert plane.outcome("worker-1-again")[0] == "Denied", "the second key's time begins anew"


def test_in_group_mode_the_controller_manager_approves_clients(plane: Stand) -> None:
    group = replace(plane.cluster, approval="group")
    with plane.daemon(plane.artifact(1, group)):
        eventually(lambda: "worker-1" in plane.brought(), "it has a token")
        plane.ask("grouped", kubelets_request(plane, "worker-1", KEY), token=plane.bearer("worker-1"))
        decision, told = plane.outcome("grouped")
        assert (decision, "Auto approving" in told) == ("Approved", True)
        secret = plane.secret("worker-1")
        assert secret is not None and is_fresh(secret)
        plane.ask("grouped-serving", kubelets_request(plane, "worker-1", KEY, True), node="worker-1", signer=SERVING)
        assert plane.outcome("grouped-serving") == ("Approved", "serving certificate of worker-1, as baked")
    with plane.daemon(plane.artifact(2)):  # and back: what the bindings gave is taken away again
        plane.applied(2)
        plane.ask("ungrouped", kubelets_request(plane, "worker-1", KEY), token=plane.bearer("worker-1"))
        assert plane.outcome("ungrouped") == ("Approved", "client certificate of worker-1, as baked")


def test_nodes_are_labelled_and_storage_is_taken_back(plane: Stand) -> None:
    stored = named(plane.cluster, "worker-1", storage="fast", labels=(("rack", "a"),))
    plane.register("worker-1")
    role = {"node-role.kubernetes.io/worker": ""}
    with plane.daemon(plane.artifact(1, stored)) as running:
        given = {"plain": "x", **role, inventory.STORAGE: "fast", "rack": "a"}
        eventually(lambda: plane.labels("worker-1") == given, "it is labelled", 60)
        version = plane.admin.call("GET", f"{inventory.NODES}/worker-1")["metadata"]["resourceVersion"]
        plane.register("control-1", more={"node-role.kubernetes.io/mine": ""})
        own = {"node-role.kubernetes.io/mine": "", "node-role.kubernetes.io/control-plane": "", "plain": "x"}
        eventually(lambda: plane.labels("control-1") == own, "it is labelled")
        again = plane.admin.call("GET", f"{inventory.NODES}/worker-1")["metadata"]["resourceVersion"]
        assert version == again, "nothing is written where nothing differs"
        plane.ready("worker-1")
        plane.register("stranger")
        time.sleep(1)
        assert running.said.count("node worker-1: labelled") == 1
        running.process.kill()
    with plane.daemon(plane.artifact(2)):
        eventually(lambda: inventory.STORAGE not in plane.labels("worker-1"), "storage is taken back", 60)
        assert plane.labels("worker-1") == {"plain": "x", **role, "rack": "a"}
        assert plane.labels("stranger") == {"plain": "x"}


def test_it_may_do_what_it_does_and_nothing_else(plane: Stand) -> None:
    identity = credentials.Identity(plane.authority, plane.folder / "rights.pem", "nodebake:controller")
    own = Api(plane.server, plane.authority.certificate, identity)
    own.call("GET", inventory.NODES)
    for method, path, body in (
        ("GET", "/api/v1/namespaces/default/secrets", None),
        ("GET", "/api/v1/namespaces/kube-system/configmaps", None),
        ("GET", "/api/v1/pods", None),
        ("DELETE", f"{inventory.NODES}/x", None),
        ("POST", objects.CONFIG_MAPS, inventory.config_map(INVENTORY, 0)),
        ("GET", f"/apis/coordination.k8s.io/v1/namespaces/kube-system/leases/{lease.NAME}", None),
    ):
        with pytest.raises(Refused, match="403"):
            own.call(method, path, body)


def test_its_certificate_is_short_and_private(plane: Stand) -> None:
    with plane.daemon(plane.artifact(1)) as running:
        running.until("answers")
        file = plane.folder / "runtime-control-1" / "controller.pem"
        assert file.stat().st_mode & 0o777 == 0o600
        made = x509.load_pem_x509_certificate(file.read_bytes())
        assert made.subject.rfc4514_string() == "CN=nodebake:controller"
        assert made.not_valid_after_utc - datetime.now(UTC) <= timedelta(minutes=10)
        assert plane.folder.joinpath("runtime-control-1").stat().st_mode & 0o777 == 0o700


def test_it_says_when_it_is_ready(plane: Stand) -> None:
    path = str(plane.folder / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(path)
        systemd.settimeout(30)
        with plane.daemon(plane.artifact(1), NOTIFY_SOCKET=path):
            assert systemd.recv(1000).decode().splitlines()[0] == "READY=1"


class Wire:
    """A TCP proxy in front of the API server that can be cut."""

    def __init__(self, host: str, port: int, to: int) -> None:
        self._address, self._to = (host, port), (host, to)
        self._open: list[socket.socket] = []
        self._listening: socket.socket | None = None

    def close(self) -> None:
        """Every connection breaks off, and nobody answers any more."""
        for each in self._open:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._open = []

    def open(self) -> None:
        listening = socket.create_server(self._address, backlog=50)
        self._open.append(listening)
        threading.Thread(target=self._accept, args=(listening,), daemon=True).start()

    def _accept(self, listening: socket.socket) -> None:
        with suppress(OSError):
            while True:
                near, _ = listening.accept()
                far = socket.create_connection(self._to)
                self._open += [near, far]
                for source, target in ((near, far), (far, near)):
                    threading.Thread(target=self._copy, args=(source, target), daemon=True).start()

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)


def test_an_api_server_that_goes_and_comes_back(plane: Stand) -> None:
    wire = Wire(plane.machine.localhost, 7443, 6443)
    server = f"--server=https://{plane.machine.localhost}:7443"
    with plane.daemon(plane.artifact(1), server) as running:
        running.until("Connection refused; trying again")
        wire.open()
        plane.applied(1)
        eventually(lambda: plane.brought() >= {"worker-1", "worker-2"}, "they have tokens")
        wire.close()
        plane.ask("meanwhile", kubelets_request(plane, "worker-1", KEY), token=plane.bearer("worker-1"))
        plane.register("worker-2", ready=True)
        time.sleep(4)
        assert plane.request("meanwhile").get("status", {}) == {}
        said = running.said
        assert len(said.splitlines()) < 60, said
        wire.open()
        assert plane.outcome("meanwhile", 40)[0] == "Approved"
        eventually(lambda: plane.secret("worker-2") is None, "what happened meanwhile is seen", 40)
        assert "node-role.kubernetes.io/worker" in plane.labels("worker-2")
    wire.close()
