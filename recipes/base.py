"""Debian packages -> the disk that disk images begin with: Debian 13 as its cloud images are made, for UEFI machines.

mmdebstrap installs what the lock names, and nothing else, from a folder; no root is needed where the desk has user
namespaces. The root file system is made from its tarball by Debian 13's own mke2fs, so that the desk's version of it
decides nothing. The boot loaders are the signed ones, so Secure Boot may be on; they need no other file of their own on
the machine and follow /vmlinuz and /initrd.img, which Debian's kernel packages keep up to date.
"""

from __future__ import annotations

import getpass
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from uuid import UUID, uuid5

from recipes import packages
from recipes.kit import fat, gpt
from recipes.kit.atomic import replacing
from recipes.kit.download import Desk, fetch
from recipes.kit.errors import BakeError
from recipes.kit.gotool import native_arch
from recipes.kit.gpt import ALIGN, LAST, SECTOR, Partition, Table
from recipes.kit.hashing import sha256_of
from recipes.kit.model import Arch, BaseImage, Cluster, Fetched, Origin

# Besides the minimal system. Everything that first boot's packages need comes with them; a machine without anything
# more can still be logged in to, looked at, and given a larger disk.
PACKAGES = (
    "ca-certificates",
    "cloud-guest-utils",  # growpart
    "cloud-init",
    "dbus",
    "e2fsprogs",
    "fdisk",  # for growpart
    "initramfs-tools",
    "iproute2",
    "iputils-ping",
    "kmod",
    "less",
    "libpam-systemd",
    "netplan.io",
    "openssh-server",
    "sudo",
    "systemd-resolved",
    "systemd-timesyncd",
    "udev",
    "zstd",  # for initramfs-tools
)
KERNEL: Mapping[Arch, str] = {"amd64": "linux-image-amd64", "arm64": "linux-image-arm64"}
LOADERS: Mapping[Arch, tuple[str, ...]] = {
    arch: ("shim-signed", f"grub-efi-{arch}-signed") for arch in ("amd64", "arm64")
}
TOOLS = ("e2fsprogs", "libarchive13t64")  # mke2fs reads tarballs by libarchive

ESP_SIZE = 64 << 20
FREE = 512 << 20  # bytes of the root file system for a first boot on a disk that is no larger than the image
_NAMESPACE = UUID("5d3f4c0e-8a1b-4c53-9d0a-6261736562a5")
_MACHINE: Mapping[Arch, str] = {"amd64": "x86_64", "arm64": "aarch64"}
_EFI: Mapping[Arch, tuple[str, str]] = {"amd64": ("x64", "x86_64"), "arm64": ("aa64", "arm64")}
_SERIAL: Mapping[Arch, str] = {"amd64": "ttyS0", "arm64": "ttyAMA0"}
_GRUB = """\
# The disk that this was read from, whatever other disks there are.
regexp --set=1:disk '^(.+),' $root
set root=$disk,gpt2
probe --set=part --part-uuid $root
set options="root=PARTUUID=$part rw console={serial},115200 console=tty0"
set timeout=2
menuentry 'Debian' {{
    linux /vmlinuz $options
    initrd /initrd.img
}}
menuentry 'Debian, the kernel before' {{
    linux /vmlinuz.old $options
    initrd /initrd.img.old
}}
"""
_HOOKS = (
    'chroot "$1" systemctl --quiet enable systemd-networkd',
    # Nothing that one machine has for itself, nor what this desk is called.
    'rm -f "$1"/etc/ssh/ssh_host_* "$1"/etc/hostname "$1"/etc/resolv.conf "$1"/var/lib/systemd/random-seed',
    ': > "$1"/etc/machine-id',
    'ln -s ../run/systemd/resolve/stub-resolv.conf "$1"/etc/resolv.conf',
    # Of no package: what Python wrote when it was run, which is not the same for every user.
    'rm -rf "$1"/usr/share/python3/debpython/__pycache__',
    # Its packages come from what was baked; where the machine may ask a mirror is the operator's to say.
    ': > "$1"/etc/apt/sources.list',
)


