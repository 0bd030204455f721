"""Node -> disk image: a Debian that boots, with the node's seed ISO as one more partition of the same disk.

The kernel mounts that partition as it mounts the ISO, and cloud-init and first boot find it by the same label: nothing
is rendered a second time. The root partition lies last, so that the machine can let it grow to the disk's end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import UUID, uuid5

from recipes.kit import gpt
from recipes.kit.archive import GzipStream
from recipes.kit.atomic import replacing
from recipes.kit.errors import BakeError
from recipes.kit.gpt import ALIGN, FIRST, LAST, SECTOR, Partition, Table
from recipes.kit.model import Arch
from recipes.kit.progress import Advance

_NAMESPACE = UUID("5d3f4c0e-8a1b-4c53-9d0a-6e6f64656261")
SEED = "seed"  # the partition's name; what finds it is the label of the file system in it


@dataclass(frozen=True, slots=True)
class Layout:
    """A machine's disk: its table, its size in sectors, and where each partition's bytes come from."""

    table: Table
    sectors: int
    sources: dict[int, tuple[Path, int, int]]  # partition's number -> file, the byte where it begins there, how many

    @property
    def size(self) -> int:
        """Bytes of the disk, as they will be written."""
        return self.sectors * SECTOR


def layout(base: Path, seed: Path, arch: Arch, owner: str, *, renew: bool) -> Layout:
    """The disk that base (a raw disk image) becomes with this seed.

    Partitions keep their numbers and, but for root, their places. owner ("<cluster's id>/<node>") is what GUIDs are
    derived from: the seed's and, with renew, the disk's and every partition's. Without renew those stay, since what
    boots may look for them. Raises BakeError where base has no table, no number free, or no partition that is the root.
    """
    before = gpt.read(base)
    root = _root(before, base, arch)
    number = next((free for free in range(1, gpt.ENTRIES + 1) if free not in before.partitions), None)
    if number is None:
        raise BakeError("every number for a partition is taken", where=base, remedy="give an image with fewer")
    others = {n: part for n, part in before.partitions.items() if n != root}
    start = _aligned(max((part.end for part in others.values()), default=FIRST))
    size = seed.stat().st_size
    length = max(_aligned(-(-size // SECTOR)), 2 * ALIGN)  # first boot overwrites its first MiB last
    parts = {
        **others,
        number: Partition(gpt.LINUX, _guid(owner, SEED), start, length, name=SEED),
        root: replace(before.partitions[root], start=_aligned(start + length)),
    }
    guid = before.guid
    if renew:
        guid = _guid(owner, "disk")
        parts = {n: replace(part, guid=_guid(owner, str(n))) for n, part in parts.items()}
    sources = {n: (base, part.start * SECTOR, part.length * SECTOR) for n, part in before.partitions.items()}
    sources[number] = (seed, 0, size)
    return Layout(Table(guid, parts, before.mbr), _aligned(parts[root].end + LAST), sources)


def write(disk: Layout, target: Path, advance: Advance = lambda _: None) -> None:
    """Writes the disk, gzip-compressed (0600: the seed is secret). advance is called with the bytes of the disk done.

    Nothing large is in memory, and what is empty on the disk costs nearly nothing. BakeError: a source became shorter.
    """
    with replacing(target) as out, GzipStream(out, advance) as stream:
        stream.put(disk.table.head(disk.sectors))
        at = FIRST
        for number, part in _in_order(disk.table):
            _zeros(stream, (part.start - at) * SECTOR)
            path, begin, length = disk.sources[number]
            _copy(stream, path, begin, length)
            _zeros(stream, part.length * SECTOR - length)
            at = part.end
        _zeros(stream, (disk.sectors - LAST - at) * SECTOR)
        stream.put(disk.table.tail(disk.sectors))
        stream.close()


def _root(table: Table, base: Path, arch: Arch) -> int:
    """Which partition is /: the one of the kind that says so, else the one Linux file system there is."""
    for kind in (gpt.ROOT[arch], gpt.LINUX):
        found = [number for number, part in table.partitions.items() if part.kind == kind]
        if len(found) == 1:
            return found[0]
        if found:
            break
    raise BakeError(
        f"which of its partitions is the root of {arch} cannot be told",
        where=base,
        remedy=f"give that one the type {gpt.ROOT[arch]} (sfdisk --part-type), or an image with one Linux partition",
    )


def _in_order(table: Table) -> Iterator[tuple[int, Partition]]:
    yield from sorted(table.partitions.items(), key=lambda item: item[1].start)


def _copy(stream: GzipStream, path: Path, begin: int, length: int) -> None:
    with path.open("rb", buffering=0) as source:
        source.seek(begin)
        if stream.copy(source, length):
            raise BakeError("a file became shorter while it was copied", where=path, remedy="run doit once more")


def _zeros(stream: GzipStream, length: int) -> None:
    while length > 0:
        stream.put(bytes(min(length, 1 << 20)))
        length -= 1 << 20


def _aligned(sector: int) -> int:
    return -(-sector // ALIGN) * ALIGN


def _guid(owner: str, name: str) -> UUID:
    return uuid5(_NAMESPACE, f"{owner}/{name}")
