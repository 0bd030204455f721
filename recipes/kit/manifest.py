"""What an artifact says of itself: every file with size, digest and origin, signed by the cluster's key.

Four files in /opt/nodebake/manifest: NAME.json for people and programs; NAME.tree, one line per file or link with kind,
mode, owner and path; NAME.SHA256SUMS (coreutils' format, paths relative to /) over all files, .json and .tree included;
NAME.SHA256SUMS.sig (ECDSA with SHA-256, DER). A shell with sha256sum, find and openssl can check all of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Literal

from recipes.kit.archive import Entry, entry_of
from recipes.kit.model import USERS, File, Origin

FOLDER = "/opt/nodebake/manifest"
SIGNING_KEY = f"{FOLDER}/signing.pub"
_OURS = Origin("configuration", version("nodebake"), "baked")  # what no component brought: rendered from the overlays


def files(
    name: Literal["payload", "node"],
    entries: Sequence[Entry],
    about: Mapping[str, Any],
    sign: Callable[[bytes], bytes],
    *,
    others: Mapping[str, str] | None = None,
) -> list[File]:
    """The manifest of `entries`. about: further keys of the .json. others: files of another part of the artifact that
    this one vouches for, path -> SHA-256; a node's manifest so names the one payload that it belongs to."""
    ordered = sorted(entries, key=lambda entry: entry.path)
    text = json.dumps({**about, "files": [_described(entry) for entry in ordered]}, indent=2, sort_keys=True)
    described = File(f"{FOLDER}/{name}.json", data=text.encode() + b"\n")
    tree = File(f"{FOLDER}/{name}.tree", data="".join(f"{_line(entry)}\n" for entry in ordered).encode())
    digests = {entry.path: entry.sha256 for entry in [*ordered, entry_of(described), entry_of(tree)] if entry.sha256}
    digests |= others or {}
    sums = "".join(f"{digest}  {path.lstrip('/')}\n" for path, digest in sorted(digests.items())).encode()
    return [
        described,
        tree,
        File(f"{FOLDER}/{name}.SHA256SUMS", data=sums),
        File(f"{FOLDER}/{name}.SHA256SUMS.sig", data=sign(sums)),
    ]


def digest_of_sums(made: Sequence[File], name: Literal["payload", "node"]) -> str:
    """SHA-256 (hex) of NAME.SHA256SUMS: names the whole content of that part in one value."""
    sums = next(file.data for file in made if file.path == f"{FOLDER}/{name}.SHA256SUMS")
    return hashlib.sha256(sums or b"").hexdigest()


def _described(entry: Entry) -> dict[str, Any]:
    told: dict[str, Any] = {"path": entry.path, "size": entry.size, "mode": f"{entry.mode:04o}", "owner": entry.owner}
    if entry.link is not None:
        told["link"] = entry.link
    else:
        told["sha256"] = entry.sha256
    origin = entry.origin or _OURS
    return told | {"component": origin.component, "version": origin.version, "source": origin.source}


def _line(entry: Entry) -> str:
    """As `find` prints it: 'f 644 0 etc/motd', 'l 0 opt/nodebake/current -> 0123'."""
    path, owner = entry.path.lstrip("/"), USERS[entry.owner]
    return f"l {owner} {path} -> {entry.link}" if entry.link is not None else f"f {entry.mode:o} {owner} {path}"
