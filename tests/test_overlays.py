"""The overlays as every role of every sample gets them: linted, parsed, and given to the real programs."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import ssl
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from recipes import objects
from recipes.kit import overlay, pki
from recipes.kit.model import Cluster, File, LocalVolume, Node, Role, scale_of
from recipes.kit.profiles import KeyPair
from tests import samples
from tests.layout import IMAGES, Layout, Running, identity, on_loopback, payload

UNITS = "/etc/systemd/system/"
BARE = samples.ha(
    name="bare",
    pod_network="none",
    vip=IPv4Address("192.168.10.9"),
    dns_upstream=("192.168.10.1",),
    ntp=("192.168.10.1",),
)
CLUSTERS = {
    cluster.name: cluster
    for cluster in (samples.ha(), samples.external_etcd(), samples.balanced(), samples.single(), BARE)
}
MACHINES = [
    pytest.param(cluster, next(node for node in cluster.nodes if node.role == role), id=f"{cluster.name}-{role}")
    for cluster in CLUSTERS.values()
    for role in sorted({node.role for node in cluster.nodes})
]
every_machine = pytest.mark.parametrize(("cluster", "node"), MACHINES)

# What a program says of a flag or field that it does not like. "lenient decoding" is how the kubelet and kube-proxy
# take an unknown field; both go on.
COMPLAINTS = re.compile(
    r"unknown flag|not defined|deprecat|lenient decoding|unknown field|unrecognized|ignored|has no effect"
    r"|will be removed|invalid configuration|strict decoding",
    re.IGNORECASE,
)


def texts(cluster: Cluster, node: Node) -> dict[str, str]:
    files = {file.path: file for file in [*payload(cluster, node.role), *identity(cluster, node)]}
    return {path: file.data.decode() for path, file in files.items() if file.data is not None}


def having(path: str) -> list[Any]:
    """The machines of MACHINES that bring this file."""
    return [each for each in MACHINES if path in texts(*cast(tuple[Cluster, Node], each.values))]


def units(cluster: Cluster, node: Node) -> dict[str, str]:
    return {
        path.removeprefix(UNITS): text
        for path, text in texts(cluster, node).items()
        if path.startswith(UNITS) and path.endswith(".service") and "/" not in path.removeprefix(UNITS)
    }


def values(unit: str, key: str) -> list[str]:
    return re.findall(rf"^{key}=(.*)$", unit.replace("\\\n", " "), re.MULTILINE)


def flags(unit: str) -> dict[str, str]:
    words = values(unit, "ExecStart")[0].split()[1:]
    return dict(word.partition("=")[::2] for word in words)


def complaints(text: str) -> list[str]:
    """etcd tells its whole configuration as information, names that it would complain of included; and where the tests
    run is not for the kubelet's configuration to mend."""
    return [
        line
        for line in text.splitlines()
        if COMPLAINTS.search(line) and '"level":"info"' not in line and "cgroup v1 support is unsupported" not in line
    ]


# ---- what is rendered


@every_machine
def test_units_of_a_role(cluster: Cluster, node: Node) -> None:
    expected: set[str] = set()
    if node.runs_kubelet:
        expected |= {"containerd", "nodebake-images", "kubelet", "kube-proxy"}
        if cluster.pod_network == "flannel":
            expected.add("flanneld")
    if node.role == "control-plane":
        expected |= {"kube-apiserver", "kube-controller-manager", "kube-scheduler", "nodebake-controller"}
    if node.runs_etcd:
        expected.add("etcd")
    if node.role == "load-balancer" or (node.role == "worker" and cluster.load_balancer == "local"):
        expected.add("api-balancer")
    if cluster.vip and node.role == ("load-balancer" if cluster.load_balancer == "nodes" else "control-plane"):
        expected.add("api-vip")
    assert {f"{name}.service" for name in expected} == {
        name for name in units(cluster, node) if not name.startswith("nodebake-first-boot")
    }


@every_machine
def test_units_never_give_up(cluster: Cluster, node: Node) -> None:
    for name, unit in units(cluster, node).items():
        if name.startswith("nodebake-first-boot"):
            continue
        assert values(unit, "StartLimitIntervalSec") == ["0"], name
        assert values(unit, "WantedBy") == ["multi-user.target"], name
        oneshot = values(unit, "Type") == ["oneshot"]
        assert values(unit, "Restart") == ["on-failure" if oneshot else "always"], name
        after = " ".join(values(unit, "After") + values(unit, "Before")).split()
        assert name not in after, f"{name} names itself, systemd would drop it"
        if values(unit, "Type") == ["notify"] and name != "api-balancer.service":
            assert values(unit, "TimeoutStartSec") == ["infinity"], name


