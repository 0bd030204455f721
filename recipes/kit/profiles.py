"""The one table of certificates: who signs what, with which names, for which use, and where it lies on the machines.

Recipes mint and issue from it, profile_table() prints it for the documentation. Pure data: no keys, no I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from typing import Literal

from recipes.kit.model import Cluster, Node, Role

Authority = Literal["kubernetes", "kubelet-serving", "etcd", "front-proxy"]
Holder = Literal["control-plane", "worker", "load-balancer", "etcd", "etcd-member", "desk"]
Form = Literal["pair", "kubeconfig"]  # <path>.crt and <path>.key, or one kubeconfig file at <path>.conf

# Owner of the keys that stay with the operator; an underscore, so that no machine can have this name.
DESK = "_desk"
ADMIN_CONF = "admin.conf"  # what people call it

PKI = "/etc/kubernetes/pki"
ETCD_PKI = "/etc/etcd/pki"

# Group of the baked administrator. Bound to cluster-admin by a cluster object, so it can be taken back; system:masters
# could not.
ADMIN_GROUP = "nodebake:cluster-admins"


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A certificate and its private key (PKCS #8), both PEM."""

    cert_pem: bytes = field(repr=False)
    key_pem: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class AuthoritySpec:
    """One CA. certificates: (path, who trusts it there); key: where the controller-manager signs with it, or None."""

    name: Authority
    signs: str
    certificates: tuple[tuple[str, tuple[Holder, ...]], ...]
    key: str | None = None

    @property
    def common_name(self) -> str:
        return f"{self.name}-ca"


