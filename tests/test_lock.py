"""The locked Python dependencies: complete, in the ranges that are declared, and installable by hash alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "recipes" / "requirements.txt"
DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text())


def locked() -> dict[str, tuple[str, list[str]]]:
    """Name -> version, and the SHA-256 of each file that may be taken for it."""
    text = LOCK.read_text().replace("\\\n", " ")
    found = {}
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        match = re.fullmatch(r"([a-z0-9-]+)==(\S+)( ; [^-]+?)?((?: +--hash=sha256:[0-9a-f]{64})+)", line)
        assert match, f"not locked by hash: {line[:100]}"
        found[match[1]] = (match[2], re.findall("sha256:([0-9a-f]{64})", match[4]))
    return found


def needed(requirement: Requirement) -> Iterator[Requirement]:
    """A requirement and all that it needs here, as the installed packages say."""
    seen: set[str] = set()
    waiting = [requirement]
    while waiting:
        one = waiting.pop()
        yield one
        if str(one) in seen:
            continue
        seen.add(str(one))
        extras = one.extras or {""}
        for text in requires(one.name) or ():
            more = Requirement(text)
            if more.marker is None or any(more.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(more)


def declared() -> list[Requirement]:
    return [Requirement(text) for text in DECLARED["project"]["dependencies"]]


def test_everything_that_a_bake_imports_is_locked_in_the_range_that_is_asked_for() -> None:
    lock = locked()
    closure = [one for requirement in declared() for one in needed(requirement)]
    assert len({one.name for one in closure}) > 20
    for one in closure:
        name = canonicalize_name(one.name)
        assert name in lock, f"{name} is not locked: renew the lock (recipes/README.md)"
        assert one.specifier.contains(lock[name][0]), f"{one} is asked for, {lock[name][0]} is locked"
        assert one.specifier.contains(version(name)), "this environment is not what is declared"


def test_what_builds_this_package_is_locked_too() -> None:
    lock = locked()
    assert {*DECLARED["build-system"]["requires"]} <= {*DECLARED["dependency-groups"]["build"]} <= set(lock)


def test_the_lock_names_no_place_and_holds_for_both_architectures() -> None:
    assert "://" not in LOCK.read_text()
    assert all(len(files) == len(set(files)) for _, files in locked().values())
    assert len(locked()["cryptography"][1]) > 10, "one for each kind of machine and its source"


def test_by_hash_alone_a_fresh_environment_can_bake(tmp_path: Path) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    pip: list[str | Path] = [python, "-m", "pip", "install", "--quiet", "--no-compile"]
    done = subprocess.run([*pip, "--require-hashes", "-r", LOCK], capture_output=True, text=True)
    if "CI" not in os.environ and re.search("connection|resolution", done.stderr, re.IGNORECASE) and done.returncode:
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", "--no-index", "-e", ROOT], check=True)
    subprocess.run([python, "-m", "pip", "check"], check=True)
    listed = subprocess.run([python, "-m", "doit", "list"], cwd=ROOT, capture_output=True, text=True)
    assert listed.returncode == 0 and "binaries" in listed.stdout, listed.stderr
