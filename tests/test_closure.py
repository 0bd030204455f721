"""The closure proof: a whole artifact passes, and each kind of hole is found, in the payload and in any machine."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from recipes import closure
from recipes import node as nodes
from recipes.kit.errors import BakeErrors
from recipes.kit.model import Cluster, Fetched, File, Image, LocalVolume, Node, Registry, Role
from tests import artifacts, samples

UNIT = "/etc/systemd/system/tried.service"
Holes = Callable[..., str]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> artifacts.Parts:
    return artifacts.Parts(tmp_path_factory.mktemp("cache"))


def identity(cluster: Cluster, node: Node, parts: artifacts.Parts, folder: Path) -> list[File]:
    minted = artifacts.secrets(folder, cluster)
    return nodes.identity(cluster, node, minted, sums="5" * 64, image=parts.references, generation=7)


def proven(cluster: Cluster, node: Node, parts: artifacts.Parts) -> closure.Proven:
    """The payload's proof as a later run knows it: from the record."""
    images = parts.images if node.runs_kubelet else []
    made = closure.prove_payload(parts.payload(cluster, node), cluster, node.role, node.arch, images)
    return closure.Proven.from_record(json.loads(json.dumps(made.as_record())))


@pytest.fixture(scope="module")
def plane(parts: artifacts.Parts, tmp_path_factory: pytest.TempPathFactory) -> list[File]:
    """control-1 of ha, payload and identity."""
    cluster = samples.ha()
    node = cluster.control_planes[0]
    return [*parts.payload(cluster, node), *identity(cluster, node, parts, tmp_path_factory.mktemp("store"))]


@pytest.fixture
def holes(parts: artifacts.Parts, plane: list[File]) -> Holes:
    """holes(files): what the proof tells of control-1 with these files; those that a test added are its payload's,
    or, with own=True, its identity's."""
    cluster = samples.ha()
    shared = {file.path for file in parts.payload(cluster, cluster.control_planes[0])}
    identities = {file.path for file in plane} - shared

    def told(files: list[File], cluster: Cluster = cluster, images: Sequence[Image] = (), *, own: bool = False) -> str:
        mine = [file for file in files if file.path in identities or (own and file.path not in shared)]
        rest = [file for file in files if file not in mine]
        try:
            proven = closure.prove_payload(rest, cluster, "control-plane", "amd64", images)
            packed = {file.sha256 for file in rest}
            debs = [deb for deb in parts.packages if deb.sha256 in packed]
            closure.prove(proven, cluster, cluster.control_planes[0], mine, lambda: debs)
        except BakeErrors as errors:
            return str(errors)
        return ""

    return told


both = pytest.mark.parametrize("own", [False, True], ids=["payload", "identity"])


@pytest.mark.parametrize("make", [samples.ha, samples.external_etcd, samples.balanced, samples.single])
def test_what_is_baked_is_closed(make: Callable[[], Cluster], parts: artifacts.Parts, tmp_path: Path) -> None:
    cluster = make()
    for role, _ in cluster.payloads:
        payload = proven(cluster, cluster.with_role(role)[0], parts)
        for node in cluster.with_role(role):
            closure.prove(payload, cluster, node, identity(cluster, node, parts, tmp_path))


def test_the_folder_of_a_local_volume_is_no_hole(parts: artifacts.Parts, tmp_path: Path) -> None:
    cluster = samples.ha()
    volume = LocalVolume(name="data", path="/srv/data", size="1Gi", storage_class="local")
    node = cluster.workers[0]._replace(volumes=(volume,))
    cluster = replace(cluster, nodes=(*cluster.control_planes, node))
    closure.prove(proven(cluster, node, parts), cluster, node, identity(cluster, node, parts, tmp_path))


def test_a_proven_payload_is_read_back_as_it_was(parts: artifacts.Parts) -> None:
    cluster = samples.ha()
    files = parts.payload(cluster, cluster.workers[0])
    made = closure.prove_payload(files, cluster, "worker", "amd64", parts.images)
    assert made == proven(cluster, cluster.workers[0], parts)
    assert "/usr/sbin/haproxy" in made.there and "nodebake.local/coredns:v1" in made.there
    asked = {name for ask in made.asks for name in ask.any_of}
    assert "/etc/nodebake/node.env" in asked and "/etc/containerd/config.toml" not in asked


