"""Where media come from: an operating system that knows the cluster's key takes no other's, whatever is on them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from recipes import seed, trust
from recipes.kit import store
from recipes.kit.model import Cluster
from tests import artifacts, samples
from tests.test_first_boot import run

CHECK = "usr/local/lib/nodebake-trust/check-seed"
READ = "var/lib/cloud/seed/nocloud"
DOCUMENTS = ("user-data", "meta-data", "network-config")
UNREADABLE, FORGED, USAGE = 74, 67, 64


@dataclass(frozen=True)
class Baked:
    """A cluster's key and the medium of its worker-1, as a folder."""

    cluster: Cluster
    minted: store.Secrets
    medium: Path

    @property
    def fingerprint(self) -> str:
        return store.fingerprint(self.minted)


def baked(folder: Path) -> Baked:
    cluster = samples.ha()
    minted = artifacts.secrets(folder, cluster)
    _, tarball = artifacts.bake(folder, cluster, cluster.workers[0], artifacts.Parts(folder / "parts"), minted)
    documents = seed.documents(cluster, cluster.workers[0], sums="5" * 64, sign=partial(store.sign, minted))
    iso = seed.write(documents, tarball, folder / "seed.iso", mtime=artifacts.MTIME)
    (folder / "medium").mkdir()
    subprocess.run(["bsdtar", "-xf", iso.path, "-C", folder / "medium"], check=True)
    subprocess.run(["chmod", "-R", "u+w", folder / "medium"], check=True)
    return Baked(cluster, minted, folder / "medium")


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Baked:
    return baked(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Baked:
    """The same cluster file, baked with another store: everything on it is signed, and whole."""
    return baked(tmp_path_factory.mktemp("theirs"))


@pytest.fixture
def system(ours: Baked, tmp_path: Path) -> Path:
    """An operating system's root onto which our tarball was unpacked."""
    root = tmp_path / "system"
    (root / "run").mkdir(parents=True)
    made = trust.write(ours.cluster, ours.minted, tmp_path / "trust.tar.gz", mtime=artifacts.MTIME)
    subprocess.run(["tar", "-xzf", made.path, "-C", root], check=True)
    return root


@pytest.fixture
def medium(ours: Baked, tmp_path: Path) -> Path:
    """A copy of ours, to be changed."""
    return Path(shutil.copytree(ours.medium, tmp_path / "medium"))


def check(system: Path, medium: Path, shell: str = "sh") -> subprocess.CompletedProcess[str]:
    command: list[str | Path] = [shell, system / CHECK, "--root", system, "--medium", medium]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def read(system: Path) -> dict[str, bytes]:
    """What cloud-init will read."""
    return {path.name: path.read_bytes() for path in (system / READ).rglob("*") if path.is_file()}


# ---- the seed, before cloud-init reads it ---------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["sh", "dash", "bash"])
def test_our_own_seed_is_handed_on(ours: Baked, system: Path, shell: str) -> None:
    for _ in range(2):  # each boot, until first boot is over
        done = check(system, ours.medium, shell)
        assert done.returncode == 0, done.stderr
        assert f"signed with the key {ours.fingerprint}, which this system trusts" in done.stdout
        assert read(system) == {name: (ours.medium / name).read_bytes() for name in DOCUMENTS}
    assert [*(system / "run").iterdir()] == [], "nothing is left behind"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("change", [flip, Path.unlink, link, pipe, partial(Path.write_bytes, data=b"")])
@pytest.mark.parametrize("name", [*DOCUMENTS, "SHA256SUMS", "SHA256SUMS.sig"])
def test_whatever_was_changed_in_it_is_refused(
    system: Path, medium: Path, name: str, change: Callable[[Path], object]
) -> None:
    change(medium / name)
    done = check(system, medium)
    assert done.returncode == FORGED and "->" in done.stderr, done.stdout + done.stderr
    assert read(system) == {}
    assert [*(system / "run").iterdir()] == []


def test_a_seed_signed_anew_by_another_key_is_refused(ours: Baked, theirs: Baked, system: Path, medium: Path) -> None:
    done = check(system, theirs.medium)
    assert done.returncode == FORGED and "not signed by a key that this system trusts" in done.stderr
    (medium / "user-data").write_text("#cloud-config\nruncmd: [[reboot]]\n")
    sums = subprocess.run(["sha256sum", *DOCUMENTS], cwd=medium, capture_output=True, check=True).stdout
    (medium / "SHA256SUMS").write_bytes(sums)
    assert check(system, medium).returncode == FORGED
    (medium / "SHA256SUMS.sig").write_bytes(store.sign(theirs.minted, sums))
    assert check(system, medium).returncode == FORGED
    (medium / "SHA256SUMS.sig").write_bytes(store.sign(ours.minted, sums))
    assert check(system, medium).returncode == 0, "the key alone decides"


def test_a_strangers_seed_leaves_what_was_checked_before(ours: Baked, theirs: Baked, system: Path) -> None:
    assert check(system, ours.medium).returncode == 0
    before = read(system)
    assert check(system, theirs.medium).returncode == FORGED
    assert read(system) == before


def test_any_clusters_seed_and_one_without_signatures_are_refused(system: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in DOCUMENTS:
        (plain / name).write_text("#cloud-config\n")
    assert "no SHA256SUMS" in check(system, plain).stderr
    empty = tmp_path / "empty"
    empty.mkdir()
    assert check(system, empty).returncode == FORGED


def test_a_system_may_know_several_keys_or_none(ours: Baked, theirs: Baked, system: Path) -> None:
    (system / "etc/nodebake-trust/another.pub").write_bytes(theirs.minted.signing.public_pem)
    for one in (ours, theirs):
        assert f"signed with the key {one.fingerprint}" in check(system, one.medium).stdout
    for key in (system / "etc/nodebake-trust").iterdir():
        key.unlink()
    assert check(system, ours.medium).returncode == FORGED
    assert run("verify", "--root", system, ours.medium).returncode == FORGED


def test_wrong_usage_is_told(system: Path) -> None:
    done = subprocess.run(["sh", system / CHECK, "more"], capture_output=True, text=True)
    assert done.returncode == USAGE and done.stderr.startswith("check-seed [--root DIR")


def test_what_is_unpacked_onto_an_image_is_the_same_always(ours: Baked, system: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        trust.write(ours.cluster, ours.minted, tmp_path / name, mtime=artifacts.MTIME)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    units = system / "etc/systemd/system"
    for name in ("local", "main"):
        told = (units / f"cloud-init-{name}.service.d/nodebake-trust.conf").read_text().splitlines()
        assert {f"{word}=nodebake-trust.service" for word in ("Requires", "After")} <= {*told}
    assert f"ExecStart=/{CHECK}" in (units / "nodebake-trust.service").read_text().splitlines()
    assert os.access(system / CHECK, os.X_OK)


# ---- the artifact, by first boot ------------------------------------------------------------------------------------


def test_first_boot_tells_the_key(ours: Baked, tmp_path: Path) -> None:
    done = run("verify", "--root", tmp_path, ours.medium)
    assert done.returncode == 0 and f"signed with the key {ours.fingerprint}" in done.stdout


def test_an_artifact_of_another_key_is_refused_where_the_system_knows_ours(
    ours: Baked, theirs: Baked, system: Path, tmp_path: Path
) -> None:
    assert run("verify", "--root", system, ours.medium).returncode == 0
    before = sorted(system.rglob("*"))
    for command in (
        ("verify", "--root", system, theirs.medium),
        ("install", "--root", system, "--medium", theirs.medium),
    ):
        done = run(*command)
        assert done.returncode == FORGED, done.stdout + done.stderr
        assert f"the key {theirs.fingerprint}, which this system does not trust" in done.stderr
    assert {path for path in system.rglob("*") if path not in before} <= {
        system / place for place in ("var", "var/lib", "var/lib/nodebake", "var/lib/nodebake/lock")
    }
    assert run("verify", "--root", tmp_path / "without", theirs.medium).returncode == 0, "elsewhere it is whole"
    assert run("install", "--root", system, "--medium", ours.medium).returncode == 0


def test_the_fingerprint_typed_by_hand_decides(ours: Baked, theirs: Baked, tmp_path: Path) -> None:
    root = tmp_path / "root"
    right, wrong = ("--fingerprint", ours.fingerprint), ("--fingerprint", theirs.fingerprint)
    assert run("verify", "--root", root, *right, ours.medium).returncode == 0
    done = run("install", "--root", root, "--medium", ours.medium, *wrong)
    assert done.returncode == FORGED
    assert f"signed with the key {ours.fingerprint}, not with {theirs.fingerprint}" in done.stderr
    assert not (root / "opt").exists()
    assert run("install", "--root", root, "--medium", ours.medium, *right).returncode == 0
    assert run("verify", "--root", root, "--fingerprint").returncode == USAGE
