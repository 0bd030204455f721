"""Certificates: verified by openssl and by real TLS handshakes, each right pair accepted, each wrong one refused."""

from __future__ import annotations

import base64
import os
import ssl
import subprocess
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from recipes import certificates
from recipes.kit import pki, profiles, store
from recipes.kit.model import Cluster, Endpoint, File, KeyType, Node, Validity
from recipes.kit.profiles import AUTHORITIES, DESK, PROFILES
from recipes.kit.store import Secrets
from tests import samples

NOW = datetime.now(UTC)  # handshakes are held against the computer's own clock
PLANE = samples.ha().control_planes[0]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("desk") / "ha.yaml.secrets"


@pytest.fixture(scope="module")
def secrets(directory: Path) -> Secrets:
    return store.open(directory, samples.ha(), now=NOW)


def by_path(cluster: Cluster, node: Node, secrets: Secrets) -> dict[str, File]:
    files = certificates.for_node(cluster, node, secrets)
    found = {file.path: file for file in files}
    assert len(found) == len(files)
    return found


def data(file: File) -> bytes:
    assert file.data is not None
    return file.data


def embedded(config: bytes, kind: str) -> bytes:
    return base64.b64decode(yaml.safe_load(config)["users"][0]["user"][f"client-{kind}-data"])


def pairs(cluster: Cluster, node: Node, secrets: Secrets) -> dict[str, tuple[bytes, bytes]]:
    """Profile -> (certificate, key) as they lie on the machine, admin.conf's included."""
    files = by_path(cluster, node, secrets)
    found = {}
    for spec in PROFILES:
        if spec.form == "pair":
            found[spec.name] = data(files[f"{spec.path}.crt"]), data(files[f"{spec.path}.key"])
        else:
            config = (
                certificates.admin_conf(cluster, secrets) if spec.name == "admin" else data(files[f"{spec.path}.conf"])
            )
            found[spec.name] = embedded(config, "certificate"), embedded(config, "key")
    return found


def openssl(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True)


# --- what lies where


def test_a_control_plane_holds_what_its_daemons_read_and_no_more(secrets: Secrets) -> None:
    files = by_path(samples.ha(), PLANE, secrets)
    private = {path for path, file in files.items() if b"PRIVATE" in data(file)}
    assert private == {
        "/etc/kubernetes/pki/kubernetes-ca.key",
        "/etc/kubernetes/pki/kubelet-serving-ca.key",
        "/etc/kubernetes/pki/sa.key",
        "/etc/kubernetes/pki/kube-apiserver.key",
        "/etc/kubernetes/pki/kube-apiserver-kubelet-client.key",
        "/etc/kubernetes/pki/kube-apiserver-etcd-client.key",
        "/etc/kubernetes/pki/front-proxy-client.key",
        "/etc/etcd/pki/server.key",
        "/etc/etcd/pki/peer.key",
        "/etc/etcd/pki/client.key",
    }
    configs = {path for path in files if path.endswith(".conf")}
    assert configs == {"/etc/kubernetes/controller-manager.conf", "/etc/kubernetes/scheduler.conf"}
    assert {(files[path].owner, files[path].mode) for path in private | configs} == {("root", 0o600)}
    public = {path: file for path, file in files.items() if path not in private and path not in configs}
    assert all((file.owner, file.mode) == ("root", 0o644) for file in public.values())
    assert all(path.endswith((".crt", ".pub")) for path in public)
    assert list(files) == sorted(files)


def test_the_etcd_and_front_proxy_authorities_never_leave_the_desk(secrets: Secrets) -> None:
    everything = [
        data(file) for node in samples.ha().nodes for file in certificates.for_node(samples.ha(), node, secrets)
    ]
    for name in ("etcd", "front-proxy"):
        assert secrets.authorities[name].cert_pem in everything
        assert secrets.authorities[name].key_pem not in everything


