"""Images -> OCI archives: pause, CoreDNS and the operator's own; and how containerd finds the operator's registries.

An archive is a tar of oci-layout, index.json (with the annotation io.containerd.image.name, by which containerd names
what it imports) and blobs: sorted, of one time and owner, never compressed, since the payload is.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast
from urllib.parse import urlsplit

from recipes import packages
from recipes.components import Component, load_components
from recipes.kit import bounds, formats
from recipes.kit.bounds import Damaged
from recipes.kit.download import Desk, NotServed, Unreachable
from recipes.kit.errors import BakeError
from recipes.kit.hashing import hash_file, sha256_of
from recipes.kit.model import Arch, Cluster, Fetched, File, Image, Origin, Registry, Source
from recipes.kit.overlay import quoted
from recipes.kit.registry import INDEX_TYPES, Blob, Pulled, pull_image, split_reference

OURS = "nodebake.local"  # the registry's name in references of images that are made at the desk; nothing serves it
SECTION = "images"  # of what the cluster remembers

_CONFIG = "application/vnd.oci.image.config.v1+json"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_LAYER = "application/vnd.oci.image.layer.v1.tar"
_NAME = "io.containerd.image.name"
_REF = "org.opencontainers.image.ref.name"
_MOST_DOCUMENTS = 200  # of one archive; each may cost reading all of it
_CERTS = "/etc/containerd/certs.d"


def obtain(cluster: Cluster, arch: Arch, desk: Desk, coredns: Fetched) -> list[Image]:
    """All images of one architecture: pause, CoreDNS (of the program `coredns`), then the operator's, as written.

    Raises BakeError for an archive that is damaged, of another architecture or without a name, and as download does.
    """
    images = [_pause(load_components()["pause"], arch, desk, cluster.debian_mirror), _coredns(arch, desk, coredns)]
    for given in cluster.images:
        if Path(given).is_absolute():
            images += _operators_archive(Path(given), arch, cluster, desk)
        else:
            images.append(_operators_reference(given, arch, cluster, desk))
    seen: dict[str, Image] = {}
    for image in images:
        other = seen.setdefault(image.reference, image)
        if other.archive.sha256 != image.archive.sha256:
            raise BakeError(
                f"two different images are called {image.reference}",
                where=cluster.file,
                remedy="Leave one of them out of `images:`, or rename it.",
            )
    return list(seen.values())


# -- made or taken at the desk ----------------------------------------------------------------------------------------


def _pause(component: Component, arch: Arch, desk: Desk, debian_mirror: str | None) -> Image:
    """Upstream's image by its digest; where its registry cannot be reached, Debian's catatonit under our own name."""
    key = f"{component.name} {arch}"
    remembered: Source | None = desk.choices.get(SECTION, key)
    chosen = desk.source or remembered
    if remembered and chosen != remembered:
        desk.progress.note(f"{key}: the source is now {chosen}, it was {remembered}; the bytes change")
    if chosen != "modules":
        reference = component.fill(str(component.release.image))
        try:
            pulled = pull_image(reference, f"sha256:{component.release.sha256}", arch, desk)
        except (Unreachable, NotServed) as error:
            if chosen:
                raise
            desk.progress.warn(f"{key}: {error.what}; Debian's catatonit takes its place")
        else:
            desk.choices.remember(SECTION, key, "release")
            origin = Origin(component.name, component.version, "release")
            return _packed(component.name, reference, [reference], pulled, desk, origin)
    program = packages.catatonit(arch, desk, debian_mirror)
    config = {"User": "65535:65535", "Entrypoint": ["/pause", "-P"], "WorkingDir": "/"}
    members = [_Member("pause", 0o755, source=program.path)]
    reference = f"{OURS}/pause:{component.version}"
    image = _made(component.name, reference, arch, members, config, desk, program.origin)
    desk.choices.remember(SECTION, key, "modules")
    return image


def _coredns(arch: Arch, desk: Desk, program: Fetched) -> Image:
    """The program alone, as nobody in particular. It has no file capability: its pod listens above 1024."""
    version = program.origin.version
    config = {
        "User": "65532:65532",
        "Entrypoint": ["/coredns"],
        "WorkingDir": "/",
    }
    members = [
        _Member("coredns", 0o755, source=program.path),
        _Member("etc/", 0o755),
        _Member("etc/group", 0o644, b"root:x:0:\nnonroot:x:65532:\n"),
        _Member("etc/passwd", 0o644, b"root:x:0:0:root:/:/none\nnonroot:x:65532:65532:nonroot:/:/none\n"),
    ]
    reference = f"{OURS}/coredns:v{version.removeprefix('v')}"
    return _made("coredns", reference, arch, members, config, desk, program.origin)


@dataclass(frozen=True, slots=True)
class _Member:
    """One file of a tar; a name that ends with "/" is a folder."""

    name: str
    mode: int
    data: bytes | None = None
    source: Path | None = None


def _made(
    name: str,
    reference: str,
    arch: Arch,
    members: Sequence[_Member],
    config: dict[str, Any],
    desk: Desk,
    origin: Origin,
) -> Image:
    """An image of one layer."""
    with desk.cache.temporary() as layer:
        with layer.open("wb") as out:
            _write_tar(members, out)
        digest = f"sha256:{hash_file(layer)}"
        document = _json(
            {
                "architecture": arch,
                "os": "linux",
                "config": {"Env": ["PATH=/"], **config},
                "rootfs": {"type": "layers", "diff_ids": [digest]},
                "history": [{"created_by": "nodebake"}],
            }
        )
        manifest = _json(
            {
                "schemaVersion": 2,
                "mediaType": _MANIFEST,
                "config": _descriptor(_CONFIG, _digest(document), len(document)),
                "layers": [_descriptor(_LAYER, digest, layer.stat().st_size)],
            }
        )
        blobs = [_blob(digest, source=layer), _blob(_digest(document), document), _blob(_digest(manifest), manifest)]
        top = _descriptor(_MANIFEST, _digest(manifest), len(manifest))
        return Image(name, reference, _archive(name, [reference], top, blobs, desk, origin))


def _packed(name: str, reference: str, names: Sequence[str], pulled: Pulled, desk: Desk, origin: Origin) -> Image:
    """A pulled image, its manifest as it was served."""
    parts: list[Blob] = [pulled.manifest, pulled.config, *pulled.layers]
    blobs = {part.digest: _blob(part.digest, source=part.path) for part in parts}  # a layer may occur twice
    top = _descriptor(pulled.manifest.media_type, pulled.manifest.digest, pulled.manifest.size)
    return Image(name, reference, _archive(name, names, top, list(blobs.values()), desk, origin))


def _archive(
    name: str, names: Sequence[str], top: dict[str, Any], blobs: Sequence[_Member], desk: Desk, origin: Origin
) -> Fetched:
    """Writes the archive into the cache; `names` all stand for the manifest that `top` describes."""
    named = [{**top, "annotations": {_NAME: each, _REF: each.rpartition(":")[2]}} for each in names]
    members = [
        *blobs,
        _Member("index.json", 0o644, _json({"schemaVersion": 2, "manifests": named})),
        _Member("oci-layout", 0o644, b'{"imageLayoutVersion":"1.0.0"}'),
    ]
    with desk.cache.temporary() as target:
        with target.open("wb") as out:
            _write_tar(members, out)
        size, sha256 = target.stat().st_size, hash_file(target)
        return Fetched(f"{name}.tar", desk.cache.add(target, sha256), sha256, size, origin)


def _write_tar(members: Sequence[_Member], out: IO[bytes]) -> None:
    """The same bytes for the same members, whoever writes them and when."""
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member in sorted(members, key=lambda member: member.name):
            info = tarfile.TarInfo(member.name.rstrip("/"))
            info.mode = member.mode
            if member.name.endswith("/"):
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
            elif member.source is not None:
                with member.source.open("rb") as file:
                    info.size = member.source.stat().st_size
                    tar.addfile(info, file)
            else:
                data = member.data or b""
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def _blob(digest: str, data: bytes | None = None, source: Path | None = None) -> _Member:
    return _Member(f"blobs/{digest.replace(':', '/')}", 0o644, data, source)


def _descriptor(media_type: str, digest: str, size: int) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest, "size": size}


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


# -- the operator's ---------------------------------------------------------------------------------------------------


def _operators_reference(given: str, arch: Arch, cluster: Cluster, desk: Desk) -> Image:
    """Pulled by digest."""
    tagged, _, digest = given.partition("@")
    host = split_reference(given)[0].replace("registry-1.docker.io", "docker.io")
    registry = next((registry for registry in cluster.registries if registry.host == host), None)
    pulled = pull_image(given, digest, arch, desk, credentials=credentials(registry) if registry else None)
    return _packed(given, given, names_in_containerd(given), pulled, desk, Origin(tagged, digest, "operator"))


def names_in_containerd(reference: str) -> list[str]:
    """What containerd files an image's archive as. An image by digest answers to its digest and, where it has one, to
    its tag: either way a pod may ask for it."""
    tagged, at, digest = reference.partition("@")
    if not at:
        return [reference]
    repository = re.sub(r":[^/:]*$", "", tagged)
    return [f"{repository}@{digest}", *([tagged] if tagged != repository else [])]


def _operators_archive(path: Path, arch: Arch, cluster: Cluster, desk: Desk) -> list[Image]:
    """An archive of docker save, skopeo or buildah, taken as it is once looked through.

    Nothing, if it is for another architecture that the cluster has as well.
    """
    try:
        found = _look_through(path, arch)
        if found.architecture != arch:
            if any(node.arch == found.architecture for node in cluster.nodes):
                return []
            raise Damaged(f"its image is for {found.architecture}, the machines are {arch}")
        sha256 = sha256_of(path)
        if desk.cache.find(sha256) is None:
            with desk.cache.temporary() as copy:
                shutil.copyfile(path, copy)
                desk.cache.add(copy, hash_file(copy))
    except (Damaged, OSError) as error:
        raise BakeError(
            f"this archive cannot be taken: {error}",
            where=path,
            remedy="Save one image with its full name and tag into it (docker save, or skopeo copy ... oci-archive:).",
        ) from error
    archive = Fetched(
        path.name, desk.cache.path(sha256), sha256, path.stat().st_size, Origin(found.name, "", "operator")
    )
    return [Image(found.name, found.name, archive)]


@dataclass(frozen=True, slots=True)
class _Found:
    name: str
    architecture: str


def _look_through(path: Path, arch: Arch) -> _Found:
    """Name and architecture of an archive's one image (of several architectures, `arch` if it is among them).

    Every member's name is checked, and the bytes of every blob against its digest.
    """
    with bounds.opened(path) as tar:
        members: dict[str, tarfile.TarInfo] = {}
        for member in bounds.members(tar):
            _check_member(member)
            name = str(PurePosixPath(member.name))
            if name in members and not member.isdir():
                raise Damaged(f"{name} stands twice in it")
            members[name] = member
            if member.isfile() and (match := re.fullmatch(r"blobs/(sha256|sha512)/([0-9a-f]+)", name)):
                content = cast(io.BufferedReader, tar.extractfile(member))
                if hashlib.file_digest(content, match[1]).hexdigest() != match[2]:
                    raise Damaged(f"{name} does not have the bytes that its name promises")
        documents = _Documents(tar, members)
        if "index.json" in members and "oci-layout" in members:
            return _look_through_oci(documents, arch)
        if "manifest.json" in members:
            return _look_through_docker(documents)
    raise Damaged("it has neither index.json nor manifest.json")


def _check_member(member: tarfile.TarInfo) -> None:
    """Refuses what could leave the folder it is unpacked in, and what an image archive has no use for."""
    places = [PurePosixPath(member.name)]
    if member.issym():
        places.append(PurePosixPath(member.name).parent / member.linkname)
    elif member.islnk():
        places.append(PurePosixPath(member.linkname))
    elif not (member.isfile() or member.isdir()):
        raise Damaged(f"{member.name} is neither a file nor a folder")
    for place in places:
        depth = 0
        for part in place.parts:
            depth += -1 if part == ".." else 1
            if depth < 0 or place.is_absolute():
                raise Damaged(f"{member.name} leads out of the archive")


class _Documents:
    """The JSON documents of an archive. members: by their names."""

    def __init__(self, tar: tarfile.TarFile, members: Mapping[str, tarfile.TarInfo]) -> None:
        self.members = members
        self._tar = tar
        self._count = 0

    def read(self, name: str) -> Any:
        self._count += 1
        if name not in self.members:
            raise Damaged(f"{name} is missing")
        content = self._tar.extractfile(self.members[name])
        if content is None or self.members[name].size > bounds.LARGEST_DOCUMENT or self._count > _MOST_DOCUMENTS:
            raise Damaged(f"{name} is no document, or one too many")
        return bounds.document(content.read())


def _look_through_oci(documents: _Documents, arch: Arch) -> _Found:
    entries = documents.read("index.json")["manifests"]
    names = {_full_name(entry.get("annotations", {})) for entry in entries}
    if len(names) != 1:
        raise Damaged(f"it holds {len(names)} images")
    architectures = [str(config.get("architecture")) for config in _configs(documents, entries)]
    if not architectures:
        raise Damaged("it holds no image")
    return _Found(names.pop(), arch if arch in architectures else architectures[0])


def _configs(documents: _Documents, entries: Sequence[dict[str, Any]], depth: int = 0) -> Iterator[dict[str, Any]]:
    """The configurations of those images below an index whose parts are all there."""
    for entry in entries:
        name = _blob_name(entry)
        if depth and name not in documents.members:
            continue  # an index may name architectures that were not saved
        document = documents.read(name)
        if entry.get("mediaType") in INDEX_TYPES or "manifests" in document:
            if depth > 2:
                raise Damaged("its indices are nested too deeply")
            yield from _configs(documents, document["manifests"], depth + 1)
            continue
        if "attestation-manifest" in json.dumps(entry.get("annotations", {})):
            continue
        for part in (document["config"], *document["layers"]):
            if _blob_name(part) not in documents.members:
                raise Damaged(f"the blob {part['digest']} is missing")
        yield documents.read(_blob_name(document["config"]))


def _blob_name(descriptor: Mapping[str, Any]) -> str:
    return f"blobs/{descriptor['digest'].replace(':', '/')}"


def _look_through_docker(documents: _Documents) -> _Found:
    images = documents.read("manifest.json")
    if len(images) != 1:
        raise Damaged(f"it holds {len(images)} images")
    [image] = images
    tags = image.get("RepoTags") or []
    if not tags:
        raise Damaged("its image has no name")
    for part in image["Layers"]:
        if part not in documents.members:
            raise Damaged(f"the layer {part} is missing")
    return _Found(_well_formed(_normal(tags[0])), str(documents.read(image["Config"]).get("architecture")))


def _full_name(annotations: dict[str, str]) -> str:
    """By what name containerd will know it: from its own annotation, else the common one. It takes either as it stands,
    and pods ask by whole names, with registry and tag."""
    name = annotations.get(_NAME) or annotations.get(_REF, "")
    if "/" not in name or _normal(name) != name or not re.search("[:@]", name.rpartition("/")[2]):
        raise Damaged(f"its image has no full name{f' but {name!r}' if name else ''}")
    return _well_formed(name)


def _well_formed(name: str) -> str:
    """The name, which will stand in lists and command lines on machines."""
    try:
        return formats.image_name(name)
    except formats.Malformed as malformed:
        raise Damaged(f"of its image's name, {malformed}") from None


def _normal(reference: str) -> str:
    """docker save writes short names for Docker Hub; containerd and the kubelet know the long ones."""
    host, slash, _ = reference.partition("/")
    if slash and (re.search(r"[.:]", host) or host == "localhost"):
        return reference
    return f"docker.io/{reference}" if slash else f"docker.io/library/{reference}"


# -- registries -------------------------------------------------------------------------------------------------------


def registry_files(cluster: Cluster) -> list[File]:
    """containerd's hosts.toml, and CA, of each registry: nothing secret."""
    files = []
    for registry in cluster.registries:
        folder = f"{_CERTS}/{registry.host}"
        ca = f"{folder}/ca.crt" if registry.ca is not None else None
        if registry.ca is not None and ca is not None:
            files.append(File(ca, data=_pem(registry.ca)))
        server = "registry-1.docker.io" if registry.host == "docker.io" else registry.host
        # The registry itself is asked last; keys of the root belong to it, so they stand before the first table.
        lines = [f"server = {quoted(f'https://{server}')}", *([f"ca = {quoted(ca)}"] if ca else [])]
        for url in registry.mirrors:
            lines += ["", f"[host.{quoted(url)}]", '  capabilities = ["pull", "resolve"]']
            if re.search(r"/v2(/|$)", urlsplit(url).path):  # a proxy project: the path is whole as it is written
                lines.append("  override_path = true")
            lines += [f"  ca = {quoted(ca)}"] if ca else []
        files.append(File(f"{folder}/hosts.toml", data="\n".join([*lines, ""]).encode()))
    return files


