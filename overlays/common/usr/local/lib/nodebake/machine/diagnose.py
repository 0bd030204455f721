"""One archive with what support needs to know of this machine.

What goes in is listed, file by file and question by question, and everything passes the scrubber. Left out are private
keys, tokens, kubeconfigs with credentials, the encryption key, the cluster's objects (which may be Secrets), the
credentials of registries, and the logs of workloads other than the cluster's own.
"""

from __future__ import annotations

import io
import os
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from machine import certificates, report, status, units
from machine.scrub import Scrubber
from machine.system import System, run

_BIN = "opt/nodebake/current/bin"
_LINES = "3000"  # of a journal
_TAIL = 256 << 10  # bytes of a log file
_MOST = 4 << 20  # bytes of anything

# Without the leading slash: what may be there or not, by role and by what the machine runs.
FILES = (
    *("etc/nodebake/node.env", "etc/nodebake/images", "etc/nodebake/inventory.json"),
    *("etc/nodebake/haproxy.cfg", "etc/nodebake/keepalived.conf"),
    *(f"etc/kubernetes/{name}.yaml" for name in ("admission", "audit-policy", "authentication", "authorization")),
    *(f"etc/kubernetes/{name}.yaml" for name in ("kube-proxy", "kubelet", "scheduler")),
    *("etc/kubernetes/kubelet.conf.d/*.conf", "etc/kubernetes/kube-proxy.conf", "etc/kubernetes/flanneld.conf"),
    *("etc/kubernetes/flannel-net-conf.json", "etc/kubernetes/resolv.conf", "run/flannel/subnet.env"),
    *("etc/containerd/config.toml", "etc/crictl.yaml", "etc/cni/net.d/*", "var/lib/containerd/nodebake-images"),
    *("etc/sysctl.d/9?-*.conf", "etc/modules-load.d/nodebake.conf", "etc/tmpfiles.d/nodebake*.conf"),
    *("etc/sysusers.d/nodebake.conf", "etc/systemd/journald.conf.d/*.conf", "etc/systemd/timesyncd.conf.d/*.conf"),
    *("etc/systemd/logind.conf.d/*.conf", "etc/systemd/resolved.conf.d/*.conf"),
    *("etc/systemd/network/*", "run/systemd/network/*", "etc/netplan/*.yaml", "etc/network/interfaces"),
    *("etc/network/interfaces.d/*", "etc/hosts", "etc/hostname", "etc/resolv.conf", "etc/fstab"),
    *("etc/os-release", "proc/cmdline", "proc/meminfo", "proc/pressure/*", "proc/sys/kernel/tainted"),
    *("opt/nodebake/manifest/*.json", "opt/nodebake/manifest/*.tree", "opt/nodebake/manifest/*.SHA256SUMS"),
    *("var/lib/nodebake/journal", "var/lib/nodebake/installed", "var/lib/nodebake/placed"),
    "var/lib/nodebake/etcd-disk",
    *("run/cloud-init/status.json", "run/cloud-init/result.json", "var/lib/cloud/data/*.json"),
)
LOGS = (
    *("var/log/cloud-init.log", "var/log/cloud-init-output.log", "var/log/dpkg.log", "var/log/apt/*.log"),
    "var/log/pods/kube-system_*/*/*.log",
)
# Only names and sizes: what is in there may be secret.
LISTED = (
    *("etc/kubernetes/*", "etc/kubernetes/pki/*", "etc/etcd/pki/*", "etc/nodebake/*", "etc/nodebake/objects/*"),
    *("etc/containerd/*", "etc/containerd/certs.d/*/*", "etc/containerd/conf.d/*", "var/lib/kubelet/*"),
    *(
        "var/lib/kubelet/pki/*",
        "var/lib/etcd/member/*/*",
        "var/lib/nodebake/*",
        "opt/nodebake/*",
        "opt/nodebake/*/*",
    ),
    *("opt/nodebake/current/*/*", "var/log/pods/*"),
)
COMMANDS: dict[str, list[str]] = {
    "system/uname": ["uname", "-a"],
    "system/uptime": ["uptime"],
    "system/time": ["timedatectl"],
    "system/virtualization": ["systemd-detect-virt"],
    "system/processes": ["ps", "-eo", "pid,ppid,user,stat,lstart,rss,nlwp,comm,cgroup"],  # no arguments: not ours alone
    "system/memory": ["free", "-m"],
    "system/modules": ["lsmod"],
    "system/sysctl": [
        *("sysctl", "-a", "--pattern"),
        r"^(fs\.|vm\.|kernel\.(panic|pid_max|keys|threads)|net\.(bridge|core|netfilter)\.|net\.ipv4\.(conf|ip_|neigh))",
    ],
    "system/packages": ["dpkg-query", "--show", "--showformat=${db:Status-Abbrev} ${Package} ${Version}\n"],
    "disks/space": ["df", "-hT"],
    "disks/inodes": ["df", "-i"],
    "disks/mounts": ["findmnt", "--all", "--output=TARGET,SOURCE,FSTYPE,OPTIONS"],
    "disks/devices": ["lsblk", "--output=NAME,SIZE,TYPE,FSTYPE,LABEL,MOUNTPOINTS"],
    "network/addresses": ["ip", "-details", "-statistics", "address"],
    "network/routes": ["ip", "route", "show", "table", "all"],
    "network/rules": ["ip", "rule"],
    "network/neighbours": ["ip", "neighbour"],
    "network/networkd": ["networkctl", "--no-pager", "status", "--all"],
    "network/resolver": ["resolvectl", "--no-pager", "status"],
    "network/sockets": ["ss", "-tulnp"],
    "network/connections": ["ss", "-s"],
    "network/nft": ["nft", "list", "ruleset"],
    "systemd/units": ["systemctl", "--no-pager", "--all", "list-units"],
    "systemd/failed": ["systemctl", "--no-pager", "--failed"],
    "systemd/jobs": ["systemctl", "--no-pager", "list-jobs"],
    "systemd/timers": ["systemctl", "--no-pager", "--all", "list-timers"],
    "systemd/boot-times": ["systemd-analyze", "--no-pager", "critical-chain"],
    "containers/pods": [f"{_BIN}/crictl", "pods"],
    "containers/containers": [f"{_BIN}/crictl", "ps", "--all"],
    "containers/images": [f"{_BIN}/crictl", "images", "--verbose"],
    "containers/disk": [f"{_BIN}/crictl", "imagefsinfo"],
    "containers/kept-images": [f"{_BIN}/ctr", "--namespace=k8s.io", "images", "check"],
    "cloud-init/status": ["cloud-init", "status", "--long"],
}
VERSIONS: dict[str, list[str]] = {
    **{name: ["--version"] for name in ("containerd", "crictl", "ctr", "etcd", "flanneld", "kube-apiserver")},
    **{name: ["--version"] for name in ("kube-controller-manager", "kube-proxy", "kube-scheduler", "kubelet", "runc")},
    "kubectl": ["version", "--client"],
}
SYSTEM_VERSIONS = (["haproxy", "-v"], ["keepalived", "--version"], ["openssl", "version"], ["systemctl", "--version"])


