"""Packages: a small signed archive is built here, served on loopback and resolved by the real apt."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from recipes import packages
from recipes.kit.choices import Choices
from recipes.kit.download import Desk, NotServed, WrongBytes
from recipes.kit.errors import BakeError
from recipes.kit.hashing import hash_file
from recipes.kit.model import Cluster
from recipes.kit.progress import Advance, Unit
from tests import samples

needs_apt = pytest.mark.skipif(
    any(shutil.which(program) is None for program in ("apt-get", "dpkg-deb", "gpg")),
    reason="needs apt, dpkg-deb and gpg",
)


@dataclass
class Told:
    """A Progress that keeps what it was told."""

    warnings: list[str] = field(default_factory=list)

    def note(self, text: str) -> None: ...

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    @contextmanager
    def step(self, title: str, total: int | None, unit: Unit) -> Iterator[Advance]:
        yield lambda _: None


@dataclass
class Key:
    """A throwaway OpenPGP key; home is gpg's."""

    home: Path
    public: Path

    @classmethod
    def make(cls, folder: Path) -> Key:
        folder.mkdir(mode=0o700)
        key = cls(folder, folder / "public.gpg")
        key.gpg("--passphrase", "", "--quick-generate-key", "archive@test.invalid", "ed25519", "sign", "never")
        key.gpg("--output", str(key.public), "--export")
        return key

    def gpg(self, *arguments: str) -> None:
        command = ["gpg", "--homedir", str(self.home), "--batch", "--quiet", "--pinentry-mode", "loopback", *arguments]
        subprocess.run(command, check=True, capture_output=True)


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Key, Key]]:
    """The archive's key, and a stranger's."""
    folder = tmp_path_factory.mktemp("gpg")
    made = Key.make(folder / "a"), Key.make(folder / "b")
    yield made
    for key in made:
        subprocess.run(["gpgconf", "--homedir", str(key.home), "--kill", "gpg-agent"], check=False)


class Archive:
    """A Debian archive of a few packages, below root; publish() writes and signs the index."""

    def __init__(self, root: Path, key: Key) -> None:
        self.root = root
        self.key = key
        self.index: dict[str, str] = {}

    def add(self, name: str, version: str, content: str = "", **fields: str) -> Path:
        """One package, with the file usr/bin/<name> in it; an older version of it leaves the index, not the pool."""
        tree = self.root / "tree"
        shutil.rmtree(tree, ignore_errors=True)
        (tree / "DEBIAN").mkdir(parents=True)
        (tree / "usr/bin").mkdir(parents=True)
        (tree / "usr/bin" / name).write_text(content or f"{name} {version}\n")
        control = {"Package": name, "Version": version, "Architecture": "amd64", "Maintainer": "t <t@test.invalid>"}
        control |= {key.replace("_", "-"): value for key, value in fields.items()} | {"Description": "a test"}
        text = "".join(f"{key}: {value}\n" for key, value in control.items())
        (tree / "DEBIAN/control").write_text(text)
        file = self.root / "pool" / f"{name}_{version.partition(':')[2] or version}_amd64.deb"
        file.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["dpkg-deb", "--build", "-Znone", "--root-owner-group", tree, file], check=True, capture_output=True
        )
        self.index[name] = f"{text}Filename: pool/{file.name}\nSize: {file.stat().st_size}\nSHA256: {hash_file(file)}\n"
        return file

    def publish(self, suite: str = packages.SUITE, key: Key | None = None) -> None:
        for each in (suite, f"{suite}-updates") if suite == packages.SUITE else (suite,):
            folder = self.root / "dists" / each
            listed = folder / "main/binary-amd64/Packages"
            listed.parent.mkdir(parents=True, exist_ok=True)
            listed.write_text("" if each.endswith("-updates") else "\n".join(self.index.values()))
            data = listed.read_bytes()
            (folder / "Release").write_text(
                f"Origin: Debian\nSuite: {each}\nCodename: {each}\nArchitectures: amd64\nComponents: main\n"
                f"Date: Thu, 01 Jan 2026 00:00:00 UTC\nSHA256:\n"
                f" {hashlib.sha256(data).hexdigest()} {len(data)} main/binary-amd64/Packages\n"
            )
            (key or self.key).gpg(
                "--yes", "--output", str(folder / "InRelease"), "--clear-sign", str(folder / "Release")
            )


