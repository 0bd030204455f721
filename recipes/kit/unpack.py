"""Single files out of upstream's archives."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from recipes.kit.bounds import Damaged, members, opened
from recipes.kit.download import CHUNK, Cache
from recipes.kit.errors import BakeError


def unpack(archive: Path, wanted: Mapping[str, str], cache: Cache) -> dict[str, str]:
    """Take the wanted members (path in the archive -> name) of a tar.gz into the cache: name -> SHA-256.

    Only regular files within bounds are taken; nothing is ever written at a path that the archive chose.
    """
    found: dict[str, str] = {}
    try:
        with opened(archive) as tar:
            for entry in members(tar):
                name = wanted.get(entry.name.removeprefix("./"))
                if name is None:
                    continue
                content = tar.extractfile(entry) if entry.isreg() else None
                if content is None or name in found:
                    raise Damaged(f"{entry.name} is not one regular file")
                digest = hashlib.sha256()
                with cache.temporary() as temp:
                    with temp.open("wb") as file:
                        while chunk := content.read(CHUNK):
                            file.write(chunk)
                            digest.update(chunk)
                    found[name] = digest.hexdigest()
                    cache.add(temp, found[name])
                if len(found) == len(wanted):
                    break
    except Damaged as trouble:
        raise BakeError(f"this archive cannot be taken: {trouble}", where=archive) from trouble
    return found
