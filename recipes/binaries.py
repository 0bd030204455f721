"""Component -> verified files: upstream's release binaries, or the same version built from upstream's Go modules."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from recipes.components import COMPONENTS, Component, GoModules, Release, load_components
from recipes.kit.download import Cache, Desk, NotServed, Unreachable, fetch
from recipes.kit.errors import BakeError
from recipes.kit.gotool import (
    Build,
    CCompiler,
    Go,
    find_c_compiler,
    find_go,
    go_build,
    library_identity,
    native_arch,
)
from recipes.kit.hashing import hash_file
from recipes.kit.locks import locked
from recipes.kit.model import Arch, Fetched, Origin, Source
from recipes.kit.registry import Blob, pull_image
from recipes.kit.unpack import unpack

__all__ = ["Component", "GoModules", "Release", "check_toolchain", "load_components", "obtain", "obtain_all"]

MODULES = Path(__file__).parent / "modules"
PINS = MODULES / "pins.yaml"

Headers = Path | Callable[[], Path] | None
Pins = Mapping[str, Mapping[str, Mapping[str, Mapping[str, str]]]]  # toolchain -> arch -> "component version" -> file


# ---- what a bake asks for -------------------------------------------------------------------------------------------


def obtain(component: Component, arch: Arch, desk: Desk, *, headers: Headers = None) -> list[Fetched]:
    """The component's files, in its order; see obtain_all()."""
    return obtain_all([component], arch, desk, headers=headers)[component.name]


def obtain_all(
    components: Iterable[Component], arch: Arch, desk: Desk, *, headers: Headers = None
) -> dict[str, list[Fetched]]:
    """Component name -> its files in the cache. Components that are whole images are left to images.py.

    Everything that is cached or can be downloaded comes first; then, before anything is compiled, the toolchain is
    checked for all that is left. headers: folder (or what makes it, only called if needed) with libseccomp's headers.
    The source that gave a component's bytes is remembered with the cluster. Raises BakeError with the remedy.
    """
    done: dict[str, list[Fetched]] = {}
    left: list[_Order] = []
    wanted = [component for component in components if component.modules is not None]
    for component in wanted:
        order = _Order(component, arch, desk)
        files = order.remembered_files() or order.download()
        if files is not None:
            done[component.name] = files
        else:
            left.append(order)
    if left:
        try:
            check_toolchain([order.component for order in left], arch)
        except BakeError as missing:
            raise BakeError(_why_built(left) + missing.what, where=missing.where, remedy=missing.remedy) from missing
    for order in left:
        done[order.component.name] = order.build(headers)
    return {component.name: done[component.name] for component in wanted}


def check_toolchain(components: Iterable[Component], arch: Arch) -> None:
    """Raise BakeError with the remedy unless these components can be built here. Takes less than a second."""
    modules = [component.modules for component in components if component.modules is not None]
    if modules:
        find_go()
    if any(arch in each.cgo for each in modules):
        find_c_compiler(arch)


def _why_built(left: Sequence[_Order]) -> str:
    troubles = sorted({order.trouble.what for order in left if order.trouble is not None})
    return f"{'; '.join(troubles)}; " if troubles else ""


