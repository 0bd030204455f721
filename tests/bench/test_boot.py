"""What is made of the times that were seen, and the program that sees them. No machine is booted, no time asserted."""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.bench import boot, watcher
from tests.bench.boot import Boots, Watch


def journal(*moments: float) -> list[tuple[float, str]]:
    """One that reaches each mark at its moment."""
    texts = [f"{text} and more" for text in boot.MARKS.values()]
    return [(0.5, "something else"), *zip(moments, texts, strict=True)]


def test_a_step_ends_with_its_last_machine() -> None:
    fast, slow = journal(11, 12, 13, 14, 15, 16, 17, 18), journal(12, 14, 15, 19, 20, 21, 22, 23)
    steps = boot.steps_of(10.0, [fast, slow], [("API", 30.0), ("a", 33.0), ("b", 40.0)])
    assert list(steps.values()) == [2, 2, 1, 4, 1, 1, 1, 1, 7, 10]
    assert sum(steps.values()) == 40 - 10


def test_a_mark_that_is_not_there_costs_its_step_no_time() -> None:
    lines = [line for line in journal(11, 12, 13, 14, 15, 16, 17, 18) if "making folders" not in line[1]]
    steps = boot.steps_of(10.0, [lines], [("API", 30.0), ("a", 33.0)])
    assert steps["place"] == 0 and steps["users, modules, sysctl"] == 2 and sum(steps.values()) == 23


def test_an_api_that_is_ready_before_the_last_unit_is_started_takes_no_time_of_its_own() -> None:
    lines = journal(11, 12, 13, 14, 15, 16, 17, 18)
    steps = boot.steps_of(10.0, [lines], [("API", 17.5), ("a", 33.0)])
    assert steps[boot.API] == 0 and steps[boot.READY] == 15 and sum(steps.values()) == 23


def test_the_table_has_medians() -> None:
    steps = {"one": 1.0, "two": 2.0}
    work = [(16.0, 9.0), (15.0, 10.0), (14.0, 11.0)]
    boots = {name: Boots([20.0, 90.0, 26.0], [20.0, 10.0, 30.0], work, [steps] * 3) for name in boot.CLUSTERS}
    text = boot.markdown(*boot.summed_up(boots), boot.processor(boots), 3, "a desk")
    assert "| power-on to all Ready, one machine | 26.00 s | 20.00 s (its components started by hand) | 1.30x |" in text
    assert "| two | 2.00 s | 2.00 s |" in text
    assert "- single: 15.0 s of processor until all are Ready, by hand 10.0 s: 1.50x" in text


def test_the_watch_waits_for_names(tmp_path: Path) -> None:
    told = tmp_path / "told"
    told.write_text("API 1.5\nTraceback (most recent call last):\nb 2.5\n")
    threading.Timer(0.3, lambda: told.write_text("API 1.5\nb 2.5\na 3.5\n")).start()
    assert Watch(told).wait({"a", "b"}) == [("API", 1.5), ("b", 2.5), ("a", 3.5)]


class Api(BaseHTTPRequestHandler):
    """Not ready at first; then a watch that ends once and goes on the next time."""

    asked = 0
    watched = 0

    def do_GET(self) -> None:
        if self.path == "/readyz":
            Api.asked += 1
            self.send_response(500 if Api.asked < 3 else 200)
            self.end_headers()
            return
        assert self.path == "/api/v1/nodes?watch=true"
        Api.watched += 1
        self.send_response(200)
        self.end_headers()
        for name, ready in [("a", "False"), ("a", "True")] if Api.watched == 1 else [("a", "True"), ("b", "True")]:
            status = {"conditions": [{"type": "Ready", "status": ready}]}
            event = {"type": "MODIFIED", "object": {"metadata": {"name": name}, "status": status}}
            self.wfile.write(json.dumps(event).encode() + b"\n")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.97 that signs itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "api")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.97"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    encoding, private = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (tmp_path / "crt").write_bytes(certificate.public_bytes(encoding))
    (tmp_path / "key").write_bytes(key.private_bytes(encoding, private, serialization.NoEncryption()))
    return tmp_path / "crt", tmp_path / "key"


@pytest.fixture
def api(pair: tuple[Path, Path]) -> Iterator[None]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*pair)
    with HTTPServer(("127.0.0.97", 6443), Api) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield
        server.shutdown()


def test_the_watcher_tells_each_thing_once(
    api: None, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """One control plane does not answer; the other's API is not ready at first, and ends the watch in between."""
    before = time.time()
    watcher.main(str(pair[0]), str(pair[0]), str(pair[1]), "2", "127.0.0.96", "127.0.0.97")
    told = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [what for what, _ in told] == ["API", "a", "b"]
    moments = [float(moment) for _, moment in told]
    assert before <= moments[0] <= moments[1] <= moments[2] <= time.time()
