"""Cluster file -> Cluster: every default filled in, every rule between keys checked, each mistake with its place."""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from fnmatch import fnmatchcase
from functools import partial
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from recipes.kit import clusterfile, formats, sizing
from recipes.kit.clusterfile import MAX_WORKERS, ClusterFile, Document, Machine, NodeShape, Pool, RegistryShape, Wiring
from recipes.kit.errors import BakeError, BakeErrors
from recipes.kit.model import (
    BOND,
    Address,
    Arch,
    BaseImage,
    Cluster,
    Link,
    LocalVolume,
    Network,
    Node,
    Registry,
    User,
    Validity,
    runs,
    scale_of,
    vlan_device,
)

CONTROL_PLANE_TAINT: Final = "node-role.kubernetes.io/control-plane=:NoSchedule"
MAX_ETCD: Final = 7
# Kubernetes' documented limits of what is tested, and flannel's cost: told, not refused.
TESTED_PODS: Final = 150_000
TESTED_CONTAINERS: Final = 300_000
TESTED_PODS_PER_NODE: Final = 100
FLANNEL_NODES: Final = 1_000
# In the pod network of one node: its own address, the broadcast address and the bridge.
TAKEN_IN_NODE_NETWORK: Final = 3

Loc = tuple[str | int, ...]
_T = TypeVar("_T")


def load(path: Path, *, now: datetime) -> Cluster:
    """The cluster of a cluster file. now (aware) is what installBy is compared with.

    Raises BakeErrors with every mistake in the order of the file, each with its Place; BakeError when the file cannot
    be read at all.
    """
    document = clusterfile.read(path)
    rules = _Rules(document, now)
    cluster = rules.cluster(document.shape) if document.shape is not None else None
    errors = [*document.errors, *rules.errors]
    if errors or cluster is None:
        raise BakeErrors(sorted(errors, key=_position))
    return cluster


def json_schema() -> dict[str, Any]:
    """The JSON Schema of the cluster file, for editors."""
    schema = _for_editors(ClusterFile.model_json_schema(by_alias=True))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "Nodebake cluster file",
        "examples": [
            {
                "name": "single",
                "machineNetwork": {"subnet": "192.168.10.0/24", "interface": "e*"},
                "nodes": [{"name": "only", "role": "control-plane", "address": "192.168.10.11"}],
            }
        ],
    }


