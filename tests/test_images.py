"""Images: archives made at the desk, the operator's own, and containerd's way to registries."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import os
import tarfile
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from recipes import images, packages
from recipes.kit.choices import Choices
from recipes.kit.download import Desk, NotServed, Unreachable
from recipes.kit.errors import BakeError
from recipes.kit.hashing import hash_file
from recipes.kit.model import Fetched, Image, Origin, Registry, Source
from recipes.kit.progress import Advance, Unit
from recipes.kit.registry import Blob, Pulled
from tests import samples

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
NAME = "io.containerd.image.name"


@dataclass
class Told:
    """A Progress that keeps what it was told."""

    lines: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.lines.append(text)

    def warn(self, text: str) -> None:
        self.lines.append(text)

    @contextmanager
    def step(self, title: str, total: int | None, unit: Unit) -> Iterator[Advance]:
        yield lambda _: None


@dataclass
class World:
    """A desk whose registry and Debian mirror are stand-ins; `up` says whether the registry answers."""

    tmp: Path
    told: Told = field(default_factory=Told)
    up: bool = False
    asked: list[tuple[str, str, tuple[str, str] | None]] = field(default_factory=list)

    def desk(self, name: str = "desk", source: Source | None = None) -> Desk:
        choices = Choices(self.tmp / "choices.json")
        return Desk(build=self.tmp / name, progress=self.told, choices=choices, source=source)

    def program(self, name: str, version: str) -> Fetched:
        path = self.tmp / name
        path.write_bytes(f"{name} {version}".encode() * 1000)
        return Fetched(name, path, hash_file(path), path.stat().st_size, Origin(name, version, "modules"))

    def obtain(self, desk: Desk | None = None, **changes: Any) -> dict[str, Image]:
        coredns = self.program("coredns", "v1.14.6")
        made = images.obtain(samples.ha(**changes), "amd64", desk or self.desk(), coredns)
        return {image.name: image for image in made}

    def pull(
        self, reference: str, digest: str, arch: str, desk: Desk, *, credentials: tuple[str, str] | None = None
    ) -> Pulled:
        self.asked.append((reference, digest, credentials))
        if not self.up:
            raise Unreachable("the registry did not answer", where=reference)

        def blob(media_type: str, data: bytes) -> Blob:
            with desk.cache.temporary() as temp:
                temp.write_bytes(data)
                sha256 = hash_file(temp)
                return Blob(media_type, f"sha256:{sha256}", len(data), desk.cache.add(temp, sha256))

        layer = blob("application/vnd.oci.image.layer.v1.tar+gzip", gzip.compress(reference.encode(), mtime=0))
        return Pulled(blob(MANIFEST, b'{"the":"manifest"}'), blob("config", b"{}"), (layer, layer))


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    world = World(tmp_path)
    monkeypatch.setattr(images, "pull_image", world.pull)
    monkeypatch.setattr(packages, "catatonit", lambda *_: world.program("catatonit", "0.2.1-2"))
    return world


def read(archive: Path) -> dict[str, bytes]:
    """Member name -> bytes, after looking at what must be the same everywhere."""
    with tarfile.open(archive, "r:") as tar:
        members = tar.getmembers()
        assert [member.name for member in members] == sorted(member.name for member in members)
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
        contents = {}
        for member in members:
            file = tar.extractfile(member)
            assert file is not None
            contents[member.name] = file.read()
        return contents


def follow(contents: dict[str, bytes], descriptor: dict[str, Any]) -> bytes:
    """The blob that a descriptor describes, checked against it."""
    data = contents[f"blobs/{descriptor['digest'].replace(':', '/')}"]
    assert len(data) == descriptor["size"]
    assert f"sha256:{hashlib.sha256(data).hexdigest()}" == descriptor["digest"]
    return data


def test_coredns_is_a_whole_image_of_our_own_name(world: World) -> None:
    image = world.obtain()["coredns"]
    assert image.reference == "nodebake.local/coredns:v1.14.6"
    assert (hash_file(image.archive.path), image.archive.path.stat().st_size) == (
        image.archive.sha256,
        image.archive.size,
    )
    contents = read(image.archive.path)
    assert json.loads(contents["oci-layout"]) == {"imageLayoutVersion": "1.0.0"}
    [top] = json.loads(contents["index.json"])["manifests"]
    assert top["annotations"][NAME] == image.reference
    manifest = json.loads(follow(contents, top))
    config = json.loads(follow(contents, manifest["config"]))
    [layer] = manifest["layers"]
    assert (config["architecture"], config["os"]) == ("amd64", "linux")
    assert config["rootfs"]["diff_ids"] == [layer["digest"]]
    assert (config["config"]["Entrypoint"], config["config"]["User"]) == (["/coredns"], "65532:65532")
    with tarfile.open(fileobj=io.BytesIO(follow(contents, layer))) as tar:
        assert {member.name: member.mode for member in tar} == {
            "coredns": 0o755,
            "etc": 0o755,
            "etc/group": 0o644,
            "etc/passwd": 0o644,
        }
        program = tar.extractfile("coredns")
        assert program is not None
        assert program.read() == (world.tmp / "coredns").read_bytes()


def test_the_same_bytes_at_any_desk(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    first = world.obtain()
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    time.tzset()
    before = os.umask(0o077)
    try:
        os.utime(world.tmp / "coredns", (1, 1))
        second = world.obtain(world.desk("elsewhere"))
    finally:
        os.umask(before)
        monkeypatch.undo()
        time.tzset()
    assert {name: image.archive.sha256 for name, image in first.items()} == {
        name: image.archive.sha256 for name, image in second.items()
    }


def test_pause_comes_from_its_registry_by_digest(world: World) -> None:
    world.up = True
    image = world.obtain()["pause"]
    assert image.reference == "registry.k8s.io/pause:3.10.2"
    assert image.archive.origin == Origin("pause", "3.10.2", "release")
    [(_, digest, _)] = world.asked
    assert digest == "sha256:f548e0e8e3dc1896ca956272154dde3314e8cc4fde0a57577ee9fa1c63f5baf4"
    contents = read(image.archive.path)
    [top] = json.loads(contents["index.json"])["manifests"]
    assert top["annotations"][NAME] == image.reference
    assert follow(contents, top) == b'{"the":"manifest"}'  # as it was served
    assert len(contents) == 5  # the layer that occurs twice is there once


def test_pause_without_a_registry_and_what_is_remembered(world: World) -> None:
    made = world.obtain()["pause"]
    assert made.reference == "nodebake.local/pause:3.10.2"
    assert made.archive.origin == Origin("catatonit", "0.2.1-2", "modules")
    assert "catatonit" in world.told.lines[0]
    contents = read(made.archive.path)
    manifest = json.loads(follow(contents, json.loads(contents["index.json"])["manifests"][0]))
    assert json.loads(follow(contents, manifest["config"]))["config"]["Entrypoint"] == ["/pause", "-P"]
    world.up = True
    assert world.obtain()["pause"] == made  # reachability does not change bytes
    assert len(world.asked) == 1
    chosen = world.obtain(world.desk(source="release"))["pause"]
    assert chosen.reference.startswith("registry.k8s.io/")
    assert "the source is now release, it was modules" in world.told.lines[-1]
    world.up = False
    with pytest.raises(Unreachable):  # the choice holds now
        world.obtain()


def test_references_are_pulled_with_the_registrys_password(world: World) -> None:
    world.up = True
    secret = world.tmp / "password"
    secret.write_text("hunter2\nnot this\n")
    registry = Registry("harbor.test.invalid:5000", username="robot", password_file=secret)
    given = "harbor.test.invalid:5000/team/app:1.0@sha256:" + "a" * 64
    image = world.obtain(images=(given,), registries=(registry,))[given]
    assert (given, "sha256:" + "a" * 64, ("robot", "hunter2")) in world.asked
    assert (image.reference, image.archive.origin.source) == (given, "operator")
    entries = json.loads(read(image.archive.path)["index.json"])["manifests"]
    assert [entry["annotations"][NAME] for entry in entries] == [
        "harbor.test.invalid:5000/team/app@sha256:" + "a" * 64,
        "harbor.test.invalid:5000/team/app:1.0",
    ]
    assert len({entry["digest"] for entry in entries}) == 1


def tar_of(path: Path, members: dict[str, bytes], *extra: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for info in extra:
            tar.addfile(info)
    return path


def docker(tags: list[str], arch: str = "amd64") -> dict[str, bytes]:
    """What `docker save` writes."""
    config = json.dumps({"architecture": arch}).encode()
    manifest = [{"Config": "c.json", "RepoTags": tags, "Layers": ["l/layer.tar"]}]
    return {"c.json": config, "l/layer.tar": b"layer", "manifest.json": json.dumps(manifest).encode()}


def oci(name: str, arch: str = "amd64", *, nested: bool = False) -> dict[str, bytes]:
    """What skopeo writes; nested: as buildx does, an index below the index, which names what was not saved."""
    members = {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}'}

    def blob(media_type: str, data: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        members[f"blobs/sha256/{digest}"] = data
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    config = blob("config", json.dumps({"architecture": arch}).encode())
    top = blob(MANIFEST, json.dumps({"config": config, "layers": [blob("layer", b"layer")]}).encode())
    if nested:
        absent = {"mediaType": MANIFEST, "digest": "sha256:" + "0" * 64, "size": 1}
        top = blob(INDEX, json.dumps({"manifests": [absent, top]}).encode())
    annotations = {"org.opencontainers.image.ref.name": name}
    members["index.json"] = json.dumps({"manifests": [{**top, "annotations": annotations}]}).encode()
    return members


@pytest.mark.parametrize(
    ("members", "name"),
    [
        (docker(["nginx:1.29"]), "docker.io/library/nginx:1.29"),
        (docker(["team/app:2"]), "docker.io/team/app:2"),
        (oci("quay.test.invalid/app:3"), "quay.test.invalid/app:3"),
        (oci("quay.test.invalid/app:3", nested=True), "quay.test.invalid/app:3"),
    ],
)
def test_an_operators_archive_is_taken_as_it_is(world: World, members: dict[str, bytes], name: str) -> None:
    path = tar_of(world.tmp / "app.tar", members)
    image = world.obtain(images=(str(path),))[name]
    assert image.reference == name
    assert image.archive.path.read_bytes() == path.read_bytes()
    packed = world.tmp / "app.tar.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert world.obtain(images=(str(packed),))[name].archive.sha256 == hash_file(packed)


def without(members: dict[str, bytes], start: str) -> dict[str, bytes]:
    return {name: data for name, data in members.items() if not name.startswith(start)}


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def damaged(members: dict[str, bytes]) -> dict[str, bytes]:
    return {name: b"other" if data == b"layer" else data for name, data in members.items()}


@pytest.mark.parametrize(
    ("members", "extra", "reason"),
    [
        (docker(["a:1"], "arm64"), [], "for arm64"),
        (oci("q.test.invalid/a:1", "arm64"), [], "for arm64"),
        (docker([]), [], "no name"),
        (oci("latest"), [], "no full name but 'latest'"),
        (oci("team/app:2"), [], "no full name but 'team/app:2'"),
        (oci("q.test.invalid/app"), [], "no full name but 'q.test.invalid/app'"),
        (without(docker(["a:1"]), "l/"), [], "layer l/layer.tar is missing"),
        (without(oci("q.test.invalid/a:1"), "index"), [], "neither index.json nor manifest.json"),
        (damaged(oci("q.test.invalid/a:1")), [], "does not have the bytes"),
        ({**docker(["a:1"]), "manifest.json": b"{"}, [], "not as archives are made"),
        (docker(["a:1\nb:1"]), [], "not an image's name"),
        (oci("q.test.invalid/a b:1"), [], "not an image's name"),
        (oci("q.test.invalid/$(reboot):1"), [], "not an image's name"),
        ({**docker(["a:1"]), "./c.json": b"{}"}, [], "stands twice"),
        ({**docker(["a:1"]), "manifest.json": b"{}"}, [], "0 images"),
        ({**docker(["a:1"]), "manifest.json": b"[{}]"}, [], "no name"),
        ({**docker(["a:1"]), "../out": b""}, [], "leads out"),
        ({**docker(["a:1"]), "/out": b""}, [], "leads out"),
        (docker(["a:1"]), [link("l/x", "../../out")], "leads out"),
        (docker(["a:1"]), [link("x", "/out", tarfile.LNKTYPE)], "leads out"),
        (docker(["a:1"]), [link("x", "", tarfile.CHRTYPE)], "neither a file nor a folder"),
    ],
)
def test_an_archive_that_is_not_right_is_refused(
    world: World, members: dict[str, bytes], extra: list[tarfile.TarInfo], reason: str
) -> None:
    path = tar_of(world.tmp / "app.tar", members, *extra)
    with pytest.raises(BakeError, match=reason) as error:
        world.obtain(images=(str(path),))
    assert error.value.where == path
    assert error.value.remedy


def text(path: Path) -> Path:
    path.write_text("this is no tar")
    return path


def cut(path: Path) -> Path:
    tar_of(path, oci("q.test.invalid/a:1"))
    path.write_bytes(path.read_bytes()[:2100])
    return path


@pytest.mark.parametrize("make", [text, cut, lambda path: path])
def test_what_is_no_archive_is_refused(world: World, make: Callable[[Path], Path]) -> None:
    path = make(world.tmp / "app.tar")
    with pytest.raises(BakeError, match="cannot be taken"):
        world.obtain(images=(str(path),))


def test_a_mixed_cluster_takes_an_archive_where_it_fits(world: World) -> None:
    one = tar_of(world.tmp / "amd64.tar", docker(["a:1"]))
    other = tar_of(world.tmp / "arm64.tar", docker(["a:1"], "arm64"))
    nodes = (*samples.ha().nodes, samples.node("worker-9", "worker", 29)._replace(arch="arm64"))
    made = world.obtain(images=(str(one), str(other)), nodes=nodes)
    assert made["docker.io/library/a:1"].archive.sha256 == hash_file(one)


def test_two_images_of_one_name_are_refused(world: World) -> None:
    one = tar_of(world.tmp / "one.tar", docker(["a:1"]))
    other = tar_of(world.tmp / "other.tar", {**docker(["a:1"]), "more": b""})
    with pytest.raises(BakeError, match=r"two different images are called docker\.io/library/a:1"):
        world.obtain(images=(str(one), str(other)))


def test_registries_become_hosts_toml(tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_text("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n")
    secret = tmp_path / "password"
    secret.write_text("hunter2\n")
    cluster = samples.ha(
        registries=(
            Registry("harbor.test.invalid:5000", ca=ca, username="robot", password_file=secret),
            Registry("docker.io", mirrors=("https://one.test.invalid", "https://two.test.invalid/v2/hub")),
        )
    )
    files = {file.path: file for file in images.registry_files(cluster)}
    own = "/etc/containerd/certs.d/harbor.test.invalid:5000"
    assert files[f"{own}/ca.crt"].data == ca.read_bytes()
    assert tomllib.loads((files[f"{own}/hosts.toml"].data or b"").decode()) == {
        "server": "https://harbor.test.invalid:5000",
        "ca": f"{own}/ca.crt",
    }
    hub = (files["/etc/containerd/certs.d/docker.io/hosts.toml"].data or b"").decode()
    assert tomllib.loads(hub) == {
        "server": "https://registry-1.docker.io",
        "host": {
            "https://one.test.invalid": {"capabilities": ["pull", "resolve"]},
            "https://two.test.invalid/v2/hub": {"capabilities": ["pull", "resolve"], "override_path": True},
        },
    }
    assert hub.index("one.test") < hub.index("two.test")  # containerd asks them in this order
    assert not any(b"hunter2" in (file.data or b"") or file.mode != 0o644 for file in files.values())
    [config] = images.registry_credentials(cluster)
    assert (config.path, config.mode, config.owner) == ("/var/lib/kubelet/config.json", 0o600, "root")
    [auth] = json.loads(config.data or b"")["auths"].values()
    assert base64.b64decode(auth["auth"]) == b"robot:hunter2"
    assert images.registry_credentials(samples.ha()) == []


def test_a_password_is_the_whole_first_line(tmp_path: Path) -> None:
    (tmp_path / "password").write_bytes(" a\x0bb\u2028c: \r\nno more\n".encode())
    registry = Registry("r.test.invalid", username="u", password_file=tmp_path / "password")
    assert images.credentials(registry) == ("u", " a\x0bb\u2028c: ")


def test_what_a_registry_names_must_be_readable(tmp_path: Path) -> None:
    registry = Registry("r.test.invalid", ca=tmp_path / "none", username="u", password_file=tmp_path / "none")
    for make in (images.registry_files, images.registry_credentials):
        with pytest.raises(BakeError, match="cannot be read"):
            make(samples.ha(registries=(registry,)))
    (tmp_path / "none").write_text("\n")
    with pytest.raises(BakeError, match="no PEM"):
        images.registry_files(samples.ha(registries=(registry,)))
    with pytest.raises(BakeError, match="empty"):
        images.registry_credentials(samples.ha(registries=(registry,)))


def test_not_served_falls_back_as_unreachable_does(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Pulled:
        raise NotServed("the registry refuses", where="registry.k8s.io")

    monkeypatch.setattr(images, "pull_image", refuse)
    assert world.obtain()["pause"].reference == "nodebake.local/pause:3.10.2"
