"""Small resolved clusters for tests of the pure functions (the cluster file's own tests start from YAML)."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path
from typing import Any

from recipes.kit.model import Address, Cluster, Link, Network, Node, Role, User

SSH_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ8kC8m7kqD5l0R0vV5mS2x7n0m8Q3Zr1n2b3c4d5e6f admin@desk"


def address(text: str) -> Address:
    """As in "192.168.10.21/24"."""
    return Address.of(IPv4Interface(text))


def node(name: str, role: Role, host: int, **changes: Any) -> Node:
    """A machine 192.168.10.<host>/24, matched by MAC, without a default route."""
    network = Network(
        links=(Link("nic0", f"52:54:00:00:10:{host:02x}"),),
        addresses=(address(f"192.168.10.{host}/24"),),
    )
    taints = ("node-role.kubernetes.io/control-plane=:NoSchedule",) if role == "control-plane" else ()
    made = Node(name=name, role=role, arch="amd64", network=network, taints=taints, runs_etcd=role == "etcd")
    return made._replace(**changes)


def ha(**changes: Any) -> Cluster:
    """Three control planes with stacked etcd, three workers behind their local load balancers."""
    planes = [node(f"control-{i}", "control-plane", 10 + i, runs_etcd=True) for i in (1, 2, 3)]
    workers = [node(f"worker-{i}", "worker", 20 + i) for i in (1, 2, 3)]
    cluster = Cluster(
        name="ha",
        file=Path("/nonexistent/ha.yaml"),
        nodes=(*planes, *workers),
        pod_subnet=IPv4Network("10.244.0.0/16"),
        service_subnet=IPv4Network("10.96.0.0/16"),
        users=(User("admin", (SSH_KEY,)),),
    )
    return replace(cluster, **changes)


def external_etcd() -> Cluster:
    """Three etcd machines, two control planes, two workers."""
    etcd = [node(f"etcd-{i}", "etcd", 30 + i) for i in (1, 2, 3)]
    planes = [node(f"control-{i}", "control-plane", 10 + i) for i in (1, 2)]
    workers = [node(f"worker-{i}", "worker", 20 + i) for i in (1, 2)]
    return ha(name="external-etcd", nodes=(*etcd, *planes, *workers), etcd="external")


def balanced() -> Cluster:
    """As ha(), with two machines of the role load-balancer that hold a VIP."""
    balancers = [node(f"balancer-{i}", "load-balancer", 40 + i) for i in (1, 2)]
    return ha(name="balanced", nodes=(*ha().nodes, *balancers), load_balancer="nodes", vip=IPv4Address("192.168.10.9"))


def single() -> Cluster:
    """One machine that is everything."""
    only = node("only", "control-plane", 11, runs_etcd=True, taints=())
    return ha(name="single", nodes=(only,))
