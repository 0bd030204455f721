"""Tarballs as other programs see them, always the same bytes, whole or not there."""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from recipes.kit import archive, atomic
from recipes.kit.errors import BakeError
from recipes.kit.model import File

LONG = "/opt/ours/" + "deep/" * 30 + "file"


def files(tmp_path: Path) -> list[File]:
    big = tmp_path / "big"
    big.write_bytes(bytes(range(256)) * 40_000)  # 10 MB: more than two blocks
    return [
        File("/opt/ours/big", source=big, mode=0o755, sha256=hashlib.sha256(big.read_bytes()).hexdigest()),
        File("/etc/secret", data=b"secret", mode=0o600, owner="etcd"),
        File("/opt/ours/link", link="big"),
        File(LONG, data=b"x"),
    ]


def write(tmp_path: Path, name: str = "p.tar.gz") -> archive.Packed:
    return archive.write_payload(files(tmp_path), tmp_path / name, mtime=1_700_000_000, own=["/opt/ours"])


def node(tmp_path: Path, payload: Path | None, name: str = "n.tar.gz") -> archive.Packed:
    own = [File("/etc/node", data=b"one", mode=0o600)]
    return archive.write_node(own, tmp_path / name, mtime=1_700_000_000, payload=payload)


@pytest.mark.parametrize("kind", ["payload", "full", "thin"])
def test_every_program_reads_all_of_it(tmp_path: Path, kind: str) -> None:
    packed = write(tmp_path)
    expected = {"etc/secret", "opt/ours", "opt/ours/big", "opt/ours/link", LONG[1:]}
    if kind != "payload":
        packed = node(tmp_path, packed.path if kind == "full" else None)
        expected = expected | {"etc/node"} if kind == "full" else {"etc/node"}
    assert packed.size == packed.path.stat().st_size
    subprocess.run(["gzip", "-t", packed.path], check=True)
    for command in (["tar", "-tzf"], ["bsdtar", "-tf"]):
        told = subprocess.run([*command, packed.path], capture_output=True, text=True, check=True)
        assert told.stderr == ""
        names = {line.rstrip("/") for line in told.stdout.splitlines()}
        assert expected <= names
    with tarfile.open(packed.path) as tar:
        assert expected <= {member.name for member in tar}


def test_owners_modes_times_and_links_are_fixed(tmp_path: Path) -> None:
    with tarfile.open(write(tmp_path).path) as tar:
        members = {member.name: member for member in tar}
    secret = members["etc/secret"]
    assert (secret.mode, secret.uid, secret.gid, secret.uname) == (0o600, 801, 801, "etcd")
    assert members["opt/ours/link"].linkname == "big"
    assert members["opt/ours"].isdir() and members["opt/ours"].mode == 0o755
    assert "etc" not in members, "a folder of the system must not be touched"
    assert {member.mtime for member in members.values()} == {1_700_000_000}


def test_entries_tell_what_was_packed(tmp_path: Path) -> None:
    entries = {entry.path: entry for entry in write(tmp_path).entries}
    assert entries["/etc/secret"].sha256 == hashlib.sha256(b"secret").hexdigest()
    assert entries["/opt/ours/big"].size == 256 * 40_000
    assert entries["/opt/ours/link"].sha256 is None and entries["/opt/ours/link"].link == "big"


def test_same_files_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write(tmp_path).path.read_bytes()
    monkeypatch.setattr(archive, "CORES", 1)
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    time.tzset()
    mask = os.umask(0o077)
    try:
        again = archive.write_payload(
            reversed(files(tmp_path)), tmp_path / "again.tar.gz", mtime=1_700_000_000, own=["/opt/ours"]
        )
    finally:
        os.umask(mask)
        monkeypatch.undo()
        time.tzset()
    assert again.path.read_bytes() == first
    assert again.path.stat().st_mode & 0o777 == 0o644


def test_the_bytes_are_the_same_on_every_desk() -> None:
    """Whatever its processor and its libraries are; other bytes than these are another format of artifacts."""
    noise = [hashlib.sha256(str(i).encode()).digest() for i in range(5_000)]
    data = b"".join(noise[i * i % 5_000] + b"text " * (i % 7) + str(i).encode() for i in range(90_000))[: archive.BLOCK]
    packed = archive.compress(data)
    assert len(data) == archive.BLOCK and gzip.decompress(packed) == data
    assert hashlib.sha256(packed).hexdigest() == "85e8886022ca5778bf9ddb5b3e454453774d5be5ca469c0d0c8df476623d4f15"


def test_last_sees_the_digests_and_comes_last(tmp_path: Path) -> None:
    packed = archive.write_payload(
        [File("/z", data=b"z")],
        tmp_path / "p.tar.gz",
        mtime=0,
        last=lambda entries: [File("/a/manifest", data=str(entries[0].sha256).encode())],
    )
    with tarfile.open(packed.path) as tar:
        assert tar.getnames() == ["z", "a/manifest"]
    assert packed.entries[-1].path == "/a/manifest"


def test_a_node_tarball_is_the_payload_and_a_small_member(tmp_path: Path) -> None:
    payload = write(tmp_path).path
    whole = node(tmp_path, payload).path.read_bytes()
    head = payload.read_bytes()[: -len(archive.END_MEMBER)]
    assert whole.startswith(head)
    assert len(whole) - len(head) < 1000
    assert (tmp_path / "n.tar.gz").stat().st_mode & 0o777 == 0o600