def check(arch: Arch) -> None:
    """BakeError names what this desk lacks to make one, before anything long begins."""
    lacking = [] if shutil.which("mmdebstrap") else ["mmdebstrap"]
    if os.geteuid() != 0 and not shutil.which("newuidmap"):
        lacking.append("uidmap")
    foreign = native_arch() != arch
    if foreign and not shutil.which("arch-test"):  # mmdebstrap asks it
        lacking.append("arch-test")
    if lacking:
        raise BakeError(
            f"{' and '.join(lacking)} {'are' if len(lacking) > 1 else 'is'} lacking on this desk, to make disks with",
            remedy=f"apt install {' '.join(lacking)}, or name images that boot under `baseImages:`",
        )
    if os.geteuid() != 0 and not _has_subordinate_ids():
        raise BakeError(
            f"{getpass.getuser()} has no numbers for a user namespace of its own",
            where="/etc/subuid",
            remedy="sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 YOU; or bake this as root",
        )
    if foreign and not Path(f"/proc/sys/fs/binfmt_misc/qemu-{_MACHINE[arch]}").exists():
        raise BakeError(
            f"this desk cannot run {arch}'s programs, which the packages of a disk image run when they are installed",
            remedy="apt install qemu-user-static, or name an image that boots under `baseImages:`",
        )


def _has_subordinate_ids() -> bool:
    names = (getpass.getuser(), str(os.geteuid()))
    try:
        lines = Path("/etc/subuid").read_text().splitlines()
    except OSError:
        return False
    return any(line.partition(":")[0] in names for line in lines)


def fetched(image: BaseImage, desk: Desk) -> Fetched:
    """The operator's own disk image, by its digest. BakeError: it is not to be had, or not what it should be."""
    url = image.location
    path = fetch(url, f"sha256:{image.sha256}", desk) if url.startswith("http") else Path(url)
    sha256 = sha256_of(path)
    if image.sha256 not in (None, sha256):
        raise BakeError(
            f"the base image has another SHA-256 than the cluster file says: {sha256}",
            where=path,
            remedy="fetch the image again, or correct sha256",
        )
    gpt.read(path)
    return Fetched(f"base-{image.arch}", path, sha256, path.stat().st_size, Origin("base", "", "operator"))