@dataclass(frozen=True, slots=True)
class Sans:
    """Subject alternative names: a text for the documentation and the names themselves (IPv4 addresses as text too)."""

    text: str
    names: Callable[[Cluster, Node], tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class CertificateSpec:
    """One baked leaf certificate; one per holder. path has no suffix (see Form)."""

    name: str
    authority: Authority
    common_name: str
    purpose: str
    holder: Holder
    path: str
    organization: str | None = None
    server: bool = False
    client: bool = False
    sans: Sans | None = None
    form: Form = "pair"


def _api_server_names(cluster: Cluster, node: Node) -> tuple[str, ...]:
    names = [
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        f"kubernetes.default.svc.{cluster.dns_domain}",
        node.name,
        "localhost",
        "127.0.0.1",
        *map(str, node.addresses),
        str(cluster.api_service_address),
    ]
    if cluster.control_plane_endpoint is not None:
        names.append(cluster.control_plane_endpoint.host)
    if cluster.vip is not None:
        names.append(str(cluster.vip))
    return tuple(dict.fromkeys((*names, *cluster.cert_sans)))


def _etcd_names(cluster: Cluster, node: Node) -> tuple[str, ...]:
    return tuple(dict.fromkeys((node.name, "localhost", "127.0.0.1", *map(str, node.addresses))))


_API_SERVER = Sans(
    "kubernetes, kubernetes.default, kubernetes.default.svc, kubernetes.default.svc.<dnsDomain>, node name, localhost, "
    "127.0.0.1, node addresses, first service address, controlPlaneEndpoint, VIP, certSANs",
    _api_server_names,
)
_ETCD = Sans("node name, localhost, 127.0.0.1, node addresses", _etcd_names)

AUTHORITIES: tuple[AuthoritySpec, ...] = (
    AuthoritySpec(
        "kubernetes",
        "API servers and their clients, kubelets' client certificates",
        ((f"{PKI}/kubernetes-ca.crt", ("control-plane", "worker", "load-balancer")),),
        key=f"{PKI}/kubernetes-ca.key",
    ),
    AuthoritySpec(
        "kubelet-serving",
        "kubelets' serving certificates",
        ((f"{PKI}/kubelet-serving-ca.crt", ("control-plane",)),),
        key=f"{PKI}/kubelet-serving-ca.key",
    ),
    AuthoritySpec(
        "etcd",
        "etcd members and their clients",
        ((f"{PKI}/etcd-ca.crt", ("control-plane",)), (f"{ETCD_PKI}/etcd-ca.crt", ("etcd-member",))),
    ),
    AuthoritySpec(
        "front-proxy",
        "the API servers towards aggregated API servers",
        ((f"{PKI}/front-proxy-ca.crt", ("control-plane",)),),
    ),
)

PROFILES: tuple[CertificateSpec, ...] = (
    CertificateSpec(
        "kube-apiserver",
        "kubernetes",
        "kube-apiserver",
        "the API server's port 6443",
        "control-plane",
        f"{PKI}/kube-apiserver",
        server=True,
        sans=_API_SERVER,
    ),
    CertificateSpec(
        "kube-apiserver-kubelet-client",
        "kubernetes",
        "kube-apiserver-kubelet-client",
        "API server to kubelets (bound to system:kubelet-api-admin)",
        "control-plane",
        f"{PKI}/kube-apiserver-kubelet-client",
        client=True,
    ),
    CertificateSpec(
        "kube-apiserver-etcd-client",
        "etcd",
        "kube-apiserver-etcd-client",
        "API server to etcd",
        "control-plane",
        f"{PKI}/kube-apiserver-etcd-client",
        client=True,
    ),
    CertificateSpec(
        "front-proxy-client",
        "front-proxy",
        "front-proxy-client",
        "API server to aggregated API servers",
        "control-plane",
        f"{PKI}/front-proxy-client",
        client=True,
    ),
    CertificateSpec(
        "kube-controller-manager",
        "kubernetes",
        "system:kube-controller-manager",
        "controller-manager to its own API server",
        "control-plane",
        "/etc/kubernetes/controller-manager",
        client=True,
        form="kubeconfig",
    ),
    CertificateSpec(
        "kube-scheduler",
        "kubernetes",
        "system:kube-scheduler",
        "scheduler to its own API server",
        "control-plane",
        "/etc/kubernetes/scheduler",
        client=True,
        form="kubeconfig",
    ),
    CertificateSpec(
        "etcd-server",
        "etcd",
        "etcd-server",
        "etcd's client port 2379 (a client too: etcd's own gateway dials it)",
        "etcd-member",
        f"{ETCD_PKI}/server",
        server=True,
        client=True,
        sans=_ETCD,
    ),
    CertificateSpec(
        "etcd-peer",
        "etcd",
        "etcd-peer",
        "etcd's peer port 2380, both directions",
        "etcd-member",
        f"{ETCD_PKI}/peer",
        server=True,
        client=True,
        sans=_ETCD,
    ),
    CertificateSpec(
        "etcd-client",
        "etcd",
        "etcd-client",
        "the operator's etcdctl and the health check",
        "etcd-member",
        f"{ETCD_PKI}/client",
        client=True,
    ),
    CertificateSpec(
        "admin",
        "kubernetes",
        "kubernetes-admin",
        "the operator's admin.conf; never on a machine",
        "desk",
        "admin",
        organization=ADMIN_GROUP,
        client=True,
        form="kubeconfig",
    ),
)


def holds(node: Node, holder: Holder) -> bool:
    """Whether a machine is such a holder; stacked etcd members are control planes and etcd members at once."""
    return _holds(node.role, node.runs_etcd, holder)


def _holds(role: Role, runs_etcd: bool, holder: Holder) -> bool:
    return runs_etcd if holder == "etcd-member" else role == holder


def profiles_of(node: Node) -> tuple[CertificateSpec, ...]:
    return _profiles(node.role, node.runs_etcd)


@cache
def _profiles(role: Role, runs_etcd: bool) -> tuple[CertificateSpec, ...]:
    return tuple(spec for spec in PROFILES if _holds(role, runs_etcd, spec.holder))


def expiries(
    cluster: Cluster, node: Node | None, *, minted: datetime, authorities_end: datetime
) -> list[tuple[str, datetime]]:
    """Until when certificates hold (UTC), by name, in the table's order: a machine's, or without one the desk's.

    The desk's are every CA and admin.conf's certificate. A leaf never outlives its CA.
    """
    authorities = [
        (authority.common_name, authorities_end)
        for authority in AUTHORITIES
        if node is None or any(holds(node, holder) for _, holders in authority.certificates for holder in holders)
    ]
    leaves = profiles_of(node) if node is not None else [spec for spec in PROFILES if spec.holder == "desk"]
    return authorities + [(spec.name, min(minted + cluster.validity.leaf, authorities_end)) for spec in leaves]


def leaf_owners(cluster: Cluster) -> Iterator[tuple[str, CertificateSpec]]:
    """(owner, profile) of every leaf key that the cluster needs; the owner is a node's name or DESK."""
    for node in cluster.nodes:
        for spec in profiles_of(node):
            yield node.name, spec
    for spec in PROFILES:
        if spec.holder == "desk":
            yield DESK, spec


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def profile_table() -> str:
    """Both tables in Markdown, for the documentation."""
    lines = [
        _row("CA", "signs", "certificate", "private key"),
        _row("---", "---", "---", "---"),
    ]
    for authority in AUTHORITIES:
        where = "<br>".join(f"`{path}` ({', '.join(holders)})" for path, holders in authority.certificates)
        key = f"`{authority.key}` (control-plane)" if authority.key else "the desk only"
        lines.append(_row(f"`{authority.common_name}`", authority.signs, where, key))
    lines += [
        "",
        _row("certificate", "CA", "CN", "O", "use", "SAN", "on", "files", "for"),
        _row(*["---"] * 9),
    ]
    for spec in PROFILES:
        use = ", ".join(name for name, on in (("server", spec.server), ("client", spec.client)) if on)
        files = f"`{spec.path}.crt`, `.key`" if spec.form == "pair" else f"`{spec.path}.conf`"
        lines.append(
            _row(
                spec.name,
                spec.authority,
                f"`{spec.common_name}`",
                f"`{spec.organization}`" if spec.organization else "",
                use,
                spec.sans.text if spec.sans else "",
                spec.holder,
                files,
                spec.purpose,
            )
        )
    return "\n".join(lines) + "\n"
