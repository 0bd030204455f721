"""Disk images: a base and a seed become one disk. Read by sfdisk, bsdtar and gzip."""

from __future__ import annotations

import gzip
import json
import random
import stat
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recipes import disk, seed
from recipes.kit import gpt
from recipes.kit.errors import BakeError
from recipes.kit.gpt import SECTOR
from tests.kit.test_gpt import SECTORS, partitioned

OWNER = "3f0c/worker-1"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A disk as Debian's cloud images are: root is number 1 and last, BIOS boot and ESP before it, all full."""
    path = partitioned(tmp_path / "base.raw")
    noise = random.Random(1)  # noqa: S311 - repeatable, not secret
    with path.open("r+b") as file:
        file.write(b"boot code")
        for part in gpt.read(path).partitions.values():
            file.seek(part.start * SECTOR)
            file.write(noise.randbytes(part.length * SECTOR))
    return path


@pytest.fixture
def iso(tmp_path: Path) -> Path:
    path = tmp_path / "seed.iso"
    tarball = tmp_path / "node.tar.gz"
    tarball.write_bytes(b"x" * 3_000_001)
    contents: dict[str, bytes | Path] = {"user-data": b"#cloud-config\n", "node.tar.gz": tarball}
    seed.write_iso(contents, path, label=seed.LABEL, mtime=1_700_000_000)
    return path


def written(target: Path, base: Path, iso: Path, *, renew: bool = False) -> bytes:
    planned = disk.layout(base, iso, "amd64", OWNER, renew=renew)
    disk.write(planned, target)
    data = gzip.decompress(target.read_bytes())
    assert len(data) == planned.size
    return data


def told_by_sfdisk(data: bytes, path: Path) -> dict[str, Any]:
    """The partitions by number."""
    path.write_bytes(data)
    assert "No errors" in subprocess.run(["sfdisk", "--verify", path], capture_output=True, text=True).stdout
    assert "No problems found" in subprocess.run(["sgdisk", "--verify", path], capture_output=True, text=True).stdout
    table = json.loads(subprocess.run(["sfdisk", "--json", path], capture_output=True, check=True).stdout)
    return {part["node"].removeprefix(str(path)): part for part in table["partitiontable"]["partitions"]}


def content(data: bytes, part: dict[str, Any]) -> bytes:
    return data[part["start"] * SECTOR : (part["start"] + part["size"]) * SECTOR]


def test_the_seed_lies_before_the_root_and_nothing_else_has_moved(tmp_path: Path, base: Path, iso: Path) -> None:
    data = written(tmp_path / "out.gz", base, iso)
    parts = told_by_sfdisk(data, tmp_path / "disk")
    before = told_by_sfdisk(base.read_bytes(), tmp_path / "before")
    assert sorted(parts) == ["1", "14", "15", "2"]
    assert parts["14"] | {"node": ""} == before["14"] | {"node": ""}
    assert parts["15"] | {"node": ""} == before["15"] | {"node": ""}
    assert parts["1"] | {"node": "", "start": 0} == before["1"] | {"node": "", "start": 0}
    assert max(parts, key=lambda number: parts[number]["start"]) == "1"
    assert parts["1"]["start"] % gpt.ALIGN == parts["2"]["start"] % gpt.ALIGN == 0
    for number in before:
        assert content(data, parts[number]) == content(base.read_bytes(), before[number])
    assert data[:440] == base.read_bytes()[:440]


def test_the_seed_is_the_iso_byte_for_byte(tmp_path: Path, base: Path, iso: Path) -> None:
    data = written(tmp_path / "out.gz", base, iso)
    [part] = [part for part in told_by_sfdisk(data, tmp_path / "disk").values() if part.get("name") == "seed"]
    (tmp_path / "partition").write_bytes(content(data, part))
    assert content(data, part)[: iso.stat().st_size] == iso.read_bytes()
    listed = subprocess.run(["bsdtar", "-tf", tmp_path / "partition"], capture_output=True, text=True, check=True)
    assert {"node.tar.gz", "user-data"} <= set(listed.stdout.split())
    label = subprocess.run(
        ["blkid", "-p", "-o", "value", "-s", "LABEL", "-s", "TYPE", tmp_path / "partition"], capture_output=True
    )
    assert label.stdout.decode().split() == ["cidata", "iso9660"]


def test_a_base_of_ours_gets_the_machine_s_own_guids(tmp_path: Path, base: Path, iso: Path) -> None:
    kept = gpt.read(base)
    mine = disk.layout(base, iso, "amd64", OWNER, renew=True).table
    another = disk.layout(base, iso, "amd64", "3f0c/worker-2", renew=True).table
    every = [{table.guid, *(part.guid for part in table.partitions.values())} for table in (kept, mine, another)]
    assert not every[0] & every[1] and not every[1] & every[2]
    foreign = disk.layout(base, iso, "amd64", OWNER, renew=False).table
    assert foreign.guid == kept.guid
    assert {number: foreign.partitions[number].guid for number in kept.partitions} == {
        number: part.guid for number, part in kept.partitions.items()
    }


def test_the_same_bytes_again_and_for_its_owner_alone(tmp_path: Path, base: Path, iso: Path) -> None:
    first = written(tmp_path / "one.gz", base, iso, renew=True)
    assert written(tmp_path / "two.gz", base, iso, renew=True) == first
    assert (tmp_path / "one.gz").read_bytes() == (tmp_path / "two.gz").read_bytes()
    assert stat.S_IMODE((tmp_path / "one.gz").stat().st_mode) == 0o600
    assert subprocess.run(["gzip", "-dc", tmp_path / "one.gz"], capture_output=True, check=True).stdout == first


def test_what_is_empty_costs_nearly_nothing(tmp_path: Path, iso: Path) -> None:
    empty = partitioned(tmp_path / "empty.raw")
    written(tmp_path / "out.gz", empty, iso)
    assert (tmp_path / "out.gz").stat().st_size < iso.stat().st_size + SECTORS * SECTOR // 100


def test_a_root_that_is_not_last_is_moved_behind_the_others(tmp_path: Path, base: Path, iso: Path) -> None:
    table = gpt.read(base)
    other = replace(table.partitions[1], kind=gpt.LINUX, start=SECTORS - 2048 - gpt.LAST, length=2048)
    parts = {**table.partitions, 3: other, 1: replace(table.partitions[1], length=20480)}
    moved = replace(table, partitions=parts)
    with base.open("r+b") as file:
        file.write(moved.head(SECTORS))
    planned = disk.layout(base, iso, "amd64", OWNER, renew=False)
    assert planned.table.partitions[3] == other
    assert planned.table.partitions[1].start > planned.table.partitions[2].start >= other.end


def test_which_partition_is_the_root_must_be_told(tmp_path: Path, base: Path, iso: Path) -> None:
    with pytest.raises(BakeError, match="root of arm64 cannot be told") as caught:
        disk.layout(base, iso, "arm64", OWNER, renew=False)
    assert str(gpt.ROOT["arm64"]) in (caught.value.remedy or "")


def test_a_base_that_shrinks_meanwhile_is_told(tmp_path: Path, base: Path, iso: Path) -> None:
    planned = disk.layout(base, iso, "amd64", OWNER, renew=False)
    with base.open("r+b") as file:
        file.truncate(SECTORS * SECTOR // 2)
    with pytest.raises(BakeError, match="shorter"):
        disk.write(planned, tmp_path / "out.gz")
    assert not (tmp_path / "out.gz").exists()