def test_flanneld_waits_for_the_nodes_subnet() -> None:
    unit = units(samples.ha(), samples.ha().workers[0])["flanneld.service"]
    assert values(unit, "TimeoutStartSec") == ["infinity"]
    assert values(unit, "ExecStartPre") == ["/usr/local/lib/nodebake/wait-for-api subnet"]
    assert values(unit, "EnvironmentFile") == ["/etc/nodebake/node.env"], "which says NODE_NAME"


def test_kube_proxy_waits_for_the_nodes_certificate(tmp_path: Path) -> None:
    """Quietly, for as long as it takes: the machines may be switched on hours apart."""
    unit = units(samples.ha(), samples.ha().workers[0])["kube-proxy.service"]
    assert values(unit, "TimeoutStartSec") == ["infinity"]
    [command] = values(unit, "ExecStartPre")
    certificate = tmp_path / "current.pem"
    argv = shlex.split(command.replace("/var/lib/kubelet/pki/kubelet-client-current.pem", str(certificate)))
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as waiting:
        try:
            with pytest.raises(subprocess.TimeoutExpired):
                waiting.wait(0.5)
            certificate.write_text("here")
            assert waiting.wait(10) == 0
            assert waiting.stdout is not None
            assert waiting.stdout.read() == b""
        finally:
            waiting.kill()


def test_the_api_server_may_keep_the_owner_of_a_rotated_audit_log() -> None:
    """lumberjack, which rotates it, gives the new file the old one's owner; a refusal would lose the event."""
    unit = units(samples.ha(), samples.ha().control_planes[0])["kube-apiserver.service"]
    filters = values(unit, "SystemCallFilter")
    assert filters.index("@chown") > filters.index("~@privileged @resources"), "a later line wins"
    assert values(unit, "CapabilityBoundingSet") == [""]


def test_folders_of_local_volumes_are_made() -> None:
    volume = LocalVolume(name="data", path="/srv/data", size="1Gi", storage_class="local")
    cluster = samples.ha()
    with_one, without = cluster.workers[0]._replace(volumes=(volume,)), cluster.workers[1]
    path = "/etc/tmpfiles.d/nodebake-volumes.conf"
    assert "d /srv/data 0755 root root -" in texts(cluster, with_one)[path].splitlines()
    assert path not in texts(cluster, without)


@every_machine
def test_every_file_parses(cluster: Cluster, node: Node) -> None:
    for path, text in texts(cluster, node).items():
        assert text.endswith("\n"), path
        assert "{{" not in text, path
        assert "{%" not in text, path
        if path.endswith((".yaml", "/kube-proxy.conf", "/flanneld.conf", "kubelet.conf.d/10-node.conf")):
            list(yaml.safe_load_all(text))
        elif path.endswith(".toml"):
            tomllib.loads(text)
        elif path.endswith(".json"):
            json.loads(text)


@every_machine
def test_shell_programs_are_clean(cluster: Cluster, node: Node, tmp_path: Path) -> None:
    found = []
    for path, text in texts(cluster, node).items():
        if text.startswith("#!/bin/sh") or path.endswith((".sh", "node.env")):
            target = tmp_path / path.replace("/", "_")
            target.write_text(text)
            found.append(target)
    told = subprocess.run(
        [Path(sys.executable).with_name("shellcheck"), "--shell=sh", "--exclude=SC2034", *found],
        capture_output=True,
        text=True,
    )
    assert found
    assert told.returncode == 0, told.stdout


@every_machine
def test_executables(cluster: Cluster, node: Node) -> None:
    for file in payload(cluster, node.role):
        program = file.data is not None and file.data.startswith(b"#!")
        assert file.mode in ((0o755,) if program else (0o644, 0o600)), file.path


@every_machine
def test_only_root_reads_what_roots_daemons_are_told(cluster: Cluster, node: Node) -> None:
    """As the CIS Kubernetes Benchmark has it (1.1, 4.1); what a daemon with its own user reads, all may read."""
    private = {file.path for file in payload(cluster, node.role) if file.mode == 0o600}
    named = {f"{UNITS}{name}" for name in units(cluster, node) if re.match("etcd|kube-[acs]|kubelet", name)}
    if node.runs_kubelet:
        named |= {f"/etc/kubernetes/{name}" for name in ("kubelet.yaml", "kube-proxy.yaml", "kube-proxy.conf")}
    flannel = {f"/etc/kubernetes/{name}" for name in ("flanneld.conf", "flannel-net-conf.json")}
    assert private - flannel == named