def test_a_copy_without_the_kernels_help_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    payload = write(tmp_path).path
    first = node(tmp_path, payload).path.read_bytes()

    def refuse(*_: object) -> int:
        raise OSError("not here")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    assert node(tmp_path, payload, "again.tar.gz").path.read_bytes() == first


@pytest.mark.parametrize("old", ["another node's", "another payload's", "longer", "shorter", "damaged", "other"])
def test_over_an_older_tarball_the_same_bytes_come_out(
    tmp_path: Path, old: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = [File(f"/opt/{name}", data=os.urandom(200_000)) for name in ("a", "b")]
    payload = archive.write_payload(noise, tmp_path / "p.tar.gz", mtime=1).path
    fresh = node(tmp_path, payload).path.read_bytes()
    head = payload.read_bytes()[: -len(archive.END_MEMBER)]
    target = tmp_path / "kept.tar.gz"
    if old == "another payload's":
        archive.write_payload(noise[1:], tmp_path / "other.tar.gz", mtime=1)
        node(tmp_path, tmp_path / "other.tar.gz", target.name)
    else:
        before = {
            "another node's": head + b"tail",
            "longer": head + bytes(90_000),
            "shorter": head[:-9],
            "damaged": head[:70_000] + bytes([head[70_000] ^ 1]) + fresh[70_001:],
            "other": b"\xff" * 900_000,
        }
        target.write_bytes(before[old])
    monkeypatch.setattr(atomic, "WORTH_KEEPING", 1)
    number, copied, copy = target.stat().st_ino, list[int](), archive.copy_range

    def copying(source: Any, out: Any, length: int) -> None:
        copied.append(length)
        copy(source, out, length)

    monkeypatch.setattr(archive, "copy_range", copying)
    node(tmp_path, payload, "kept.tar.gz")
    assert target.read_bytes() == fresh
    assert target.stat().st_ino == number
    if old in ("another node's", "longer"):
        assert copied == [0]


def test_changed_bytes_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    target = tmp_path / "out" / "p.tar.gz"
    changed = [*files(tmp_path)[1:], File("/opt/ours/big", source=tmp_path / "big", sha256="0" * 64)]
    with pytest.raises(BakeError, match="not those that were checked"):
        archive.write_payload(changed, target, mtime=0)
    assert list(target.parent.iterdir()) == []


def test_an_error_leaves_the_old_tarball_as_it_was(tmp_path: Path) -> None:
    packed = write(tmp_path)
    before = packed.path.read_bytes()
    with pytest.raises(BakeError, match="cannot be packed"):
        archive.write_payload([File("/x", source=tmp_path / "gone")], packed.path, mtime=0)
    assert packed.path.read_bytes() == before


@pytest.mark.parametrize(
    "wrong",
    [
        [File("relative", data=b"")],
        [File("/a/../b", data=b"")],
        [File("//a", data=b"")],
        [File("/a\nb", data=b"")],
        [File("/a")],
        [File("/a", data=b"", link="b")],
        [File("/a", data=b"", owner="nobody")],
        [File("/a", data=b"1"), File("/a", data=b"2")],
        [File("/a", data=b"1"), File("/a/b", data=b"2")],
    ],
    ids=lambda wrong: wrong[-1].path,
)
def test_files_that_cannot_be_are_refused(tmp_path: Path, wrong: list[File]) -> None:
    with pytest.raises(BakeError):
        archive.write_payload(wrong, tmp_path / "p.tar.gz", mtime=0)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_payload_is_refused(tmp_path: Path) -> None:
    (tmp_path / "half.tar.gz").write_bytes(write(tmp_path).path.read_bytes()[:-7])
    with pytest.raises(BakeError, match="not a payload as it was written"):
        node(tmp_path, tmp_path / "half.tar.gz")


def test_two_writers_of_one_target_do_no_harm(tmp_path: Path) -> None:
    contents = files(tmp_path)
    target = tmp_path / "out" / "p.tar.gz"
    writers = [
        threading.Thread(target=archive.write_payload, args=(contents, target), kwargs={"mtime": 1}) for _ in range(3)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [path.name for path in target.parent.iterdir()] == ["p.tar.gz"]
    assert gzip.decompress(target.read_bytes())


@pytest.mark.parametrize("how", ["kernel", "process"])
def test_a_range_is_copied_to_where_the_target_stands(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> int:
        raise OSError("the file system cannot")

    if how == "process":
        monkeypatch.setattr(os, "copy_file_range", refused, raising=False)
    data = os.urandom(3 * archive.CHUNK + 5)
    (tmp_path / "source").write_bytes(data)
    with (tmp_path / "source").open("rb") as source, (tmp_path / "out").open("w+b") as out:
        out.write(b"before")
        source.seek(7)
        archive.copy_range(source, out, 2 * archive.CHUNK)
        out.write(b"after")
        assert source.read(3) == data[7 + 2 * archive.CHUNK :][:3]
        with pytest.raises(BakeError, match="shorter"):
            archive.copy_range(source, out, len(data))
    assert (tmp_path / "out").read_bytes().startswith(b"before" + data[7 : 7 + 2 * archive.CHUNK] + b"after")
