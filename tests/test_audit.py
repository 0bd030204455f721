"""Who may have what: finished artifacts hold what the table says and nothing else, and every breach fails the bake."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import pytest
import yaml

from recipes import audit, certificates, seed, tokens
from recipes import node as nodes
from recipes.kit import pki, store
from recipes.kit.errors import BakeErrors
from recipes.kit.model import Cluster, File, Node, Registry
from recipes.kit.profiles import AUTHORITIES, DESK, PROFILES
from tests import artifacts, samples

PASSWORD = "long-enough-password"
OBJECTS = "/etc/nodebake/objects/10-cluster.yaml"
PKI = "/etc/kubernetes/pki"


@dataclass(frozen=True)
class Desk:
    """A cluster with everything secret that there can be, its store, and stand-ins for its parts."""

    cluster: Cluster
    minted: store.Secrets
    parts: artifacts.Parts
    folder: Path

    @property
    def audit(self) -> audit.Audit:
        return audit.Audit(self.cluster, self.minted)

    def identity(self, node: Node) -> list[File]:
        image = self.parts.references
        return nodes.identity(self.cluster, node, self.minted, sums="5" * 64, image=image, generation=7)

    def seed(self, node: Node) -> dict[str, bytes]:
        return seed.documents(self.cluster, node, sums="ab" * 32, sign=partial(store.sign, self.minted))

    def bake(self, node: Node) -> tuple[Path, Path, Path]:
        """(payload, node tarball, seed)"""
        payload, tarball = artifacts.bake(self.folder, self.cluster, node, self.parts, self.minted)
        documents = self.seed(node)
        iso = seed.write(documents, tarball, self.folder / f"{node.name}.iso", mtime=artifacts.MTIME)
        return payload, tarball, iso.path


def desk(cluster: Cluster, parts: artifacts.Parts, folder: Path) -> Desk:
    password, objects = folder / "password", folder / "objects.yaml"
    password.write_text(f"{PASSWORD}\n")
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "tls"}}
    key = base64.b64encode(pki.new_key("ecdsa-p256")).decode()
    objects.write_text(yaml.safe_dump({**secret, "data": {"tls.key": key}}))
    cluster = replace(
        cluster,
        bake_ssh_host_keys=True,
        registries=(Registry("registry.example", username="robot", password_file=password),),
        extra_objects=(objects,),
    )
    return Desk(cluster, artifacts.secrets(folder, cluster), parts, folder)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> artifacts.Parts:
    return artifacts.Parts(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def ha(parts: artifacts.Parts, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return desk(samples.ha(), parts, tmp_path_factory.mktemp("ha"))


# ---- finished artifacts, opened with other programs and searched in another way ------------------------------------


def values(minted: store.Secrets) -> dict[str, bytes]:
    """Every secret of a store: what it is, and its number or text as it is used."""
    found = {f"{name} CA": pki.private_number(pair.key_pem) for name, pair in minted.authorities.items()}
    found |= {f"{of}: {profile}": pki.private_number(key) for (of, profile), key in minted.leaf_keys.items()}
    found |= {f"{of}: token": token.secret.encode() for of, token in minted.tokens.items()}
    found |= {f"{of}: ssh": ssh_number(key.private) for of, key in minted.ssh_host_keys.items()}
    return found | {
        "service account": pki.private_number(minted.service_account.private_pem),
        "signing": pki.private_number(minted.signing.private_pem),
        "encryption": minted.encryption_keys[1],
        "serials": minted.serial_seed,
        "password": PASSWORD.encode(),
    }


def ssh_number(private: bytes) -> bytes:
    """The 64 bytes of an Ed25519 host key: they follow their own length and the second copy of the public key."""
    blob = base64.b64decode(b"".join(private.splitlines()[1:-1]))
    public = blob.rindex(b"ssh-ed25519") + len("ssh-ed25519") + 4 + 32
    return blob[public + 4 : public + 4 + 64]


@cache
def forms(value: bytes) -> tuple[bytes, ...]:
    """How a value may stand in bytes: as it is, in hexadecimal, in base64 (wherever in its groups of three it begins),
    and that in base64 once more."""
    plain = (value, value.hex().encode(), value.hex().upper().encode())
    once = [piece for each in plain for piece in in_base64(each)]
    return (*plain, *once, *(piece for each in once for piece in in_base64(each)))


def in_base64(value: bytes) -> Iterator[bytes]:
    for shift in range(3):
        begun = value[(3 - shift) % 3 :]
        yield base64.b64encode(begun[: len(begun) // 3 * 3])


def opened(archive: Path, folder: Path) -> Path:
    folder.mkdir(parents=True)
    program = ["bsdtar", "-xf"] if archive.suffix == ".iso" else ["tar", "--no-same-owner", "-xzf"]
    subprocess.run([*program, archive, "-C", folder], check=True)
    return folder


def what_is_in(folder: Path, known: dict[str, bytes]) -> set[tuple[str, str]]:
    """(path, secret) of all that the files below a folder hold."""
    found = set()
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_file():
            continue
        data = path.read_bytes()
        # A key in PEM is broken into lines, and those may be in base64 once more, as kubeconfigs have them.
        pieces = re.findall(rb"[A-Za-z0-9+/=]{100,}", data)
        inner = b"\0".join(
            base64.b64decode(piece + b"=" * (-len(piece) % 4)) for piece in pieces if len(piece) % 4 != 1
        )
        whole = b"\0".join((data, inner, b"".join(data.split()), b"".join(inner.split())))
        name = f"/{path.relative_to(folder)}"
        found |= {(name, what) for what, value in known.items() if any(form in whole for form in forms(value))}
    return found


def expected(cluster: Cluster, node: Node) -> set[tuple[str, str]]:
    """What a machine may have, as the issue says it: (path, secret)."""
    host = {("/etc/ssh/ssh_host_ed25519_key", f"{node.name}: ssh")}
    joins = {("/etc/kubernetes/bootstrap-kubelet.conf", f"{node.name}: token")}
    pulls = {("/var/lib/kubelet/config.json", "password")}
    member = {(f"/etc/etcd/pki/{name}.key", f"{node.name}: etcd-{name}") for name in ("server", "peer", "client")}
    clients = ("kube-apiserver", "kube-apiserver-kubelet-client", "kube-apiserver-etcd-client", "front-proxy-client")
    plane = {
        *((f"{PKI}/{name}.key", f"{node.name}: {name}") for name in clients),
        ("/etc/kubernetes/controller-manager.conf", f"{node.name}: kube-controller-manager"),
        ("/etc/kubernetes/scheduler.conf", f"{node.name}: kube-scheduler"),
        (f"{PKI}/kubernetes-ca.key", "kubernetes CA"),
        (f"{PKI}/kubelet-serving-ca.key", "kubelet-serving CA"),
        (f"{PKI}/sa.key", "service account"),
        ("/etc/kubernetes/encryption.yaml", "encryption"),
        *(("/etc/nodebake/objects/90-tokens.yaml", f"{other.name}: token") for other in cluster.kubelets),
    }
    if node.role == "worker":
        return host | joins | pulls
    if node.role == "control-plane":
        return host | joins | pulls | plane | (member if node.runs_etcd else set())
    return host | (member if node.role == "etcd" else set())


@pytest.mark.parametrize(
    "make", [samples.ha, samples.external_etcd, samples.balanced, samples.single], ids=lambda make: make.__name__
)
def test_a_finished_artifact_holds_what_its_machine_may_have(
    make: Callable[[], Cluster], parts: artifacts.Parts, tmp_path: Path
) -> None:
    made = desk(make(), parts, tmp_path)
    known = values(made.minted)
    assert len(known) == len(set(known.values())) > 15
    for node in made.cluster.nodes:
        payload, tarball, iso = made.bake(node)
        medium = opened(iso, tmp_path / "media" / node.name)
        assert (medium / "node.tar.gz").read_bytes() == tarball.read_bytes()
        on_machine = opened(medium / "node.tar.gz", tmp_path / "machines" / node.name)
        (medium / "node.tar.gz").unlink()
        assert what_is_in(medium, known) == set()
        assert what_is_in(on_machine, known) == expected(made.cluster, node)
        masters = subprocess.run(["grep", "-rl", "system:masters", on_machine / "etc/kubernetes"], capture_output=True)
        assert masters.stdout == b""
        shared = opened(payload, tmp_path / "payloads" / node.name)
        assert what_is_in(shared, known) == set()
        made.audit.identity(made.identity(node), node)
        made.audit.payload(parts.payload(made.cluster, node), "the payload")
    texts = [subject(path) for path in (tmp_path / "machines").glob("*/etc/**/*.crt")]
    assert texts and not [text for text in texts if "system:masters" in text or "cluster-admins" in text]


def subject(certificate: Path) -> str:
    command: list[str | Path] = ["openssl", "x509", "-noout", "-subject", "-in", certificate]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# ---- what goes beyond the table ------------------------------------------------------------------------------------


def told(made: Desk, node: Node, files: list[File]) -> str:
    with pytest.raises(BakeErrors) as errors:
        made.audit.identity(files, node)
    return str(errors.value)


def test_a_recipe_that_brings_a_key_of_the_desks_fails(ha: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The profile table, which the recipes go by, is wrong here: the audit says otherwise."""
    plane, worker = ha.cluster.control_planes[0], ha.cluster.workers[0]
    for name in ("etcd", "front-proxy"):
        wrong = [replace(spec, key=f"{PKI}/{name}-ca.key") if spec.name == name else spec for spec in AUTHORITIES]
        monkeypatch.setattr(certificates, "AUTHORITIES", wrong)
        assert f"{PKI}/{name}-ca.key: this holds the {name} CA's key" in told(ha, plane, ha.identity(plane))
    monkeypatch.undo()

    [etcd] = [spec for spec in PROFILES if spec.name == "etcd-client"]
    keys = {**ha.minted.leaf_keys, (worker.name, "etcd-client"): ha.minted.leaf_keys[plane.name, "etcd-client"]}
    broken = replace(ha, minted=replace(ha.minted, leaf_keys=keys))
    monkeypatch.setattr(certificates, "profiles_of", lambda node: (replace(etcd, holder="worker"),))
    assert "/etc/etcd/pki/client.key: this holds the etcd-client's key of" in told(ha, worker, broken.identity(worker))
    monkeypatch.undo()

    [admin] = [spec for spec in PROFILES if spec.holder == "desk"]
    keys = {**ha.minted.leaf_keys, (plane.name, "admin"): ha.minted.leaf_keys[DESK, "admin"]}
    broken = replace(ha, minted=replace(ha.minted, leaf_keys=keys))
    where = replace(admin, holder="control-plane", path="/etc/kubernetes/admin")
    monkeypatch.setattr(certificates, "profiles_of", lambda node: (where,))
    assert "/etc/kubernetes/admin.conf: this holds the admin's key" in told(ha, plane, broken.identity(plane))


