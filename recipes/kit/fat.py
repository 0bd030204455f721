"""A FAT32 file system with a few files: an EFI system partition without mkfs.vfat and mtools, always the same bytes.

Names are short ones (8.3), as firmware and boot loaders look for. Nothing but the size and the content decides.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping

SECTOR = 512  # bytes; a cluster is one sector, so that 33 MiB are enough for FAT32
LEAST = 34 << 20  # bytes: FAT32 begins with 65,525 clusters
_RESERVED = 32  # sectors before the first table
_SHORT = re.compile(r"([A-Z0-9_~-]{1,8})(?:\.([A-Z0-9_~-]{1,3}))?")
_END = 0x0FFFFFFF
_FOLDER, _FILE, _LABEL = 0x10, 0x20, 0x08
_DATE = (2000 - 1980) << 9 | 1 << 5 | 1  # a file must have one


def image(files: Mapping[str, bytes], size: int, label: str, serial: int) -> bytes:
    """The file system of size bytes (a multiple of 512, LEAST or more). files: "EFI/BOOT/GRUBX64.EFI" -> content."""
    total = size // SECTOR
    # A table has 4 bytes for each cluster; a little too long does no harm.
    per_table = -(-4 * (total - _RESERVED) // (SECTOR + 8)) + 1
    made = bytearray(size)
    table = [0x0FFFFFF8, _END]
    first = _RESERVED + 2 * per_table  # the sector of cluster 2

    def store(content: bytes) -> int:
        """Into the next free clusters; returns the first one's number, 0 of nothing."""
        count = -(-len(content) // SECTOR)
        if not count:
            return 0
        begin = len(table)
        table.extend([*range(begin + 1, begin + count), _END])
        at = (first + begin - 2) * SECTOR
        made[at : at + len(content)] = content
        return begin

    def folder(path: str, above: int) -> int:
        """Takes the folder's clusters before those of what is in it, so that the root is cluster 2."""
        names = sorted({name[len(path) :].partition("/")[0] for name in files if name.startswith(path)})
        own = store(bytes(max(1, -(-32 * (len(names) + 2) // SECTOR)) * SECTOR))
        entries = [_entry(label.ljust(11).encode(), _LABEL, 0, 0)] if not path else []
        if path:
            entries += [_entry(b".".ljust(11), _FOLDER, own, 0), _entry(b"..".ljust(11), _FOLDER, above, 0)]
        for name in names:
            if (content := files.get(path + name)) is not None:
                entries.append(_entry(_short(name), _FILE, store(content), len(content)))
            else:
                entries.append(_entry(_short(name), _FOLDER, folder(f"{path}{name}/", own if path else 0), 0))
        at = (first + own - 2) * SECTOR
        made[at : at + 32 * len(entries)] = b"".join(entries)
        return own

    root = folder("", 0)
    boot = struct.pack(
        "<3s8sHBHBHHBHHHIIIHHIHH12xBBBI11s8s",
        *(b"\xeb\x58\x90", b"NODEBAKE", SECTOR, 1, _RESERVED, 2, 0, 0, 0xF8, 0, 63, 255, 0, total, per_table),
        *(0, 0, root, 1, 6, 0x80, 0, 0x29, serial, label.ljust(11).encode(), b"FAT32   "),
    ).ljust(510, b"\0")
    free = struct.pack("<4s480x4sII12x4s", b"RRaA", b"rrAa", 0xFFFFFFFF, 0xFFFFFFFF, b"\x00\x00\x55\xaa")
    for copy in (0, 6):
        made[copy * SECTOR : (copy + 2) * SECTOR] = boot + b"\x55\xaa" + free
    packed = struct.pack(f"<{len(table)}I", *table)
    for begin in (_RESERVED, _RESERVED + per_table):
        made[begin * SECTOR : begin * SECTOR + len(packed)] = packed
    return bytes(made)


def _short(name: str) -> bytes:
    match = _SHORT.fullmatch(name)
    if match is None:
        raise ValueError(f"{name} is no short name")
    return match[1].ljust(8).encode() + (match[2] or "").ljust(3).encode()


def _entry(name: bytes, attributes: int, cluster: int, size: int) -> bytes:
    high, low = divmod(cluster, 1 << 16)
    return struct.pack("<11sBBBHHHHHHHI", name, attributes, 0, 0, 0, _DATE, _DATE, high, 0, _DATE, low, size)
