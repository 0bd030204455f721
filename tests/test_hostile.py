"""What a stranger may have written: archives, images, mirrors, indices, packages, disks, manifests.

Whatever it is, a bake takes it as it is meant or ends with a BakeError: no traceback, nothing written outside of the
cache, no reading without end. Examples are generated; where time is told, a loop that does not end fails the test.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import json
import os
import signal
import socket
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recipes import disk, images, objects, packages
from recipes.kit import bounds, gpt, iso, tarball
from recipes.kit.choices import Choices
from recipes.kit.download import NETWORK_CHUNK, Cache, Desk, NotServed, Patience, Unreachable, WrongBytes, fetch
from recipes.kit.errors import BakeError
from recipes.kit.model import Fetched, Origin
from recipes.kit.progress import Lines
from recipes.kit.registry import pull_image
from recipes.kit.unpack import unpack
from tests import samples
from tests.kit.test_gpt import partitioned
from tests.servers import Request, Server, serving, status
from tests.test_images import docker, oci, tar_of

AT_MOST = 20.0  # seconds for one example, on a machine that has other work
few = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@contextmanager
def within(seconds: float = AT_MOST) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise AssertionError(f"it was still at work after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def taken(read: Callable[[], object]) -> bool:
    """Whether it was; a BakeError in words that a terminal shows as they are says why not."""
    with within():
        try:
            read()
        except BakeError as error:
            told = str(error)
            assert all(char.isprintable() or char == "\n" for char in told)
            assert len(told) < 4000
            return False
    return True


def desk_at(folder: Path, **changes: Any) -> Desk:
    patience = Patience(connect=0.5, read=0.5, attempts=3, pause=0.001)
    choices = Choices(folder / "choices.json")
    return Desk(build=folder / "build", progress=Lines(), choices=choices, patience=patience, **changes)


def everything(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


# ---- tarballs -------------------------------------------------------------------------------------------------------

NAMES = st.one_of(
    st.sampled_from(
        [
            *("tool", "./tool", "../tool", "/etc/cron.d/x", "a/../../tool", "..", ".", "", "tool/", "index.json"),
            *("oci-layout", "manifest.json", "blobs/sha256/00", "tool\n", "\x1b[2Jtool", "a" * 300, "é", "\udcff"),
        ]
    ),
    st.text(max_size=12),
)
KINDS = st.sampled_from([b"\0", *(bytes([kind]) for kind in b"01234567LKSxgXDV")])
SIZES = st.one_of(
    st.none(),
    st.integers(-(1 << 62), 1 << 62),
    st.sampled_from([-512, -1, 1 << 33, 1 << 40, bounds.LARGEST_HEADER + 1]),
)
DATA = st.one_of(
    st.binary(max_size=600),
    st.sampled_from(
        [
            b"{}",
            b"[" * 20_000,
            b"20 path=../../tool\n",
            b"19 size=-1000000000\n",
            b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n",
            b"99999999999\n" * 40,
            b'[{"Config": "tool", "RepoTags": ["a:1"], "Layers": ["../x"]}]',
            b'{"manifests": [{"digest": "sha256:00", "annotations": {}}]}',
        ]
    ),
)


def header(name: str, kind: bytes, size: int, link: str) -> bytes:
    """A header that every tar takes for one; its size need not be true."""
    made = bytearray(512)
    made[0:100] = name.encode("utf-8", "surrogateescape")[:100].ljust(100, b"\0")
    made[100:124] = b"0000644\x000000000\x000000000\0"
    made[124:136] = b"%011o\0" % size if 0 <= size < 1 << 33 else size.to_bytes(12, "big", signed=True)
    if size >= 1 << 33:
        made[124] |= 0x80
    made[136:148] = b"00000000000\0"
    made[156:157] = kind
    made[157:257] = link.encode("utf-8", "surrogateescape")[:100].ljust(100, b"\0")
    made[257:265] = b"ustar  \0"
    made[148:156] = b"        "
    made[148:156] = b"%06o\0 " % sum(made)
    return bytes(made)


@st.composite
def tarballs(draw: st.DrawFn) -> bytes:
    plain = b""
    for _ in range(draw(st.integers(0, 5))):
        data = draw(DATA)
        size = draw(SIZES)
        plain += header(draw(NAMES), draw(KINDS), len(data) if size is None else size, draw(NAMES))
        plain += data + bytes(-len(data) % 512)
    plain += draw(st.sampled_from([bytes(1024), b"", bytes(512), b"\xff" * 700]))
    return gzip.compress(plain, 1) if draw(st.booleans()) else plain


@pytest.fixture
def yard(tmp_path: Path) -> Path:
    """A folder in a folder, beside which nothing may appear."""
    (tmp_path / "yard").mkdir()
    return tmp_path / "yard"


@few
@given(data=tarballs())
def test_a_release_archive_gives_what_is_wanted_of_it_or_nothing(data: bytes, yard: Path) -> None:
    (yard / "a").write_bytes(data)
    cache = Cache(yard / "cache")
    taken(lambda: unpack(yard / "a", {"tool": "tool", "tool\n": "odd"}, cache))
    assert all(name.startswith(("a", "cache")) for name in everything(yard))
    assert everything(yard.parent) == {"yard", *(f"yard/{name}" for name in everything(yard))}
    kept = {name.partition("/")[2].partition("/")[0] for name in everything(yard) if name.startswith("cache/")}
    assert kept <= {"sha256", "temp"}


@few
@given(data=tarballs())
def test_an_image_archive_is_one_or_is_refused(data: bytes, yard: Path) -> None:
    path = yard / "image.tar"
    path.write_bytes(data)
    taken(lambda: images._operators_archive(path, "amd64", samples.ha(), desk_at(yard)))


@few
@given(data=tarballs())
def test_a_tarball_that_is_none_of_ours_is_refused(data: bytes, yard: Path) -> None:
    (yard / "a").write_bytes(data)
    if taken(lambda: tarball.read(yard / "a", yard / "a")):
        assert tarball.read(yard / "a", yard / "a").parts == ()


DOCUMENTS = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.text(max_size=20),
        st.sampled_from(
            ["sha256:" + "0" * 64, "sha256:../../../x", "sha512:", "../x", "amd64", "linux", "q.invalid/a:1"]
        ),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                [
                    *("digest", "manifests", "config", "layers", "mediaType", "size", "platform", "os", "architecture"),
                    *("annotations", "Config", "RepoTags", "Layers", "io.containerd.image.name"),
                ]
            ),
            inner,
            max_size=6,
        ),
    ),
    max_leaves=12,
)


@few
@given(document=DOCUMENTS, other=DOCUMENTS)
def test_whatever_an_images_documents_say(document: Any, other: Any, yard: Path) -> None:
    inner = json.dumps(other).encode()
    name = f"blobs/sha256/{hashlib.sha256(inner).hexdigest()}"
    digest = f"sha256:{hashlib.sha256(inner).hexdigest()}"
    index = {"manifests": [{"digest": digest, "annotations": {"io.containerd.image.name": "q.invalid/a:1"}}, document]}
    for top in (document, index):
        members = {name: inner, "index.json": json.dumps(top).encode(), "oci-layout": b"{}"}
        path = tar_of(yard / "image.tar", members)
        taken(functools.partial(images._operators_archive, path, "amd64", samples.ha(), desk_at(yard)))
    path = tar_of(yard / "image.tar", {"manifest.json": json.dumps([document]).encode(), "Config": inner})
    taken(lambda: images._operators_archive(path, "amd64", samples.ha(), desk_at(yard)))


@few
@given(document=DOCUMENTS, config=DOCUMENTS)
def test_whatever_a_registry_serves_under_the_right_digest(document: Any, config: Any, yard: Path) -> None:
    folder = yard / "mirror/registry.invalid/v2/a"

    def put(kind: str, value: Any) -> str:
        data = json.dumps(value).encode()
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        (folder / kind).mkdir(parents=True, exist_ok=True)
        (folder / kind / digest).write_bytes(data)
        return digest

    described = {"digest": put("blobs", config), "size": 1000, "mediaType": "c"}
    manifest = put("manifests", {"config": described, "layers": document})
    platform = {"os": "linux", "architecture": "amd64"}
    for top in (document, {"manifests": document}, {"manifests": [{"digest": manifest, "platform": platform}]}):
        digest = put("manifests", top)
        taken(
            functools.partial(
                pull_image, "registry.invalid/a", digest, "amd64", desk_at(yard, mirror=str(yard / "mirror"))
            )
        )
    outside = {name for name in everything(yard.parent) if not name.startswith("yard/") and name != "yard"}
    assert outside == set()


def test_nothing_is_too_deep_too_large_or_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "LEAST", 1 << 20)
    monkeypatch.setattr(bounds, "MOST", 1000)
    whole = oci("q.invalid/a:1")

    def refused(members: dict[str, bytes], *, packed: bool = False) -> str:
        path = tar_of(tmp_path / "image.tar", members)
        if packed:
            path.write_bytes(gzip.compress(path.read_bytes()))
        with within(), pytest.raises(BakeError) as caught:
            images._operators_archive(path, "amd64", samples.ha(), desk_at(tmp_path))
        return caught.value.what

    assert "nested" in refused({**whole, "index.json": b"[" * 100_000})
    assert "larger than the archive can be" in refused({**whole, "zeros": bytes(400 << 20)}, packed=True)
    assert "more than 1000 members" in refused({**whole, **{f"f{number}": b"" for number in range(1000)}})
    index = json.loads(whole["index.json"])
    assert "one too many" in refused(
        {**whole, "index.json": json.dumps({"manifests": index["manifests"] * 300}).encode()}
    )
    assert "one too many" in refused({**whole, "index.json": b" " * (bounds.LARGEST_DOCUMENT + 1)})


def test_a_name_that_would_be_a_line_of_its_own_is_refused(tmp_path: Path) -> None:
    """Names stand in a list that a shell program reads, and in command lines."""
    for name in ("q.invalid/a:1\nq.invalid/b:1", "q.invalid/a b:1", "q.invalid/$(id):1", "q.invalid/a:1;id", "-q/a:1"):
        for members in (oci(name), docker([name])):
            path = tar_of(tmp_path / "image.tar", members)
            read = functools.partial(images._operators_archive, path, "amd64", samples.ha(), desk_at(tmp_path))
            assert not taken(read)


# ---- mirrors --------------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


def endless(request: Request, *, length: str = "", pause: float = 0.0, piece: int = 1 << 20) -> None:
    request.send_response(200)
    if length:
        request.send_header("Content-Length", length)
    request.end_headers()
    until = time.monotonic() + AT_MOST
    try:
        while time.monotonic() < until:
            request.wfile.write(bytes(piece))
            time.sleep(pause)
    except OSError:
        pass


ZEROS = f"sha256:{'0' * 64}"


@pytest.mark.parametrize("length", ["", str(1 << 50), "²"])
def test_a_file_without_end_is_cut_off(server: Server, tmp_path: Path, length: str) -> None:
    server.answers["/x"] = [functools.partial(endless, length=length)]
    with within(), pytest.raises(WrongBytes, match="larger than"):
        fetch(f"{server.url}/x", ZEROS, desk_at(tmp_path), limit=3 << 20)
    left = [path for path in (tmp_path / "build").rglob("*") if path.is_file() and path.stat().st_size]
    assert left == [], "nothing of it is kept"


def test_a_mirror_that_gives_a_little_more_each_time_is_given_up(server: Server, tmp_path: Path) -> None:
    data = bytes(NETWORK_CHUNK * 4)

    def drip(request: Request) -> None:
        start = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        request.send_response(206 if start else 200)
        request.send_header("Content-Length", str(len(data) - start))
        request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        request.send_header("ETag", '"same"')
        request.end_headers()
        request.wfile.write(data[start : start + 1])

    server.answers["/x"] = [drip]
    with within(), pytest.raises(Unreachable, match="gave up after 3 attempts"):
        fetch(f"{server.url}/x", ZEROS, desk_at(tmp_path))
    assert len(server.requests) < 10


@pytest.mark.parametrize(
    "headers",
    [
        {"Location": "/x"},
        {"Location": "file:///etc/passwd"},
        {"Location": "http://[::1"},
        {"Location": "//"},
        {"Location": "\x1b[2J"},
    ],
    ids=str,
)
def test_redirects_lead_nowhere_else(server: Server, tmp_path: Path, headers: dict[str, str]) -> None:
    server.answers["/x"] = [status(302, **headers)]
    assert not taken(lambda: fetch(f"{server.url}/x", ZEROS, desk_at(tmp_path)))


@few
@given(head=st.binary(max_size=200), code=st.sampled_from(["200", "206", "302", "401", "416", "503", "x"]))
def test_whatever_a_server_answers(head: bytes, code: str, yard: Path) -> None:
    """A server of bytes: status lines and headers that no server would send."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    connection.settimeout(5)
                    try:
                        connection.recv(65536)
                        connection.sendall(
                            b"HTTP/1.1 " + code.encode() + b" " + head + b"\r\n" + head + b"\r\n\r\n" + head
                        )
                    except OSError:
                        pass

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/x"
        assert not taken(lambda: fetch(url, ZEROS, desk_at(yard)))
        listening.shutdown(socket.SHUT_RDWR)


