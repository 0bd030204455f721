"""What a cluster is for: an image, pods, Services and volumes, and the questions that show that they work."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

IMAGE = "lab.local/busybox:1"
PORT = 30080
STORAGE = "node-restriction.kubernetes.io/storage"


def archive(target: Path, name: str = IMAGE) -> Path:
    """An OCI archive of Debian's static busybox, the one image that the workload runs from; with another name it is
    another image."""
    if target.exists():
        return target
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "-q", "download", "busybox-static"], cwd=folder, check=True, capture_output=True)
        (package,) = Path(folder).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
        program = next(Path(folder).glob("**/bin/busybox"))
        layer = _tar({"bin/busybox": program.read_bytes(), "tmp/": None}, {"bin/sh": "busybox"})
    config = _json(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Entrypoint": ["/bin/busybox"], "Env": ["PATH=/bin", f"IMAGE={name}"]},
            "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
        }
    )
    kind = "application/vnd.oci.image"
    manifest = _json(
        {
            "schemaVersion": 2,
            "mediaType": f"{kind}.manifest.v1+json",
            "config": _descriptor(f"{kind}.config.v1+json", config),
            "layers": [_descriptor(f"{kind}.layer.v1.tar", layer)],
        }
    )
    top = _descriptor(f"{kind}.manifest.v1+json", manifest)
    index = {"schemaVersion": 2, "manifests": [{**top, "annotations": {"io.containerd.image.name": name}}]}
    blobs = {f"blobs/sha256/{_digest(blob)[7:]}": blob for blob in (config, manifest, layer)}
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(_tar({"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "index.json": _json(index), **blobs}))
    return target


def _tar(files: dict[str, bytes | None], links: dict[str, str] | None = None) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name.rstrip("/"))
            info.type, info.mode, info.size = (
                (tarfile.REGTYPE, 0o755, len(data)) if data is not None else (tarfile.DIRTYPE, 0o1777, 0)
            )
            tar.addfile(info, io.BytesIO(data or b""))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    return out.getvalue()


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _descriptor(kind: str, data: bytes) -> dict[str, Any]:
    return {"mediaType": kind, "digest": _digest(data), "size": len(data)}


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


# ---- objects

_SERVE = (
    "busybox mkdir -p /tmp/www && echo $NODE >/tmp/www/index.html && echo serving on $NODE"
    " && exec busybox httpd -f -p 8080 -h /tmp/www"
)


def pod(command: str, **fields: Any) -> dict[str, Any]:
    """A pod's spec: one container that runs a shell line, and knows its node as $NODE."""
    node = {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}
    mounts = fields.pop("mounts", [])
    container = {"name": "main", "image": IMAGE, "command": ["/bin/sh", "-c", command], "env": [node]}
    return {"containers": [{**container, "volumeMounts": mounts}], "terminationGracePeriodSeconds": 0, **fields}


def web() -> list[dict[str, Any]]:
    """A pod on every worker that answers with its node's name, behind a ClusterIP and a NodePort."""
    labels = {"app": "web"}
    daemons = {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {"name": "web"},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod(_SERVE)},
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web"},
        "spec": {"type": "NodePort", "selector": labels, "ports": [{"port": 80, "targetPort": 8080, "nodePort": PORT}]},
    }
    return [daemons, service]


def on_storage(value: str, replicas: int = 3) -> dict[str, Any]:
    """Pods that ask for the storage label."""
    labels = {"app": "on-storage"}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "on-storage"},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": pod("exec busybox sleep 100000", nodeSelector={STORAGE: value}),
            },
        },
    }


def claim(storage_class: str) -> list[dict[str, Any]]:
    """A claim for a baked local volume."""
    return [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "data"},
            "spec": {
                "accessModes": ["ReadWriteOnce"],
                "storageClassName": storage_class,
                "resources": {"requests": {"storage": "1Gi"}},
            },
        }
    ]


def with_claim(name: str, command: str) -> dict[str, Any]:
    """A pod that runs once with the claimed volume at /data."""
    spec = pod(
        command,
        restartPolicy="Never",
        mounts=[{"name": "data", "mountPath": "/data"}],
        volumes=[{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}],
    )
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}
