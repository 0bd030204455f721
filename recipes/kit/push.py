"""Artifacts to an OCI registry: what the distribution specification (v1.1) needs for pushing, and no more.

Of oras-py (0.2.43), the one client that is kept for Python, nothing would have remained: it reads a whole file into
memory, waits for an answer without end, shows no progress, takes nothing up again, and sends the password to whatever
address the registry names, in the clear too.
"""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal
from urllib.parse import urlencode, urljoin, urlsplit

import urllib3.exceptions

from recipes.kit import bounds
from recipes.kit.distribution import Repository
from recipes.kit.download import Desk, Headers, NotServed, Unreachable, explain, open_session
from recipes.kit.errors import BakeError
from recipes.kit.progress import Advance
from recipes.kit.registry import authorization

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
PIECE = 8 << 20  # bytes sent at once, and at most lost when a connection breaks off
_LARGEST_ANSWER = 1 << 16  # bytes
_LOGIN = "docker login or podman login leaves what is needed (not in a credential helper's store, which is not read)"
_REMEDIES = {401: _LOGIN, 403: f"let this user push there; {_LOGIN}", 404: "make the repository, or name another"}


class Pusher:
    """Sends to one repository, as long as the context lasts. Its methods raise Unreachable and NotServed."""

    def __init__(self, repository: Repository, desk: Desk) -> None:
        self.repository = repository
        self._desk = replace(desk, mirror=None)  # what is pushed goes where it was said
        self._credentials = credentials(repository.host)
        self._authorization: str | None = None
        self._answered = False

    def __enter__(self) -> Pusher:
        self._session = open_session()
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    def has(self, kind: Literal["blobs", "manifests"], reference: str) -> bool:
        url = f"{self.repository.url}/{kind}/{reference}"
        return self._patiently("HEAD", url, 200, 404, Accept=MANIFEST).status == 200

    def blob(self, file: BinaryIO, size: int, digest: str, advance: Advance = lambda _: None) -> None:
        """Sends so many bytes in pieces ("sha256:<hex>"); after a connection that broke off it goes on with what the
        registry lacks."""
        sent, tries = 0, 0
        answer = self._patiently("POST", f"{self.repository.url}/blobs/uploads/", 202)
        while sent < size:
            file.seek(sent)
            piece = file.read(PIECE)
            told = {"Content_Type": "application/octet-stream", "Content_Range": f"{sent}-{sent + len(piece) - 1}"}
            try:
                answer = self._ask("PATCH", _place(answer), 202, data=piece, **told)
                sent, tries = sent + len(piece), 0
            except _Again as again:
                tries += 1
                self._pause(tries, again)
                answer = self._patiently("GET", _place(answer), 204)  # how far has it come?
                sent = _received(answer)
            advance(sent)
        place = _place(answer)
        self._patiently("PUT", f"{place}{'&' if urlsplit(place).query else '?'}{urlencode({'digest': digest})}", 201)

    def manifest(self, data: bytes, tag: str) -> None:
        self._patiently("PUT", f"{self.repository.url}/manifests/{tag}", 201, data=data, Content_Type=MANIFEST)

    def _patiently(self, method: str, url: str, *good: int, data: bytes = b"", **headers: str) -> _Answer:
        """What may be asked again as it is."""
        tries = 0
        while True:
            try:
                return self._ask(method, url, *good, data=data, **headers)
            except _Again as again:
                tries += 1
                self._pause(tries, again)

    def _pause(self, tries: int, again: _Again) -> None:
        patience = self._desk.patience
        if tries >= patience.attempts:
            raise Unreachable(
                f"gave up after {tries} attempts in a row: {again}",
                where=self.repository.url,
                remedy="run again: what the registry has whole is not sent again",
            ) from again
        wait = max(patience.pause * 2 ** (tries - 1), min(again.wait, 30.0))
        self._desk.progress.note(f"{self.repository.host}: {again}; trying again in {wait:.1f} s")
        time.sleep(wait)

    def _ask(self, method: str, url: str, *good: int, data: bytes = b"", **headers: str) -> _Answer:
        """headers: with _ for -. Raises _Again for what may pass."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        answer = self._send(method, url, named, data)
        if answer.status == 401:
            self._authorize(answer)
            answer = self._send(method, url, named, data)
        if answer.status in good:
            return answer
        said = f"{self.repository.host} says {answer.status} {answer.reason}{_reasons(answer)}"
        if answer.status in (408, 416, 425, 429) or answer.status >= 500:
            asked = answer.headers.get("Retry-After", "")
            raise _Again(said, float(asked) if asked.isdecimal() else 0.0)
        raise NotServed(said, status=answer.status, where=url, remedy=_REMEDIES.get(answer.status))

    def _send(self, method: str, url: str, headers: Mapping[str, str], data: bytes) -> _Answer:
        own = urlsplit(url).netloc == self.repository.host  # an upload may go on elsewhere, but not with what is secret
        known = {"Authorization": self._authorization} if self._authorization and own else {}
        patience = self._desk.patience
        try:
            with self._session.request(
                method,
                url,
                data=data or None,
                headers=headers,
                auth=Headers(known),
                stream=True,
                timeout=(patience.connect, patience.read),
            ) as response:
                body = response.raw.read(_LARGEST_ANSWER, decode_content=True)
        except (OSError, ValueError, urllib3.exceptions.HTTPError) as trouble:
            error = explain(trouble, url)
            if error is None or (self._answered and isinstance(error, Unreachable)):
                raise _Again("the connection broke off") from trouble
            raise error from trouble
        self._answered = True
        return _Answer(response.status_code, response.reason, response.url, response.headers, body)

    def _authorize(self, answer: _Answer) -> None:
        challenge = answer.headers.get("WWW-Authenticate", "")
        said = f"{self.repository.host} wants a password"
        refusal = NotServed(said, status=401, challenge=challenge, where=answer.url, remedy=_REMEDIES[401])
        self._authorization = authorization(
            refusal, self.repository.name, self._desk, self._credentials, actions="pull,push"
        )


def credentials(host: str) -> tuple[str, str] | None:
    """User and password for a registry, as `podman login` (auth.json, containers-auth.json(5)) or `docker login`
    (config.json) leave them, the first that has some. BakeError: a file cannot be read."""
    runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"
    podman = os.environ.get("REGISTRY_AUTH_FILE") or f"{runtime}/containers/auth.json"
    docker = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker") / "config.json"
    return _credentials(Path(podman), host) or _credentials(docker, host)


def _credentials(path: Path, host: str) -> tuple[str, str] | None:
    try:
        known = bounds.document(path.read_bytes()).get("auths", {})
        entry = known.get(host, known.get(f"https://{host}", {})).get("auth")
        if not entry:
            return None
        user, colon, password = base64.b64decode(entry, validate=True).decode().partition(":")
        if not colon:
            raise ValueError
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError, TypeError):
        raise BakeError(
            "the registries' credentials cannot be read", where=path, remedy=f"mend it: docker login {host}"
        ) from None
    return user, password


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    reason: str
    url: str
    headers: Mapping[str, str]
    body: bytes


class _Again(Exception):
    """What failed in a way that may pass; wait: what the registry asks for, in seconds."""

    def __init__(self, what: str, wait: float = 0.0) -> None:
        super().__init__(what)
        self.wait = wait


def _place(answer: _Answer) -> str:
    """Where an upload goes on."""
    return urljoin(answer.url, answer.headers.get("Location", ""))


def _received(answer: _Answer) -> int:
    """How many bytes of an upload the registry has. Of none it says "0-0", too."""
    last = answer.headers.get("Range", "").removeprefix("bytes=").partition("-")[2]
    return int(last) + 1 if last.isdecimal() and last != "0" else 0


def _reasons(answer: _Answer) -> str:
    """The registry's own words, as far as they are some."""
    try:
        errors = bounds.document(answer.body)["errors"]
        told = "; ".join(str(error.get("message") or error["code"]) for error in errors)
    except (ValueError, LookupError, TypeError, AttributeError):
        return ""
    return f" ({told[:300]})" if told else ""
