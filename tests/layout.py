"""A baked machine's files laid out under a temporary folder, and its units' real command lines run there.

Absolute paths in files and command lines are moved under the folder, the machine's loopback addresses to others of
127.0.0.0/8, so that several tests, and whatever else the desk runs, do not meet on a port.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from recipes import certificates, objects, tokens
from recipes.kit import overlay, store
from recipes.kit.model import Cluster, File, Node, Role
from tests import samples

IMAGES = {"pause": "registry.k8s.io/pause:3.10.2", "coredns": "registry.k8s.io/coredns/coredns:v1.14.6"}
MINTED, INSTALL_BY = "2026-11-23T12:00:00Z", "2027-02-21T12:00:00Z"
_PATHS = re.compile(r"(?<![\w./@-])/(etc|var|run|usr/local)(?=/)")
ADVERTISED = "--advertise-address="
_BIN = "/opt/nodebake/current/bin/"


def payload(cluster: Cluster, role: Role) -> list[File]:
    return overlay.payload(cluster, role, "amd64", IMAGES)


def identity(cluster: Cluster, node: Node) -> list[File]:
    return overlay.identity(cluster, node, minted=MINTED, install_by=INSTALL_BY)


def on_loopback(cluster: Cluster, seed: int) -> Cluster:
    """The same cluster with its machines in a 127.x.y.0/24 of its own."""
    octets = f"127.{seed // 250 % 250 + 1}.{seed % 250 + 1}"
    nodes = tuple(
        node._replace(
            network=node.network._replace(addresses=(samples.address(f"{octets}.{node.address.packed[3]}/24"),)),
        )
        for node in cluster.nodes
    )
    return replace(cluster, nodes=nodes)


class Layout:
    """One machine under a folder. node: of the cluster, as made by on_loopback()."""

    def __init__(self, root: Path, cluster: Cluster, node: Node, binaries: Path | None = None) -> None:
        self.root, self.cluster, self.node, self.binaries = root, cluster, node, binaries
        self.localhost = str(node.network.addresses[0].network[250])  # instead of 127.0.0.1
        named = self._named_by_localhost()
        secrets = store.open(root.parent / "secrets", named, now=datetime.now(tz=UTC))
        files = [
            *payload(cluster, node.role),
            *identity(cluster, node),
            *certificates.for_node(named, next(one for one in named.nodes if one.name == node.name), secrets),
        ]
        if node.runs_kubelet:
            files.append(tokens.bootstrap_kubeconfig(cluster, node, secrets))
        if node.role == "control-plane":
            keys = {number: secrets.encryption_keys[number] for number in cluster.encryption_keys}
            encryption = objects.document([objects.encryption_configuration(keys)])
            files.append(File("/etc/kubernetes/encryption.yaml", data=encryption, mode=0o600))
        for file in files:
            if file.data is not None:
                self._put(file)
        for unit in self.path("/etc/systemd/system").glob("*.service"):
            for name, source in re.findall(r"^LoadCredential=(.*):(.*)$", unit.read_text(), re.MULTILINE):
                self._put(File(f"/run/credentials/{unit.name}/{name}", data=Path(source).read_bytes(), mode=0o600))
        for folder in ("var/lib", "var/log/kubernetes", "run/kube-apiserver", "var/lib/etcd"):
            (root / folder).mkdir(parents=True, exist_ok=True, mode=0o700)

    def _named_by_localhost(self) -> Cluster:
        """API servers and etcd members are asked by that address here, so certificates have to name it."""
        interface = samples.address(f"{self.localhost}/24")
        nodes = tuple(
            node._replace(network=node.network._replace(addresses=(*node.network.addresses, interface)))
            if node.name == self.node.name
            else node
            for node in self.cluster.nodes
        )
        return replace(self.cluster, nodes=nodes, cert_sans=(*self.cluster.cert_sans, self.localhost))

    def _put(self, file: File) -> None:
        assert file.data is not None
        path = self.path(file.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.data if b"PRIVATE KEY" in file.data else self.moved(file.data.decode()).encode())
        path.chmod(file.mode)

    def path(self, name: str) -> Path:
        return self.root / name.lstrip("/")

    def moved(self, text: str) -> str:
        return _PATHS.sub(rf"{self.root}/\1", text).replace("127.0.0.1", self.localhost)

    @property
    def environment(self) -> dict[str, str]:
        lines = self.path("/etc/nodebake/node.env").read_text().splitlines()
        return dict(word.split("=", 1) for line in lines for word in shlex.split(line, comments=True))

    def command(self, unit: str) -> list[str]:
        """The unit's ExecStart as it is run here: variables filled in as systemd does, paths moved."""
        text = self.path(f"/etc/systemd/system/{unit}").read_text().replace("\\\n", " ")
        (line,) = re.findall(r"^ExecStart=(.*)$", text, re.MULTILINE)
        line = line.replace("%d/", f"{self.root}/run/credentials/{unit}/")
        env = self.environment
        words = [re.sub(r"\$\{(\w+)\}", lambda found: env[found[1]], word) for word in shlex.split(line)]
        assert "%" not in "".join(words)
        if words[0].startswith(_BIN) and self.binaries is not None:
            words[0] = str(self.binaries / words[0].removeprefix(_BIN))
        # An address on which nobody listens may be advertised, one of 127.0.0.0/8 may not.
        words = [f"{ADVERTISED}192.0.2.1" if word.startswith(ADVERTISED) else word for word in words]
        return [word.replace("0.0.0.0", self.localhost) for word in words]  # noqa: S104

    @contextmanager
    def running(self, unit: str, *more: str, path: str | None = None) -> Iterator[Running]:
        log = self.root / f"{unit}.log"
        with log.open("wb") as out:
            environment = {**os.environ, **self.environment}
            if path is not None:
                environment["PATH"] = path
            process = subprocess.Popen(
                [*self.command(unit), *more], stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=self.root
            )
        try:
            yield Running(process, log)
        finally:
            process.kill()
            process.wait()


class Running:
    """A daemon and what it has said."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self._log = process, log

    @property
    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def until(self, pattern: str, seconds: float = 60) -> str:
        """Waits until it has said so; fails with all that it said."""
        return self.until_true(lambda: re.search(pattern, self.said) is not None, f"said {pattern!r}", seconds)

    def until_true(self, check: Callable[[], bool], what: str, seconds: float = 60) -> str:
        deadline = time.monotonic() + seconds
        while not check():
            ended = self.process.poll() is not None
            if check():
                break
            if ended or time.monotonic() > deadline:
                raise AssertionError(
                    f"{self.process.args!r} never {what} (exit {self.process.poll()}):\n{self.said[-4000:]}"
                )
            time.sleep(0.1)
        return self.said