def test_no_worker_and_no_load_balancer_holds_a_key(tmp_path: Path) -> None:
    cluster = samples.balanced()
    secrets = store.open(tmp_path / "s", cluster, now=NOW)
    for node in (*cluster.workers, *cluster.with_role("load-balancer")):
        files = by_path(cluster, node, secrets)
        assert list(files) == ["/etc/kubernetes/pki/kubernetes-ca.crt"]
        assert data(*files.values()) == secrets.authorities["kubernetes"].cert_pem
        assert not [owner for owner, _ in secrets.leaf_keys if owner == node.name]


def test_external_etcd_machines_hold_their_own_three_pairs(tmp_path: Path) -> None:
    cluster = samples.external_etcd()
    secrets = store.open(tmp_path / "s", cluster, now=NOW)
    member = by_path(cluster, cluster.etcd_members[0], secrets)
    pki_files = [f"/etc/etcd/pki/{name}.{half}" for name in ("client", "peer", "server") for half in ("crt", "key")]
    assert list(member) == sorted(["/etc/etcd/pki/etcd-ca.crt", *pki_files])
    plane = by_path(cluster, cluster.control_planes[0], secrets)
    assert not [path for path in plane if path.startswith("/etc/etcd")]
    assert "/etc/kubernetes/pki/etcd-ca.crt" in plane


# --- openssl's judgement


@pytest.mark.parametrize("key_type", ["ecdsa-p256", "ecdsa-p384", "rsa-2048"])
def test_openssl_verifies_every_chain_for_its_purpose_alone(key_type: KeyType, tmp_path: Path) -> None:
    cluster = samples.single()
    cluster = replace(cluster, key_type=key_type)
    secrets = store.open(tmp_path / "s", cluster, now=NOW)
    cas = {}
    for authority in AUTHORITIES:
        cas[authority.name] = tmp_path / f"{authority.name}.crt"
        cas[authority.name].write_bytes(secrets.authorities[authority.name].cert_pem)
    for name, (certificate, key) in pairs(cluster, cluster.nodes[0], secrets).items():
        spec = next(spec for spec in PROFILES if spec.name == name)
        crt, key_file = tmp_path / "leaf.crt", tmp_path / "leaf.key"
        crt.write_bytes(certificate)
        key_file.write_bytes(key)
        for ca, path in cas.items():
            for purpose, wanted in (("sslserver", spec.server), ("sslclient", spec.client)):
                said = openssl("verify", "-x509_strict", "-purpose", purpose, "-CAfile", path, crt)
                assert (said.returncode == 0) == (wanted and ca == spec.authority), (name, ca, purpose, said.stderr)
        assert (
            openssl("x509", "-in", crt, "-noout", "-pubkey").stdout
            == openssl("pkey", "-in", key_file, "-pubout").stdout
        )
    for path in cas.values():
        assert openssl("verify", "-x509_strict", "-CAfile", path, path).returncode == 0


