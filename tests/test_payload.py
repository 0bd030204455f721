"""What all machines of one role share."""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from recipes import payload
from recipes.kit import archive, store
from recipes.kit.errors import BakeError
from recipes.kit.model import File, Role
from recipes.kit.progress import Lines
from tests import artifacts, samples


@pytest.fixture
def parts(tmp_path: Path) -> artifacts.Parts:
    return artifacts.Parts(tmp_path / "cache")


def paths(files: list[File]) -> set[str]:
    return {file.path for file in files}


def names(files: list[File], folder: str) -> set[str]:
    digest = payload.digest_of(files)
    start = f"/opt/nodebake/{digest}/{folder}/"
    return {file.path.removeprefix(start) for file in files if file.path.startswith(start)}


def test_each_role_has_its_programs(parts: artifacts.Parts) -> None:
    cluster = samples.ha()
    plane = parts.payload(cluster, cluster.control_planes[0])
    assert names(plane, "bin") == set(artifacts.PROGRAMS.split())
    worker = parts.payload(cluster, cluster.workers[0])
    assert {"kubelet", "kube-proxy", "flanneld", "runc", "ctr"} <= names(worker, "bin")
    assert not {"etcd", "kube-apiserver", "kubectl"} & names(worker, "bin")
    assert names(worker, "cni") == {"bridge", "host-local", "loopback", "portmap"}
    assert names(worker, "images") == {"pause.tar", "coredns.tar"}
    assert "haproxy_1_amd64.deb" in names(worker, "packages")
    external = samples.external_etcd()
    etcd = parts.payload(external, external.etcd_members[0])
    assert names(etcd, "bin") == {"etcd", "etcdctl", "etcdutl"}
    assert not names(etcd, "images") and not names(etcd, "cni")
    assert "etcd" not in names(parts.payload(external, external.control_planes[0]), "bin")
    balanced = samples.balanced()
    assert not names(parts.payload(balanced, balanced.with_role("load-balancer")[0]), "bin")


def test_without_flannel_there_is_no_flanneld(parts: artifacts.Parts) -> None:
    cluster = samples.ha(pod_network="none")
    assert "flanneld" not in names(parts.payload(cluster, cluster.workers[0]), "bin")


def test_the_folder_is_named_by_its_content(parts: artifacts.Parts) -> None:
    cluster = samples.ha()
    before = payload.digest_of(parts.payload(cluster, cluster.workers[0]))
    assert len(before) == 16 and payload.digest_of(parts.payload(cluster, cluster.workers[0])) == before
    parts.binaries["kubernetes"] = [
        parts.fetched("kubelet", b"#!other", "x") if fetched.name == "kubelet" else fetched
        for fetched in parts.binaries["kubernetes"]
    ]
    assert payload.digest_of(parts.payload(cluster, cluster.workers[0])) != before


def test_a_missing_program_is_an_error(parts: artifacts.Parts) -> None:
    cluster = samples.ha()
    parts.binaries["kubernetes"] = [each for each in parts.binaries["kubernetes"] if each.name != "runc"]
    with pytest.raises(BakeError, match="lacks runc"):
        parts.payload(cluster, cluster.workers[0])


def test_units_are_enabled_by_links() -> None:
    unit = b"[Unit]\nWants=x\n[Install]\n# a word\nWantedBy=multi-user.target other.target\nAlias=b.service\n"
    links = {
        file.path: file.link
        for file in payload.wanted_links(
            [
                File("/etc/systemd/system/a.service", data=unit),
                File("/etc/systemd/system/t@.service", data=unit),
                File("/etc/systemd/system/a.service.d/10.conf", data=unit),
                File("/etc/systemd/system/other.target.wants/a.service", link="../a.service"),
            ]
        )
    }
    assert links == {
        "/etc/systemd/system/multi-user.target.wants/a.service": "../a.service",
        "/etc/systemd/system/b.service": "a.service",
    }


@pytest.mark.parametrize("role", ["worker", "control-plane"])
def test_every_unit_that_can_be_enabled_is(parts: artifacts.Parts, role: Role) -> None:
    cluster = samples.ha()
    files = parts.payload(cluster, cluster.with_role(role)[0])
    units = [file for file in files if file.path.endswith(".service") and b"WantedBy=multi-user" in (file.data or b"")]
    assert units
    for unit in units:
        assert f"/etc/systemd/system/multi-user.target.wants/{unit.path.rpartition('/')[2]}" in paths(files)


