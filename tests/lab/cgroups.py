"""Control groups of a run: one folder for each machine, in every hierarchy that systemd-nspawn looks at.

They are named by the run, so what a killed run left is found by its name, ended and removed.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tests.lab.host import LabError


def _hierarchies() -> Iterator[Path]:
    """cgroup v2, and beside it, on hosts that still have version 1, systemd's own hierarchy."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        head, _, tail = line.partition(" - ")
        kind, _, options = tail.split(" ", 2)
        if kind == "cgroup2" or (kind == "cgroup" and "name=systemd" in options):
            yield Path(re.sub(r"\\040", " ", head.split(" ")[4]))


def folders(run: str) -> list[Path]:
    """The run's folders, whether they are there or not."""
    found = [hierarchy / f"nodebake-lab-{run}" for hierarchy in _hierarchies()]
    if not found:
        raise LabError("No cgroup2 file system is mounted", remedy="mount -t cgroup2 none /sys/fs/cgroup")
    return found


def make(run: str, machine: str) -> list[Path]:
    """Fresh folders for a machine; a process that writes 0 into their cgroup.procs is in them."""
    made = []
    for folder in folders(run):
        _remove(folder / machine)  # of before a power cut
        (folder / machine).mkdir(parents=True)
        _delegate(folder.parent)
        _delegate(folder)
        made.append(folder / machine)
    return made


def processor(run: str) -> float:
    """Seconds of processor that the run's machines have had, those of before a power cut included."""
    for folder in folders(run):
        with suppress(FileNotFoundError):  # version 1 has no such file
            words = (folder / "cpu.stat").read_text().split()
            return int(words[words.index("usage_usec") + 1]) / 1e6
    return 0.0


def remove(run: str) -> None:
    """Ends what still runs there and removes the folders. Raises LabError when something does not end in 20 s."""
    for folder in folders(run):
        _remove(folder)


def _delegate(folder: Path) -> None:
    """Hands on what controllers there are; none where version 1 has them."""
    controllers = folder / "cgroup.controllers"
    for controller in controllers.read_text().split() if controllers.exists() else ():
        with suppress(OSError):  # not to be had in a container's root, where processes are
            (folder / "cgroup.subtree_control").write_text(f"+{controller}")


def _remove(folder: Path) -> None:
    deadline = time.monotonic() + 20
    while folder.exists():
        with suppress(OSError):  # version 1 has no such file; its processes are in version 2's folders too
            (folder / "cgroup.kill").write_text("1")
        for path in sorted(folder.rglob("*"), key=lambda path: len(path.parts), reverse=True):
            with suppress(OSError):
                if path.is_dir():
                    path.rmdir()
        with suppress(OSError):
            folder.rmdir()
            return
        if time.monotonic() > deadline:
            raise LabError("Processes of a lab do not end", where=folder, remedy="Look at its cgroup.procs.")
        time.sleep(0.05)
