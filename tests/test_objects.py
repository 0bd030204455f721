"""Cluster objects: valid for Kubernetes 1.37, and what each choice of the cluster file makes of them."""

from __future__ import annotations

import base64
import os
import re
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from recipes import objects
from recipes.kit.errors import BakeErrors
from recipes.kit.model import Cluster, LocalVolume
from tests import samples

IMAGES = {"coredns": "registry.k8s.io/coredns/coredns:v1.14.6", "pause": "registry.k8s.io/pause:3.10.2"}
VOLUME = LocalVolume(name="data", path="/mnt/data", size="100Gi", storage_class="local")
STORED = samples.ha(
    nodes=(*samples.ha().nodes, samples.node("worker-4", "worker", 24, volumes=(VOLUME,))), storage_classes=("local",)
)
CLUSTERS = [
    samples.ha(),
    samples.external_etcd(),
    samples.balanced(),
    samples.single(),
    samples.ha(approval="group", pod_network="none", dns_upstream=("192.168.10.1",)),
    STORED,
]


def everything(cluster: Cluster) -> list[dict[str, Any]]:
    return [*objects.rights(cluster), *objects.static(cluster, IMAGES)]


def named(cluster: Cluster) -> dict[tuple[str, str], dict[str, Any]]:
    return {(one["kind"], one["metadata"]["name"]): one for one in everything(cluster)}


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_every_object_is_valid(cluster: Cluster) -> None:
    for one in everything(cluster):
        kubernetes_validate.validate(one, "1.37", strict=True)
        assert one["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "nodebake"


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_no_object_stands_twice(cluster: Cluster) -> None:
    keys = [(one["kind"], one["metadata"].get("namespace"), one["metadata"]["name"]) for one in everything(cluster)]
    assert len(keys) == len(set(keys))


def test_a_document_is_stable_and_reads_back() -> None:
    made = objects.static(STORED, IMAGES)
    written = objects.document(made)
    assert written == objects.document(objects.static(STORED, IMAGES))
    assert list(yaml.safe_load_all(written)) == made
    assert b"&id" not in written
    rights = objects.rights(STORED)
    assert yaml.safe_load(objects.json_list(rights)) == {"apiVersion": "v1", "kind": "List", "items": rights}


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_rights_are_roles_and_bindings_alone(cluster: Cluster) -> None:
    """So nodebake-controller finds where each lies, and none waits for anything that is not yet there."""
    for one in objects.rights(cluster):
        assert one["apiVersion"] == "rbac.authorization.k8s.io/v1"
        assert one["kind"].removeprefix("Cluster") in ("Role", "RoleBinding")
        assert one["metadata"].get("namespace") in (None, "kube-system")


def bound(cluster: Cluster) -> set[tuple[str, str]]:
    return {
        (one["roleRef"]["name"], subject["name"])
        for one in everything(cluster)
        if one["kind"] == "ClusterRoleBinding"
        for subject in one["subjects"]
    }


def test_bindings_of_both_ways_of_approval() -> None:
    signing = "system:certificates.k8s.io:certificatesigningrequests"
    always = {
        ("system:node-bootstrapper", "system:bootstrappers"),
        ("system:kubelet-api-admin", "kube-apiserver-kubelet-client"),
        ("cluster-admin", "nodebake:cluster-admins"),
        ("system:node-proxier", "system:nodes"),
        ("nodebake:flannel", "system:nodes"),
        ("nodebake:coredns", "coredns"),
        ("nodebake:controller", "nodebake:controller"),
    }
    assert bound(samples.ha()) == always
    assert bound(samples.ha(approval="group")) == always | {
        (f"{signing}:nodeclient", "system:bootstrappers"),
        (f"{signing}:selfnodeclient", "system:nodes"),
    }
    assert set(named(samples.ha())) == set(named(samples.ha(approval="group"))), "what gave rights takes them back"
    assert bound(samples.ha(pod_network="none")) == always - {("nodebake:flannel", "system:nodes")}


def test_the_controller_may_do_what_it_does_and_no_more() -> None:
    made = named(samples.ha())
    rules = made["ClusterRole", "nodebake:controller"]["rules"] + made["Role", "nodebake:controller"]["rules"]
    may = {(rule["apiGroups"][0], *rule["resources"]): " ".join(rule["verbs"]) for rule in rules}
    assert may == {
        ("certificates.k8s.io", "certificatesigningrequests"): "list watch",
        ("certificates.k8s.io", "certificatesigningrequests/approval"): "update",
        ("certificates.k8s.io", "signers"): "approve",
        ("", "nodes"): "get list watch patch",
        ("", "secrets"): "get list watch create patch delete",
        ("", "configmaps"): "get list watch",
    }
    named_alone = {rule["resources"][0]: rule["resourceNames"] for rule in rules if "resourceNames" in rule}
    assert named_alone == {
        "signers": ["kubernetes.io/kube-apiserver-client-kubelet", "kubernetes.io/kubelet-serving"],
        "configmaps": ["nodebake-inventory"],
    }
    assert made["Role", "nodebake:controller"]["metadata"]["namespace"] == "kube-system"
    (subject,) = made["RoleBinding", "nodebake:controller"]["subjects"]
    assert (subject["kind"], subject["name"]) == ("User", "nodebake:controller")


def test_nodes_may_not_write_by_flannels_role() -> None:
    (rule,) = named(samples.ha())["ClusterRole", "nodebake:flannel"]["rules"]
    assert rule == {"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list", "watch"]}