def test_the_table_itself_keeps_keys_at_the_desk() -> None:
    """Whatever the profile table says of them."""
    for authority in AUTHORITIES:
        kind = audit._authority(replace(authority, key="/etc/somewhere.key"))
        assert bool(kind.places) == (authority.name in ("kubernetes", "kubelet-serving"))
    spec = PROFILES[0]
    assert audit._leaf(spec).places
    for wrong in (
        replace(spec, holder="worker"),
        replace(spec, holder="load-balancer"),
        replace(spec, organization="system:masters"),
        replace(spec, organization="nodebake:cluster-admins"),
    ):
        assert not audit._leaf(wrong).places


def test_another_machines_identity_fails(ha: Desk) -> None:
    one, other = ha.cluster.workers[:2]
    wrong = told(ha, one, ha.identity(other))
    assert f"{tokens.PATH}: this holds the bootstrap token of {other.name}" in wrong
    assert f"{nodes.HOST_KEY}: this holds the SSH host key" in wrong
    wrong = told(ha, one, ha.identity(ha.cluster.control_planes[0]))
    assert "this holds the encryption key" in wrong and "secrets more" in wrong
    assert f"{PKI}/sa.key: by its name this is a secret" in wrong
    wrong = told(ha, ha.cluster.control_planes[1], ha.identity(ha.cluster.control_planes[0]))
    assert "kube-apiserver.key: this holds the kube-apiserver's key of control-1" in wrong
    assert "kubernetes-ca.key" not in wrong