@dataclass
class World:
    """An archive, the server that stands before it, and desks that use both."""

    archive: Archive
    url: str
    tmp: Path
    told: Told = field(default_factory=Told)

    def desk(self, name: str = "desk") -> Desk:
        """Desks of other names have a cache of their own; all share what the cluster remembers."""
        return Desk(build=self.tmp / name, progress=self.told, choices=Choices(self.tmp / "choices.json"))

    def cluster(self, **changes: Any) -> Cluster:
        return samples.ha(debian_mirror=self.url, **changes)

    def obtain(self, *names: str, desk: str = "desk", **changes: Any) -> dict[str, str]:
        """File name -> SHA-256."""
        fetched = packages.obtain(names, "amd64", self.cluster(**changes), self.desk(desk))
        assert [hash_file(each.path) for each in fetched] == [each.sha256 for each in fetched]
        return {each.name: each.sha256 for each in fetched}


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None: ...


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory, keys: tuple[Key, Key]) -> Archive:
    """haproxy needs liblua, a newer libssl than the oldest base has, and a libc that any base has."""
    archive = Archive(tmp_path_factory.mktemp("template"), keys[0])
    archive.add("base-files", "13", Essential="yes")
    archive.add("libc", "1.2+deb13u2", Priority="required")
    archive.add("libssl", "3.5.4-1~deb13u1", Priority="required", Depends="libc (>= 1.2)")
    archive.add("apt", "3.0", Depends="libc (>= 1.2+deb13u2)")
    archive.add("systemd-sysv", "257")
    archive.add("liblua", "5.4.7-1+b2")
    archive.add("haproxy-doc", "1")
    needs = "liblua (>= 5.4), libssl (>= 3.5.2), libc (>= 1.2)"
    archive.add("haproxy", "1:3.0.11-1", Depends=needs, Recommends="haproxy-doc")
    archive.publish()
    return archive


@pytest.fixture
def world(tmp_path: Path, keys: tuple[Key, Key], template: Archive, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    archive = Archive(tmp_path / "srv/debian", keys[0])
    shutil.copytree(template.root, archive.root)
    archive.index = dict(template.index)
    monkeypatch.setattr(packages, "KEYRINGS", (keys[0].public,))
    monkeypatch.setattr(packages, "SOURCES", tmp_path / "etc")
    monkeypatch.setattr(packages, "_carried_over", lambda: "")
    for variable in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(tmp_path / "srv")))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield World(archive, f"http://127.0.0.1:{server.server_port}/debian", tmp_path)
    server.shutdown()
    server.server_close()


CLOSURE = ["haproxy_3.0.11-1_amd64.deb", "liblua_5.4.7-1+b2_amd64.deb", "libssl_3.5.4-1~deb13u1_amd64.deb"]


@needs_apt
def test_the_closure_is_what_the_oldest_machine_lacks(world: World) -> None:
    fetched = packages.obtain(["haproxy"], "amd64", world.cluster(), world.desk())
    assert [each.name for each in fetched] == CLOSURE
    assert [hash_file(each.path) for each in fetched] == [each.sha256 for each in fetched]
    assert [each.size for each in fetched] == [each.path.stat().st_size for each in fetched]
    assert (fetched[0].origin.component, fetched[0].origin.version, fetched[0].origin.source) == (
        "haproxy",
        "1:3.0.11-1",
        "debian",
    )
    assert "no trixie-security" in world.told.warnings[0]


@needs_apt
def test_why_no_security_updates_are_taken_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """An archive that does not answer today is not the same as one that is not there."""
    monkeypatch.setattr(Silent, "do_GET", hiccup_of_security(Silent.do_GET))
    world.obtain("haproxy")
    assert re.search(r"no trixie-security: http://\S+-security/?: .*503", world.told.warnings[0]), world.told.warnings


def hiccup_of_security(real: Callable[[Any], None]) -> Callable[[Any], None]:
    return lambda request: request.send_error(503) if "security" in request.path else real(request)


