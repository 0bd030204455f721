"""How machines with thin media get their payload from one server: what each of them fetches, and when it begins."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from recipes.kit import sizing
from recipes.kit.model import Cluster, Node


@dataclass(frozen=True, slots=True)
class Fetch:
    """What first boot of one machine fetches: size in bytes and SHA-256 (hex) of the file as it comes. It begins no
    earlier than `after` seconds from when the machine was switched on."""

    url: str
    sha256: str
    size: int
    after: int


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository of an OCI registry, as the distribution specification (v1.1) has it."""

    registry: str  # "https://registry.example.internal:5000"
    name: str

    @property
    def host(self) -> str:
        return self.registry.partition("://")[2]

    @property
    def url(self) -> str:
        """What its blobs, manifests and uploads lie below."""
        return f"{self.registry}/v2/{self.name}"


def repository(server: str) -> Repository | None:
    """Of a payloadServer; None: it is a plain HTTP server."""
    scheme, _, rest = server.partition("://")
    host, _, name = rest.partition("/")
    if scheme not in ("oci", "oci+http"):
        return None
    return Repository(f"{'http' if scheme == 'oci+http' else 'https'}://{host}", name)


def fetch(cluster: Cluster, node: Node, *, sha256: str, size: int) -> Fetch | None:
    """What a machine fetches of that payload; None: it needs no server, or the cluster has none."""
    if cluster.payload_server is None or node.media != "thin":
        return None
    registry = repository(cluster.payload_server)
    if registry is None:
        url = f"{cluster.payload_server.rstrip('/')}/{node.role}-{node.arch}.tar.gz"
    else:
        url = f"{registry.url}/blobs/sha256:{sha256}"
    return Fetch(url, sha256, size, _after(cluster, node, size))


def _after(cluster: Cluster, node: Node, size: int) -> int:
    """Workers begin spread evenly by their names; the few others, which those wait for, at once."""
    span = sizing.spread(len(cluster.fetching), size)
    if node.role != "worker" or span == 0:
        return 0
    return int.from_bytes(hashlib.sha256(node.name.encode()).digest()[:8]) % span