def test_openssl_prints_what_the_table_says(secrets: Secrets, tmp_path: Path) -> None:
    cluster = samples.ha(
        cert_sans=("api.example.org", "10.1.2.3"),
        control_plane_endpoint=Endpoint("k8s.example.org", 443),
        vip=IPv4Address("192.168.10.9"),
        dns_domain="bake.test",
    )
    subjects = {}
    for name, (certificate, _) in pairs(cluster, PLANE, secrets).items():
        (tmp_path / f"{name}.crt").write_bytes(certificate)
        said = openssl("x509", "-in", tmp_path / f"{name}.crt", "-noout", "-nameopt", "RFC2253", "-subject", "-issuer")
        subjects[name] = said.stdout.split("\n")[:2]
    assert subjects == {
        "kube-apiserver": ["subject=CN=kube-apiserver", "issuer=CN=kubernetes-ca,O=ha"],
        "kube-apiserver-kubelet-client": [
            "subject=CN=kube-apiserver-kubelet-client",
            "issuer=CN=kubernetes-ca,O=ha",
        ],
        "kube-apiserver-etcd-client": ["subject=CN=kube-apiserver-etcd-client", "issuer=CN=etcd-ca,O=ha"],
        "front-proxy-client": ["subject=CN=front-proxy-client", "issuer=CN=front-proxy-ca,O=ha"],
        "kube-controller-manager": ["subject=CN=system:kube-controller-manager", "issuer=CN=kubernetes-ca,O=ha"],
        "kube-scheduler": ["subject=CN=system:kube-scheduler", "issuer=CN=kubernetes-ca,O=ha"],
        "etcd-server": ["subject=CN=etcd-server", "issuer=CN=etcd-ca,O=ha"],
        "etcd-peer": ["subject=CN=etcd-peer", "issuer=CN=etcd-ca,O=ha"],
        "etcd-client": ["subject=CN=etcd-client", "issuer=CN=etcd-ca,O=ha"],
        "admin": ["subject=CN=kubernetes-admin,O=nodebake:cluster-admins", "issuer=CN=kubernetes-ca,O=ha"],
    }

    def alternatives(name: str) -> set[str]:
        said = openssl("x509", "-in", tmp_path / f"{name}.crt", "-noout", "-ext", "subjectAltName").stdout
        return {part.strip() for line in said.splitlines()[1:] for part in line.split(",")}

    assert alternatives("kube-apiserver") == {
        "DNS:kubernetes",
        "DNS:kubernetes.default",
        "DNS:kubernetes.default.svc",
        "DNS:kubernetes.default.svc.bake.test",
        "DNS:control-1",
        "DNS:localhost",
        "DNS:k8s.example.org",
        "DNS:api.example.org",
        "IP Address:127.0.0.1",
        "IP Address:192.168.10.11",
        "IP Address:10.96.0.1",
        "IP Address:192.168.10.9",
        "IP Address:10.1.2.3",
    }
    etcd = {"DNS:control-1", "DNS:localhost", "IP Address:127.0.0.1", "IP Address:192.168.10.11"}
    assert alternatives("etcd-server") == alternatives("etcd-peer") == etcd
    assert alternatives("etcd-client") == set()


@pytest.mark.parametrize(("key_type", "enciphers"), [("ecdsa-p256", False), ("ecdsa-p384", False), ("rsa-2048", True)])
def test_extensions(key_type: KeyType, enciphers: bool, tmp_path: Path) -> None:
    cluster = replace(samples.single(), key_type=key_type)
    secrets = store.open(tmp_path / "s", cluster, now=NOW)
    for name, (pem, _) in pairs(cluster, cluster.nodes[0], secrets).items():
        spec = next(spec for spec in PROFILES if spec.name == name)
        leaf = x509.load_pem_x509_certificate(pem).extensions
        usage = leaf.get_extension_for_class(x509.KeyUsage)
        assert usage.critical
        assert usage.value.digital_signature
        assert usage.value.key_encipherment == enciphers
        constraints = leaf.get_extension_for_class(x509.BasicConstraints)
        assert constraints.critical
        assert not constraints.value.ca
        assert {*leaf.get_extension_for_class(x509.ExtendedKeyUsage).value} == {
            purpose
            for purpose, wanted in (
                (ExtendedKeyUsageOID.SERVER_AUTH, spec.server),
                (ExtendedKeyUsageOID.CLIENT_AUTH, spec.client),
            )
            if wanted
        }
    for pair in secrets.authorities.values():
        authority = x509.load_pem_x509_certificate(pair.cert_pem).extensions
        constraints = authority.get_extension_for_class(x509.BasicConstraints)
        assert constraints.critical
        assert (constraints.value.ca, constraints.value.path_length) == (True, 0)
        usage = authority.get_extension_for_class(x509.KeyUsage)
        assert usage.critical
        assert usage.value.key_cert_sign
        assert not usage.value.digital_signature


# --- real handshakes


class Refused(Exception):
    """One side turned the other away."""


Pair = tuple[bytes, bytes]


