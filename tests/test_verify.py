"""`doit verify`: what was baked is accepted; whatever a stranger or a bad medium makes of it is not."""

from __future__ import annotations

import gzip
import io
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest

from recipes import records, seed
from recipes.bake import Bake
from recipes.kit import bounds, manifest, store
from recipes.kit.choices import Choices
from recipes.kit.download import Desk
from recipes.kit.errors import BakeError
from recipes.kit.hashing import hash_file
from recipes.kit.model import Cluster, Fetched, Node, Origin
from recipes.kit.progress import Lines
from recipes.verify import Verifier
from tests import artifacts, samples
from tests.conftest import Project
from tests.kit.test_gpt import partitioned
from tests.test_first_boot import PROGRAM

FOLDER = manifest.FOLDER.lstrip("/")
Members = list[tuple[tarfile.TarInfo, bytes]]


@dataclass(frozen=True)
class World:
    """A cluster with one worker of full media and one of thin, baked of stand-ins."""

    bake: Bake
    full: Node
    thin: Node

    def tarball(self, node: Node) -> Path:
        return self.bake.tarball(node)

    @property
    def payload(self) -> Path:
        return self.bake.payload("worker", "amd64")

    def verify(self, *paths: Path) -> list[str]:
        verifier = Verifier(self.bake)
        return [verifier.of(path) for path in paths]

    def refused(self, path: Path) -> str:
        """In which words."""
        with pytest.raises(BakeError) as caught:
            self.verify(path)
        assert caught.value.remedy, "an error says what to do"
        assert str(path) in str(caught.value)
        return caught.value.what


