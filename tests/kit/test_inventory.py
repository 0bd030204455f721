"""From cluster files to clusters: the rules between keys, the defaults, and that nothing but a BakeError escapes."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recipes.kit import inventory
from recipes.kit.errors import BakeError, BakeErrors, Place
from recipes.kit.model import BaseImage, Cluster, Endpoint, Link
from tests import samples

CLUSTERS = Path(inventory.__file__).parent.parent / "clusters"
NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
DIGEST = f"sha256:{'0123456789abcdef' * 4}"


def load(directory: Path, text: str) -> Cluster:
    file = directory / "c.yaml"
    file.write_text(text, encoding="utf-8")
    return inventory.load(file, now=NOW)


def told(directory: Path, text: str) -> list[tuple[int | None, int | None, str, str]]:
    with pytest.raises(BakeErrors) as caught:
        load(directory, text)
    made = []
    for error in caught.value.errors:
        assert isinstance(error.where, Place)
        made.append((error.where.line, error.where.column, error.what, error.remedy or ""))
    return made


def cluster(
    *lines: str, planes: int = 3, workers: int = 1, network: str = "subnet: 192.168.10.0/24, interface: eno1"
) -> str:
    """A good cluster file, with these lines at the end; nodes stand in lines 4 and on."""
    nodes = [f"- {{name: p{i}, role: control-plane, address: 192.168.10.{10 + i}}}" for i in range(1, planes + 1)]
    nodes += [f"- {{name: w{i}, role: worker, address: 192.168.10.{20 + i}}}" for i in range(1, workers + 1)]
    return "\n".join(["name: c", f"machineNetwork: {{{network}}}", "nodes:", *nodes, *lines, ""])


def node(entry: str) -> str:
    """A line for cluster(), as line 8."""
    return f"- {{name: x, role: worker, address: 192.168.10.99, {entry}}}"


# lines behind cluster() with its three control planes and one worker, line, column, part of what, part of the remedy
RULES: dict[str, tuple[str, int, int, str, str]] = {
    "name twice": ("- {name: p1, role: worker, address: 192.168.10.99}", 8, 10, "p1 is given twice", "another"),
    "address twice": (
        "- {name: x, role: worker, address: 192.168.10.11}",
        8,
        36,
        "192.168.10.11 of x is also that of p1",
        "its own",
    ),
    "serial twice": (
        f"{node('serial: S1')}\n{node('serial: S1').replace('x,', 'z,').replace('.99', '.98')}",
        9,
        59,
        "S1",
        "again",
    ),
    "MAC twice": (
        "- {name: x, role: worker, address: 192.168.10.98, mac: 52:54:00:AA:10:11}\n"
        "- {name: z, role: worker, address: 192.168.10.99, mac: 52-54-00-aa-10-11}",
        9,
        56,
        "52:54:00:aa:10:11 of z",
        "again",
    ),
    "outside of the subnet": (
        "- {name: x, role: worker, address: 192.168.11.5}",
        8,
        36,
        "outside of 192.168.10.0/24",
        "192.168.10.1 to",
    ),
    "no way to the control planes": (
        "- {name: x, role: worker, address: 10.9.0.5, subnet: 10.9.0.0/24}",
        8,
        3,
        "x has no gateway, and so no way to p1 at 192.168.10.11",
        "extra address",
    ),
    "network address": ("- {name: x, role: worker, address: 192.168.10.0}", 8, 36, "network address", "192.168.10.254"),
    "broadcast address": ("- {name: x, role: worker, address: 192.168.10.255}", 8, 36, "broadcast address", "192.168"),
    "gateway of its own": (
        node("gateway: 10.0.0.1"),
        8,
        60,
        "gateway 10.0.0.1 is no host in 192.168.10.0/24",
        "one of",
    ),
    "address is the gateway": (node("gateway: 192.168.10.12"), 5, 44, "is also the gateway", "its own"),
    "VIP is a machine's": ("virtualIP: 192.168.10.21", 7, 37, "192.168.10.21 of w1 is also virtualIP", "its own"),
    "VIP elsewhere": ("virtualIP: 10.9.9.9", 8, 12, "no host in 192.168.10.0/24", "free"),
    "mac and links": (
        node('mac: "52:54:00:00:00:01", links: [{name: eno1}]'),
        8,
        56,
        "both mac and links",
        "into links",
    ),
    "links without a bond": (node("links: [{name: eno1}, {name: eno2}]"), 8, 58, "2 links and no bond", "802.3ad"),
    "link twice": (node("links: [{name: a}, {name: a}], bond: 802.3ad"), 8, 58, "Two links have the name a", "Change"),
    "a bonded pattern": (node("interface: e*, bond: 802.3ad"), 8, 3, "cannot be bonded", "links"),
    "extra address inside": (node("extraAddresses: [192.168.10.7/25]"), 8, 68, "in its own network", "another"),
    "extra broadcast": (node("extraAddresses: [10.9.0.255/24]"), 8, 68, "network or broadcast", "between"),
    "a subnet for nobody": (node("subnet: 10.9.0.0/31"), 8, 59, "no room for machines", "/30"),
    "overlap of services": (
        "networking: {serviceSubnet: 10.244.8.0/24}",
        8,
        29,
        "podSubnet 10.244.0.0/16 overlap",
        "its own",
    ),
    "overlap with machines": ("networking: {podSubnet: 192.168.0.0/16}", 2, 26, "overlap", "its own"),
    "overlap with one machine": (node("extraAddresses: [10.96.7.1/24]"), 8, 68, "serviceSubnet", "its own"),
    "services too wide": ("networking: {serviceSubnet: 10.96.0.0/11}", 8, 29, "too wide", "/12 to /28"),
    "services too small": ("networking: {serviceSubnet: 10.96.0.0/29}", 8, 29, "too small", "/12 to /28"),
    "pods too wide": ("networking: {podSubnet: 48.0.0.0/4}", 8, 25, "65,536", "/8"),
    "pod network too small": (
        "networking: {podSubnet: 10.4.0.0/23}",
        8,
        25,
        "it has 2 networks of /24, and 4 nodes",
        "/22 or wider, or nodeCIDRMaskSize: 25",
    ),
    "too many pods for a node": ("maxPods: 300", 8, 10, "room for 253 pods", "Lower"),
    "mask for fewer pods": ("networking: {nodeCIDRMaskSize: 26}", 8, 32, "room for 61 pods", "Lower"),
    "endpoint in the pods' network": ("controlPlaneEndpoint: 10.244.0.9", 8, 23, "lies in podSubnet", "outside"),
    "beyond the certificates": ("installBy: 2000d", 8, 12, "2000 days ahead, beyond the 1096 days", "validity"),
    "a date beyond": ("installBy: 2036-01-01", 8, 12, "beyond the 1096 days", "earlier"),
    "leaf beyond the CA": ("validity: {ca: 100d, leaf: 200d, kubelet: 50d}", 8, 28, "outlive their CAs", "shorter"),
    "kubelet beyond the CA": ("validity: {ca: 1100d, kubelet: 1200d}", 8, 32, "outlive their CA", "shorter"),
    "load balancers unused": (
        "- {name: x, role: load-balancer, address: 192.168.10.9}",
        8,
        19,
        "loadBalancer is local",
        "loadBalancer: nodes",
    ),
    "no load balancers": ("loadBalancer: nodes\nvirtualIP: 192.168.10.9", 8, 15, "no machine has the role", "two"),
    "no VIP": (
        "- {name: x, role: load-balancer, address: 192.168.10.9}\nloadBalancer: nodes",
        9,
        15,
        "hold in turn",
        "virtualIP",
    ),
    "external without an endpoint": ("loadBalancer: external", 8, 15, "where it is", "controlPlaneEndpoint"),
    "external with a VIP": (
        "loadBalancer: external\ncontrolPlaneEndpoint: x.y\nvirtualIP: 192.168.10.9",
        10,
        12,
        "no machine here",
        "Remove",
    ),
    "etcd machines while stacked": (
        "- {name: x, role: etcd, address: 192.168.10.9}",
        8,
        19,
        "stacked",
        "etcd: external",
    ),
    "no etcd machines": ("etcd: external", 8, 7, "no machine has the role etcd", "three"),
    "taint twice": (node('taints: ["a=1:NoSchedule", "a=2:NoSchedule"]'), 8, 59, "taint a stands twice", "Remove"),
    "labels without a kubelet": (
        "- {name: x, role: etcd, address: 192.168.10.9, labels: {a: b}}\netcd: external",
        8,
        48,
        "no kubelet",
        "Remove",
    ),
    "unknown storage class": (
        node("volumes: [{name: a, path: /srv, size: 1Gi, storageClass: fast}]"),
        8,
        108,
        "class fast is not in",
        "list it",
    ),
    "no storage class": (node("volumes: [{name: a, path: /srv, size: 1Gi}]"), 8, 61, "has no class", "storageClass"),
    "volume's path twice": (
        node("volumes: [{name: a, path: /s, size: 1Gi}, {name: b, path: /s, size: 1Gi}]") + "\nstorageClasses: [l]",
        8,
        60,
        "the path /s",
        "Change",
    ),
    "a volume in another": (
        node("volumes: [{name: a, path: /s, size: 1Gi}, {name: b, path: /s/b, size: 1Gi}]") + "\nstorageClasses: [l]",
        8,
        60,
        "The volume b lies in the volume a",
        "its own",
    ),
    "a card called as its bond": (
        node("links: [{name: bond0}, {name: b}], bond: 802.3ad"),
        8,
        58,
        "A card of x would be bond0, which is what its bond is called",
        "eno1",
    ),
    "a card called as its VLAN": (node("interface: vlan7, vlan: 7"), 8, 62, "what its VLAN is called", "eno1"),
    "a pattern that its VLAN matches": (node("interface: v*, vlan: 7"), 8, 62, "would be vlan7", "eno1"),
    "volumes that meet": (
        "- {name: a-b, role: worker, address: 192.168.10.98, volumes: [{name: c, path: /s, size: 1Gi}]}\n"
        "- {name: a, role: worker, address: 192.168.10.99, volumes: [{name: b-c, path: /s, size: 1Gi}]}\n"
        "storageClasses: [l]",
        9,
        60,
        "a-b-c would be of both",
        "Rename",
    ),
    "denied but unknown": ("denied: [w2]", 8, 10, "no node w2", "w1."),
    "user twice": (
        "users:" + 2 * f"\n- {{name: u, sshAuthorizedKeys: [{samples.SSH_KEY}]}}",
        10,
        3,
        "u stands twice",
        "Remove",
    ),
    "encryption key twice": ("encryptionKeys: [1, 2, 1]", 8, 24, "encryptionKeys: 1 stands twice", "Remove"),
    "user without a password file": ("registries: [{host: r.x, username: u}]", 8, 36, "without passwordFile", "path"),
    "missing CA": ("registries: [{host: r.x, ca: ca.pem}]", 8, 30, "no file ca.pem", "relative to the cluster file"),
    "CA that is none": ("registries: [{host: r.x, ca: c.yaml}]", 8, 30, "no PEM certificate", "PEM"),
    "missing objects": ("extraObjects: [a.yaml]", 8, 16, "no file a.yaml", "relative"),
    "a directory": ('extraObjects: ["."]', 8, 16, "directory", "file in it"),
    "missing archive": ("images: [./app.tar]", 8, 10, "no file ./app.tar", "relative"),
    "image by tag": ("images: [nginx:1.29]", 8, 10, "neither an archive that exists nor a reference", "sha256"),
    "image without a registry": (f"images: [nginx@{DIGEST}]", 8, 10, "names no registry", "docker.io/library/nginx"),
    "missing base image": ("baseImages: [{image: d.raw}]", 8, 22, "no file d.raw", "relative"),
    "base image by URL": ('baseImages: [{image: "http://m.x/d.raw"}]', 8, 22, "has no SHA-256", "sha256sum"),
    "base image by a bad URL": ('baseImages: [{image: "http://u:p@m.x/d.raw"}]', 8, 22, "credentials", "Take them out"),
    "base image with half a digest": ("baseImages: [{image: c.yaml, sha256: ab12}]", 8, 38, "not a SHA-256", "64"),
    "base image that no machine needs": (
        "baseImages: [{image: c.yaml, arch: arm64}]",
        8,
        14,
        "No machine is arm64",
        "arch",
    ),
    "two base images": ("baseImages: [{image: c.yaml}, {image: c.yaml}]", 8, 31, "two base images for amd64", "one"),
    "image with a short digest": ('images: ["r.x/a@sha256:12"]', 8, 10, "not a digest", "64"),
    "pool beyond its subnet": (
        "pools:\n- {name: v, role: worker, count: 100, firstAddress: 192.168.10.200}",
        9,
        53,
        "45 more than",
        "widen",
    ),
    "pool over a node": (
        "pools:\n- {name: v, role: worker, count: 9, firstAddress: 192.168.10.5}",
        9,
        51,
        "192.168.10.11 of v-7 is also",
        "own",
    ),
    "pool's MACs": (
        "pools:\n- {name: v, role: worker, count: 2, firstAddress: 192.168.10.99, macs: ['52:54:00:00:00:01']}",
        9,
        72,
        "2 machines and 1 macs",
        "Give 2",
    ),
    "pool's name": (
        f"pools:\n- {{name: {'v' * 62}, role: worker, count: 2, firstAddress: 192.168.10.99}}",
        9,
        10,
        "63",
        "shorter",
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_a_rule(name: str, tmp_path: Path) -> None:
    lines, line, column, what, remedy = RULES[name]
    ((at, across, said, mend),) = told(tmp_path, cluster(lines))
    assert (at, across) == (line, column), said
    assert what in said
    assert remedy in mend


@pytest.mark.parametrize(("planes", "what", "remedy"), [
    (2, "2 etcd members have a quorum of 2/2+1 = 2 and so a fault tolerance of 2-2 = 0, as 1 would have", "1 or 3"),
    (4, "4 etcd members have a quorum of 4/2+1 = 3 and so a fault tolerance of 4-3 = 1, as 3 would have", "3 or 5"),
    (6, "6 etcd members have a quorum of 6/2+1 = 4 and so a fault tolerance of 6-4 = 2, as 5 would have", "5 or 7"),
    (9, "9 etcd members are too many: each write waits for 5", "3, 5 or 7"),
])  # fmt: skip
def test_etcd_members_are_one_three_five_or_seven(planes: int, what: str, remedy: str, tmp_path: Path) -> None:
    ((line, _, said, mend),) = told(tmp_path, cluster(planes=planes))
    assert line == 3 + planes
    assert what in said
    assert remedy in mend


def test_machines_in_several_networks_reach_each_other(tmp_path: Path) -> None:
    """Through gateways, of both sides; and host-gw not at all."""
    far = "- {name: x, role: worker, address: 10.9.0.5, subnet: 10.9.0.0/24, gateway: 10.9.0.1}"
    cut_off = told(tmp_path, cluster(far))
    assert [(line, what) for line, _, what, _ in cut_off] == [
        (3 + number, f"p{number} has no gateway, and so no way to x at 10.9.0.5") for number in (1, 2, 3)
    ]
    routed = "subnet: 192.168.10.0/24, interface: eno1, gateway: 192.168.10.1"
    assert load(tmp_path, cluster(far, network=routed)).nodes[-1].name == "x"
    ((line, _, what, remedy),) = told(tmp_path, cluster(far, "flannelBackend: host-gw", network=routed))
    assert (line, remedy) == (9, "Use vxlan.")
    assert "they are in 2" in what


def test_a_date_that_is_past_is_no_mistake(tmp_path: Path) -> None:
    """What runs is still looked at, verified and renewed."""
    assert load(tmp_path, cluster("installBy: 2020-01-01")).install_by == datetime(2020, 1, 1, 23, 59, 59, tzinfo=UTC)


def test_machines_need_a_network_card_a_subnet_and_a_control_plane(tmp_path: Path) -> None:
    card = told(tmp_path, cluster(planes=1, workers=0, network="subnet: 192.168.10.0/24"))
    assert [(line, column) for line, column, *_ in card] == [(4, 3)]
    assert "which network card of p1" in card[0][2]
    assert "mac" in card[0][3]
    assert "e*" in card[0][3]
    subnet = told(tmp_path, cluster(planes=1, workers=0, network="interface: eno1"))
    assert "p1 has no subnet" in subnet[0][2]
    ((_, _, what, _),) = told(tmp_path, cluster(planes=0))
    assert "No machine has the role control-plane" in what
    assert told(tmp_path, "name: c\n")[0][2] == "The cluster has no machines"


def test_all_mistakes_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = cluster(
        "- {name: X, role: worker, address: 192.168.10.98}",  # form
        "- {name: x, role: worker, address: 192.168.11.99}",  # rule
        "etcd: stakced",  # choice
        "etcd: external",  # YAML
        "maxPods: 1.10",  # type
        "installBy: 2099-01-01",  # rule
        "instalBy: 90d",  # unknown
    )
    assert [line for line, *_ in told(tmp_path, text)] == [8, 9, 10, 11, 12, 13, 14]


def test_what_was_told_is_not_told_again_as_something_else(tmp_path: Path) -> None:
    """A bad control plane does not also make the number of etcd members even, nor a bad MAC a missing card."""
    bad_name = cluster().replace("name: p3", "name: P3")
    assert len(told(tmp_path, bad_name)) == 1
    bad_mac = cluster(network="subnet: 192.168.10.0/24", planes=1, workers=0).replace(".11}", ".11, mac: zz}")
    assert len(told(tmp_path, bad_mac)) == 1
    assert len(told(tmp_path, cluster(network="subnet: 192.168.10.0/33, interface: eno1"))) == 1
    assert len(told(tmp_path, cluster("virtualIP: x", "loadBalancer: nodez"))) == 2


def test_a_shifted_pool_is_told_once(tmp_path: Path) -> None:
    pools = [f"- {{name: v{i}, role: worker, count: 50, firstAddress: 192.168.10.100}}" for i in range(2)]
    assert len(told(tmp_path, cluster("pools:", *pools))) == 1


@pytest.mark.parametrize(("workers", "refused"), [(5000, False), (5001, True)])
def test_more_than_5000_workers_are_refused(workers: int, refused: bool, tmp_path: Path) -> None:
    text = (CLUSTERS / "large.yaml").read_text()
    first, rest = 4000, workers - 4000
    text = text.replace("count: 5000", f"count: {first}")
    text += f"  - {{name: more, role: worker, count: {rest}, firstAddress: 172.16.100.1}}\n"
    if refused:
        ((line, _, what, remedy),) = told(tmp_path, text)
        assert (line, remedy) == (15, "Divide them into several clusters.")
        assert "5001 machines that run workloads are more than the 5000" in what
    else:
        assert len(load(tmp_path, text).workers) == workers


def test_a_pool_beyond_any_cluster_is_not_even_listed(tmp_path: Path) -> None:
    ((_, _, what, _),) = told(tmp_path, cluster("pools:", *[
        f"- {{name: v{i}, role: worker, count: 5000, firstAddress: 192.168.10.100}}" for i in range(3)]))  # fmt: skip
    assert "15004 machines" in what
    ((_, _, what, _),) = told(
        tmp_path, cluster("pools: [{name: v, role: worker, count: 999999999, firstAddress: 192.168.10.100}]")
    )
    assert "999999999 machines are more than the 5000 workers" in what


@pytest.mark.parametrize("name", ["ha", "external-etcd", "single", "large"])
def test_the_examples_are_good(name: str) -> None:
    assert inventory.load(CLUSTERS / f"{name}.yaml", now=NOW).name == name


def test_ha_is_about_the_sample() -> None:
    made, sample = inventory.load(CLUSTERS / "ha.yaml", now=NOW), samples.ha()
    assert made.nodes == sample.nodes
    assert (made.pod_subnet, made.service_subnet) == (sample.pod_subnet, sample.service_subnet)
    assert made.install_by == timedelta(days=90)


def test_the_other_examples() -> None:
    external = inventory.load(CLUSTERS / "external-etcd.yaml", now=NOW)
    assert [
        len(group) for group in (external.etcd_members, external.control_planes, external.with_role("load-balancer"))
    ] == [
        3,
        2,
        2,
    ]
    worker = external.workers[0]
    assert worker.network.links == (Link("eno1"), Link("eno2"))
    assert (worker.network.bond, worker.network.vlan) == ("802.3ad", 20)
    assert worker.volumes[0].storage_class == "local-nvme"
    assert external.control_plane_endpoint == Endpoint("api.example.internal")
    single = inventory.load(CLUSTERS / "single.yaml", now=NOW)
    assert single.nodes[0].taints == ()
    assert single.nodes[0].runs_etcd
    large = inventory.load(CLUSTERS / "large.yaml", now=NOW)
    assert (len(large.control_planes), len(large.workers), large.nodes[-1].name) == (5, 5000, "worker-5000")
    assert large.nodes[-1].address == IPv4Address("172.16.27.136")
    assert {node.media for node in large.nodes} == {"thin"}
    said = "\n".join(large.warnings)
    assert all(
        part in said for part in ("500,500 pods", "150,000", "300,000", "flannel on 5005 nodes", "83,500 events")
    )


def test_what_is_told(tmp_path: Path) -> None:
    user = f"users: [{{name: u, sshAuthorizedKeys: [{samples.SSH_KEY}]}}]"
    assert load(tmp_path, cluster(user)).warnings == ()
    assert "one etcd member: its fault tolerance is 0" in load(tmp_path, cluster(user, planes=1)).warnings[0]
    assert "maxPods 101" in load(tmp_path, cluster(user, "maxPods: 101")).warnings[0]
    assert "extraObjects" in load(tmp_path, cluster(user, "podNetwork: none")).warnings[0]
    assert "nobody can log in" in load(tmp_path, cluster()).warnings[0]


def test_wiring_the_nearest_wins(tmp_path: Path) -> None:
    shared = "subnet: 192.168.10.0/24, gateway: 192.168.10.1, nameservers: [192.168.10.2], mtu: 9000, bond: 802.3ad, "
    shared += "links: [{name: eno1}, {name: eno2}]"
    made = load(tmp_path, cluster(
        node('mac: "52:54:00:00:00:AA", mtu: 1500, nameservers: []'),
        "- {name: z, role: worker, address: 10.9.0.5, subnet: 10.9.0.0/24, extraAddresses: [192.168.10.205/24]}",
        network=shared,
    ))  # fmt: skip
    first, own, elsewhere = made.nodes[0].network, made.nodes[-2].network, made.nodes[-1].network
    assert (first.links, first.bond, first.mtu) == ((Link("eno1"), Link("eno2")), "802.3ad", 9000)
    assert first.gateway == IPv4Address("192.168.10.1")
    assert (own.links, own.bond, own.mtu) == ((Link("nic0", "52:54:00:00:00:aa"),), None, 1500)
    assert own.nameservers == ()
    assert elsewhere.addresses == (samples.address("10.9.0.5/24"), samples.address("192.168.10.205/24"))
    assert elsewhere.gateway is None  # the shared one is of the shared subnet


def test_taints_denied_and_labels(tmp_path: Path) -> None:
    made = load(tmp_path, cluster(
        node("taints: [dedicated=db:NoExecute, plain:NoSchedule], labels: {b: '1', a: '2'}"),
        "pools: [{name: v, role: worker, count: 3, firstAddress: 192.168.10.100, serials: [A, B, C]}]",
        "denied: [w1, v-2]",
    ))  # fmt: skip
    by_name = {one.name: one for one in made.nodes}
    assert by_name["p1"].taints == (inventory.CONTROL_PLANE_TAINT,)
    assert by_name["x"].taints == ("dedicated=db:NoExecute", "plain=:NoSchedule")
    assert by_name["x"].labels == (("a", "2"), ("b", "1"))
    assert [name for name, one in by_name.items() if one.denied] == ["w1", "v-2"]
    assert [by_name[f"v-{i}"].serial for i in (1, 2, 3)] == ["A", "B", "C"]


def test_files_beside_the_cluster_file(tmp_path: Path) -> None:
    (tmp_path / "app.tar").write_bytes(b"x")
    (tmp_path / "pods.yaml").write_text("kind: Pod\n")
    (tmp_path / "ca.pem").write_text("-----BEGIN CERTIFICATE-----\n")
    (tmp_path / "password").write_text("secret\n")
    reference = f"registry.example:5000/team/app:1.0@{DIGEST}"
    made = load(tmp_path, cluster(
        f'images: [app.tar, "{reference}"]',
        "extraObjects: [./pods.yaml]",
        "baseImages: [{image: app.tar}]",
        "registries: [{host: r.x, mirrors: ['http://m.x'], ca: ca.pem, username: u, passwordFile: password}]",
    ))  # fmt: skip
    assert made.images == (str(tmp_path / "app.tar"), reference)
    assert made.extra_objects == (tmp_path / "pods.yaml",)
    assert made.base_images == (BaseImage("amd64", str(tmp_path / "app.tar")),)
    assert made.shared.base_images == made.unwired.base_images == ()  # no payload and no identity depends on it
    assert (made.registries[0].ca, made.registries[0].password_file) == (tmp_path / "ca.pem", tmp_path / "password")
    assert any("unencrypted" in warning for warning in made.warnings)
    (tmp_path / "password").write_text("\nsecret\n")
    assert (
        "first line" in told(tmp_path, cluster("registries: [{host: r.x, username: u, passwordFile: password}]"))[0][2]
    )


def test_find() -> None:
    made = samples.ha()
    assert made.node("worker-2").address == IPv4Address("192.168.10.22")
    with pytest.raises(BakeError) as caught:
        made.node("worker-9")
    assert "no node worker-9" in caught.value.what
    assert caught.value.remedy is not None
    assert caught.value.remedy.startswith("Did you mean worker-")
    assert "control-1 to control-3, worker-1 to worker-3" in caught.value.remedy


def test_the_schema_for_editors() -> None:
    schema = inventory.json_schema()
    text = json.dumps(schema)
    assert '"null"' not in text
    assert {"podSubnet", "serviceSubnet"} <= set(schema["$defs"]["Networking"]["properties"])
    assert schema["required"] == ["name"]
    assert schema["properties"]["virtualIP"]["format"] == "ipv4"

    def properties(part: Any) -> list[dict[str, Any]]:
        if isinstance(part, list):
            return [found for item in part for found in properties(item)]
        if not isinstance(part, dict):
            return []
        own = list(part["properties"].values()) if "properties" in part else []
        return own + [found for item in part.values() for found in properties(item)]

    found = properties(schema)
    assert len(found) > 60
    assert all(entry.get("description") for entry in found)


GOOD = cluster("pools: [{name: v, role: worker, count: 3, firstAddress: 192.168.10.100}]", "installBy: 90d")
PIECES = st.sampled_from(
    [
        "no",
        "0644",
        "12:34:56",
        "1.10",
        "2027-02-01",
        "~",
        "''",
        "[]",
        "{}",
        "- ",
        ": ",
        "\n",
        "  ",
        "*a",
        "&a ",
        "!!x ",
        "<<: ",
        "\t",
        "#",
        '"',
        "'",
        "{a: {b: [c]}}",
        "999999999999999999999",
        "-1",
        "fe80::1",
        "\u202e",
        "%",
        "|",
        ">",
        "? ",
        "\x00",
        "nodes",
        "name: ",
        "10.0.0.0/0",
        "255.255.255.255",
        "0.0.0.0/0",
        "/",
        "@",
        "`",
    ]
)


def only_bake_errors(file: Path, data: bytes) -> None:
    file.write_bytes(data)
    try:
        assert isinstance(inventory.load(file, now=NOW), Cluster)
    except BakeError as error:
        assert str(error)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.one_of(st.binary(max_size=60), st.text(max_size=80).map(lambda text: text.encode("utf-8", "replace"))))
def test_any_bytes_are_a_cluster_or_a_bake_error(data: bytes, tmp_path: Path) -> None:
    only_bake_errors(tmp_path / "c.yaml", data)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, len(GOOD)), cut=st.integers(0, 12), piece=PIECES)
def test_a_damaged_cluster_file_is_a_cluster_or_a_bake_error(at: int, cut: int, piece: str, tmp_path: Path) -> None:
    only_bake_errors(tmp_path / "c.yaml", (GOOD[:at] + piece + GOOD[at + cut :]).encode())


VALUES = st.recursive(
    st.one_of(PIECES, st.integers(-(10**6), 10**6), st.booleans(), st.text(max_size=12), st.just(DIGEST)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=6,
)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.dictionaries(st.sampled_from(sorted(inventory.json_schema()["properties"])), VALUES, max_size=6))
def test_any_values_under_known_keys(values: dict[str, Any], tmp_path: Path) -> None:
    only_bake_errors(tmp_path / "c.yaml", json.dumps({"name": "c", **values}).encode())


def test_the_reference_names_every_key() -> None:
    reference = (CLUSTERS / "README.md").read_text()
    schema = inventory.json_schema()
    shapes = [schema, *schema["$defs"].values()]
    keys = {key for shape in shapes for key in shape.get("properties", {})}
    assert {key for key in keys if not re.search(rf"\b{key}\b", reference)} == set()


@pytest.mark.parametrize(
    "document", [CLUSTERS.parent.parent / "README.md", CLUSTERS / "README.md"], ids=["project", "clusters"]
)
def test_whole_cluster_files_in_the_documentation_are_taken(document: Path, tmp_path: Path) -> None:
    examples = [
        text for text in re.findall(r"```yaml\n(.*?)```", document.read_text(), re.DOTALL) if "name:" in text[:5]
    ]
    assert examples
    for text in examples:
        file = tmp_path / "example.yaml"
        file.write_text(text)
        assert inventory.load(file, now=NOW).nodes
