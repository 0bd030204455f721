"""Files -> tar.gz: always the same bytes, streamed, written whole or not at all.

A *head* is gzip members that hold tar entries without the end-of-archive blocks. A payload on disk is a head and one
constant member with those blocks, so that it is a tarball in its own right; a node tarball is the same head and a small
member with the node's own files. The head is thus compressed once, however many nodes share it.
"""

from __future__ import annotations

import hashlib
import os
import struct
import tarfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import IO, Self

import deflate

from recipes.kit.atomic import replacing
from recipes.kit.crew import CORES
from recipes.kit.errors import BakeError
from recipes.kit.hashing import known
from recipes.kit.model import USERS, File, Origin
from recipes.kit.progress import Advance

CHUNK = 1 << 20  # bytes read at once
PIECE = 1 << 16  # bytes compared at once: small enough for the processor's cache
BLOCK = 4 << 20  # bytes that are compressed as one; part of the format, since it decides the bytes
LEVEL = 1
_END = bytes(2 * tarfile.BLOCKSIZE)
# The end-of-archive blocks as a member of their own, stored rather than compressed: the same bytes from any zlib.
END_MEMBER = (
    bytes((0x1F, 0x8B, 8, 0, 0, 0, 0, 0, 0, 255))  # gzip: no name, no time, unknown system
    + struct.pack("<BHH", 1, len(_END), len(_END) ^ 0xFFFF)
    + _END
    + struct.pack("<II", zlib.crc32(_END), len(_END))
)


@dataclass(frozen=True, slots=True)
class Entry:
    """What was packed of one File: path on the machine, size in bytes, SHA-256 (hex; of a link: None)."""

    path: str
    size: int
    sha256: str | None
    mode: int
    owner: str
    link: str | None = None
    origin: Origin | None = None


@dataclass(frozen=True, slots=True)
class Packed:
    """A tarball as written: its size in bytes, and what is in it (of a node tarball: the tail)."""

    path: Path
    size: int
    entries: tuple[Entry, ...]


def entry_of(file: File) -> Entry:
    """The entry of a File whose bytes are in memory or that is a link."""
    digest = None if file.data is None else hashlib.sha256(file.data).hexdigest()
    size = len(file.data or b"")
    return Entry(file.path, size, digest, _mode(file), file.owner, file.link, file.origin)


def write_payload(
    files: Iterable[File],
    target: Path,
    *,
    mtime: int,
    last: Callable[[Sequence[Entry]], list[File]] = lambda _: [],
    own: Sequence[str] = (),
    advance: Advance = lambda _: None,
) -> Packed:
    """Writes head and end-of-archive member; last() makes the files that need the others' digests (the manifest).

    own: folders that are the project's alone ("/opt/nodebake"): they and those between them and the files get entries
    (0755, root), so that no umask closes them; other folders are the system's, and no entry touches them.
    advance is called with the bytes of tar done. BakeError: a source that is gone or is not what it was, a path twice.
    """
    ordered = _checked(files)
    with replacing(target, mode=0o644) as out, _TarStream(out, mtime, own, advance) as writer:
        entries = [writer.add(file) for file in ordered]
        more = _checked([*ordered, *last(entries)], keep=ordered)
        entries += [writer.add(file) for file in more]
        writer.close()
        out.write(END_MEMBER)
        size = out.tell()
    return Packed(target, size, tuple(entries))


def write_node(
    files: Iterable[File],
    target: Path,
    *,
    mtime: int,
    payload: Path | None = None,
    own: Sequence[str] = (),
) -> Packed:
    """Writes a node tarball: the payload's head, if there is one, and a member with `files`; 0600, for it is secret.

    It is on the disk once atomic.settle() was called.
    BakeError as in write_payload().
    """
    ordered = _checked(files)
    with replacing(target, keep=payload is not None, later=True) as out:
        if payload is not None:
            with payload.open("rb") as head:
                length = _head_length(payload)
                copy_range(head, out, length - keep_alike(head, out, length))
        with _TarStream(out, mtime, own) as writer:
            entries = [writer.add(file) for file in ordered]
            writer.put(_END)
            writer.close()
        size = out.tell()
    return Packed(target, size, tuple(entries))


