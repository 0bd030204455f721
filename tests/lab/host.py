"""What the lab needs of the host: root, programs, kernel features; and how it calls programs."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from recipes.kit.errors import BakeError

LAB = Path(__file__).parents[2] / "build" / "lab"  # on one file system with what was baked

# program -> Debian package
PROGRAMS = {
    "apt-get": "apt",
    "bsdtar": "libarchive-tools",
    "ip": "iproute2",
    "mmdebstrap": "mmdebstrap",
    "nft": "nftables",
    "nsenter": "util-linux",
    "systemd-nspawn": "systemd-container",
    "unshare": "util-linux",
}
# And for virtual machines:
VIRTUAL_PROGRAMS = {
    "mkfs.ext4": "e2fsprogs",
    "sfdisk": "fdisk",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
}
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
# What machines find in the kernel that they share with the host; the host may have to load it.
MODULES = (
    "overlay",
    "veth",
    "bridge",
    "br_netfilter",
    "nf_conntrack",
    "nf_tables",
    "nft_ct",
    "vxlan",
    "macvlan",
    "tun",
)
_WATCHERS = 8192
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

Argument = str | os.PathLike[str]


class LabError(BakeError):
    """Something that the lab's user can mend, or a machine that did not do what was waited for."""


def lacking(programs: Mapping[str, str] = PROGRAMS) -> str | None:
    """Why no machine can run on this host and what helps, in one line; None: nothing is lacking. programs: program ->
    Debian package."""
    if os.geteuid() != 0:
        return "the lab needs root: run it with sudo"
    packages = {package for program, package in programs.items() if shutil.which(program, path=PATH) is None}
    if not KEYRING.exists():
        packages.add("debian-archive-keyring")
    if packages:
        return f"the lab needs programs that are not installed: apt install {' '.join(sorted(packages))}"
    return None


def prepare() -> None:
    """Raises LabError where lacking() finds something; loads what kernel modules there are, makes room for watchers."""
    if (lack := lacking()) is not None:
        what, _, remedy = lack.partition(": ")
        raise LabError(what, remedy=remedy)
    limit = Path("/proc/sys/fs/inotify/max_user_instances")  # counts the root users of all machines together
    if int(limit.read_text()) < _WATCHERS:
        limit.write_text(str(_WATCHERS))
    with suppress(FileNotFoundError):  # a kernel without modules has built in what it has
        subprocess.run(["modprobe", "--all", "--quiet", *MODULES], check=False, capture_output=True)


def run(
    command: Sequence[Argument],
    *,
    check: bool = True,
    stdin: str | None = None,
    timeout: float | None = 600,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end; its output is in the error where check is set and it fails, or takes too long (s)."""
    try:
        done = subprocess.run(
            [os.fspath(word) for word in command],
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        told = "".join(
            part.decode(errors="replace") if isinstance(part, bytes) else part or ""
            for part in (late.stdout, late.stderr)
        )
        raise LabError(f"{_words(command)}: no end after {timeout} s\n{told.rstrip()}") from None
    if check and done.returncode != 0:
        told = (done.stdout + done.stderr).rstrip()
        raise LabError(f"{_words(command)}: exit code {done.returncode}\n{told}")
    return done


def _words(command: Sequence[Argument]) -> str:
    return " ".join(os.fspath(word) for word in command)
