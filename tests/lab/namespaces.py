"""The namespaces that a lab lives in: processes, mounts, network, IPC.

Their first process reads from a pipe that only this process holds: when this process ends, however it ends, so does
that one, and the kernel ends every process and every mount in there.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from tests.lab import host
from tests.lab.host import Argument, LabError

# /run is the lab's own: names of network namespaces and systemd-nspawn's locks are not those of the host.
_FIRST = """
set -e
mount -t tmpfs -o mode=0755 lab /run
mkdir -p /run/netns /run/systemd/nspawn
echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6
echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6
ip link set lo up
trap '' CHLD # so that nobody's orphans stay as zombies
echo ready
exec cat >/dev/null
"""
_KINDS = ("--pid", "--mount", "--net", "--ipc")


class Namespaces:
    def __init__(self) -> None:
        self._process = subprocess.Popen(
            ["unshare", *_KINDS, "--fork", "--kill-child=KILL", "--mount-proc", "sh", "-c", _FIRST],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the tests, which end the lab in order
            text=True,
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            told = self._process.communicate()[1].strip()
            raise LabError(
                f"The lab's namespaces cannot be made: {told}", remedy="Run it as root, outside a container."
            )
        (self.first,) = children(self._process.pid)  # its PID on the host

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def path(self, inside: str | Path) -> Path:
        """A path of in there, for this process to look at."""
        return Path(f"/proc/{self.first}/root{inside}")

    def command(self, command: Sequence[Argument]) -> list[Argument]:
        """The command line that runs it in there."""
        return ["nsenter", f"--target={self.first}", *_KINDS, "--", *command]

    def run(
        self, command: Sequence[Argument], *, check: bool = True, stdin: str | None = None, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        return host.run(self.command(command), check=check, stdin=stdin, timeout=timeout)

    def start(
        self, command: Sequence[Argument], stdout: IO[bytes] | int = subprocess.DEVNULL
    ) -> subprocess.Popen[bytes]:
        """A process that goes on, at most as long as the lab does; stdout is its stderr too."""
        return subprocess.Popen(
            self.command(command),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def close(self) -> None:
        """Ends everything in there."""
        self._process.kill()  # and with it, by --kill-child, the first process
        self._process.communicate()
        deadline = time.monotonic() + 10
        while Path(f"/proc/{self.first}").exists() and time.monotonic() < deadline:
            time.sleep(0.01)


def children(pid: int) -> list[int]:
    """PIDs, as the host counts; of a process that is gone, none."""
    try:
        return [
            int(word)
            for path in Path(f"/proc/{pid}/task").iterdir()
            for word in (path / "children").read_text().split()
        ]
    except (FileNotFoundError, ProcessLookupError):
        return []
