"""Real HTTP servers on the loopback that behave as told."""

from __future__ import annotations

import contextlib
import hashlib
import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Answer = Callable[["Request"], None]


class Request(BaseHTTPRequestHandler):
    """One request; the answers below write to it."""

    protocol_version = "HTTP/1.1"
    server: _Http

    def do_GET(self) -> None:
        told = self.server.told
        told.requests.append((self.path, dict(self.headers)))
        queue = told.answers.get(self.path, [])
        answer = queue.pop(0) if len(queue) > 1 else queue[0] if queue else status(404)
        self.close_connection = True
        answer(self)

    do_HEAD = do_GET

    def do_CONNECT(self) -> None:
        """A proxy's tunnel: to the address that told.tunnel names, whatever the client asked for."""
        told = self.server.told
        told.requests.append((f"CONNECT {self.path}", dict(self.headers)))
        if told.tunnel is None:
            self.send_error(403, "Forbidden")
            return
        with socket.create_connection(told.tunnel) as far:
            self.send_response(200)
            super().end_headers()
            ends = {self.connection: far, far: self.connection}
            while ready := select.select(list(ends), [], [], 10)[0]:
                for end in ready:
                    data = end.recv(65536)
                    if not data:
                        return
                    ends[end].sendall(data)

    def end_headers(self) -> None:
        self.send_header("Connection", "close")
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@dataclass
class Server:
    """answers: path -> what to do, one request after another (the last for all that follow)."""

    url: str = ""
    address: tuple[str, int] = ("", 0)
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    tunnel: tuple[str, int] | None = None

    def paths(self) -> list[str]:
        return [path for path, _ in self.requests]


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    told: Server

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients hang up on purpose here


@contextmanager
def answering(http: ThreadingHTTPServer) -> Iterator[None]:
    """Answers while it lasts."""
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


@contextmanager
def serving(tls: tuple[Path, Path] | None = None) -> Iterator[Server]:
    """A server while it lasts; tls: certificate and key, PEM files."""
    http = _Http(("127.0.0.1", 0), Request)
    if tls is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*tls)
        http.socket = context.wrap_socket(http.socket, server_side=True, do_handshake_on_connect=False)
    port = http.server_address[1]
    http.told = Server(f"{'https' if tls else 'http'}://127.0.0.1:{port}", ("127.0.0.1", port))
    with answering(http):
        yield http.told


def status(code: int, **headers: str) -> Answer:
    """An answer without a file; header names are written with _ for -."""

    def answer(request: Request) -> None:
        request.send_response(code)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.send_header("Content-Length", "0")
        request.end_headers()

    return answer


def body(
    data: bytes,
    *,
    cut: int | None = None,
    stall: threading.Event | None = None,
    length: int | None = None,
    ranges: bool = True,
    etag: str | None = None,
    kind: str = "application/octet-stream",
) -> Answer:
    """A file. cut: hang up after so many bytes of it; stall: then wait instead; length: a wrong Content-Length."""
    tag = f'"{etag or hashlib.sha256(data).hexdigest()[:8]}"'

    def answer(request: Request) -> None:
        asked = request.headers.get("Range", "")
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        partial = bool(asked) and ranges and request.headers.get("If-Range", tag) == tag
        if partial and start >= len(data):
            status(416)(request)
            return
        part = data[start:] if partial else data
        request.send_response(206 if partial else 200)
        if partial:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        request.send_header("Content-Length", str(len(part) if length is None else length))
        request.send_header("Content-Type", kind)
        request.send_header("ETag", tag)
        request.end_headers()
        with contextlib.suppress(ConnectionError):
            request.wfile.write(part if cut is None else part[:cut])
            request.wfile.flush()
            if stall is not None:
                stall.wait(10)

    return answer
