"""Verified files: a content-addressed cache, and downloads that survive bad networks but never wrong bytes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from recipes.kit.atomic import disk_errors
from recipes.kit.choices import Choices
from recipes.kit.errors import BakeError
from recipes.kit.hashing import hash_file, remember, sha256_of
from recipes.kit.locks import locked
from recipes.kit.model import Source
from recipes.kit.progress import Progress

if TYPE_CHECKING:  # imported where it is used: a bake that fetches nothing does not wait for it
    import requests

CHUNK = 1 << 20  # bytes; hashing speed does not grow beyond
NETWORK_CHUNK = 1 << 18  # bytes; at most this much is lost when a connection breaks off
HEX_DIGITS = {"sha256": 64, "sha512": 128}
LARGEST = 32 << 30  # bytes that any one file may have
STALE = 2 * 86400.0  # seconds after which a temporary file is nobody's


class Unreachable(BakeError):
    """A host did not answer, or gave up half-way again and again."""


class NotServed(BakeError):
    """A host answered, but does not serve the file (to us). status is the HTTP status, 0 for a folder."""

    def __init__(
        self, what: str, *, status: int = 0, challenge: str = "", where: str, remedy: str | None = None
    ) -> None:
        super().__init__(what, where=where, remedy=remedy)
        self.status = status
        self.challenge = challenge  # the WWW-Authenticate header


class WrongBytes(BakeError):
    """A file came whole, but it is not the file that was asked for. Never tried again."""


class Cache:
    """Files by their SHA-256: root/sha256/<hex>. A file is there whole and right, or not at all."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._swept = False

    def path(self, sha256: str) -> Path:
        return self.root / "sha256" / sha256

    def find(self, sha256: str) -> Path | None:
        """The file, re-hashed once per run; a damaged one is set aside and None is returned."""
        path = self.path(sha256)
        try:
            if sha256_of(path) == sha256:
                return path
            self.reject(path, f"{sha256}.damaged")
        except FileNotFoundError:
            pass
        return None

    def add(self, temp: Path, sha256: str) -> Path:
        """Move temp, whose SHA-256 the caller has just computed, into the cache; coming second does no harm."""
        path = self.path(sha256)
        path.parent.mkdir(parents=True, exist_ok=True)
        if temp.stat().st_dev != path.parent.stat().st_dev:
            with self.temporary() as here:
                shutil.copyfile(temp, here)
                temp.unlink()
                return self.add(here, hash_file(here))
        temp.chmod(0o644)
        _sync(temp)
        temp.replace(path)
        _sync(path.parent)
        remember(path.stat(), sha256)
        return path

    def reject(self, path: Path, name: str) -> Path:
        """Set a wrong file aside for people to look at, where nothing else looks."""
        rejected = self.root / "rejected" / name
        rejected.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            path.replace(rejected)
        return rejected

    @contextlib.contextmanager
    def temporary(self) -> Iterator[Path]:
        """A new empty file on the cache's own file system, gone at the end unless it was moved. BakeError as of
        disk_errors()."""
        folder = self.root / "temp"
        folder.mkdir(parents=True, exist_ok=True)
        if not self._swept:
            self._swept = True
            _sweep(folder)
        handle, name = tempfile.mkstemp(dir=folder)
        os.close(handle)
        path = Path(name)
        try:
            with disk_errors(self.root):
                yield path
        finally:
            path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sweep(folder: Path) -> None:
    """Remove what killed runs left behind."""
    for old in folder.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - old.lstat().st_mtime > STALE:
                old.unlink()


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a download waits, in seconds, and how often it begins again without having got further."""

    connect: float = 5.0
    read: float = 20.0
    attempts: int = 5
    pause: float = 0.5  # before the second attempt, doubled before each later one


@dataclass(kw_only=True)
class Desk:
    """Where a bake runs: its folders, its way to the world, and what it has learnt about that in this run."""

    build: Path
    progress: Progress
    choices: Choices  # remembered with the cluster
    mirror: str | None = None  # URL or folder in place of upstream: https://HOST/PATH -> MIRROR/HOST/PATH
    source: Source | None = None  # doit source=
    silent_hosts: set[str] = field(default_factory=set)  # did not answer in this run, so they are not asked again
    patience: Patience = Patience()

    @cached_property
    def cache(self) -> Cache:
        return Cache(self.build / "downloads")


def fetch(
    url: str,
    digest: str,
    desk: Desk,
    *,
    title: str = "",
    headers: Mapping[str, str] | None = None,
    limit: int = LARGEST,
) -> Path:
    """The file with this digest ("sha256:<hex>" or "sha512:<hex>"): from the cache, else from url or the mirror.

    Downloads go on where they broke off, in a later run too. Headers go to url's own host only. limit: bytes that the
    file may have at most. Raises Unreachable, NotServed or WrongBytes; returns a path in the cache.
    """
    algorithm, wanted = _parse_digest(digest, url)
    if found := _find(algorithm, wanted, desk.cache):
        return found
    title = title or PurePosixPath(urlsplit(url).path).name
    place = stand_in(url, desk.mirror)
    partial = desk.cache.root / "partial" / f"{algorithm}-{wanted}"
    waiting = f"{title}: waiting for another bake that downloads it"
    with disk_errors(desk.cache.root), locked(partial.with_suffix(".lock"), lambda: desk.progress.note(waiting)):
        if found := _find(algorithm, wanted, desk.cache):  # another process fetched it while we waited
            return found
        if isinstance(place, Path):
            got = _copy(place, partial, algorithm, title, desk, limit)
        else:
            got = _Download(place, partial, algorithm, wanted, title, headers or {}, desk, limit).run()
        if got != wanted:
            name = f"{wanted[:16]}-{PurePosixPath(urlsplit(url).path).name or 'file'}"
            rejected = desk.cache.reject(partial, name)
            raise WrongBytes(
                f"{title} came whole, but with the wrong bytes: expected {algorithm}:{wanted}, got {algorithm}:{got}",
                where=str(place),
                remedy=f"look at {rejected}: a mirror or proxy may have changed it; then run again",
            )
        sha256 = wanted if algorithm == "sha256" else hash_file(partial)
        if algorithm != "sha256":
            _remember_alias(algorithm, wanted, sha256, desk.cache)
        return desk.cache.add(partial, sha256)


def stand_in(url: str, mirror: str | None) -> str | Path:
    """Where to look for an upstream URL: itself, its place below a mirror's URL, or a file below a mirror's folder."""
    if mirror is None:
        return url
    parts = urlsplit(url)
    if re.match(r"https?://", mirror):
        query = f"?{parts.query}" if parts.query else ""
        return f"{mirror.rstrip('/')}/{parts.netloc}{parts.path}{query}"
    path = unquote(parts.path).lstrip("/")
    if ".." in PurePosixPath(path).parts:
        raise BakeError("a URL may not climb out of the mirror", where=url)
    folder = Path(mirror.removeprefix("file://")).expanduser()
    if not folder.is_dir():
        raise BakeError("the mirror is neither a URL nor a folder", where=mirror, remedy="mend mirror=")
    return folder / parts.netloc / path


def open_session() -> requests.Session:
    """A session that honours the usual variables: HTTPS_PROXY, NO_PROXY, REQUESTS_CA_BUNDLE, SSL_CERT_FILE, ..."""
    import requests

    session = requests.Session()
    for variable in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        if bundle := os.environ.get(variable):
            session.verify = bundle
            break
    session.headers["User-Agent"] = "nodebake"
    session.headers["Accept-Encoding"] = "identity"  # digests are over the bytes as they are published
    return session


def explain(trouble: Exception, url: str) -> BakeError | None:
    """The error for people if trouble means that asking again is useless; None if it may pass."""
    import requests
    import urllib3.exceptions

    host = urlsplit(url).netloc
    reason = getattr(trouble.args[0], "reason", None) if trouble.args else None
    if isinstance(trouble, requests.exceptions.ProxyError):
        return Unreachable(
            f"the proxy refused to connect to {host}", where=url, remedy="check HTTPS_PROXY and NO_PROXY"
        )
    if isinstance(trouble, requests.exceptions.SSLError):
        return Unreachable(
            f"{host} did not prove who it is: {reason or trouble}",
            where=url,
            remedy="if a private CA signs here, name its file in REQUESTS_CA_BUNDLE",
        )
    if isinstance(trouble, requests.exceptions.ConnectTimeout):
        return Unreachable(f"{host} did not answer in time", where=url)
    if isinstance(reason, urllib3.exceptions.NameResolutionError):
        return Unreachable(f"{host} has no address here (DNS)", where=url)
    if isinstance(reason, urllib3.exceptions.NewConnectionError):
        return Unreachable(f"{host} does not take connections", where=url)
    if isinstance(trouble, requests.exceptions.TooManyRedirects):
        return NotServed(f"{host} redirects without end", where=url)
    if isinstance(trouble, ValueError):  # requests' word for URLs that make no sense
        return BakeError(f"not a URL to fetch from: {trouble}", where=url, remedy="mend mirror= or the proxy variables")
    if isinstance(trouble, OSError) and not isinstance(trouble, requests.exceptions.RequestException):
        return BakeError(str(trouble), where=url, remedy="mend REQUESTS_CA_BUNDLE or SSL_CERT_FILE")
    return None


class _Again(Exception):
    """An attempt failed in a way that may pass. wait is what the server asked for, in seconds."""

    def __init__(self, what: str, wait: float = 0.0) -> None:
        super().__init__(what)
        self.wait = wait


class Headers:
    """Sets headers as authentication, so that a netrc entry does not replace them; redirects elsewhere drop them."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        self._headers = headers

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers.update(self._headers)
        return request


