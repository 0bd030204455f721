"""Where the machines' cables end: what they send that is not for the cluster is counted, and a cable can be cut.

By nftables: every packet that comes in from a machine is looked at, dynamic sets count each machine, destination and
port in the kernel, so nothing is missed and nothing is slowed down.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Any

_TABLE = "lab"
_PORTS = {53: "dns", 67: "dhcp", 123: "ntp", 547: "dhcp", 5353: "mdns", 5355: "llmnr"}
_PROTOCOLS = {1: "icmp", 2: "igmp"}
_KINDS6 = {131: "mld", 133: "router solicitation", 135: "neighbour solicitation", 143: "mld"}


@dataclass(frozen=True, slots=True)
class Stray:
    """Packets from one machine to one place outside of the cluster's networks."""

    machine: str
    kind: str  # of the tables above, "tcp", ...; "arp": asks for an address that nobody has, "gateway": for a gateway's
    to: str  # the address; of an Ethernet frame that is no IP, its type
    port: int | None
    packets: int


def rules(networks: Iterable[IPv4Network], known: Iterable[IPv4Address], quiet: Iterable[IPv4Network]) -> str:
    """nftables' input. networks: whose addresses are the cluster's; known: addresses that may be asked for by ARP,
    with all of quiet."""
    return f"""
    table bridge {_TABLE} {{
        set networks {{ type ipv4_addr; flags interval; auto-merge; elements = {{ {_listed(networks)} }} }}
        set known {{ type ipv4_addr; flags interval; auto-merge; elements = {{ {_listed([*known, *quiet])} }} }}
        set ports4 {{ typeof iifname . ip daddr . ip protocol . th dport; size 65535; flags dynamic; counter; }}
        set protocols4 {{ typeof iifname . ip daddr . ip protocol; size 65535; flags dynamic; counter; }}
        set ports6 {{ typeof iifname . ip6 daddr . ip6 nexthdr . th dport; size 65535; flags dynamic; counter; }}
        set kinds6 {{ typeof iifname . ip6 daddr . icmpv6 type; size 65535; flags dynamic; counter; }}
        set protocols6 {{ typeof iifname . ip6 daddr . ip6 nexthdr; size 65535; flags dynamic; counter; }}
        set asked {{ typeof iifname . arp daddr ip; size 65535; flags dynamic; counter; }}
        set cut {{ typeof iifname; }}
        set frames {{ typeof iifname . ether type; size 65535; flags dynamic; counter; }}
        chain wire {{
            type filter hook prerouting priority -300;
            ether type vmap {{ ip : jump ipv4, ip6 : jump ipv6, arp : jump arp_requests }}
            ether type != {{ ip, ip6, arp }} update @frames {{ iifname . ether type }}
        }}
        chain cut_in {{
            type filter hook prerouting priority -200;
            iifname @cut drop
        }}
        chain cut_out {{
            type filter hook postrouting priority -200;
            oifname @cut drop
        }}
        chain ipv4 {{
            ip daddr @networks return
            ip daddr 224.0.0.18 ip protocol 112 return comment "VRRP"
            meta l4proto {{ tcp, udp }} update @ports4 {{ iifname . ip daddr . ip protocol . th dport }} return
            update @protocols4 {{ iifname . ip daddr . ip protocol }}
        }}
        chain ipv6 {{
            meta l4proto {{ tcp, udp }} update @ports6 {{ iifname . ip6 daddr . ip6 nexthdr . th dport }} return
            meta l4proto ipv6-icmp update @kinds6 {{ iifname . ip6 daddr . icmpv6 type }} return
            update @protocols6 {{ iifname . ip6 daddr . ip6 nexthdr }}
        }}
        chain arp_requests {{
            arp operation request arp daddr ip != @known update @asked {{ iifname . arp daddr ip }}
        }}
    }}
    """


def _listed(things: Iterable[object]) -> str:
    return ", ".join(sorted({str(thing) for thing in things}))


def cut(ports: Collection[str]) -> str:
    """nftables' input: these ports of the switch, and no others, carry nothing."""
    added = f"add element bridge {_TABLE} cut {{ {_listed(ports)} }}\n" if ports else ""
    return f"flush set bridge {_TABLE} cut\n{added}"


LISTING = ("nft", "--json", "--numeric", "list", "table", "bridge", _TABLE)


def strays(listing: str, machines: Mapping[str, str], gateways: Iterable[IPv4Address]) -> list[Stray]:
    """From what LISTING printed, sorted. machines: port of the switch -> name."""
    found = []
    for entry in json.loads(listing)["nftables"]:
        for key, packets in _elements(entry.get("set", {})):
            found.append(_stray(entry["set"]["name"], key, packets, machines, {str(gateway) for gateway in gateways}))
    return sorted(found, key=lambda stray: (stray.machine, stray.kind, stray.to, stray.port or 0))


def _elements(listed: dict[str, Any]) -> Iterator[tuple[list[Any], int]]:
    for element in listed.get("elem", ()):
        if isinstance(element, dict) and "elem" in element:
            yield element["elem"]["val"]["concat"], element["elem"]["counter"]["packets"]


def _stray(name: str, key: list[Any], packets: int, machines: Mapping[str, str], gateways: set[str]) -> Stray:
    machine, to = machines[key[0]], str(key[1])
    if name in ("ports4", "ports6"):
        protocol, port = {6: "tcp", 17: "udp"}[key[2]], int(key[3])
        return Stray(machine, _PORTS.get(port, protocol), to, port, packets)
    if name == "kinds6":
        return Stray(machine, _KINDS6.get(key[2], f"icmpv6 type {key[2]}"), to, None, packets)
    if name == "asked":
        return Stray(machine, "gateway" if to in gateways else "arp", to, None, packets)
    if name == "frames":
        return Stray(machine, "frame", to, None, packets)
    return Stray(machine, _PROTOCOLS.get(key[2], f"protocol {key[2]}"), to, None, packets)
