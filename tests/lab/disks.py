"""Disks with a Debian on them, made without mounting anything: GPT, one ext4 partition."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from recipes.kit.locks import locked
from tests.lab import host
from tests.lab.host import LAB, Argument

SIZE = 8 << 30  # bytes; only what is written takes room on the host
_START = 1 << 20  # bytes; where the partition begins
_END = 1 << 20  # bytes; behind it lies the table's copy
_ROOT = "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709"  # what a root partition of x86-64 is known by
_TABLE = f"label: gpt\nstart={_START // 512}, size={(SIZE - _START - _END) // 512}, type={_ROOT}, name=root\n"


@dataclass(frozen=True, slots=True)
class Base:
    """A disk (raw) that is never written to, and what QEMU boots it with."""

    image: Path
    kernel: Path
    initrd: Path


def obtain(root: Path, folder: Path = LAB / "disks") -> Base:
    """The disk with this root (rootfs.VIRTUAL) on the partition named "root", made now (seconds) if it is not there."""
    image = folder / f"{root.name}.raw"
    with locked(folder / "lock"):
        if not image.exists():
            made = image.with_suffix(".part")
            made.unlink(missing_ok=True)
            with made.open("xb") as file:
                os.truncate(file.fileno(), SIZE)
            host.run(["sfdisk", "--quiet", made], stdin=_TABLE)
            options: list[Argument] = ["-q", "-L", "root", "-d", root, "-E", f"offset={_START}"]
            host.run(["mkfs.ext4", *options, made, f"{(SIZE - _START - _END) >> 10}k"])
            made.rename(image)
    boot = root / "boot"
    (kernel,), (initrd,) = boot.glob("vmlinuz-*"), boot.glob("initrd.img-*")
    return Base(image, kernel, initrd)
