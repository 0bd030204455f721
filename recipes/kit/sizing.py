"""What the number of workers sets, and what machines it wants. The templates of overlays/ take every value from here,
and the tables in recipes/clusters/README.md are printed from it.

Payloads follow model.SCALES, so that one worker more changes none of their bytes. What no payload holds (machines,
loads) follows the nodes themselves.

Short names of sources: "kube-up" is kubernetes/kubernetes, cluster/gce (config-common.sh and
gci/configure-kubeapiserver.sh), by which Kubernetes' own scalability tests made their clusters; "etcd.io, hardware" and
"etcd.io, FAQ" are etcd's documentation, v3.6; KEP-589 is Kubernetes' "Efficient Node Heartbeats".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil

from recipes.kit.model import SCALES, Cluster, Role

NODE_OBJECT = 15_000  # bytes of a Node with many images and volumes (KEP-589); others are smaller
SYNC_LIMIT = 10  # milliseconds for one synchronous write of etcd's, 99th percentile (etcd.io, FAQ)
WORKER_OVERHEAD = (0.2, 712)  # CPUs and MiB that a kubelet keeps back from pods: reserved, and the eviction threshold


@dataclass(frozen=True, slots=True)
class Sizing:
    """What payloads are given for up to so many workers. Times are in seconds."""

    workers: int
    max_requests_inflight: int  # these two are of each API server, so that one can carry the load of all
    max_mutating_requests_inflight: int
    probes: tuple[int, int]  # between two of a worker's balancer: while a server is up, while it is down

    # The same for every size; table() says why.
    balancer_probes: tuple[int, int] = (2, 1)  # of the few machines of the role load-balancer
    client_qps: int = 200  # controller-manager and scheduler
    client_burst: int = 400
    etcd_quota: int = 8 << 30  # bytes
    etcd_compaction: int = 300  # by the API servers
    etcd_retention: int = 8  # hours, by etcd itself
    lease_duration: int = 40  # the kubelet renews it four times in that
    status_report: int = 300  # a Node's status is written that often while nothing in it changes
    conntrack_per_core: int = 32_768
    conntrack_min: int = 131_072

    @property
    def requests(self) -> int:
        """What an API server takes at a time: its priority and fairness adds both limits up."""
        return self.max_requests_inflight + self.max_mutating_requests_inflight


_SIZES = {
    size.workers: size
    for size in (
        Sizing(100, max_requests_inflight=400, max_mutating_requests_inflight=200, probes=(2, 1)),
        Sizing(1_000, max_requests_inflight=1_500, max_mutating_requests_inflight=500, probes=(10, 5)),
        Sizing(5_000, max_requests_inflight=3_000, max_mutating_requests_inflight=1_000, probes=(30, 5)),
    )
}
_LARGEST = _SIZES[SCALES[-1]]


def of(cluster: Cluster) -> Sizing:
    return _SIZES[cluster.scale]


# ---- loads, calculated


def heartbeats(nodes: int) -> float:
    """Writes a second by which kubelets say that they live: leases, and the status of Nodes while nothing changes."""
    return nodes * 4 / _LARGEST.lease_duration + nodes / _LARGEST.status_report


def watch_events(nodes: int) -> float:
    """Events a second where every node watches every Node, as flanneld does, and nothing changes. All API servers
    together send them."""
    return nodes * nodes / _LARGEST.status_report


def watch_bytes(nodes: int) -> float:
    """The same in bytes a second, with Nodes of NODE_OBJECT bytes."""
    return watch_events(nodes) * NODE_OBJECT


def pod_prefix(nodes: int, mask: int) -> int:
    """The longest prefix of a podSubnet that has a network of this mask for each node."""
    return mask - (nodes - 1).bit_length()


# ---- CoreDNS: an object and no part of a payload, so it follows the nodes themselves


def dns_replicas(nodes: int) -> int:
    """One for 16 nodes (kube-up, addons/dns-horizontal-autoscaler), two at least where there are two nodes."""
    return max(min(nodes, 2), ceil(nodes / 16))


def dns_memory(pods: int) -> int:
    """MiB that each replica is given at the most: its estimate (coredns/deployment, Scaling_CoreDNS.md) and a third."""
    return max(170, ceil(dns_estimate(pods) * 4 / 3 / 10) * 10)


def dns_estimate(pods: int) -> int:
    """MiB, for so many Pods and Services, the answers that it keeps included. In steps: each restarts it."""
    return max(70, 54 + 10 * ceil(pods / 10_000))


# ---- payloads, which machines with thin media fetch from one server


BANDWIDTH = (
    117_500_000  # bytes a second that a server sends at 1 Gbit/s: 94 % are the file's, the rest is Ethernet, IP, TCP
)
AT_ONCE = 100  # so many machines begin at once
PAYLOAD = 181_000_000  # bytes of a worker's, for the documentation
_LONGEST_SPREAD = 900  # seconds; a machine that is replaced later waits as long


def crowd(machines: int) -> int:
    """For how many machines the beginning is spread: in steps of two, so that one more seldom changes the others; 0
    where they need not wait for each other."""
    return 0 if machines <= AT_ONCE else AT_ONCE << ((machines - 1) // AT_ONCE).bit_length()


def spread(machines: int, size: int) -> int:
    """Over how many seconds machines begin to fetch a payload of that size: as long as the server needs for all of
    them, but 15 minutes at most."""
    return min(round(sending(crowd(machines) * size)), _LONGEST_SPREAD)


def sending(count: int, gigabits: int = 1) -> float:
    """Seconds that a server needs for so many bytes, at that many Gbit/s."""
    return count / BANDWIDTH / gigabits


def servers(count: int) -> int:
    """With 1 Gbit/s each, to send so many bytes within an hour."""
    return ceil(sending(count) / 3600)


# ---- machines


@dataclass(frozen=True, slots=True)
class Machine:
    cpus: int
    memory: int  # GiB
    disk: int | None = None  # GB, of an SSD; None: what the artifact needs is enough

    def __str__(self) -> str:
        disk = f", {self.disk} GB of SSD" if self.disk else ""
        return f"{self.cpus} CPUs, {self.memory} GiB{disk}"


# nodes -> control plane (the disk: with etcd on it), etcd on a machine of its own, load balancer.
# Control planes: kube-up's get-master-size, one machine with etcd on it, at 4 GiB a CPU. etcd: the examples of etcd.io,
# hardware, for 50, 250, 1,000 and 3,000 nodes. Disks: 80 GB at the least (etcd.io, FAQ), and kube-up's
# get-master-disk-size. Load balancers: five connections a node, each with two buffers of 16 kB (HAProxy, tune.bufsize).
_MACHINES = {
    10: (Machine(2, 8, 80), Machine(2, 8, 80), Machine(2, 1)),
    50: (Machine(4, 16, 80), Machine(2, 8, 80), Machine(2, 1)),
    100: (Machine(8, 32, 80), Machine(4, 16, 80), Machine(2, 1)),
    500: (Machine(16, 64, 80), Machine(8, 32, 80), Machine(2, 1)),
    1_000: (Machine(32, 128, 100), Machine(8, 32, 100), Machine(2, 1)),
    5_000: (Machine(32, 128, 200), Machine(16, 64, 200), Machine(4, 2)),
}


def machines(cluster: Cluster) -> dict[Role, Machine]:
    """What each role of this cluster wants, workers left out: pods decide about those."""
    nodes = len(cluster.kubelets)
    plane, etcd, balancer = next((row for step, row in _MACHINES.items() if nodes <= step), _MACHINES[SCALES[-1]])
    if cluster.etcd == "external":
        plane = replace(plane, disk=None)
    wanted: dict[Role, Machine] = {"control-plane": plane, "etcd": etcd, "load-balancer": balancer}
    return {role: machine for role, machine in wanted.items() if cluster.with_role(role)}


# ---- documentation


def table() -> str:
    """What grows with the cluster, and what does not: two tables in Markdown."""
    sizes = [_SIZES[scale] for scale in SCALES]
    grows = [
        ("", *(f"up to {size.workers:,} workers" for size in sizes), "source, and why"),
        _row(
            "API server: `--max-requests-inflight`",
            (f"{size.max_requests_inflight:,}" for size in sizes),
            "kube-up (1,500 past 500 nodes, 3,000 past 3,000), else the default. Of each API server, so that one alone"
            " can carry the load of all; its memory follows, see the machines",
        ),
        _row(
            "API server: `--max-mutating-requests-inflight`",
            (f"{size.max_mutating_requests_inflight:,}" for size in sizes),
            "kube-up (500 and 1,000, likewise)",
        ),
        _row(
            "API server: requests at a time",
            (f"{size.requests:,}" for size in sizes),
            "the sum of both, which priority and fairness divides among all (kube-apiserver's help)",
        ),
        _row(
            "workers' balancers probe an API server every",
            (f"{up} s; while it is down {down} s" for up, down in (size.probes for size in sizes)),
            "each API server is probed by every worker, and an answer costs it about 1 ms",
        ),
        _row(
            "probes that each API server answers",
            (f"{size.workers / size.probes[0]:.0f}/s" for size in sizes),
            "calculated",
        ),
        _row(
            "heartbeats",
            (f"{heartbeats(size.workers):,.0f} writes/s" for size in sizes),
            "calculated: a lease is renewed every 10 s, a Node written every 5 min while nothing changes",
        ),
        _row(
            "flannel: events of Nodes that all API servers send",
            (f"{_rate(size.workers)}" for size in sizes),
            f"calculated: nodes x nodes / 5 min, at {NODE_OBJECT // 1000} kB each: a Node with many images and volumes"
            " (KEP-589); others are smaller",
        ),
        _row(
            "flannel: what each flanneld reads at its start",
            (_mb(size.workers * NODE_OBJECT) for size in sizes),
            "calculated: all Nodes, of as much",
        ),
        _row(
            "CoreDNS: replicas; memory of each, at the most",
            (f"{dns_replicas(size.workers)}; {dns_memory(size.workers * 100)} MiB" for size in sizes),
            "one for 16 nodes (kube-up, addons/dns-horizontal-autoscaler), two at least; 54 MB and 1 MB for 1,000 Pods"
            " and Services (coredns/deployment, Scaling_CoreDNS.md), here 100 on each node, and a third. Exactly, not"
            " in steps",
        ),
        _row(
            "`podSubnet`, at least, with `nodeCIDRMaskSize: 24`",
            (f"/{pod_prefix(size.workers + 5, 24)}" for size in sizes),
            "calculated, with 5 control planes; a smaller one is refused",
        ),
    ]
    size = _LARGEST
    same = [
        ("for every size", "value", "source, and why"),
        (
            "controller-manager, scheduler: requests a second, burst",
            f"{size.client_qps}, {size.client_burst}",
            "Kubernetes' tests of 5,000 nodes give 100, 100 (kubernetes/test-infra, sig-scalability presets), the"
            " defaults are 20, 30 and 50, 100. One of each leads, and the API servers' own limits hold",
        ),
        (
            "etcd: `--quota-backend-bytes`",
            f"{size.etcd_quota >> 30} GiB",
            "the largest that etcd does not warn of (etcd.io, FAQ; etcd v3.7, server/storage/quota.go)",
        ),
        (
            "API server: `--etcd-compaction-interval`",
            f"{size.etcd_compaction // 60} min",
            "the default; one API server does it for all. What is kept, up to twice as long, is at 5,000 nodes some"
            f" {_mb(2 * size.etcd_compaction * size.workers * NODE_OBJECT / size.status_report)} of Nodes",
        ),
        (
            "etcd: `--auto-compaction-retention`",
            f"{size.etcd_retention} h",
            "for the hours in which no API server runs; else these compact first",
        ),
        (
            "kubelet: `nodeLeaseDurationSeconds`, `nodeStatusReportFrequency`",
            f"{size.lease_duration} s, {size.status_report // 60} min",
            "the defaults (KEP-589), also of Kubernetes' tests of 5,000 nodes; longer, a dead node is noticed later",
        ),
        (
            "kube-proxy: connections tracked",
            f"{size.conntrack_per_core:,} a core, at least {size.conntrack_min:,}",
            "the defaults: a node tracks what its own pods speak with, however many nodes there are",
        ),
        (
            "load balancers probe an API server every",
            f"{size.balancer_probes[0]} s; while it is down {size.balancer_probes[1]} s",
            "they are few",
        ),
        (
            "`maxPods`, `nodeCIDRMaskSize`",
            "the cluster file's",
            "never derived: the mask cannot change in a running cluster",
        ),
        (
            "images that machines pull",
            "none",
            "all are in the artifact, but for what your workloads name by `registries`",
        ),
    ]
    return f"{_markdown(grows)}\n{_markdown(same)}"


def payload_table() -> str:
    """What one server has to send to machines with thin media, in Markdown."""
    head = (
        "machines",
        "bytes",
        "at 1 Gbit/s",
        "at 10 Gbit/s",
        "servers with 1 Gbit/s for an hour",
        "workers begin within",
    )
    rows: list[tuple[str, ...]] = [head]
    for machines in (50, *SCALES):
        count = machines * PAYLOAD
        spread_over = spread(machines, PAYLOAD)
        begin = duration(spread_over) if spread_over else "at once"
        times = (duration(sending(count, gigabits)) for gigabits in (1, 10))
        rows.append((f"{machines:,}", f"{count / 1e9:,.0f} GB", *times, str(servers(count)), begin))
    return _markdown(rows)


def duration(seconds: float) -> str:
    """For people: "8 s", "13 min" or "2.1 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def machine_table() -> str:
    """The recommended machines, in Markdown."""
    rows: list[tuple[str, ...]] = [
        ("nodes", "each control plane (disk: with etcd on it)", "each etcd machine", "each load balancer")
    ]
    rows += [(f"up to {nodes:,}", *map(str, row)) for nodes, row in _MACHINES.items()]
    return _markdown(rows)


def _row(name: str, values: Iterable[str], source: str) -> tuple[str, ...]:
    return (name, *values, source)


def _rate(nodes: int) -> str:
    return f"{watch_events(nodes):,.0f}/s, {_mb(watch_bytes(nodes))}/s"


def _mb(count: float) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e7 else f"{count / 1e6:,.0f} MB"


def _markdown(rows: Sequence[tuple[str, ...]]) -> str:
    lines = [rows[0], ("---",) * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
