"""Where the files of an ISO 9660 volume lie, as far as this project's own volumes need it: those of the root folder."""

from __future__ import annotations

from pathlib import Path

from recipes.kit.errors import BakeError

SECTOR = 2048  # bytes
_DESCRIPTOR = 16  # the primary volume descriptor's sector
_LARGEST_FOLDER = 1 << 20  # bytes
_IS_FOLDER, _GOES_ON = 0x02, 0x80  # flags of a record; a file over 4 GiB is several


def is_volume(path: Path) -> bool:
    return _descriptor(path).startswith(b"\x01CD001")


def size(path: Path) -> int:
    """Bytes of the volume; what lies behind belongs to no file of it."""
    return int.from_bytes(_descriptor(path)[80:84], "little") * SECTOR


def files(path: Path, where: Path) -> list[tuple[int, int]]:
    """The first byte and the length of each file, in the order of its root folder. BakeError: the volume is damaged.

    where: what people know it by."""
    descriptor = _descriptor(path)
    with path.open("rb") as file:
        ends = file.seek(0, 2)
        at, length = _extent(descriptor[156:190])
        file.seek(at)
        folder = file.read(min(length, _LARGEST_FOLDER))
    found: list[tuple[int, int]] = []
    goes_on, place = False, 0
    while place + 33 < len(folder):
        size = folder[place]
        if not size:  # no record crosses sectors
            place = (place // SECTOR + 1) * SECTOR
            continue
        record = folder[place : place + size].ljust(34, b"\0")
        place += size
        if record[25] & _IS_FOLDER:
            continue
        start, length = _extent(record)
        if goes_on and found and sum(found[-1]) == start:
            start, length = found[-1][0], found[-1][1] + length
            found.pop()
        found.append((start, length))
        goes_on = bool(record[25] & _GOES_ON)
    if not found or any(start + length > ends for start, length in found):
        raise BakeError("this ISO is damaged", where=where, remedy="copy it again, or bake it again")
    return found


def _descriptor(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(_DESCRIPTOR * SECTOR)
        return file.read(SECTOR).ljust(SECTOR, b"\0")


def _extent(record: bytes) -> tuple[int, int]:
    """The first byte and the length of what a directory record is about."""
    return int.from_bytes(record[2:6], "little") * SECTOR, int.from_bytes(record[10:14], "little")
