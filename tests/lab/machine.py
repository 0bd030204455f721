"""One machine: a disk that outlives power cuts, cards on the switch, drives, and systemd as its first process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from recipes.kit.errors import BakeError
from recipes.kit.model import Node
from tests.lab import cgroups, host, namespaces
from tests.lab.host import PATH, Argument, LabError
from tests.lab.media import Drives
from tests.lab.namespaces import Namespaces
from tests.lab.network import Switch, card_name

SHIMS = Path(__file__).parent / "shims"
# Overlayfs holds none of these: etcd's fsync and containerd's own overlays want a real file system.
_REAL = ("containerd", "kubelet", "etcd")
_Value = TypeVar("_Value")


class WentOff(BakeError):
    """A machine that was waited for ended. No LabError: waiting on is in vain."""


def wait(condition: Callable[[], _Value], seconds: float, what: str) -> _Value:
    """Asks until the answer is true, and gives it back; errors count as no. Raises LabError with the last of them."""
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
        time.sleep(0.2)


class Machine:
    """node: of the cluster. folder: for its disk and drives. Switched off until power_on()."""

    def __init__(self, node: Node, root: Path, folder: Path, inside: Namespaces, switch: Switch) -> None:
        self.node, self.name = node, node.name
        self._folder, self._inside, self._switch = folder, inside, switch
        self._disk = folder / "disk"
        self._console = folder / "console.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._first: int | None = None
        for name in ("upper", "work", "disk", *_REAL):
            (folder / name).mkdir(parents=True)
        self._drives = Drives(folder / "drives")
        for link in node.network.links:
            # cloud-init writes `link-local: []` for netplan, but forgets it when it writes for networkd.
            quiet = folder / "upper/etc/systemd/network" / f"10-cloud-init-{card_name(link)}.network.d"
            quiet.mkdir(parents=True)
            (quiet / "90-lab.conf").write_text("[Network]\nLinkLocalAddressing=no\n")
        if node.serial is not None:
            (folder / "serial").write_text(f"{node.serial}\n")
        shutil.copytree(SHIMS, folder / "upper", symlinks=True, dirs_exist_ok=True)
        for path in (folder / "upper").rglob("*"):
            if path.is_dir():
                path.chmod(0o755)  # whatever the umask was; files are as they were checked in
        layers = f"lowerdir={root},upperdir={folder / 'upper'},workdir={folder / 'work'}"
        inside.run(["mount", "-t", "overlay", "-o", layers, "lab", self._disk])

    # -- power --------------------------------------------------------------------------------------------------------

    def power_on(self) -> None:
        """Comes back at once; what the machine then does is waited for with wait()."""
        if self.is_on:
            raise LabError("It is on already", where=self.name)
        namespace = self._switch.plug_in(self.node)
        groups = cgroups.make(self._folder.parent.name, self.name)
        enter = "".join(f"echo 0 >{group}/cgroup.procs; " for group in groups)
        with self._console.open("ab") as console:
            self._process = self._inside.start(
                ["sh", "-ec", f'{enter}exec "$@"', "power", *self._nspawn(namespace)], stdout=console
            )
        self._first = None

    def crash(self) -> None:
        """The plug is pulled: everything on the machine ends at once, nothing is told."""
        os.kill(self.first, signal.SIGKILL)
        self._ended(20)

    def shutdown(self, seconds: float = 120) -> None:
        """The power button; waits until the machine is off."""
        os.kill(self.first, signal.SIGRTMIN + 4)  # systemd's word for poweroff
        self._ended(seconds)

    @property
    def is_on(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def first(self) -> int:
        """The PID, on the host, of the machine's first process."""
        if not self.is_on:
            raise LabError("It is off", where=self.name, remedy="power_on() it.")
        if self._first is None:
            self._first = self.wait(self._find_first, 20, "systemd starts")
        return self._first

    def _find_first(self) -> int:
        assert self._process is not None
        found = [self._process.pid]
        for pid in found:
            found += namespaces.children(pid)
        return next((pid for pid in found[1:] if _is_first(pid)), 0)

    def _ended(self, seconds: float) -> None:
        assert self._process is not None
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise LabError(f"It is not off after {seconds:g} s", where=self.name) from None
        self._first = None
        self._switch.unplug(self.node)

    def _nspawn(self, namespace: str) -> list[Argument]:
        binds = [f"--bind={self._folder / name}:/var/lib/{name}" for name in _REAL]
        binds += [f"--bind-ro={self._drives.volumes}:/dev/disk/by-label", "--bind=/dev/kmsg"]
        binds += [f"--bind-ro={self._drives.seed}:/var/lib/cloud/seed/nocloud"]
        if self.node.serial is not None:
            binds.append(f"--bind-ro={self._folder / 'serial'}:/run/lab/serial")
        return [
            *("nsenter", f"--net=/run/netns/{namespace}", "--"),
            *("env", "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1", "SYSTEMD_NSPAWN_API_VFS_WRITABLE=network"),
            *("systemd-nspawn", f"--directory={self._disk}", f"--machine={self.name}", f"--hostname={self.name}"),
            *("--boot", "--register=no", "--keep-unit", "--console=read-only", "--resolv-conf=off"),
            *("--link-journal=no", "--capability=all", "--system-call-filter=@keyring bpf"),
            f"--network-namespace-path=/run/netns/{namespace}",
            *binds,
        ]

    def scrap(self) -> None:
        """The machine is off, and its disk goes with all that is on it."""
        if self.is_on:
            raise LabError("It is on", where=self.name, remedy="crash() or shutdown() it first.")
        self._inside.run(["umount", self._disk])
        shutil.rmtree(self._folder)

    # -- drives and cable ---------------------------------------------------------------------------------------------

    def insert(self, iso: Path) -> None:
        """Another volume, found by its own label; it takes the place of one with the same label."""
        self._drives.insert(iso)

    def eject(self, label: str) -> None:
        self._drives.eject(label)

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
        return host.run(self._command(command), check=check, stdin=stdin, timeout=timeout)

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

    def _command(self, command: tuple[Argument, ...]) -> list[Argument]:
        words = ("sh", "-c", *command) if len(command) == 1 else command
        everything = ("--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--root", "--wd")
        clean = ("env", "-i", f"PATH={PATH}", "HOME=/root", "TERM=dumb", "LANG=C.UTF-8")
        return ["nsenter", f"--target={self.first}", *everything, "--", *clean, *words]

    def wait(self, condition: Callable[[], _Value], seconds: float, what: str) -> _Value:
        """As wait() of this module, but a machine that went off is told at once."""

        def asked() -> _Value:
            if not self.is_on:
                raise WentOff(f"It went off while it was waited for: {what}\n{self.console[-2000:]}", where=self.name)
            return condition()

        return wait(asked, seconds, f"{self.name}: {what}")

    def wait_booted(self, seconds: float = 120) -> str:
        """Until cloud-init is through, and says "done", or "error: ..."."""
        return self.wait(self._cloud_init, seconds, "cloud-init is through")

    def _cloud_init(self) -> str:
        told = self.run("cloud-init status --format=json", check=False).stdout
        return "" if '"status": "not started"' in told or '"status": "running"' in told else told

    def write(self, path: str, text: str) -> None:
        """A file of the disk, on or off, with its folder."""
        command: list[Argument] = ["chroot", self._disk, "sh", "-c", 'mkdir -p "${1%/*}" && cat >"$1"', "write", path]
        self._inside.run(command, stdin=text)

    def read(self, path: str) -> str:
        """A file of the disk, on or off."""
        return self._chrooted("cat", path)

    @property
    def console(self) -> str:
        return self._console.read_text(errors="replace") if self._console.exists() else ""

    @property
    def journal(self) -> str:
        """All boots, on or off."""
        return self._chrooted("journalctl", "--no-pager", "--output=short-precise", "--merge")

    def _chrooted(self, *command: str) -> str:
        return self._inside.run(["chroot", self._disk, *command], timeout=120).stdout

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
        for folder in ("cloud-init.log", "cloud-init-output.log", "pods", "kubernetes"):
            self._inside.run(["cp", "-rT", self._disk / "var/log" / folder, target / folder], check=False)


# On one machine: units, addresses, routes, mounts, containers.
_STATE = """exec 2>&1
systemctl --no-pager --failed; systemctl --no-pager list-jobs
ip address; ip route; ip neighbour; findmnt; df -h; free -m; ps axwwf
PATH=$PATH:/opt/nodebake/current/bin
command -v nft >/dev/null && nft list ruleset
command -v crictl >/dev/null && crictl ps --all && crictl pods
true
"""


def _is_first(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        program = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    ids = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()
    return ids[-1] == "1" and b"nspawn" not in program
