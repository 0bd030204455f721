"""Node -> NoCloud ISO: what cloud-init reads (user-data, meta-data, network-config) and the node's tarball.

The documents are dumped from plain data, so nothing in them can be unquoted. user-data holds no secret: cloud-init
keeps copies of it that anybody on the machine may read.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BytesIO, FileIO
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, BinaryIO, cast

import pycdlib
import pycdlib.dates
import pycdlib.headervd
import pycdlib.pycdlib
import pycdlib.utils

from recipes.kit import archive, emit, overlay
from recipes.kit.atomic import replacing
from recipes.kit.model import BOND, Cluster, Link, Network, Node, vlan_device
from recipes.node import HOST_KEY

LABEL = "cidata"  # cloud-init finds the volume by it
PAYLOAD_LABEL = "nodebake"  # first boot finds a payload volume by it
SECTOR = 2048  # bytes
READ = ("user-data", "meta-data", "network-config")  # of a seed, by cloud-init
FIRST_BOOT = "opt/nodebake/first-boot"  # in the overlay common
_PROGRAM = "/var/lib/nodebake/first-boot"
_UNIT = "nodebake-first-boot.service"


@dataclass(frozen=True, slots=True)
class Seed:
    """An ISO as written; size in bytes."""

    path: Path
    size: int


def user_data(cluster: Cluster, node: Node) -> bytes:
    """#cloud-config: who may log in, the host's name, and first boot as a unit that outlives cloud-init."""
    units = "/etc/systemd/system"
    files = [
        {"path": _PROGRAM, "permissions": "0755", "content": _common(FIRST_BOOT)},
        {"path": f"{units}/{_UNIT}", "permissions": "0644", "content": _common(f"{units}/{_UNIT}")},
    ]
    commands = [
        ["systemctl", "enable", _UNIT],  # it also tells systemd of the new unit
        # Program and unit are on the disk before the power can be cut while they run.
        ["sync"],
        # cloud-init marks runcmd as done before it runs: the unit does the work, and goes on after a power cut.
        ["systemctl", "start", "--no-block", _UNIT],
    ]
    if cluster.ntp:
        # cloud-init's own ntp module would ask apt for a client where none is installed, and wait for a network.
        text = f"[Time]\nNTP={' '.join(map(overlay.word, cluster.ntp))}\nFallbackNTP=\n"
        files.append({"path": "/etc/systemd/timesyncd.conf.d/50-cluster.conf", "permissions": "0644", "content": text})
        commands.insert(0, ["systemctl", "try-restart", "systemd-timesyncd.service"])
    config: dict[str, Any] = {
        "bootcmd": [["sh", "-c", _once_more(cluster)]],
        "hostname": node.name,
        "preserve_hostname": False,
        "manage_etc_hosts": "localhost",  # its own name without DNS; of other machines only addresses are used
        "locale": False,
        "users": [
            {
                "name": user.name,
                "gecos": "administrator",
                "shell": "/bin/bash",
                "lock_passwd": True,
                "sudo": "ALL=(ALL) NOPASSWD:ALL",
                "ssh_authorized_keys": list(user.ssh_authorized_keys),
            }
            for user in cluster.users
        ],
        "disable_root": True,
        "ssh_pwauth": False,
        # Made on the machine, of no other origin, and shown on its console; baked ones come with the tarball.
        "ssh_deletekeys": not cluster.bake_ssh_host_keys,
        "ssh_genkeytypes": ["ed25519"],
        "ssh": {"emit_keys_to_console": True},
        "package_update": False,
        "package_upgrade": False,
        "apt": {"preserve_sources_list": True},
        "write_files": files,
        "runcmd": commands,
    }
    return b"#cloud-config\n" + emit.document(config)


def _once_more(cluster: Cluster) -> str:
    """What cloud-init has marked as done may not have reached the disk when power was cut: it is done again then."""
    names = [user.name for user in cluster.users]
    written: dict[str, tuple[str, ...]] = {
        "write_files runcmd scripts_user": (_PROGRAM, f"/etc/systemd/system/{_UNIT}"),
        "ssh": (HOST_KEY,),
    }
    if names:
        keys = (f"/home/{name}/.ssh/authorized_keys" for name in names)
        written["users_groups"] = ("/etc/sudoers.d/90-cloud-init-users", *keys)
    commands = ["cd /var/lib/cloud/instance/sem || exit 0"]
    for modules, paths in written.items():
        there = " && ".join(f"test -s {overlay.word(path)}" for path in paths)
        commands.append(f"{{ {there}; }} || rm -f {' '.join(f'config_{module}' for module in modules.split())}")
    return "\n".join(commands)


