"""Container images from a registry, by digest, as the OCI distribution specification has it."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from recipes.kit import bounds
from recipes.kit.download import LARGEST, Desk, NotServed, Unreachable, explain, fetch, open_session, stand_in
from recipes.kit.errors import BakeError
from recipes.kit.model import Arch

INDEX_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
MANIFEST_TYPES = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
DOCKER_HUB = ("registry-1.docker.io", "docker.io")  # where it is, what references call it
_LARGEST_TOKEN = 1 << 20  # bytes of a token service's answer


@dataclass(frozen=True, slots=True)
class Blob:
    """One verified part of an image, in the cache."""

    media_type: str
    digest: str  # "sha256:<hex>"
    size: int  # bytes
    path: Path


@dataclass(frozen=True, slots=True)
class Pulled:
    """One image for one architecture: what an OCI archive is made of."""

    manifest: Blob
    config: Blob
    layers: tuple[Blob, ...]


def pull_image(
    reference: str, digest: str, arch: Arch, desk: Desk, *, credentials: tuple[str, str] | None = None
) -> Pulled:
    """Fetch the image for linux/arch; digest ("sha256:<hex>") is the index's or the manifest's, tags prove nothing.

    Raises Unreachable, NotServed or WrongBytes as fetch() does, BakeError if the image has no such architecture or is
    not as the specification has it.
    """
    registry = _Registry(reference, desk, credentials)
    try:
        top, document = registry.document(digest)
        if document.get("mediaType", top.media_type) in INDEX_TYPES or "manifests" in document:
            top, document = registry.document(_for_arch(document, arch, reference))
        config = registry.blob(document["config"], bounds.LARGEST_DOCUMENT)
        layers = tuple(registry.blob(layer, int(layer["size"])) for layer in document["layers"])
        built_for = bounds.document(config.path.read_bytes()).get("architecture")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise BakeError(
            f"the image is not as the specification has it ({error})",
            where=f"{reference}@{digest}",
            remedy="look at who made it",
        ) from error
    if built_for != arch:
        raise BakeError(f"the image is for {built_for}, not for {arch}", where=f"{reference}@{digest}")
    return Pulled(top, config, layers)


def split_reference(reference: str) -> tuple[str, str]:
    """The registry's host and the repository: "pause:3" at Docker Hub, "ghcr.io/a/b:v1@sha256:..." elsewhere."""
    name = re.sub(r"(:[^/:@]+)?(@[^@]+)?$", "", reference)
    host, slash, rest = name.partition("/")
    if not slash or not (re.search(r"[.:]", host) or host == "localhost"):
        host, rest = "docker.io", name if slash else f"library/{name}"
    return (DOCKER_HUB[0] if host in DOCKER_HUB else host), rest


class _Registry:
    """One repository; a token is asked for when the registry wants one."""

    def __init__(self, reference: str, desk: Desk, credentials: tuple[str, str] | None) -> None:
        self.reference = reference
        self.desk = desk
        self.credentials = credentials
        self.host, self.repository = split_reference(reference)
        self.authorization: str | None = None

    def document(self, digest: str) -> tuple[Blob, dict[str, Any]]:
        """A manifest or an index."""
        accept = ", ".join((*INDEX_TYPES, *MANIFEST_TYPES))
        path = self._fetch("manifests", digest, {"Accept": accept}, bounds.LARGEST_DOCUMENT)
        try:
            read = bounds.document(path.read_bytes())
            if not isinstance(read, dict) or not ("manifests" in read or {"config", "layers"} <= read.keys()):
                raise ValueError
        except ValueError:
            raise BakeError("this is no image manifest", where=f"{self.reference}@{digest}") from None
        return Blob(str(read.get("mediaType", MANIFEST_TYPES[0])), digest, path.stat().st_size, path), read

    def blob(self, descriptor: dict[str, Any], limit: int) -> Blob:
        digest = str(descriptor["digest"])
        path = self._fetch("blobs", digest, {}, min(limit, LARGEST))
        return Blob(str(descriptor["mediaType"]), digest, path.stat().st_size, path)

    def _fetch(self, kind: str, digest: str, headers: dict[str, str], limit: int) -> Path:
        url = f"https://{self.host}/v2/{self.repository}/{kind}/{digest}"
        title = f"{self.reference.partition('@')[0]} ({kind.removesuffix('s')})"
        try:
            return fetch(url, digest, self.desk, title=title, headers=self._authorized(headers), limit=limit)
        except NotServed as refusal:
            if refusal.status != 401 or not refusal.challenge:
                raise
            self.authorization = authorization(refusal, self.repository, self.desk, self.credentials)
        return fetch(url, digest, self.desk, title=title, headers=self._authorized(headers), limit=limit)

    def _authorized(self, headers: dict[str, str]) -> dict[str, str]:
        return {**headers, "Authorization": self.authorization} if self.authorization else headers


