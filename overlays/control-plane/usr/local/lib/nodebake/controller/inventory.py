"""The inventory: what was baked, as far as one has to know it to approve certificates, bring tokens and label Nodes.

The artifact on this machine brings one, and the cluster holds one, in the ConfigMap kube-system/nodebake-inventory:

    data.generation                     of the inventory, as decimal digits
    data.applied                        generation of the cluster objects that were applied last, completely
    binaryData["inventory.json.gz"]     the inventory itself

The cluster's is the truth for all control planes, so that they never disagree. Whose artifact is newer writes it there.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from controller.api import Json

NAMESPACE = "kube-system"
NAME = "nodebake-inventory"
NODES = "/api/v1/nodes"
_MEMBER = "inventory.json.gz"


@dataclass(frozen=True, slots=True)
class Kubelet:
    """A machine that may join."""

    name: str
    role: str
    addresses: frozenset[str]
    token_id: str
    install_by: datetime
    labels: Mapping[str, str]  # every label that its Node shall have
    denied: bool


@dataclass(frozen=True, slots=True)
class Inventory:
    generation: int
    approval: Literal["inventory", "group"]
    kubelets: Mapping[str, Kubelet]  # by name
    by_token: Mapping[str, Kubelet]  # by token id
    document: bytes = field(repr=False)  # as it came, JSON


@dataclass(frozen=True, slots=True)
class Published:
    """What the cluster holds. inventory is None when it cannot be read: then any newer one may replace it."""

    inventory: Inventory | None
    applied: int
    version: str  # resourceVersion

    @property
    def generation(self) -> int:
        return self.inventory.generation if self.inventory is not None else 0


@dataclass(frozen=True, slots=True)
class Artifact:
    """What this machine was given."""

    inventory: Inventory
    rights: Sequence[Json]  # the objects that everything else hangs on: roles and bindings
    objects: Path  # all others, YAML
    tokens: Mapping[str, Json] = field(repr=False)  # token id -> Secret


def parse(document: bytes) -> Inventory:
    """ValueError, KeyError or TypeError for what is no inventory."""
    told: dict[str, Any] = json.loads(document)
    approval = told["approval"]
    if approval not in ("inventory", "group"):
        raise ValueError(f"approval is {approval!r}")
    kubelets = [_kubelet({"installBy": told["installBy"], **one}) for one in told["kubelets"]]
    return Inventory(
        generation=int(told["generation"]),
        approval="group" if approval == "group" else "inventory",
        kubelets={kubelet.name: kubelet for kubelet in kubelets},
        by_token={kubelet.token_id: kubelet for kubelet in kubelets},
        document=document,
    )


def _kubelet(one: Json) -> Kubelet:
    install_by = datetime.fromisoformat(one["installBy"])
    if install_by.tzinfo is None:
        raise ValueError("installBy has no time zone")
    labels = dict(one["labels"]) | {f"{ROLE}{one['role']}": ""}
    if one["storage"] is not None:
        labels[STORAGE] = one["storage"]
    return Kubelet(
        name=one["name"],
        role=one["role"],
        addresses=frozenset(one["addresses"]),
        token_id=one["tokenId"],
        install_by=install_by,
        labels=labels,
        denied=bool(one["denied"]),
    )


ROLE = "node-role.kubernetes.io/"
STORAGE = "node-restriction.kubernetes.io/storage"


def read_artifact(folder: Path) -> Artifact:
    """folder: /etc/nodebake. OSError, ValueError, KeyError or TypeError while it is not whole: the inventory says of
    what objects it is, so that those of an earlier artifact are not applied in its name."""
    document = (folder / "inventory.json").read_bytes()
    for name, digest in json.loads(document)["objects"].items():
        if hashlib.sha256((folder / "objects" / name).read_bytes()).hexdigest() != digest:
            raise ValueError(f"objects/{name} is of another artifact")
    secrets = _items(folder / "objects" / "90-tokens.yaml")
    return Artifact(
        inventory=parse(document),
        rights=_items(folder / "objects" / "00-rights.yaml"),
        objects=folder / "objects" / "10-cluster.yaml",
        tokens={secret["stringData"]["token-id"]: secret for secret in secrets},
    )


def _items(file: Path) -> list[Json]:
    """Of a List, which is JSON: the machine's Python reads no other YAML."""
    items: list[Json] = json.loads(file.read_bytes())["items"]
    return items


def signature(folder: Path) -> tuple[tuple[int, int, int], ...]:
    """Something that changes whenever a file of the artifact is written anew."""
    names = ("inventory.json", *(f"objects/{name}.yaml" for name in ("00-rights", "10-cluster", "90-tokens")))
    found = [path.stat() for path in (folder / name for name in names) if path.exists()]
    return tuple((stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in found)


def published(config_map: Json) -> Published:
    """What a ConfigMap says; never raises for its contents."""
    try:
        inventory = parse(gzip.decompress(base64.b64decode(config_map["binaryData"][_MEMBER])))
        if int(config_map["data"]["generation"]) != inventory.generation:
            raise ValueError("it says another generation than it holds")
    except (ValueError, KeyError, TypeError, OSError, EOFError, zlib.error):
        inventory = None
    applied = str(config_map.get("data", {}).get("applied", ""))
    version = str(config_map["metadata"]["resourceVersion"])
    return Published(inventory, int(applied) if applied.isascii() and applied.isdigit() else 0, version)


def config_map(inventory: Inventory, applied: int, version: str | None = None) -> Json:
    """The ConfigMap. version: the resourceVersion that it replaces."""
    metadata: Json = {
        "name": NAME,
        "namespace": NAMESPACE,
        "labels": {"app.kubernetes.io/managed-by": "nodebake"},
    }
    if version is not None:
        metadata["resourceVersion"] = version
    packed = gzip.compress(inventory.document, mtime=0)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata,
        "data": {"generation": str(inventory.generation), "applied": str(applied)},
        "binaryData": {_MEMBER: base64.b64encode(packed).decode()},
    }
