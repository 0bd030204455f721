"""Payload -> registry: each payload as an OCI artifact (image-spec 1.1), of which machines fetch the one blob."""

from __future__ import annotations

import hashlib
import json
from io import BytesIO

from recipes.kit.distribution import Repository
from recipes.kit.download import Desk
from recipes.kit.model import Arch, Cluster, Role
from recipes.kit.push import MANIFEST, Pusher
from recipes.payload import Baked, title

ARTIFACT = "application/vnd.nodebake.payload.v1"
_EMPTY = b"{}"  # what the specification has for an artifact without a configuration
_EMPTY_TYPE = "application/vnd.oci.empty.v1+json"


def manifest(cluster: Cluster, role: Role, arch: Arch, baked: Baked) -> bytes:
    """The artifact's manifest: the same bytes for the same payload."""
    config = {"mediaType": _EMPTY_TYPE, "digest": _digest(_EMPTY), "size": len(_EMPTY)}
    layer = {
        "mediaType": f"{ARTIFACT}.tar+gzip",
        "digest": f"sha256:{baked.sha256}",
        "size": baked.size,
        "annotations": {"org.opencontainers.image.title": f"{role}-{arch}.tar.gz"},
    }
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": ARTIFACT,
        "config": config,
        "layers": [layer],
        "annotations": {
            "org.opencontainers.image.title": title(cluster, role, arch),
            "org.opencontainers.image.version": baked.sums[:16],
        },
    }
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def tag(cluster: Cluster, role: Role, arch: Arch, baked: Baked) -> str:
    """Of the content, so that no later payload takes it away: registries remove what no tag leads to, and older seeds
    still want theirs."""
    return f"{cluster.name}-{role}-{arch}-{(baked.sha256 or '')[:16]}"


def publish(cluster: Cluster, role: Role, arch: Arch, baked: Baked, repository: Repository, desk: Desk) -> str:
    """Sends what the registry lacks; returns what it is called there. Raises Unreachable, NotServed and BakeError."""
    document, named = manifest(cluster, role, arch, baked), tag(cluster, role, arch, baked)
    with Pusher(repository, desk) as pusher:
        if not pusher.has("blobs", f"sha256:{baked.sha256}"):
            with (
                baked.path.open("rb") as file,
                desk.progress.step(f"{role} {arch} to {repository.host}", baked.size, "bytes") as advance,
            ):
                pusher.blob(file, baked.size, f"sha256:{baked.sha256}", advance)
        if not pusher.has("blobs", _digest(_EMPTY)):
            pusher.blob(BytesIO(_EMPTY), len(_EMPTY), _digest(_EMPTY))
        if not pusher.has("manifests", named):
            pusher.manifest(document, named)
    return f"{repository.host}/{repository.name}:{named}"


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