def registry_credentials(cluster: Cluster) -> list[File]:
    """The registries' users and passwords for the kubelet, which hands them to containerd with each pull: secret.

    containerd itself has no place for them: registry.configs is deprecated, and a header in hosts.toml would be sent as
    it is with every request. The kubelet reads this file anew at need, and the mirrors are given the same password.
    """
    auths = {}
    for registry in cluster.registries:
        if (pair := credentials(registry)) is not None:
            auths[registry.host] = {"auth": base64.b64encode(":".join(pair).encode()).decode()}
    return [File("/var/lib/kubelet/config.json", data=_json({"auths": auths}), mode=0o600)] if auths else []


def credentials(registry: Registry) -> tuple[str, str] | None:
    """User and password (the first line of its file), where the registry asks for them."""
    if registry.username is None or registry.password_file is None:
        return None
    try:
        password = registry.password_file.read_text(encoding="utf-8").partition("\n")[0]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise BakeError(
            f"the password for {registry.host} cannot be read: {reason}", where=registry.password_file
        ) from None
    if not password:
        raise BakeError(
            f"the password for {registry.host} is empty",
            where=registry.password_file,
            remedy="Write it in the first line.",
        )
    return registry.username, password


def _pem(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BakeError(f"the registry's CA cannot be read: {error.strerror}", where=path) from None
    if b"-----BEGIN CERTIFICATE-----" not in data:
        raise BakeError(
            "the registry's CA is no PEM certificate", where=path, remedy="Convert it: openssl x509 -inform der."
        )
    return data