def context(side: int, pair: Pair | None, ca: bytes, tmp_path: Path) -> ssl.SSLContext:
    made = ssl.SSLContext(side)
    made.verify_mode = ssl.CERT_REQUIRED
    made.verify_flags |= ssl.VERIFY_X509_STRICT
    made.load_verify_locations(cadata=ca.decode())
    if pair is not None:
        file = tmp_path / "chain.pem"
        file.write_bytes(pair[1] + pair[0])
        made.load_cert_chain(file)
    return made


def handshake(
    server: Pair, client: Pair | None, *, server_ca: bytes, client_ca: bytes, name: str, tmp_path: Path
) -> None:
    """Mutual TLS in memory: the client trusts server_ca and wants name, the server trusts client_ca."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server_side = context(ssl.PROTOCOL_TLS_SERVER, server, client_ca, tmp_path).wrap_bio(
        to_server, to_client, server_side=True
    )
    client_side = context(ssl.PROTOCOL_TLS_CLIENT, client, server_ca, tmp_path).wrap_bio(
        to_client, to_server, server_hostname=name
    )
    left = [client_side, server_side]
    for _ in range(10):
        for side in [*left]:
            try:
                side.do_handshake()
                left.remove(side)
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as error:
                raise Refused(error.reason) from error
    assert not left
    client_side.write(b"hello")
    assert server_side.read() == b"hello"


@pytest.fixture(scope="module")
def everyone(secrets: Secrets) -> dict[str, Pair]:
    """Every certificate of a control plane, and what the kubelet-serving authority and the kubernetes authority sign
    for a worker's kubelet once the cluster runs."""
    found = pairs(samples.ha(), PLANE, secrets)
    for name, authority, server in (("kubelet", "kubelet-serving", True), ("kubelet-client", "kubernetes", False)):
        key = pki.new_key("ecdsa-p256")
        subject = pki.Subject(
            "system:node:worker-1",
            "system:nodes",
            server=server,
            client=not server,
            sans=("worker-1", "192.168.10.21") if server else (),
        )
        certificate = pki.leaf(
            subject,
            key,
            secrets.authorities[authority],
            start=NOW - timedelta(hours=1),
            end=NOW + timedelta(days=365),
            serial_seed=secrets.serial_seed,
        )
        found[name] = certificate, key
    return found


# Who listens: profile -> (name that is dialled, CA that its clients trust, CA that it trusts, its rightful clients).
# An aggregated API server has a certificate of its own; the API server's stands in for it.
LISTENERS = {
    "kube-apiserver": (
        "127.0.0.1",
        "kubernetes",
        "kubernetes",
        {"kube-apiserver-kubelet-client", "kube-controller-manager", "kube-scheduler", "admin", "kubelet-client"},
    ),
    "etcd-server": (
        "192.168.10.11",
        "etcd",
        "etcd",
        {"kube-apiserver-etcd-client", "etcd-client", "etcd-server", "etcd-peer"},
    ),
    "etcd-peer": (
        "control-1",
        "etcd",
        "etcd",
        # etcd itself narrows this to the CN etcd-peer; TLS alone knows the authority and the use.
        {"etcd-peer", "etcd-server", "etcd-client", "kube-apiserver-etcd-client"},
    ),
    "kubelet": (
        "192.168.10.21",
        "kubelet-serving",
        "kubernetes",
        {"kube-apiserver-kubelet-client", "kube-controller-manager", "kube-scheduler", "admin", "kubelet-client"},
    ),
}


@pytest.mark.parametrize("listener", LISTENERS)
def test_a_server_accepts_its_clients_and_no_other(
    listener: str, everyone: dict[str, Pair], secrets: Secrets, tmp_path: Path
) -> None:
    name, server_ca, client_ca, rightful = LISTENERS[listener]
    accepted = set()
    for client, pair in everyone.items():
        try:
            handshake(
                everyone[listener],
                pair,
                server_ca=secrets.authorities[server_ca].cert_pem,
                client_ca=secrets.authorities[client_ca].cert_pem,
                name=name,
                tmp_path=tmp_path,
            )
            accepted.add(client)
        except Refused:
            pass
    assert accepted == rightful