@every_machine
def test_keys_come_from_root(cluster: Cluster, node: Node) -> None:
    """A daemon with a user of its own is handed copies; none of its flags names a key's file."""
    for name, unit in units(cluster, node).items():
        if values(unit, "User"):
            [command] = values(unit, "ExecStart")
            assert not re.search(r"=/etc/\S+(\.key|\.conf|encryption\.yaml)\b", command), name


@pytest.mark.parametrize("denied", [False, True])
def test_who_may_do_what_is_a_flag_where_nobody_is_denied(denied: bool) -> None:
    cluster = samples.ha()
    cluster = replace(cluster, nodes=(*cluster.nodes[:-1], cluster.nodes[-1]._replace(denied=denied)))
    found = texts(cluster, cluster.control_planes[0])
    flag = "--authorization-config=/etc/kubernetes/authorization.yaml" if denied else "--authorization-mode=Node,RBAC"
    assert f"APISERVER_AUTHORIZATION='{flag}'\n" in found["/etc/nodebake/node.env"]
    assert ("/etc/kubernetes/authorization.yaml" in found) == denied


@every_machine
def test_no_bytecode_of_our_own_programs(cluster: Cluster, node: Node) -> None:
    """What an import at the desk leaves in the tree would be baked, and differ from desk to desk."""
    assert not [file.path for file in payload(cluster, node.role) if "__pycache__" in file.path]


@every_machine
def test_no_other_machine_is_named(cluster: Cluster, node: Node) -> None:
    """A payload knows no machine but control planes and etcd members, which configuration has to find."""
    known = {*cluster.control_planes, *cluster.etcd_members}
    for file in payload(cluster, node.role):
        for other in cluster.nodes:
            if other not in known and file.data is not None:
                assert str(other.address).encode() not in file.data, file.path
                assert other.name.encode() not in file.data, file.path


@pytest.mark.parametrize("cluster", CLUSTERS.values(), ids=CLUSTERS.keys())
def test_another_worker_changes_no_other_payload(cluster: Cluster) -> None:
    more = replace(cluster, nodes=(*cluster.nodes, samples.node("worker-9", "worker", 99)))
    for role, _ in cluster.payloads:
        assert payload(more, role) == payload(cluster, role)
    for node in cluster.nodes:
        assert identity(more, node) == identity(cluster, node)


def test_probes_grow_with_the_workers_in_steps() -> None:
    def interval(count: int) -> str:
        cluster = replace(samples.ha(), scale=scale_of(count))
        text = texts(cluster, cluster.workers[0])["/etc/nodebake/haproxy.cfg"]
        (found,) = set(re.findall(r" inter (\S+)", text))
        return str(found)

    assert [interval(count) for count in (1, 100, 101, 1000, 1001, 5000)] == ["2s", "2s", "10s", "10s", "30s", "30s"]


def test_members_and_servers() -> None:
    ha, apart = samples.ha(), samples.external_etcd()
    members = ",".join(f"control-{i}=https://192.168.10.1{i}:2380" for i in (1, 2, 3))
    assert flags(units(ha, ha.control_planes[1])["etcd.service"])["--initial-cluster"] == "${INITIAL_CLUSTER}"
    assert f"INITIAL_CLUSTER='{members}'\n" in texts(ha, ha.control_planes[1])["/etc/nodebake/node.env"]
    assert (
        "APISERVER_ETCD_SERVERS='https://127.0.0.1:2379,https://192.168.10.11:2379,https://192.168.10.13:2379'"
        in (texts(ha, ha.control_planes[1])["/etc/nodebake/node.env"])
    )
    assert (
        "APISERVER_ETCD_SERVERS='https://192.168.10.31:2379,"
        in texts(apart, apart.control_planes[0])["/etc/nodebake/node.env"]
    )
    proxy = yaml.safe_load(texts(samples.balanced(), samples.balanced().workers[0])["/etc/kubernetes/kube-proxy.conf"])
    assert proxy["clusters"][0]["cluster"]["server"] == "https://192.168.10.9:6443"


def test_both_leader_elections_are_written_out() -> None:
    cluster = samples.ha()
    for name in ("kube-controller-manager", "kube-scheduler"):
        given = flags(units(cluster, cluster.control_planes[0])[f"{name}.service"])
        times = [given[f"--leader-elect-{what}"] for what in ("lease-duration", "renew-deadline", "retry-period")]
        assert (given["--leader-elect"], times) == ("true", ["15s", "10s", "2s"])


