"""The nouns of a bake: frozen, free of I/O, shared by every recipe.

Names follow the cluster file, which follows kubeadm and k0sctl where they have a name for a thing.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import cached_property
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path
from typing import Literal, NamedTuple

from recipes.kit.errors import BakeError

Arch = Literal["amd64", "arm64"]
Role = Literal["control-plane", "worker", "etcd", "load-balancer"]
Media = Literal["full", "thin"]
Approval = Literal["inventory", "group"]
KeyType = Literal["ecdsa-p256", "ecdsa-p384", "rsa-2048", "rsa-3072", "rsa-4096"]
Source = Literal["release", "modules"]

# Users on the machine, name -> fixed uid = gid (sysusers.d makes them, first boot refuses a conflict). Fixed, because a
# tarball carries numbers. 800-899 is outside of what Debian's adduser (100 up) and sysusers (999 down) hand out first.
USERS: dict[str, int] = {
    "root": 0,
    "etcd": 801,
    "kube-apiserver": 802,
    "kube-controller-manager": 803,
    "kube-scheduler": 804,
    "nodebake": 805,
}


# What depends on the size of a cluster changes in these steps, so that one worker more changes no machine's bytes.
SCALES = (100, 1_000, 5_000)


def scale_of(workers: int) -> int:
    """The first of SCALES that is not below the number of workers."""
    return next((scale for scale in SCALES if workers <= scale), SCALES[-1])


def runs(names: Sequence[str]) -> str:
    """Names for one line: worker-1, worker-2, worker-3 become "worker-1 to worker-3"."""
    told: list[tuple[str, str]] = []
    for name in names:
        stem, dash, number = name.rpartition("-")
        last_stem, _, last_number = told[-1][1].rpartition("-") if told else ("", "", "")
        follows = dash and stem == last_stem and number.isdigit() and last_number.isdigit()
        if follows and int(number) == int(last_number) + 1:
            told[-1] = (told[-1][0], name)
        else:
            told.append((name, name))
    listed = [first if first == last else f"{first} to {last}" for first, last in told]
    return ", ".join(listed) if len(listed) <= 20 else f"{', '.join(listed[:20])} and more"


BOND = "bond0"  # what a machine's bond is called


def vlan_device(vlan: int) -> str:
    """What a machine's VLAN of this number is called."""
    return f"vlan{vlan}"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a file came from, for the manifest and the report."""

    component: str
    version: str
    source: str  # "release", "modules (go1.26.8)", "debian", "operator", "baked"


@dataclass(frozen=True, slots=True)
class File:
    """The one currency: a file on the machine. Exactly one of data, source and link is set.

    path is absolute on the machine. A source is streamed by path, never read whole; its sha256, where known, is checked
    while it streams. owner is a key of USERS (the group of the same name). link is the target of a symbolic link.
    """

    path: str
    data: bytes | None = None
    source: Path | None = None
    link: str | None = None
    mode: int = 0o644
    owner: str = "root"
    sha256: str | None = None
    origin: Origin | None = None


@dataclass(frozen=True, slots=True)
class Fetched:
    """A verified file in the content-addressed cache: what binaries, images and packages hand to the payload."""

    name: str  # "kube-apiserver", "coredns.tar", "haproxy_3.0.11-1_amd64.deb"
    path: Path
    sha256: str
    size: int  # bytes
    origin: Origin


@dataclass(frozen=True, slots=True)
class Image:
    """A container image in the payload: an OCI archive and the name that pods call it by."""

    name: str  # "pause", "coredns", or the operator's reference
    reference: str  # "nodebake.local/coredns:v1.14.6"
    archive: Fetched


@dataclass(frozen=True, slots=True)
class Link:
    """A network interface card: matched by MAC address (lower case, colons) or, without one, by its name."""

    name: str
    mac: str | None = None


class Address(NamedTuple):
    """A machine's address in a network, which those of a pool share: ipaddress.IPv4Interface makes one for each, and
    with thousands of machines that is a fifth of what reading their cluster file costs."""

    ip: IPv4Address
    network: IPv4Network

    @classmethod
    def of(cls, interface: IPv4Interface) -> Address:
        return cls(interface.ip, interface.network)

    def __str__(self) -> str:
        """As in "192.168.10.11/24"."""
        return f"{self.ip}/{self.network.prefixlen}"


class Network(NamedTuple):
    """How a machine is wired: links -> optional bond -> optional VLAN -> addresses; a default route is optional."""

    links: tuple[Link, ...]
    addresses: tuple[Address, ...]  # the first is the node's address
    bond: str | None = None  # a netplan bond mode: "802.3ad", "active-backup", ...; needed with two or more links
    vlan: int | None = None
    mtu: int | None = None
    gateway: IPv4Address | None = None
    nameservers: tuple[IPv4Address, ...] = ()
    search: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LocalVolume:
    """A directory or mount point on one node, offered to the cluster as a local PersistentVolume."""

    name: str  # RFC 1123; the PersistentVolume is <node>-<name>
    path: str
    size: str  # a Kubernetes quantity: "100Gi"
    storage_class: str


class Node(NamedTuple):
    """One machine. There may be thousands, hence no data class: that takes four times as long to make."""

    name: str  # RFC 1123 label
    role: Role
    arch: Arch
    network: Network
    media: Media = "full"
    serial: str | None = None  # DMI serial number, checked by first boot
    storage: str | None = None  # value of the label node-restriction.kubernetes.io/storage
    labels: tuple[tuple[str, str], ...] = ()  # sorted
    taints: tuple[str, ...] = ()  # "key=value:Effect", the role's own included
    volumes: tuple[LocalVolume, ...] = ()
    runs_etcd: bool = False
    denied: bool = False  # API servers refuse it, and it gets no certificate any more

    @property
    def address(self) -> IPv4Address:
        return self.network.addresses[0].ip

    @property
    def addresses(self) -> tuple[IPv4Address, ...]:
        return tuple([address.ip for address in self.network.addresses])

    @property
    def runs_kubelet(self) -> bool:
        return self.role in ("control-plane", "worker")


@dataclass(frozen=True, slots=True)
class User:
    """An administrator on every machine: SSH keys only, sudo without a password."""

    name: str
    ssh_authorized_keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Registry:
    """One registry that the operator's own workloads pull from; becomes containerd's hosts.toml."""

    host: str
    mirrors: tuple[str, ...] = ()  # URLs, tried in order
    ca: Path | None = None  # PEM file at the desk
    username: str | None = None
    password_file: Path | None = None  # at the desk; secret, so it goes into identities only


@dataclass(frozen=True, slots=True)
class BaseImage:
    """A raw disk image of the operator's that disk images of this architecture begin with."""

    arch: Arch
    location: str  # an http(s) URL, or an absolute path at the desk
    sha256: str | None = None  # hex; a URL always has one