def test_a_worker_payload_names_no_worker(parts: artifacts.Parts) -> None:
    cluster = samples.ha()
    more = replace(cluster, nodes=(*cluster.nodes, samples.node("worker-4", "worker", 24)))
    files = parts.payload(cluster, cluster.workers[0])
    assert files == parts.payload(more, more.workers[0])
    assert not [file.path for file in files if b"worker-1" in (file.data or b"")]


def test_colliding_image_names_stay_apart(parts: artifacts.Parts) -> None:
    cluster = samples.ha()
    parts.images += [parts.image("my/app", "a.example/my/app:1"), parts.image("my_app", "b.example/my_app:1")]
    parts.images.append(replace(parts.images[0], reference="another.example/name:1"))
    files = parts.payload(cluster, cluster.workers[0])
    assert len(names(files, "images")) == 4


def test_the_manifest_is_complete_and_signed(parts: artifacts.Parts, tmp_path: Path) -> None:
    cluster = samples.ha()
    node = cluster.workers[0]
    minted = artifacts.secrets(tmp_path, cluster)
    target, _ = artifacts.bake(tmp_path, cluster, node, parts, minted)
    root = tmp_path / "root"
    root.mkdir()
    subprocess.run(["tar", "-xzf", target, "-C", root], check=True)
    folder = root / "opt/nodebake/manifest"
    subprocess.run(["sha256sum", "--strict", "--quiet", "-c", folder / "payload.SHA256SUMS"], cwd=root, check=True)
    key = tmp_path / "signing.pub"
    key.write_bytes(minted.signing.public_pem)
    sums = folder / "payload.SHA256SUMS"
    verify: list[str | Path] = ["openssl", "dgst", "-sha256", "-verify", key, "-signature", f"{sums}.sig", sums]
    subprocess.run(verify, check=True, stdout=subprocess.DEVNULL)
    told = json.loads((folder / "payload.json").read_text())
    assert (told["role"], told["arch"], told["cluster"]) == ("worker", "amd64", "ha")
    kubelet = next(file for file in told["files"] if file["path"].endswith("/bin/kubelet"))
    assert (kubelet["component"], kubelet["version"], kubelet["source"]) == ("kubernetes", "v1.2.3", "release")
    with tarfile.open(target) as tar:
        packed = {f"/{member.name}" for member in tar if not member.isdir()}
    manifests = {f"/opt/nodebake/manifest/payload.{end}" for end in ("json", "tree", "SHA256SUMS", "SHA256SUMS.sig")}
    assert {file["path"] for file in told["files"]} == packed - manifests
    assert manifests <= packed
    assert payload.read_record(target, "sums") == [hashlib.sha256(sums.read_bytes()).hexdigest()]
    record = json.loads(payload.record_beside(target).read_text())
    assert record["files"] == told["files"]


@pytest.mark.parametrize("record", [None, "", "[]", "{}"])
def test_a_record_that_cannot_be_read_is_told(record: str | None, tmp_path: Path) -> None:
    target = tmp_path / "worker-amd64.tar.gz"
    if record is not None:
        payload.record_beside(target).write_text(record)
    with pytest.raises(BakeError, match="record cannot be read"):
        payload.read_record(target, "sums")


def test_the_same_payload_twice(parts: artifacts.Parts, tmp_path: Path) -> None:
    cluster = samples.ha()
    minted = artifacts.secrets(tmp_path, cluster)
    made = []
    for folder in ("one", "two"):
        files = parts.payload(cluster, cluster.control_planes[0])
        target = tmp_path / folder / "control-plane-amd64.tar.gz"
        payload.write(
            cluster, "control-plane", "amd64", files, target, mtime=1, sign=lambda data: store.sign(minted, data),
            progress=Lines(),
        )  # fmt: skip
        made.append((target.read_bytes(), payload.record_beside(target).read_bytes()))
    assert made[0] == made[1]
    assert made[0][0].endswith(archive.END_MEMBER)