def test_what_the_cluster_file_says_arrives() -> None:
    validity = replace(samples.ha().validity, kubelet=timedelta(days=30))
    cluster = replace(samples.ha(), max_pods=200, dns_domain="lan.test", validity=validity, node_cidr_mask=25)
    plane = cluster.control_planes[0]._replace(
        labels=(("a", "b"), ("c.d/e", "f")), taints=("x=y:NoExecute", "z:NoSchedule")
    )
    cluster = replace(cluster, nodes=(plane, *cluster.nodes[1:]))
    found = texts(cluster, plane)
    kubelet = yaml.safe_load(found["/etc/kubernetes/kubelet.yaml"])
    assert (kubelet["maxPods"], kubelet["clusterDomain"]) == (200, "lan.test")
    assert yaml.safe_load(found["/etc/kubernetes/kubelet.conf.d/10-node.conf"])["registerWithTaints"] == [
        {"key": "x", "value": "y", "effect": "NoExecute"},
        {"key": "z", "effect": "NoSchedule"},
    ]
    assert "NODE_LABELS='a=b,c.d/e=f'\n" in found["/etc/nodebake/node.env"]
    manager = flags(units(cluster, plane)["kube-controller-manager.service"])
    assert (manager["--cluster-signing-duration"], manager["--node-cidr-mask-size"]) == ("720h", "25")


def test_net_conf_follows_the_backend() -> None:
    cluster = replace(samples.ha(), flannel_backend="host-gw")
    found = texts(cluster, cluster.workers[0])
    assert json.loads(found["/etc/kubernetes/flannel-net-conf.json"])["Backend"] == {"Type": "host-gw"}
    assert "vxlan" not in found["/etc/modules-load.d/nodebake.conf"]


# ---- systemd


def _systemd_root(root: Path, cluster: Cluster, node: Node) -> list[str]:
    for place in ("/usr/lib/systemd/system", "/lib/systemd/system"):
        if Path(place).is_dir():
            shutil.copytree(place, root / "usr/lib/systemd/system", symlinks=True)
            break
    (root / "etc").mkdir()
    for name, unit in units(cluster, node).items():
        target = root / UNITS.strip("/") / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(unit)
        for key in ("ExecStart", "ExecStartPre", "ExecStartPost", "ExecReload"):
            for line in values(unit, key):
                program = root / line.split()[0].lstrip("/-")
                program.parent.mkdir(parents=True, exist_ok=True)
                program.write_text("#!/bin/sh\n")
                program.chmod(0o755)
    return sorted(units(cluster, node))


needs_analyze = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")


@needs_analyze
@every_machine
def test_systemd_finds_nothing(cluster: Cluster, node: Node, tmp_path: Path) -> None:
    names = _systemd_root(tmp_path, cluster, node)
    told = subprocess.run(
        ["systemd-analyze", f"--root={tmp_path}", "--man=no", "verify", *names], capture_output=True, text=True
    )
    ours = [line for line in (told.stdout + told.stderr).splitlines() if any(name in line for name in names)]
    assert (told.returncode, ours) == (0, [])


@needs_analyze
@pytest.mark.parametrize(
    ("cluster", "role", "name", "most"),
    [
        *((samples.ha(), "control-plane", name, 14) for name in ("etcd", "kube-apiserver")),
        *((samples.ha(), "control-plane", name, 14) for name in ("kube-controller-manager", "kube-scheduler")),
        (samples.ha(), "control-plane", "nodebake-controller", 14),
        (samples.ha(), "worker", "api-balancer", 14),
        (samples.balanced(), "load-balancer", "api-balancer", 14),
        (samples.balanced(), "load-balancer", "api-vip", 24),
    ],
)
def test_exposure(cluster: Cluster, role: Role, name: str, most: int, tmp_path: Path) -> None:
    """systemd's own score, times ten: 100 is a program that may do anything."""
    _systemd_root(tmp_path, cluster, cluster.with_role(role)[0])
    bounds = ["--offline=true", f"--root={tmp_path}", f"--threshold={most}"]
    told = subprocess.run(
        ["systemd-analyze", "security", *bounds, f"{name}.service"],
        capture_output=True,
        text=True,
        env={**os.environ, "SYSTEMD_PAGER": "", "COLUMNS": "200"},
    )
    assert told.returncode == 0, told.stdout + told.stderr