def authorization(
    refusal: NotServed, repository: str, desk: Desk, credentials: tuple[str, str] | None, *, actions: str = "pull"
) -> str:
    """The Authorization header that answers a refusal's WWW-Authenticate challenge (distribution's "token" and "basic"
    schemes). Raises the refusal where there is nothing to answer, NotServed, Unreachable."""
    scheme, _, rest = refusal.challenge.partition(" ")
    said = {key.lower(): value for key, value in re.findall(r'(\w+)="([^"]*)"', rest)}
    basic = scheme.lower() == "basic"
    if not (basic and credentials) and (scheme.lower() != "bearer" or "realm" not in said):
        raise refusal
    where = str(refusal.where)
    url = where if basic else stand_in(said["realm"], desk.mirror)
    if isinstance(url, Path):
        raise refusal
    if credentials and desk.mirror is None and not url.startswith("https://"):
        remedy = "let it speak https://" if basic else "let it name an https:// service"
        raise NotServed(f"{urlsplit(where).netloc} asks for the password in the clear", where=url, remedy=remedy)
    if basic and credentials:
        return f"Basic {base64.b64encode(':'.join(credentials).encode()).decode()}"
    import urllib3.exceptions

    patience = desk.patience
    query = {"service": said.get("service", ""), "scope": said.get("scope", f"repository:{repository}:{actions}")}
    with open_session() as session:
        try:
            timeout = (patience.connect, patience.read)
            answer = session.get(url, params=query, auth=credentials, timeout=timeout, stream=True)
            told = answer.raw.read(_LARGEST_TOKEN, decode_content=True)
        except (OSError, urllib3.exceptions.HTTPError) as trouble:
            raise explain(trouble, url) or Unreachable("the token service broke off", where=url) from trouble
    try:
        given = bounds.document(told)
        token = given.get("token") or given["access_token"]
        if not re.fullmatch(r"[!-~]+", token):  # else it could bring headers of its own
            raise ValueError
    except (ValueError, KeyError, AttributeError, TypeError):
        raise NotServed(
            f"{urlsplit(where).netloc} gives no token for {repository} ({answer.status_code} {answer.reason})",
            status=answer.status_code,
            where=url,
            remedy="check the registry's credentials" if credentials else None,
        ) from None
    return f"Bearer {token}"


def _for_arch(index: dict[str, Any], arch: Arch, reference: str) -> str:
    """The digest of the manifest for linux/arch."""
    platforms = [(entry.get("platform", {}), entry["digest"]) for entry in index["manifests"]]
    for platform, digest in platforms:
        if (platform.get("os"), platform.get("architecture")) == ("linux", arch):
            return str(digest)
    there = sorted({f"{platform.get('os')}/{platform.get('architecture')}" for platform, _ in platforms})
    raise BakeError(f"the image is not made for linux/{arch}, only for {', '.join(there)}", where=reference)
