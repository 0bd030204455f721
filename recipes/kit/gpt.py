"""GUID partition tables (UEFI 2.10, chapter 5), read from a disk image and written for one.

Places and lengths are sectors of 512 bytes, as partition tables count.
"""

from __future__ import annotations

import binascii
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from recipes.kit.errors import BakeError
from recipes.kit.model import Arch

SECTOR = 512
ALIGN = 2048  # sectors: 1 MiB, where disks and tools want partitions to begin
ENTRIES = 128  # places for partitions; their numbers are 1 to 128
FIRST = 34  # the first sector behind the table
_MOST_ENTRIES = 1024  # that are read
LAST = 33  # sectors at the end of the disk: the table once more

ESP = UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")
LINUX = UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")
ROOT: Mapping[Arch, UUID] = {
    "amd64": UUID("4f68bce3-e8cd-4db1-96e7-fbcaf984b709"),
    "arm64": UUID("b921b045-1df0-41c3-af44-4c6f280d3fae"),
}

_HEADER = struct.Struct("<8s4sII4xQQQQ16sQIII")
_ENTRY = struct.Struct("<16s16sQQQ72s")
_SIGNATURE = b"EFI PART"
_PROTECTIVE = 0xEE


@dataclass(frozen=True, slots=True)
class Partition:
    """One entry: where it begins and how long it is, in sectors."""

    kind: UUID
    guid: UUID
    start: int
    length: int
    attributes: int = 0
    name: str = ""

    @property
    def end(self) -> int:
        """The first sector behind it."""
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class Table:
    """A disk: its GUID, its partitions by number, its first sector (boot code and protective MBR), empty where made
    anew."""

    guid: UUID
    partitions: Mapping[int, Partition]
    mbr: bytes = b""

    def head(self, sectors: int) -> bytes:
        """The first FIRST sectors of a disk of so many."""
        return self._mbr(sectors) + self._header(1, sectors - 1, 2, sectors) + self._entries()

    def tail(self, sectors: int) -> bytes:
        """Its last LAST sectors."""
        return self._entries() + self._header(sectors - 1, 1, sectors - LAST, sectors)

    def _mbr(self, sectors: int) -> bytes:
        whole = min(sectors - 1, 0xFFFFFFFF)
        mbr = bytearray(self.mbr or bytes(510) + b"\x55\xaa")
        protects = [at for at in range(446, 510, 16) if mbr[at + 4] == _PROTECTIVE] or [446]
        struct.pack_into("<B3sB3sII", mbr, protects[0], 0, b"\x00\x02\x00", _PROTECTIVE, b"\xff\xff\xff", 1, whole)
        return bytes(mbr)

    def _entries(self) -> bytes:
        made = bytearray(ENTRIES * _ENTRY.size)
        for number, part in self.partitions.items():
            name = part.name.encode("utf-16-le")[:72]
            fields = (part.kind.bytes_le, part.guid.bytes_le, part.start, part.end - 1, part.attributes, name)
            _ENTRY.pack_into(made, (number - 1) * _ENTRY.size, *fields)
        return bytes(made)

    def _header(self, here: int, other: int, entries: int, sectors: int) -> bytes:
        def packed(crc: int) -> bytes:
            return _HEADER.pack(
                *(_SIGNATURE, b"\x00\x00\x01\x00", _HEADER.size, crc, here, other, FIRST, sectors - LAST - 1),
                *(self.guid.bytes_le, entries, ENTRIES, _ENTRY.size, binascii.crc32(self._entries())),
            )

        return packed(binascii.crc32(packed(0))).ljust(SECTOR, b"\0")


def read(image: Path) -> Table:
    """The table of a raw disk image. BakeError: none is there, or it is damaged."""
    with image.open("rb") as file:
        mbr, head = file.read(SECTOR), file.read(SECTOR)
        if len(head) < SECTOR or not head.startswith(_SIGNATURE):
            raise BakeError(
                "this is no raw disk image with a GUID partition table and sectors of 512 bytes",
                where=image,
                remedy="give a raw one (qemu-img convert -O raw ...) with a GPT, as Debian's cloud images are",
            )
        fields = _HEADER.unpack_from(head)
        length, crc, guid, at, count, size, sum_of_entries = fields[2], fields[3], *fields[8:]
        blank = head[:16] + bytes(4) + head[20:length]
        image_ends = file.seek(0, 2)
        sane = _ENTRY.size <= size <= SECTOR and count <= _MOST_ENTRIES and at * SECTOR <= image_ends
        file.seek(at * SECTOR if sane else 0)
        entries = file.read(count * size if sane else 0)
    if not sane or binascii.crc32(blank) != crc or binascii.crc32(entries) != sum_of_entries:
        raise BakeError("the partition table is damaged", where=image, remedy="fetch the image again")
    partitions = {}
    for number in range(1, min(count, ENTRIES) + 1):
        kind, own, start, last, attributes, name = _ENTRY.unpack_from(entries, (number - 1) * size)
        if any(kind):
            told = name.decode("utf-16-le", "replace").partition("\0")[0]
            kind, own = UUID(bytes_le=kind), UUID(bytes_le=own)
            partitions[number] = Partition(kind, own, start, last - start + 1, attributes, told)
    if len(entries) < count * size or any(part.start < 2 or part.length < 1 for part in partitions.values()):
        raise BakeError("the partition table is damaged", where=image, remedy="fetch the image again")
    if any(part.end * SECTOR > image_ends for part in partitions.values()):
        raise BakeError("the image is shorter than its partitions", where=image, remedy="fetch the image again")
    return Table(UUID(bytes_le=guid), partitions, mbr)