def test_what_no_machine_can_mend_is_told_without_one(parts: artifacts.Parts) -> None:
    cluster = samples.ha()
    unit = File(UNIT, data=b"[Service]\nUser=etcd\nExecStart=/usr/bin/cat /usr/local/lib/closed\n")
    files = [*parts.payload(cluster, cluster.workers[0]), unit, File("/usr/local/lib/closed", data=b"", mode=0o600)]
    with pytest.raises(BakeErrors) as errors:
        closure.prove_payload(files, cluster, "worker", "arm64", parts.images)
    told = str(errors.value)
    assert "/bin/kubelet: this program is for amd64, the node is arm64" in told
    assert "this unit runs as etcd, which may not read /usr/local/lib/closed" in told


def test_one_machine_s_hole_is_told_of_that_machine(parts: artifacts.Parts, tmp_path: Path) -> None:
    cluster = samples.ha()
    payload = proven(cluster, cluster.workers[0], parts)
    for node in cluster.workers:
        files = identity(cluster, node, parts, tmp_path)
        closure.prove(payload, cluster, node, files)
        left = [file for file in files if file.path != "/etc/nodebake/node.env"]
        with pytest.raises(BakeErrors, match=f"{node.name}:/etc/systemd/system/kubelet.service: /etc/nodebake/node.en"):
            closure.prove(payload, cluster, node, left)
        with pytest.raises(BakeErrors, match=f"{node.name}:/etc/tried.conf: /srv/absent is named here"):
            closure.prove(payload, cluster, node, [*files, File("/etc/tried.conf", data=b"x = /srv/absent\n")])


@pytest.mark.parametrize("path", ["/etc/containerd/config.toml", "/usr/sbin/haproxy", "/etc/containerd"])
def test_an_identity_brings_nothing_that_its_payload_brings(path: str, parts: artifacts.Parts, tmp_path: Path) -> None:
    cluster = samples.ha()
    node = cluster.workers[0]
    files = [*identity(cluster, node, parts, tmp_path), File(path, data=b"")]
    with pytest.raises(BakeErrors, match=f"worker-1:{path}: the payload, or a package in it, brings this file too"):
        closure.prove(proven(cluster, node, parts), cluster, node, files)


def test_packages_are_unpacked_only_for_what_none_of_them_lists(
    parts: artifacts.Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = samples.ha()
    node = cluster.workers[0]
    payload, files = proven(cluster, node, parts), identity(cluster, node, parts, tmp_path)

    def refuse() -> list[Fetched]:
        raise AssertionError("it has all it names")

    listed = File("/etc/tried.conf", data=b"/usr/sbin/haproxy\n")
    closure.prove(payload, cluster, node, [*files, listed], refuse)
    linked = File("/etc/tried.conf", data=b"/usr/bin/openssl-linked\n")
    closure.prove(payload, cluster, node, [*files, linked], refuse)  # in a small package, of which all is known
    monkeypatch.setattr(closure, "_SMALL", 0)
    payload = proven(cluster, node, parts)
    closure.prove(payload, cluster, node, [*files, listed], refuse)
    closure.prove(payload, cluster, node, [*files, linked], lambda: parts.packages)
    with pytest.raises(BakeErrors, match="/usr/bin/openssl-linked is named here"):
        closure.prove(payload, cluster, node, [*files, linked])


@pytest.mark.parametrize("role", ["worker", "control-plane"])
def test_the_proof_of_a_machine_is_quick(role: Role, parts: artifacts.Parts, tmp_path: Path) -> None:
    cluster = samples.ha()
    node = cluster.with_role(role)[0]
    payload, files = proven(cluster, node, parts), identity(cluster, node, parts, tmp_path)
    started = time.process_time()
    for _ in range(10):
        closure.prove(payload, cluster, node, files)
    assert (time.process_time() - started) / 10 < 0.05


def test_every_file_that_the_api_server_names_is_needed(plane: list[File], holes: Holes) -> None:
    for path in (
        "/etc/kubernetes/pki/kube-apiserver.crt",
        "/etc/kubernetes/encryption.yaml",
        "/etc/kubernetes/audit-policy.yaml",
        "/etc/nodebake/node.env",
        "/etc/kubernetes/pki/etcd-ca.crt",
    ):
        assert f"{path} is named here" in holes([file for file in plane if file.path != path]), path


@pytest.mark.parametrize("name", ["kubelet", "etcd", "containerd", "kube-proxy", "flanneld", "runc"])
def test_every_binary_is_needed(plane: list[File], name: str, holes: Holes) -> None:
    left = [file for file in plane if not file.path.endswith(f"/bin/{name}")]
    assert f"/opt/nodebake/current/bin/{name} is named here" in holes(left)


def test_a_package_that_is_missing_is_found(plane: list[File], holes: Holes) -> None:
    left = [file for file in plane if "/packages/openssl" not in file.path]
    assert "the program openssl is called here" in holes(left)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("ExecStart=/usr/bin/absent", "/usr/bin/absent is named here"),
        ("ExecStart=/usr/bin/sleep 1 --config=/etc/absent.conf", "/etc/absent.conf is named here"),
        ("ExecStart=/usr/bin/sleep --socket=unix:///srv/absent", "/srv/absent is named here"),
        ("EnvironmentFile=/etc/absent/x${NAME}", "/etc/absent is named here"),
        ("After=absent.service", "the unit absent.service is named in After="),
        ("Wants=tried.service", "names itself"),
        ("User=etcd\nExecStart=/usr/bin/cat /etc/kubernetes/encryption.yaml", "this unit runs as etcd"),
        ("LoadCredential=x:/etc/absent.key", "/etc/absent.key is named here"),
        ("ExecStart=/usr/bin/cat %d/sa.key", "the credential sa.key is named here, but not loaded"),
    ],
)
@both
def test_a_unit_that_names_what_is_not_there(plane: list[File], line: str, told: str, own: bool, holes: Holes) -> None:
    unit = File(UNIT, data=f"[Unit]\n[Service]\n{line}\n".encode())
    assert told in holes([*plane, unit], own=own)