def make(folder: Path, cluster: Cluster) -> World:
    full, other = cluster.workers[:2]
    thin = other._replace(media="thin")
    cluster = replace(cluster, nodes=tuple(thin if node is other else node for node in cluster.nodes))
    artifacts.secrets(folder, cluster)
    desk = Desk(build=folder / "build", progress=Lines(), choices=Choices(folder / "choices.json"))
    bake = Bake(cluster, desk, folder / f"{cluster.name}.secrets", artifacts.NOW, minting=False)
    parts = artifacts.Parts(folder / "parts")
    for node in (full, thin):
        artifacts.bake(bake.folder, cluster, node, parts, bake.secrets)
        contents = bake.tarball(node)
        sums = Verifier(bake)._tarball(contents, contents).sums("node")
        documents = seed.documents(cluster, node, sums=sums, sign=partial(store.sign, bake.secrets))
        seed.write(documents, contents, bake.seed(node), mtime=artifacts.MTIME)
    seed.write_payloads({"worker-amd64": bake.payload("worker", "amd64")}, bake.volume, mtime=artifacts.MTIME)
    return World(bake, full, thin)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make(tmp_path_factory.mktemp("verify"), samples.ha())


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Another cluster of the same name."""
    return make(tmp_path_factory.mktemp("stranger"), samples.ha())


# ---- what is whole --------------------------------------------------------------------------------------------------


def test_what_was_baked_is_accepted_and_says_what_it_is(world: World) -> None:
    full, thin, payload = world.verify(world.tarball(world.full), world.tarball(world.thin), world.payload)
    assert full.startswith(
        "worker-1 (worker, amd64) of the cluster ha, whole; minted 2026-11-01, to install by 2027-01-30"
    )
    assert thin.startswith("worker-2 ")
    assert payload == "the payload worker-amd64 of the cluster ha, whole"
    seeds = world.verify(world.bake.seed(world.full), world.bake.seed(world.thin), world.bake.volume)
    assert seeds == [full, thin, payload]
    assert not list(world.bake.folder.glob(".verify-*")), "nothing secret is left behind"


def test_a_thin_tarball_is_checked_with_the_payload_that_was_named_before_it(
    world: World, stranger: World, tmp_path: Path
) -> None:
    elsewhere = World(replace(world.bake, desk=replace(world.bake.desk, build=tmp_path)), world.full, world.thin)
    assert "payload was not named" in elsewhere.refused(world.tarball(world.thin))
    assert len(elsewhere.verify(world.payload, world.tarball(world.thin))) == 2
    assert len(elsewhere.verify(world.bake.volume, world.bake.seed(world.thin))) == 2


def test_another_clusters_artifact_is_told_by_its_key(world: World, stranger: World) -> None:
    what = world.refused(stranger.tarball(stranger.full))
    assert "another cluster's" in what
    key = world.bake.secrets.signing.public_pem
    command = ["openssl", "pkey", "-pubin", "-outform", "DER"]
    der = subprocess.run(command, input=key, capture_output=True, check=True).stdout
    digest = subprocess.run(["sha256sum"], input=der, capture_output=True, check=True).stdout.decode().split()[0]
    assert digest in what
    assert "signature of the payload manifest is wrong" in world.refused(stranger.payload)
    assert "another cluster's" in world.refused(stranger.bake.seed(stranger.full))


# ---- tarballs -------------------------------------------------------------------------------------------------------


def packed(members: Members, target: Path, *, behind: bytes = bytes(1024)) -> Path:
    """A tarball as ours are written, of what may be anything."""
    plain = b"".join(
        info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape") + data + bytes(-len(data) % 512)
        for info, data in members
    )
    target.write_bytes(gzip.compress(plain + behind, 1, mtime=0))
    return target


def unpacked(tarball: Path) -> Members:
    members = []
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(tarball.read_bytes()))) as tar:
        for info in tar:
            content = tar.extractfile(info) if info.isreg() else None
            members.append((info, content.read() if content is not None else b""))
    return members


def at(members: Members, name: str) -> int:
    return next(number for number, (info, _) in enumerate(members) if info.name == name)


def entry(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", **more: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data)
    for key, value in more.items():
        setattr(info, key, value)
    return info, data


def changed(name: str, **more: object) -> Callable[[Members], None]:
    def change(members: Members) -> None:
        for key, value in more.items():
            setattr(members[at(members, name)][0], key, value)

    return change


def with_bytes(name: str, edit: Callable[[bytes], bytes]) -> Callable[[Members], None]:
    def change(members: Members) -> None:
        number = at(members, name)
        info, data = members[number]
        data = edit(data)
        info.size = len(data)
        members[number] = info, data

    return change


def added(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", **more: object) -> Callable[[Members], None]:
    return lambda members: members.append(entry(name, kind, data, **more))


def before_all(member: tuple[tarfile.TarInfo, bytes]) -> Callable[[Members], None]:
    return lambda members: members.insert(0, member)


def without(name: str) -> Callable[[Members], None]:
    return lambda members: members.__delitem__(at(members, name))


def twice(members: Members) -> None:
    members.append(members[at(members, CONFIG)])


CONFIG = "etc/containerd/config.toml"
CURRENT = "opt/nodebake/current"
CHANGES: dict[str, tuple[Callable[[Members], None], str]] = {
    "a byte": (with_bytes(CONFIG, lambda data: data[:-1] + b"!"), f"{CONFIG} are not as they were baked"),
    "a mode": (changed(CONFIG, mode=0o4755), "are not as they were baked (kind"),
    "an owner": (changed(CONFIG, uid=1000, gid=1000), "are not as they were baked (kind"),
    "a group": (changed(CONFIG, gid=1000), "not as ours are written"),
    "a link": (changed(CURRENT, linkname="/tmp"), "are not as they were baked (kind"),  # noqa: S108
    "one more file": (added("etc/more", data=b"x"), "f 644 0 etc/more are not"),
    "one file less": (without(CONFIG), f"{CONFIG} are not as they were baked"),
    "a file twice": (twice, "not as ours are written"),
    "a name that climbs": (added("etc/../../x"), "not as ours are written"),
    "an absolute name": (added("/etc/x"), "not as ours are written"),
    "a name with a dot": (added("./etc/x"), "not as ours are written"),
    "a file below a link": (added(f"{CURRENT}/x"), "are not as they were baked (kind"),
    "a device": (added("dev/sda", tarfile.BLKTYPE, devmajor=8), "neither a file nor a folder"),
    "a pipe": (added("run/pipe", tarfile.FIFOTYPE), "neither a file nor a folder"),
    "a hard link": (added("etc/x", tarfile.LNKTYPE, linkname=CONFIG), "neither a file nor a folder"),
    "holes": (added("etc/x", tarfile.GNUTYPE_SPARSE, data=bytes(512)), "sparse"),
    "an extended header": (
        before_all(entry("h", tarfile.XHDTYPE, b"20 path=etc/another\n")),
        "not as ours are written",
    ),
    "a huge header": (added("h", tarfile.XHDTYPE, data=bytes(1 << 17)), "header is too large"),
    "an open folder": (changed("etc/kubernetes", mode=0o777), "etc/kubernetes are folders"),
    "an empty folder": (added("etc/kubernetes/empty", tarfile.DIRTYPE, mode=0o755), "are folders"),
    "the sums": (with_bytes(f"{FOLDER}/payload.SHA256SUMS", lambda data: data[1:] + b"a"), "signature of the payload"),
    "the signature": (with_bytes(f"{FOLDER}/node.SHA256SUMS.sig", lambda data: data[:-1]), "signature of the node"),
    "the description": (
        with_bytes(f"{FOLDER}/node.json", lambda data: data.replace(b"worker-1", b"worker-9")),
        "node.json",
    ),
    "no tree": (without(f"{FOLDER}/payload.tree"), "manifest is not whole"),
    "no manifest": (lambda members: members.clear(), "no manifest"),
}


def repacked(world: World, folder: Path, change: Callable[[Members], None]) -> Path:
    members = unpacked(world.tarball(world.full))
    change(members)
    return packed(members, folder / "node.tar.gz")


def test_the_same_packed_anew_is_accepted(world: World, tmp_path: Path) -> None:
    assert len(world.verify(repacked(world, tmp_path, lambda members: None))) == 1


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_was_changed_in_a_tarball_is_refused(world: World, tmp_path: Path, name: str) -> None:
    change, what = CHANGES[name]
    assert what in world.refused(repacked(world, tmp_path, change))


# What the shell program sees as well; the rest is written by no tar that it would unpack otherwise.
ALIKE = (
    "a byte",
    "a mode",
    "a link",
    "one more file",
    "one file less",
    "an empty folder",
    "the sums",
)


@pytest.mark.parametrize("name", ["nothing", *ALIKE, "the signature", "the description", "a device", "a pipe"])
def test_first_boot_says_the_same(world: World, tmp_path: Path, name: str) -> None:
    change = CHANGES[name][0] if name != "nothing" else lambda members: None
    path = repacked(world, tmp_path, change)
    done = subprocess.run(["sh", PROGRAM, "verify", "--root", tmp_path, path], capture_output=True, text=True)
    assert (done.returncode == 0) == (name == "nothing"), done.stderr


def test_a_tarball_that_is_cut_or_goes_on_is_refused(world: World, tmp_path: Path) -> None:
    members, path = unpacked(world.tarball(world.full)), tmp_path / "node.tar.gz"
    for behind in (b"", bytes(512), bytes(1025), bytes(512) + b"x" * 512):
        assert "end" in world.refused(packed(members, path, behind=behind))
    whole = world.tarball(world.full).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "damaged" in world.refused(path)
    path.write_bytes(whole + b"more")
    assert world.refused(path)


def test_a_bomb_ends_early(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "LEAST", 1 << 20)
    monkeypatch.setattr(bounds, "RATIO", 20)
    members = unpacked(world.tarball(world.full))
    members.append(entry("etc/zeros", data=bytes(64 << 20)))
    assert "bomb" in world.refused(packed(members, tmp_path / "node.tar.gz"))


def test_what_is_no_artifact_is_told(world: World, tmp_path: Path) -> None:
    for number, data in enumerate((b"", b"text", bytes(1 << 20), gzip.compress(b"no tar"), b"\x1f\x8b\x08")):
        path = tmp_path / str(number)
        path.write_bytes(data)
        assert world.refused(path)
    assert "cannot be read: No such file" in world.refused(tmp_path / "gone")
    assert "cannot be read: Is a directory" in world.refused(tmp_path)


# ---- ISOs and disks -------------------------------------------------------------------------------------------------


def test_a_changed_byte_anywhere_in_an_iso_is_refused(world: World, tmp_path: Path) -> None:
    for iso in (world.bake.seed(world.full), world.bake.seed(world.thin), world.bake.volume):
        data = iso.read_bytes()
        signs = (b"CD001", b"#cloud-config", b"local-hostname", b"first-boot", b"\x1f\x8b\x08")
        found = [data.index(sign) for sign in signs if sign in data]
        for place in [*found, *range(0, len(data), len(data) // 40), len(data) - 1]:
            path = tmp_path / "changed.iso"
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            assert world.refused(path), place


def test_an_iso_with_another_machines_seed_around_its_tarball_is_refused(world: World, tmp_path: Path) -> None:
    """Every file of it is of this cluster; but cloud-init would run what was meant for another machine."""
    path, cluster = tmp_path / "mixed.iso", world.bake.cluster
    sign = partial(store.sign, world.bake.secrets)
    documents = seed.documents(cluster, cluster.control_planes[0], sums="0" * 64, sign=sign)
    seed.write(documents, world.tarball(world.full), path, mtime=artifacts.MTIME)
    assert "lies around the tarball" in world.refused(path)


def test_a_disk_image_is_checked_whole(world: World, tmp_path: Path) -> None:
    from recipes import disk

    base = partitioned(tmp_path / "base.raw")
    fetched = Fetched("base-amd64", base, hash_file(base), base.stat().st_size, Origin("base", "", "operator"))
    records.write(world.bake.record("bases", "amd64"), [fetched])
    image = tmp_path / "worker-1.raw.gz"
    disk.write(world.bake.disk_layout(world.full), image)
    assert world.verify(image) == world.verify(world.tarball(world.full))
    raw = gzip.decompress(image.read_bytes())
    for place in (440, raw.index(b"#cloud-config"), len(raw) - 1, *range(0, len(raw), len(raw) // 10)):
        changed = tmp_path / "changed.raw.gz"
        changed.write_bytes(gzip.compress(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :], 1))
        assert world.refused(changed), place
    with base.open("r+b") as file:  # what it is compared with
        file.truncate(base.stat().st_size - 512)
    with pytest.raises(BakeError, match=r"base\.raw: this disk is not as it was when it was taken"):
        world.verify(image)
    world.bake.record("bases", "amd64").unlink()
    with pytest.raises(BakeError, match=r"(?s)is not here, to compare it with.*doit base:amd64"):
        world.verify(image)


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command_checks_real_artifacts(baked: Project, tmp_path: Path) -> None:
    names = [
        f"build/ha/{name}" for name in ("nodes/worker-1.tar.gz", "seeds/control-1.iso", "payloads/worker-amd64.tar.gz")
    ]
    told = baked.doit("verify", *names).stdout.splitlines()
    assert [line.partition(": ")[0] for line in told] == names
    wrong = tmp_path / "wrong.tar.gz"
    data = bytearray((baked.root / names[0]).read_bytes())
    data[len(data) // 2] ^= 1
    wrong.write_bytes(data)
    said = baked.doit("verify", str(wrong), names[2], fails=True).stdout
    assert said.count("ERROR") == 1 and str(wrong) in said and "Traceback" not in said
    assert f"{names[2]}: the payload worker-amd64" in said, "the others are checked all the same"
    assert "no FILE" in baked.doit("verify", fails=True).stdout