def test_the_tokens_of_denied_machines_stay_at_the_desk(ha: Desk) -> None:
    denied = [node._replace(denied=node.name == "worker-2") for node in ha.cluster.nodes]
    without = replace(ha, cluster=replace(ha.cluster, nodes=tuple(denied)))
    plane = ha.cluster.control_planes[0]
    without.audit.identity(without.identity(plane), plane)
    assert "90-tokens.yaml: this holds the bootstrap token of worker-2" in told(without, plane, ha.identity(plane))


def test_what_others_may_read_fails(ha: Desk) -> None:
    plane = ha.cluster.control_planes[0]
    for change in ({"mode": 0o640}, {"owner": "etcd"}):
        files = [replace(f, **change) if f.path == f"{PKI}/sa.key" else f for f in ha.identity(plane)]
        assert f"{PKI}/sa.key: this holds a secret: it must be root's alone (0600)" in told(ha, plane, files)


def everywhere(value: bytes) -> list[bytes]:
    return [
        value,
        json.dumps({"a": value.decode()}).encode(),
        yaml.safe_dump({"a": {"b": value.decode()}}).encode(),
        base64.b64encode(value),
        b"export KEY='" + base64.b64encode(base64.b64encode(value)) + b"'\n",
    ]


@pytest.mark.parametrize("where", ["/usr/local/lib/tried", "/etc/nodebake/node.env", OBJECTS, "/etc/tried.key"])
def test_every_secret_is_found_wherever_it_is_hidden(ha: Desk, where: str) -> None:
    plane = ha.cluster.control_planes[0]
    minted = ha.minted
    secret = {
        "kubernetes CA's key": minted.authorities["kubernetes"].key_pem,
        "etcd CA's key": minted.authorities["etcd"].key_pem,
        "front-proxy CA's key": minted.authorities["front-proxy"].key_pem,
        "key that signs manifests": minted.signing.private_pem,
        "service accounts' key": minted.service_account.private_pem,
        "encryption key of Secrets": base64.b64encode(minted.encryption_keys[1]),
        "seed of serial numbers": base64.b64encode(minted.serial_seed),
        "admin's key": certificates.admin_conf(ha.cluster, minted),
        "bootstrap token of worker-1": f"token: {minted.tokens['worker-1'].bearer}".encode(),
        "SSH host key, where it is baked of worker-1": minted.ssh_host_keys["worker-1"].private,
    }
    if where != OBJECTS:
        secret["registries' passwords"] = PASSWORD.encode()
    for what, value in secret.items():
        for data in everywhere(value):
            file = File(where, data=data, mode=0o600)
            assert f"{where}: this holds the {what}\n" in told(ha, plane, [file])
            with pytest.raises(BakeErrors, match=re.escape(f"payload worker:{where}: this holds the {what}\n")):
                ha.audit.payload([file], "payload worker")


