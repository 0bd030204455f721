"""One machine as a container: systemd-nspawn, with systemd as its first process."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

from recipes.kit.model import Node
from tests.lab import cgroups, namespaces, rootfs
from tests.lab.host import PATH, Argument, LabError
from tests.lab.machine import Machine
from tests.lab.media import Drives
from tests.lab.namespaces import Namespaces
from tests.lab.network import Switch, card_name

SHIMS = Path(__file__).parent / "shims"
# Overlayfs holds none of these: etcd's fsync and containerd's own overlays want a real file system.
_REAL = ("containerd", "kubelet", "etcd")


class Container(Machine):
    """Its disk is an overlay of the root that all share; it can be looked at while the machine is off."""

    def __init__(self, node: Node, folder: Path, inside: Namespaces, switch: Switch) -> None:
        super().__init__(node, folder, inside, switch)
        self._disk = folder / "disk"
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
        layers = f"lowerdir={rootfs.obtain()},upperdir={folder / 'upper'},workdir={folder / 'work'}"
        inside.run(["mount", "-t", "overlay", "-o", layers, "lab", self._disk])

    # -- power --------------------------------------------------------------------------------------------------------

    def _boot(self) -> list[Argument]:
        namespace = self._switch.plug_in(self.node)
        groups = cgroups.make(self._folder.parent.name, self.name)
        enter = "".join(f"echo 0 >{group}/cgroup.procs; " for group in groups)
        self._first = None
        return ["sh", "-ec", f'{enter}exec "$@"', "power", *self._nspawn(namespace)]

    def crash(self) -> None:
        os.kill(self.first, signal.SIGKILL)
        self._ended(20)

    def shutdown(self, seconds: float = 120) -> None:
        os.kill(self.first, signal.SIGRTMIN + 4)  # systemd's word for poweroff
        self._ended(seconds)

    @property
    def first(self) -> int:
        """Of the machine's own first process."""
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
        if not self.is_on:
            self._inside.run(["umount", self._disk])
        super().scrap()

    # -- drives --------------------------------------------------------------------------------------------------------

    def insert(self, iso: Path) -> None:
        self._drives.insert(iso)

    def eject(self, label: str) -> None:
        self._drives.eject(label)

    # -- looking in ----------------------------------------------------------------------------------------------------

    def _command(self, command: tuple[Argument, ...]) -> list[Argument]:
        words = ("sh", "-c", *command) if len(command) == 1 else command
        everything = ("--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--root", "--wd")
        clean = ("env", "-i", f"PATH={PATH}", "HOME=/root", "TERM=dumb", "LANG=C.UTF-8")
        return ["nsenter", f"--target={self.first}", *everything, "--", *clean, *words]

    def write(self, path: str, text: str) -> None:
        """On or off."""
        command: list[Argument] = ["chroot", self._disk, "sh", "-c", 'mkdir -p "${1%/*}" && cat >"$1"', "write", path]
        self._inside.run(command, stdin=text)

    def read(self, path: str) -> str:
        """On or off."""
        return self._chrooted("cat", path)

    @property
    def journal(self) -> str:
        """On or off."""
        return self._chrooted("journalctl", "--no-pager", "--output=short-precise", "--merge")

    def _chrooted(self, *command: str) -> str:
        return self._inside.run(["chroot", self._disk, *command], timeout=120).stdout

    def keep_logs(self, target: Path) -> None:
        super().keep_logs(target)
        for folder in ("cloud-init.log", "cloud-init-output.log", "pods", "kubernetes"):
            self._inside.run(["cp", "-rT", self._disk / "var/log" / folder, target / folder], check=False)


def _is_first(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        program = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    ids = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()
    return ids[-1] == "1" and b"nspawn" not in program
