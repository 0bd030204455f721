"""Bootstrap tokens: one per kubelet, for authentication alone, until installBy."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_validate import validate

from recipes import tokens
from recipes.kit import store
from recipes.kit.model import Cluster, Endpoint
from tests import samples

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)


def brought(cluster: Cluster, secrets: store.Secrets) -> list[dict[str, Any]]:
    """The Secrets in a control plane's artifact."""
    file = tokens.for_control_plane(cluster, secrets)
    assert (file.path, file.mode, file.owner) == ("/etc/nodebake/objects/90-tokens.yaml", 0o600, "nodebake")
    content = json.loads(file.data or b"")
    assert yaml.safe_load(file.data or b"") == content, "kubectl would read it as YAML"
    assert (content["apiVersion"], content["kind"]) == ("v1", "List")
    items: list[dict[str, Any]] = content["items"]
    return items


def opened(cluster: Cluster, tmp_path: Path) -> store.Secrets:
    return store.open(tmp_path / "secrets", cluster, now=NOW)


def test_a_secret_has_the_form_that_kubernetes_reads() -> None:
    node = samples.node("worker-1", "worker", 21)
    install_by = datetime(2026, 12, 24, 1, 0, 5, tzinfo=timezone(timedelta(hours=2)))
    made = tokens.secret_object(node, store.Token("abc123", "0123456789abcdef"), install_by)
    assert made == {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": "bootstrap-token-abc123",
            "namespace": "kube-system",
            "labels": {"nodebake.local/machine": "worker-1"},
        },
        "type": "bootstrap.kubernetes.io/token",
        "stringData": {
            "token-id": "abc123",
            "token-secret": "0123456789abcdef",
            "expiration": "2026-12-23T23:00:05Z",
            "usage-bootstrap-authentication": "true",
            "description": "Lets the kubelet of worker-1 join.",
        },
    }
    validate(made, "1.37", strict=True)


def test_every_kubelet_has_one_and_no_other_machine(tmp_path: Path) -> None:
    cluster = samples.external_etcd()
    secrets = opened(cluster, tmp_path)
    made = brought(cluster, secrets)
    described = [secret["stringData"]["description"] for secret in made]
    assert described == [
        f"Lets the kubelet of {name} join." for name in ("control-1", "control-2", "worker-1", "worker-2")
    ]
    assert {secret["stringData"]["expiration"] for secret in made} == {"2027-02-21T12:00:00Z"}
    for secret in made:
        text = secret["stringData"]
        assert re.fullmatch(r"[a-z0-9]{6}\.[a-z0-9]{16}", f"{text['token-id']}.{text['token-secret']}")
        assert secret["metadata"]["name"] == f"bootstrap-token-{text['token-id']}"
    assert len({secret["metadata"]["name"] for secret in made}) == 4


def test_a_token_of_its_own_time_ends_at_its_own_time(tmp_path: Path) -> None:
    cluster = samples.ha()
    opened(cluster, tmp_path)
    secrets = store.rekey(tmp_path / "secrets", cluster, ["worker-2"], now=NOW + timedelta(days=100))
    ends = {secret["metadata"]["labels"][tokens.MACHINE]: secret["stringData"] for secret in brought(cluster, secrets)}
    assert ends["worker-2"]["expiration"] == "2027-06-01T12:00:00Z"
    assert {told["expiration"] for name, told in ends.items() if name != "worker-2"} == {"2027-02-21T12:00:00Z"}


def test_a_denied_machine_has_none_in_the_cluster(tmp_path: Path) -> None:
    cluster = samples.ha()
    denied = replace(cluster, nodes=tuple(node._replace(denied=node.name == "worker-2") for node in cluster.nodes))
    secrets = opened(denied, tmp_path)
    left = brought(denied, secrets)
    assert left == [secret for secret in brought(cluster, secrets) if "worker-2" not in str(secret["stringData"])]
    assert len(left) == 5


@pytest.mark.parametrize(
    ("cluster", "server"),
    [
        (samples.ha(), "https://127.0.0.1:6443"),
        (samples.balanced(), "https://192.168.10.9:6443"),
        (
            samples.ha(load_balancer="external", control_plane_endpoint=Endpoint("api.example.org", 8443)),
            "https://api.example.org:8443",
        ),
        (samples.ha(vip=IPv4Address("192.168.10.9")), "https://127.0.0.1:6443"),
    ],
)
def test_a_worker_joins_through_its_balancer(cluster: Cluster, server: str, tmp_path: Path) -> None:
    secrets = opened(cluster, tmp_path)
    file = tokens.bootstrap_kubeconfig(cluster, cluster.workers[0], secrets)
    assert (file.path, file.mode, file.owner) == ("/etc/kubernetes/bootstrap-kubelet.conf", 0o600, "root")
    assert file.data is not None
    config = yaml.safe_load(file.data)
    (entry,) = config["clusters"]
    assert entry["cluster"]["server"] == server
    ca = base64.b64decode(entry["cluster"]["certificate-authority-data"])
    assert ca == secrets.authorities["kubernetes"].cert_pem
    (user,) = config["users"]
    assert user["user"] == {"token": secrets.tokens["worker-1"].bearer}
    (context,) = config["contexts"]
    assert context["context"] == {"cluster": entry["name"], "user": user["name"]}
    assert config["current-context"] == context["name"]


def test_a_control_plane_joins_through_its_own_api_server(tmp_path: Path) -> None:
    cluster = samples.balanced()
    secrets = opened(cluster, tmp_path)
    data = tokens.bootstrap_kubeconfig(cluster, cluster.control_planes[1], secrets).data
    assert data is not None
    assert yaml.safe_load(data)["clusters"][0]["cluster"]["server"] == "https://127.0.0.1:6443"
    assert secrets.tokens["control-2"].bearer in data.decode()


def test_the_same_bytes_again(tmp_path: Path) -> None:
    cluster = samples.ha()
    first = tokens.bootstrap_kubeconfig(cluster, cluster.workers[0], opened(cluster, tmp_path))
    assert tokens.bootstrap_kubeconfig(cluster, cluster.workers[0], opened(cluster, tmp_path)) == first


def test_no_token_but_its_own_reaches_a_machine(tmp_path: Path) -> None:
    cluster = samples.ha()
    secrets = opened(cluster, tmp_path)
    for node in cluster.kubelets:
        data = tokens.bootstrap_kubeconfig(cluster, node, secrets).data
        assert data is not None
        holds = [name for name, token in secrets.tokens.items() if token.secret.encode() in data]
        assert holds == [node.name]
