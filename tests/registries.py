"""OCI registries on the loopback: a small one that fails as told, and the CNCF's own, built once from its Go module."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import requests
import yaml

from recipes.kit.gotool import find_go
from recipes.kit.locks import locked
from tests.servers import answering

BUILD = Path(__file__).parents[1] / "build" / "tests" / "registry"
MODULE = "github.com/distribution/distribution/v3@v3.1.2"
SUM = "h1:/Bv2YIqqSR00HiO49FT93hovy6r9IlrzwUDsJjCN5qg="  # as in a go.sum; the module's own pins the rest
USER, PASSWORD = "desk", "geheim-4711"
HTPASSWD = f"{USER}:$2b$05$abcdefghijklmnopqrstuuI9Ve74svfU50aEQdy91gepBOB8Ceywa\n"  # bcrypt of the password


@contextmanager
def cncf(
    folder: Path, *, tls: tuple[Path, Path] | None = None, auth: dict[str, dict[str, str]] | None = None
) -> Iterator[str]:
    """Its host:port while it lasts; what it keeps lies below the folder."""
    http: dict[str, object] = {"addr": "127.0.0.1:0", "secret": "one"}
    if tls is not None:
        http["tls"] = {"certificate": str(tls[0]), "key": str(tls[1])}
    storage = {"filesystem": {"rootdirectory": str(folder / "storage")}}
    config = {"version": "0.1", "storage": storage, "http": http, **({"auth": auth} if auth else {})}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yml").write_text(yaml.safe_dump(config))
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(
            [obtain(), "serve", folder / "config.yml"],
            stdout=log,
            stderr=log,
            env={**os.environ, "OTEL_TRACES_EXPORTER": "none"},
        ) as process,
    ):
        try:
            while not (told := re.search(r"listening on (127\.0\.0\.1:\d+)", (folder / "log").read_text())):
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.1)
            yield told[1]
        finally:
            process.terminate()


def obtain() -> Path:
    """The program, made now if it is not there."""
    go = str(find_go().program)
    made = BUILD / MODULE.rpartition("@")[2]
    BUILD.mkdir(parents=True, exist_ok=True)
    with locked(BUILD / "lock"):
        if not made.exists():
            told = subprocess.run([go, "mod", "download", "-json", MODULE], check=True, capture_output=True).stdout
            module = json.loads(told)
            assert module["Sum"] == SUM, f"{MODULE} is not as pinned: {module['Sum']}"
            part = made.with_suffix(".part")
            command = [go, "build", "-C", module["Dir"], "-trimpath", "-buildvcs=false", "-o", part, "./cmd/registry"]
            subprocess.run(command, check=True, env={**os.environ, "CGO_ENABLED": "0"})
            part.rename(made)
    return made


@dataclass
class Small:
    """What a registry has, and how it fails: `broken` has for each PATCH to come after how many bytes its connection
    breaks off (None: never); `refusing` the statuses of the next requests."""

    host: str = ""
    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, bytes] = field(default_factory=dict)
    uploads: dict[str, bytearray] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    broken: list[int | None] = field(default_factory=list)
    refusing: list[int] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Http

    def handle_one(self) -> None:
        here = self.server.small
        url = urlsplit(self.path)
        here.requests.append((self.command, url.path))
        body = int(self.headers.get("Content-Length", "0"))
        if here.refusing:
            self.rfile.read(body)
            self.answer(here.refusing.pop(0), body=b'{"errors": [{"code": "NO", "message": "as told"}]}')
            return
        found = re.fullmatch(r"/v2/(.+)/(blobs/uploads|blobs|manifests)/(.*)", url.path)
        assert found, url.path
        _, kind, name = found.groups()
        if kind == "blobs/uploads":
            self.upload(url.path, name, body, parse_qs(url.query))
        elif self.command == "PUT":
            here.manifests[name] = self.rfile.read(body)
            self.answer(201)
        else:
            there = (here.blobs if kind == "blobs" else here.manifests).get(name)
            self.answer(404 if there is None else 200, body=there or b"")

    do_GET = do_HEAD = do_POST = do_PATCH = do_PUT = handle_one

    def upload(self, path: str, name: str, body: int, query: dict[str, list[str]]) -> None:
        here = self.server.small
        if self.command == "POST":
            name = str(len(here.uploads))
            here.uploads[name] = bytearray()
            self.answer(202, Location=f"{path}{name}?state=0")
            return
        there = here.uploads[name]
        assert self.command == "GET" or query["state"] == [str(len(there))], "a place is good for once"
        if self.command == "PATCH":
            start, end = map(int, self.headers["Content-Range"].split("-"))
            assert (start, end) == (len(there), len(there) + body - 1)
            stop = here.broken.pop(0) if here.broken else None
            there += self.rfile.read(body if stop is None else min(stop, body))
            if stop is not None:
                self.close_connection = True
                self.connection.close()
                return
        elif self.command == "PUT":
            [digest] = query["digest"]
            if digest != f"sha256:{sha256(there).hexdigest()}":
                self.answer(400, body=b'{"errors": [{"code": "DIGEST_INVALID"}]}')
                return
            here.blobs[digest] = bytes(there)
        end = max(len(there) - 1, 0)
        code = {"PATCH": 202, "GET": 204, "PUT": 201}[self.command]
        self.answer(code, Location=f"{path}?state={len(there)}", Range=f"0-{end}")

    def answer(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    small: Small


@contextmanager
def small() -> Iterator[Small]:
    http = _Http(("127.0.0.1", 0), _Handler)
    http.small = Small(f"127.0.0.1:{http.server_address[1]}")
    with answering(http):
        yield http.small


def get(url: str, **headers: str) -> bytes:
    answer = requests.get(url, timeout=30, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.content
