"""What an artifact is made of, as a CycloneDX 1.6 document: each fetched file with origin, package URL and SHA-256.

Go programs say themselves which modules they are made of; of an image that was not made here nothing is known but its
bytes, and the document says so. The same contents give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote
from uuid import UUID, uuid5

from recipes.components import Component, load_components
from recipes.kit import bounds, buildinfo, manifest
from recipes.kit.bounds import Damaged
from recipes.kit.buildinfo import BuildInfo, Module
from recipes.kit.model import Arch, Fetched, File, Image, Origin

PATH = f"{manifest.FOLDER}/payload.cdx.json"
IDENTITY = f"{manifest.FOLDER}/node.cdx.json"
_NAMESPACE = UUID("5d3f4c0e-8a1b-4c53-9d0a-736f66747762")
_VERSION = version("nodebake")
_DISTRIBUTION = "debian-13"

Entry = dict[str, Any]


def payload(
    title: str,
    release: str,
    arch: Arch,
    contents: Iterable[File],
    binaries: Mapping[str, Sequence[Fetched]],
    images: Sequence[Image],
    *,
    mtime: int,
) -> File:
    """The document of a payload. title, release: what the payload is called, and the name of its content; binaries:
    component -> its files, for what lies in images that were made here; mtime: in seconds since 1970."""
    made = _Document(arch)
    for file in contents:
        if file.source is None or file.origin is None or file.sha256 is None:
            continue  # of our own making
        found = [image for image in images if image.archive.sha256 == file.sha256]
        for image in found:
            made.add_image(file, image, binaries.get(image.archive.origin.component, ()))
        if file.origin.source == "debian" and not found:
            made.add_package(file.origin, file.sha256, PurePosixPath(file.path).stem.rpartition("_")[2], file.path)
        elif not found:
            made.add_program(PurePosixPath(file.path).name, file.source, file.origin, file.sha256, file.path)
    return File(PATH, data=made.written(title, release, mtime))


def identity(title: str, payload_title: str, sums: str, made: datetime) -> File:
    """The document of what one machine alone has: nothing that was fetched, but the payload that it belongs to.

    sums: SHA-256 (hex) of the payload's SHA256SUMS."""
    top, part = f"machine:{title}", f"payload:{payload_title}"  # a machine may be called as a payload is
    entry = {
        "type": "application",
        "bom-ref": part,
        "name": payload_title,
        "hashes": _hashes(sums),
        "externalReferences": [{"type": "bom", "url": PurePosixPath(PATH).name}],  # beside it
        "properties": [{"name": "nodebake:path", "value": f"{manifest.FOLDER}/payload.SHA256SUMS"}],
    }
    component = {"type": "application", "bom-ref": top, "name": title}
    return File(IDENTITY, data=_written(component, {part: entry}, {top: {part}}, made))


def system(title: str, release: str, arch: Arch, debs: Iterable[Fetched], *, mtime: int) -> bytes:
    """The document of a system that was made of these Debian packages."""
    made = _Document(arch)
    for deb in debs:
        made.add_package(deb.origin, deb.sha256, PurePosixPath(deb.name).stem.rpartition("_")[2])
    return made.written(title, release, mtime)


def purl(
    kind: str, name: str, release: str = "", subpath: str = "", qualifiers: Mapping[str, str | None] | None = None
) -> str:
    """A package URL (ECMA-427). name may have a namespace before it; qualifiers without a value are left out."""
    url = f"pkg:{kind}/{quote(name)}" + (f"@{quote(release, safe=':')}" if release else "")
    given = sorted((key, value) for key, value in (qualifiers or {}).items() if value)
    url += "?" + "&".join(f"{key}={quote(value, safe=':/')}" for key, value in given) if given else ""
    return url + (f"#{quote(subpath)}" if subpath else "")


