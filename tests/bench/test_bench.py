"""The measuring itself, on tiny data. Nothing here asserts how long something took."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.kit import archive
from tests.bench import measure, table
from tests.bench.measure import Goal
from tests.conftest import ROOT


def test_a_run_is_measured_with_its_children(tmp_path: Path) -> None:
    grab = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'b = bytes(1) * 400_000_000'])"
    done = measure.run([sys.executable, "-c", grab], tmp_path)
    small = measure.run([sys.executable, "-c", ""], tmp_path)
    assert done.peak > 400_000_000 > small.peak > 1_000_000
    assert done.seconds > 0 and done.processor > 0


def test_a_run_that_fails_is_no_measurement(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as error:
        measure.run([sys.executable, "-c", "import os, sys; print(os.getcwd()); sys.exit(3)"], tmp_path)
    assert error.value.returncode == 3 and str(tmp_path).encode() in error.value.output


def test_the_floor_reads_and_writes_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [tmp_path / name for name in "ab"]
    for path in inputs:
        path.write_bytes(path.name.encode() * 5_000_000)  # two blocks
    hashed: list[Path] = []
    compressed: list[int] = []
    written: list[bytes] = []
    digest, compress, write = measure._hash, archive.compress, measure._write

    def hashing(path: Path) -> str:
        hashed.append(path)
        return digest(path)

    def compressing(data: bytes) -> bytearray:
        compressed.append(len(data))
        return compress(data)

    def writing(source: Path, target: Path) -> None:
        write(source, target)
        written.append(target.read_bytes())

    monkeypatch.setattr(measure, "_hash", hashing)
    monkeypatch.setattr(archive, "compress", compressing)
    monkeypatch.setattr(measure, "_write", writing)
    found = measure.floor(inputs, [*inputs, inputs[0]], inputs, tmp_path / "out")
    assert sorted(hashed) == inputs
    assert sum(compressed) == 15_000_000 and len(compressed) == 6
    assert written == [path.read_bytes() for path in inputs]
    assert not (tmp_path / "out").exists()
    assert found.seconds == found.hashing + found.compressing + found.writing > 0 and found.processor > 0


def test_warming_reads_all_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(3_000_001))
    assert measure.warm([tmp_path / "file"] * 2) == 6_000_002


def test_one_machines_mac_changes_every_time() -> None:
    text = (ROOT / "recipes" / "clusters" / "ha.yaml").read_text()
    seen = {text}
    for _ in range(3):
        changed = measure.change_mac(text, "worker-3")
        lines = zip(text.splitlines(), changed.splitlines(), strict=True)
        assert ["worker-3" in old for old, new in lines if old != new] == [True]
        assert changed not in seen
        seen.add(text := changed)
    with pytest.raises(ValueError, match="worker-9"):
        measure.change_mac(text, "worker-9")


def test_the_table_tells_what_was_missed(tmp_path: Path) -> None:
    goals = [Goal("bake", 3.0, 1.5, 1.5, "floor"), Goal("memory", 150e6, 300e6, 1, "300 MB", "MB")]
    text = table.written(table.Result(goals, {"hashing": 0.5}, "a desk", 5, 10**9), tmp_path)
    assert "| bake | 3.00 s | 1.50 s (floor) | 2.00x | <= 1.5x | **missed** |" in text
    assert "| memory | 150 MB | 300 MB | 0.50x | <= 1x | met |" in text
    assert "- hashing: 0.50 s" in text and (tmp_path / "bench.md").read_text() == text
    data = json.loads((tmp_path / "bench.json").read_text())
    assert [goal["met"] for goal in data["goals"]] == [False, True] and data["size"] == 10**9
