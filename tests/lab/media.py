"""A machine's drives: which ISO files it finds under /dev/disk/by-label, and what cloud-init reads of its seed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tests.lab import host

_DOCUMENTS = ("user-data", "meta-data", "network-config")


def label(iso: Path) -> str:
    """The volume's own, from its primary descriptor."""
    with iso.open("rb") as file:
        file.seek(16 * 2048 + 40)
        return file.read(32).decode("ascii").rstrip()


class Drives:
    """folder/by-label holds the volumes, by their labels; folder/seed what NoCloud finds on the one called cidata.

    Both folders are bound into the machine read-only, so what changes here it sees at once.
    """

    def __init__(self, folder: Path) -> None:
        self.volumes, self.seed = folder / "by-label", folder / "seed"
        self.volumes.mkdir(parents=True)
        self.seed.mkdir()

    def insert(self, iso: Path) -> None:
        volume = self.volumes / label(iso)
        volume.unlink(missing_ok=True)
        try:
            os.link(iso, volume)  # the machine cannot write to it
        except OSError:
            shutil.copyfile(iso, volume)
        if volume.name == "cidata":
            self._take_documents(volume)

    def eject(self, name: str) -> None:
        (self.volumes / name).unlink()
        if name == "cidata":
            self._take_documents(None)

    def _take_documents(self, iso: Path | None) -> None:
        for document in self.seed.iterdir():
            document.unlink()
        if iso is not None:
            host.run(["bsdtar", "--extract", f"--file={iso}", f"--directory={self.seed}", *_DOCUMENTS])