@dataclass(frozen=True, slots=True)
class Endpoint:
    host: str  # IPv4 address or DNS name
    port: int = 6443

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Validity:
    """Certificates' lifetimes, from the time of minting (kubelet: from the time of signing, on the machine)."""

    ca: timedelta = timedelta(days=3652)
    leaf: timedelta = timedelta(days=1096)
    kubelet: timedelta = timedelta(days=365)


@dataclass(frozen=True)
class Cluster:
    """A whole cluster as resolved from the cluster file: every default filled in, every rule checked."""

    name: str
    file: Path
    nodes: tuple[Node, ...]  # in the file's order, pools expanded
    pod_subnet: IPv4Network
    service_subnet: IPv4Network
    dns_domain: str = "cluster.local"
    dns_upstream: tuple[str, ...] = ()  # empty: CoreDNS forwards nowhere
    ntp: tuple[str, ...] = ()
    payload_server: str | None = None  # for thin media: URL of the folder with the payloads, or oci://host/repository
    pod_network: Literal["flannel", "none"] = "flannel"
    flannel_backend: Literal["vxlan", "host-gw"] = "vxlan"
    node_cidr_mask: int = 24
    max_pods: int = 110
    scale: int = 100  # 100, 1,000 or 5,000: scale_of() the number of workers
    etcd: Literal["stacked", "external"] = "stacked"
    load_balancer: Literal["local", "nodes", "external"] = "local"
    vip: IPv4Address | None = None  # held by keepalived on load balancers (nodes) or control planes
    control_plane_endpoint: Endpoint | None = None
    cert_sans: tuple[str, ...] = ()
    key_type: KeyType = "ecdsa-p256"
    validity: Validity = Validity()
    install_by: datetime | timedelta = timedelta(days=90)  # a moment (UTC), or from minting
    encryption_keys: tuple[int, ...] = (1,)  # of Secrets in etcd, by number: the first writes, all read
    approval: Approval = "inventory"
    swap: Literal["refuse", "off"] = "refuse"
    bake_ssh_host_keys: bool = False
    users: tuple[User, ...] = ()
    packages: Literal["current", "locked"] = "current"
    debian_mirror: str | None = None  # instead of the desk's own
    base_images: tuple[BaseImage, ...] = ()  # at most one an architecture; without, the base is made of Debian packages
    images: tuple[str, ...] = ()  # the operator's: archives (absolute path at the desk) or references by digest
    registries: tuple[Registry, ...] = ()
    storage_classes: tuple[str, ...] = ()  # local, WaitForFirstConsumer
    extra_objects: tuple[Path, ...] = ()  # manifests of the operator, absolute paths at the desk
    warnings: tuple[str, ...] = field(default=(), compare=False)  # told, not refused

    def base_image(self, arch: Arch) -> BaseImage | None:
        return next((image for image in self.base_images if image.arch == arch), None)

    def node(self, name: str) -> Node:
        """The node of this name; BakeError names the nearest ones, or those that exist."""
        names = [node.name for node in self.nodes]
        if name in names:
            return self.nodes[names.index(name)]
        close = difflib.get_close_matches(name, names, n=3)
        meant = f"Did you mean {' or '.join(close)}? " if close else ""
        remedy = f"{meant}There are {runs(names)}."
        raise BakeError(f"The cluster {self.name} has no node {name}", where=self.file, remedy=remedy)

    @property
    def files(self) -> tuple[Path, ...]:
        """All that the cluster file names at the desk, absolute."""
        texts = (*self.images, *(image.location for image in self.base_images))
        of_registries = (path for each in self.registries for path in (each.ca, each.password_file) if path)
        return (*self.extra_objects, *of_registries, *(Path(text) for text in texts if text.startswith("/")))

    def with_role(self, role: Role) -> tuple[Node, ...]:
        return tuple(node for node in self.nodes if node.role == role)

    @cached_property
    def control_planes(self) -> tuple[Node, ...]:
        return self.with_role("control-plane")

    @cached_property
    def workers(self) -> tuple[Node, ...]:
        return self.with_role("worker")

    @cached_property
    def fetching(self) -> tuple[Node, ...]:
        """The machines that fetch their payload from the server, if there is one."""
        return tuple(node for node in self.nodes if node.media == "thin") if self.payload_server else ()

    @cached_property
    def etcd_members(self) -> tuple[Node, ...]:
        return tuple(node for node in self.nodes if node.runs_etcd)

    @cached_property
    def kubelets(self) -> tuple[Node, ...]:
        return tuple(node for node in self.nodes if node.runs_kubelet)

    @cached_property
    def payloads(self) -> tuple[tuple[Role, Arch], ...]:
        """The distinct payloads of this cluster, sorted."""
        return tuple(sorted({(node.role, node.arch) for node in self.nodes}))

    @cached_property
    def shared(self) -> Cluster:
        """The cluster as payloads and workers may know it: no worker, and of the others what configuration needs.

        Payloads are rendered from this alone, so they cannot name a worker; what is not in it changes no payload.
        """
        nodes = tuple(
            Node(
                name=node.name,
                role=node.role,
                arch=node.arch,
                network=Network(links=(), addresses=node.network.addresses),
                runs_etcd=node.runs_etcd,
            )
            for node in self.nodes
            if node.role != "worker"
        )
        return replace(
            self,
            nodes=nodes,
            file=Path(self.file.name),
            users=(),
            images=(),
            base_images=(),
            extra_objects=(),
            storage_classes=(),
            encryption_keys=(),
            warnings=(),
        )

    @cached_property
    def unwired(self) -> Cluster:
        """The cluster as control planes know it: every machine as the API server will, not how it is wired or fed."""
        nodes = tuple(
            node._replace(network=Network(links=(), addresses=node.network.addresses), media="full", serial=None)
            for node in self.nodes
        )
        return replace(self, nodes=nodes, users=(), base_images=(), warnings=())

    @property
    def api_service_address(self) -> IPv4Address:
        return self.service_subnet[1]

    @property
    def dns_service_address(self) -> IPv4Address:
        return self.service_subnet[10]

    @property
    def balancer_endpoint(self) -> Endpoint:
        """Where a worker's kubelet, kube-proxy and flanneld find the API servers."""
        if self.load_balancer == "local":
            return Endpoint("127.0.0.1", 6443)
        if self.load_balancer == "nodes" and self.vip is not None:
            return Endpoint(str(self.vip), 6443)
        if self.control_plane_endpoint is not None:
            return self.control_plane_endpoint
        raise ValueError(f"loadBalancer {self.load_balancer} without an address passed the inventory's rules")
