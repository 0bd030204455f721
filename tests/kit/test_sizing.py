"""What the number of workers sets: the numbers, where they arrive, and what the documentation says of them."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes.kit import distribution, sizing
from recipes.kit.model import SCALES, Cluster, Node, Role, scale_of
from tests import samples
from tests.layout import payload

README = (Path(__file__).parents[2] / "recipes" / "clusters" / "README.md").read_text()


def of_size(workers: int) -> Cluster:
    """A cluster as large as that by what it says; its nodes stay three."""
    return replace(samples.ha(), scale=scale_of(workers))


def text(cluster: Cluster, role: Role, path: str) -> str:
    (found,) = (file.data for file in payload(cluster, role) if file.path == path)
    assert found is not None
    return found.decode()


def flags(cluster: Cluster, unit: str) -> dict[str, str]:
    return dict(re.findall(r"--([a-z-]+)=(\S+)", text(cluster, "control-plane", f"/etc/systemd/system/{unit}.service")))


def config(cluster: Cluster, name: str) -> Any:
    return yaml.safe_load(text(cluster, "control-plane", f"/etc/kubernetes/{name}.yaml"))


@pytest.mark.parametrize(
    ("workers", "reading", "writing"),
    [(1, 400, 200), (100, 400, 200), (101, 1500, 500), (1000, 1500, 500), (1001, 3000, 1000), (5000, 3000, 1000)],
)
def test_an_api_server_takes_more_requests_in_steps(workers: int, reading: int, writing: int) -> None:
    given = flags(of_size(workers), "kube-apiserver")
    assert (given["max-requests-inflight"], given["max-mutating-requests-inflight"]) == (str(reading), str(writing))
    assert sizing.of(of_size(workers)).requests == reading + writing


@pytest.mark.parametrize(
    ("nodes", "replicas", "memory"),
    [(1, 1, 170), (2, 2, 170), (32, 2, 170), (33, 3, 170), (1000, 63, 210), (5005, 313, 760)],
)
def test_coredns_grows_with_the_nodes(nodes: int, replicas: int, memory: int) -> None:
    assert (sizing.dns_replicas(nodes), sizing.dns_memory(nodes * 100)) == (replicas, memory)


@pytest.mark.parametrize("workers", SCALES)
def test_what_serves_every_size_arrives(workers: int) -> None:
    cluster = of_size(workers)
    manager, etcd = flags(cluster, "kube-controller-manager"), flags(cluster, "etcd")
    assert (manager["kube-api-qps"], manager["kube-api-burst"]) == ("200", "400")
    scheduler = config(cluster, "scheduler")["clientConnection"]
    assert (scheduler["qps"], scheduler["burst"]) == (200, 400)
    assert (etcd["quota-backend-bytes"], etcd["auto-compaction-retention"]) == (str(8 * 1024**3), "8h")
    assert flags(cluster, "kube-apiserver")["etcd-compaction-interval"] == "300s"
    kubelet = config(cluster, "kubelet")
    assert (kubelet["nodeLeaseDurationSeconds"], kubelet["nodeStatusReportFrequency"]) == (40, "300s")
    conntrack = config(cluster, "kube-proxy")["conntrack"]
    assert (conntrack["maxPerCore"], conntrack["min"]) == (32 * 1024, 128 * 1024)


def test_what_a_kubelet_keeps_back_is_as_told() -> None:
    kubelet = config(samples.ha(), "kubelet")
    kept = (kubelet["kubeReserved"], kubelet["systemReserved"])
    cpus = sum(int(each["cpu"].removesuffix("m")) for each in kept) / 1000
    amounts = [*(each["memory"] for each in kept), kubelet["evictionHard"]["memory.available"]]
    assert (cpus, sum(int(amount.removesuffix("Mi")) for amount in amounts)) == sizing.WORKER_OVERHEAD
    assert f"{cpus} CPUs and {sizing.WORKER_OVERHEAD[1]} MiB" in README


def test_loads() -> None:
    """5,000 leases every 10 s and 5,000 Nodes every 5 min; each of these to 5,000 watchers, in 15 kB."""
    assert sizing.heartbeats(5000) == pytest.approx(500 + 5000 / 300)
    assert sizing.watch_events(5000) == pytest.approx(5000 / 300 * 5000)
    assert sizing.watch_bytes(5000) == pytest.approx(1.25e9)


@pytest.mark.parametrize("nodes", [1, 2, 256, 257, 5005])
def test_a_pod_subnet_is_as_small_as_it_may_be(nodes: int) -> None:
    prefix = sizing.pod_prefix(nodes, 24)
    assert 2 ** (24 - prefix) >= nodes
    assert prefix == 24 or 2 ** (24 - prefix - 1) < nodes
    assert ip_network((0, prefix)).prefixlen == prefix


def test_few_machines_fetch_at_once_and_many_as_their_server_can() -> None:
    """In steps, so that one machine more seldom changes what others were given."""
    size = 117_500_000  # one second of the server
    assert [sizing.spread(machines, size) for machines in (1, 100, 101, 200, 201)] == [0, 0, 200, 200, 400]
    assert sizing.spread(5005, size) == 900, "a machine that is replaced later waits as long"
    assert len({sizing.crowd(machines) for machines in range(101, 5006)}) == 6


def test_a_servers_load() -> None:
    total = 5000 * 181_000_000
    assert [round(sizing.sending(total, gigabits)) for gigabits in (1, 10)] == [7702, 770]
    assert (sizing.servers(total), sizing.servers(1)) == (3, 1)
    assert [sizing.duration(seconds) for seconds in (7702, 770, 15)] == ["2.1 h", "13 min", "15 s"]


def test_workers_begin_spread_evenly_and_always_the_same() -> None:
    nodes = [samples.node(f"worker-{i}", "worker", 1)._replace(media="thin") for i in range(5000)]
    planes = [node._replace(media="thin") for node in samples.ha().control_planes]
    cluster = samples.ha(nodes=(*planes, *nodes), payload_server="http://10.0.0.1")

    def after(node: Node) -> int:
        made = distribution.fetch(cluster, node, sha256="0" * 64, size=181_000_000)
        assert made is not None
        return made.after

    times = [after(node) for node in nodes]
    assert {after(node) for node in planes} == {0}, "workers wait for them"
    assert max(Counter(times).values()) < 20 and max(times) < 900, "of 5.6 on average in each second"
    counted = Counter(time // 90 for time in times)
    assert all(400 < count < 600 for count in counted.values()) and len(counted) == 10
    assert after(nodes[17]) == times[17] == after(nodes[17]._replace(serial="X"))


def test_machines_are_those_of_the_roles_that_there_are() -> None:
    assert sizing.machines(samples.ha()) == {"control-plane": sizing.Machine(2, 8, 80)}
    apart = {"control-plane": sizing.Machine(2, 8), "etcd": sizing.Machine(2, 8, 80)}
    assert sizing.machines(samples.external_etcd()) == apart, "only etcd wants a disk of its own"
    assert list(sizing.machines(samples.balanced())) == ["control-plane", "load-balancer"]


def test_machines_grow_with_the_nodes_and_not_past_the_table() -> None:
    def wanted(workers: int) -> sizing.Machine:
        nodes = [samples.node(f"worker-{i}", "worker", 1) for i in range(workers)]
        return sizing.machines(samples.ha(nodes=(*samples.ha().control_planes, *nodes)))["control-plane"]

    assert [wanted(workers).cpus for workers in (7, 8, 497, 498, 5005)] == [2, 4, 16, 32, 32]


def test_the_documentation_has_the_tables() -> None:
    assert sizing.table() in README
    assert sizing.machine_table() in README
    assert sizing.payload_table() in README
    assert f"less than {sizing.SYNC_LIMIT} ms" in README
