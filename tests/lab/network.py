"""The switch that the machines' cards are plugged into: a bridge in the lab's namespace, without an uplink.

The lab itself has an address in each of the machines' networks, for kubectl. Where machines are in several networks it
is their gateway too, since somebody has to be their router.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

from recipes.kit.model import Cluster, Link, Node
from tests.lab import wire
from tests.lab.host import LabError
from tests.lab.namespaces import Namespaces
from tests.lab.wire import Stray

_BRIDGE = "lab"


class Switch:
    def __init__(self, cluster: Cluster, namespaces: Namespaces) -> None:
        self._cluster, self._namespaces = cluster, namespaces
        self._numbers = {node.name: number for number, node in enumerate(cluster.nodes)}
        self._mtu = str(max(1500, *(node.network.mtu or 0 for node in cluster.nodes)))
        self._networks = sorted({interface.network for node in cluster.nodes for interface in node.network.addresses})
        routed = len({node.network.addresses[0].network for node in cluster.nodes}) > 1
        self.addresses = {network: self._address_in(network, routed) for network in self._networks}
        self._cut: set[str] = set()
        self._batch(
            f"link add {_BRIDGE} type bridge mcast_snooping 0",
            *(
                f"address add {address}/{network.prefixlen} dev {_BRIDGE}"
                for network, address in self.addresses.items()
            ),
            f"link set {_BRIDGE} mtu {self._mtu} up",
        )
        namespaces.run(["nft", "-f", "-"], stdin=self._rules())
        if routed:
            namespaces.run(["sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward"])

    def plug_in(self, node: Node) -> str:
        """Fresh cards for a machine, in a network namespace of that name."""
        self.unplug(node)
        namespace = f"m{self._numbers[node.name]}"
        lines = [f"netns add {namespace}"]
        for link, port, mac in self._cards(node):
            peer = f"peer name {card_name(link)} address {mac} mtu {self._mtu} netns {namespace}"
            lines += [f"link add {port} mtu {self._mtu} type veth {peer}", f"link set {port} master {_BRIDGE} up"]
        self._batch(*lines)
        return namespace

    def taps(self, node: Node) -> list[tuple[str, str]]:
        """Fresh ports for a virtual machine's cards: the tap device and the MAC address of each."""
        self.unplug(node)
        cards = [(port, mac) for _, port, mac in self._cards(node)]
        for port, _ in cards:
            self._batch(f"tuntap add {port} mode tap", f"link set {port} mtu {self._mtu} master {_BRIDGE} up")
        return cards

    def unplug(self, node: Node) -> None:
        """The cards are gone, with everything that the machine's kernel knew: addresses, routes, rules."""
        for port in self._ports(node):
            # By name: the kernel takes its time with those of a namespace that is gone.
            self._namespaces.run(["ip", "link", "delete", port], check=False)
        namespace = f"m{self._numbers[node.name]}"
        if self._namespaces.path(f"/run/netns/{namespace}").exists():
            self._batch(f"netns del {namespace}")

    def set_forwarding(self, node: Node, forwarding: bool) -> None:
        """Whether the switch carries the machine's frames. Its cards keep their link, as behind a broken switch."""
        ports = self._ports(node)
        self._cut = self._cut.difference(ports) if forwarding else self._cut.union(ports)
        self._namespaces.run(["nft", "-f", "-"], stdin=wire.cut(self._cut))

    def strays(self) -> list[Stray]:
        names = {port: node.name for node in self._cluster.nodes for port in self._ports(node)}
        return wire.strays(self._namespaces.run(wire.LISTING).stdout, names, self._gateways())

    def _ports(self, node: Node) -> list[str]:
        return [f"p{self._numbers[node.name]}n{number}" for number in range(len(node.network.links))]

    def _cards(self, node: Node) -> list[tuple[Link, str, str]]:
        """Each with its port and its MAC address."""
        network = node.network
        if network.bond is not None or network.vlan is not None:
            raise LabError(
                "The lab has no bonds and no VLANs",
                where=node.name,
                remedy="Use a cluster file with one card for each machine, as in tests/lab/clusters.",
            )
        found = []
        for number, (port, link) in enumerate(zip(self._ports(node), network.links, strict=True)):
            own = (b"\2\0" + (256 * self._numbers[node.name] + number).to_bytes(4, "big")).hex(":")
            found.append((link, port, link.mac or own))
        return found

    def _rules(self) -> str:
        known = [address for node in self._cluster.nodes for address in node.addresses]
        known += [*self.addresses.values(), *([self._cluster.vip] if self._cluster.vip else [])]
        cluster = [self._cluster.pod_subnet, self._cluster.service_subnet]
        return wire.rules([*self._networks, *cluster], known, cluster)

    def _gateways(self) -> set[IPv4Address]:
        return {node.network.gateway for node in self._cluster.nodes if node.network.gateway is not None}

    def _address_in(self, network: IPv4Network, routed: bool) -> IPv4Address:
        """The gateway's, where there is a need for one, else one that nobody has or asks for."""
        if routed and (gateways := [gateway for gateway in self._gateways() if gateway in network]):
            return gateways[0]
        taken = self._gateways() | {address for node in self._cluster.nodes for address in node.addresses}
        taken |= {address for node in self._cluster.nodes for address in node.network.nameservers}
        others = {str(self._cluster.vip), *self._cluster.ntp, *self._cluster.dns_upstream}
        for number in range(network.num_addresses - 2, 0, -1):
            if network[number] not in taken and str(network[number]) not in others:
                return network[number]
        raise LabError(f"Every address of {network} is taken", remedy="Use a larger network in the lab.")

    def _batch(self, *lines: str) -> None:
        self._namespaces.run(["ip", "-batch", "-"], stdin="".join(f"{line}\n" for line in lines))


def card_name(link: Link) -> str:
    """What the card is called on the machine. For a pattern, which cloud-init hands on to netplan but not to networkd,
    it is the identifier in the seed's network-config."""
    return "nic0" if set("*?[") & set(link.name) else link.name
