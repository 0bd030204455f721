"""Node -> bootstrap token: the Secret that the cluster knows it by, and the kubeconfig that the kubelet joins with.

A token may authenticate and nothing else; the group system:bootstrappers, which the API server gives every token, is
what the bindings name, so no extra group is needed.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from recipes import objects
from recipes.kit.kubeconfig import Credential, kubeconfig
from recipes.kit.model import Cluster, File, Node, Origin
from recipes.kit.store import Secrets, Token

PATH = "/etc/kubernetes/bootstrap-kubelet.conf"
MACHINE = "nodebake.local/machine"  # by this label the controller knows whose token it was


def bootstrap_kubeconfig(cluster: Cluster, node: Node, secrets: Secrets) -> File:
    """What the kubelet of a node asks for its first certificate with; only for nodes that run a kubelet."""
    endpoint = "127.0.0.1:6443" if node.role == "control-plane" else str(cluster.balancer_endpoint)
    data = kubeconfig(
        {cluster.name: f"https://{endpoint}"},
        authority=secrets.authorities["kubernetes"].cert_pem,
        credential=Credential("kubelet-bootstrap", token=secrets.tokens[node.name].bearer),
    )
    origin = Origin("bootstrap token", secrets.life(node.name).minted.date().isoformat(), "baked")
    return File(PATH, data=data, mode=0o600, origin=origin)


def secret_object(node: Node, token: Token, install_by: datetime) -> dict[str, Any]:
    """The Secret of a token, as Kubernetes' bootstrap token authenticator reads it."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": f"bootstrap-token-{token.id}",
            "namespace": "kube-system",
            "labels": {MACHINE: node.name},
        },
        "type": "bootstrap.kubernetes.io/token",
        "stringData": {
            "token-id": token.id,
            "token-secret": token.secret,
            "expiration": install_by.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "usage-bootstrap-authentication": "true",
            "description": f"Lets the kubelet of {node.name} join.",
        },
    }


def for_control_plane(cluster: Cluster, secrets: Secrets) -> File:
    """The Secrets of every kubelet that may join, in the cluster file's order; denied machines have none."""
    items = [
        secret_object(node, secrets.tokens[node.name], secrets.life(node.name).install_by)
        for node in cluster.kubelets
        if not node.denied
    ]
    origin = Origin("bootstrap tokens", secrets.minted.date().isoformat(), "baked")
    return File(
        "/etc/nodebake/objects/90-tokens.yaml",
        data=objects.json_list(items),
        mode=0o600,
        owner="nodebake",
        origin=origin,
    )
