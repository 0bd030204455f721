"""How the key that encrypts Secrets in etcd is replaced, step by step as README has it, with a real API server."""

from __future__ import annotations

import base64
import json
import os
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from recipes.kit import pki
from recipes.kit.model import Cluster
from recipes.kit.profiles import KeyPair
from tests import samples
from tests.layout import Layout, on_loopback


class Plane:
    """The one machine of a cluster, its artifact baked with these encryption keys."""

    def __init__(self, root: Path, cluster: Cluster, keys: tuple[int, ...], binaries: Path) -> None:
        cluster = replace(cluster, encryption_keys=keys)
        self.machine = Layout(root, cluster, cluster.nodes[0], binaries)
        folder = self.machine.path("/etc/kubernetes/pki")
        self._trust = ssl.create_default_context(cafile=folder / "kubernetes-ca.crt")
        # Nobody else may read Secrets in a cluster without objects.
        authority = KeyPair(*((folder / f"kubernetes-ca.{end}").read_bytes() for end in ("crt", "key")))
        subject = pki.Subject("tests", "system:masters", server=False, client=True, sans=())
        key, now = pki.new_key("ecdsa-p256"), datetime.now(UTC)
        start, end = now - timedelta(minutes=1), now + timedelta(hours=1)
        certificate = root / "masters.pem"
        certificate.write_bytes(pki.leaf(subject, key, authority, start=start, end=end, serial_seed=b"test") + key)
        self._trust.load_cert_chain(certificate)

    @contextmanager
    def serving(self) -> Iterator[Plane]:
        with self.machine.running("kube-apiserver.service") as running:
            running.until_true(lambda: self.asked("GET", "/readyz")[0] == 200, "ready")
            yield self

    def asked(self, method: str, path: str, body: object = None) -> tuple[int, str]:
        data = None if body is None else json.dumps(body).encode()
        url = f"https://{self.machine.localhost}:6443{path}"
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, context=self._trust, timeout=10) as answer:  # noqa: S310
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)

    def secret(self, name: str) -> Any:
        status, told = self.asked("GET", f"{SECRETS}/{name}")
        assert status == 200, told
        return json.loads(told)

    def stored(self, name: str) -> bytes:
        """What etcd has of it."""
        member, binaries = self.machine.path("/etc/etcd/pki"), self.machine.binaries
        assert binaries is not None
        told = subprocess.run(
            [
                binaries / "etcdctl",
                f"--endpoints=https://{self.machine.localhost}:2379",
                f"--cacert={member / 'etcd-ca.crt'}",
                *(f"--cert={member / 'client.crt'}", f"--key={member / 'client.key'}"),
                *("get", "--print-value-only", f"/registry/secrets/default/{name}"),
            ],
            check=True,
            capture_output=True,
        )
        return told.stdout


SECRETS = "/api/v1/namespaces/default/secrets"
OLD, NEW = b"k8s:enc:secretbox:v1:baked:", b"k8s:enc:secretbox:v1:baked-2:"


def test_a_key_is_replaced_and_no_secret_lost(binaries: Path, tmp_path: Path) -> None:
    cluster = on_loopback(samples.single(), os.getpid() + 2)

    def plane(*keys: int) -> Plane:
        return Plane(tmp_path / "root", cluster, keys, binaries)

    with plane(1).machine.running("etcd.service") as etcd:
        etcd.until("ready to serve client requests")
        with plane(1).serving() as api:
            assert api.asked("POST", SECRETS, {"metadata": {"name": "kept"}, "stringData": {"word": "told"}})[0] == 201
            assert api.stored("kept").startswith(OLD)
        with plane(1, 2).serving() as api:
            assert api.asked("PUT", f"{SECRETS}/kept", api.secret("kept"))[0] == 200
            assert api.stored("kept").startswith(OLD), "others cannot read what the new key writes yet"
        with plane(2).machine.running("kube-apiserver.service") as early:
            early.until("no matching key was found")
        with plane(2, 1).serving() as api:
            assert api.asked("PUT", f"{SECRETS}/kept", api.secret("kept"))[0] == 200
            assert api.stored("kept").startswith(NEW)
        with plane(2).serving() as api:
            assert base64.b64decode(api.secret("kept")["data"]["word"]) == b"told"
