"""A cluster file that did not change gives the Cluster that it gave before, and any change reads it again."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recipes.kit import clusterfile, inventory, kept
from recipes.kit.errors import BakeErrors
from recipes.kit.model import Cluster

NOW = datetime(2026, 11, 28, 12, tzinfo=UTC)
CLUSTERS = Path(inventory.__file__).parent.parent / "clusters"
NAMES_FILES = """\
name: c
machineNetwork: {subnet: 192.168.10.0/24, interface: eno1}
nodes:
- {name: p1, role: control-plane, address: 192.168.10.11}
- {name: w1, role: worker, address: 192.168.10.21, extraAddresses: [10.0.0.5/24]}
installBy: 2026-12-24
controlPlaneEndpoint: api.example.com
images: [app.tar]
baseImages: [{image: disk.raw}]
extraObjects: [pods.yaml]
registries:
- {host: registry.example.com, mirrors: ["https://mirror.example.com"], ca: ca.crt, username: u, passwordFile: password}
"""
NAMED = {
    "app.tar": "x",
    "disk.raw": "x",
    "pods.yaml": "x",
    "ca.crt": "-----BEGIN CERTIFICATE-----",
    "password": "secret",
}


class Desk:
    """A folder with a cluster file and what it names; read counts how often the file was really read."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.file = folder / "c.yaml"
        self.store = folder / "c.yaml.secrets"
        self.store.mkdir()
        self.kept = self.store / kept.NAME
        self.file.write_text(NAMES_FILES)
        for name, text in NAMED.items():
            (folder / name).write_text(text)
        self.read = 0
        really = clusterfile.read

        def counted(file: Path) -> clusterfile.Document:
            self.read += 1
            return really(file)

        monkeypatch.setattr(clusterfile, "read", counted)

    def load(self, code: str = "1", now: datetime = NOW) -> Cluster:
        return kept.load(self.file, now=now, code=code, store=self.store)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(tmp_path, monkeypatch)


def test_what_did_not_change_is_read_once(desk: Desk) -> None:
    first, again = desk.load(), desk.load()
    assert desk.read == 1
    assert (again, repr(again)) == (first, repr(first)), "whatever is made of it has the same digest"
    assert again.shared == first.shared
    assert desk.kept.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", sorted(path.stem for path in CLUSTERS.glob("*.yaml")))
def test_the_examples(name: str, desk: Desk) -> None:
    desk.file = CLUSTERS / f"{name}.yaml"
    first, again = desk.load(), desk.load()
    assert desk.read == 1
    assert (again, repr(again)) == (first, repr(first))