def _for_editors(schema: Any) -> Any:
    """Without what a cluster file cannot hold (null) and what only pydantic's own documents need (titles)."""
    if isinstance(schema, list):
        return [_for_editors(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {
        key: {name: _for_editors(item) for name, item in value.items()} if key in ("properties", "$defs") else value
        for key, value in schema.items()
        if not (key == "title" and isinstance(value, str)) and not (key == "default" and value is None)
    }
    choices = made.get("anyOf")
    if isinstance(choices, list):
        left = [choice for choice in choices if choice != {"type": "null"}]
        if len(left) == 1:
            del made["anyOf"]
            made = {**left[0], **made}
    return {key: value if key in ("properties", "$defs") else _for_editors(value) for key, value in made.items()}


def _position(error: BakeError) -> tuple[int, int]:
    return (getattr(error.where, "line", None) or 0, getattr(error.where, "column", None) or 0)


class _Made(NamedTuple):
    """A node with the place that it comes from."""

    node: Node
    loc: Loc
    shape: NodeShape | Pool


@dataclass(frozen=True, slots=True)
class _Wired:
    """A machine's wiring without its own address and MAC addresses."""

    subnet: IPv4Network
    links: tuple[Link, ...]
    bond: str | None
    gateway: IPv4Address | None


class _Rules:
    """The rules, collecting mistakes and warnings."""

    def __init__(self, document: Document, now: datetime) -> None:
        self.document = document
        self.now = now
        self.errors: list[BakeError] = []
        self.warnings: list[str] = []

    def refuse(self, what: str, remedy: str, *loc: str | int, key: bool = False) -> None:
        self.errors.append(BakeError(what, where=self.document.place(*loc, key=key), remedy=remedy))

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def cluster(self, shape: ClusterFile) -> Cluster | None:
        """The cluster; what it holds has a meaning only when no mistake was collected."""
        self._install_by(shape)
        made = self._machines(shape)
        self._networks(shape, made)
        self._duplicates(shape, made)
        self._volumes(made)
        if all(self.document.whole(key) for key in ("nodes", "pools", "etcd", "loadBalancer")):
            self._roles(shape, [one.node for one in made], made)
            self._room(shape, made)
        self._denied(shape, made)
        self._users(shape)
        registries = self._registries(shape)
        images = tuple(self._images(shape))
        base_images = tuple(self._base_images(shape, [one.node for one in made]))
        objects = tuple(self._files(shape.extra_objects, "extraObjects"))
        self._no_twice(shape.storage_classes, "storageClasses")
        self._no_twice(shape.encryption_keys, "encryptionKeys")
        if shape.pod_network == "none" and not shape.extra_objects and self.document.whole("extraObjects"):
            self.warn("podNetwork: none without extraObjects: nodes stay NotReady until a pod network is installed")
        if self.errors:
            return None
        return Cluster(
            name=shape.name,
            file=Path(os.path.abspath(self.document.file)),  # noqa: PTH100 (a link stays a link)
            nodes=tuple(one.node for one in made),
            pod_subnet=shape.networking.pod_subnet,
            service_subnet=shape.networking.service_subnet,
            dns_domain=shape.networking.dns_domain,
            dns_upstream=tuple(shape.dns_upstream),
            ntp=tuple(shape.machine_network.ntp),
            payload_server=shape.payload_server,
            pod_network=shape.pod_network,
            flannel_backend=shape.flannel_backend,
            node_cidr_mask=shape.networking.node_cidr_mask_size,
            max_pods=shape.max_pods,
            scale=scale_of(sum(one.node.role == "worker" for one in made)),
            etcd=shape.etcd,
            load_balancer=shape.load_balancer,
            vip=shape.virtual_ip,
            control_plane_endpoint=shape.control_plane_endpoint,
            cert_sans=tuple(dict.fromkeys(shape.api_server.cert_sans)),
            key_type=shape.key_type,
            validity=Validity(shape.validity.ca, shape.validity.leaf, shape.validity.kubelet),
            install_by=shape.install_by,
            encryption_keys=tuple(shape.encryption_keys),
            approval=shape.approval,
            swap=shape.swap,
            bake_ssh_host_keys=shape.ssh_host_keys == "baked",
            users=tuple(User(user.name, tuple(user.ssh_authorized_keys)) for user in shape.users),
            packages=shape.packages,
            debian_mirror=shape.debian_mirror,
            base_images=base_images,
            images=images,
            registries=registries,
            storage_classes=tuple(shape.storage_classes),
            extra_objects=objects,
            warnings=tuple(self.warnings),
        )

    # Times

    def _install_by(self, shape: ClusterFile) -> None:
        validity = shape.validity
        if validity.leaf > validity.ca:
            what = f"Baked certificates of {validity.leaf.days} days outlive their CAs of {validity.ca.days} days"
            self.refuse(what, "Make leaf shorter, or ca longer.", "validity", "leaf")
        if validity.kubelet > validity.ca:
            what = f"Kubelets' certificates of {validity.kubelet.days} days outlive their CA of {validity.ca.days} days"
            self.refuse(what, "Make kubelet shorter, or ca longer.", "validity", "kubelet")
        span = shape.install_by if isinstance(shape.install_by, timedelta) else shape.install_by - self.now
        # A date that is past is no mistake: machines that run are renewed until their certificates end.
        if span > validity.leaf and self.document.whole("validity"):
            what = f"installBy lies {span.days} days ahead, beyond the {validity.leaf.days} days of baked certificates"
            self.refuse(what, "Give an earlier date, or a longer validity: {leaf: ...}.", "installBy")

    # Machines

    def _machines(self, shape: ClusterFile) -> list[_Made]:
        expected = len(shape.nodes) + sum(pool.count for pool in shape.pools)
        if expected > 2 * MAX_WORKERS:  # far beyond any cluster: don't even list them
            loc: Loc = ("pools",) if shape.pools else ("nodes",)
            self.refuse(f"{expected} machines are far more than one cluster's", _DIVIDE, *loc)
            return []
        has_workers = any(machine.role == "worker" for machine in (*shape.nodes, *shape.pools))
        made: list[_Made] = []
        for at, entry in enumerate(shape.nodes):
            made += self._node(shape, entry, ("nodes", at), has_workers)
        for at, pool in enumerate(shape.pools):
            made += self._pool(shape, pool, ("pools", at), has_workers)
        return made

    def _node(self, shape: ClusterFile, entry: NodeShape, loc: Loc, has_workers: bool) -> list[_Made]:
        if entry.mac and entry.links:
            self.refuse(f"{entry.name} has both mac and links", "Write the MAC into links.", *loc, "mac")
        wired = self._wiring(shape, entry, loc, [entry.mac] if entry.mac else None)
        if wired is None:
            return []
        self._inside(entry.address, wired, f"{entry.name}'s address {entry.address}", *loc, "address")
        addresses = [Address(entry.address, wired.subnet), *map(Address.of, entry.extra_addresses)]
        for at, extra in enumerate(entry.extra_addresses):
            if extra.network.overlaps(wired.subnet):
                what = f"{entry.name}'s extra address {extra} lies in its own network {wired.subnet}"
                self.refuse(what, "Give one of another network.", *loc, "extraAddresses", at)
            elif extra.network.prefixlen <= 30 and extra.ip in (extra.network[0], extra.network[-1]):
                what = f"{extra.ip} is the network or broadcast address of {extra.network}"
                self.refuse(what, "Give one between them.", *loc, "extraAddresses", at)
        network = self._network(shape, entry, wired)(links=wired.links, addresses=tuple(addresses))
        machine = self._machine(shape, entry, entry.name, loc, has_workers, entry.denied)
        denied = entry.denied or entry.name in shape.denied
        return [_Made(machine(entry.name, network=network, serial=entry.serial, denied=denied), loc, entry)]

    def _pool(self, shape: ClusterFile, pool: Pool, loc: Loc, has_workers: bool) -> list[_Made]:
        for key, values in (("macs", pool.macs), ("serials", pool.serials)):
            if values is not None and len(values) != pool.count and self.document.whole(*loc, key):
                what = f"The pool {pool.name} has {pool.count} machines and {len(values)} {key}"
                self.refuse(what, f"Give {pool.count}, in order.", *loc, key)
        if pool.macs is not None and pool.links:
            self.refuse(f"The pool {pool.name} has both macs and links", "Keep one of them.", *loc, "macs")
        if len(pool.name) + 1 + len(str(pool.count)) > 63:
            what = f"{pool.name}-{pool.count} is longer than 63 characters"
            self.refuse(what, "Choose a shorter name.", *loc, "name")
        wired = self._wiring(shape, pool, loc, pool.macs)
        if wired is None:
            return []
        first = int(pool.first_address)
        last = first + pool.count - 1
        if pool.first_address in wired.subnet and last >= int(wired.subnet.broadcast_address):
            over = last - int(wired.subnet.broadcast_address) + 1
            what = f"The pool {pool.name} needs {pool.count} addresses from {pool.first_address}, {over} more than "
            self.refuse(f"{what}{wired.subnet} has left", "Begin earlier, or widen subnet.", *loc, "firstAddress")
            return []
        self._inside(pool.first_address, wired, f"The pool {pool.name}'s {pool.first_address}", *loc, "firstAddress")
        denied = set(shape.denied)
        made: list[_Made] = []
        machine = self._machine(shape, pool, f"{pool.name}-1", loc, has_workers, False)
        wire = self._network(shape, pool, wired)
        for at in range(pool.count):
            name = f"{pool.name}-{at + 1}"
            links = wired.links
            if pool.macs and not pool.links:
                links = (Link(links[0].name, pool.macs[at] if at < len(pool.macs) else None),)
            network = wire(links=links, addresses=(Address(IPv4Address(first + at), wired.subnet),))
            serial = pool.serials[at] if pool.serials and at < len(pool.serials) else None
            made.append(_Made(machine(name, network=network, serial=serial, denied=name in denied), loc, pool))
        return made

    def _machine(
        self, shape: ClusterFile, entry: Machine, name: str, loc: Loc, has_workers: bool, denied: bool
    ) -> partial[Node]:
        """What makes the machine, given what it does not share with the others of a pool."""
        if entry.role in ("etcd", "load-balancer"):
            for key, value in (
                ("labels", entry.labels),
                ("taints", entry.taints),
                ("volumes", entry.volumes),
                ("storage", entry.storage),
                ("denied", denied),
            ):
                if value:
                    what = f"{name} has {key}, but a machine of the role {entry.role} runs no kubelet"
                    self.refuse(what, "Remove it.", *loc, key, key=True)
        taints = entry.taints
        if taints is None:
            taints = [CONTROL_PLANE_TAINT] if entry.role == "control-plane" and has_workers else []
        for twice in _twice([(taint.partition("=")[0], taint.rpartition(":")[2]) for taint in taints]):
            self.refuse(f"The taint {twice[0]} stands twice", "Remove one of the two.", *loc, "taints")
        return partial(
            Node,
            role=entry.role,
            arch=entry.arch or shape.arch,
            media=entry.media or shape.media,
            storage=entry.storage,
            labels=tuple(sorted(entry.labels.items())),
            taints=tuple(taints),
            volumes=tuple(self._local_volumes(shape, entry, loc)),
            runs_etcd=entry.role == ("control-plane" if shape.etcd == "stacked" else "etcd"),
        )

    def _local_volumes(self, shape: ClusterFile, entry: Machine, loc: Loc) -> Iterator[LocalVolume]:
        known = shape.storage_classes
        for at, volume in enumerate(entry.volumes):
            chosen = volume.storage_class or (known[0] if len(known) == 1 else "")
            if chosen not in known and self.document.whole("storageClasses"):
                what = f"The storage class {chosen} is not in storageClasses" if chosen else "The volume has no class"
                there = f"one of {', '.join(known)}" if known else "a name, and list it under storageClasses:"
                self.refuse(what, f"Give storageClass {there}.", *loc, "volumes", at, "storageClass")
            yield LocalVolume(volume.name, volume.path, volume.size, chosen)
        for what, values in (("name", [v.name for v in entry.volumes]), ("path", [v.path for v in entry.volumes])):
            for twice in _twice(values):
                self.refuse(f"Two volumes have the {what} {twice}", "Change one of them.", *loc, "volumes")
        for volume in entry.volumes:
            for other in entry.volumes:
                if volume.path.startswith(f"{other.path}/"):
                    what = f"The volume {volume.name} lies in the volume {other.name}"
                    self.refuse(what, "Give each a place of its own.", *loc, "volumes")

    # Wiring

    def _wiring(self, shape: ClusterFile, entry: Machine, loc: Loc, macs: Sequence[str] | None) -> _Wired | None:
        shared = shape.machine_network
        subnet = entry.subnet or shared.subnet
        if subnet is None:
            if self.document.whole("machineNetwork", "subnet") and self.document.whole(*loc, "subnet"):
                what = f"{entry.name} has no subnet"
                self.refuse(what, "Give machineNetwork: {subnet: 192.168.10.0/24}, or the machine its own.", *loc)
            return None
        if subnet.prefixlen > 30:
            where: Loc = (*loc, "subnet") if entry.subnet else ("machineNetwork", "subnet")
            self.refuse(f"{subnet} has no room for machines", "Give a network of /30 or wider.", *where)
            return None
        links, bond = self._links(shared, entry, loc, macs)
        self._above(shared, entry, loc, links, bond)
        # the shared gateway belongs to the shared subnet
        gateway = entry.gateway or (shared.gateway if entry.subnet in (None, shared.subnet) else None)
        return _Wired(subnet, links, bond, gateway)

    def _links(
        self, shared: Wiring, entry: Machine, loc: Loc, macs: Sequence[str] | None
    ) -> tuple[tuple[Link, ...], str | None]:
        """The nearest of links, mac and interface wins, as a whole."""
        if entry.links and entry.interface:
            self.refuse(f"{entry.name} has both interface and links", "Keep one of them.", *loc, "interface")
        listed, bond, where = entry.links, entry.bond, loc
        if not listed and not macs and not entry.interface and shared.links:
            listed, where = shared.links, ("machineNetwork",)
        if listed:
            if len(listed) > 1 or where != loc:
                bond = bond or shared.bond
            if len(listed) > 1 and bond is None and self.document.whole(*where, "bond"):
                what = f"{entry.name} has {len(listed)} links and no bond"
                self.refuse(what, "Add bond: 802.3ad, or active-backup.", *where, "links")
            if isinstance(entry, Pool) or where != loc:
                for at, link in enumerate(listed):
                    if link.mac:
                        what = "A MAC address belongs to one machine, and these links to several"
                        self.refuse(what, "Remove it, or write links for each node.", *where, "links", at, "mac")
            for twice in _twice([link.name for link in listed]):
                self.refuse(f"Two links have the name {twice}", "Change one of them.", *where, "links")
            return tuple(Link(link.name, link.mac) for link in listed), bond
        name = entry.interface or shared.interface
        pattern = name is not None and any(c in name for c in "*?")
        if macs:
            # a MAC address says which card it is; a pattern is no name to give it
            return (Link("nic0" if name is None or pattern else name, macs[0]),), bond
        lost = not all(self.document.whole(*loc, key) for key in ("mac", "macs", "interface", "links"))
        lost = lost or not all(self.document.whole("machineNetwork", key) for key in ("interface", "links"))
        if name is None and not lost:
            what = f"Nothing says which network card of {entry.name} to use"
            known = "macs" if isinstance(entry, Pool) else "mac"
            remedy = f"Give {known}:, or interface: eno1 (also in machineNetwork:), or e* for machines with one card."
            self.refuse(what, remedy, *loc)
        if pattern and bond:
            self.refuse(f"A pattern ({name}) cannot be bonded", "Name the links.", *loc)
        return (Link(name or "nic0"),), bond

    def _above(self, shared: Wiring, entry: Machine, loc: Loc, links: Sequence[Link], bond: str | None) -> None:
        """A card is not called as the bond or the VLAN that lies upon it."""
        vlan = entry.vlan or shared.vlan
        above = {BOND: "bond"} if bond else {}
        above |= {vlan_device(vlan): "VLAN"} if vlan else {}
        for name, kind in above.items():
            if any(fnmatchcase(name, link.name) for link in links):
                key = "links" if entry.links or not (entry.interface or shared.interface) else "interface"
                where: Loc = (*loc, key) if self.document.written(*loc, key) else ("machineNetwork", key)
                what = f"A card of {entry.name} would be {name}, which is what its {kind} is called"
                self.refuse(what, "Call the card something else, as eno1.", *where)

    def _network(self, shape: ClusterFile, entry: Machine, wired: _Wired) -> partial[Network]:
        """What makes the network, given links and addresses."""
        shared = shape.machine_network
        nameservers = shared.nameservers if entry.nameservers is None else entry.nameservers
        search = shared.search if entry.search is None else entry.search
        return partial(
            Network,
            bond=wired.bond,
            vlan=entry.vlan or shared.vlan,
            mtu=entry.mtu or shared.mtu,
            gateway=wired.gateway,
            nameservers=tuple(nameservers or ()),
            search=tuple(search or ()),
        )

    def _inside(self, address: IPv4Address, wired: _Wired, what: str, *loc: str | int) -> None:
        subnet = wired.subnet
        if address not in subnet:
            self.refuse(f"{what} lies outside of {subnet}", f"Use {subnet[1]} to {subnet[-2]}.", *loc)
        elif address in (subnet.network_address, subnet.broadcast_address):
            which = "network" if address == subnet.network_address else "broadcast"
            self.refuse(f"{what} is the {which} address of {subnet}", f"Use {subnet[1]} to {subnet[-2]}.", *loc)

    # Networks

    def _networks(self, shape: ClusterFile, made: Sequence[_Made]) -> None:
        shared = shape.machine_network
        if shared.gateway and shared.subnet:
            self._gateway(shared.gateway, shared.subnet, "machineNetwork", "gateway")
        for entries, key in ((shape.nodes, "nodes"), (shape.pools, "pools")):
            for at, entry in enumerate(entries):
                subnet = entry.subnet or shared.subnet
                if entry.gateway and subnet:
                    self._gateway(entry.gateway, subnet, key, at, "gateway")
        named: list[tuple[str, IPv4Network, Loc]] = [
            ("podSubnet", shape.networking.pod_subnet, ("networking", "podSubnet")),
            ("serviceSubnet", shape.networking.service_subnet, ("networking", "serviceSubnet")),
        ]
        machines: dict[IPv4Network, Loc] = {}
        if shared.subnet:
            machines[shared.subnet] = ("machineNetwork", "subnet")
        for one in _of_each_entry(made):
            for at, interface in enumerate(one.node.network.addresses):
                loc = (*one.loc, "subnet") if at == 0 else (*one.loc, "extraAddresses", at - 1)
                machines.setdefault(interface.network, loc)
        named += [("the machines' network", network, loc) for network, loc in machines.items()]
        for at, (name, network, loc) in enumerate(named):
            for other_name, other, other_loc in named[:at]:
                if at > 1 and other_name == name:
                    continue  # the machines' own networks are theirs to route
                if network.overlaps(other) and self.document.whole(*loc) and self.document.whole(*other_loc):
                    what = f"{_capital(name)} {network} and {other_name} {other} overlap"
                    where = loc if self.document.written(*loc) or loc[0] == "nodes" else other_loc
                    self.refuse(what, "Give each its own range.", *where)
        self._cluster_networks(shape, made)
        self._reached(shape, made)
        endpoint = shape.control_plane_endpoint
        if endpoint and re.fullmatch("[0-9.]+", endpoint.host):
            for name, network, _ in named[:2]:
                if IPv4Address(endpoint.host) in network:
                    what = (
                        f"controlPlaneEndpoint {endpoint.host} lies in {name} {network}, which only the cluster knows"
                    )
                    self.refuse(what, "Give an address outside of it.", "controlPlaneEndpoint")

    def _reached(self, shape: ClusterFile, made: Sequence[_Made]) -> None:
        """Control planes and all others ask each other; without a gateway a machine reaches its own networks alone."""
        if self.errors or self.document.errors:
            return  # what is amiss may be why
        networks = {one.node.network.addresses[0].network for one in _of_each_entry(made)}
        if len(networks) < 2:
            return
        if shape.flannel_backend == "host-gw" and shape.pod_network == "flannel":
            what = f"host-gw wants all machines in one network, and they are in {len(networks)}"
            self.refuse(what, "Use vxlan.", "flannelBackend")
        each = sorted(_of_each_entry(made), key=lambda one: one.node.role == "control-plane")
        planes = [one for one in each if one.node.role == "control-plane"]
        cut_off: set[str] = set()
        for one in each:
            own = [address.network for address in one.node.network.addresses]
            others = (other.node for other in (each if one in planes else planes) if other.node.name not in cut_off)
            far = next((node for node in others if not any(node.address in network for network in own)), None)
            if far is not None and not one.node.network.gateway:
                cut_off.add(one.node.name)
                what = f"{one.node.name} has no gateway, and so no way to {far.name} at {far.address}"
                remedy = "Give it a gateway (machineNetwork's is of that subnet alone), or an extra address there."
                self.refuse(what, remedy, *one.loc)

    def _gateway(self, gateway: IPv4Address, subnet: IPv4Network, *loc: str | int) -> None:
        if gateway not in subnet or gateway in (subnet[0], subnet[-1]):
            what = f"The gateway {gateway} is no host in {subnet}"
            self.refuse(what, f"Use one of {subnet[1]} to {subnet[-2]}.", *loc)

    def _cluster_networks(self, shape: ClusterFile, made: Sequence[_Made]) -> None:
        pods, services = shape.networking.pod_subnet, shape.networking.service_subnet
        mask = shape.networking.node_cidr_mask_size
        loc: Loc = ("networking", "podSubnet")
        if not 12 <= services.prefixlen <= 28:
            what = f"serviceSubnet {services} is {'too wide' if services.prefixlen < 12 else 'too small'}"
            self.refuse(what, "Use /12 to /28, as 10.96.0.0/16.", "networking", "serviceSubnet")
        if not all(self.document.whole("networking", key) for key in ("podSubnet", "nodeCIDRMaskSize")):
            return
        if mask - pods.prefixlen > 16:
            what = f"podSubnet {pods} divided into /{mask} is more than the 65,536 parts that Kubernetes handles"
            self.refuse(what, f"Use /{mask - 16} or narrower.", *loc)
        nodes = sum(one.node.runs_kubelet for one in made)
        parts = 2 ** (mask - pods.prefixlen) if mask >= pods.prefixlen else 0
        if nodes > parts and self.document.whole("nodes") and self.document.whole("pools"):
            wanted = mask - (nodes - 1).bit_length()
            what = f"podSubnet {pods} is too small: it has {parts} networks of /{mask}, and {nodes} nodes need one each"
            remedy = f"Use a /{wanted} or wider."
            if mask < 25 and shape.max_pods <= 2**7 - TAKEN_IN_NODE_NETWORK and nodes <= 2 ** (25 - pods.prefixlen):
                remedy = f"Use a /{wanted} or wider, or nodeCIDRMaskSize: 25."
            self.refuse(what, remedy, *loc)
        room = 2 ** (32 - mask) - TAKEN_IN_NODE_NETWORK
        if shape.max_pods > room and self.document.whole("maxPods"):
            where: Loc = ("maxPods",) if self.document.written("maxPods") else ("networking", "nodeCIDRMaskSize")
            what = f"maxPods {shape.max_pods} does not fit a node's /{mask}, which has room for {room} pods"
            self.refuse(what, "Lower maxPods or nodeCIDRMaskSize.", *where)

    # Duplicates

    def _duplicates(self, shape: ClusterFile, made: Sequence[_Made]) -> None:
        names: set[str] = set()
        macs: dict[str, str] = {}
        serials: dict[str, str] = {}
        taken: dict[int, str] = {}  # by the address's number: an IPv4Address is slow to hash
        if shape.virtual_ip:
            taken[int(shape.virtual_ip)] = "virtualIP"
        for one in _of_each_entry(made):
            if one.node.network.gateway:
                taken[int(one.node.network.gateway)] = "the gateway"
        if shape.virtual_ip and taken[int(shape.virtual_ip)] == "the gateway":
            self.refuse(f"virtualIP {shape.virtual_ip} is the gateway", "Choose a free address.", "virtualIP")
        told: Counter[tuple[Loc, str]] = Counter()

        def clash(one: _Made, what: str, key: str, pool_key: str, remedy: str) -> None:
            """Once for each pool and key: a shifted pool would tell the same thousands of times."""
            pool = isinstance(one.shape, Pool)
            told[one.loc, key] += 1
            if told[one.loc, key] == 1 or not pool:
                self.refuse(what, remedy, *one.loc, pool_key if pool else key)

        for one in made:
            node = one.node
            if node.name in names:
                clash(one, f"The name {node.name} is given twice", "name", "name", "Choose another one.")
            names.add(node.name)
            for at, address in enumerate(node.addresses):
                number = int(address)
                if number in taken:
                    what = f"{address} of {node.name} is also {taken[number]}"
                    clash(
                        one, what, "extraAddresses" if at else "address", "firstAddress", "Give each its own address."
                    )
                else:
                    taken[number] = f"that of {node.name}"
            for link in node.network.links:
                if link.mac and link.mac in macs:
                    what = f"The MAC address {link.mac} of {node.name} is also that of {macs[link.mac]}"
                    key = "links" if isinstance(one.shape, NodeShape) and one.shape.links else "mac"
                    clash(one, what, key, "macs", "Read it off the machine again.")
                elif link.mac:
                    macs[link.mac] = node.name
            if node.serial and node.serial in serials:
                what = f"The serial number {node.serial} of {node.name} is also that of {serials[node.serial]}"
                clash(one, what, "serial", "serials", "Read it off the machine again.")
            elif node.serial:
                serials[node.serial] = node.name

    def _volumes(self, made: Sequence[_Made]) -> None:
        """PersistentVolumes are called <node>-<volume>, which may meet although both parts differ."""
        owners: dict[str, str] = {}
        for one in made:
            for volume in one.node.volumes:
                full = f"{one.node.name}-{volume.name}"
                other = owners.setdefault(full, one.node.name)
                if other != one.node.name:
                    what = f"The PersistentVolume {full} would be of both {other} and {one.node.name}"
                    self.refuse(what, "Rename one of the volumes.", *one.loc, "volumes")

    # Roles

    def _roles(self, shape: ClusterFile, nodes: Sequence[Node], made: Sequence[_Made]) -> None:
        if len(made) != len(shape.nodes) + sum(pool.count for pool in shape.pools):
            return  # a machine without a network was told; counting the rest would mislead
        if not nodes:
            self.refuse(
                "The cluster has no machines", "Add nodes: with at least one of the role control-plane.", "nodes"
            )
            return
        where = {one.node.name: one.loc for one in made}
        planes = [node for node in nodes if node.role == "control-plane"]
        etcd = [node for node in nodes if node.role == "etcd"]
        balancers = [node for node in nodes if node.role == "load-balancer"]
        if not planes:
            self.refuse("No machine has the role control-plane", "Give it to one, three or five machines.", "nodes")
        if shape.etcd == "external" and not etcd:
            self.refuse("etcd: external, but no machine has the role etcd", "Add one, three or five.", "etcd")
        if shape.etcd == "stacked" and etcd:
            what = f"{runs([node.name for node in etcd])} has the role etcd, but etcd is stacked on the control planes"
            self.refuse(what, "Write etcd: external, or remove these machines.", *where[etcd[0].name], "role")
        self._etcd_members([node for node in nodes if node.runs_etcd], where)
        if shape.etcd == "external" and len(planes) == 1:
            self.warn("one control plane: the API is gone while that machine is")
        self._load_balancer(shape, planes, balancers, where)
        taint = CONTROL_PLANE_TAINT.partition("=")[0]
        working = [n for n in nodes if n.runs_kubelet and not any(t.startswith(taint) for t in n.taints)]
        if len(working) > MAX_WORKERS:
            what = f"{len(working)} machines that run workloads are more than the {MAX_WORKERS} Kubernetes is tested to"
            self.refuse(what, _DIVIDE, *where[working[MAX_WORKERS].name])

    def _etcd_members(self, members: Sequence[Node], where: dict[str, Loc]) -> None:
        count = len(members)
        if count == 1:
            self.warn("one etcd member: its fault tolerance is 0, and the cluster is gone while that machine is")
        if count < 2:
            return
        quorum = count // 2 + 1
        last = where[members[-1].name]
        if count > MAX_ETCD:
            what = f"{count} etcd members are too many: each write waits for {quorum} of them"
            self.refuse(what, f"Use 3, 5 or {MAX_ETCD}.", *last)
        elif count % 2 == 0:
            what = (
                f"{count} etcd members have a quorum of {count}/2+1 = {quorum} and so a fault tolerance of"
                f" {count}-{quorum} = {count - quorum}, as {count - 1} would have"
            )
            self.refuse(what, f"Use {count - 1} or {count + 1}.", *last)

    def _load_balancer(
        self, shape: ClusterFile, planes: Sequence[Node], balancers: Sequence[Node], where: dict[str, Loc]
    ) -> None:
        kind, vip = shape.load_balancer, shape.virtual_ip
        vip_whole = self.document.whole("virtualIP")
        if kind == "nodes":
            if not balancers:
                what = "loadBalancer: nodes, but no machine has the role load-balancer"
                self.refuse(what, "Add two of them, or write loadBalancer: local.", "loadBalancer")
            if vip is None and vip_whole:
                what = "loadBalancer: nodes needs the address that the load balancers hold in turn"
                self.refuse(what, "Add virtualIP: with a free address of their network.", "loadBalancer")
            if len(balancers) == 1:
                self.warn("one load balancer: workers lose the API while that machine is gone")
        elif balancers:
            what = f"{runs([node.name for node in balancers])} has the role load-balancer, but loadBalancer is {kind}"
            self.refuse(what, "Write loadBalancer: nodes, or remove it.", *where[balancers[0].name], "role")
        if kind == "external":
            if shape.control_plane_endpoint is None and self.document.whole("controlPlaneEndpoint"):
                what = "loadBalancer: external, but nothing says where it is"
                self.refuse(what, "Add controlPlaneEndpoint: host:6443.", "loadBalancer")
            if vip is not None:
                what = "With loadBalancer: external no machine here holds a virtualIP"
                self.refuse(what, "Remove it; give the balancer's address as controlPlaneEndpoint.", "virtualIP")
        elif vip is not None:
            for holder in balancers if kind == "nodes" else planes:
                network = holder.network.addresses[0].network
                if vip not in network or vip in (network[0], network[-1]):
                    what = f"virtualIP {vip} is no host in {network}, the network of {holder.name} that is to hold it"
                    self.refuse(what, f"Use a free one of {network[1]} to {network[-2]}.", "virtualIP")
                    break

    def _room(self, shape: ClusterFile, made: Sequence[_Made]) -> None:
        """What is beyond what Kubernetes is tested to, told."""
        nodes = sum(one.node.runs_kubelet for one in made)
        pods = nodes * shape.max_pods
        if shape.max_pods > TESTED_PODS_PER_NODE:
            self.warn(f"maxPods {shape.max_pods}: Kubernetes is tested to about {TESTED_PODS_PER_NODE} pods a node")
        if pods > TESTED_PODS:
            self.warn(f"{nodes} nodes have room for {pods:,} pods: Kubernetes is tested to {TESTED_PODS:,} in all")
        if pods > TESTED_CONTAINERS:  # a pod is at least one container
            self.warn(f"{pods:,} pods are at least as many containers: Kubernetes is tested to {TESTED_CONTAINERS:,}")
        if shape.pod_network == "flannel" and nodes > FLANNEL_NODES:
            events, megabytes = sizing.watch_events(nodes), sizing.watch_bytes(nodes) / 1e6
            self.warn(
                f"flannel on {nodes} nodes: each watches all, and keeps a route and a neighbour entry for every other."
                f" While nothing changes, the API servers send {events:,.0f} events a second for it, at"
                f" {sizing.NODE_OBJECT // 1000} kB a Node {megabytes:,.0f} MB/s. podNetwork: none, and by extraObjects"
                " a network whose agents do not watch all Nodes, spare that (recipes/clusters/README.md, Sizes)"
            )

    # The rest

    def _denied(self, shape: ClusterFile, made: Sequence[_Made]) -> None:
        kubelets = [one.node.name for one in made if one.node.runs_kubelet]
        known = set(kubelets)
        for at, name in enumerate(shape.denied):
            if name not in known and self.document.whole("nodes") and self.document.whole("pools"):
                close = difflib.get_close_matches(name, kubelets, n=1)
                remedy = f"Did you mean {close[0]}?" if close else f"There are {runs(kubelets) or 'none'}."
                self.refuse(f"denied: there is no node {name} with a kubelet", remedy, "denied", at)

    def _users(self, shape: ClusterFile) -> None:
        self._no_twice([user.name for user in shape.users], "users")
        if not shape.users and self.document.whole("users"):
            self.warn("no users: nobody can log in to the machines, not even on the console")

    def _registries(self, shape: ClusterFile) -> tuple[Registry, ...]:
        self._no_twice([registry.host for registry in shape.registries], "registries")
        made = []
        for at, entry in enumerate(shape.registries):
            loc: Loc = ("registries", at)
            ca = self._file(entry.ca, *loc, "ca") if entry.ca else None
            if ca and b"-----BEGIN CERTIFICATE-----" not in _head(ca):
                self.refuse(f"{entry.ca} holds no PEM certificate", "Give the CA's certificate in PEM.", *loc, "ca")
            made.append(Registry(entry.host, tuple(entry.mirrors), ca, entry.username, self._password(entry, loc)))
        return tuple(made)

    def _password(self, entry: RegistryShape, loc: Loc) -> Path | None:
        if entry.username and not entry.password_file and self.document.whole(*loc, "passwordFile"):
            self.refuse("username without passwordFile", "Add passwordFile:, with the file's path.", *loc, "username")
        if not entry.password_file:
            return None
        if not entry.username and self.document.whole(*loc, "username"):
            self.refuse("passwordFile without username", "Add username:.", *loc, "passwordFile")
        if any(mirror.startswith("http:") for mirror in entry.mirrors):
            self.warn(f"registry {entry.host}: the password goes unencrypted to a mirror with http://")
        file = self._file(entry.password_file, *loc, "passwordFile")
        if file and not _head(file).partition(b"\n")[0].strip():
            what = f"The first line of {entry.password_file} is empty"
            self.refuse(what, "Write the password there.", *loc, "passwordFile")
        return file

    def _images(self, shape: ClusterFile) -> Iterator[str]:
        self._no_twice(shape.images, "images")
        for at, text in enumerate(shape.images):
            if not re.search("[^@]@[a-z0-9]+:", text):
                path = self._resolved(text)
                archive = re.search(r"\.(tar|tar\.gz|tgz|oci)$", text) or text.startswith((".", "/"))
                if archive or _exists(path):
                    yield str(self._file(text, "images", at) or path)
                    continue
            try:
                yield formats.image_reference(text)
            except formats.Malformed as malformed:
                self.refuse(f"images: {malformed.what}", malformed.remedy, "images", at)

    def _base_images(self, shape: ClusterFile, nodes: Sequence[Node]) -> Iterator[BaseImage]:
        there = {node.arch for node in nodes}
        seen: set[Arch] = set()
        for at, entry in enumerate(shape.base_images):
            loc: Loc = ("baseImages", at)
            arch = entry.arch or shape.arch
            if arch in seen:
                self.refuse(f"There are two base images for {arch}", "Keep one of them.", *loc)
            elif arch not in there and self.document.whole("nodes") and self.document.whole("pools"):
                self.refuse(f"No machine is {arch}, which this image is for", "Give its arch, or remove it.", *loc)
            seen.add(arch)
            if not re.match("https?://", entry.image):
                file = self._file(entry.image, *loc, "image")
                yield BaseImage(arch, str(file or self._resolved(entry.image)), entry.sha256)
                continue
            try:
                location = formats.url(entry.image)
            except formats.Malformed as malformed:
                self.refuse(f"image: {malformed.what}", malformed.remedy, *loc, "image")
                continue
            if entry.sha256 is None and self.document.whole(*loc, "sha256"):
                remedy = "Add sha256:, as its publisher gives it or sha256sum prints it."
                self.refuse("An image from a URL has no SHA-256", remedy, *loc, "image")
            yield BaseImage(arch, location, entry.sha256)

    def _files(self, texts: Sequence[str], key: str) -> Iterator[Path]:
        self._no_twice(texts, key)
        for at, text in enumerate(texts):
            file = self._file(text, key, at)
            if file:
                yield file

    def _file(self, text: str, *loc: str | int) -> Path | None:
        """The absolute path of a file that can be read, or a mistake told."""
        path = self._resolved(text)
        remedy = "Paths are relative to the cluster file; correct it."
        try:
            if path.is_dir():
                self.refuse(f"{text} is a directory, not a file", "Name the file in it.", *loc)
                return None
            if path.exists() and not path.is_file():
                self.refuse(f"{text} is no ordinary file", "Give an ordinary one.", *loc)
                return None
            with path.open("rb"):
                return path
        except FileNotFoundError:
            self.refuse(f"There is no file {text}", remedy, *loc)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            self.refuse(f"{text} cannot be read: {reason}", "Check the path and its permissions.", *loc)
        return None

    def _resolved(self, text: str) -> Path:
        return Path(os.path.abspath(self.document.file.parent / text))  # noqa: PTH100 (a link stays a link)

    def _no_twice(self, values: Sequence[str | int], key: str) -> None:
        for twice in _twice(values):
            at = [i for i, value in enumerate(values) if value == twice][1]
            self.refuse(f"{key}: {twice} stands twice", "Remove one of the two.", key, at)


_DIVIDE: Final = "Divide them into several clusters."


def _of_each_entry(made: Sequence[_Made]) -> Iterable[_Made]:
    """One machine of each entry of the file: those of a pool are wired alike."""
    return {one.loc: one for one in made}.values()


def _twice(values: Iterable[_T]) -> list[_T]:
    return [value for value, count in Counter(values).items() if count > 1]


def _capital(text: str) -> str:
    return text if text.endswith("Subnet") else text[0].upper() + text[1:]


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(1 << 20)
