"""Partition tables, against sfdisk and sgdisk, which know nothing of ours."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from uuid import UUID

import pytest

from recipes.kit import gpt
from recipes.kit.errors import BakeError
from recipes.kit.gpt import SECTOR, Partition, Table

MIB = 1 << 20
SECTORS = 24 * MIB // SECTOR
SCRIPT = """\
label: gpt
label-id: 6A5F7A2E-0E43-4E0B-9F6F-0F1E2D3C4B5A
first-lba: 34
14: start=2048, size=6144, type=21686148-6449-6E6F-744E-656564454649
15: start=8192, size=8192, type=uefi, name="EFI äö"
1: start=16384, size=30720, type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709, attrs="GUID:59"
"""


def partitioned(path: Path) -> Path:
    """A disk as Debian's cloud images are laid out."""
    with path.open("wb") as file:
        file.truncate(SECTORS * SECTOR)
    subprocess.run(["sfdisk", "--quiet", path], input=SCRIPT, text=True, check=True)
    return path


def test_a_table_of_sfdisk_is_read_and_written_back_byte_for_byte(tmp_path: Path) -> None:
    disk = partitioned(tmp_path / "disk")
    table = gpt.read(disk)
    assert {number: (part.start, part.length) for number, part in table.partitions.items()} == {
        14: (2048, 6144),
        15: (8192, 8192),
        1: (16384, 30720),
    }
    assert table.partitions[15].name == "EFI äö"
    assert table.partitions[1].kind == gpt.ROOT["amd64"]
    written = disk.read_bytes()
    assert table.head(SECTORS) == written[: gpt.FIRST * SECTOR]
    assert table.tail(SECTORS) == written[-gpt.LAST * SECTOR :]


def test_a_new_table_is_one_to_sfdisk_and_sgdisk(tmp_path: Path) -> None:
    own = UUID("11111111-2222-3333-4444-555555555555")
    table = Table(own, {3: Partition(gpt.LINUX, UUID(int=7), 2048, 4096, name="seed")})
    disk = tmp_path / "disk"
    disk.write_bytes(table.head(SECTORS) + bytes((SECTORS - gpt.FIRST - gpt.LAST) * SECTOR) + table.tail(SECTORS))
    dumped = json.loads(subprocess.run(["sfdisk", "--json", disk], capture_output=True, check=True).stdout)
    told = dumped["partitiontable"]
    assert (told["label"], told["id"].lower()) == ("gpt", str(own))
    assert [(part["node"][-1], part["start"], part["size"], part["name"]) for part in told["partitions"]] == [
        ("3", 2048, 4096, "seed")
    ]
    assert told["partitions"][0]["type"].lower() == str(gpt.LINUX)
    verified = subprocess.run(["sgdisk", "--verify", disk], capture_output=True, text=True).stdout
    assert "No problems found" in verified
    assert gpt.read(disk).partitions == table.partitions


@pytest.mark.parametrize(
    ("at", "what"),
    [(SECTOR, "no raw disk image"), (SECTOR + 56, "damaged"), (2 * SECTOR + 40, "damaged")],
    ids=["signature", "header", "entry"],
)
def test_a_damaged_table_is_told(at: int, what: str, tmp_path: Path) -> None:
    disk = partitioned(tmp_path / "disk")
    with disk.open("r+b") as file:
        file.seek(at)
        file.write(b"!")
    with pytest.raises(BakeError, match=what):
        gpt.read(disk)


def test_an_image_that_was_cut_off_is_told(tmp_path: Path) -> None:
    disk = partitioned(tmp_path / "disk")
    with disk.open("r+b") as file:
        file.truncate(16 * MIB)
    with pytest.raises(BakeError, match="shorter than its partitions"):
        gpt.read(disk)


def test_an_image_without_a_table_is_told(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"QFI\xfb")
    with pytest.raises(BakeError, match="no raw disk image") as caught:
        gpt.read(tmp_path / "disk")
    assert "qemu-img convert" in (caught.value.remedy or "")