def make(cluster: Cluster, arch: Arch, target: Path, desk: Desk, *, mtime: int) -> Fetched:
    """Writes the disk (raw, sparse): an EFI system partition and a root file system; mtime: since the epoch.

    The same bytes from the same packages, on any desk. BakeError: something is lacking, or a package does not install.
    """
    check(arch)
    system = _system(cluster, arch, desk)
    loaders = packages.unpacked(LOADERS[arch], "only", arch, cluster, desk)
    tools = packages.unpacked(TOOLS, "whole", native_arch() or arch, cluster, desk)
    esp = fat.image(_loader_files(loaders, arch), ESP_SIZE, "ESP", mtime & 0xFFFFFFFF)
    with tempfile.TemporaryDirectory(prefix="nodebake-base-") as folder, replacing(target, mode=0o644) as out:
        tarball = Path(folder, "root.tar")
        with desk.progress.step(f"install {len(system)} Debian packages ({arch})", None, "packages"):
            _install(system, arch, Path(folder), tarball, mtime)
        root = ALIGN + ESP_SIZE // SECTOR
        length = _whole(tarball.stat().st_size * 5 // 4 + FREE) // SECTOR
        table = Table(
            _guid(arch, "disk"),
            {
                1: Partition(gpt.ESP, _guid(arch, "esp"), ALIGN, ESP_SIZE // SECTOR, name="esp"),
                2: Partition(gpt.ROOT[arch], _guid(arch, "root"), root, length, name="root"),
            },
        )
        sectors = root + length + ALIGN
        out.truncate(sectors * SECTOR)
        for at, data in ((0, table.head(sectors)), (ALIGN, esp), (sectors - LAST, table.tail(sectors))):
            out.seek(at * SECTOR)
            out.write(data)
        out.flush()
        with desk.progress.step(f"make the root file system ({arch})", None, "files"):
            _make_file_system(tools, tarball, out.fileno(), root * SECTOR, length * SECTOR, arch, mtime)
    origin = Origin("base", packages.SUITE, "debian")
    return Fetched(f"base-{arch}", target, sha256_of(target), sectors * SECTOR, origin)


def packages_in(cluster: Cluster, arch: Arch, desk: Desk) -> list[Fetched]:
    """The Debian packages of which the disk is made: what is installed, and what only brings boot loaders."""
    return [*_system(cluster, arch, desk), *packages.obtain_alone(LOADERS[arch], arch, cluster, desk)]


def _system(cluster: Cluster, arch: Arch, desk: Desk) -> list[Fetched]:
    return packages.obtain_system([*PACKAGES, KERNEL[arch]], arch, cluster, desk)


def _install(system: Sequence[Fetched], arch: Arch, folder: Path, tarball: Path, mtime: int) -> None:
    """Everything in system, installed by mmdebstrap as Debian's own archive would have it; nothing else is asked."""
    archive = folder / "archive"
    archive.mkdir()
    stanzas = []
    for deb in system:
        shutil.copyfile(deb.path, archive / deb.name)
        control = subprocess.run(
            ["dpkg-deb", "--field", archive / deb.name], check=True, capture_output=True, text=True, errors="replace"
        ).stdout.rstrip()
        stanzas.append(f"{control}\nFilename: ./{deb.name}\nSize: {deb.size}\nSHA256: {deb.sha256}\n")
    index = "\n".join(stanzas).encode()
    (archive / "Packages").write_bytes(index)
    of_index = f"{hashlib.sha256(index).hexdigest()} {len(index)} Packages"
    (archive / "Release").write_text(f"Codename: {packages.SUITE}\nSHA256:\n {of_index}\n")
    for path in (folder, archive, *archive.iterdir()):  # in a user namespace apt is another user
        path.chmod(0o755 if path.is_dir() else 0o644)
    command = [
        "mmdebstrap",
        "--mode=unshare",  # for root too, which then keeps its numbers
        "--variant=essential",
        "--format=tar",
        f"--architectures={arch}",
        f"--include={','.join(deb.origin.component for deb in system)}",
        *(f"--customize-hook={hook}" for hook in _HOOKS),
        *(packages.SUITE, str(tarball), f"deb [trusted=yes] copy:{archive} ./"),  # each byte is as the lock says
    ]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(mtime), "LC_ALL": "C.UTF-8", "TZ": "UTC"}
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
    if done.returncode:
        told = re.findall(r"^(?:E|dpkg|.*error): .*", done.stderr, re.MULTILINE)[:5]
        raise BakeError(
            f"the packages cannot be installed: {'; '.join(told) or done.stderr[-500:]}",
            where="mmdebstrap",
            remedy="see that this desk allows user namespaces and that TMPDIR has 3 GB free; or bake this as root",
        )


def _make_file_system(tools: Path, tarball: Path, disk: int, at: int, size: int, arch: Arch, mtime: int) -> None:
    """ext4 with what the tarball holds, at that byte of disk (a descriptor), by the mke2fs in tools."""
    loader = next(tools.glob("usr/lib/*/ld-linux-*.so.*"))
    own = _guid(arch, "file system")
    command: list[str | Path] = [
        *(loader, "--library-path", loader.parent, tools / "usr/sbin/mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096"),
        *("-L", "root", "-U", str(own), "-E", f"offset={at},hash_seed={own},root_owner=0:0,nodiscard"),
        *("-d", tarball, f"/dev/fd/{disk}", str(size // 4096)),
    ]
    environment = {
        **os.environ,
        "SOURCE_DATE_EPOCH": str(mtime),
        "MKE2FS_CONFIG": str(tools / "etc/mke2fs.conf"),
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
    }
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, pass_fds=[disk])
    if done.returncode or done.stderr.strip():
        raise BakeError(
            f"the root file system cannot be made: {done.stderr.strip() or done.stdout.strip()}",
            where="mke2fs",
            remedy="see that the disk has room, then run doit once more",
        )


def _loader_files(loaders: Path, arch: Arch) -> dict[str, bytes]:
    """What firmware looks for on a disk that is new to it: shim, which starts GRUB, which reads its configuration."""
    short, long = _EFI[arch]
    return {
        f"EFI/BOOT/BOOT{short.upper()}.EFI": (loaders / f"usr/lib/shim/shim{short}.efi.signed").read_bytes(),
        f"EFI/BOOT/GRUB{short.upper()}.EFI": (
            loaders / f"usr/lib/grub/{long}-efi-signed/grub{short}.efi.signed"
        ).read_bytes(),
        "EFI/DEBIAN/GRUB.CFG": _GRUB.format(serial=_SERIAL[arch]).encode(),
    }


def _whole(size: int) -> int:
    """Rounded up to whole MiB."""
    return -(-size // (1 << 20)) << 20


def _guid(arch: Arch, name: str) -> UUID:
    return uuid5(_NAMESPACE, f"{arch}/{name}")
