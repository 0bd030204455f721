"""The EFI system partition, read by dosfstools and mtools."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from recipes.kit import fat

SIZE = 40 << 20
FILES = {
    "EFI/BOOT/BOOTX64.EFI": bytes(range(256)) * 5000,
    "EFI/BOOT/GRUBX64.EFI": b"x" * 513,
    "EFI/DEBIAN/GRUB.CFG": b"set timeout=2\n",
    "EFI/DEBIAN/EMPTY": b"",
    **{f"MANY/{number:08}.TXT": str(number).encode() for number in range(100)},  # more than one cluster of names
}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fat") / "esp"
    path.write_bytes(fat.image(FILES, SIZE, "ESP", 0x1234ABCD))
    return path


def test_it_is_a_whole_fat32(image: Path) -> None:
    checked = subprocess.run(["fsck.vfat", "-n", "-v", image], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    assert "32 bit entries" in checked.stdout
    told = subprocess.run(["blkid", "-p", "-o", "value", "-s", "LABEL", "-s", "UUID", image], capture_output=True)
    assert told.stdout.decode().split() == ["ESP", "1234-ABCD"]


def test_every_file_is_there_as_it_was(image: Path, tmp_path: Path) -> None:
    subprocess.run(["mcopy", "-s", "-n", "-i", image, "::*", tmp_path], check=True)
    found = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == FILES


def test_the_same_bytes_in_any_order(image: Path) -> None:
    assert fat.image(dict(reversed(FILES.items())), SIZE, "ESP", 0x1234ABCD) == image.read_bytes()


def test_a_long_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"grub\.cfg"):
        fat.image({"grub.cfg": b""}, fat.LEAST, "ESP", 1)
