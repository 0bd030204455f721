"""components.yaml, typed: what is fetched, in which version, from where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from recipes.kit.errors import BakeError
from recipes.kit.model import Arch

COMPONENTS = Path(__file__).parent / "components.yaml"

Install = Literal["bin", "cni", "image"]


@dataclass(frozen=True, slots=True)
class Release:
    """Upstream's own files; the fields' templates are filled by Component."""

    sha256: Mapping[Arch, Mapping[str, str]] | str  # of files ({"": ...}: of the archive); of the image's index
    url: str | None = None
    image: str | None = None
    member: str | None = None  # in the archive or the image, with {file}


@dataclass(frozen=True, slots=True)
class GoModules:
    """How upstream's Go modules become the files."""

    packages: Mapping[str, str]  # file -> main package
    tags: tuple[str, ...] = ()
    more_tags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # file -> tags that only it has
    stamp: Mapping[str, str] = field(default_factory=dict)  # Go variable -> value, for -X
    cgo: tuple[Arch, ...] = ()
    headers: str | None = None
    version_arguments: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # default: --version


@dataclass(frozen=True, slots=True)
class Component:
    """One entry of components.yaml."""

    name: str
    version: str
    install: Install
    release: Release
    modules: GoModules | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """The names of its files; none for a whole image."""
        return tuple(self.modules.packages) if self.modules else ()

    def fill(self, template: str, **more: str) -> str:
        return template.format(version=self.version, number=self.version.removeprefix("v"), **more)


def load_components(path: Path = COMPONENTS) -> dict[str, Component]:
    """components.yaml by name, in its order. Raises BakeError if it is damaged."""
    import yaml  # here: a bake whose components did not change reads none

    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
        return {name: _component(name, entry) for name, entry in read.items()}
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as trouble:
        raise BakeError(f"the components are not well written: {trouble}", where=path) from trouble


def _component(name: str, entry: Mapping[str, Any]) -> Component:
    release = dict(entry["release"])
    if "url" in release:  # a bare digest per architecture is the one of the file or archive that the URL names
        release["sha256"] = {
            arch: {"": given} if isinstance(given, str) else given for arch, given in release["sha256"].items()
        }
    modules = dict(entry["modules"]) if "modules" in entry else None
    if modules is not None:
        for key in ("tags", "cgo"):
            modules[key] = tuple(modules.get(key, ()))
        for key in ("more_tags", "version_arguments"):
            modules[key] = {file: tuple(words) for file, words in modules.get(key, {}).items()}
    if entry["install"] not in get_args(Install):
        raise TypeError(f"{name}: install may be {', '.join(get_args(Install))}")
    return Component(
        name=name,
        version=entry["version"],
        install=entry["install"],
        release=Release(**release),
        modules=GoModules(**modules) if modules is not None else None,
    )
