"""What the kubelet and those beside an API server wait for it with: when it is content, and how often it asks."""

from __future__ import annotations

import http.client
import importlib.machinery
import importlib.util
import random
import ssl
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from recipes.kit import overlay

sys.dont_write_bytecode = True  # the overlays' folder is baked as it is

NOBODY = None


def program() -> ModuleType:
    path = str(overlay.OVERLAYS / "worker/usr/local/lib/nodebake/wait-for-api")
    loader = importlib.machinery.SourceFileLoader("wait_for_api", path)
    spec = importlib.util.spec_from_loader("wait_for_api", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


class Server:
    """Answers with these statuses, or 200 and these bodies, one after the other; NOBODY: the connection is refused."""

    def __init__(self, *answers: int | str | None) -> None:
        self.left = list(answers)
        self.path = "/readyz"
        self.asked: list[tuple[str, int, dict[str, str]]] = []
        self.pauses: list[float] = []
        self.closed = 0

    def connection(self, host: str, port: int, **_: object) -> Connection:
        return Connection(self, host, port)


class Connection:
    def __init__(self, server: Server, host: str, port: int) -> None:
        self._server, self._host, self._port = server, host, port

    def request(self, method: str, path: str, headers: dict[str, str]) -> None:
        assert (method, path) == ("GET", self._server.path)
        self._server.asked.append((self._host, self._port, headers))
        if self._server.left[0] is NOBODY:
            self._server.left.pop(0)
            raise ConnectionRefusedError

    def getresponse(self) -> Answer:
        told = self._server.left.pop(0)
        assert told is not None
        return Answer(200, told) if isinstance(told, str) else Answer(told)

    def close(self) -> None:
        self._server.closed += 1


class Answer:
    def __init__(self, status: int, body: str = "") -> None:
        self.status, self._body = status, body

    def read(self) -> bytes:
        return self._body.encode()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.setattr(ssl, "create_default_context", lambda cafile: None)
    monkeypatch.setattr(random, "uniform", lambda low, high: 1.0)
    module = program()
    monkeypatch.setattr(module, "JOINED", tmp_path / "joined.pem")
    monkeypatch.setattr(module, "BOOTSTRAP", tmp_path / "bootstrap.conf")
    monkeypatch.setattr(module, "FLANNELD", tmp_path / "flanneld.conf")
    return module


def ask(waits: ModuleType, monkeypatch: pytest.MonkeyPatch, server: Server, *words: str) -> list[float]:
    """The pauses between its questions, until it is content."""
    monkeypatch.setattr(http.client, "HTTPSConnection", server.connection)
    monkeypatch.setattr(time, "sleep", server.pauses.append)
    waits.main(list(words))
    assert server.left == []
    return server.pauses


def bootstrap(waits: ModuleType, server: str) -> None:
    waits.BOOTSTRAP.write_text(f'clusters:\n  - cluster:\n      server: "{server}"\nuser:\n  token: "abc.def"\n')


def test_the_own_api_server_is_asked_often(waits: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(*[NOBODY] * 99, 403, *[500] * 99, 200)
    pauses = ask(waits, monkeypatch, server)
    assert server.asked[-1] == ("127.0.0.1", 6443, {})
    assert pauses[:2] == pauses[99:101] == pytest.approx([0.1, 0.105])
    assert (max(pauses[:99]), max(pauses)) == (0.5, 1), "it may be hours until the others of etcd are there"
    assert server.closed == 99, "a connection that works is kept"


def test_who_has_joined_waits_for_nothing(waits: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    waits.JOINED.write_bytes(certificate(timedelta(hours=1)))
    assert ask(waits, monkeypatch, Server(), "token") == []


def test_a_certificate_that_ended_while_the_machine_was_off_is_none(
    waits: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits.JOINED.write_bytes(certificate(timedelta(hours=-1)))
    bootstrap(waits, "https://192.168.10.9:6443")
    assert len(ask(waits, monkeypatch, Server(401, 200), "token")) == 1


def certificate(left: timedelta) -> bytes:
    """With its key, as the kubelet keeps them."""
    key, name, now = ec.generate_private_key(ec.SECP256R1()), x509.Name([]), datetime.now(UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(days=1), now + left)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return made.sign(key, SHA256()).public_bytes(Encoding.PEM) + pem


def test_a_token_that_is_not_known_is_tried_ever_more_seldom(
    waits: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    bootstrap(waits, "https://192.168.10.9:6443")
    server = Server(*[401] * 40, 200)
    pauses = ask(waits, monkeypatch, server, "token")
    assert server.asked[-1] == ("192.168.10.9", 6443, {"Authorization": "Bearer abc.def"})
    assert pauses[0] == 0.25 and pauses == sorted(pauses) and pauses[-1] == 5
    assert server.closed == sum(pause > 1 for pause in pauses), "asked seldom, another API server may answer"


def test_a_token_that_stays_unknown_is_told_once(
    waits: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bootstrap(waits, "https://192.168.10.9:6443")
    server = Server(*[401] * 10, 200)
    monkeypatch.setattr(time, "monotonic", lambda: 1 + sum(server.pauses))
    assert sum(ask(waits, monkeypatch, server, "token")) < 60
    assert capsys.readouterr().out == "", "control planes may be at it"
    server.left = [*[401] * 60, 200]
    ask(waits, monkeypatch, server, "token")
    assert capsys.readouterr().out.count("does not know this machine's token") == 1


def test_once_somebody_is_there_it_is_asked_often_again(waits: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines may be switched on hours before the API is there; then it cannot be long until the token is known."""
    bootstrap(waits, "https://127.0.0.1:6443")
    own = ask(waits, monkeypatch, Server(*[NOBODY] * 99, 401, 401, 200), "token")
    assert max(own) == own[98] == 0.5, "a question to one's own balancer stays on this machine"
    assert own[99:] == [0.25, 0.3]
    bootstrap(waits, "https://192.168.10.9:6443")
    others = ask(waits, monkeypatch, Server(*[NOBODY] * 99, 401, 200), "token")
    assert max(others) == others[98] == 5, "thousands ask that one"
    assert others[99:] == [0.25]


def test_flanneld_waits_for_the_kubelet_and_then_for_the_nodes_part_of_the_pod_network(
    waits: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Path] = []
    monkeypatch.setattr(ssl, "create_default_context", lambda cafile: Context(loaded))
    monkeypatch.setenv("NODE_NAME", "worker-1")
    waits.FLANNELD.write_text('clusters:\n  - cluster:\n      server: "https://127.0.0.1:6443"\n')
    server = Server(NOBODY, 404, '{"spec": {}}', '{"spec": {"podCIDR": "10.244.1.0/24"}}')
    server.path = "/api/v1/nodes/worker-1"

    class Pauses(list[float]):
        def append(self, pause: float) -> None:
            super().append(pause)
            if len(self) == 2:
                waits.JOINED.write_text("")
            elif len(self) == 4:
                waits.JOINED.write_text("here")

    server.pauses = Pauses()
    assert ask(waits, monkeypatch, server, "subnet") == [0.2, 0.2, 0.2, 0.2, 0.25, 0.25, 0.3]
    assert loaded == [waits.JOINED]


class Context:
    def __init__(self, loaded: list[Path]) -> None:
        self._loaded = loaded

    def load_cert_chain(self, path: Path) -> None:
        assert path.stat().st_size
        self._loaded.append(path)
