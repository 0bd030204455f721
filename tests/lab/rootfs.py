"""Debian 13 roots, made once and kept: what containers boot, what virtual machines boot, and QEMU.

A machine's root is as its operator would install it: a minimal Debian with cloud-init. It lacks what the artifact has
to bring (HAProxy, conntrack, nftables, python3-cryptography ...).
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from recipes.kit.locks import locked
from recipes.kit.model import Arch
from tests.lab import host
from tests.lab.host import KEYRING, LAB, Argument, LabError

SUITE = "trixie"
_MACHINE = (
    "ca-certificates",
    "cloud-init",
    "dbus",
    "init",
    "iproute2",
    "iputils-ping",
    "libpam-systemd",
    "openssh-server",
    "systemd-resolved",
    "systemd-sysv",
    "systemd-timesyncd",
    "udev",
)
_OPTIONS = (
    "--mode=root",
    "--format=directory",
    f"--keyring={KEYRING}",
    '--aptopt=APT::Install-Recommends "false"',
    '--aptopt=Acquire::Check-Valid-Until "false"',  # a desk's mirror may be a snapshot
    "--dpkgopt=path-exclude=/usr/share/man/*",
    "--dpkgopt=path-exclude=/usr/share/doc/*",
    "--dpkgopt=path-exclude=/usr/share/locale/*",
)
_MACHINE_OPTIONS = (
    *_OPTIONS,
    "--variant=minbase",
    '--customize-hook=chroot "$1" systemctl --quiet enable systemd-networkd',
    # As in an image for clouds: nothing that one machine has for itself.
    '--customize-hook=rm -f "$1"/etc/ssh/ssh_host_* "$1"/etc/hostname "$1"/etc/resolv.conf',
    '--customize-hook=: > "$1"/etc/machine-id',
    '--customize-hook=ln -s ../run/systemd/resolve/stub-resolv.conf "$1"/etc/resolv.conf',
)


@dataclass(frozen=True, slots=True)
class Root:
    """What a root is made from: Debian packages, and mmdebstrap's options."""

    packages: tuple[str, ...]
    options: tuple[str, ...]


# Network by systemd-networkd: netplan and ifupdown are left out, since netplan matches a card's permanent MAC address,
# which a veth does not have. libarchive-tools stands in for the kernel's driver of ISO 9660, see
# shims/usr/local/sbin/mount.
CONTAINER = Root((*_MACHINE, "libarchive-tools"), _MACHINE_OPTIONS)
# As Debian's own images for clouds: netplan on top, a kernel for clouds, and what enlarges the disk at the first boot.
VIRTUAL = Root(
    (
        *_MACHINE,
        "cloud-guest-utils",
        "e2fsprogs",
        "fdisk",
        "initramfs-tools",
        "linux-image-cloud-amd64",
        "netplan.io",
        "sudo",
    ),
    _MACHINE_OPTIONS,
)
# Of this Debian too, whatever the host has: QEMU before version 10 takes minutes for what takes this one seconds.
EMULATOR: Mapping[Arch, Root] = {
    "amd64": Root(("qemu-system-x86", "qemu-utils", "libfaketime"), (*_OPTIONS, "--variant=apt")),
    "arm64": Root(("qemu-system-arm", "qemu-utils", "libfaketime"), (*_OPTIONS, "--variant=apt")),
}
FIRMWARE: Mapping[Arch, Root] = {  # UEFI for the emulator
    "amd64": Root(("ovmf",), (*_OPTIONS, "--variant=extract")),
    "arm64": Root(("qemu-efi-aarch64",), (*_OPTIONS, "--variant=extract")),
}


def obtain(root: Root = CONTAINER, folder: Path = LAB / "rootfs") -> Path:
    """The root, made now (about a minute) if it is not there: folder/<digest of what it is made from>. Never written
    to by machines. Raises LabError where the desk's mirrors have no Debian 13."""
    wanted = json.dumps([SUITE, root.packages, root.options]).encode()
    made = folder / hashlib.sha256(wanted).hexdigest()[:16]
    with locked(folder / "lock"):
        if not made.exists():
            _make(root, made)
    return made


def _make(root: Root, target: Path) -> None:
    made = target.with_suffix(".part")
    told = []
    for mirror in mirrors():
        shutil.rmtree(made, ignore_errors=True)
        command: list[Argument] = [
            "mmdebstrap",
            *root.options,
            f"--include={','.join(root.packages)}",
            SUITE,
            made,
            f"deb {mirror} {SUITE} main",
        ]
        done = host.run(command, check=False, timeout=1800)
        if done.returncode == 0:
            made.rename(target)
            return
        told.append(f"{mirror}: {'; '.join(re.findall(r'^E: .*', done.stderr, re.MULTILINE)) or done.stderr[-500:]}")
    shutil.rmtree(made, ignore_errors=True)
    raise LabError(
        "No Debian 13 (trixie) for the lab's machines: " + ("\n".join(told) or "this host's apt knows no mirror"),
        where="/etc/apt",
        remedy="Give apt a source of Debian's archive, and try again.",
    )


def mirrors() -> list[str]:
    """The archives that this host's apt is told to take its packages from, Debian's own first."""
    listed = host.run(
        [
            *("apt-get", "indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(COMPONENT)|$(REPO_URI)"),
            "Created-By: Packages",
        ]
    ).stdout.splitlines()
    entries = [line.split("|") for line in listed]
    main = [(origin, uri) for origin, label, part, uri in entries if part == "main" and "Security" not in label]
    return list(dict.fromkeys(uri for _, uri in sorted(main, key=lambda entry: entry[0] != "Debian")))