class _Download:
    """One file from one URL into the partial file, in as many attempts as it takes.

    Beside the partial file lies what proves that the server still has the same file (url, ETag or Last-Modified).
    """

    def __init__(
        self,
        url: str,
        partial: Path,
        algorithm: str,
        wanted: str,
        title: str,
        headers: Mapping[str, str],
        desk: Desk,
        limit: int,
    ) -> None:
        self.url = url
        self.host = urlsplit(url).netloc
        self.partial = partial
        self.proof = partial.with_suffix(".json")
        self.algorithm = algorithm
        self.wanted = wanted
        self.title = title
        self.headers = headers
        self.desk = desk
        self.limit = limit
        self.answered = False
        self.resumed = False

    def run(self) -> str:
        """Download all of it; returns the digest of what came."""
        if self.host in self.desk.silent_hosts:
            raise Unreachable(f"{self.host} did not answer earlier in this run", where=self.url)
        patience = self.desk.patience
        best, tries = 0, 0
        with open_session() as session:
            while True:
                try:
                    got = self._attempt(session)
                except _Again as again:
                    size = self.partial.stat().st_size if self.partial.exists() else 0
                    # A little more each time would go on for ever.
                    best, tries = (size, 1) if size >= best + NETWORK_CHUNK else (best, tries + 1)
                    if tries >= patience.attempts:
                        self.desk.silent_hosts.add(self.host)
                        raise Unreachable(
                            f"{self.title}: gave up after {tries} attempts in a row: {again}",
                            where=self.url,
                            remedy="run again: what has come is kept",
                        ) from again
                    wait = max(patience.pause * 2 ** (tries - 1), min(again.wait, 30.0))
                    self.desk.progress.note(f"{self.title}: {again}; trying again in {wait:.1f} s")
                    time.sleep(wait)
                    continue
                if got != self.wanted and self.resumed:  # the older piece may be at fault: once more in one piece
                    self.resumed = False
                    self._forget()
                    continue
                self.proof.unlink(missing_ok=True)
                return got

    def _attempt(self, session: requests.Session) -> str:
        digest, offset = hashlib.new(self.algorithm), 0
        ranged: dict[str, str] = {}
        validator = self._validator()
        if validator:
            digest, offset = _digest_of(self.partial, self.algorithm)
            if digest.hexdigest() == self.wanted:
                return self.wanted
            ranged = {"Range": f"bytes={offset}-", "If-Range": validator}
        with self._open(session, ranged) as response:
            if response.status_code == 416 and ranged:
                self._forget()
                raise _Again("the server has less than what has come already")
            self._refuse(response)
            if response.status_code == 206 and ranged:
                if not response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
                    self._forget()
                    raise _Again("the server sent another range than the one asked for")
                self.resumed = True
            else:
                digest, offset = hashlib.new(self.algorithm), 0
                self._keep_proof(response)
            self._receive(response, digest, offset)
        return digest.hexdigest()

    def _open(self, session: requests.Session, ranged: Mapping[str, str]) -> requests.Response:
        auth = Headers(self.headers) if "Authorization" in self.headers else None
        patience = self.desk.patience
        try:
            return session.get(
                self.url,
                headers={**self.headers, **ranged},
                auth=auth,
                stream=True,
                timeout=(patience.connect, patience.read),
            )
        except (OSError, ValueError) as trouble:  # what requests raises, and what a redirect's URL makes it raise
            error = explain(trouble, self.url)
            if error is None or (self.answered and isinstance(error, Unreachable)):
                raise _Again(_in_words(trouble)) from trouble
            if isinstance(error, Unreachable):
                self.desk.silent_hosts.add(self.host)
            raise error from trouble

    def _refuse(self, response: requests.Response) -> None:
        """Raise for every status that brings no file."""
        self.answered = True
        status = response.status_code
        if status in (200, 206):
            return
        if status in (408, 425, 429) or status >= 500:
            asked = response.headers.get("Retry-After", "")
            raise _Again(f"{self.host} says {status} {response.reason}", float(asked) if asked.isdecimal() else 0.0)
        raise NotServed(
            f"{self.title} is not served here: {self.host} says {status} {response.reason}",
            status=status,
            challenge=response.headers.get("WWW-Authenticate", ""),
            where=self.url,
        )

    def _receive(self, response: requests.Response, digest: hashlib._Hash, offset: int) -> None:
        """Append the body to the partial file, from offset."""
        import requests
        import urllib3.exceptions

        length = response.headers.get("Content-Length", "")
        total = offset + int(length) if length.isdecimal() else None
        self._bound(total or 0)
        with (
            self.partial.open("r+b" if offset else "wb") as file,
            self.desk.progress.step(self.title, total, "bytes") as advance,
        ):
            file.seek(offset)
            file.truncate()
            try:
                for chunk in response.raw.stream(NETWORK_CHUNK, decode_content=False):
                    file.write(chunk)
                    digest.update(chunk)
                    offset += len(chunk)
                    self._bound(offset)
                    advance(offset)
            except (urllib3.exceptions.HTTPError, requests.exceptions.RequestException, ConnectionError) as trouble:
                if digest.hexdigest() == self.wanted:  # the server announced more than there is
                    return
                raise _Again(f"{_in_words(trouble)} after {offset} bytes") from trouble

    def _bound(self, size: int) -> None:
        if size > self.limit:
            self._forget()
            raise WrongBytes(
                f"{self.title} is larger than the {self.limit} bytes that it may have",
                where=self.url,
                remedy="a mirror or proxy may have changed it; see what is served there",
            )

    def _validator(self) -> str | None:
        """What If-Range may say about the partial file, if there is one and it came from this URL."""
        try:
            proof = json.loads(self.proof.read_bytes())
            if proof["url"] == self.url and self.partial.stat().st_size > 0:
                return str(proof["validator"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return None

    def _keep_proof(self, response: requests.Response) -> None:
        self._forget()
        etag = response.headers.get("ETag", "")
        strong = etag if etag.startswith('"') else ""  # a weak one does not promise the same bytes
        if validator := strong or response.headers.get("Last-Modified"):
            self.proof.write_text(json.dumps({"url": self.url, "validator": validator}), encoding="utf-8")

    def _forget(self) -> None:
        self.proof.unlink(missing_ok=True)
        self.partial.unlink(missing_ok=True)


def _in_words(trouble: Exception) -> str:
    import requests
    import urllib3.exceptions

    if isinstance(trouble, (urllib3.exceptions.ReadTimeoutError, requests.exceptions.ReadTimeout)):
        return "the connection stalled"
    return "the connection broke off"


def _copy(source: Path, target: Path, algorithm: str, title: str, desk: Desk, limit: int) -> str:
    """Copy from a mirror's folder; returns the digest of what was copied."""
    digest = hashlib.new(algorithm)
    try:
        size = source.stat().st_size
    except OSError as trouble:
        raise NotServed(f"{title} is not in the mirror: {trouble.strerror}", where=str(source)) from trouble
    try:
        if not source.is_file() or size > limit:  # neither a pipe nor a device
            raise NotServed(f"what the mirror has as {title} is no file of a sane size", where=str(source))
        with (
            source.open("rb") as file,
            target.open("wb") as copy,
            desk.progress.step(title, size, "bytes") as advance,
        ):
            while chunk := file.read(CHUNK):
                copy.write(chunk)
                digest.update(chunk)
                advance(copy.tell())
    except (FileNotFoundError, IsADirectoryError) as missing:
        raise NotServed(f"{title} is not in the mirror", where=str(source)) from missing
    except PermissionError as refused:
        raise NotServed(f"{title} cannot be read: {refused.strerror}", where=str(source)) from refused
    return digest.hexdigest()


def _digest_of(path: Path, algorithm: str) -> tuple[hashlib._Hash, int]:
    digest, size = hashlib.new(algorithm), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return digest, size


def _parse_digest(digest: str, where: str) -> tuple[str, str]:
    algorithm, _, wanted = digest.partition(":")
    if HEX_DIGITS.get(algorithm) != len(wanted) or not re.fullmatch(r"[0-9a-f]+", wanted):
        raise BakeError(f"not a digest: {digest!r}", where=where, remedy="write sha256:<64 hex digits> or sha512:<128>")
    return algorithm, wanted


def _alias(algorithm: str, wanted: str, cache: Cache) -> Path:
    return cache.root / algorithm / wanted


def _remember_alias(algorithm: str, wanted: str, sha256: str, cache: Cache) -> None:
    alias = _alias(algorithm, wanted, cache)
    alias.parent.mkdir(parents=True, exist_ok=True)
    with cache.temporary() as temp:
        temp.write_text(sha256, encoding="ascii")
        temp.replace(alias)


def _find(algorithm: str, wanted: str, cache: Cache) -> Path | None:
    if algorithm == "sha256":
        return cache.find(wanted)
    try:
        found = cache.find(_alias(algorithm, wanted, cache).read_text(encoding="ascii"))
    except FileNotFoundError:
        return None
    return found if found is not None and hash_file(found, algorithm) == wanted else None