def test_coredns() -> None:
    ha = named(samples.ha())
    pod = ha["Deployment", "coredns"]["spec"]["template"]["spec"]
    assert ha["Deployment", "coredns"]["spec"]["replicas"] == 2
    assert pod["containers"][0]["image"] == IMAGES["coredns"]
    assert pod["containers"][0]["securityContext"]["capabilities"] == {"drop": ["ALL"]}, "it listens above 1024"
    assert ha["Service", "kube-dns"]["spec"]["clusterIP"] == "10.96.0.10"
    assert ("PodDisruptionBudget", "coredns") in ha
    alone = named(samples.single())
    assert alone["Deployment", "coredns"]["spec"]["replicas"] == 1
    assert ("PodDisruptionBudget", "coredns") not in alone


def test_dns_forwards_nowhere_unless_told() -> None:
    assert "forward" not in objects.corefile(samples.ha())
    assert "forward . 192.168.10.1 192.168.10.2 {" in objects.corefile(
        samples.ha(dns_upstream=("192.168.10.1", "192.168.10.2"))
    )


def test_storage() -> None:
    made = named(STORED)
    assert made["StorageClass", "local"]["volumeBindingMode"] == "WaitForFirstConsumer"
    spec = made["PersistentVolume", "worker-4-data"]["spec"]
    assert (spec["capacity"], spec["local"], spec["storageClassName"]) == (
        {"storage": "100Gi"},
        {"path": "/mnt/data"},
        "local",
    )
    (term,) = spec["nodeAffinity"]["required"]["nodeSelectorTerms"]
    assert term["matchExpressions"] == [{"key": "kubernetes.io/hostname", "operator": "In", "values": ["worker-4"]}]


def test_encryption_at_rest() -> None:
    first, second = bytes(range(32)), bytes(range(32, 64))
    made = objects.encryption_configuration({2: second, 1: first})
    secretbox, identity = made["resources"][0]["providers"]
    told = [(key["name"], base64.b64decode(key["secret"])) for key in secretbox["secretbox"]["keys"]]
    assert told == [("baked-2", second), ("baked", first)], "the first one writes"
    assert identity == {"identity": {}}
    with pytest.raises(ValueError, match="32 bytes"):
        objects.encryption_configuration({1: b"short"})


# ---- extraObjects


def extra(tmp_path: Path, text: str) -> list[dict[str, Any]]:
    file = tmp_path / "extra.yaml"
    file.write_text(text)
    cluster = samples.ha(extra_objects=(file,))
    return objects.static(cluster, IMAGES)[len(objects.static(replace(cluster, extra_objects=()), IMAGES)) :]


def test_extra_objects_come_last_in_their_order(tmp_path: Path) -> None:
    text = """
---
apiVersion: example.com/v1
kind: Widget
metadata: {name: one}
spec: {anything: goes}
---
# nothing here
---
apiVersion: v1
kind: List
items:
  - {apiVersion: v1, kind: ConfigMap, metadata: {name: two}, data: {a: b}}
  - {apiVersion: v1, kind: ConfigMap, metadata: {name: three}}
"""
    assert [one["metadata"]["name"] for one in extra(tmp_path, text)] == ["one", "two", "three"]


