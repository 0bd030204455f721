"""What a Go program says of how it was built: its modules, as `go version -m` prints them, read from the ELF file.

The linker puts them into a section of their own (Go's package debug/buildinfo describes it): a magic, flags, and from
its 32nd byte on two texts, each behind its length.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

_SECTION = b".go.buildinfo"
_MAGIC = b"\xff Go buildinf:"
_INLINE = 2  # the flag for texts that lie in the section itself, as Go has written them since 1.18
_GUARD = 16  # bytes before and behind the modules' text, by which the linker's output is found
_SECTION_HEADER = struct.Struct("<IIQQQQ")  # name, type, flags, address, offset, size
_LARGEST = 1 << 20  # bytes of a text


@dataclass(frozen=True, slots=True)
class Module:
    path: str
    version: str


@dataclass(frozen=True, slots=True)
class BuildInfo:
    """go: the toolchain ("go1.26.8"). package: the main package. modules: what was linked in, the main module only
    where it has a version."""

    go: str
    package: str
    modules: tuple[Module, ...]

    def module_of(self, package: str) -> Module | None:
        """The module that a package belongs to."""
        holding = [module for module in self.modules if f"{package}/".startswith(f"{module.path}/")]
        return max(holding, key=lambda module: len(module.path), default=None)


def read(program: Path) -> BuildInfo | None:
    """None: this is no Go program, or one that does not say."""
    try:
        with program.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(data)
    except (OSError, ValueError, LookupError, OverflowError, struct.error):  # an empty file, an ELF file that is none
        return None


def _read(data: mmap.mmap) -> BuildInfo | None:
    section = _section(data)
    if not section.startswith(_MAGIC) or not section[15] & _INLINE:
        return None
    go, rest = _text(section[32:])
    told, _ = _text(rest)
    package, modules = "", list[Module]()
    for line in told[_GUARD:-_GUARD].decode().splitlines():
        kind, *fields = line.split("\t")
        if kind == "path":
            package = fields[0]
        elif kind in ("mod", "dep") and fields[1] != "(devel)":
            modules.append(Module(fields[0], fields[1]))
        elif kind == "=>":  # takes the place of the one before
            modules[-1] = Module(fields[0], fields[1])
    return BuildInfo(go.decode(), package, tuple(modules))


def _section(data: mmap.mmap) -> bytes:
    """The section's bytes, of a 64-bit little-endian ELF file, as those for amd64 and arm64 are; else nothing."""
    if data[:6] != b"\x7fELF\x02\x01":
        return b""
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names = struct.unpack_from("<HHH", data, 0x3A)
    headers = [_SECTION_HEADER.unpack_from(data, table + number * size) for number in range(count)]
    strings = headers[names][4]
    for name, _, _, _, offset, length in headers:
        if data[strings + name : strings + name + len(_SECTION) + 1] == _SECTION + b"\0":
            return data[offset : offset + min(length, 2 * _LARGEST)]
    return b""


def _text(data: bytes) -> tuple[bytes, bytes]:
    """The text that data begins with, behind its length (7 bits a byte, the last one below 128), and what follows."""
    length = shift = at = 0
    while True:
        byte = data[at]
        length |= (byte & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if byte < 0x80:
            return data[at : at + length], data[at + length :]
