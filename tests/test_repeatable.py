"""The same inputs give the same bytes: another time, place, umask, time zone, locale, user, and no network."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import Project, copy_project

NOBODY = 65534
KINDS = ("payloads/*.tar.gz", "payloads/*.json", "nodes/*.tar.gz", "seeds/*.iso", "admin.conf")


def digests(project: Project, cluster: str = "ha") -> dict[str, str]:
    """Path below build/<cluster> -> SHA-256 of everything that leaves the desk, and of the payloads' records."""
    folder = project.root / "build" / cluster
    found = sorted(path for kind in KINDS for path in folder.glob(kind) if path.is_file())
    return {path.relative_to(folder).as_posix(): digest_of(path) for path in found}


@functools.cache
def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def without_network() -> list[str]:
    """The start of a command that has no network, or nothing where this desk does not let one."""
    for words in (["unshare", "-n"], ["unshare", "-rn"]):
        if shutil.which("unshare") and subprocess.run([*words, "true"], capture_output=True).returncode == 0:
            return words
    return []


def as_nobody() -> list[str]:
    """The start of a command that another user runs, or nothing: not root, or the interpreter is root's alone."""
    words = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        return []
    tried = subprocess.run([*words, sys.executable, "-c", "import deflate, doit, isal"], cwd="/", capture_output=True)
    return words if tried.returncode == 0 else []


@dataclass(frozen=True)
class Again:
    """The second bake, and how much of the rest of the world was different."""

    project: Project
    isolated: bool
    other_user: bool


@pytest.fixture(scope="module")
def again(baked: Project) -> Iterator[Again]:
    """A fresh copy of the project with the first one's store, baked where everything else is different."""
    network, user = without_network(), as_nobody()
    folder = Path(tempfile.mkdtemp(prefix="another place "))  # pytest's own folders are closed to other users
    try:
        root = folder / "deeper" / "nodebake ü"
        root.mkdir(parents=True)
        project = copy_project(root)
        for name in ("recipes", "overlays", "dodo.py"):  # of the same state, should somebody be editing
            remove = shutil.rmtree if (root / name).is_dir() else Path.unlink
            remove(root / name)
            copy = shutil.copytree if (baked.root / name).is_dir() else shutil.copy2
            copy(baked.root / name, root / name)
        if user:
            own_cache(root / "build" / "downloads")
            for path in (folder, *folder.rglob("*")):
                if not path.is_relative_to(root / "build" / "downloads" / "sha256") or path.is_dir():
                    os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
        folder.chmod(0o755)
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "TZ": "Asia/Kathmandu",
            "LC_ALL": "C",
            "PYTHONHASHSEED": "77",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        mask = os.umask(0o077)
        try:
            done = subprocess.run(
                [*network, *user, *project.command()],
                cwd=root,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        finally:
            os.umask(mask)
        assert done.returncode == 0, done.stdout
        yield Again(project, isolated=bool(network), other_user=bool(user))
    finally:
        shutil.rmtree(folder)


def own_cache(downloads: Path) -> None:
    """A cache for another user: the same files, folders of its own."""
    cache = downloads.resolve()
    downloads.unlink()
    downloads.mkdir()
    for name in ("sha256", "builds"):
        linked = subprocess.run(["cp", "-al", cache / name, downloads / name], capture_output=True)
        if linked.returncode != 0:  # another file system
            subprocess.run(["cp", "-a", "-T", cache / name, downloads / name], check=True)


def test_everything_else_may_differ(baked: Project, again: Again) -> None:
    first, second = digests(baked), digests(again.project)
    # 2 payloads with their records and what they are made of, 6 machines' tarballs and ISOs, admin.conf
    assert len(first) == 19, sorted(first)
    assert second == first


def test_without_any_network(again: Again) -> None:
    if not again.isolated:
        pytest.skip("this desk lets nobody make a network namespace")


def test_by_another_user(again: Again) -> None:
    if not again.other_user:
        pytest.skip("only root can become another user, where that one may run this interpreter")
    made = again.project.root / "build" / "ha" / "nodes" / "worker-1.tar.gz"
    assert made.stat().st_uid == NOBODY


def test_a_tight_umask_closes_nothing_that_was_open(baked: Project, again: Again) -> None:
    for kind in ("payloads", "nodes", "seeds"):
        for path in (baked.root / "build" / "ha" / kind).iterdir():
            other = again.project.root / "build" / "ha" / kind / path.name
            assert other.stat().st_mode == path.stat().st_mode, path.name


def test_source_date_epoch_is_the_time_of_everything(rebaking: Project, baked: Project) -> None:
    folder = rebaking.root / "build" / "ha"
    names = ("payloads/worker-amd64.tar.gz", "nodes/worker-1.tar.gz", "seeds/worker-1.iso")
    before = digests(baked)
    moment = "1600000000"
    rebaking.doit("node:worker-1", SOURCE_DATE_EPOCH=moment)
    first = {name: digest_of(folder / name) for name in names}
    assert all(first[name] != before[name] for name in names)
    with tarfile.open(folder / names[1]) as tar:
        assert {member.mtime for member in tar} == {int(moment)}
    told = subprocess.run(["isoinfo", "-d", "-i", folder / names[2]], capture_output=True, text=True).stdout
    assert not told or "cidata" in told
    for name in names:
        (folder / name).unlink()
    digest_of.cache_clear()
    rebaking.doit("node:worker-1", SOURCE_DATE_EPOCH=moment, TZ="Pacific/Apia")
    assert {name: digest_of(folder / name) for name in names} == first


def test_a_wrong_source_date_epoch_is_told(rebaking: Project) -> None:
    told = rebaking.doit("node:worker-1", fails=True, SOURCE_DATE_EPOCH="yesterday").stdout
    assert "SOURCE_DATE_EPOCH=yesterday" in told and "Traceback" not in told
