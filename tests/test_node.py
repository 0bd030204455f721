"""What one machine alone has."""

from __future__ import annotations

import base64
import json
import tarfile
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from recipes import node as nodes
from recipes.kit import store
from recipes.kit.model import Cluster, File
from tests import artifacts, samples

IMAGE = {"coredns": "nodebake.local/coredns:v1"}
SUMS = "5" * 64


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    return samples.ha()


@pytest.fixture(scope="module")
def minted(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster) -> store.Secrets:
    return artifacts.secrets(tmp_path_factory.mktemp("store"), cluster)


def identity(cluster: Cluster, name: str, minted: store.Secrets) -> dict[str, File]:
    node = next(node for node in cluster.nodes if node.name == name)
    files = nodes.identity(cluster, node, minted, sums=SUMS, image=IMAGE, generation=7)
    assert [file.path for file in files] == sorted({file.path for file in files})
    return {file.path: file for file in files}


def test_a_worker_carries_no_long_lived_secret(cluster: Cluster, minted: store.Secrets) -> None:
    files = identity(cluster, "worker-1", minted)
    assert "/etc/kubernetes/bootstrap-kubelet.conf" in files
    assert not [path for path in files if path.endswith(".key")]
    assert not [path for path, file in files.items() if b"PRIVATE KEY" in (file.data or b"")]
    for forbidden in ("encryption.yaml", "90-tokens.yaml", "inventory.json"):
        assert not [path for path in files if path.endswith(forbidden)]


def test_encryption_keys_stand_in_the_order_of_the_cluster_file(cluster: Cluster, tmp_path: Path) -> None:
    rotated = replace(cluster, encryption_keys=(2, 1))
    minted = artifacts.secrets(tmp_path, rotated)
    text = (identity(rotated, "control-1", minted)["/etc/kubernetes/encryption.yaml"].data or b"").decode()
    told = [text.index(base64.b64encode(minted.encryption_keys[number]).decode()) for number in (2, 1)]
    assert told == sorted(told)
    assert rotated.shared == cluster.shared, "no payload and no worker is baked anew"


def test_a_control_plane_has_what_the_cluster_is_started_from(cluster: Cluster, minted: store.Secrets) -> None:
    files = identity(cluster, "control-1", minted)
    encryption = files["/etc/kubernetes/encryption.yaml"]
    assert (encryption.mode, encryption.owner) == (0o600, "root")
    assert (encryption.data or b"").count(b"secret: ") == 1
    tokens = files["/etc/nodebake/objects/90-tokens.yaml"]
    rights = files["/etc/nodebake/objects/00-rights.yaml"]
    assert (rights.mode, rights.owner) == (0o600, "nodebake")
    assert tokens.mode == 0o600 and (tokens.data or b"").count(b"bootstrap.kubernetes.io/token") == 6
    inventory = json.loads(files["/etc/nodebake/inventory.json"].data or b"")
    assert files["/etc/nodebake/inventory.json"].mode == 0o600
    assert inventory["generation"] == 7 and inventory["clusterId"] == minted.cluster_id
    assert {kubelet["name"] for kubelet in inventory["kubelets"]} == {node.name for node in cluster.kubelets}
    worker = next(kubelet for kubelet in inventory["kubelets"] if kubelet["name"] == "worker-1")
    assert worker["tokenId"] == minted.tokens["worker-1"].id and worker["addresses"] == ["192.168.10.21"]
    assert minted.tokens["worker-1"].secret not in json.dumps(inventory)


def test_every_secret_is_for_one_reader(cluster: Cluster, minted: store.Secrets) -> None:
    secret = [token.secret.encode() for token in minted.tokens.values()] + [b"PRIVATE KEY"]
    for name in ("control-1", "worker-1"):
        for file in identity(cluster, name, minted).values():
            if any(part in (file.data or b"") for part in secret):
                assert file.mode == 0o600, file.path