@pytest.mark.parametrize("listener", LISTENERS)
def test_a_client_refuses_every_other_server(
    listener: str, everyone: dict[str, Pair], secrets: Secrets, tmp_path: Path
) -> None:
    name, server_ca, client_ca, rightful = LISTENERS[listener]
    client = everyone[min(rightful)]
    accepted = set()
    for server, pair in everyone.items():
        try:
            handshake(
                pair,
                client,
                server_ca=secrets.authorities[server_ca].cert_pem,
                client_ca=secrets.authorities[client_ca].cert_pem,
                name=name,
                tmp_path=tmp_path,
            )
            accepted.add(server)
        except Refused:
            pass
    assert accepted == ({"etcd-server", "etcd-peer"} if listener.startswith("etcd") else {listener})


@pytest.mark.parametrize("listener", LISTENERS)
def test_no_certificate_and_another_machines_name_are_refused(
    listener: str, everyone: dict[str, Pair], secrets: Secrets, tmp_path: Path
) -> None:
    name, server_ca, client_ca, rightful = LISTENERS[listener]
    cas = {
        "server_ca": secrets.authorities[server_ca].cert_pem,
        "client_ca": secrets.authorities[client_ca].cert_pem,
    }
    client = everyone[min(rightful)]
    handshake(everyone[listener], client, name=name, tmp_path=tmp_path, **cas)
    with pytest.raises(Refused):
        handshake(everyone[listener], None, name=name, tmp_path=tmp_path, **cas)
    for other in ("control-2", "192.168.10.12"):
        with pytest.raises(Refused):
            handshake(everyone[listener], client, name=other, tmp_path=tmp_path, **cas)


def test_the_front_proxy_client_is_known_by_its_own_authority_alone(
    everyone: dict[str, Pair], secrets: Secrets, tmp_path: Path
) -> None:
    """An aggregated API server believes the headers of whoever the front-proxy authority signed for."""
    accepted = set()
    for client, pair in everyone.items():
        try:
            handshake(
                everyone["kube-apiserver"],
                pair,
                server_ca=secrets.authorities["kubernetes"].cert_pem,
                client_ca=secrets.authorities["front-proxy"].cert_pem,
                name="127.0.0.1",
                tmp_path=tmp_path,
            )
            accepted.add(client)
        except Refused:
            pass
    assert accepted == {"front-proxy-client"}


def test_two_clusters_of_one_name_are_strangers(secrets: Secrets, everyone: dict[str, Pair], tmp_path: Path) -> None:
    other = store.open(tmp_path / "other", samples.ha(), now=NOW)
    theirs = pairs(samples.ha(), PLANE, other)
    ca = secrets.authorities["kubernetes"].cert_pem
    with pytest.raises(Refused):
        handshake(
            everyone["kube-apiserver"], theirs["admin"], server_ca=ca, client_ca=ca, name="127.0.0.1", tmp_path=tmp_path
        )
    with pytest.raises(Refused):
        handshake(
            theirs["kube-apiserver"], everyone["admin"], server_ca=ca, client_ca=ca, name="127.0.0.1", tmp_path=tmp_path
        )


# --- the same bytes