class _Order:
    """One component for one architecture, on its way through the sources."""

    def __init__(self, component: Component, arch: Arch, desk: Desk) -> None:
        self.component = component
        self.arch: Arch = arch
        self.desk = desk
        self.pins = load_pins()
        self.key = f"{component.name}/{arch}"
        self.inputs = _inputs(component, arch)
        self.remembered: dict[str, Any] = desk.choices.get("components", self.key) or {}
        self.trouble: BakeError | None = None  # why the release source did not give it

    @property
    def title(self) -> str:
        return f"{self.component.name} {self.component.version} {self.arch}"

    @property
    def source(self) -> Source | None:
        """The one source that may be used; None if nobody has chosen."""
        return self.desk.source or self.remembered.get("source")

    def remembered_digests(self, source: Source) -> Mapping[str, str] | None:
        """What the cluster's files were, if nothing but reachability and the toolchain can have changed since."""
        same = self.remembered.get("source") == source and self.remembered.get("inputs") == self.inputs
        files: Mapping[str, str] | None = self.remembered.get("files")
        return files if same else None

    def remembered_files(self) -> list[Fetched] | None:
        """The cluster's files from the cache."""
        digests = self.remembered_digests(self.source) if self.source else None
        return self._from_cache(digests, self.remembered["told"]) if digests else None

    def download(self) -> list[Fetched] | None:
        """The files from upstream's release; None if they have to be built. Raises if they may not be."""
        if self.source == "modules":
            return None
        try:
            digests = _release(self.component, self.arch, self.desk)
        except (Unreachable, NotServed) as trouble:
            if self.source == "release":
                chosen = "was asked for" if self.desk.source else "this cluster was baked from"
                raise BakeError(
                    f"{self.title}: the release, which {chosen}, is not to be had: {trouble.what}",
                    where=trouble.where,
                    remedy="wait for the network, give mirror=, or build the same version: doit source=modules",
                ) from trouble
            self.desk.progress.warn(f"{self.title}: {trouble.what}; building it from Go modules")
            self.trouble = trouble
            return None
        return self._keep("release", "release", "", digests)

    def build(self, headers: Headers) -> list[Fetched]:
        """The files, built from Go modules, or from the cache if these very files were pinned."""
        recipe = self.component.modules
        if recipe is None:
            raise ValueError(f"{self.component.name} is not built from modules")
        go = find_go()
        compiler = find_c_compiler(self.arch) if self.arch in recipe.cgo else None
        folder = None
        if compiler is not None and recipe.headers is not None:
            folder = headers() if callable(headers) else headers
            if folder is None:
                raise ValueError(f"{self.component.name} needs the headers of {recipe.headers}")
        toolchain = " ".join(
            (
                go.version,
                *((compiler.identity,) if compiler else ()),
                *((library_identity(folder, recipe.headers, self.arch),) if folder and recipe.headers else ()),
            )
        )
        pinned = self.pins.get(toolchain, {}).get(self.arch, {}).get(f"{self.component.name} {self.component.version}")
        told = f"modules ({toolchain})" if pinned else f"modules ({toolchain}, not pinned)"
        lock = self.desk.cache.root / "locks" / f"{self.component.name}-{self.arch}"
        with locked(lock, lambda: self.desk.progress.note(f"{self.title}: waiting for another bake that builds it")):
            if pinned and self._from_cache(pinned, told):
                return self._keep("modules", told, toolchain, pinned)
            digests = _build(self.component, self.arch, self.desk, go, compiler, folder)
        if pinned is None:
            self.desk.progress.warn(f"{self.title}: what {toolchain} builds is not pinned; the manifest says so")
        elif differing := _differing(digests, pinned):
            raise BakeError(
                f"{self.title}: {differing} built with {toolchain} has not the pinned SHA-256",
                where=PINS,
                remedy="do not use it; find out what differs (a changed toolchain, module or pin)",
            )
        before = self.remembered_digests("modules")
        if before and (differing := _differing(digests, before)):
            was = self.remembered["toolchain"]
            if self.desk.source != "modules":
                raise BakeError(
                    f"{self.title}: {differing} built with {toolchain} is not what {was} built for this cluster",
                    where=self.desk.choices.path,
                    remedy=f"build with {was}, or take the new bytes: doit source=modules",
                )
            self.desk.progress.note(f"{self.title}: now built with {toolchain}, no longer with {was}")
        return self._keep("modules", told, toolchain, digests)

    def _keep(self, source: Source, told: str, toolchain: str, digests: Mapping[str, str]) -> list[Fetched]:
        """Remember where the files came from, with the cluster."""
        was = self.remembered.get("source", source)
        if was != source:
            self.desk.progress.note(f"{self.title}: the source is now {source}, it was {was}; the bytes change")
        value = {
            "source": source,
            "told": told,
            "toolchain": toolchain,
            "version": self.component.version,
            "inputs": self.inputs,
            "files": dict(digests),
        }
        self.desk.choices.remember("components", self.key, value)
        files = self._from_cache(digests, told)
        if files is None:
            raise BakeError(
                f"{self.title}: its files were damaged right after they were written", where=self.desk.build
            )
        return files

    def _from_cache(self, digests: Mapping[str, str], told: str) -> list[Fetched] | None:
        """All the files, or None if one is missing."""
        origin = Origin(self.component.name, self.component.version, told)
        names = self.component.files
        if not digests.keys() >= set(names):
            return None
        with ThreadPoolExecutor() as pool:  # hashing is most of what a bake does here that has nothing to obtain
            paths = list(pool.map(self.desk.cache.find, (digests[name] for name in names)))
        there = [(name, path) for name, path in zip(names, paths, strict=True) if path is not None]
        if len(there) < len(names):
            return None
        return [Fetched(name, path, digests[name], path.stat().st_size, origin) for name, path in there]


def _differing(got: Mapping[str, str], wanted: Mapping[str, str]) -> str:
    return ", ".join(name for name in got if got[name] != wanted.get(name))


def _inputs(component: Component, arch: Arch) -> str:
    """A digest of all that decides over the bytes at the desk's side: the entry in components.yaml, go.mod, go.sum."""
    digest = hashlib.sha256(repr((component, arch)).encode())
    for name in ("go.mod", "go.sum"):
        path = MODULES / component.name / name
        digest.update(path.read_bytes() if path.exists() else b"-")
    return digest.hexdigest()[:32]


# ---- release --------------------------------------------------------------------------------------------------------


