"""One machine with a kernel of its own: QEMU, which emulates every instruction, and a Debian to which nothing is added.

Programs are run on it as its operator would: over SSH, as the administrator of the cluster file (access()), by sudo. So
it has to have its network; of a machine that is cut off there is only the console.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, ClassVar

from recipes.kit.locks import locked
from recipes.kit.model import Arch, Node
from tests.lab import disks, host, media, namespaces, rootfs
from tests.lab.host import LAB, PATH, Argument, LabError
from tests.lab.machine import Machine
from tests.lab.namespaces import Namespaces
from tests.lab.network import Switch

USER = "admin"
DRIVES = 3  # for CDs
MEMORY = {"control-plane": 3072, "worker": 1536, "etcd": 1024, "load-balancer": 1024}  # MiB
# A processor without pointer authentication, which takes an emulator more time than all else.
_EMULATED: Mapping[Arch, Sequence[str]] = {
    "amd64": ("qemu-system-x86_64", "-machine", "q35", "-cpu", "max"),
    "arm64": ("qemu-system-aarch64", "-machine", "virt", "-cpu", "cortex-a76"),
}
# Below /usr/share: by architecture, and whether Secure Boot is on, the program, and the variables that it begins with.
_FIRMWARE: Mapping[tuple[Arch, bool], tuple[str, str]] = {
    ("amd64", False): ("OVMF/OVMF_CODE_4M.fd", "OVMF/OVMF_VARS_4M.fd"),
    ("amd64", True): ("OVMF/OVMF_CODE_4M.secboot.fd", "OVMF/OVMF_VARS_4M.ms.fd"),
    ("arm64", False): ("AAVMF/AAVMF_CODE.no-secboot.fd", "AAVMF/AAVMF_VARS.fd"),
    ("arm64", True): ("AAVMF/AAVMF_CODE.ms.fd", "AAVMF/AAVMF_VARS.ms.fd"),
}
_UNREACHABLE = 255  # ssh's exit code when it is ssh that fails


def key() -> Path:
    """The administrator's private key, made once."""
    path = LAB / "ssh" / "key"
    with locked(path.parent / "lock"):
        if not path.exists():
            host.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", path])
    return path


def access() -> str:
    """What a cluster file has to say, so that programs can be run on its machines."""
    public = key().with_suffix(".pub").read_text().strip()
    return f'users:\n  - {{name: {USER}, sshAuthorizedKeys: ["{public}"]}}\n'


