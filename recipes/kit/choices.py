"""What a cluster remembers between bakes besides its secrets: which source gave which bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recipes.kit import atomic
from recipes.kit.errors import BakeError
from recipes.kit.locks import locked


class Choices:
    """A small JSON file: section -> key -> value. Kept with the cluster, so that reachability never changes bytes.

    Read afresh each time and written whole (0600, atomic, under a lock), so that two bakes at once lose nothing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def get(self, section: str, key: str) -> Any | None:
        """The JSON value that was remembered, or None. Raises BakeError if the file is damaged."""
        return self._read().get(section, {}).get(key)

    def remember(self, section: str, key: str, value: Any) -> None:
        if self.get(section, key) == value:
            return
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(self.path.with_name(f".{self.path.name}.lock")):
            everything = self._read()
            everything.setdefault(section, {})[key] = value
            text = json.dumps(everything, indent=1, sort_keys=True)
            atomic.write(self.path, text.encode() + b"\n", mode=0o600)

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            read = json.loads(self.path.read_bytes())
            if isinstance(read, dict) and all(isinstance(section, dict) for section in read.values()):
                return read
        except FileNotFoundError:
            return {}
        except ValueError:
            pass
        raise BakeError(
            "this file remembers what earlier bakes of the cluster chose, and it is damaged",
            where=self.path,
            remedy="restore it from a backup; without it the next bake chooses anew, as a first one",
        )