@needs_apt
def test_a_mirror_in_a_folder_however_it_is_spelt(world: World, tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir(exist_ok=True)
    (tmp_path / "etc/sources.list").write_text(f"deb file://{tmp_path}/srv/debian trixie main\n")
    fetched = packages.obtain(["haproxy"], "amd64", samples.ha(), world.desk())
    assert [each.name for each in fetched] == CLOSURE


@needs_apt
def test_the_second_bake_needs_neither_apt_nor_network(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    first = world.obtain("haproxy")
    shutil.rmtree(world.archive.root)
    monkeypatch.setenv("PATH", "/nonexistent")
    assert world.obtain("haproxy") == first


@needs_apt
def test_another_desk_gets_what_was_locked(world: World) -> None:
    first = world.obtain("haproxy")
    world.archive.add("haproxy", "1:3.0.12-1", Depends="liblua")
    world.archive.publish()
    assert world.obtain("haproxy", desk="other") == first
    assert "haproxy_3.0.12-1_amd64.deb" in world.obtain("haproxy", "liblua", desk="other")  # other names, another lock


@needs_apt
def test_a_locked_version_that_vanished(world: World) -> None:
    world.obtain("haproxy")
    (world.archive.root / "pool/haproxy_3.0.11-1_amd64.deb").unlink()
    world.archive.add("haproxy", "1:3.0.12-1", Depends="liblua")
    world.archive.publish()
    with pytest.raises(NotServed, match=r"haproxy 1:3\.0\.11-1") as error:
        world.obtain("haproxy", desk="other", packages="locked")
    assert error.value.remedy and "packages: current" in error.value.remedy
    now = world.obtain("haproxy", desk="other")
    assert list(now) == ["haproxy_3.0.12-1_amd64.deb", "liblua_5.4.7-1+b2_amd64.deb"]
    assert any("haproxy 1:3.0.11-1 -> 1:3.0.12-1" in warning for warning in world.told.warnings)
    assert world.obtain("haproxy", desk="third", packages="locked") == now  # the lock was brought up to date


@needs_apt
def test_wrong_bytes_are_refused(world: World) -> None:
    deb = world.archive.root / "pool/liblua_5.4.7-1+b2_amd64.deb"
    right = hash_file(deb)
    deb.write_bytes(deb.read_bytes()[:-1] + b"!")
    with pytest.raises(WrongBytes, match="liblua"):
        world.obtain("haproxy")
    assert world.desk().cache.find(right) is None
    assert world.desk().choices.get(packages.SECTION, "amd64 haproxy") is None


@needs_apt
def test_wrong_bytes_of_a_mirror_in_a_folder_are_refused(world: World) -> None:
    deb = world.archive.root / "pool/liblua_5.4.7-1+b2_amd64.deb"
    deb.write_bytes(deb.read_bytes()[:-1] + b"!")
    world.url = str(world.archive.root)
    with pytest.raises(WrongBytes, match="liblua"):
        world.obtain("haproxy")


@needs_apt
def test_a_folder_is_a_mirror_too(world: World) -> None:
    world.url = str(world.archive.root)
    assert list(world.obtain("haproxy")) == CLOSURE


@needs_apt
def test_a_strangers_signature_is_refused(world: World, keys: tuple[Key, Key]) -> None:
    world.archive.publish(key=keys[1])
    with pytest.raises(BakeError, match="signature is not Debian's") as error:
        world.obtain("haproxy")
    assert error.value.remedy and "debian-archive-keyring" in error.value.remedy


@needs_apt
def test_an_index_that_was_not_signed_is_refused(world: World) -> None:
    listed = world.archive.root / "dists/trixie/main/binary-amd64/Packages"
    listed.write_text(listed.read_text().replace("Size: ", "Size: 1"))
    with pytest.raises(BakeError, match="no Debian 13 there"):
        world.obtain("haproxy")


@needs_apt
def test_security_updates_come_from_beside_the_mirror(world: World) -> None:
    security = Archive(world.tmp / "srv/debian-security", world.archive.key)
    security.add("haproxy", "1:3.0.11-1+deb13u1", Depends="liblua")
    security.publish(packages.SECURITY)
    assert list(world.obtain("haproxy")) == ["haproxy_3.0.11-1+deb13u1_amd64.deb", "liblua_5.4.7-1+b2_amd64.deb"]
    assert world.told.warnings == []


@needs_apt
def test_a_strangers_security_updates_are_not_passed_over(world: World, keys: tuple[Key, Key]) -> None:
    security = Archive(world.tmp / "srv/debian-security", keys[1])
    security.publish(packages.SECURITY)
    with pytest.raises(BakeError, match="not Debian's"):
        world.obtain("haproxy")


@needs_apt
def test_the_desks_own_mirror_is_found(world: World) -> None:
    url = world.url
    (world.tmp / "etc/sources.list.d").mkdir(parents=True)
    (world.tmp / "etc/sources.list").write_text(f"deb {url}/nowhere bookworm main\n")
    (world.tmp / "etc/sources.list.d/debian.sources").write_text(
        f"Types: deb\n# a remark\nURIs: {url}\nSuites: bookworm bookworm-updates\nComponents: main contrib\n"
    )
    fetched = packages.obtain(["haproxy"], "amd64", samples.ha(), world.desk())
    assert [each.name for each in fetched] == CLOSURE
    assert f"{url}/nowhere was passed over" in world.told.warnings[0]


@needs_apt
def test_an_unknown_package_is_named(world: World) -> None:
    with pytest.raises(BakeError, match="no-such-thing"):
        world.obtain("haproxy", "no-such-thing")


@needs_apt
def test_one_package_is_unpacked_without_being_installed(world: World) -> None:
    world.archive.add("catatonit", "0.2.1-2", content="static\n", Depends="nothing-that-is-there")
    world.archive.add("libseccomp-dev", "2.6.0-2")
    world.archive.publish()
    desk = world.desk()
    program = packages.catatonit("amd64", desk, world.url)
    assert program.path.read_text() == "static\n"
    assert program.sha256 == hashlib.sha256(b"static\n").hexdigest()
    assert program.origin.version == "0.2.1-2"
    folder = packages.headers("amd64", desk, world.url)
    assert (folder / "usr/bin/libseccomp-dev").is_file()
    shutil.rmtree(world.archive.root)
    assert packages.headers("amd64", desk, world.url) == folder


@needs_apt
def test_what_lies_in_the_private_root_comes_from_no_host(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = world.tmp / "hostile.conf"
    hostile.write_text('APT::Architecture "arm64";\nAPT::Install-Recommends "true";\n')
    monkeypatch.setenv("APT_CONFIG", str(hostile))
    assert list(world.obtain("haproxy")) == CLOSURE


def test_a_desk_without_apt_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    desk = Desk(build=tmp_path, progress=Told(), choices=Choices(tmp_path / "choices.json"))
    with pytest.raises(BakeError, match="apt-get is not on this desk") as error:
        packages.obtain(["haproxy"], "amd64", samples.ha(), desk)
    assert error.value.remedy


@needs_apt
def test_a_desk_without_keys_or_mirror_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BakeError, match="no Debian mirror") as error:
        packages.obtain(["haproxy"], "amd64", samples.ha(), world.desk())
    assert error.value.remedy and "`debianMirror:`" in error.value.remedy
    monkeypatch.setattr(packages, "KEYRINGS", (world.tmp / "none.gpg",))
    with pytest.raises(BakeError, match="archive keys") as error:
        world.obtain("haproxy")
    assert error.value.remedy and "debian-archive-keyring" in error.value.remedy


def test_sources_are_read_as_apt_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "SOURCES", tmp_path)
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "mirrors.list").write_text(
        "# two\nhttps://one.test.invalid/debian\thint:1\nhttps://two.test.invalid/debian\n"
    )
    (tmp_path / "sources.list").write_text(
        "# deb http://remark.test.invalid trixie main\n"
        "deb-src http://source.test.invalid trixie main\n"
        "deb [arch=amd64 signed-by=/x] http://list.test.invalid/vendor stable-2 main # the vendor's\n"
    )
    (tmp_path / "sources.list.d/a.sources").write_text(
        "Types: deb deb-src\nURIs: https://a.test.invalid/debian\n https://b.test.invalid/debian\nSuites: trixie\n"
        "Components: main\n"
        "\nEnabled: no\nTypes: deb\nURIs: https://off.test.invalid/\nSuites: trixie\nComponents: main\n"
        f"\nTypes: deb\nURIs: mirror+file://{tmp_path}/mirrors.list\nSuites: bookworm-updates\nComponents: main\n"
        "\nTypes: deb\nURIs: http://s.test.invalid/security\nSuites: bookworm-security\nComponents: main\n"
        "\nTypes: deb\nURIs: https://d.test.invalid/linux\nSuites: trixie\nComponents: stable\n"
    )
    uris, security = packages._candidates(packages._desk_sources(), None)
    assert uris == [
        "https://a.test.invalid/debian",
        "https://b.test.invalid/debian",
        "https://one.test.invalid/debian",
        "https://two.test.invalid/debian",
        "http://list.test.invalid/vendor",
    ]
    assert security["https://a.test.invalid/debian"] == [
        "http://s.test.invalid/security",
        "https://a.test.invalid/debian-security",
    ]


def test_the_desks_way_to_its_mirror_is_carried_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("apt-config") is None:
        pytest.skip("needs apt")
    config = tmp_path / "apt.conf"
    config.write_text('Acquire::http::Proxy "http://127.0.0.1:3142";\nAPT::Install-Recommends "true";\n')
    monkeypatch.setitem(os.environ, "APT_CONFIG", str(config))
    said = packages._carried_over()
    assert 'Acquire::http::Proxy "http://127.0.0.1:3142";' in said
    assert "Recommends" not in said


@pytest.mark.parametrize(
    ("version", "lowest"),
    [
        ("2.41-12+deb13u5", "2.41-12"),
        ("1:2.75-10+deb13u1+b3", "1:2.75-10"),
        ("3.5.9-1~deb13u1", "3"),
        ("1:10.0-1~deb13u2", "1:10"),
        ("6.5+20250216-2", "6.5+20250216-2"),
    ],
)
def test_the_lowest_version_of_a_point_release(version: str, lowest: str) -> None:
    assert packages._floor(version) == lowest