def test_the_manifest_names_machine_and_payload(cluster: Cluster, minted: store.Secrets) -> None:
    files = identity(cluster, "worker-2", minted)
    told = json.loads(files["/opt/nodebake/manifest/node.json"].data or b"")
    assert told["node"] == "worker-2" and told["role"] == "worker" and told["payload"] == SUMS
    assert told["macs"] == ["52:54:00:00:10:16"] and told["addresses"] == ["192.168.10.22/24"]
    assert told["installBy"].endswith("Z") and told["minted"] == "2026-11-01T12:00:00Z"
    sums = (files["/opt/nodebake/manifest/node.SHA256SUMS"].data or b"").decode()
    assert f"{SUMS}  opt/nodebake/manifest/payload.SHA256SUMS\n" in sums
    listed = {f"/{line[66:]}" for line in sums.splitlines()}
    unlisted = {path for path in files if path not in listed}
    assert unlisted == {f"/opt/nodebake/manifest/node.SHA256SUMS{end}" for end in ("", ".sig")}


def test_the_time_to_install_is_told_everywhere_alike(cluster: Cluster, tmp_path: Path) -> None:
    """To the desk and to `nodebake status` by the manifest, to first boot, and to the cluster with each token."""
    artifacts.secrets(tmp_path, cluster)
    late = artifacts.NOW + timedelta(days=120)
    secrets = store.rekey(tmp_path / "ha.secrets", cluster, ["worker-2"], now=late)
    plane = identity(cluster, "control-1", secrets)
    brought = {
        item["metadata"]["labels"]["nodebake.local/machine"]: item["stringData"]["expiration"]
        for item in json.loads(plane["/etc/nodebake/objects/90-tokens.yaml"].data or b"")["items"]
    }
    inventory = json.loads(plane["/etc/nodebake/inventory.json"].data or b"")
    judged = {each["name"]: each.get("installBy", inventory["installBy"]) for each in inventory["kubelets"]}
    for name, minted, until in (
        ("worker-1", "2026-11-01T12:00:00Z", "2027-01-30T12:00:00Z"),
        ("worker-2", "2027-03-01T12:00:00Z", "2027-05-30T12:00:00Z"),
    ):
        files = identity(cluster, name, secrets)
        told = json.loads(files["/opt/nodebake/manifest/node.json"].data or b"")
        environment = (files["/etc/nodebake/node.env"].data or b"").decode()
        assert (told["minted"], told["installBy"]) == (minted, until)
        assert f"\nMINTED='{minted}'\nINSTALL_BY='{until}'\n" in environment
        assert brought[name] == judged[name] == until


def test_identities_are_the_same_twice_and_workers_independent(cluster: Cluster, minted: store.Secrets) -> None:
    first = identity(cluster, "worker-1", minted)
    assert identity(cluster, "worker-1", minted) == first
    fewer = replace(cluster, nodes=tuple(node for node in cluster.nodes if node.name != "worker-3"))
    assert identity(fewer, "worker-1", minted) == first


def test_thin_is_the_identity_alone(cluster: Cluster, minted: store.Secrets, tmp_path: Path) -> None:
    parts = artifacts.Parts(tmp_path / "cache")
    for media in ("full", "thin"):
        node = cluster.workers[0]._replace(media=media)
        _, tarball = artifacts.bake(tmp_path / media, cluster, node, parts, minted)
        with tarfile.open(tarball) as tar:
            names = set(tar.getnames())
        assert ("opt/nodebake/manifest/payload.json" in names) == (media == "full")
        assert "etc/nodebake/node.env" in names
        assert tarball.stat().st_mode & 0o777 == 0o600


def test_host_keys_are_baked_by_choice_only(cluster: Cluster, minted: store.Secrets, tmp_path: Path) -> None:
    assert nodes.HOST_KEY not in identity(cluster, "worker-1", minted)
    chosen = replace(cluster, bake_ssh_host_keys=True)
    with_keys = artifacts.secrets(tmp_path, chosen)
    key = identity(chosen, "worker-1", with_keys)[nodes.HOST_KEY]
    assert key.mode == 0o600 and (key.data or b"").startswith(b"-----BEGIN OPENSSH PRIVATE KEY-----")
    lines = nodes.known_hosts(chosen, with_keys).decode().splitlines()
    assert len(lines) == 6 and lines[3].startswith("worker-1,192.168.10.21 ssh-ed25519 ")