@dataclass(frozen=True)
class Diagnosis:
    """missing: what could not be had, and why; the archive tells it too."""

    path: Path
    missing: list[str]


def write(system: System, target: Path | None) -> Diagnosis:
    """Writes the archive (0600). OSError: it cannot be written."""
    now = datetime.now(UTC)
    name = f"nodebake-{status.identity(system).node or 'unknown'}-{now:%Y%m%dT%H%M%SZ}"
    if target is None:
        home = Path("/root")
        folder = home if os.geteuid() == 0 and home.is_dir() and os.access(home, os.W_OK) else Path.cwd()
        target = folder / f"{name}.tar.gz"
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as out, tarfile.open(fileobj=out, mode="w:gz", compresslevel=6) as tar:
            archive = _Archive(tar, name, Scrubber.of(system))
            for part in (_status, _files, _listing, _certificates, _systemd, _journals, _commands, _versions):
                archive.attempt(system, part)
            for line in system.unseen:
                archive.lacks(line)
            archive.finish()
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return Diagnosis(target, archive.missing)


class _Archive:
    def __init__(self, tar: tarfile.TarFile, name: str, scrubber: Scrubber) -> None:
        self.missing: list[str] = []
        self._tar, self._name, self._scrubber, self._now = tar, name, scrubber, int(time.time())

    def add(self, name: str, text: str) -> None:
        data = self._scrubber.scrub(text).encode(errors="replace")
        info = tarfile.TarInfo(f"{self._name}/{name.lstrip('/')}")
        info.size, info.mode, info.mtime = len(data), 0o600, self._now
        self._tar.addfile(info, io.BytesIO(data))

    def lacks(self, line: str) -> None:
        if line not in self.missing:
            self.missing.append(line)

    def answer(self, name: str, command: list[str], *, seconds: float = 20) -> None:
        """Adds what a program says, its errors included."""
        ran = run(command, seconds=seconds, limit=_MOST, errors=True)
        if ran.trouble:
            self.lacks(f"{name}: {ran.trouble}")
        elif ran.code:
            self.lacks(f"{name}: {command[0]} ended with {ran.code}")
        if ran.text:
            self.add(f"{name}.txt", ran.text)

    def attempt(self, system: System, part: Callable[[System, _Archive], None]) -> None:
        """One part: what nobody foresaw is told, and keeps no other part back."""
        try:
            part(system, self)
        except Exception as error:
            self.lacks(f"{part.__name__.strip('_')}: {type(error).__name__}: {error}")

    def finish(self) -> None:
        lines = ["What could not be had:", *(f"  {line}" for line in self.missing)]
        lines = [
            *(lines if self.missing else ["Everything that was asked for is here."]),
            "",
            *(__doc__ or "").split("\n"),
        ]
        self.add("about.txt", "\n".join(lines).strip() + "\n")


