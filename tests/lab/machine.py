"""One machine of a lab, whatever it is made of: power, drives, a cable, programs that are run on it."""

from __future__ import annotations

import shutil
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, TypeVar

from recipes.kit.errors import BakeError
from recipes.kit.model import Node
from tests.lab import host
from tests.lab.host import Argument, LabError
from tests.lab.namespaces import Namespaces
from tests.lab.network import Switch

_Value = TypeVar("_Value")


class WentOff(BakeError):
    """A machine that was waited for ended. No LabError: waiting on is in vain."""


def wait(condition: Callable[[], _Value], seconds: float, what: str, pause: float = 0.2) -> _Value:
    """Asks until the answer is true, and gives it back; errors count as no. Raises LabError with the last of them.
    pause: seconds from an answer to the next question."""
    deadline = time.monotonic() + seconds
    while True:
        told = ""
        try:
            if answer := condition():
                return answer
        except LabError as error:
            told = f": {error}"
        if time.monotonic() > deadline:
            raise LabError(f"Not after {seconds:g} s: {what}{told}")
        time.sleep(pause)


class Machine(ABC):
    """node: of the cluster. folder: for its disk and drives. Switched off until power_on()."""

    patience: ClassVar[float] = 1  # how many times as long as a container it may take for anything
    pause: ClassVar[float] = 0.2  # seconds between questions to it, which cost it something

    def __init__(self, node: Node, folder: Path, inside: Namespaces, switch: Switch) -> None:
        self.node, self.name = node, node.name
        self._folder, self._inside, self._switch = folder, inside, switch
        self._console = folder / "console.log"
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir()

    # -- power --------------------------------------------------------------------------------------------------------

    def power_on(self) -> None:
        """Comes back at once; what the machine then does is waited for with wait()."""
        if self.is_on:
            raise LabError("It is on already", where=self.name)
        command = self._boot()
        with self._console.open("ab") as console:
            self._process = self._inside.start(command, stdout=console)

    @abstractmethod
    def _boot(self) -> list[Argument]:
        """Plugs the cards in; the command, in the lab's namespaces, that runs while the machine is on and prints its
        console."""

    @abstractmethod
    def crash(self) -> None:
        """The plug is pulled: everything on the machine ends at once, nothing is told."""

    @abstractmethod
    def shutdown(self, seconds: float = 120) -> None:
        """The power button; waits until the machine is off."""

    @property
    def is_on(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    @abstractmethod
    def first(self) -> int:
        """The PID, on the host, of the process with which the machine ends."""

    def _ended(self, seconds: float) -> None:
        assert self._process is not None
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise LabError(f"It is not off after {seconds:g} s", where=self.name) from None
        self._switch.unplug(self.node)

    def scrap(self) -> None:
        """The machine is off, and its disk goes with all that is on it."""
        if self.is_on:
            raise LabError("It is on", where=self.name, remedy="crash() or shutdown() it first.")
        shutil.rmtree(self._folder)

    # -- drives and cable ---------------------------------------------------------------------------------------------

    @abstractmethod
    def insert(self, iso: Path) -> None:
        """Another volume, found by its own label; it takes the place of one with the same label."""

    @abstractmethod
    def eject(self, label: str) -> None: ...

    def cut(self) -> None:
        """No frame comes or goes until heal(), though the cards have a link; a power cycle does not mend it."""
        self._switch.set_forwarding(self.node, False)

    def heal(self) -> None:
        self._switch.set_forwarding(self.node, True)

    # -- looking in ---------------------------------------------------------------------------------------------------

    def run(
        self, *command: Argument, check: bool = True, stdin: str | None = None, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Runs a program on the machine, as root; with one word, a shell's command line."""
        return host.run(self._command(command), check=check, stdin=stdin, timeout=timeout * self.patience)

    def start(self, *command: Argument) -> subprocess.Popen[str]:
        """A program that goes on while the test does; its output can be read, stderr with stdout."""
        return subprocess.Popen(
            self._command(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    @abstractmethod
    def _command(self, command: tuple[Argument, ...]) -> list[Argument]:
        """What the host has to run for it."""

    def wait(self, condition: Callable[[], _Value], seconds: float, what: str) -> _Value:
        """As wait() of this module, with the machine's patience; but a machine that went off is told at once."""

        def asked() -> _Value:
            if not self.is_on:
                raise WentOff(f"It went off while it was waited for: {what}\n{self.console[-2000:]}", where=self.name)
            return condition()

        return wait(asked, seconds * self.patience, f"{self.name}: {what}", self.pause)

    def wait_booted(self, seconds: float = 120) -> str:
        """Until cloud-init is through, and says "done", or "error: ..."."""
        return self.wait(self._cloud_init, seconds, "cloud-init is through")

    def _cloud_init(self) -> str:
        told = self.run("cloud-init status --format=json", check=False).stdout
        return "" if '"status": "not started"' in told or '"status": "running"' in told else told

    @abstractmethod
    def write(self, path: str, text: str) -> None:
        """A file of the disk, with its folder."""

    @abstractmethod
    def read(self, path: str) -> str:
        """A file of the disk."""

    @property
    def console(self) -> str:
        return self._console.read_text(errors="replace") if self._console.exists() else ""

    @property
    @abstractmethod
    def journal(self) -> str:
        """All boots."""

    def keep_logs(self, target: Path) -> None:
        """Console, journal, cloud-init's and pods' logs, and, of a machine that is on, what it looks like now."""
        target.mkdir(parents=True, exist_ok=True)
        if self._console.exists():
            shutil.copyfile(self._console, target / "console.log")
        told: dict[str, Callable[[], str]] = {"journal.log": lambda: self.journal}
        if self.is_on:
            told["state.log"] = lambda: self.run(_STATE, check=False, timeout=20).stdout
        for name, tell in told.items():
            try:
                (target / name).write_text(tell())
            except LabError as error:
                (target / name).write_text(f"{error}\n")


# On one machine: units, addresses, routes, mounts, containers.
_STATE = """exec 2>&1
systemctl --no-pager --failed; systemctl --no-pager list-jobs
ip address; ip route; ip neighbour; findmnt; df -h; free -m; ps axwwf
PATH=$PATH:/opt/nodebake/current/bin
command -v nft >/dev/null && nft list ruleset
command -v crictl >/dev/null && crictl ps --all && crictl pods
true
"""
