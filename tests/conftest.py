"""Fixtures that several tests share: whole bakes of real components, in projects of their own.

The cache of components (build/downloads) is the desk's, since filling it takes ten minutes of compiling; everything
else a test makes lies in a temporary folder. What the cache was filled with is remembered in build/tests/choices.json,
as a cluster's store would.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from recipes.records import read_fetched

ROOT = Path(__file__).parent.parent
REMEMBERED = ROOT / "build" / "tests" / "choices.json"


@dataclass(frozen=True)
class Project:
    """A copy of this project whose build/ is its own, but for the cache of components."""

    root: Path

    @property
    def clusters(self) -> Path:
        return self.root / "recipes" / "clusters"

    def doit(self, *words: str, fails: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs doit there; .stdout has stderr too. Asserts that it succeeds, or, with fails, that it does not."""
        done = subprocess.run(
            self.command(*words),
            cwd=self.root,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert (done.returncode != 0) == fails, done.stdout
        return done

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "doit", *words]

    def remember(self, cluster: str) -> None:
        """Gives a cluster's store what the cache was filled with, so that nothing is fetched or built again."""
        store = self.clusters / f"{cluster}.yaml.secrets"
        store.mkdir(mode=0o700, exist_ok=True)
        if REMEMBERED.exists():
            shutil.copyfile(REMEMBERED, store / "choices.json")
            (store / "choices.json").chmod(0o600)


def copy_project(root: Path) -> Project:
    """A fresh copy, without anything baked."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if name.split("/")[0] in ("dodo.py", "pyproject.toml", "recipes", "overlays") and (ROOT / name).exists():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)
    (ROOT / "build" / "downloads").mkdir(parents=True, exist_ok=True)
    (root / "build").mkdir()
    (root / "build" / "downloads").symlink_to(ROOT / "build" / "downloads")
    return Project(root)


@pytest.fixture(scope="session")
def baked(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The sample cluster `ha`, wholly baked from real components. Tests that change something use `rebaking`."""
    project = copy_project(tmp_path_factory.mktemp("baked"))
    project.remember("ha")
    project.doit()
    REMEMBERED.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(project.clusters / "ha.yaml.secrets" / "choices.json", REMEMBERED)
    return project


@pytest.fixture
def rebaking(baked: Project, tmp_path: Path) -> Project:
    """A copy of the baked project at another path, store and state included; large files are hard links."""
    subprocess.run(["cp", "-al", baked.root, tmp_path / "copy"], check=True)
    copy = tmp_path / "copy"
    for folder in (copy / "recipes", copy / "overlays"):  # what a test edits must not be the same file
        fresh = folder.with_name(f"{folder.name}.fresh")
        shutil.copytree(folder, fresh, symlinks=True)
        shutil.rmtree(folder)
        fresh.rename(folder)
    for state in (copy / "build").glob("*/.state.db*"):
        own = state.with_name(f"{state.name}.own")
        shutil.copy2(state, own)
        own.rename(state)
    return Project(copy)


@pytest.fixture(scope="session")
def binaries(baked: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the components' programs: a control plane's, and CoreDNS, which goes into an image."""
    folder = tmp_path_factory.mktemp("programs")
    tarball = baked.root / "build" / "ha" / "payloads" / "control-plane-amd64.tar.gz"
    pattern = ["--wildcards", "--strip-components=4", "opt/nodebake/*/bin/*"]
    subprocess.run(["tar", "-xzf", tarball, "-C", folder, *pattern], check=True)
    obtained = read_fetched(baked.root / "build" / "ha" / "binaries" / "amd64.json")
    shutil.copyfile(next(file.path for file in obtained if file.name == "coredns"), folder / "coredns")
    (folder / "coredns").chmod(0o755)
    return folder