def test_extra_objects_are_read_as_kubectl_reads_them(tmp_path: Path) -> None:
    """go-yaml takes "22:30" for text; YAML 1.1 has it for a number to the base of 60."""
    scalars = "{time: 22:30, precise: 1:20.5, mode: 0644, count: 10, half: 0.5}"
    (made,) = extra(tmp_path, f"apiVersion: example.com/v1\nkind: Widget\nmetadata: {{name: w}}\nspec: {scalars}\n")
    assert made["spec"] == {"time": "22:30", "precise": "1:20.5", "mode": 420, "count": 10, "half": 0.5}


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        ("a: [", 1, "not YAML"),
        ("just text", 1, "no mapping"),
        ("kind: ConfigMap\nmetadata: {name: x}", 1, "apiVersion is missing"),
        ("apiVersion: v1\nkind: ConfigMap\nmetadata: {}", 1, "metadata.name is missing"),
        ("\n\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: x}\ndaat: {}", 3, "daat"),
        ("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: x}\ndata: {a: 1}", 1, "data.a"),
        ("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: x}\ndata: {a: '', a: ''}", 4, "a stands here twice"),
        ("apiVersion: extensions/v1beta1\nkind: Ingress\nmetadata: {name: x}", 1, "no kind Ingress"),
        ("apiVersion: networking.k8s.io/v1beta1\nkind: Ingress\nmetadata: {name: x}", 1, "no kind Ingress"),
        (
            "apiVersion: v1\nkind: Service\nmetadata: {name: x}\n---\napiVersion: v1\nkind: Secrt\nmetadata: {name: x}",
            5,
            "Secrt",
        ),
    ],
)
def test_mistakes_in_extra_objects_are_told_with_their_place(text: str, line: int, why: str, tmp_path: Path) -> None:
    with pytest.raises(BakeErrors) as caught:
        extra(tmp_path, text)
    (mistake,) = caught.value.errors
    assert re.match(rf"{re.escape(str(tmp_path))}/extra.yaml:{line}(:|$)", str(mistake.where))
    assert why in mistake.what


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [\n")
    missing = tmp_path / "missing.yaml"
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("kind: X\n---\n- 1\n")
    with pytest.raises(BakeErrors) as caught:
        objects.operators([bad, missing, wrong])
    assert [Path(str(one.where).split(":")[0]).name for one in caught.value.errors] == [
        "bad.yaml",
        "missing.yaml",
        "wrong.yaml",
        "wrong.yaml",
    ]


# ---- the real CoreDNS


@pytest.mark.parametrize("upstream", [(), ("127.0.0.1:5399",)])
def test_coredns_takes_its_configuration(upstream: tuple[str, ...], binaries: Path, tmp_path: Path) -> None:
    """Started without an API server: it answers once its plugins are set up, SERVFAIL or NXDOMAIN, but it answers."""
    address = f"127.{os.getpid() // 250 % 250 + 1}.{os.getpid() % 250 + 1}.1"
    text = objects.corefile(samples.ha(dns_upstream=upstream))
    for port in ("8080", "8181", "9153"):
        text = text.replace(f":{port}", f"{address}:{port}")
    text = text.replace("    errors\n", f"    errors\n    bind {address}\n")
    text = text.replace("    pods insecure\n", "    endpoint http://127.0.0.1:1\n    pods insecure\n").replace(
        "    loop\n", ""
    )
    corefile = tmp_path / "Corefile"
    corefile.write_text(text)
    log = tmp_path / "log"
    with log.open("wb") as out:
        process = subprocess.Popen([binaries / "coredns", "-conf", corefile], stdout=out, stderr=subprocess.STDOUT)
    try:
        answer = _ask(address, process, "example.com")
        assert answer is not None, log.read_text()
        if not upstream:
            assert answer == 3, f"NXDOMAIN, not {answer}"
        # Whatever answers for the world must not answer for the cluster: without an API server that is SERVFAIL.
        assert _ask(address, process, "kubernetes.default.svc.cluster.local") == 2
    finally:
        process.kill()
        process.wait()


def _ask(address: str, process: subprocess.Popen[bytes], name: str) -> int | None:
    """The answer's code for an A record, or None."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    question = bytes.fromhex("000101000001000000000000") + labels + b"\x00\x00\x01\x00\x01"
    deadline = time.monotonic() + 20
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(1)
        while time.monotonic() < deadline and process.poll() is None:
            try:
                client.sendto(question, (address, 1053))
                return client.recv(512)[3] & 15
            except OSError:
                time.sleep(0.2)
    return None


def _labels(one: Mapping[str, Any]) -> Mapping[str, str]:
    labels: Mapping[str, str] = one["metadata"]["labels"]
    return labels


def test_kube_system_may_run_what_nodes_need() -> None:
    made = named(samples.ha())
    assert _labels(made["Namespace", "kube-system"])["pod-security.kubernetes.io/enforce"] == "privileged"
    assert _labels(made["Namespace", "default"])["pod-security.kubernetes.io/enforce"] == "baseline"
    for quiet in ("kube-public", "kube-node-lease"):
        assert _labels(made["Namespace", quiet])["pod-security.kubernetes.io/enforce"] == "restricted"
