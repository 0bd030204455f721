"""Components, their two sources, what is remembered, and real builds of a small Go module."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes import binaries, packages
from recipes.binaries import check_toolchain, load_components, obtain, obtain_all
from recipes.components import Component, GoModules, Release
from recipes.kit import gotool
from recipes.kit.choices import Choices
from recipes.kit.download import Cache, Desk, Patience, Unreachable, WrongBytes
from recipes.kit.errors import BakeError
from recipes.kit.gotool import find_c_compiler, find_go
from recipes.kit.model import Fetched
from recipes.kit.progress import Advance, Unit
from recipes.kit.unpack import unpack

MIRRORED = "https://releases.invalid/v1.2.3"
needs_arm64_compiler = pytest.mark.skipif(
    not os.environ.get("CI") and shutil.which("aarch64-linux-gnu-gcc") is None,
    reason="no C compiler for arm64: apt install gcc-aarch64-linux-gnu libc6-dev-arm64-cross",
)


class Heard:
    """Progress that remembers what it was told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.counts: dict[str, tuple[int, int | None, Unit]] = {}

    def note(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.said.append(f"warning: {text}")

    @contextmanager
    def step(self, title: str, total: int | None, unit: Unit) -> Iterator[Advance]:
        def advance(done: int) -> None:
            self.counts[title] = (done, total, unit)

        yield advance


@pytest.fixture(autouse=True)
def fresh_toolchain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in list(os.environ):
        if name.lower().endswith("_proxy") and not name.upper().startswith("GO"):
            monkeypatch.delenv(name)
    find_go.cache_clear()
    find_c_compiler.cache_clear()
    yield
    find_go.cache_clear()
    find_c_compiler.cache_clear()


@pytest.fixture
def go() -> gotool.Go:
    try:
        return find_go()
    except BakeError as missing:
        pytest.skip(f"no Go here: {missing}")


def desk_at(folder: Path, **changes: Any) -> Desk:
    """A desk; each call is a new run with the same folders."""
    desk = Desk(
        build=folder / "build",
        progress=Heard(),
        choices=Choices(folder / "secrets/choices.json"),
        patience=Patience(connect=0.5, read=0.5, attempts=2, pause=0.01),
    )
    return replace(desk, **changes)


def heard(desk: Desk) -> str:
    assert isinstance(desk.progress, Heard)
    return "\n".join(desk.progress.said)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tar_gz(entries: Mapping[str, bytes | str]) -> bytes:
    """A tar.gz in the order given; text is the target of a symbolic link."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in entries.items():
            entry = tarfile.TarInfo(name)
            if isinstance(content, str):
                entry.type, entry.linkname = tarfile.SYMTYPE, content
                tar.addfile(entry)
            else:
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def publish(folder: Path, name: str, data: bytes) -> str:
    """Into the mirror folder as MIRRORED/name; returns its SHA-256."""
    path = folder / "mirror/releases.invalid/v1.2.3" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return sha256(data)


def tool(digest: str, **modules: Any) -> Component:
    """A component of one file, `tool`, published as MIRRORED/tool."""
    return Component(
        name="tool",
        version="v1.2.3",
        install="bin",
        release=Release(
            sha256={"amd64": {"": digest}, "arm64": {"": digest}}, url="https://releases.invalid/{version}/{file}"
        ),
        modules=GoModules(packages={"tool": "example.invalid/tool"}, stamp={"main.version": "{version}"}, **modules),
    )


# ---- components.yaml ------------------------------------------------------------------------------------------------


def test_components_are_complete() -> None:
    components = load_components()
    assert {name: component.version for name, component in components.items()} == {
        "kubernetes": "v1.37.1",
        "etcd": "v3.7.2",
        "containerd": "v2.3.6",
        "runc": "v1.5.2",
        "cni-plugins": "v1.9.1",
        "flannel": "v0.28.7",
        "coredns": "v1.14.6",
        "cri-tools": "v1.36.0",
        "pause": "3.10.2",
    }
    assert len(components["cni-plugins"].files) == 18
    for component in components.values():
        release = component.release
        given = [release.sha256] if isinstance(release.sha256, str) else []
        if not isinstance(release.sha256, str):
            assert set(release.sha256) == {"amd64", "arm64"}, component.name
            for files in release.sha256.values():
                assert set(files) in ({""}, set(component.files)), component.name
                given += files.values()
        assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in given)
        assert len(set(given)) == len(given), f"{component.name}: a digest twice"


def test_both_sources_are_the_same_version() -> None:
    for component in load_components().values():
        if component.modules is None:
            continue
        text = (binaries.MODULES / component.name / "go.mod").read_text(encoding="utf-8")
        required = dict(re.findall(r"^(?:require)?\s+(\S+) (v\S+)(?: // indirect)?$", text, re.MULTILINE))
        tools = re.search(r"^tool (?:\((.*?)\)|(\S+))", text, re.MULTILINE | re.DOTALL)
        assert tools
        assert sorted((tools[1] or tools[2]).split()) == sorted(component.modules.packages.values())
        for package in component.modules.packages.values():
            module = max((name for name in required if f"{package}/".startswith(f"{name}/")), key=len)
            assert required[module] == component.version, package


def test_pins_belong_to_components() -> None:
    components = {f"{each.name} {each.version}": each for each in load_components().values()}
    pins = binaries.load_pins()
    assert {name for archs in pins.values() for names in archs.values() for name in names} <= set(components)
    for archs in pins.values():
        for names in archs.values():
            for name, files in names.items():
                assert sorted(files) == sorted(components[name].files)
    ours = [archs for toolchain, archs in pins.items() if toolchain.startswith("go1.26.8")]
    for arch in ("amd64", "arm64"):
        pinned = {name for archs in ours for name in archs.get(arch, {})}
        assert pinned == {name for name, each in components.items() if each.modules}, arch


def test_a_damaged_components_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("etcd:\n  version: v1\n")
    with pytest.raises(BakeError, match=r"c\.yaml"):
        load_components(tmp_path / "c.yaml")


# ---- release --------------------------------------------------------------------------------------------------------


def test_release_files_by_digest(tmp_path: Path) -> None:
    component = tool(publish(tmp_path, "tool", b"released"))
    desk = desk_at(tmp_path, mirror=str(tmp_path / "mirror"))
    [file] = obtain(component, "amd64", desk)
    assert (file.name, file.path.read_bytes(), file.size) == ("tool", b"released", 8)
    assert (file.origin.component, file.origin.version, file.origin.source) == ("tool", "v1.2.3", "release")
    assert file.path == desk.cache.path(file.sha256)


def test_release_archive(tmp_path: Path) -> None:
    digest = publish(tmp_path, "a.tar.gz", tar_gz({"./b/one": b"1", "b/../../etc/passwd": b"!", "b/two": b"2"}))
    component = Component(
        name="pair",
        version="v1.2.3",
        install="bin",
        release=Release(sha256={"amd64": {"": digest}}, url=f"{MIRRORED}/a.tar.gz", member="b/{file}"),
        modules=GoModules(packages={"two": "x/two", "one": "x/one"}),
    )
    files = obtain(component, "amd64", desk_at(tmp_path, mirror=str(tmp_path / "mirror")))
    assert [(file.name, file.path.read_bytes()) for file in files] == [("two", b"2"), ("one", b"1")]
    lacking = replace(component, modules=GoModules(packages={"one": "x/one", "three": "x/three"}))
    with pytest.raises(BakeError, match="lacks three"):
        obtain(lacking, "amd64", desk_at(tmp_path / "other", mirror=str(tmp_path / "mirror")))


def test_release_image(tmp_path: Path) -> None:
    """The uppermost layer that has the file wins; a later layer may have nothing of it."""
    folder = tmp_path / "mirror/registry.invalid/v2/team/tool"

    def put(kind: str, data: bytes) -> str:
        digest = f"sha256:{sha256(data)}"
        (folder / kind).mkdir(parents=True, exist_ok=True)
        (folder / kind / digest).write_bytes(data)
        return digest

    layers = [tar_gz({"opt/bin/tool": b"old"}), tar_gz({"opt/bin/tool": b"new"}), tar_gz({"etc/motd": b"hello"})]
    described = [
        {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": put("blobs", layer), "size": len(layer)}
        for layer in layers
    ]
    config = put("blobs", json.dumps({"architecture": "amd64"}).encode())
    manifest = {"config": {"mediaType": "c", "digest": config, "size": 1}, "layers": described}
    entry = {
        "digest": put("manifests", json.dumps(manifest).encode()),
        "platform": {"os": "linux", "architecture": "amd64"},
    }
    index = put("manifests", json.dumps({"manifests": [entry]}).encode())
    component = replace(
        tool("0" * 64),
        release=Release(
            sha256=index.removeprefix("sha256:"), image="registry.invalid/team/tool:{version}", member="opt/bin/{file}"
        ),
    )
    [file] = obtain(component, "amd64", desk_at(tmp_path, mirror=str(tmp_path / "mirror")))
    assert file.path.read_bytes() == b"new"


def test_wrong_bytes_never_lead_to_the_other_source(tmp_path: Path) -> None:
    publish(tmp_path, "tool", b"tampered")
    with pytest.raises(WrongBytes):
        obtain(tool(sha256(b"released")), "amd64", desk_at(tmp_path, mirror=str(tmp_path / "mirror")))


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (tar_gz({"tool": "/etc/passwd"}), "not one regular file"),
        (tar_gz({"tool": b"x" * 100_000})[:-50], "damaged or no archive"),
        (b"no archive at all", "damaged or no archive"),
    ],
)
def test_bad_archives(tmp_path: Path, content: bytes, error: str) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(BakeError, match=error):
        unpack(tmp_path / "a", {"tool": "tool", "never": "never"}, Cache(tmp_path / "cache"))


def test_archives_of_several_gzip_members(tmp_path: Path) -> None:
    plain = gzip.decompress(tar_gz({"one": b"1" * 5000, "tool": b"found"}))
    (tmp_path / "a").write_bytes(gzip.compress(plain[:1024]) + gzip.compress(plain[1024:]))
    assert unpack(tmp_path / "a", {"tool": "tool"}, Cache(tmp_path / "cache")) == {"tool": sha256(b"found")}


# ---- what is remembered ---------------------------------------------------------------------------------------------


def test_a_remembered_release_needs_no_network_and_no_toolchain(tmp_path: Path) -> None:
    component = tool(publish(tmp_path, "tool", b"released"))
    first = obtain(component, "amd64", desk_at(tmp_path, mirror=str(tmp_path / "mirror")))
    shutil.rmtree(tmp_path / "mirror")
    assert obtain(component, "amd64", desk_at(tmp_path)) == first


def test_a_remembered_release_is_never_replaced_because_it_cannot_be_reached(tmp_path: Path) -> None:
    component = tool(publish(tmp_path, "tool", b"released"))
    obtain(component, "amd64", desk_at(tmp_path, mirror=str(tmp_path / "mirror")))
    shutil.rmtree(tmp_path / "build")
    (tmp_path / "mirror/releases.invalid/v1.2.3/tool").unlink()
    with pytest.raises(BakeError, match="this cluster was baked from") as caught:
        obtain(component, "amd64", desk_at(tmp_path, mirror=str(tmp_path / "mirror")))
    assert "doit source=modules" in (caught.value.remedy or "")


def test_a_release_that_was_asked_for_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mirror").mkdir()
    with pytest.raises(BakeError, match="was asked for"):
        obtain(tool("0" * 64), "amd64", desk_at(tmp_path, mirror=str(tmp_path / "mirror"), source="release"))


# ---- the toolchain --------------------------------------------------------------------------------------------------


def program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def test_no_go_is_told_before_anything_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "empty/python"))
    (tmp_path / "mirror").mkdir()
    desk = desk_at(tmp_path, mirror=str(tmp_path / "mirror"))
    with pytest.raises(BakeError, match=r"not in the mirror.*there is none on this desk") as caught:
        obtain_all([tool("0" * 64)], "amd64", desk)
    assert "pip install -e '.[go]'" in (caught.value.remedy or "")
    assert isinstance(desk.progress, Heard)
    assert desk.progress.counts == {}


def test_an_old_go_gives_way_to_the_one_beside_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "old", "go", "echo go1.19.8")
    program(tmp_path / "venv", "go", "echo go1.27.3")
    monkeypatch.setenv("PATH", f"{tmp_path / 'old'}:{os.environ['PATH']}")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv/python"))
    assert find_go().version == "go1.27.3"
    find_go.cache_clear()
    (tmp_path / "venv/go").unlink()
    with pytest.raises(BakeError, match=r"needs Go 1\.26\.8 or newer; .*/old/go is go1\.19\.8"):
        find_go()


def test_a_c_compiler_is_asked_of_those_alone_that_need_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "bin", "go", "echo go1.26.8")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/nonexistent")
    program(tmp_path / "bin", "sh", 'exec /bin/sh "$@"')
    monkeypatch.setattr(gotool, "native_arch", lambda: "amd64")
    check_toolchain([tool("0" * 64)], "amd64")
    needy = tool("0" * 64, cgo=("amd64",))
    check_toolchain([needy], "arm64")
    with pytest.raises(BakeError, match="there is no gcc") as caught:
        check_toolchain([needy], "amd64")
    assert caught.value.remedy == "apt install gcc libc6-dev"
    program(tmp_path / "bin", "gcc", "echo cannot find -lc >&2; exit 1")
    with pytest.raises(BakeError, match="cannot link a static program for amd64: cannot find -lc"):
        check_toolchain([needy], "amd64")
    with pytest.raises(BakeError, match="there is no aarch64-linux-gnu-gcc") as caught:
        check_toolchain([tool("0" * 64, cgo=("arm64",))], "arm64")
    assert caught.value.remedy == "apt install gcc-aarch64-linux-gnu libc6-dev-arm64-cross"


# ---- modules --------------------------------------------------------------------------------------------------------

MAIN = """package main

import "fmt"

var version = "unknown"

func main() { fmt.Println("tool", version) }
"""
WITH_C = """package main

// #cgo pkg-config: libthree
// #include <three.h>
import "C"

func init() { version += map[bool]string{true: "!"}[C.three() != 3] }
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """recipes/modules with the one module of `tool`; no pins."""
    folder = tmp_path / "modules/tool"
    folder.mkdir(parents=True)
    (folder / "go.mod").write_text("module example.invalid/tool\n\ngo 1.26.0\n")
    (folder / "main.go").write_text(MAIN)
    monkeypatch.setattr(binaries, "MODULES", tmp_path / "modules")
    monkeypatch.setattr(binaries, "PINS", tmp_path / "pins.yaml")
    return folder


def built(folder: Path, component: Component, **changes: Any) -> tuple[Fetched, Desk]:
    desk = desk_at(folder, **{"source": "modules", **changes})
    [file] = obtain(component, "amd64" if gotool.native_arch() == "amd64" else "arm64", desk)
    return file, desk


def pin(path: Path, toolchain: str, digest: str) -> None:
    pins = {toolchain: {gotool.native_arch(): {"tool v1.2.3": {"tool": digest}}}}
    path.write_text(yaml.safe_dump(pins))


def test_builds_when_the_release_is_out_of_reach(tmp_path: Path, module: Path, go: gotool.Go) -> None:
    component = replace(
        tool("0" * 64),
        release=Release(sha256={"amd64": {"": "0" * 64}, "arm64": {"": "0" * 64}}, url="http://127.0.0.1:1/tool"),
    )
    file, desk = built(tmp_path, component, source=None)
    assert "does not take connections; building it from Go modules" in heard(desk)
    assert file.origin.source == f"modules ({go.version}, not pinned)"
    assert "is not pinned" in heard(desk)
    copy = tmp_path / "tool"
    shutil.copy(file.path, copy)
    copy.chmod(0o755)
    assert subprocess.run([copy], capture_output=True, text=True, check=True).stdout == "tool v1.2.3\n"
    assert isinstance(desk.progress, Heard)
    done, total, unit = desk.progress.counts["tool"]
    assert (done, unit) == (total, "packages")
    assert done > 10
    assert sorted(path.name for path in module.iterdir()) == ["go.mod", "main.go"]  # nothing is written there


def static_library(folder: Path, compiler: str) -> Path:
    """Headers as Debian's -dev packages bring them, of a library with one function."""
    lib = folder / "usr/lib" / gotool.TRIPLETS[gotool.native_arch() or "amd64"]
    (lib / "pkgconfig").mkdir(parents=True)
    (lib / "pkgconfig/libthree.pc").write_text("Name: libthree\nVersion: 3.1\n")
    (folder / "usr/include").mkdir()
    (folder / "usr/include/three.h").write_text("int three(void);\n")
    (folder / "three.c").write_text("int three(void) { return 3; }\n")
    subprocess.run([compiler, "-c", "-O2", "-g0", "-o", folder / "three.o", folder / "three.c"], check=True)
    subprocess.run(["ar", "rcsD", lib / "libthree.a", folder / "three.o"], check=True)
    return folder


def test_the_same_bytes_in_other_circumstances(
    tmp_path: Path, module: Path, go: gotool.Go, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With C, in another folder, with other headers' folder and a user who set all that could change a build."""
    (module / "c.go").write_text(WITH_C)
    component = tool("0" * 64, cgo=("amd64", "arm64"), headers="libthree")
    arch = gotool.native_arch() or "amd64"
    try:
        compiler = find_c_compiler(arch).program
    except BakeError as missing:
        pytest.skip(f"no C compiler here: {missing}")
    headers = static_library(tmp_path / "headers", compiler)
    [first] = obtain(component, arch, desk_at(tmp_path / "one", source="modules"), headers=headers)
    shutil.copytree(module, tmp_path / "it's elsewhere/tool")
    monkeypatch.setattr(binaries, "MODULES", tmp_path / "it's elsewhere")
    settings = {
        "GOFLAGS": "-tags=other",
        "GOAMD64": "v3",
        "CGO_CFLAGS": "-O0",
        "TZ": "Asia/Tokyo",
        "PKG_CONFIG": "false",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "config/go").mkdir(parents=True)
    (tmp_path / "config/go/env").write_text("GOEXPERIMENT=nogreenteagc\n")
    shutil.copytree(headers, tmp_path / "it's elsewhere/headers")
    desk = desk_at(tmp_path / "a second one", source="modules")
    [second] = obtain(component, arch, desk, headers=lambda: tmp_path / "it's elsewhere/headers")
    assert second.sha256 == first.sha256
    assert re.fullmatch(
        rf"modules \({go.version} gcc [0-9.]+ \([0-9a-f]{{12}}\) libthree 3\.1 \([0-9a-f]{{12}}\), not pinned\)",
        first.origin.source,
    )


def test_pins(tmp_path: Path, module: Path, go: gotool.Go) -> None:
    file, _ = built(tmp_path / "one", tool("0" * 64))
    pin(tmp_path / "pins.yaml", go.version, file.sha256)
    pinned, desk = built(tmp_path / "two", tool("0" * 64))
    assert pinned.origin.source == f"modules ({go.version})"
    assert heard(desk) == ""
    (module / "go.mod").rename(module / "gone")  # nothing can be built: the pinned file of another cluster is enough
    again, _ = built(tmp_path / "two", tool("0" * 64), choices=Choices(tmp_path / "other.json"))
    assert again == pinned
    (module / "gone").rename(module / "go.mod")
    pin(tmp_path / "pins.yaml", go.version, "0" * 64)
    with pytest.raises(BakeError, match=r"tool built with go.* has not the pinned SHA-256"):
        built(tmp_path / "three", tool("0" * 64))
    pin(tmp_path / "pins.yaml", "go1.99.0", "0" * 64)
    other, _ = built(tmp_path / "four", tool("0" * 64))
    assert other.origin.source.endswith("not pinned)")


def test_a_wrong_version_stamp_is_an_error(tmp_path: Path, module: Path, go: gotool.Go) -> None:
    component = tool("0" * 64)
    assert component.modules
    unstamped = replace(component, modules=replace(component.modules, stamp={}))
    with pytest.raises(BakeError, match=r"tool was to be v1\.2\.3, but says of itself: tool unknown"):
        built(tmp_path, unstamped)
    assert not list((tmp_path / "build/downloads/builds").iterdir())


def test_changing_the_source_is_told_and_kept(tmp_path: Path, module: Path, go: gotool.Go) -> None:
    component = tool(publish(tmp_path, "tool", b"released"))
    mirror = str(tmp_path / "mirror")
    arch = gotool.native_arch() or "amd64"
    obtain(component, arch, desk_at(tmp_path, mirror=mirror))
    changed, desk = built(tmp_path, component, mirror=mirror)
    assert "the source is now modules, it was release" in heard(desk)
    [kept] = obtain(component, arch, desk_at(tmp_path, mirror=mirror))  # though the release is there
    assert kept == changed
    back, desk = built(tmp_path, component, mirror=mirror, source="release")
    assert back.path.read_bytes() == b"released"
    assert "the source is now release, it was modules" in heard(desk)


def test_another_toolchain_never_changes_bytes_unasked(tmp_path: Path, module: Path, go: gotool.Go) -> None:
    component = tool("0" * 64)
    arch = gotool.native_arch() or "amd64"
    file, _ = built(tmp_path, component)
    record = Choices(tmp_path / "secrets/choices.json").get("components", f"tool/{arch}")
    assert record
    Choices(tmp_path / "secrets/choices.json").remember(
        "components", f"tool/{arch}", {**record, "toolchain": "go1.26.9", "files": {"tool": "1" * 64}}
    )
    with pytest.raises(BakeError, match=r"is not what go1\.26\.9 built for this cluster"):
        obtain(component, arch, desk_at(tmp_path))
    new, desk = built(tmp_path, component)
    assert new == file
    assert "no longer with go1.26.9" in heard(desk)


def test_compile_errors_and_silent_proxies_are_told_apart(
    tmp_path: Path, module: Path, go: gotool.Go, monkeypatch: pytest.MonkeyPatch
) -> None:
    (module / "main.go").write_text("package main\n\nfunc main() { undefined() }\n")
    with pytest.raises(BakeError, match="undefined: undefined") as caught:
        built(tmp_path, tool("0" * 64))
    assert not isinstance(caught.value, Unreachable)
    (module / "main.go").write_text('package main\n\nimport _ "example.invalid/lib"\n\nfunc main() {}\n')
    (module / "go.mod").write_text("module example.invalid/tool\n\ngo 1.26.0\n\nrequire example.invalid/lib v1.0.0\n")
    (module / "go.sum").write_text("example.invalid/lib v1.0.0 h1:x\nexample.invalid/lib v1.0.0/go.mod h1:x\n")
    monkeypatch.setenv("GOPROXY", "http://127.0.0.1:1")
    with pytest.raises(Unreachable, match="cannot be downloaded"):
        built(tmp_path, tool("0" * 64))


@needs_arm64_compiler
def test_runc_for_arm64_is_cross_compiled(tmp_path: Path) -> None:
    """With the C parts: the library's package is of the other architecture too. What is pinned is what comes."""
    choices = Choices(tmp_path / "choices.json")
    desk = Desk(build=tmp_path, mirror=None, source="modules", progress=Heard(), choices=choices)
    headers = partial(packages.headers, "arm64", desk, None)
    [runc] = obtain_all([load_components()["runc"]], "arm64", desk, headers=headers)["runc"]
    head = runc.path.read_bytes()[:20]
    assert (head[:4], int.from_bytes(head[18:20], "little")) == (b"\x7fELF", 183)
    headers_of = subprocess.run(["readelf", "-lW", runc.path], capture_output=True, text=True, check=True).stdout
    assert "INTERP" not in headers_of and "DYNAMIC" not in headers_of, "it needs no library of the machine's"