class GzipStream:
    """Bytes -> gzip (RFC 1952), compressed on several cores.

    Every BLOCK is a member of its own: the same bytes from one thread or four. Use as a context, so that an error
    leaves no thread behind.
    """

    def __init__(self, out: IO[bytes], advance: Advance = lambda _: None) -> None:
        self._out = out
        self._advance = advance
        self._pool: ThreadPoolExecutor | None = None
        self._cores = min(CORES, 4)
        self._waiting: deque[Future[bytearray]] = deque()
        self._block = bytearray(BLOCK)
        self._filled = 0
        self._size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def put(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            room = self._room(len(left))
            room[:] = left[: len(room)]
            left = left[len(room) :]
            self._took(len(room))

    def copy(self, stream: FileIO, length: int, seen: Callable[[memoryview], object] = lambda _: None) -> int:
        """Puts length bytes from where stream stands, and shows them to seen(). Returns how many were not there."""
        while length and (count := stream.readinto(room := self._room(min(CHUNK, length)))):
            seen(room[:count])
            self._took(count)
            length -= count
        return length

    def close(self) -> None:
        while self._waiting:
            self._out.write(self._waiting.popleft().result())
        if self._filled:
            self._out.write(compress(memoryview(self._block)[: self._filled]))
        self._advance(self._size)

    def _room(self, wanted: int) -> memoryview:
        """Where the next bytes go: `wanted` of them, or what the block can take. _took() says that they are there."""
        return memoryview(self._block)[self._filled : self._filled + wanted]

    def _took(self, count: int) -> None:
        end = self._filled + count
        self._size += count
        self._filled = end
        if end < BLOCK:
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._cores)
        self._waiting.append(self._pool.submit(compress, self._block))
        self._block, self._filled = bytearray(BLOCK), 0
        if len(self._waiting) > self._cores + 1:
            self._out.write(self._waiting.popleft().result())
        self._advance(self._size)