class VirtualMachine(Machine):
    """Its disk is what it wrote upon the disk that all share.

    Heeded at power-on: memory (MiB), clock (as QEMU's option -rtc takes it), kernel_options, disks (raw, beside its
    own), other_cards (MAC addresses of cards without a cable).
    """

    patience, pause = 4, 2
    slowed: ClassVar[int] = 1  # seconds of the host that are one of the machine's

    def __init__(self, node: Node, folder: Path, inside: Namespaces, switch: Switch) -> None:
        super().__init__(node, folder, inside, switch)
        self.memory, self.clock, self.kernel_options = MEMORY[node.role], "utc", ""
        self.disks: list[Path] = []
        self.other_cards: list[str] = []
        self._drives: list[Path | None] = [None] * DRIVES
        self._emulator = rootfs.obtain(rootfs.EMULATOR[node.arch])
        self._firmware: list[Argument] = []  # of one that boots by itself; others QEMU boots from a disk that all share
        self._base = disks.obtain(rootfs.obtain(rootfs.VIRTUAL))
        self._disk = folder / "disk.qcow2"
        backing: list[Argument] = ["-f", "qcow2", "-F", "raw", "-b", self._base.image]
        host.run([*self._emulated("qemu-img"), "create", "-q", *backing, self._disk])

    def _emulated(self, program: str) -> list[Argument]:
        """A program of the emulator's root, with the libraries of that root."""
        root = self._emulator
        libraries = root / "usr/lib/x86_64-linux-gnu"
        loader: list[Argument] = [root / "lib64/ld-linux-x86-64.so.2", "--library-path", libraries]
        environment = [f"QEMU_MODULE_DIR={libraries / 'qemu'}"]
        if self.slowed > 1:
            loader += ["--preload", libraries / "faketime/libfaketimeMT.so.1"]
            environment.append(f"FAKETIME=+0 x{1 / self.slowed}")
        return ["env", *environment, *loader, root / "usr/bin" / program]

    def write_disk(self, image: Path, size: int = 12 << 30, *, secure_boot: bool = False) -> None:
        """Writes a disk image (.raw.gz) on its disk of size bytes, as its operator would; UEFI boots it from now on."""
        self._disk = self._folder / "disk.raw"
        line = 'set -o pipefail; gzip -dc "$1" | dd "of=$2" bs=1M conv=sparse status=none; truncate -s "$3" "$2"'
        host.run(["bash", "-e", "-c", line, "write_disk", image, self._disk, str(size)])
        files = rootfs.obtain(rootfs.FIRMWARE[self.node.arch]) / "usr/share"
        code, variables = _FIRMWARE[self.node.arch, secure_boot]
        own = self._folder / "firmware.fd"
        shutil.copyfile(files / variables, own)
        lock = f"driver=cfi.pflash01,property=secure,value={'on' if secure_boot else 'off'}"
        self._firmware = [
            *(("-global", lock) if self.node.arch == "amd64" else ()),
            *("-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={files / code}"),
            *("-drive", f"if=pflash,unit=1,format=raw,file={own}"),
        ]

    # -- power --------------------------------------------------------------------------------------------------------

    def _boot(self) -> list[Argument]:
        self._inside.run(self._ssh("-O", "exit"), check=False)  # the connection of the boot before
        firmware = self._emulator / "usr/share"
        cards: list[Argument] = []
        for number, mac in enumerate(self.other_cards):
            cards += ["-netdev", f"hubport,id=hub{number},hubid={number}"]
            cards += ["-device", f"virtio-net-pci,netdev=hub{number},mac={mac}"]
        for number, (port, mac) in enumerate(self._switch.taps(self.node)):
            cards += ["-netdev", f"tap,id=net{number},ifname={port},script=no,downscript=no"]
            cards += ["-device", f"virtio-net-pci,netdev=net{number},mac={mac}"]
        drives: list[Argument] = ["-device", "virtio-scsi-pci"]
        for number, iso in enumerate(self._drives):
            medium = f",format=raw,file={iso}" if iso else ""
            drives += ["-drive", f"if=none,id=medium{number},media=cdrom,readonly=on{medium}"]
            drives += ["-device", f"scsi-cd,drive=medium{number},id=drive{number}"]
        # What the machine was told is written is in the host's memory: that outlives the end of QEMU.
        for disk in [self._disk, *self.disks]:
            form = "qcow2" if disk.suffix == ".qcow2" else "raw"
            drives += ["-drive", f"if=virtio,format={form},cache=unsafe,discard=unmap,file={disk}"]
        serial = ["-smbios", f"type=1,serial={self.node.serial}"] if self.node.serial is not None else []
        # "mitigations=off": an emulated processor has none of the defects, and would emulate the remedies.
        line = f"root=PARTLABEL=root console=ttyS0 quiet mitigations=off {self.kernel_options}"
        kernel: list[Argument] = ["-kernel", self._base.kernel, "-initrd", self._base.initrd, "-append", line]
        program, *kind = _EMULATED[self.node.arch]
        return [
            *self._emulated(program),
            *("-L", firmware / "qemu", "-L", firmware / "seabios", "-nodefaults", "-no-user-config"),
            *(*kind, "-smp", "2", "-m", str(self.memory)),
            *("-accel", "tcg,thread=multi,tb-size=512"),
            *("-display", "none", "-serial", "stdio", "-qmp", f"unix:{self._monitor},server=on,wait=off"),
            *("-rtc", f"base={self.clock}", "-device", "virtio-rng-pci", *serial),
            *(self._firmware or kernel),
            *drives,
            *cards,
        ]

    @property
    def _monitor(self) -> Path:
        """The socket by which QEMU is told what to do; in the lab's namespaces, where its path is short."""
        return Path(f"/run/{self.name}.monitor")

    def _tell(self, command: str, **arguments: object) -> None:
        """Raises LabError with QEMU's answer where that is an error."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(20)
            try:
                connection.connect(os.fspath(self._inside.path(self._monitor)))
                with connection.makefile("rw") as lines:
                    lines.readline()  # QEMU's greeting
                    for words in ({"execute": "qmp_capabilities"}, {"execute": command, "arguments": arguments}):
                        lines.write(json.dumps(words) + "\n")
                        lines.flush()
                        while not {"return", "error"} & (answer := json.loads(lines.readline())).keys():
                            pass  # an event
                        if "error" in answer:
                            raise LabError(f"{command}: {answer['error']['desc']}", where=self.name)
            except OSError as error:
                raise LabError(f"QEMU does not answer: {error}", where=self.name) from None

    def crash(self) -> None:
        os.kill(self.first, signal.SIGKILL)
        self._ended(20)

    def shutdown(self, seconds: float = 120) -> None:
        self._tell("system_powerdown")
        self._ended(seconds * self.patience)

    @property
    def first(self) -> int:
        """Of QEMU."""
        if not self.is_on:
            raise LabError("It is off", where=self.name, remedy="power_on() it.")
        assert self._process is not None
        return next(iter(namespaces.children(self._process.pid)))  # nsenter's child

    # -- drives -------------------------------------------------------------------------------------------------------

    def insert(self, iso: Path) -> None:
        labels = [media.label(other) if other else None for other in self._drives]
        wanted = media.label(iso)
        number = labels.index(wanted) if wanted in labels else labels.index(None)
        self._drives[number] = iso
        if self.is_on:
            self._tell("blockdev-change-medium", id=f"drive{number}", filename=os.fspath(iso), format="raw")

    def eject(self, label: str) -> None:
        number = next(number for number, iso in enumerate(self._drives) if iso and media.label(iso) == label)
        self._drives[number] = None
        if self.is_on:
            self._tell("eject", id=f"drive{number}", force=True)

    # -- looking in ---------------------------------------------------------------------------------------------------

    def run(
        self, *command: Argument, check: bool = True, stdin: str | None = None, timeout: float = 60
    ) -> CompletedProcess[str]:
        done = super().run(*command, check=check, stdin=stdin, timeout=timeout)
        if done.returncode == _UNREACHABLE:
            raise LabError(f"It cannot be reached: {done.stderr.strip()}", where=self.name)
        return done

    def _command(self, command: tuple[Argument, ...]) -> list[Argument]:
        words = ("sh", "-c", *command) if len(command) == 1 else command
        clean = ("sudo", "-n", "env", "-i", f"PATH={PATH}", "HOME=/root", "TERM=dumb", "LANG=C.UTF-8")
        line = shlex.join(os.fspath(word) for word in (*clean, *words))
        return self._inside.command([*self._ssh(), line])

    def _ssh(self, *before: str) -> list[Argument]:
        """One connection serves all programs: to make one costs the machine more than most programs do."""
        options: Mapping[str, Any] = {
            "BatchMode": "yes",
            "ConnectTimeout": 10,
            "ControlMaster": "auto",
            "ControlPath": f"/run/{self.name}.ssh",
            "ControlPersist": "yes",
            "IdentitiesOnly": "yes",
            "LogLevel": "ERROR",
            "ServerAliveInterval": 10,
            "ServerAliveCountMax": 3,
            # Its key is learnt once, and has to stay what it is.
            "StrictHostKeyChecking": "accept-new",
            "UserKnownHostsFile": self._folder / "known_hosts",
        }
        told = [f"-o{name}={value}" for name, value in options.items()]
        return ["ssh", "-F", "none", "-i", key(), *told, *before, f"{USER}@{self.node.address}"]

    def write(self, path: str, text: str) -> None:
        """Only while it is on, as everything here."""
        self.run("sh", "-c", 'mkdir -p "${1%/*}" && cat >"$1"', "write", path, stdin=text)

    def read(self, path: str) -> str:
        return self.run("cat", path).stdout

    @property
    def journal(self) -> str:
        return self.run("journalctl", "--no-pager", "--output=short-precise", "--merge").stdout


class Slowed(VirtualMachine):
    """One of more machines than the host has cores for: to each of them time passes at a fifth of its speed, so that
    it gets done within a minute of its own what an API server and etcd have to. All have the same time."""

    slowed = 5
    patience = VirtualMachine.patience * slowed

    def __init__(self, *about: Any) -> None:
        super().__init__(*about)
        self._made = time.time()

    def _boot(self) -> list[Argument]:
        now = self._made + (time.time() - self._made) / self.slowed
        self.clock = datetime.fromtimestamp(now, UTC).strftime("%FT%T")
        return super()._boot()