@pytest.mark.parametrize(
    "line",
    [
        "ExecStart=/usr/bin/sleep 1",
        "ExecStart=/bin/openssl /usr/bin/openssl-linked",
        "User=etcd\nLoadCredential=key:/etc/kubernetes/encryption.yaml\nExecStart=/usr/bin/cat %d/key",
        "ExecStart=/opt/nodebake/current/bin/kubelet --root-dir=/var/lib/kubelet/x",
        "EnvironmentFile=-/etc/optional",
        "ConditionPathExists=/etc/optional",
        "# /etc/a-word-in-a-comment",
        "Environment=PATH=/opt/other/bin:/usr/bin",
        "Documentation=https://example.org/etc/x",
        "After=network-online.target kubelet.service",
    ],
)
@both
def test_a_unit_that_names_what_is_there(plane: list[File], line: str, own: bool, holes: Holes) -> None:
    assert holes([*plane, File(UNIT, data=f"[Unit]\n[Service]\n{line}\n".encode())], own=own) == ""


@both
def test_a_program_called_by_a_script(plane: list[File], own: bool, holes: Holes) -> None:
    script = File("/usr/local/lib/tried", data=b"#!/bin/sh\nsed x | absent-program\n", mode=0o755)
    assert "the program absent-program is called here" in holes([*plane, script], own=own)


@both
def test_parts_of_a_unit_that_is_not_there(plane: list[File], own: bool, holes: Holes) -> None:
    part = File("/etc/systemd/system/absent.service.d/10.conf", data=b"[Service]\n")
    assert "a part of the unit absent.service" in holes([*plane, part], own=own)


@pytest.mark.parametrize("link", ["absent", "../../etc/absent", "/etc/absent", "tried"])
@both
def test_a_dangling_link(plane: list[File], link: str, own: bool, holes: Holes) -> None:
    assert "is not there" in holes([*plane, File("/usr/local/lib/tried", link=link)], own=own)


def test_a_program_for_another_machine(plane: list[File], parts: artifacts.Parts, holes: Holes) -> None:
    other = parts.binary("kubelet", machine=183)
    changed = [replace(file, source=other.path, sha256=other.sha256) if file.path.endswith("/bin/kubelet") else file
               for file in plane]  # fmt: skip
    assert "this program is for arm64, the node is amd64" in holes(changed)


def test_what_is_no_program_at_all(plane: list[File], parts: artifacts.Parts, holes: Holes) -> None:
    other = parts.fetched("bridge", b"<html>404</html>", "x")
    changed = [replace(file, source=other.path, sha256=other.sha256) if file.path.endswith("/cni/bridge") else file
               for file in plane]  # fmt: skip
    assert "neither ELF nor a script" in holes(changed)


def test_a_package_for_another_machine(plane: list[File], holes: Holes) -> None:
    changed = [replace(file, path=file.path.replace("haproxy_1_amd64", "haproxy_1_arm64")) for file in plane]
    assert "this package is not for amd64" in holes(changed)