def _common(path: str) -> str:
    return (overlay.OVERLAYS / "common" / path.lstrip("/")).read_text(encoding="utf-8")


def meta_data(node: Node, digest: str) -> bytes:
    """digest: SHA-256 (hex) over the artifact, so that cloud-init takes a new artifact for a new instance."""
    return emit.document({"instance-id": f"{node.name}-{digest[:16]}", "local-hostname": node.name})


def network_config(cluster: Cluster, node: Node) -> bytes:
    """Network configuration, version 2: links by MAC address or name, a bond, a VLAN, static addresses."""
    network = node.network
    ethernets = {_identifier(link): _ethernet(link, network.mtu) for link in network.links}
    config: dict[str, Any] = {"version": 2, "ethernets": ethernets}
    top: dict[str, Any] = ethernets[_identifier(network.links[0])]
    top_name = _identifier(network.links[0])
    if network.bond is not None:
        parameters = {"mode": network.bond, "mii-monitor-interval": "100"}
        if network.bond == "802.3ad":
            parameters |= {"lacp-rate": "fast", "transmit-hash-policy": "layer3+4"}
        top_name = BOND
        top = {"interfaces": [*ethernets], "parameters": parameters, **_quiet(network.mtu)}
        config["bonds"] = {top_name: top}
    if network.vlan is not None:
        top = {"id": network.vlan, "link": top_name, **_quiet(network.mtu)}
        config["vlans"] = {vlan_device(network.vlan): top}
    top["addresses"] = [str(address) for address in network.addresses]
    top["optional"] = False
    if routes := _routes(cluster, node):
        top["routes"] = routes
    if names := _nameservers(network):
        top["nameservers"] = names
    return emit.document(config)


def documents(cluster: Cluster, node: Node, *, sums: str, sign: Callable[[bytes], bytes]) -> dict[str, bytes]:
    """All that the ISO holds beside the tarball, by file name. sums: SHA-256 (hex) of the node's SHA256SUMS, which
    stands for everything in the tarball. sign: signs what cloud-init reads, for systems that know the key."""
    user, network = user_data(cluster, node), network_config(cluster, node)
    read = {
        "user-data": user,
        "meta-data": meta_data(node, hashlib.sha256(sums.encode() + user + network).hexdigest()),
        "network-config": network,
    }
    signed = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in read.items()).encode()
    return {
        **read,
        "SHA256SUMS": signed,
        "SHA256SUMS.sig": sign(signed),
        "first-boot": (overlay.OVERLAYS / "common" / FIRST_BOOT).read_bytes(),
    }


def write(contents: Mapping[str, bytes], tarball: Path, target: Path, *, mtime: int) -> Seed:
    """Writes the ISO (0600: the tarball in it is secret) with these documents; mtime: since the epoch.

    Nothing large is in memory, and files over 4 GiB are allowed. It is on the disk once atomic.settle() was called.
    """
    return write_iso({**contents, "node.tar.gz": tarball}, target, label=LABEL, mtime=mtime, keep=True)


def write_payloads(tarballs: Mapping[str, Path], target: Path, *, mtime: int) -> Seed:
    """Writes the volume that machines with thin media share: "<role>-<arch>" -> payload."""
    contents: dict[str, bytes | Path] = {f"{name}.tar.gz": path for name, path in tarballs.items()}
    return write_iso(contents, target, label=PAYLOAD_LABEL, mtime=mtime)