def _status(system: System, archive: _Archive) -> None:
    found = status.gather(system)
    archive.add("status.txt", "\n".join([*report.lines(found, colour=False), ""]))
    archive.add("status.json", found.json() + "\n")


def _files(system: System, archive: _Archive) -> None:
    own = {*units.names(system), units.FIRST_BOOT}
    of_units = [
        pattern
        for unit in sorted(own)
        for folder in ("/etc/systemd/system", "/run/systemd/system")
        for pattern in (f"{folder}/{unit}", f"{folder}/{unit}.d/*.conf")
    ]
    for pattern, tail in (*((each, False) for each in (*FILES, *of_units)), *((each, True) for each in LOGS)):
        for path in _matching(system, pattern):
            data = system.read(path, _TAIL if tail else _MOST, tail=tail)
            if data is None:
                continue
            if b"\0" in data:
                archive.lacks(f"{path}: it is no text")
                continue
            archive.add(f"files/{path.lstrip('/')}", data.decode(errors="replace"))


def _matching(system: System, pattern: str) -> list[str]:
    return system.glob(pattern) if "*" in pattern or "?" in pattern else [pattern]


def _listing(system: System, archive: _Archive) -> None:
    lines = []
    for path in sorted({path for pattern in LISTED for path in system.glob(pattern)}):
        try:
            found = system.path(path).lstat()
        except OSError:
            continue
        changed = datetime.fromtimestamp(found.st_mtime, UTC)
        lines.append(f"{found.st_mode:06o} {found.st_uid:6} {found.st_size:12} {changed:%Y-%m-%dT%H:%M:%SZ} {path}\n")
    archive.add("listing.txt", "".join(lines))


def _certificates(system: System, archive: _Archive) -> None:
    asked = ("-subject", "-issuer", "-serial", "-dates", "-fingerprint", "-sha256", "-ext", "subjectAltName")
    text = ""
    for path, pem in certificates.each(system):
        text += f"{path}\n{certificates.describe(pem, *asked)}\n"
    archive.add("certificates.txt", text)


def _systemd(system: System, archive: _Archive) -> None:
    own = units.names(system)
    if system.live and own:
        archive.answer("systemd/ours", ["systemctl", "--no-pager", "show", *own, units.FIRST_BOOT])


def _journals(system: System, archive: _Archive) -> None:
    start = ["journalctl", "--no-pager", "--quiet", "--utc", "--output=short-iso", f"--lines={_LINES}"]
    start += [] if system.live else [f"--root={system.root}"]
    for unit in (*units.names(system), units.FIRST_BOOT, "cloud-final.service", "systemd-networkd.service"):
        archive.answer(f"journal/{unit}", [*start, f"--unit={unit}"])
    archive.answer("journal/kernel", [*start, "--dmesg", "--boot=all"] if not system.live else [*start, "--dmesg"])
    archive.answer("journal/warnings", [*start, "--priority=warning"])
    archive.answer("journal/last", start)
    archive.answer("journal/boots", [word for word in start if "--lines" not in word] + ["--list-boots"])


def _commands(system: System, archive: _Archive) -> None:
    if not system.live:
        archive.lacks(f"{', '.join(COMMANDS)}: these tell of a running machine, and that in {system.root} does not run")
        return
    for name, (program, *words) in COMMANDS.items():
        if not program.startswith(_BIN):
            archive.answer(name, [program, *words])
        elif system.exists(program):  # of this role
            archive.answer(name, [str(system.path(program)), *words])


def _versions(system: System, archive: _Archive) -> None:
    text = ""
    for command in _version_commands(system):
        ran = run(command, errors=True, limit=1 << 16)
        text += f"{' '.join(command)}\n{ran.trouble or ran.text.strip()}\n\n"
    archive.add("versions.txt", text)


def _version_commands(system: System) -> Iterator[list[str]]:
    """Of a folder that holds a machine, no program is run."""
    if system.live:
        for name, words in VERSIONS.items():
            if system.exists(f"{_BIN}/{name}"):
                yield [str(system.path(f"{_BIN}/{name}")), *words]
        yield from SYSTEM_VERSIONS