def test_of_every_file_that_is_looked_at_a_cluster_knows(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    really = inventory._Rules._file

    def noted(rules: inventory._Rules, text: str, *loc: str | int) -> Path | None:
        seen.add(text)
        return really(rules, text, *loc)

    monkeypatch.setattr(inventory._Rules, "_file", noted)
    assert sorted(path.name for path in desk.load().files) == sorted(seen) == sorted(NAMED)


@pytest.mark.parametrize("name", ["c.yaml", *NAMED])
def test_any_change_of_a_file_reads_again(desk: Desk, name: str) -> None:
    desk.load()
    file = desk.file.with_name(name)
    file.write_text(f"{file.read_text()}\n")
    desk.load()
    desk.load()
    assert desk.read == 2


def test_an_edit_is_seen_though_size_and_time_are_those_of_before(desk: Desk) -> None:
    before = desk.load()
    was = desk.file.stat()
    desk.file.write_text(NAMES_FILES.replace("w1", "w2"))
    os.utime(desk.file, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert {node.name for node in desk.load().nodes} ^ {node.name for node in before.nodes} == {"w1", "w2"}


def test_a_clock_that_was_set_back_reads_again(desk: Desk) -> None:
    desk.load(now=NOW)
    desk.load(now=NOW + timedelta(days=1))
    assert desk.read == 1
    desk.load(now=NOW - timedelta(days=1))
    assert desk.read == 2


@pytest.mark.parametrize("name", NAMED)
def test_a_named_file_that_is_gone_is_told(desk: Desk, name: str) -> None:
    desk.load()
    desk.file.with_name(name).unlink()
    with pytest.raises(BakeErrors, match=f"There is no file {name}"):
        desk.load()


def test_other_code_reads_again(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.load()
    desk.load("2")
    assert desk.read == 2
    monkeypatch.setattr(kept, "version", lambda name: f"{name} of another version")
    desk.load("2")
    assert desk.read == 3


def test_a_mistake_is_told_each_time(desk: Desk) -> None:
    desk.file.write_text(NAMES_FILES.replace("app.tar", "none.tar"))
    for _ in range(2):
        with pytest.raises(BakeErrors, match=r"There is no file none\.tar"):
            desk.load()
    assert not desk.kept.exists()


@pytest.mark.parametrize("left", ["w1", "w2"])
def test_what_is_written_while_it_is_read_is_not_kept(desk: Desk, monkeypatch: pytest.MonkeyPatch, left: str) -> None:
    """Not even where it is afterwards as it was before."""
    counted = clusterfile.read

    def edited(file: Path) -> clusterfile.Document:
        file.write_text(NAMES_FILES.replace("w1", "w2"))
        document = counted(file)
        file.write_text(NAMES_FILES.replace("w1", left))
        return document

    monkeypatch.setattr(clusterfile, "read", edited)
    assert {node.name for node in desk.load().nodes} == {"p1", "w2"}
    assert not desk.kept.exists()


def test_a_pipe_is_read_once(desk: Desk) -> None:
    reading, writing = os.pipe()
    os.write(writing, (CLUSTERS / "single.yaml").read_bytes())
    os.close(writing)
    desk.file = Path(f"/dev/fd/{reading}")
    assert desk.load().name == "single"
    os.close(reading)


def test_of_two_files_with_one_store_each_is_itself(desk: Desk) -> None:
    first, desk.file = desk.file, CLUSTERS / "single.yaml"
    assert desk.load().name == "single"
    desk.file = first
    assert desk.load().name == "c"


def test_looking_makes_no_store(desk: Desk) -> None:
    desk.store.rmdir()
    assert desk.load() == desk.load()
    assert desk.read == 2 and not desk.store.exists()


def test_where_nothing_can_be_written_it_is_read_each_time(desk: Desk) -> None:
    desk.kept.mkdir()
    assert desk.load() == desk.load()
    assert desk.read == 2


@given(data=st.data())
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_reads_again(desk: Desk, data: st.DataObject) -> None:
    made = desk.load()
    whole = bytearray(desk.kept.read_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = whole[:at] if data.draw(st.booleans()) else whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]
    desk.kept.write_bytes(damaged)
    before = desk.read
    assert desk.load() == made
    assert desk.read == before + 1


def _calls(made: Callable[..., object], *arguments: object) -> bytes:
    class Trap:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
            return made, arguments

    return pickle.dumps(Trap())


@pytest.mark.parametrize("body", [b"", pickle.dumps((1, 2)), pickle.dumps((1, 2, 3)), b"no pickle"])
def test_nonsense_reads_again(desk: Desk, body: bytes) -> None:
    desk.kept.write_bytes(kept._seal(kept._premises(desk.file, "1"), body) + body)
    assert desk.load().name == "c"
    assert desk.read == 1


@pytest.mark.parametrize("module", ["posix", "pathlib", "recipes.kit.model"])
def test_a_strangers_file_runs_nothing(desk: Desk, tmp_path: Path, module: str) -> None:
    """Sealed as one of ours, since whoever can read the code can seal."""
    trap = tmp_path / "trap"
    body = _calls(os.mkdir, str(trap))
    if module != "posix":  # by a module that a Cluster's parts are of
        body = body.replace(b"\x8c\x05posix", bytes((0x8C, len(module))) + module.encode())
        body = body.replace(b"\x8c\x05mkdir", b"\x8c\x08os.mkdir")
        body = body[:2] + body[11:]  # without the frame, whose length is another now
    if module == "posix":
        pickle.loads(body)  # noqa: S301
        trap.rmdir()  # so it does run where nothing keeps it from that
    desk.load()
    premises = kept._premises(desk.file, "1")
    desk.kept.write_bytes(kept._seal(premises, body) + body)
    desk.load()
    assert not trap.exists()
    assert desk.read == 2
    with pytest.raises(pickle.UnpicklingError, match="is no part of a cluster"):
        kept._Unpickler(io.BytesIO(body)).load()