def write_iso(
    contents: Mapping[str, bytes | Path], target: Path, *, label: str, mtime: int, keep: bool = False
) -> Seed:
    """An ISO 9660 volume (interchange level 3, Joliet, Rock Ridge) with these files; the same bytes always.

    Tarballs lie behind all else, so that of an older volume the first one's head can stay where it is (keep).
    """
    ordered = sorted(contents.items(), key=lambda item: (isinstance(item[1], Path), item[0]))
    small = sum(isinstance(content, bytes) for content in contents.values())
    with replacing(target, keep=keep, later=True) as out, ExitStack() as opened, _pinned_clock(mtime):
        iso = pycdlib.PyCdlib()
        iso.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident=label, app_ident_str="NODEBAKE")
        for number, (name, content) in enumerate(ordered):
            size = len(content) if isinstance(content, bytes) else content.stat().st_size
            stream = opened.enter_context(BytesIO(content) if isinstance(content, bytes) else _Direct(content, out))
            mode = 0o100555 if name == "first-boot" else 0o100444
            iso.add_fp(
                cast(BinaryIO, stream),
                size,
                _name(number),
                rr_name=name,
                joliet_path=f"/{name}",
                file_mode=mode,
            )
        iso.force_consistency()
        # pycdlib seeks over what is to be zero.
        out.write(bytes(iso.get_record(iso_path=_name(small)).extent_location() * SECTOR))
        iso.write_fp(cast(BinaryIO, out), blocksize=1 << 40)  # a file's extent is asked for in one piece
        iso.close()
        out.seek(0, 2)
        size = out.tell()
    return Seed(target, size)


def _name(number: int) -> str:
    return f"/FILE{number:04}.;1"


class _Direct(FileIO):
    """A file that pycdlib need not carry: what it asks for goes to where it stands in `out`, inside the kernel, as far
    as it is not there already.

    pycdlib takes an answer that is short for the end of the file's extent, pads it and goes on.
    """

    def __init__(self, path: Path, out: IO[bytes]) -> None:
        super().__init__(path, "rb")
        self._out = out

    def read(self, size: int | None = -1, /) -> bytes:
        length = size or 0
        archive.copy_range(self, self._out, length - archive.keep_alike(self, self._out, length))
        return b""


_clock = threading.Lock()


@contextmanager
def _pinned_clock(moment: int) -> Iterator[None]:
    """pycdlib asks the time module and the desk's time zone: for a while its `time` stands still, in UTC."""
    fixed = SimpleNamespace(
        time=lambda: float(moment),
        gmtime=time.gmtime,
        localtime=time.gmtime,
        strftime=time.strftime,
        strptime=time.strptime,
        struct_time=time.struct_time,
    )
    modules = (pycdlib.dates, pycdlib.headervd, pycdlib.pycdlib, pycdlib.utils)
    with _clock:
        for module in modules:
            vars(module)["time"] = fixed
        try:
            yield
        finally:
            for module in modules:
                vars(module)["time"] = time


def _ethernet(link: Link, mtu: int | None) -> dict[str, Any]:
    if link.mac is None:
        pattern = {"match": {"name": link.name}} if _is_pattern(link) else {}
        return {**pattern, **_quiet(mtu)}
    # The name is set, so that every renderer (netplan, networkd, ifupdown) and every service calls the card the same.
    return {"match": {"macaddress": link.mac}, "set-name": link.name, **_quiet(mtu)}


def _is_pattern(link: Link) -> bool:
    return link.mac is None and not set("*?[").isdisjoint(link.name)


def _identifier(link: Link) -> str:
    """What the document calls a card: a pattern is what is matched, never a name."""
    return "nic0" if _is_pattern(link) else link.name


def _quiet(mtu: int | None) -> dict[str, Any]:
    """A device that asks nobody for an address."""
    quiet: dict[str, Any] = {"dhcp4": False, "dhcp6": False, "accept-ra": False, "link-local": []}
    return quiet | ({"mtu": mtu} if mtu is not None else {})


def _routes(cluster: Cluster, node: Node) -> list[dict[str, str]]:
    if node.network.gateway is not None:
        # Not "default": older renderers refuse that word.
        return [{"to": "0.0.0.0/0", "via": str(node.network.gateway)}]
    if node.runs_kubelet:
        # Without any route the kernel answers "unreachable" before kube-proxy's rules see a ClusterIP. They send it
        # elsewhere, so any neighbour will do; a route without one (scope: link) is not in cloud-init's schema.
        network = node.network.addresses[0].network
        planes = [plane.address for plane in cluster.control_planes if plane.address in network]
        neighbour = next(address for address in chain(planes, network.hosts()) if address not in node.addresses)
        return [{"to": str(cluster.service_subnet), "via": str(neighbour)}]
    return []


def _nameservers(network: Network) -> dict[str, list[str]]:
    found = {"addresses": [str(address) for address in network.nameservers], "search": list(network.search)}
    return {key: values for key, values in found.items() if values}