@pytest.mark.parametrize("key_type", ["ecdsa-p256", "ecdsa-p384", "rsa-2048"])
def test_the_same_bytes_at_another_time_and_place(
    key_type: KeyType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = replace(samples.single(), key_type=key_type)
    node = cluster.nodes[0]
    secrets = store.open(tmp_path / "s", cluster, now=NOW)
    first = certificates.for_node(cluster, node, secrets), certificates.admin_conf(cluster, secrets)
    monkeypatch.setenv("TZ", "America/St_Johns")
    time.tzset()
    old = os.umask(0o027)
    try:
        (tmp_path / "s").rename(tmp_path / "elsewhere")
        again = store.open(tmp_path / "elsewhere", cluster, now=NOW + timedelta(days=9))
        assert (certificates.for_node(cluster, node, again), certificates.admin_conf(cluster, again)) == first
    finally:
        os.umask(old)
        monkeypatch.undo()
        time.tzset()


def test_another_content_has_another_serial_number(secrets: Secrets) -> None:
    def serials(cluster: Cluster) -> dict[str, int]:
        return {
            name: x509.load_pem_x509_certificate(pem).serial_number
            for name, (pem, _) in pairs(cluster, PLANE, secrets).items()
        }

    first = serials(samples.ha())
    assert len(set(first.values())) == len(first)
    assert all(serial.bit_length() == 159 for serial in first.values())
    named = serials(samples.ha(cert_sans=("api.example.org",)))
    assert {name for name in first if named[name] != first[name]} == {"kube-apiserver"}
    shorter = serials(samples.ha(validity=Validity(leaf=timedelta(days=30))))
    assert not set(shorter.values()) & set(first.values())


def test_adding_a_worker_changes_no_certificate(directory: Path, secrets: Secrets) -> None:
    cluster = samples.ha()
    larger = replace(cluster, nodes=(*cluster.nodes, samples.node("worker-4", "worker", 24)))
    for node in cluster.nodes:
        before = certificates.for_node(cluster, node, secrets)
        assert certificates.for_node(larger, node, store.open(directory, larger, now=NOW)) == before


# --- until when


def expiries(cluster: Cluster, node: Node | None, secrets: Secrets) -> list[tuple[str, datetime]]:
    return profiles.expiries(cluster, node, minted=secrets.minted, authorities_end=secrets.authorities_end)


def test_validity(secrets: Secrets) -> None:
    for name, (pem, _) in pairs(samples.ha(), PLANE, secrets).items():
        leaf = x509.load_pem_x509_certificate(pem)
        assert leaf.not_valid_before_utc == secrets.minted - timedelta(hours=1), name
        assert leaf.not_valid_after_utc == secrets.minted + timedelta(days=1096), name
    for pair in secrets.authorities.values():
        authority = x509.load_pem_x509_certificate(pair.cert_pem)
        assert authority.not_valid_before_utc == secrets.minted - timedelta(hours=1)
        assert authority.not_valid_after_utc == secrets.minted + timedelta(days=3652)


def test_a_leaf_never_outlives_its_authority(secrets: Secrets) -> None:
    cluster = samples.ha(validity=Validity(leaf=timedelta(days=9999)))
    end = secrets.minted + timedelta(days=3652)
    for pem, _ in pairs(cluster, PLANE, secrets).values():
        assert x509.load_pem_x509_certificate(pem).not_valid_after_utc == end
    assert {when for _, when in expiries(cluster, PLANE, secrets)} == {end}


def test_expiries_are_those_of_the_certificates(secrets: Secrets) -> None:
    cluster = samples.ha()
    told = dict(expiries(cluster, PLANE, secrets)) | dict(expiries(cluster, None, secrets))
    real = {name: x509.load_pem_x509_certificate(pem) for name, (pem, _) in pairs(cluster, PLANE, secrets).items()}
    real |= {f"{name}-ca": pki.load_certificate(pair.cert_pem) for name, pair in secrets.authorities.items()}
    assert told == {name: certificate.not_valid_after_utc for name, certificate in real.items()}
    worker = expiries(cluster, cluster.workers[0], secrets)
    assert [name for name, _ in worker] == ["kubernetes-ca"]
    desk = expiries(cluster, None, secrets)
    assert [name for name, _ in desk] == ["kubernetes-ca", "kubelet-serving-ca", "etcd-ca", "front-proxy-ca", "admin"]


# --- kubeconfig files


def test_daemons_talk_to_their_own_api_server(secrets: Secrets) -> None:
    files = by_path(samples.ha(), PLANE, secrets)
    for path in ("/etc/kubernetes/controller-manager.conf", "/etc/kubernetes/scheduler.conf"):
        config = yaml.safe_load(data(files[path]))
        assert [cluster["cluster"]["server"] for cluster in config["clusters"]] == ["https://127.0.0.1:6443"]


def test_admin_conf_has_a_context_for_each_control_plane(secrets: Secrets) -> None:
    config = yaml.safe_load(certificates.admin_conf(samples.ha(), secrets))
    assert config["apiVersion"] == "v1"
    assert config["kind"] == "Config"
    servers = {entry["name"]: entry["cluster"]["server"] for entry in config["clusters"]}
    assert servers == {f"ha-control-{i}": f"https://192.168.10.1{i}:6443" for i in (1, 2, 3)}
    assert [context["name"] for context in config["contexts"]] == list(servers)
    for entry in config["contexts"]:
        assert entry["context"] == {"cluster": entry["name"], "user": config["users"][0]["name"]}
    assert config["current-context"] == "ha-control-1"
    for entry in config["clusters"]:
        ca = base64.b64decode(entry["cluster"]["certificate-authority-data"])
        assert ca == secrets.authorities["kubernetes"].cert_pem
    assert base64.b64decode(config["users"][0]["user"]["client-key-data"]) == secrets.leaf_keys[DESK, "admin"]


@pytest.mark.parametrize(
    ("changes", "server"),
    [
        ({"vip": IPv4Address("192.168.10.9")}, "https://192.168.10.9:6443"),
        (
            {"vip": IPv4Address("192.168.10.9"), "control_plane_endpoint": Endpoint("api.example.org", 443)},
            "https://api.example.org:443",
        ),
    ],
)
def test_the_shared_endpoint_comes_first(changes: dict[str, object], server: str, secrets: Secrets) -> None:
    config = yaml.safe_load(certificates.admin_conf(samples.ha(**changes), secrets))
    assert config["current-context"] == "ha"
    assert config["clusters"][0] == {"name": "ha", "cluster": config["clusters"][0]["cluster"]}
    assert config["clusters"][0]["cluster"]["server"] == server
    assert len(config["contexts"]) == 4


def test_names_that_yaml_would_misread_stay_text(tmp_path: Path) -> None:
    cluster = replace(samples.single(), name="1e3")
    secrets = store.open(tmp_path / "s", cluster, now=NOW)
    config = yaml.safe_load(certificates.admin_conf(cluster, secrets))
    assert config["current-context"] == "1e3-only"
    files = by_path(cluster, cluster.nodes[0], secrets)
    assert yaml.safe_load(data(files["/etc/kubernetes/scheduler.conf"]))["current-context"] == "1e3"


# --- the table


def test_the_documentation_shows_every_profile() -> None:
    table = certificates.profile_table()
    for spec in PROFILES:
        line = next(line for line in table.splitlines() if line.startswith(f"| {spec.name} |"))
        assert spec.path in line
        assert f"`{spec.common_name}`" in line
        assert line.count("|") == 10
    assert all(f"`{spec.name}-ca`" in table for spec in AUTHORITIES)


def test_every_component_has_its_own_certificate() -> None:
    assert len({spec.name for spec in PROFILES}) == len({spec.common_name for spec in PROFILES}) == len(PROFILES)
    assert not [spec for spec in PROFILES if spec.organization == "system:masters"]


def test_a_machines_certificates_take_milliseconds(secrets: Secrets) -> None:
    cluster = samples.ha()
    certificates.for_node(cluster, PLANE, secrets)
    started = time.process_time()
    for _ in range(10):
        certificates.for_node(cluster, PLANE, secrets)
    assert (time.process_time() - started) / 10 < 0.02


def test_the_documentation_has_the_table() -> None:
    text = (Path(__file__).parent.parent / "recipes" / "README.md").read_text()
    assert f"\n\n{certificates.profile_table()}\n" in f"{text}\n"
