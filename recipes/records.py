"""What a task obtained, written down as JSON for the tasks behind it: files in the cache, images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recipes.kit import atomic
from recipes.kit.model import Fetched, Image, Origin


def write(path: Path, things: Sequence[Fetched | Image]) -> None:
    text = json.dumps([asdict(thing) for thing in things], indent=1, default=str, sort_keys=True)
    atomic.write(path, text.encode() + b"\n")


def still_there(path: Path) -> bool:
    """Whether the files that a record names are where they were; whoever uses them checks their bytes."""
    try:
        entries = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return all(Path(entry.get("archive", entry)["path"]).exists() for entry in entries)


def read_fetched(path: Path) -> list[Fetched]:
    return [_fetched(entry) for entry in json.loads(path.read_text())]


def read_images(path: Path) -> list[Image]:
    entries = json.loads(path.read_text())
    return [Image(entry["name"], entry["reference"], _fetched(entry["archive"])) for entry in entries]


def _fetched(entry: dict[str, Any]) -> Fetched:
    origin = Origin(**entry["origin"])
    return Fetched(entry["name"], Path(entry["path"]), entry["sha256"], entry["size"], origin)
