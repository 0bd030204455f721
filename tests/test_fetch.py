"""How first boot fetches a payload: its own function, run by a real shell, from servers that behave as told."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import servers
from tests.servers import Server, body, status
from tests.test_first_boot import DAMAGED, MISSING, PROGRAM

DATA = bytes(range(256)) * 20_000  # 5 MB
SHA256 = hashlib.sha256(DATA).hexdigest()
PATH = "/worker-amd64.tar.gz"
HALF = len(DATA) // 2


@dataclass
class Client:
    server: Server
    file: Path

    def fetch(
        self, *, sha256: str = SHA256, size: int = len(DATA), after: int = 0, tries: int = 3, url: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Hardly waiting between its tries."""
        text = PROGRAM.read_text().removesuffix('main "$@"\n')
        text = text.replace("TRIES = 10", f"TRIES = {tries}").replace("LONGEST = 60.0", "LONGEST = 0.01")
        words = ["fetch", url or self.server.url + PATH, sha256, str(size), str(after), str(self.file)]
        return subprocess.run(["sh", "-c", f"{text}\n{' '.join(words)}"], capture_output=True, text=True, timeout=60)

    @property
    def ranges(self) -> list[str | None]:
        return [headers.get("Range") for _, headers in self.server.requests]


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    with servers.serving() as server:
        yield Client(server, tmp_path / "payload")


def test_a_payload_is_fetched_in_one_piece(client: Client) -> None:
    client.server.answers[PATH] = [body(DATA)]
    done = client.fetch()
    assert (done.returncode, done.stderr, client.file.read_bytes()) == (0, "", DATA)
    assert client.ranges == [None]


def test_what_broke_off_goes_on_where_it_was(client: Client) -> None:
    client.server.answers[PATH] = [body(DATA, cut=HALF), body(DATA, cut=100), body(DATA)]
    done = client.fetch()
    assert done.returncode == 0 and client.file.read_bytes() == DATA
    assert client.ranges == [None, f"bytes={HALF}-", f"bytes={HALF + 100}-"]
    assert f"broke off after {HALF} of {len(DATA)} bytes; trying again in" in done.stderr


def test_what_an_earlier_run_has_left_is_taken_up(client: Client) -> None:
    """As after a power cut; a payload that had come whole is not asked for again."""
    client.server.answers[PATH] = [body(DATA)]
    client.file.write_bytes(DATA[:HALF])
    assert client.fetch().returncode == 0 and client.file.read_bytes() == DATA
    assert client.fetch().returncode == 0
    assert client.ranges == [f"bytes={HALF}-"]


def test_a_server_without_ranges_sends_all_of_it_again(client: Client) -> None:
    client.server.answers[PATH] = [body(DATA, cut=HALF), body(DATA, ranges=False)]
    assert client.fetch().returncode == 0 and client.file.read_bytes() == DATA


@pytest.mark.parametrize("left", [b"x" * HALF, b"x" * len(DATA), b"x" * (len(DATA) + 1)], ids=["half", "all", "more"])
def test_a_piece_that_does_not_fit_is_fetched_anew(client: Client, left: bytes) -> None:
    client.server.answers[PATH] = [body(DATA)]
    client.file.write_bytes(left)
    done = client.fetch()
    assert done.returncode == 0 and client.file.read_bytes() == DATA
    assert client.ranges[-1] is None


def test_a_server_that_has_less_than_had_come_is_asked_for_all(client: Client) -> None:
    client.server.answers[PATH] = [status(416), body(DATA)]
    client.file.write_bytes(DATA[:HALF])
    assert client.fetch().returncode == 0 and client.file.read_bytes() == DATA


WRONG = {
    "other bytes": (body(DATA[:-1] + b"x"), f"the server has other bytes (SHA-256 {'[0-9a-f]' * 64}) than were baked"),
    "fewer bytes": (body(DATA[:-1]), f"the server has {len(DATA) - 1} bytes, {len(DATA)} were baked"),
    "more bytes": (body(DATA + b"x"), f"the server has {len(DATA) + 1} bytes, {len(DATA)} were baked"),
}


@pytest.mark.parametrize("which", WRONG)
def test_wrong_bytes_are_told_and_not_kept(client: Client, which: str) -> None:
    answer, said = WRONG[which]
    client.server.answers[PATH] = [answer]
    done = client.fetch()
    assert done.returncode == DAMAGED and "put this bake's payload there (doit publish" in done.stderr
    assert said.partition("[")[0] in done.stderr
    assert not client.file.exists() and len(client.server.requests) == 1


def test_a_server_that_is_busy_is_asked_again(client: Client) -> None:
    client.server.answers[PATH] = [status(503, Retry_After="0"), status(429), status(500), body(DATA)]
    done = client.fetch(tries=5)
    assert done.returncode == 0 and client.file.read_bytes() == DATA
    assert "the server says 503 Service Unavailable; trying again in" in done.stderr


@pytest.mark.parametrize(
    ("code", "asked", "said"),
    [
        (503, 3, "the server says 503 Service Unavailable"),
        (404, 1, "the server says 404 Not Found"),
        (401, 1, "the server says 401 Unauthorized: machines have no password for it"),
    ],
)
def test_what_is_not_to_be_had_is_told(client: Client, code: int, asked: int, said: str) -> None:
    client.server.answers[PATH] = [status(code)]
    done = client.fetch()
    assert done.returncode == MISSING and f"cannot be fetched from {client.server.url}{PATH}: {said}" in done.stderr
    assert len(client.server.requests) == asked and not client.file.exists()


def test_a_server_that_is_away_is_told(client: Client) -> None:
    with servers.serving() as gone:
        url = gone.url + PATH
    done = client.fetch(url=url)
    assert done.returncode == MISSING and "Connection refused" in done.stderr
    assert done.stderr.count("trying again") == 2


def test_what_came_is_kept_for_the_next_run(client: Client) -> None:
    client.server.answers[PATH] = [body(DATA, cut=HALF), status(503)]
    assert client.fetch().returncode == MISSING
    assert client.file.read_bytes() == DATA[:HALF]


def test_a_full_disk_is_told(client: Client) -> None:
    client.server.answers[PATH] = [body(DATA)]
    client.file.symlink_to("/dev/full")
    done = client.fetch()
    assert done.returncode == 73 and "No space left on device" in done.stderr, done.stderr


def test_tls_needs_no_authority_since_every_byte_is_checked(tmp_path: Path) -> None:
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=x -days 1 -keyout k -out c"
    )
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    with servers.serving(tls=(tmp_path / "c", tmp_path / "k")) as server:
        server.answers[PATH] = [body(DATA)]
        client = Client(server, tmp_path / "payload")
        assert client.fetch().returncode == 0 and client.file.read_bytes() == DATA


def test_no_proxy_is_asked(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    client.server.answers[PATH] = [body(DATA)]
    assert client.fetch().returncode == 0


def test_a_machine_begins_when_its_time_has_come(client: Client) -> None:
    """Counted from when it was switched on, so that it waits once; what has begun does not wait."""
    up = float(Path("/proc/uptime").read_text().split()[0])
    client.server.answers[PATH] = [body(DATA)]
    done = client.fetch(after=int(up) + 2)
    assert "so that not all machines fetch at once" in done.stderr and client.file.read_bytes() == DATA
    assert client.fetch(after=int(up) + 900).stderr == ""
    client.file.unlink()
    assert client.fetch(after=1).stderr == ""
