"""Single files out of upstream's archives."""

from __future__ import annotations

import gzip
import hashlib
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from recipes.kit.download import CHUNK, Cache
from recipes.kit.errors import BakeError

LARGEST_FILE = 1 << 30  # bytes; no component comes near, a decompression bomb goes beyond


def unpack(archive: Path, members: Mapping[str, str], cache: Cache) -> dict[str, str]:
    """Take the named members (path in the archive -> name) of a tar.gz into the cache: name -> SHA-256.

    Only regular files below a bound are taken; nothing is ever written at a path that the archive chose.
    """
    found: dict[str, str] = {}
    try:
        # gzip.open reads all members of a gzip file; tarfile's own "r|gz" stops after the first.
        with gzip.open(archive) as plain, tarfile.open(fileobj=plain, mode="r|", bufsize=CHUNK) as tar:
            for entry in tar:
                name = members.get(entry.name.removeprefix("./"))
                if name is None:
                    continue
                content = tar.extractfile(entry) if entry.isreg() else None
                if content is None or name in found or entry.size > LARGEST_FILE:
                    raise BakeError(f"{entry.name} is not one regular file of a sane size", where=archive)
                digest = hashlib.sha256()
                with cache.temporary() as temp:
                    with temp.open("wb") as file:
                        while chunk := content.read(CHUNK):
                            file.write(chunk)
                            digest.update(chunk)
                    found[name] = digest.hexdigest()
                    cache.add(temp, found[name])
                if len(found) == len(members):
                    break
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error) as trouble:
        raise BakeError(f"this is no whole tar.gz: {trouble}", where=archive) from trouble
    return found