def _release(component: Component, arch: Arch, desk: Desk) -> dict[str, str]:
    """Upstream's files into the cache: file -> SHA-256."""
    release = component.release
    if release.image is not None:
        image = pull_image(component.fill(release.image), f"sha256:{release.sha256}", arch, desk)
        return _from_layers(image.layers, _members(component, arch), desk.cache)
    if release.url is None or isinstance(release.sha256, str):
        raise BakeError(f"{component.name} has neither an image nor a URL with digests", where=COMPONENTS)
    digests = release.sha256[arch]
    if "" not in digests:
        for name in component.files:
            url = component.fill(release.url, arch=arch, file=name)
            fetch(url, f"sha256:{digests[name]}", desk, title=f"{name} {component.version} {arch}")
        return {name: digests[name] for name in component.files}
    url = component.fill(release.url, arch=arch, file=component.files[0])
    path = fetch(url, f"sha256:{digests['']}", desk, title=f"{component.name} {component.version} {arch}")
    if release.member is None:
        return {component.files[0]: digests[""]}
    found = unpack(path, _members(component, arch), desk.cache)
    _all_found(component, found, url)
    return found


def _members(component: Component, arch: Arch) -> dict[str, str]:
    """Path in the archive or image -> file."""
    template = component.release.member or "{file}"
    return {component.fill(template, arch=arch, file=name): name for name in component.files}


def _all_found(component: Component, found: Mapping[str, str], where: str) -> None:
    if missing := [name for name in component.files if name not in found]:
        raise BakeError(f"{component.name}'s release lacks {', '.join(missing)}", where=where)


def _from_layers(layers: Sequence[Blob], members: Mapping[str, str], cache: Cache) -> dict[str, str]:
    """Files out of an image: the uppermost layer that has one wins."""
    found: dict[str, str] = {}
    for layer in reversed(layers):
        if not layer.media_type.endswith("gzip"):
            raise BakeError(f"layers of the type {layer.media_type} are not read here", where=layer.digest)
        rest = {member: name for member, name in members.items() if name not in found}
        found |= unpack(layer.path, rest, cache)
    if missing := [member for member, name in members.items() if name not in found]:
        raise BakeError(f"the image lacks {', '.join(missing)}")
    return found


# ---- modules --------------------------------------------------------------------------------------------------------


def load_pins() -> Pins:
    """What known toolchains build: toolchain -> arch -> "component version" -> file -> SHA-256."""
    if not PINS.exists():
        return {}
    pins: Pins = yaml.safe_load(PINS.read_text(encoding="utf-8")) or {}
    return pins


def _build(
    component: Component, arch: Arch, desk: Desk, go: Go, compiler: CCompiler | None, headers: Path | None
) -> dict[str, str]:
    """Build the component's files into the cache: file -> SHA-256."""
    digests: dict[str, str] = {}
    with _scratch(desk.cache.root / "builds" / f"{component.name}-{arch}") as scratch:
        for number, (build, names) in enumerate(_builds(component)):
            into = scratch / str(number)
            title = component.name if len(names) > 1 else names[0]
            go_build(build, into, arch, go, desk.progress, title=title, compiler=compiler, headers=headers)
            for name, package in zip(names, build.packages, strict=True):
                built = into / "bin" / _program(package)
                if arch == native_arch():
                    _check_version(component, name, built)
                digests[name] = hash_file(built)
                desk.cache.add(built, digests[name])
    return digests


def _builds(component: Component) -> Iterator[tuple[Build, list[str]]]:
    """What to build together, with the files that come of it: those that share their tags."""
    recipe = component.modules
    if recipe is None:
        return
    stamps = " ".join(f"-X {variable}={component.fill(value)}" for variable, value in recipe.stamp.items())
    by_tags: dict[tuple[str, ...], list[str]] = {}
    for name in component.files:
        by_tags.setdefault(recipe.tags + recipe.more_tags.get(name, ()), []).append(name)
    for tags, names in by_tags.items():
        packages = [recipe.packages[name] for name in names]
        yield Build(MODULES / component.name, packages, tags, stamps), names


def _program(package: str) -> str:
    """What go calls the program of a main package: the last part of its path that is no major version."""
    return re.sub(r"/v\d+$", "", package).rpartition("/")[2]


def _check_version(component: Component, name: str, built: Path) -> None:
    """A program that does not know its version was built with the wrong stamp."""
    arguments = component.modules.version_arguments.get(name, ("--version",)) if component.modules else ()
    done = subprocess.run([built, *arguments], capture_output=True, text=True, check=False, env={}, timeout=60)
    number = component.version.removeprefix("v")
    if not re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.])", done.stdout + done.stderr):
        said = (done.stdout + done.stderr).strip().partition("\n")[0]
        raise BakeError(f"{name} was to be {component.version}, but says of itself: {said or 'nothing'}", where=built)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """An empty folder, gone afterwards; what a killed run left in it is gone before."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