def with_archive(plane: list[File], parts: artifacts.Parts, name: str, reference: str | None, arch: str) -> list[File]:
    made = parts.image(name, reference, arch).archive
    ending = f"/images/{name}.tar"
    return [
        replace(file, source=made.path, sha256=made.sha256) if file.path.endswith(ending) else file for file in plane
    ]


def test_sandbox_image_and_archive_must_agree(plane: list[File], parts: artifacts.Parts, holes: Holes) -> None:
    told = holes(with_archive(plane, parts, "pause", "nodebake.local/pause:other", "amd64"), images=parts.images)
    assert "the sandbox image nodebake.local/pause:3.10.2 is named here" in told
    assert "the image nodebake.local/pause:3.10.2 is in the list" in told


def test_images_of_objects_and_archives_must_agree(plane: list[File], parts: artifacts.Parts, holes: Holes) -> None:
    told = holes(with_archive(plane, parts, "coredns", "nodebake.local/coredns:other", "amd64"))
    assert "10-cluster.yaml: the image nodebake.local/coredns:v1 is named here" in told


def test_an_image_for_another_machine_or_without_a_name(
    plane: list[File], parts: artifacts.Parts, holes: Holes
) -> None:
    reference = "nodebake.local/pause:3.10.2"
    assert "this image is for arm64" in holes(with_archive(plane, parts, "pause", reference, "arm64"))
    assert "no image in this archive has a name" in holes(with_archive(plane, parts, "pause", None, "amd64"))


def test_an_image_that_a_registry_serves_need_not_be_baked(plane: list[File], holes: Holes) -> None:
    pod = b"kind: Pod\nspec: {containers: [{image: 'registry.example/app:1'}]}\n"
    objects = [*plane, File("/etc/nodebake/objects/50-extra.yaml", data=pod)]
    assert "the image registry.example/app:1 is named here" in holes(objects)
    assert holes(objects, samples.ha(registries=(Registry("registry.example"),))) == ""


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("containers: [{image: app}]", "app would be asked of a registry each time"),
        ("containers: [{image: 'app:latest'}]", "app:latest would be asked"),
        ("containers: [{image: 'app:1', imagePullPolicy: Always}]", "app:1 would be asked"),
        ("volumes: [{name: v, image: {reference: data}}]", "data would be asked"),
        ("volumes: [{name: v, image: {reference: 'gone:1'}}]", "gone:1 is named here"),
        ("containers: [{image: 'app:latest', imagePullPolicy: IfNotPresent}]", ""),
        ("initContainers: [{image: 'app:latest', imagePullPolicy: Never}]", ""),
        ("containers: [{image: 'app:1'}]", ""),
        ("volumes: [{name: v, image: {reference: data, pullPolicy: IfNotPresent}}]", ""),
        ("volumes: [{name: v, configMap: {name: image}}]", ""),
    ],
)
def test_an_image_that_is_there_but_would_be_pulled_all_the_same(
    plane: list[File], parts: artifacts.Parts, holes: Holes, spec: str, says: str
) -> None:
    """The API server's default: Always for the tag latest. No registry would answer."""
    some = next(file for file in plane if file.path.endswith("/images/pause.tar"))
    files = [*plane, File("/etc/nodebake/objects/50-extra.yaml", data=f"kind: Pod\nspec: {{{spec}}}\n".encode())]
    for number, name in enumerate(("app:1", "app:latest", "data:latest")):
        made = parts.image(f"own-{number}", f"docker.io/library/{name}", "amd64").archive
        path = some.path.replace("pause", f"own-{number}")
        files.append(replace(some, path=path, source=made.path, sha256=made.sha256))
    told = holes(files)
    assert says in told and (says or not told), told


def test_all_holes_are_told_at_once(plane: list[File], holes: Holes) -> None:
    left = [file for file in plane if not file.path.endswith(("/bin/kubelet", "/bin/etcd"))]
    told = holes(left)
    assert "bin/kubelet is named" in told and "bin/etcd is named" in told


@pytest.mark.parametrize(
    ("short", "full"),
    [
        ("nginx", "docker.io/library/nginx:latest"),
        ("team/app:1", "docker.io/team/app:1"),
        ("registry.example:5000/app", "registry.example:5000/app:latest"),
        ("localhost/app@sha256:aa", "localhost/app@sha256:aa"),
    ],
)
def test_references_are_compared_as_containerd_files_them(short: str, full: str) -> None:
    assert closure.reference_name(short) == full
