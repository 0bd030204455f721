"""The disk that disk images begin with. Made for real, which takes minutes, only with `-m matrix`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from recipes import base, packages
from recipes.kit import gpt
from recipes.kit.choices import Choices
from recipes.kit.download import Desk
from recipes.kit.errors import BakeError
from recipes.kit.gpt import SECTOR
from recipes.kit.hashing import hash_file
from recipes.kit.model import Arch, BaseImage, Fetched, Origin
from tests import samples
from tests.kit.test_gpt import partitioned
from tests.test_packages import Told

MTIME = int(datetime(2026, 11, 1, tzinfo=UTC).timestamp())


def desk(tmp_path: Path) -> Desk:
    return Desk(build=tmp_path / "build", progress=Told(), choices=Choices(tmp_path / "choices.json"))


# ---- what a desk lacks ----------------------------------------------------------------------------------------------


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH of the test's own."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def add(programs: Path, name: str, text: str = "") -> None:
    (programs / name).write_text(f"#!/bin/sh\n{text}\n")
    (programs / name).chmod(0o755)


def test_a_program_that_is_lacking_is_told_by_its_package(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1234)
    with pytest.raises(BakeError, match="mmdebstrap and uidmap are lacking") as caught:
        base.check("amd64")
    assert "apt install mmdebstrap uidmap" in (caught.value.remedy or "")
    add(programs, "mmdebstrap")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(base, "native_arch", lambda: "amd64")
    base.check("amd64")


def test_a_user_without_subordinate_numbers_is_told(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(programs, "mmdebstrap")
    add(programs, "newuidmap")
    monkeypatch.setattr("os.geteuid", lambda: 1234)
    monkeypatch.setattr("getpass.getuser", lambda: "nobody-of-that-name")
    with pytest.raises(BakeError, match="no numbers for a user namespace") as caught:
        base.check("amd64")
    assert "usermod --add-subuids" in (caught.value.remedy or "")


def test_another_architecture_needs_an_emulator(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(programs, "mmdebstrap")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(base, "native_arch", lambda: "amd64")
    monkeypatch.setattr(base, "_MACHINE", {"arm64": "no-such-machine"})
    with pytest.raises(BakeError, match="arch-test is lacking on this desk") as caught:
        base.check("arm64")
    assert "apt install arch-test" in (caught.value.remedy or "")
    add(programs, "arch-test")
    with pytest.raises(BakeError, match="cannot run arm64's programs") as caught:
        base.check("arm64")
    assert "qemu-user-static" in (caught.value.remedy or "")


def test_what_mmdebstrap_complains_of_is_told(tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(programs, "mmdebstrap", "echo 'I: running' >&2; echo 'E: unable to unshare' >&2; exit 25")
    nothing: Callable[..., list[Fetched]] = lambda *_: []  # noqa: E731
    monkeypatch.setattr(packages, "obtain_system", nothing)
    monkeypatch.setattr(packages, "unpacked", lambda *_: tmp_path)
    monkeypatch.setattr(base, "_loader_files", lambda *_: {})
    monkeypatch.setattr(base, "native_arch", lambda: "amd64")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    with pytest.raises(BakeError, match="unable to unshare") as caught:
        base.make(samples.ha(), "amd64", tmp_path / "made.raw", desk(tmp_path), mtime=MTIME)
    assert "running" not in str(caught.value) and "root" in (caught.value.remedy or "")
    assert not (tmp_path / "made.raw").exists()


# ---- the operator's own ---------------------------------------------------------------------------------------------


def test_an_image_of_the_operator_s_is_taken_as_it_is(tmp_path: Path) -> None:
    disk = partitioned(tmp_path / "disk.raw")
    sha256 = hash_file(disk)
    size = disk.stat().st_size
    expected = Fetched("base-amd64", disk, sha256, size, Origin("base", "", "operator"))
    for said in (None, sha256):
        assert base.fetched(BaseImage("amd64", str(disk), said), desk(tmp_path)) == expected


def test_an_image_that_is_another_is_refused(tmp_path: Path) -> None:
    disk = partitioned(tmp_path / "disk.raw")
    with pytest.raises(BakeError, match="another SHA-256"):
        base.fetched(BaseImage("amd64", str(disk), "0" * 64), desk(tmp_path))
    disk.write_bytes(b"QFI\xfb")
    with pytest.raises(BakeError, match="no raw disk image"):
        base.fetched(BaseImage("amd64", str(disk)), desk(tmp_path))


# ---- made of Debian packages ----------------------------------------------------------------------------------------


@pytest.mark.matrix
def test_two_desks_make_the_same_disk(tmp_path: Path) -> None:
    """Of one lock; and there is nothing in it that one machine has for itself."""
    arch: Arch = "amd64"
    base.check(arch)
    made = []
    for name in ("one", "two"):
        own = desk(tmp_path)
        own.build = tmp_path / name
        made.append(base.make(samples.ha(), arch, own.build / "disk.raw", own, mtime=MTIME))
    assert made[0].sha256 == made[1].sha256 == hash_file(made[1].path)
    disk = made[0].path
    assert "No problems found" in subprocess.run(["sgdisk", "--verify", disk], capture_output=True, text=True).stdout

    esp, root = gpt.read(disk).partitions.values()
    for part, name in ((esp, "esp"), (root, "root")):
        with disk.open("rb") as file, (tmp_path / name).open("wb") as out:
            file.seek(part.start * SECTOR)
            out.write(file.read(part.length * SECTOR))
    listed = subprocess.run(["mdir", "-/", "-b", "-i", tmp_path / "esp"], capture_output=True, text=True, check=True)
    assert {line.removeprefix("::/") for line in listed.stdout.split() if not line.endswith("/")} == {
        *("EFI/BOOT/BOOTX64.EFI", "EFI/BOOT/GRUBX64.EFI", "EFI/DEBIAN/GRUB.CFG")
    }
    assert subprocess.run(["e2fsck", "-fn", tmp_path / "root"], capture_output=True).returncode == 0

    def asked(command: str) -> str:
        return subprocess.run(["debugfs", "-R", command, tmp_path / "root"], capture_output=True, text=True).stdout

    assert asked("cat /etc/machine-id") == asked("cat /etc/apt/sources.list") == ""
    assert "ssh_host" not in asked("ls /etc/ssh") and "hostname" not in asked("ls /etc").split()
    assert "random-seed" not in asked("ls /var/lib/systemd")
    for link in ("/vmlinuz", "/initrd.img", "/vmlinuz.old", "/initrd.img.old"):
        assert f'"boot/{link[1:].removesuffix(".old")}' in asked(f"stat {link}")
    locked = json.loads((tmp_path / "choices.json").read_text())[packages.SECTION]
    assert [key.split()[1] for key in locked] == ["only", "whole", "whole"]