class _TarStream(GzipStream):
    """Entries of a tarball, compressed."""

    def __init__(
        self,
        out: IO[bytes],
        mtime: int,
        own: Sequence[str],
        advance: Advance = lambda _: None,
    ) -> None:
        super().__init__(out, advance)
        self._mtime = mtime
        self._own = tuple(f"{folder.rstrip('/')}/" for folder in own)
        self._folders: set[str] = set()

    def add(self, file: File) -> Entry:
        """Puts one file, hashed while it passes unless this run has hashed it."""
        for folder in self._new_folders(file.path):
            self._header(folder, tarfile.DIRTYPE, 0o755, "root")
        if file.link is not None:
            self._header(file.path, tarfile.SYMTYPE, _mode(file), file.owner, link=file.link)
            return entry_of(file)
        if file.data is not None:
            made = entry_of(file)
            if file.sha256 not in (None, made.sha256):
                raise _changed(file, file.path)
            self._header(file.path, tarfile.REGTYPE, file.mode, file.owner, size=made.size)
            self.put(file.data)
        else:
            made = self._stream(file)
        self.put(bytes(-made.size % tarfile.BLOCKSIZE))
        return made

    def _new_folders(self, path: str) -> Iterator[str]:
        for folder in reversed(PurePosixPath(path).parents):
            name = str(folder)
            if f"{name}/".startswith(self._own) and self._own and name not in self._folders:
                self._folders.add(name)
                yield name

    def _header(self, path: str, kind: bytes, mode: int, owner: str, *, size: int = 0, link: str = "") -> None:
        info = tarfile.TarInfo(path.lstrip("/") + ("/" if kind == tarfile.DIRTYPE else ""))
        info.type, info.mode, info.size, info.linkname, info.mtime = kind, mode, size, link, self._mtime
        info.uid = info.gid = USERS[owner]
        info.uname = info.gname = owner
        # GNU rather than pax: long names and sizes over 8 GiB too, read by GNU tar, bsdtar, busybox and Python alike.
        self.put(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict"))

    def _stream(self, file: File) -> Entry:
        assert file.source is not None  # noqa: S101 - held by _checked()
        try:
            stream = file.source.open("rb", buffering=0)
        except OSError as error:
            raise BakeError(
                f"{file.path} cannot be packed: {error.strerror}", where=file.source, remedy="run doit once more"
            ) from error
        with stream:
            stat = os.fstat(stream.fileno())
            size = stat.st_size
            found, digest = known(stat), hashlib.sha256()
            self._header(file.path, tarfile.REGTYPE, file.mode, file.owner, size=size)
            left = self.copy(stream, size, digest.update if found is None else lambda _: None)
        found = found or digest.hexdigest()
        if left or (file.sha256 is not None and file.sha256 != found):
            raise _changed(file, file.source)
        return Entry(file.path, size, found, file.mode, file.owner, None, file.origin)


def compress(block: bytes | bytearray | memoryview) -> bytearray:
    """A gzip member."""
    return deflate.gzip_compress(block, LEVEL)


def _mode(file: File) -> int:
    return 0o777 if file.link is not None else file.mode


def _changed(file: File, where: Path | str) -> BakeError:
    return BakeError(
        f"the bytes for {file.path} are not those that were checked before",
        where=where,
        remedy="remove that file and run doit once more",
    )


def _checked(files: Iterable[File], keep: Sequence[File] = ()) -> list[File]:
    """The files (without those in keep) sorted by path; BakeError for a path that cannot be, or is there twice."""
    seen: dict[str, File] = {}
    for file in files:
        pure = PurePosixPath(file.path)
        parts = (file.data is not None) + (file.source is not None) + (file.link is not None)
        if not pure.is_absolute() or str(pure) != file.path or ".." in pure.parts or pure.parts[0] != "/":
            raise BakeError("a path on the machine must be absolute and plain", where=repr(file.path))
        if any(ord(char) < 32 or char in "\\\x7f" for char in file.path + (file.link or "")):
            raise BakeError("a path on the machine holds a control character or a backslash", where=repr(file.path))
        if parts != 1 or file.owner not in USERS:
            raise BakeError("a file needs one content and a known owner", where=file.path)
        if file.path in seen:
            raise BakeError("two files want the same path on the machine", where=file.path)
        seen[file.path] = file
    for path in seen:
        for folder in PurePosixPath(path).parents:
            if str(folder) in seen:
                raise BakeError("a path on the machine is a file and a folder at once", where=str(folder))
    kept = {file.path for file in keep}
    return [file for path, file in sorted(seen.items()) if path not in kept]


def _head_length(payload: Path) -> int:
    try:
        with payload.open("rb") as file:
            length = file.seek(-len(END_MEMBER), os.SEEK_END)
            whole = file.read() == END_MEMBER
    except OSError as error:
        raise BakeError(f"the payload cannot be read: {error.strerror}", where=payload) from error
    if not whole:
        raise BakeError(
            "this is not a payload as it was written", where=payload, remedy="remove it, run doit once more"
        )
    return length


def keep_alike(source: IO[bytes] | FileIO, out: IO[bytes], length: int) -> int:
    """Keeps what out has already of the length bytes that are to come from source, from where both stand: cuts out off
    where they begin to differ, at the latest behind length, and moves both there. Returns how many bytes were kept."""
    out.flush()
    start, to, kept = source.tell(), out.tell(), 0
    while data := os.pread(source.fileno(), min(PIECE, length - kept), start + kept):
        if data != os.pread(out.fileno(), len(data), to + kept):
            break
        kept += len(data)
    os.ftruncate(out.fileno(), to + kept)
    source.seek(start + kept)
    out.seek(to + kept)
    return kept


def copy_range(source: IO[bytes] | FileIO, out: IO[bytes], length: int) -> None:
    """Copies length bytes from where source stands to where out stands, and moves both behind them.

    Inside the kernel (shared, where the file system can) or through this process. BakeError: source is shorter.
    """
    out.flush()
    start, to, done = source.tell(), out.tell(), 0
    while done < length:
        try:
            copied = os.copy_file_range(
                source.fileno(), out.fileno(), min(length - done, 1 << 30), start + done, to + done
            )
        except (OSError, AttributeError):
            break
        if not copied:
            break
        done += copied
    while done < length and (data := os.pread(source.fileno(), min(CHUNK, length - done), start + done)):
        done += os.pwrite(out.fileno(), data, to + done)
    if done < length:
        raise BakeError("a file became shorter while it was copied", where=source.name, remedy="run doit once more")
    source.seek(start + done)
    out.seek(to + done)