class _Document:
    """Components by what refers to them, and who depends on whom."""

    def __init__(self, arch: Arch) -> None:
        self._arch: Arch = arch
        self._components: dict[str, Entry] = {}
        self._needs: dict[str, set[str]] = {}
        self._unknown: set[str] = set()  # components whose own parts nobody has told
        self._known = load_components()

    def add_package(self, origin: Origin, sha256: str | None, arch: str, path: str = "") -> str:
        """A Debian package."""
        return self._add(
            "library",
            origin,
            purl(
                "deb",
                f"debian/{origin.component}",
                origin.version,
                qualifiers={"arch": arch, "distro": _DISTRIBUTION},
            ),
            sha256,
            path,
        )

    def add_program(self, name: str, program: Path, origin: Origin, sha256: str, path: str = "") -> str:
        """A program, and the Go modules in it."""
        told = buildinfo.read(program)
        module = told.module_of(told.package) if told is not None else None
        url, more = purl("generic", f"{origin.component}/{name}", origin.version), Entry()
        if origin.source == "release" and origin.component in self._known:
            url, more = self._released(self._known[origin.component], name) or (url, more)
        elif told is not None and module is not None:
            below = told.package.removeprefix(module.path).lstrip("/")
            url = purl("golang", module.path, module.version, below)
        ref = self._add("application", origin, url, sha256, path, name=name, **more)
        if told is not None:
            self._needs.setdefault(ref, set()).update(self._modules(told, module))
        return ref

    def add_image(self, file: File, image: Image, programs: Sequence[Fetched]) -> None:
        """An image, and what it was made of, where it was made here."""
        origin = image.archive.origin
        tagged, _, digest = image.reference.partition("@")
        repository, colon, tag = tagged.rpartition(":")
        if not colon or "/" in tag:
            repository, tag = tagged, ""
        url = purl(
            "oci",
            repository.rpartition("/")[2].lower(),
            digest or _manifest_of(image.archive.path) or "",
            qualifiers={"arch": self._arch, "repository_url": repository.lower(), "tag": tag},
        )
        told = replace(origin, version=tag or digest)
        ref = self._add("container", told, url, file.sha256, file.path, name=image.reference)
        if origin.source == "debian":
            self._needs[ref] = {self.add_package(origin, None, self._arch)}
        elif programs:
            self._needs[ref] = {self.add_program(one.name, one.path, one.origin, one.sha256) for one in programs}
        else:
            self._unknown.add(ref)

    def written(self, title: str, release: str, mtime: int) -> bytes:
        """The document's bytes."""
        top = f"{title}@{release}"
        needs = {top: set(self._components) - {part for parts in self._needs.values() for part in parts}, **self._needs}
        component = {"type": "application", "bom-ref": top, "name": title, "version": release}
        return _written(component, self._components, needs, datetime.fromtimestamp(mtime, UTC), self._unknown)

    def _add(
        self, kind: str, origin: Origin, url: str, sha256: str | None, path: str, *, name: str = "", **more: Any
    ) -> str:
        entry: Entry = {
            "type": kind,
            "bom-ref": url,
            "name": name or origin.component,
            "version": origin.version,
            "purl": url,
            **more,
        }
        if sha256 is not None:
            entry["hashes"] = _hashes(sha256)
        told = (("nodebake:path", path), ("nodebake:source", origin.source))
        entry["properties"] = [{"name": key, "value": value} for key, value in told if value]
        self._components.setdefault(url, entry)
        return url

    def _modules(self, told: BuildInfo, own: Module | None) -> Iterator[str]:
        library = Module("stdlib", told.go.removeprefix("go").partition(" ")[0])
        for module in (library, *told.modules):
            if module == own:
                continue
            url = purl("golang", module.path, module.version)
            entry = {"type": "library", "bom-ref": url, "name": module.path, "version": module.version, "purl": url}
            self._components.setdefault(url, entry)
            yield url

    def _released(self, component: Component, name: str) -> tuple[str, Entry] | None:
        """The package URL of a file of upstream's release, and where that is fetched from."""
        release = component.release
        if release.image is not None and isinstance(release.sha256, str):
            reference = f"{component.fill(release.image)}@sha256:{release.sha256}"
            return purl("generic", f"{component.name}/{name}", component.version), _fetched_from(
                f"oci:{reference}", release.sha256
            )
        if release.url is None or isinstance(release.sha256, str):
            return None
        digests = release.sha256[self._arch]
        if (digest := digests.get("") or digests.get(name)) is None:
            return None
        where = component.fill(release.url, arch=self._arch, file=name)
        member = component.fill(release.member, arch=self._arch, file=name) if release.member else ""
        checked = {"checksum": f"sha256:{digest}", "download_url": where}
        return purl("generic", component.name, component.version, member, checked), _fetched_from(where, digest)


def _written(
    about: Entry,
    components: Mapping[str, Entry],
    needs: Mapping[str, set[str]],
    made: datetime,
    unknown: Iterable[str] = (),
) -> bytes:
    """A document. about: what it is of; needs: reference -> references of what that is made of."""
    document: Entry = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "timestamp": made.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "tools": {"components": [{"type": "application", "name": "nodebake", "version": _VERSION}]},
            "component": about,
        },
        "components": [components[ref] for ref in sorted(components)],
        "dependencies": [
            {"ref": ref, **({"dependsOn": sorted(needs[ref])} if needs.get(ref) else {})}
            for ref in sorted({about["bom-ref"], *components})
        ],
    }
    if of_unknown := sorted(unknown):
        document["compositions"] = [{"aggregate": "unknown", "assemblies": of_unknown}]
    own = uuid5(_NAMESPACE, json.dumps(document, sort_keys=True))
    return json.dumps({**document, "serialNumber": f"urn:uuid:{own}"}, indent=1, sort_keys=True).encode() + b"\n"


def _hashes(sha256: str) -> list[Entry]:
    return [{"alg": "SHA-256", "content": sha256}]


def _fetched_from(url: str, sha256: str) -> Entry:
    return {"externalReferences": [{"type": "distribution", "url": url, "hashes": _hashes(sha256)}]}


def _manifest_of(archive: Path) -> str | None:
    """The digest by which registries know an image, where its archive says it."""
    try:
        with bounds.opened(archive) as tar:
            index = tar.extractfile("index.json")
            return str(json.loads(index.read())["manifests"][0]["digest"]) if index is not None else None
    except Damaged:  # as docker save writes it
        return None