def test_a_folder_as_mirror_may_hold_pipes_and_devices(tmp_path: Path) -> None:
    mirror = tmp_path / "mirror"
    (mirror / "h.invalid").mkdir(parents=True)
    os.mkfifo(mirror / "h.invalid/pipe")
    (mirror / "h.invalid/zero").symlink_to("/dev/zero")
    (mirror / "h.invalid/circle").symlink_to("circle")
    (mirror / "h.invalid/folder").mkdir()
    for name in ("pipe", "zero", "circle", "folder", "gone"):
        with within(), pytest.raises(NotServed):
            fetch(f"https://h.invalid/{name}", ZEROS, desk_at(tmp_path, mirror=str(mirror)))
    with pytest.raises(BakeError, match="climb out"):
        fetch("https://h.invalid/a/%2e%2e/%2e%2e/%2e%2e/etc/passwd", ZEROS, desk_at(tmp_path, mirror=str(mirror)))


def test_a_password_is_never_sent_in_the_clear(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry may say where its tokens come from; not that the password for them travels readable."""
    server.answers["/token"] = [status(200)]
    refusal = NotServed("no", status=401, challenge=f'Bearer realm="{server.url}/token"', where="x")

    def refuse(*_: object, **__: object) -> None:
        raise refusal

    monkeypatch.setattr("recipes.kit.registry.fetch", refuse)
    with pytest.raises(NotServed, match="in the clear"):
        pull_image("q.invalid/a", ZEROS, "amd64", desk_at(tmp_path), credentials=("robot", "hunter2"))
    assert server.requests == []


@pytest.mark.parametrize(
    "answer", [b"", b"[]", b'{"token": 3}', b'{"token": "a\\r\\nX-Evil: 1"}', b"[" * 9999, b'{"token": null}']
)
def test_a_token_service_that_gives_none_is_told(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    def say(request: Request) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(len(answer)))
        request.end_headers()
        request.wfile.write(answer)

    server.answers["/token?service=&scope=repository%3Aa%3Apull"] = [say]

    def refuse(*_: object, **__: object) -> None:
        raise NotServed("no", status=401, challenge=f'Bearer realm="{server.url}/token"', where="x")

    monkeypatch.setattr("recipes.kit.registry.fetch", refuse)
    with within(), pytest.raises(NotServed, match="gives no token"):
        pull_image("q.invalid/a", ZEROS, "amd64", desk_at(tmp_path))


# ---- Debian packages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../../x"},
        {"name": "a;id"},
        {"version": "1 $(id)"},
        {"version": "1\n2"},
        {"path": "pool/x%2f..%2f..%2fy.deb"},
        {"path": "pool/%0a.deb"},
        {"path": "pool/x"},
        {"sha256": "../../../etc/x"},
        {"arch": "amd64/.."},
    ],
    ids=str,
)
def test_a_package_of_a_name_that_none_has_is_refused(changes: dict[str, str]) -> None:
    """Of an index that somebody signed, or a lock that somebody edited: names become paths and lines on machines."""
    good = {"name": "a", "version": "1:2.0+deb13u1~x", "arch": "amd64", "path": "pool/a_1%3a2_amd64.deb"}
    line: dict[str, Any] = {**good, "security": False, "size": 1, "sha256": "0" * 64}
    assert packages.Deb(**line).file == "a_1:2_amd64.deb"
    with pytest.raises(BakeError, match="package"):
        packages.Deb(**{**line, **changes})


def ar(members: dict[str, bytes]) -> bytes:
    made = b"!<arch>\n"
    for name, data in members.items():
        made += (
            f"{name:<16}{'0':<12}{'0':<6}{'0':<6}{'644':<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
        )
    return made


def deb(data: bytes) -> bytes:
    control = io.BytesIO()
    with tarfile.open(fileobj=control, mode="w:gz") as tar:
        text = b"Package: a\nVersion: 1\nArchitecture: all\nMaintainer: x\nDescription: x\n"
        info = tarfile.TarInfo("./control")
        info.size = len(text)
        tar.addfile(info, io.BytesIO(text))
    return ar({"debian-binary": b"2.0\n", "control.tar.gz": control.getvalue(), "data.tar.gz": data})


def test_what_a_package_unpacks_to_stays_in_its_folder(yard: Path) -> None:
    outside = yard / "outside"
    outside.mkdir()
    for name, (first, kind, link) in {
        "climbs": ("./../../../escaped", b"0", ""),
        "absolute": (f"{outside}/escaped", b"0", ""),
        "link": ("./way", b"2", str(outside)),
    }.items():
        plain = header(first, kind, 0, link) + header("./way/escaped", b"0", 0, "") + bytes(1024)
        path = yard / f"{name}.deb"
        path.write_bytes(deb(gzip.compress(plain)))
        fetched = Fetched(path.name, path, hashlib.sha256(path.read_bytes()).hexdigest(), 1, Origin("a", "1", "debian"))
        taken(functools.partial(packages._unpacked, [fetched], name, desk_at(yard)))
        assert everything(outside) == set()
        assert not list(yard.parent.glob("escaped")) and not list(yard.glob("**/../escaped"))


@few
@given(data=st.one_of(st.binary(max_size=300), st.binary(max_size=200).map(lambda data: deb(gzip.compress(data)))))
def test_a_damaged_package_is_told(data: bytes, yard: Path) -> None:
    path = yard / "a.deb"
    path.write_bytes(data)
    fetched = Fetched("a.deb", path, hashlib.sha256(data).hexdigest(), len(data), Origin("a", "1", "debian"))
    taken(lambda: packages._unpacked([fetched], "a", desk_at(yard)))


# ---- disks and volumes ----------------------------------------------------------------------------------------------


@few
@given(
    changes=st.lists(st.tuples(st.integers(512, 34 * 512), st.binary(min_size=1, max_size=16)), max_size=4),
    fixed=st.booleans(),
)
def test_whatever_a_partition_table_says(changes: list[tuple[int, bytes]], fixed: bool, yard: Path) -> None:
    import binascii
    import struct

    base = yard / "base.raw"
    if not base.exists():
        partitioned(base)
    data = bytearray(base.read_bytes()[: 34 * 512])
    for place, piece in changes:
        data[place : place + len(piece)] = piece
    if fixed:  # as somebody would who knows how
        count, size = struct.unpack_from("<II", data, 512 + 80)
        struct.pack_into("<I", data, 512 + 88, binascii.crc32(data[1024 : 1024 + min(count * size, 1 << 20)]))
        struct.pack_into("<I", data, 512 + 16, 0)
        length = min(struct.unpack_from("<I", data, 512 + 12)[0], 512)
        struct.pack_into("<I", data, 512 + 16, binascii.crc32(data[512 : 512 + length]))
    changed = yard / "changed.raw"
    changed.write_bytes(bytes(data) + base.read_bytes()[34 * 512 :])
    seed = yard / "seed.iso"
    seed.write_bytes(bytes(4096))

    def planned() -> None:
        layout = disk.layout(changed, seed, "amd64", "x", renew=False)
        assert 0 < layout.size < 1 << 33
        assert all(start >= 0 and length >= 0 for _, start, length in layout.sources.values())

    gpt_read = taken(lambda: gpt.read(changed))
    if gpt_read:
        taken(planned)


@few
@given(changes=st.lists(st.tuples(st.integers(0, 8191), st.binary(min_size=1, max_size=40)), min_size=1, max_size=5))
def test_whatever_a_volume_says(changes: list[tuple[int, bytes]], yard: Path) -> None:
    from recipes import seed

    path = yard / "good.iso"
    if not path.exists():
        (yard / "node").write_bytes(b"\x1f\x8b" * 9)
        seed.write_iso({"user-data": b"x", "node.tar.gz": yard / "node"}, path, label="cidata", mtime=0)
    data = bytearray(path.read_bytes())
    for place, piece in changes:
        data[32768 + place : 32768 + place + len(piece)] = piece
    changed = yard / "changed.iso"
    changed.write_bytes(data)
    if taken(lambda: iso.files(changed, changed)):
        assert all(0 <= start <= start + length <= len(data) for start, length in iso.files(changed, changed))
    assert iso.size(changed) >= 0


# ---- the operator's manifests ---------------------------------------------------------------------------------------

MANIFEST = """\
apiVersion: v1
kind: ConfigMap
metadata: {name: one, namespace: default, labels: {a: "1"}}
data: {key: value, more: "x"}
---
apiVersion: example.invalid/v1
kind: Thing
metadata: {name: two}
spec: [1, 2.5, null, true, 2026-01-01, {a: b}]
"""
PIECES = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            *("2001-13-45", "!!int ''", "!!binary x", "!!python/object:os.system", "&a [*a]", "9" * 5000, "1e999999"),
            *(
                "[" * 3000,
                "{" * 3000,
                "? [a]: b",
                "<<: *a",
                "!!timestamp x",
                "0x",
                ".inf",
                "\0",
                "- - - -",
                "!!set {a}",
            ),
        ]
    ),
)


@few
@given(at=st.integers(0, len(MANIFEST)), cut=st.integers(0, 20), piece=PIECES)
def test_whatever_a_manifest_says(at: int, cut: int, piece: str, yard: Path) -> None:
    path = yard / "m.yaml"
    path.write_text(MANIFEST[:at] + piece + MANIFEST[at + cut :], encoding="utf-8", errors="replace")

    def read() -> None:
        objects.document(objects.operators([path]))

    taken(read)


def test_a_kind_is_no_way_to_other_files(tmp_path: Path) -> None:
    """Schemas are files that are found by an object's kind."""
    for kind in ("../../../../etc/x", "/etc/x", "C" * 5000, "a.b"):
        (tmp_path / "m.yaml").write_text(f"apiVersion: v1\nkind: {kind}\nmetadata: {{name: x}}\n")
        assert not taken(lambda: objects.operators([tmp_path / "m.yaml"]))


def test_a_manifest_that_grows_without_end_is_refused(tmp_path: Path) -> None:
    lines = ["apiVersion: v1", "kind: ConfigMap", "metadata: {name: x}", "data:", "  a0: &a0 [x,x,x,x,x,x,x,x,x,x]"]
    lines += [f"  a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    (tmp_path / "m.yaml").write_text("\n".join(lines))
    with within(5), pytest.raises(BakeError, match="aliases"):
        objects.operators([tmp_path / "m.yaml"])


# ---- what the terminal shows ----------------------------------------------------------------------------------------


@given(st.text())
def test_no_text_of_a_stranger_moves_the_cursor(text: str) -> None:
    told = str(BakeError(text, where=text, remedy=text))
    assert all(char.isprintable() or char == "\n" for char in told)