@pytest.mark.parametrize(
    "path",
    ["/etc/kubernetes/admin.conf", "/etc/x.key", "/etc/ssh/ssh_host_rsa_key", "/root/.ssh/id_rsa", f"{PKI}/sa.key"],
)
def test_names_tell(ha: Desk, path: str) -> None:
    worker = ha.cluster.workers[0]
    assert f"{path}: by its name this is a secret" in told(ha, worker, [File(path, data=b"")])
    with pytest.raises(BakeErrors, match=re.escape(path)):
        ha.audit.payload([File(path, link="elsewhere")], "payload worker")


def test_a_secret_of_no_store_is_known_by_its_looks(ha: Desk) -> None:
    worker, plane = ha.cluster.workers[0], ha.cluster.control_planes[0]
    stranger = pki.new_key("ecdsa-p256")
    wrong = told(ha, worker, [File("/etc/tried", data=stranger)])
    assert "worker-1:/etc/tried: this holds what looks like a private key (PEM), and is none of the store" in wrong
    ha.audit.identity([File(OBJECTS, data=stranger, mode=0o600, owner="nodebake")], plane)
    assert OBJECTS in told(ha, worker, [File(OBJECTS, data=b"", mode=0o600, owner="nodebake")])


def test_a_seed_holds_nothing_beside_the_tarball(ha: Desk) -> None:
    worker = ha.cluster.workers[0]
    documents = ha.seed(worker)
    ha.audit.seed(documents, worker)
    secret = ha.minted.tokens["worker-1"].bearer.encode()
    with pytest.raises(BakeErrors, match="worker-1's seed:/user-data: this holds the bootstrap token of worker-1"):
        ha.audit.seed({**documents, "user-data": documents["user-data"] + b"# " + secret}, worker)


def test_a_machine_of_thousands_is_audited_as_fast_as_one_of_a_few(parts: artifacts.Parts, tmp_path: Path) -> None:
    def best(workers: int) -> float:
        """Seconds of processor that a worker costs at best."""
        many = [samples.node(f"worker-{i}", "worker", 20) for i in range(1, workers + 1)]
        cluster = samples.ha(nodes=(*samples.ha().control_planes, *many))
        made = Desk(cluster, artifacts.secrets(tmp_path / str(workers), cluster), parts, tmp_path)
        looking, took = made.audit, []
        for node, files, documents in [(node, made.identity(node), made.seed(node)) for node in many[:50]]:
            started = time.process_time()
            looking.identity(files, node)
            looking.seed(documents, node)
            took.append(time.process_time() - started)
        return min(took)

    assert best(5000) < 3 * best(50)


# ---- the table -----------------------------------------------------------------------------------------------------


def test_the_documentation_has_the_table() -> None:
    text = (Path(__file__).parent.parent / "recipes" / "README.md").read_text()
    assert audit.table() in text


def test_every_secret_of_a_store_is_in_the_table(ha: Desk) -> None:
    names = {kind.name for kind in audit.TABLE}
    assert len(names) == len(audit.TABLE)
    for name in ha.minted.authorities:
        assert f"{name} CA's key" in names
    for _, profile in ha.minted.leaf_keys:
        assert f"{profile}'s key" in names
