"""The rules that hold for every file of the project: types, lint, shell, and the direction of imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent

# What may import what: a module imports only from rows above its own (or from its own row's modules listed before it).
ORDER = [
    [
        "kit.errors",
        "kit.model",
        "kit.sizing",
        "kit.distribution",
        "kit.progress",
        "kit.locks",
        "kit.crew",
        "kit.atomic",
        "kit.hashing",
        "kit.shell",
        "kit.search",
        "kit.fat",
        "kit.gpt",
        "kit.iso",
    ],
    [
        "kit.bounds",
        "kit.choices",
        "kit.download",
        "kit.registry",
        "kit.push",
        "kit.unpack",
        "kit.gotool",
        "kit.buildinfo",
    ],
    ["kit.formats", "kit.places", "kit.emit", "kit.clusterfile", "kit.inventory", "kit.kept"],
    [
        "kit.overlay",
        "kit.archive",
        "kit.manifest",
        "kit.profiles",
        "kit.pki",
        "kit.kubeconfig",
        "kit.vault",
        "kit.store",
        "kit.tarball",
    ],
    ["components", "records", "binaries", "packages", "images", "certificates", "objects", "tokens", "bom"],
    ["payload", "node"],
    ["seed", "base", "disk", "trust", "publish"],
    ["closure", "audit", "bake", "report", "verify"],
]


@pytest.mark.parametrize(
    "command",
    [
        ("ruff", "check", "."),
        ("ruff", "format", "--check", "."),
        ("mypy",),
    ],
    ids=" ".join,
)
def test_linters_find_nothing(command: tuple[str, ...]) -> None:
    done = subprocess.run([BIN / command[0], *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def shell_programs() -> list[Path]:
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True)
    paths = (ROOT / name for name in files.stdout.decode().split("\0") if name)
    return [
        path
        for path in paths
        if path.is_file() and path.read_bytes()[:40].startswith((b"#!/bin/sh", b"#!/usr/bin/env bash"))
    ]


def test_shell_programs_are_clean() -> None:
    programs = shell_programs()
    assert programs
    done = subprocess.run([BIN / "shellcheck", *programs], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def imports_of(path: Path) -> set[str]:
    """The modules of ours that a file imports, inside functions too, without the leading `recipes.`."""
    found: set[str] = set()
    for statement in ast.walk(ast.parse(path.read_text())):
        if isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith("recipes"):
            base = (statement.module or "").removeprefix("recipes").lstrip(".")
            for alias in statement.names:
                dotted = f"{base}.{alias.name}" if base else alias.name
                is_module = (ROOT / "recipes" / (dotted.replace(".", "/") + ".py")).exists()
                found.add(dotted if is_module else base)
        elif isinstance(statement, ast.Import):
            found |= {
                alias.name.removeprefix("recipes.") for alias in statement.names if alias.name.startswith("recipes.")
            }
    return found


def test_imports_point_down_only() -> None:
    rank = {module: (row, place) for row, modules in enumerate(ORDER) for place, module in enumerate(modules)}
    files = {
        path.relative_to(ROOT / "recipes").with_suffix("").as_posix().replace("/", "."): path
        for path in (ROOT / "recipes").rglob("*.py")
    }
    modules = {name: path for name, path in files.items() if not name.endswith("__init__") and name != "kit.graph"}
    assert set(modules) == set(rank), "a module is missing in ORDER, or ORDER names one that is gone"
    upward = [
        f"{name} imports {used}"
        for name, path in modules.items()
        for used in imports_of(path)
        if rank[used] >= rank[name]
    ]
    assert upward == []


def test_only_the_graph_knows_doit() -> None:
    users = [
        path
        for path in (ROOT / "recipes").rglob("*.py")
        if "import doit" in path.read_text() or "from doit" in path.read_text()
    ]
    assert [path.name for path in users] == ["graph.py"]


def test_the_top_level_is_as_fixed() -> None:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True)
    tops = {name.split("/")[0] for name in listed.stdout.decode().split("\0") if name}
    assert {top for top in tops if not top.startswith(".")} <= {
        "dodo.py",
        "pyproject.toml",
        "README.md",
        "recipes",
        "overlays",
        "build",
        "tests",
    }