@needs_analyze
def test_users_are_as_fixed(tmp_path: Path) -> None:
    cluster = samples.ha()
    (tmp_path / "etc").mkdir()
    config = tmp_path / "nodebake.conf"
    config.write_text(texts(cluster, cluster.workers[0])["/etc/sysusers.d/nodebake.conf"])
    if not shutil.which("systemd-sysusers"):
        pytest.skip("needs systemd-sysusers")
    subprocess.run(["systemd-sysusers", f"--root={tmp_path}", str(config)], check=True, capture_output=True)
    made = {line.split(":")[0]: line.split(":")[2:4] for line in (tmp_path / "etc/passwd").read_text().splitlines()}
    assert made["etcd"] == ["801", "801"]
    assert made["kube-scheduler"] == ["804", "804"]


# ---- our own programs


@pytest.mark.parametrize(
    ("given", "network"),
    [
        ("10.244.1.1/24", "10.244.1.0/24"),
        ("10.244.3.129/25", "10.244.3.128/25"),
        ("10.255.254.1/23", "10.255.254.0/23"),
        ("172.16.0.1/12", "172.16.0.0/12"),
        ("240.0.8.9/29", "240.0.8.8/29"),
    ],
)
def test_the_conflist_names_the_network(given: str, network: str, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text(texts(samples.ha(), samples.ha().workers[0])["/usr/local/lib/nodebake/write-cni-config"])
    (tmp_path / "env").write_text(
        f"FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET={given}\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
    )
    made = tmp_path / "net.d/10.conflist"
    subprocess.run(["sh", program, tmp_path / "env", made], check=True)
    bridge, portmap = json.loads(made.read_text())["plugins"]
    assert bridge["ipam"]["ranges"] == [[{"subnet": network}]]
    assert bridge["mtu"] == 1450
    assert portmap["backend"] == "nftables"
    assert sorted(path.name for path in made.parent.iterdir()) == ["10.conflist"]


def test_an_empty_subnet_file_writes_no_conflist(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text(texts(samples.ha(), samples.ha().workers[0])["/usr/local/lib/nodebake/write-cni-config"])
    (tmp_path / "env").write_text("FLANNEL_SUBNET=\n")
    told = subprocess.run(["sh", program, tmp_path / "env", tmp_path / "conflist"], capture_output=True)
    assert told.returncode == 1
    assert not (tmp_path / "conflist").exists()


# ---- the real programs


@pytest.fixture(scope="module")
def machine(binaries: Path, tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """The single machine that is everything, under a folder. Its cluster has workers too, one of them denied."""
    workers = (samples.node("worker-1", "worker", 21), samples.node("worker-2", "worker", 22, denied=True))
    one = samples.single()
    cluster = on_loopback(replace(one, nodes=(*one.nodes, *workers)), os.getpid())
    return Layout(tmp_path_factory.mktemp("machine") / "root", cluster, cluster.nodes[0], binaries)


@pytest.fixture(scope="module")
def etcd(machine: Layout) -> Iterator[Running]:
    with machine.running("etcd.service") as running:
        running.until("ready to serve client requests")
        yield running


@pytest.fixture(scope="module")
def api_server(machine: Layout, etcd: Running) -> Iterator[Running]:
    with machine.running("kube-apiserver.service") as running:
        running.until_true(lambda: _status(machine, "/readyz") == 200, "ready")
        yield running


def _status(machine: Layout, path: str, trust: ssl.SSLContext | None = None) -> int | None:
    trust = trust or ssl.create_default_context(cafile=machine.path("/etc/kubernetes/pki/kubernetes-ca.crt"))
    try:
        with urllib.request.urlopen(f"https://{machine.localhost}:6443{path}", context=trust, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def test_etcd_takes_its_command_line(etcd: Running) -> None:
    assert complaints(etcd.said) == []


def test_etcd_turns_away_who_has_no_certificate(machine: Layout, etcd: Running) -> None:
    trust = ssl.create_default_context(cafile=machine.path("/etc/etcd/pki/etcd-ca.crt"))
    with pytest.raises(OSError, match=r"certificate|reset|closed"):
        urllib.request.urlopen(f"https://{machine.node.address}:2379/version", context=trust, timeout=5)


def test_the_api_server_takes_its_command_line(api_server: Running) -> None:
    assert complaints(api_server.said) == []


def test_strangers_may_ask_for_health_alone(machine: Layout, api_server: Running) -> None:
    assert [_status(machine, path) for path in ("/livez", "/readyz", "/healthz")] == [200, 200, 200]
    assert [_status(machine, path) for path in ("/version", "/metrics", "/api", "/readyz/etcd")] == [401] * 4


def test_what_is_done_is_audited(machine: Layout, api_server: Running) -> None:
    log = machine.path("/var/log/kubernetes/audit.log")
    assert _status(machine, "/api/v1/namespaces/kube-system/secrets") == 401
    api_server.until_true(lambda: log.exists() and "kube-system/secrets" in log.read_text(), "wrote the audit log", 10)


def test_a_denied_machines_certificate_is_worth_nothing(machine: Layout, api_server: Running, tmp_path: Path) -> None:
    """At once, also for what anybody may ask: an error is told, since the one who could allow it is not there."""
    asked = ("/api/v1/nodes/worker-2", "/api/v1/services", "/version", "/readyz")
    for name, statuses in (("worker-1", [403, 200, 200, 200]), ("worker-2", [500] * 4)):
        trust = ssl.create_default_context(cafile=machine.path("/etc/kubernetes/pki/kubernetes-ca.crt"))
        trust.load_cert_chain(node_certificate(machine, name, tmp_path / name))
        started = time.monotonic()
        assert [_status(machine, path, trust) for path in asked] == statuses
        assert time.monotonic() - started < 2, "nothing waits for the one that is not there"


def node_certificate(machine: Layout, name: str, path: Path) -> Path:
    """As the controller-manager would have signed it for this machine's kubelet; with its key in one file."""
    pki_folder = machine.path("/etc/kubernetes/pki")
    authority = KeyPair(*((pki_folder / f"kubernetes-ca.{end}").read_bytes() for end in ("crt", "key")))
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    subject = pki.Subject(f"system:node:{name}", "system:nodes", server=False, client=True, sans=())
    now = datetime.now(UTC)
    start, end = now - timedelta(minutes=1), now + timedelta(hours=1)
    path.write_bytes(pki.leaf(subject, pem, authority, start=start, end=end, serial_seed=b"test") + pem)
    return path


@pytest.mark.parametrize(
    ("unit", "holds"),
    [
        ("kube-controller-manager.service", r"successfully acquired lease.*kube-system/kube-controller-manager"),
        ("kube-scheduler.service", r"successfully acquired lease.*kube-system/kube-scheduler"),
    ],
)
def test_leaders_are_elected(unit: str, holds: str, machine: Layout, api_server: Running) -> None:
    with machine.running(unit) as running:
        running.until(holds.replace("successfully", "[Ss]uccessfully"))
        assert complaints(running.said) == []


def as_master(machine: Layout, folder: Path) -> list[str]:
    """kubectl with a certificate of system:masters, from the CA key that lies on a control plane."""
    pki = machine.path("/etc/kubernetes/pki")
    key, request, certificate = (str(folder / f"x.{ending}") for ending in ("key", "csr", "crt"))
    subject = ["-subj", "/O=system:masters/CN=applier", "-keyout", key, "-out", request]
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    signer = ["-CA", str(pki / "kubernetes-ca.crt"), "-CAkey", str(pki / "kubernetes-ca.key"), "-set_serial", "9"]
    extensions = folder / "extensions"
    extensions.write_text("extendedKeyUsage=clientAuth\n")
    for command in (
        ["openssl", "req", *curve, *subject],
        ["openssl", "x509", "-req", "-in", request, *signer, "-extfile", str(extensions), "-out", certificate],
    ):
        subprocess.run(command, check=True, capture_output=True)
    assert machine.binaries is not None
    return [
        str(machine.binaries / "kubectl"),
        "--kubeconfig=/dev/null",
        f"--server=https://{machine.localhost}:6443",
        f"--certificate-authority={pki / 'kubernetes-ca.crt'}",
        f"--client-certificate={certificate}",
        f"--client-key={key}",
    ]


def test_the_api_server_takes_the_objects(machine: Layout, api_server: Running, tmp_path: Path) -> None:
    """As on a control plane: server-side."""
    command = as_master(machine, tmp_path)
    manifest = tmp_path / "objects.yaml"
    volume = LocalVolume(name="data", path="/mnt", size="1Gi", storage_class="local")
    cluster = replace(machine.cluster, approval="group", storage_classes=("local",))
    cluster = replace(cluster, nodes=(machine.node._replace(volumes=(volume,)),))
    made = [*objects.rights(cluster), *objects.static(cluster, IMAGES)]
    manifest.write_bytes(objects.document(made))
    apply = ["apply", "--server-side", "--validate=strict", "--field-manager=test", "-f", str(manifest)]

    answers: list[subprocess.CompletedProcess[str]] = []

    def applied() -> bool:  # kube-system is made a moment after the server is ready
        answers.append(subprocess.run([*command, *apply], capture_output=True, text=True))
        print(answers[-1].stderr)
        return answers[-1].returncode == 0

    api_server.until_true(applied, "took the objects", 15)
    told = answers[-1]
    assert "Warning" not in told.stderr
    assert told.stdout.count("serverside-applied") == len(made)


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        ({"hostNetwork": True}, "host namespaces"),
        ({"hostPID": True}, "host namespaces"),
        ({"volumes": [{"name": "root", "hostPath": {"path": "/"}}]}, "hostPath volumes"),
        ({"containers": [{"name": "a", "image": "a", "securityContext": {"privileged": True}}]}, "privileged"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_a_pod_that_would_be_the_node_is_refused(
    wanted: dict[str, Any], why: str, machine: Layout, api_server: Running, tmp_path: Path
) -> None:
    """PodSecurity, in a namespace that says nothing of it."""
    command = as_master(machine, tmp_path)
    name = "".join(char for char in why if char.isalpha()).lower() + str(len(str(wanted)))
    for words in (("namespace", name), ("serviceaccount", "default", "-n", name)):
        subprocess.run([*command, "create", *words], check=True, capture_output=True)
    spec = {"containers": [{"name": "a", "image": "a"}], "automountServiceAccountToken": False}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "namespace": name}}
    for one, refused in ((spec, False), ({**spec, **wanted}, True)):
        create = [*command, "create", "--dry-run=server", "-f", "-"]
        done = subprocess.run(create, input=json.dumps({**pod, "spec": one}), capture_output=True, text=True)
        assert (done.returncode != 0) == refused, done.stderr
    assert 'violates PodSecurity "baseline:latest"' in done.stderr and why in done.stderr


@pytest.mark.parametrize(
    "name", ["kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy"]
)
def test_no_flag_is_deprecated(name: str, machine: Layout) -> None:
    """By the help too: some flags are deprecated there and accepted without a word."""
    program, *words = machine.command(f"{name}.service")
    told = subprocess.run([program, "--help"], capture_output=True, text=True, check=True).stdout
    described = dict(re.findall(r"^ +(?:-\w, )?--([\w-]+)(.*(?:\n {10,}.*)*)", told, re.MULTILINE))
    for word in words:
        flag = word.removeprefix("--").partition("=")[0]
        assert flag in described
        if (name, word) != ("kube-scheduler", "--profiling=false"):  # for auditors; its file says the same
            assert "DEPRECATED" not in described[flag], flag


# These three would change the machine that the tests run on; they are watched until they have read their configuration
# and then fail for what is missing here.


def test_kubelet_takes_its_configuration(machine: Layout, tmp_path: Path) -> None:
    with machine.running("kubelet.service", path=str(tmp_path)) as running:
        said = running.until(r"must be run as root|cgroup v1|[Bb]ootstrap|swap|connection refused|Kubelet version")
    assert complaints(said) == []


def test_kube_proxy_takes_its_configuration(machine: Layout, tmp_path: Path) -> None:
    certificate = machine.path("/var/lib/kubelet/pki/kubelet-client-current.pem")
    certificate.parent.mkdir(parents=True, exist_ok=True)
    pki = machine.path("/etc/etcd/pki")
    certificate.write_bytes((pki / "client.crt").read_bytes() + (pki / "client.key").read_bytes())
    with machine.running("kube-proxy.service", path=str(tmp_path)) as running:
        said = running.until(r"nft\b.*not found|nft.*executable|Error: |Waiting for caches|connection refused")
    assert complaints(said) == []


def test_flanneld_takes_its_command_line(machine: Layout, tmp_path: Path) -> None:
    with machine.running("flanneld.service", path=str(tmp_path)) as running:
        said = running.until(r"iptables|Failed|failed|CLI flags config", 20)
    assert complaints(said) == []


def test_containerd_takes_its_configuration(machine: Layout) -> None:
    program, config = machine.command("containerd.service")
    told = subprocess.run([program, config, "config", "dump"], capture_output=True, text=True, check=True)
    assert complaints(told.stderr) == []
    dumped = tomllib.loads(told.stdout)["plugins"]
    assert dumped["io.containerd.cri.v1.images"]["pinned_images"]["sandbox"] == IMAGES["pause"]
    assert dumped["io.containerd.cri.v1.images"]["registry"]["config_path"].endswith("/etc/containerd/certs.d")
    runtime = dumped["io.containerd.cri.v1.runtime"]
    assert runtime["cni"]["bin_dirs"] == ["/opt/nodebake/current/cni"]
    assert not runtime["cni"].get("bin_dir")
    runc = runtime["containerd"]["runtimes"]["runc"]["options"]
    assert (runc["SystemdCgroup"], runc["BinaryName"]) == (True, "/opt/nodebake/current/bin/runc")
    given = tomllib.loads(machine.path("/etc/containerd/config.toml").read_text())
    assert _missing(given["plugins"], dumped) == []


def _missing(given: object, dumped: object, path: str = "") -> list[str]:
    """Keys that a program was given and does not know: a dump of what it understood lacks them."""
    if not isinstance(given, dict):
        return [] if given == dumped else [f"{path}: {given!r} became {dumped!r}"]
    if not isinstance(dumped, dict):
        return [path]
    return [
        hole
        for key, value in given.items()
        for hole in (_missing(value, dumped[key], f"{path}.{key}") if key in dumped else [f"{path}.{key}"])
    ]


needs_haproxy = pytest.mark.skipif(not Path("/usr/sbin/haproxy").exists(), reason="needs Debian's haproxy")


@needs_haproxy
def test_haproxy_finds_the_live_api_server(machine: Layout, api_server: Running, tmp_path: Path) -> None:
    """The load balancer's configuration as rendered; of its three API servers one is alive."""
    cluster = on_loopback(samples.balanced(), os.getpid() + 1)
    text = texts(cluster, cluster.with_role("load-balancer")[0])["/etc/nodebake/haproxy.cfg"]
    front, live = cluster.with_role("load-balancer")[0].address, cluster.control_planes[1].address
    config = tmp_path / "haproxy.cfg"
    config.write_text(
        machine.moved(text)
        .replace("bind *:6443", f"bind {front}:6443")
        .replace(f"{live}:6443", f"{machine.localhost}:6443")
    )
    subprocess.run(["/usr/sbin/haproxy", "-c", "-q", "-f", config], check=True)
    log = tmp_path / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(["/usr/sbin/haproxy", "-W", "-f", config], stdout=out, stderr=subprocess.STDOUT)
    check = ["sh", str(overlay.OVERLAYS / "virtual-address/usr/local/lib/nodebake/check-api"), f"{front}:6443"]
    ca = machine.path("/etc/kubernetes/pki/kubernetes-ca.crt")
    try:
        running = Running(process, log)
        running.until_true(lambda: subprocess.run([*check, ca]).returncode == 0, "led to the API server", 20)
        running.until(r"control-1 is DOWN", 20)
        assert "control-2 is DOWN" not in running.said
        assert subprocess.run([*check, machine.path("/etc/etcd/pki/etcd-ca.crt")]).returncode == 1
    finally:
        process.terminate()
        process.wait()


@needs_haproxy
@pytest.mark.parametrize(("cluster", "node"), having("/etc/nodebake/haproxy.cfg"))
def test_haproxy_takes_its_configuration(cluster: Cluster, node: Node, tmp_path: Path) -> None:
    text = texts(cluster, node)["/etc/nodebake/haproxy.cfg"]
    ca = tmp_path / "ca.crt"
    made = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=x"]
    where = ["-keyout", str(tmp_path / "ca.key"), "-out", str(ca)]
    subprocess.run(["openssl", "req", "-x509", *made, *where], check=True, capture_output=True)
    config = tmp_path / "haproxy.cfg"
    config.write_text(text.replace("/etc/kubernetes/pki/kubernetes-ca.crt", str(ca)))
    told = subprocess.run(["/usr/sbin/haproxy", "-c", "-V", "-f", config], capture_output=True, text=True)
    assert (told.returncode, "WARNING" in told.stderr + told.stdout) == (0, False), told.stderr


@pytest.mark.skipif(
    not Path("/usr/sbin/keepalived").exists() or os.geteuid() != 0,
    reason="needs Debian's keepalived, and root: it looks at who owns the programs that it calls",
)
@every_machine
def test_keepalived_takes_its_configuration(cluster: Cluster, node: Node, tmp_path: Path) -> None:
    text = texts(cluster, node).get("/etc/nodebake/keepalived.conf")
    holds = "api-vip.service" in units(cluster, node)
    assert (text is not None) == holds
    if text is None:
        return
    assert "{{" not in text
    card = next((name for _, name in socket.if_nameindex() if name != "lo"), None)
    if card is None:
        pytest.skip("needs a network card")
    config = tmp_path / "keepalived.conf"
    config.write_text(text.replace("@INTERFACE@", card).replace("/usr/local/lib/nodebake/check-api", "/usr/bin/true"))
    told = subprocess.run(["/usr/sbin/keepalived", "--config-test", "-f", config], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr + told.stdout


def test_every_pod_network_service_disappears_together() -> None:
    files: list[File] = payload(BARE, "worker")
    assert not [file.path for file in files if "flannel" in file.path or "cni-config" in file.path]
