"""Node -> node tarball: the payload of its role and what this machine alone has."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from recipes import bom, certificates, images, objects, payload, tokens
from recipes.kit import archive, manifest, overlay, store
from recipes.kit.archive import Packed
from recipes.kit.distribution import Fetch
from recipes.kit.model import Cluster, File, Node

HOST_KEY = "/etc/ssh/ssh_host_ed25519_key"


def identity(
    cluster: Cluster,
    node: Node,
    secrets: store.Secrets,
    *,
    sums: str,
    fetch: Fetch | None = None,
    joins: bool = False,
    image: Mapping[str, str] = MappingProxyType({}),
    generation: int = 0,
) -> list[File]:
    """Everything that this machine alone has, its signed manifest included, sorted by path. Pure but for the operator's
    registry passwords, which are read from their files.

    sums: of the payload that it belongs to (payload.Baked); fetch: how it gets that from a server; joins: its etcd is a
    member that came to the cluster later. For control planes, which bring the cluster's objects: image, name ->
    reference in the payload, and generation, which counts the versions of what they bring.
    """
    life = secrets.life(node.name)
    found = [
        *certificates.for_node(cluster, node, secrets),
        *overlay.identity(
            cluster,
            node,
            minted=_iso(life.minted),
            install_by=_iso(life.install_by),
            fetch=fetch,
            joins=joins,
        ),
        File(manifest.SIGNING_KEY, data=secrets.signing.public_pem),
        bom.identity(f"{cluster.name}/{node.name}", payload.title(cluster, node.role, node.arch), sums, life.minted),
    ]
    if node.runs_kubelet:
        found.append(tokens.bootstrap_kubeconfig(cluster, node, secrets))
        found += images.registry_credentials(cluster)
    if node.role == "control-plane":
        found += _control_plane(cluster, secrets, image, generation)
    if cluster.bake_ssh_host_keys:
        pair = secrets.ssh_host_keys[node.name]
        found += [
            File(HOST_KEY, data=pair.private, mode=0o600),
            File(f"{HOST_KEY}.pub", data=pair.public.encode() + b"\n"),
        ]
    found.sort(key=lambda file: file.path)
    return sorted([*found, *_manifest(cluster, node, secrets, found, sums)], key=lambda file: file.path)


def write(node: Node, contents: Sequence[File], target: Path, *, mtime: int, payload_tarball: Path | None) -> Packed:
    """Packs identity() into target; media full: behind the payload's head, complete; media thin, or without a payload:
    alone."""
    head = payload_tarball if node.media == "full" else None
    return archive.write_node(contents, target, mtime=mtime, payload=head, own=payload.OWN_FOLDERS)


def known_hosts(cluster: Cluster, secrets: store.Secrets) -> bytes:
    """For the admins' ssh, when host keys are baked: one line a machine, by name and addresses."""
    lines = []
    for node in cluster.nodes:
        names = ",".join([node.name, *map(str, node.addresses)])
        kind, key = secrets.ssh_host_keys[node.name].public.split()[:2]
        lines.append(f"{names} {kind} {key}\n")
    return "".join(lines).encode()


def inventory_document(cluster: Cluster, secrets: store.Secrets, generation: int) -> dict[str, Any]:
    """What approves certificate requests and labels Nodes has to know of every kubelet. No secret: token ids only."""
    by = {node.name: _iso(secrets.life(node.name).install_by) for node in cluster.kubelets}
    latest = max(by.values())
    return {
        "clusterId": secrets.cluster_id,
        "cluster": cluster.name,
        "generation": generation,
        "approval": cluster.approval,
        "installBy": latest,
        "kubelets": [
            {
                "name": node.name,
                "role": node.role,
                "addresses": [str(address) for address in node.addresses],
                "tokenId": secrets.tokens[node.name].id,
                "labels": dict(node.labels),
                "storage": node.storage,
                "denied": node.denied,
                **({"installBy": by[node.name]} if by[node.name] != latest else {}),
            }
            for node in cluster.kubelets
        ],
    }


def _control_plane(cluster: Cluster, secrets: store.Secrets, image: Mapping[str, str], generation: int) -> list[File]:
    documents = {
        "00-rights.yaml": objects.json_list(objects.rights(cluster)),
        "10-cluster.yaml": objects.document(objects.static(cluster, image)),
    }
    applied = [
        # For nodebake-controller; the operator's objects may be secret too.
        *(
            File(f"/etc/nodebake/objects/{name}", data=data, mode=0o600, owner="nodebake")
            for name, data in documents.items()
        ),
        tokens.for_control_plane(cluster, secrets),
    ]
    # The inventory says of what objects it is: files are put in place one after the other.
    digests = {PurePosixPath(file.path).name: archive.entry_of(file).sha256 for file in applied}
    document = {**inventory_document(cluster, secrets, generation), "objects": digests}
    keys = {number: secrets.encryption_keys[number] for number in cluster.encryption_keys}
    inventory = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return [
        File(
            "/etc/kubernetes/encryption.yaml",
            data=objects.document([objects.encryption_configuration(keys)]),
            mode=0o600,
        ),
        *applied,
        File("/etc/nodebake/inventory.json", data=inventory.encode() + b"\n", mode=0o600, owner="nodebake"),
    ]


def _manifest(cluster: Cluster, node: Node, secrets: store.Secrets, found: Sequence[File], sums: str) -> list[File]:
    life = secrets.life(node.name)
    about: Mapping[str, Any] = {
        "cluster": cluster.name,
        "clusterId": secrets.cluster_id,
        "node": node.name,
        "role": node.role,
        "arch": node.arch,
        "macs": [link.mac for link in node.network.links if link.mac],
        "addresses": [str(address) for address in node.network.addresses],
        "serial": node.serial,
        "minted": _iso(life.minted),
        "installBy": _iso(life.install_by),
        "payload": sums,
    }
    sign: Callable[[bytes], bytes] = lambda data: store.sign(secrets, data)  # noqa: E731
    entries = [archive.entry_of(file) for file in found]
    others = {f"{manifest.FOLDER}/payload.SHA256SUMS": sums}
    return manifest.files("node", entries, about, sign, others=others)


def _iso(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
