"""Small stand-ins for binaries, images and packages, so that whole artifacts can be made in milliseconds."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from datetime import UTC, datetime
from pathlib import Path

from recipes import node as nodes
from recipes import payload
from recipes.kit import distribution, store
from recipes.kit.model import Arch, Cluster, Fetched, File, Image, Node, Origin
from recipes.kit.progress import Lines

NOW = datetime(2026, 11, 1, 12, 0, tzinfo=UTC)
MTIME = 1_790_000_000
PROGRAMS = (
    "kube-apiserver kube-controller-manager kube-scheduler kube-proxy kubelet kubectl etcd etcdctl etcdutl containerd"
    " containerd-shim-runc-v2 ctr runc crictl flanneld"
)
PACKAGES = {
    "haproxy": ["usr/sbin/haproxy"],
    "keepalived": ["usr/sbin/keepalived"],
    "openssl": ["usr/bin/openssl"],
    "nftables": ["usr/sbin/nft"],
    "python3-minimal": ["usr/bin/python3"],
}


class Parts:
    """Binaries, images and packages of one architecture in a folder."""

    def __init__(self, folder: Path, arch: Arch = "amd64") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.arch = folder, arch
        self.binaries = {
            "kubernetes": [self.binary(name) for name in PROGRAMS.split()],
            "cni-plugins": [
                self.binary(name, "cni-plugins") for name in ("bridge", "host-local", "loopback", "portmap")
            ],
        }
        self.images = [
            self.image("pause", "nodebake.local/pause:3.10.2"),
            self.image("coredns", "nodebake.local/coredns:v1"),
        ]
        self.packages = [self.package(name, paths) for name, paths in PACKAGES.items()]

    def fetched(self, name: str, data: bytes, component: str, version: str = "v1.2.3") -> Fetched:
        digest = hashlib.sha256(data).hexdigest()
        path = self.folder / digest
        path.write_bytes(data)
        return Fetched(name, path, digest, len(data), Origin(component, version, "release"))

    def binary(self, name: str, component: str = "kubernetes", machine: int | None = None) -> Fetched:
        number = machine or {"amd64": 62, "arm64": 183}[self.arch]
        head = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00" + number.to_bytes(2, "little")
        return self.fetched(name, head + name.encode() * 100, component)

    def image(self, name: str, reference: str | None, arch: str | None = None) -> Image:
        config = json.dumps({"architecture": arch or self.arch}).encode()
        manifest = json.dumps({"config": {"digest": "sha256:c"}, "layers": []}).encode()
        annotations = {"io.containerd.image.name": reference} if reference else {}
        index = json.dumps({"manifests": [{"digest": "sha256:m", "annotations": annotations}]}).encode()
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as tar:
            for path, data in (("blobs/sha256/c", config), ("blobs/sha256/m", manifest), ("index.json", index)):
                info = tarfile.TarInfo(path)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return Image(name, reference or "", self.fetched(f"{name}.tar", out.getvalue(), name))

    def package(self, name: str, paths: list[str]) -> Fetched:
        root = self.folder / f"{name}.root"
        (root / "DEBIAN").mkdir(parents=True)
        (root / "DEBIAN").chmod(0o755)
        control = f"Package: {name}\nVersion: 1\nArchitecture: {self.arch}\nMaintainer: nobody\nDescription: stand-in\n"
        (root / "DEBIAN" / "control").write_text(control)
        sums = ""
        for path in paths:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(b"")
            sums += f"{hashlib.md5(b'', usedforsecurity=False).hexdigest()}  {path}\n"
        (root / "usr" / "bin").mkdir(parents=True, exist_ok=True)
        (root / "usr" / "bin" / f"{name}-linked").symlink_to("elsewhere")
        (root / "DEBIAN" / "md5sums").write_text(sums)
        made = self.folder / f"{name}_1_{self.arch}.deb"
        subprocess.run(["dpkg-deb", "-Zxz", "-b", root, made], check=True, stdout=subprocess.DEVNULL)
        return self.fetched(made.name, made.read_bytes(), name, "1")

    def payload(self, cluster: Cluster, node: Node) -> list[File]:
        return payload.files(cluster, node.role, node.arch, self.binaries, self.images, self.packages)

    @property
    def references(self) -> dict[str, str]:
        return {image.name: image.reference for image in self.images}


def secrets(folder: Path, cluster: Cluster) -> store.Secrets:
    return store.open(folder / f"{cluster.name}.secrets", cluster, now=NOW)


def bake(folder: Path, cluster: Cluster, node: Node, parts: Parts, minted: store.Secrets) -> tuple[Path, Path]:
    """(payload tarball, node tarball)"""
    target = folder / "payloads" / f"{node.role}-{node.arch}.tar.gz"
    written = payload.write(
        cluster,
        node.role,
        node.arch,
        parts.payload(cluster, node),
        target,
        mtime=MTIME,
        sign=lambda data: store.sign(minted, data),
        progress=Lines(),
        hashed=True,
    )
    fetch = distribution.fetch(cluster, node, sha256=written.sha256 or "", size=written.size)
    identity = nodes.identity(
        cluster, node, minted, sums=written.sums, fetch=fetch, image=parts.references, generation=7
    )
    tarball = folder / "nodes" / f"{node.name}.tar.gz"
    nodes.write(node, identity, tarball, mtime=MTIME, payload_tarball=target)
    return target, tarball
