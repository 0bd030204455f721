"""The task graph as a person meets it: every test runs doit itself, in a copy of the project."""

from __future__ import annotations

import base64
import fcntl
import gzip
import hashlib
import json
import os
import pty
import re
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from recipes.kit import kept
from recipes.kit.atomic import WORTH_KEEPING
from recipes.kit.profiles import PROFILES
from tests.conftest import REMEMBERED, Project, copy_project
from tests.kit.test_gpt import partitioned

KINDS = (
    "base",
    "binaries",
    "certs",
    "desk",
    "image",
    "images",
    "node",
    "packages",
    "payload",
    "publish",
    "schema",
    "volume",
)
SMALL = """\
name: small
media: thin
machineNetwork: {subnet: 192.168.10.0/24}
nodes:
  - {name: control-1, role: control-plane, address: 192.168.10.11, mac: "52:54:00:00:10:0b"}
  - {name: worker-1, role: worker, address: 192.168.10.21, mac: "52:54:00:00:10:15"}
  - {name: worker-2, role: worker, address: 192.168.10.22, mac: "52:54:00:00:10:16"}
"""
APART = """\
name: apart
etcd: external
machineNetwork: {subnet: 192.168.10.0/24, interface: eth0}
nodes:
  - {name: etcd-1, role: etcd, address: 192.168.10.31}
  - {name: control-1, role: control-plane, address: 192.168.10.11}
"""
MANY = """\
name: many
media: thin
machineNetwork: {subnet: 192.168.10.0/24, interface: eth0}
nodes:
  - {name: control-1, role: control-plane, address: 192.168.10.11}
pools:
  - {name: worker, role: worker, count: 60, firstAddress: 192.168.10.21}
"""
MANIFEST = """\
apiVersion: v1
kind: ConfigMap
metadata: {name: dns, namespace: kube-system}
data: {Corefile: ". { cache 30 }"}
"""


@dataclass(frozen=True)
class Desk:
    """A project and one cluster in it."""

    project: Project
    name: str

    @property
    def file(self) -> Path:
        return self.project.clusters / f"{self.name}.yaml"

    @property
    def store(self) -> Path:
        return self.file.with_name(f"{self.file.name}.secrets")

    @property
    def build(self) -> Path:
        return self.project.root / "build" / self.name

    def doit(self, *words: str, fails: bool = False, **environment: str) -> str:
        """What doit says; never a traceback."""
        told = self.project.doit(*words, f"cluster={self.file}", fails=fails, **environment).stdout
        assert "Traceback" not in told
        return told

    def start(self, *words: str) -> subprocess.Popen[str]:
        """doit in a process group of its own, as a shell starts it: SIGINT is heard, even where pytest ignores it."""
        return subprocess.Popen(
            ["env", "--default-signal=INT", *self.project.command(*words, f"cluster={self.file}")],
            cwd=self.project.root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def stamps(self) -> dict[str, int]:
        """Every artifact with its time, which changes when it is written, whatever is in it."""
        kinds = ("payloads", "nodes", "seeds")
        found = [path for kind in kinds for path in (self.build / kind).glob("*")]
        return {path.relative_to(self.build).as_posix(): path.stat().st_mtime_ns for path in found}

    def in_store(self) -> dict[Path, int]:
        """Every file of the store with its time, but for what was read of the cluster file."""
        return {path: path.stat().st_mtime_ns for path in self.store.rglob("*") if path.name != kept.NAME}

    def digests(self) -> dict[str, str]:
        return {name: sha256(self.build / name) for name in self.stamps()}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def changed(before: Mapping[str, object], after: Mapping[str, object]) -> set[str]:
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def machine(name: str) -> set[str]:
    return {f"nodes/{name}.tar.gz", f"seeds/{name}.iso"}


def payload(role: str) -> set[str]:
    return {f"payloads/{role}-amd64.{ending}" for ending in ("tar.gz", "json", "cdx.json")}


def made(told: str) -> set[str]:
    """The tasks that a run told of."""
    return set(re.findall(rf"^(?:{'|'.join(KINDS)})(?::[\w-]+)?$", told, re.MULTILINE))


@contextmanager
def edited(path: Path, change: Callable[[str], str]) -> Iterator[None]:
    before = path.read_text()
    after = change(before)
    assert after != before
    path.write_text(after)
    try:
        yield
    finally:
        path.write_text(before)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Project:
    if not REMEMBERED.exists():  # nothing was baked here before: the cache is filled by the sample cluster
        request.getfixturevalue("baked")
    project = copy_project(tmp_path_factory.mktemp("graph"))
    for name, text in (("small", SMALL), ("apart", APART), ("many", MANY)):
        (project.clusters / f"{name}.yaml").write_text(text)
        project.remember(name)
    return project


@pytest.fixture(scope="module")
def first(project: Project) -> tuple[set[str], set[str], str]:
    """What `doit node:worker-2` made in a fresh project: (artifacts, tasks), and what the whole bake then said."""
    desk = Desk(project, "small")
    tasks = made(desk.doit("node:worker-2"))
    return set(desk.stamps()), tasks, desk.doit()


@pytest.fixture(scope="module")
def small(project: Project, first: object) -> Desk:
    """One control plane with etcd, two workers, thin media: wholly baked."""
    return Desk(project, "small")


@pytest.fixture
def editing(small: Desk) -> Iterator[Desk]:
    """The same for a test that changes what it is baked from: afterwards it is as before."""
    yield small
    small.file.write_text(SMALL)
    small.doit()


@pytest.fixture(scope="module")
def apart(project: Project) -> Desk:
    """The machine etcd-1 with full media: what is packed fastest."""
    desk = Desk(project, "apart")
    desk.doit("node:etcd-1")
    return desk


@pytest.fixture(scope="module")
def many(project: Project) -> Desk:
    """So many machines that they are baked side by side."""
    desk = Desk(project, "many")
    desk.doit("node")
    return desk


# ---- what there is to ask for ---------------------------------------------------------------------------------------


def test_list_has_a_line_for_each_kind_and_mints_nothing(tmp_path: Path) -> None:
    project = copy_project(tmp_path / "fresh")
    lines = project.doit("list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == sorted([*KINDS, "lab", "lab:down"])
    assert all(len(line.split()) > 3 for line in lines), "each says what it does"
    assert not list(project.clusters.glob("*.secrets"))


def test_one_machine_needs_no_other(first: tuple[set[str], set[str], str]) -> None:
    artifacts, tasks, then = first
    assert artifacts == machine("worker-2") | payload("worker")
    expected = {"binaries:amd64", "images:amd64", "packages:worker-amd64", "payload:worker-amd64", "node:worker-2"}
    assert tasks == expected
    assert made(then) == {
        *("packages:control-plane-amd64", "payload:control-plane-amd64", "node:control-1", "node:worker-1"),
        *("volume:payloads", "desk", "schema"),
    }


def test_a_second_run_makes_nothing(small: Desk) -> None:
    before = small.stamps()
    told = small.doit()
    assert made(told) == set()
    assert small.stamps() == before


def test_a_cluster_file_that_did_not_change_is_not_read_again(editing: Desk) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "doit", "list", f"cluster={editing.file}"]
    editing.doit("list")
    for reads in (False, True):
        if reads:
            editing.file.write_text(f"{editing.file.read_text()}# edited\n")
        done = subprocess.run(command, cwd=editing.project.root, capture_output=True, text=True, check=True)
        assert ("pydantic" in done.stderr) == reads


def test_the_end_tells_machines_sizes_sources_and_what_to_do(first: tuple[set[str], set[str], str]) -> None:
    told = first[2]
    for name in ("control-1", "worker-1", "worker-2"):
        row = next(line for line in told.splitlines() if line.startswith(f"{name} "))
        until = r"20\d\d-\d\d-\d\d" if name == "control-1" else "issued on joining"
        assert re.fullmatch(
            rf"{name} +(control-plane|worker) +192\.168\.10\.\d+ +thin +[\d.]+ kB +[\d.]+ kB +{until}", row
        )
    assert re.search(r"^Sources: .*\d+ packages from debian", told, re.MULTILINE)
    assert re.search(r"^Install by 20\d\d-\d\d-\d\d", told, re.MULTILINE)
    for step in ("Next:", "seeds", "payloads.iso", "admin.conf get nodes", "small.yaml.secrets"):
        assert step in told


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("node:worker-9",), ["no node worker-9", "worker-1 to worker-2", "control-1"]),
        (("nodes",), ["no task nodes", "Did you mean node", "payload", "info"]),
        (("payload:wroker-amd64",), ["no task payload:wroker-amd64", "Did you mean payload:worker-amd64"]),
        (("clean", "nodes"), ["no task nodes", "Did you mean node"]),
        (
            ("clutser=other.yaml", "mirrror=x"),
            ["no argument clutser=", "Did you mean cluster=", "no argument mirrror="],
        ),
        (("list", "clutser=other.yaml"), ["no argument clutser=", "Did you mean cluster="]),
        (("source=relaese",), ["source=relaese", "release, modules"]),
        (("secrets=",), ["secrets= says nothing"]),
        (("info", "worker-9"), ["no node worker-9", "worker-1 to worker-2"]),
        (("publish",), ["no registry is named", "say registry=oci://HOST/REPOSITORY"]),
        (("publish", "registry=http://r.test"), ["http://r.test is no registry"]),
        (("publish", "registry=oci://r.test"), ["registry=oci://r.test: ", "names no repository"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_unknown_is_told_with_what_there_is(small: Desk, words: tuple[str, ...], says: list[str]) -> None:
    told = small.doit(*words, fails=True)
    assert told.startswith("ERROR: ")
    for part in says:
        assert part in told
    assert made(told) == set()


def test_every_mistake_in_the_cluster_file_is_told_in_one_voice(project: Project) -> None:
    wrong = Desk(project, "wrong")
    wrong.file.write_text(SMALL.replace("small", "Wrong_Name").replace(".22,", ".21,").replace("00:10:15", "00:10:0b"))
    told = wrong.doit(fails=True)
    starts = [line for line in told.splitlines() if not line.startswith(" ")]
    assert len(starts) == 3, told
    assert all(re.match(r"ERROR: \S+wrong\.yaml:\d+:\d+: ", line) for line in starts)
    assert not wrong.store.exists() and not wrong.build.exists()
    wrong.file.unlink()
    assert wrong.doit(fails=True).startswith("ERROR: ")


def test_a_task_that_fails_speaks_in_the_same_voice(small: Desk) -> None:
    key = small.store / "signing.key"
    good = key.read_bytes()
    key.write_bytes(good[:-10])
    try:
        told = small.doit(fails=True)
    finally:
        key.write_bytes(good)
    starts = [line for line in told.splitlines() if line.startswith("ERROR")]
    assert len(starts) == 1 and re.match(r"ERROR: \S+signing\.key: .*damaged", starts[0])


# ---- minting anew ----------------------------------------------------------------------------------------------------


def taken(tarball: Path, path: str) -> bytes:
    """One file out of a tarball."""
    return subprocess.run(["tar", "-xzOf", tarball, path], capture_output=True, check=True).stdout


def token_of(desk: Desk, name: str) -> bytes:
    """What a thin artifact joins with."""
    config = taken(desk.build / f"nodes/{name}.tar.gz", "etc/kubernetes/bootstrap-kubelet.conf")
    found = re.search(rb"token: (\S+)", config)
    assert found is not None
    return found[1].strip(b'"')


def test_rekeying_a_machine_changes_it_and_who_knows_its_token(small: Desk) -> None:
    before, old = small.stamps(), token_of(small, "worker-2")
    told = small.doit("rekey", "node:worker-2")
    assert old.decode()[7:] not in told
    for line in (
        rf"worker-2 +- +{old.decode()[:6]} -> [a-z0-9]{{6}} +20\d\d-\d\d-\d\d",
        rf"Secret bootstrap-token-{old.decode()[:6]}: goes",
        r"Secret bootstrap-token-[a-z0-9]{6}: comes, unless worker-2 is a Node",
        r"doit certs:control-1, and nodebake apply DIR",
    ):
        assert re.search(line, told), told
    assert small.stamps() == before
    small.doit()
    assert changed(before, small.stamps()) == machine("worker-2") | machine("control-1")
    new = token_of(small, "worker-2")
    known = taken(small.build / "nodes/control-1.tar.gz", "etc/nodebake/objects/90-tokens.yaml")
    assert new != old and new[7:] in known and old[7:] not in known
    assert made(small.doit()) == set()
    digests = small.digests()
    small.doit("clean", "node")
    small.doit()
    assert small.digests() == digests, "the same store gives the same bytes"


def test_a_renewal_is_the_identity_alone(small: Desk) -> None:
    before = small.stamps()
    told = small.doit("rekey", "control-1", "admin.conf")
    assert re.search(r"control-1 +9, until 20\d\d-\d\d-\d\d +[a-z0-9]{6} -> [a-z0-9]{6}", told), told
    assert re.search(r"admin\.conf +1, until 20\d\d-\d\d-\d\d", told), told
    admin = (small.build / "admin.conf").read_bytes()
    told = small.doit("certs:control-1", "certs:worker-1")
    assert made(told) == {"certs:control-1", "certs:worker-1"}
    assert "nodebake apply DIR" in told and re.search(r"control-1 +\S+certs/control-1.tar.gz +\d", told), told
    assert small.stamps() == before
    small.doit()
    assert (small.build / "admin.conf").read_bytes() != admin
    for name in ("control-1", "worker-1"):
        assert sha256(small.build / f"certs/{name}.tar.gz") == sha256(small.build / f"nodes/{name}.tar.gz")
        assert (small.build / f"certs/{name}.tar.gz").stat().st_mode & 0o777 == 0o600
    told = small.doit("verify", str(small.build / "certs/control-1.tar.gz"))
    assert "control-1 (control-plane, amd64) of the cluster small, whole" in told


def test_a_machine_with_full_media_has_a_small_renewal(apart: Desk) -> None:
    apart.doit("certs:etcd-1")
    assert (apart.build / "certs/etcd-1.tar.gz").stat().st_size < 200_000
    assert "etcd-1 (etcd, amd64)" in apart.doit("verify", str(apart.build / "certs/etcd-1.tar.gz"))


def test_what_cannot_be_rekeyed_is_told(small: Desk) -> None:
    assert "ERROR: there is no NODE to rekey\n  -> say doit rekey NODE" in small.doit("rekey", fails=True)
    assert "no node worker-9" in small.doit("rekey", "worker-1", "worker-9", fails=True)


# ---- looking and cleaning -------------------------------------------------------------------------------------------


def test_info_tells_of_cluster_and_machine_and_mints_nothing(tmp_path: Path, small: Desk) -> None:
    fresh = copy_project(tmp_path / "fresh")
    told = fresh.doit("info").stdout
    for part in ("up to 100 workers", "control-plane wants  2 CPUs", "under 10 ms", "Nothing is baked yet: run doit"):
        assert part in told
    assert "not baked yet: run doit node:worker-3" in fresh.doit("info", "worker-3").stdout
    assert not list(fresh.clusters.glob("*.secrets"))

    told = small.doit("info")
    for part in ("1 control-plane, 2 worker", "kubernetes", "v1.37.1", "Install by"):
        assert part in told
    cas = ("kubernetes-ca", "kubelet-serving-ca", "etcd-ca", "front-proxy-ca")
    day = r"20\d\d-\d\d-\d\d"
    ends = [
        *(rf"{name} +the cluster +{day}" for name in cas),
        rf"admin +admin\.conf +{day}",
        *(rf"{spec.name} +control-1 +{day}" for spec in PROFILES if spec.holder != "desk"),
        rf"bootstrap token +control-1, worker-1, worker-2 +{day}",
        "kubelet's two, once it has joined +control-1, worker-1, worker-2 +365 days, renewed by itself",
    ]
    for line in ends:
        assert re.search(f"^{line}$", told, re.MULTILINE), line
    told = small.doit("info", "worker-2")
    for part in ("192.168.10.22", "52:54:00:00:10:16", "kubernetes", "containerd", "nodes/worker-2.tar.gz"):
        assert part in told
    assert "kube-apiserver" not in told
    for line in (rf"kubernetes-ca +{day}", rf"bootstrap token +{day}", "kubelet's two, once it has joined +365 days"):
        assert re.search(f"^{line}", told, re.MULTILINE), line

    before = small.in_store()
    with edited(small.file, lambda text: text + "  - {name: control-2, role: worker, address: 192.168.10.12}\n"):
        small.doit("info", "worker-1", fails=True)  # it lacks a MAC address
    with edited(small.file, lambda text: text + LATER):
        assert "3 worker" in small.doit("info")
        assert "not baked yet" in small.doit("info", "worker-3")
    assert small.in_store() == before


LATER = '  - {name: worker-3, role: worker, address: 192.168.10.23, mac: "52:54:00:00:10:17"}\n'


def can_be_alone() -> bool:
    return shutil.which("unshare") is not None and subprocess.run(["unshare", "-rn", "true"]).returncode == 0


def differing(old: Path, new: Path) -> str:
    """For a tarball that should be the same: where it is not, as it lies there and unpacked."""
    told = [subprocess.run(["cmp", old, new], capture_output=True, text=True).stdout]
    if old.suffix == ".gz":
        shown = "bash", "-c", 'cmp <(gzip -dc "$1") <(gzip -dc "$2") && echo "the same, unpacked"', "cmp", old, new
        told.append(subprocess.run(shown, capture_output=True, text=True).stdout)
    return f"{old.name}: {old.stat().st_size} and {new.stat().st_size} bytes; {' '.join(told)}"


def test_clean_leaves_store_and_cache_and_a_bake_without_network_gives_the_same_bytes(
    small: Desk, tmp_path: Path
) -> None:
    before, store = small.digests(), small.in_store()
    stamps = small.stamps()
    shutil.copytree(small.build, tmp_path / "before", copy_function=os.link)
    cache = {path.name for path in (small.project.root / "build/downloads/sha256").iterdir()}
    gone = {"seeds/gone.iso", "nodes/gone.tar.gz"}  # of a machine that was removed
    for name in (*gone, "known_hosts"):
        (small.build / name).write_bytes(b"")
    listed = small.doit("clean", "-n")
    assert "seeds/gone.iso" in listed and listed.count("seeds/worker-1.iso") == 1
    assert changed(stamps, small.stamps()) == gone
    small.doit("clean")
    assert small.stamps() == {}
    assert not [name for name in ("admin.conf", "known_hosts", "trust.tar.gz") if (small.build / name).exists()]
    assert small.in_store() == store
    assert {path.name for path in (small.project.root / "build/downloads/sha256").iterdir()} >= cache
    alone = ["unshare", "-rn"] if can_be_alone() else []
    command = [*alone, *small.project.command(f"cluster={small.file}")]
    done = subprocess.run(command, cwd=small.project.root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    after = small.digests()
    assert after.keys() == before.keys()
    others = [name for name in after if after[name] != before[name]]
    assert not others, [differing(tmp_path / "before" / name, small.build / name) for name in others]
    if not alone:
        pytest.skip("this desk does not let a process have a network of its own: the network was there")


def test_what_the_sources_were_is_remembered_with_the_cluster(small: Desk) -> None:
    """A new bake with other sources in reach takes the same bytes."""
    remembered = small.store / "choices.json"
    components = json.loads(remembered.read_text())["components"]
    assert components["kubernetes/amd64"]["source"] in ("release", "modules")
    assert remembered.stat().st_mode & 0o777 == 0o600
    record = small.build / "binaries/amd64.json"
    before = record.read_bytes()
    record.unlink()
    assert made(small.doit("binaries", "mirror=/nonexistent")) == {"binaries:amd64"}
    assert record.read_bytes() == before
    assert json.loads(remembered.read_text())["components"] == components


def test_cluster_and_store_may_lie_elsewhere(project: Project, tmp_path: Path) -> None:
    file, store = tmp_path / "mine" / "other.yaml", tmp_path / "keys"
    file.parent.mkdir()
    file.write_text(SMALL.replace("name: small", "name: other"))
    told = project.doit("desk", f"cluster={file}", f"secrets={store}").stdout
    assert made(told) == {"desk"}
    assert (store / "cluster.json").exists() and store.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in file.parent.iterdir()] == ["other.yaml"]
    assert (project.root / "build/other/admin.conf").exists()


def test_no_secret_is_in_the_state_or_in_what_was_said(small: Desk, first: tuple[set[str], set[str], str]) -> None:
    tokens = json.loads((small.store / "tokens.json").read_text())["content"]
    secrets = [bearer.partition(".")[2] for bearer in tokens.values()]
    for name in ("encryption.key", "serial.seed"):
        text = (small.store / name).read_text().strip()
        secrets += [text, base64.b64decode(text).hex()]
    for key in small.store.rglob("*.key"):
        secrets += [line for line in key.read_text().splitlines() if len(line) > 40]
        secrets.append(sha256(key))
    assert len(secrets) > 15
    states = list(small.build.glob(".state.db*"))
    assert states
    for held in [*(path.read_bytes() for path in states), first[2].encode()]:
        assert not [secret for secret in secrets if secret.encode() in held]
    rows = sqlite3.connect(small.build / ".state.db").execute("select count(*) from doit").fetchone()
    assert rows[0] > 8


# ---- disk images ----------------------------------------------------------------------------------------------------


def test_disk_images_are_baked_where_they_are_asked_for_alone(small: Desk) -> None:
    disk = partitioned(small.file.with_name("debian.raw"))
    image = small.build / "disks" / "worker-1.raw.gz"
    with edited(small.file, lambda text: f"{text}baseImages: [{{image: debian.raw}}]\n"):
        assert made(small.doit()) <= {"schema", "desk"}
        told = small.doit("image:worker-1")
        assert made(told) == {"base:amd64", "image:worker-1"}
        assert re.search(rf"^worker-1 +\S*{image.name} +[\d.]+ kB +\d+ MB$", told, re.MULTILINE)
        assert f"{image.name} | sudo dd of=/dev/sdX" in told
        assert [path.name for path in image.parent.iterdir()] == [image.name]
        assert (small.build / "seeds/worker-1.iso").read_bytes() in gzip.decompress(image.read_bytes())
        assert made(small.doit("image:worker-1")) == set()
        assert f"disks/{image.name}" in small.doit("info", "worker-1")
        with disk.open("r+b") as file:
            file.write(b"other boot code")
        assert made(small.doit("image:worker-1")) == {"base:amd64", "image:worker-1"}
        assert gzip.decompress(image.read_bytes()).startswith(b"other boot code")
        disk.write_bytes(b"QFI")
        assert "no raw disk image" in small.doit("image:worker-1", fails=True)
        assert made(small.doit("image:worker-9", fails=True)) == set()
    small.doit()


def test_what_making_a_base_lacks_is_told_before_anything_is_baked(small: Desk, tmp_path: Path) -> None:
    told = small.doit("image:worker-1", fails=True, PATH=str(tmp_path))
    assert re.search("^ERROR: mmdebstrap .*lacking on this desk", told, re.MULTILINE)
    assert made(told) == set()


# ---- what an edit rebuilds ------------------------------------------------------------------------------------------


def test_another_mac_address_rebuilds_that_machine_alone(editing: Desk) -> None:
    before = editing.stamps()
    editing.file.write_text(SMALL.replace("00:10:15", "00:10:99"))
    assert made(editing.doit()) >= {"node:worker-1"}
    assert changed(before, editing.stamps()) == machine("worker-1")


def test_another_address_of_a_worker_rebuilds_it_and_who_knows_it(editing: Desk) -> None:
    before = editing.stamps()
    editing.file.write_text(SMALL.replace("192.168.10.21", "192.168.10.29"))
    editing.doit()
    assert changed(before, editing.stamps()) == machine("worker-1") | machine("control-1")


def test_one_worker_more_changes_no_other_and_no_payload(editing: Desk) -> None:
    before, bytes_before = editing.stamps(), editing.digests()
    editing.file.write_text(SMALL + LATER)
    editing.doit()
    expected = machine("worker-3") | machine("control-1")
    assert changed(before, editing.stamps()) == expected
    assert changed(bytes_before, editing.digests()) == expected
    for name in machine("worker-3"):
        (editing.build / name).unlink()


def test_another_etcd_unit_rebuilds_control_planes_only(editing: Desk) -> None:
    before = editing.stamps()
    unit = editing.project.root / "overlays/etcd/etc/systemd/system/etcd.service.j2"
    with edited(unit, lambda text: text.replace("[Unit]\n", "[Unit]\n# edited\n", 1)):
        told = editing.doit("node")
    assert made(told) == {"payload:control-plane-amd64", "node:control-1"}
    assert changed(before, editing.stamps()) == payload("control-plane") | machine("control-1")


def test_links_and_execute_bits_of_an_overlay_are_inputs_too(editing: Desk) -> None:
    """Of links, where they lead: what is there is the machine's, not the desk's."""
    tree = editing.project.root / "overlays/etcd"
    link, program = tree / "etc/nodebake/zones", tree / "usr/local/bin/of-ours"
    with ExitStack() as stack:
        for path in (link, program):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.callback(path.unlink)
        link.symlink_to("/run/systemd")
        program.write_text("#!/bin/sh\n")
        assert "payload:control-plane-amd64" in made(editing.doit("payload"))
        assert made(editing.doit("payload")) == set()
        program.chmod(0o755)
        assert made(editing.doit("payload")) == {"payload:control-plane-amd64"}
        link.unlink()
        link.symlink_to("/run/nothing-at-the-desk")
        assert made(editing.doit("payload")) == {"payload:control-plane-amd64"}
        listed = subprocess.run(
            ["tar", "-tvzf", editing.build / "payloads/control-plane-amd64.tar.gz"], capture_output=True, text=True
        ).stdout
    assert re.search(r"-rwxr-xr-x .* usr/local/bin/of-ours$", listed, re.MULTILINE), listed
    assert "etc/nodebake/zones -> /run/nothing-at-the-desk" in listed


def test_etcd_members_that_came_later_join_and_begin_nothing(editing: Desk) -> None:
    """Two of three are a majority: they must not elect a leader over an empty store."""
    later = "".join(
        f"  - {{name: control-{n}, role: control-plane, address: 192.168.10.1{n}, mac: ca:fe:00:00:00:0{n}}}\n"
        for n in (2, 3)
    )
    editing.file.write_text(SMALL + later)
    told = editing.doit("node")
    assert "etcd on control-2, control-3 came after the first bake" in told
    states = {
        name: taken(editing.build / f"nodes/{name}.tar.gz", "etc/nodebake/node.env")
        for name in ("control-1", "control-2")
    }
    assert b"MEMBER_STATE='new'" in states["control-1"] and b"MEMBER_STATE='existing'" in states["control-2"]
    assert b"INITIAL_CLUSTER='control-1=https://192.168.10.11:2380,control-2=" in states["control-2"]
    found = re.search(r"empty disks: rm (\S+)", told)
    assert found
    Path(found[1]).unlink()
    assert "came after" not in editing.doit("node")
    assert b"MEMBER_STATE='new'" in taken(editing.build / "nodes/control-2.tar.gz", "etc/nodebake/node.env")
    for name in machine("control-2") | machine("control-3"):
        (editing.build / name).unlink()


def test_another_host_key_is_told_to_ssh(editing: Desk) -> None:
    editing.file.write_text(f"{SMALL}sshHostKeys: baked\n")
    editing.doit("desk")
    before = (editing.build / "known_hosts").read_text().splitlines()
    editing.doit("rekey", "worker-1")
    editing.doit("desk")
    after = (editing.build / "known_hosts").read_text().splitlines()
    changed_lines = [line.split(",")[0] for line in after if line not in before]
    assert changed_lines == ["worker-1"]


def test_another_manifest_rebuilds_control_planes_only(editing: Desk) -> None:
    """Such as a CoreDNS of one's own."""
    manifest = editing.file.with_name("dns.yaml")
    manifest.write_text(MANIFEST)
    editing.file.write_text(SMALL + "extraObjects: [dns.yaml]\n")
    editing.doit()
    before = editing.stamps()
    manifest.write_text(MANIFEST.replace("30", "60"))
    assert made(editing.doit()) == {"node:control-1"}
    assert changed(before, editing.stamps()) == machine("control-1")


def test_another_template_of_machines_rebuilds_them_and_no_payload(editing: Desk) -> None:
    before = editing.stamps()
    template = editing.project.root / "overlays/node/etc/nodebake/node.env.j2"
    with edited(template, lambda text: f"{text}# edited\n"):
        editing.doit()
    assert changed(before, editing.stamps()) == {name for name in before if not name.startswith("payloads/")}


def test_a_deleted_artifact_is_made_again(small: Desk) -> None:
    before = small.stamps()
    digest = sha256(small.build / "seeds/worker-2.iso")
    (small.build / "seeds/worker-2.iso").unlink()
    assert made(small.doit()) == {"node:worker-2"}
    assert sha256(small.build / "seeds/worker-2.iso") == digest
    assert changed(before, small.stamps()) == machine("worker-2")


def test_a_file_that_left_the_cache_is_noticed(small: Desk) -> None:
    """In a cache of its own, whose files are links into the desk's."""
    cache = small.project.root / "build/downloads"
    desk = cache.resolve()
    cache.unlink()
    try:
        shutil.copytree(desk, cache, copy_function=lambda source, target: Path(target).symlink_to(source))
        record = json.loads((small.build / "images/amd64.json").read_text())
        archive = Path(next(image["archive"]["path"] for image in record if image["name"] == "coredns"))
        digest, before = sha256(archive), small.stamps()
        archive.unlink()
        assert made(small.doit()) == {"images:amd64"}
        assert sha256(archive) == digest
        assert small.stamps() == before
    finally:
        shutil.rmtree(cache)
        cache.symlink_to(desk)


# ---- interruptions --------------------------------------------------------------------------------------------------


def interrupt(desk: Desk, pattern: str, number: signal.Signals) -> tuple[int, str]:
    """Runs `doit node:etcd-1` and sends the signal to its group once a file of this pattern holds a megabyte."""
    process = desk.start("node:etcd-1")
    patience = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < patience:
        with suppress(FileNotFoundError):
            if any(path.stat().st_size > 1 << 20 for path in desk.build.glob(pattern)):
                os.killpg(process.pid, number)
                break
        time.sleep(0.001)
    told, _ = process.communicate(timeout=60)
    return process.returncode, told


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
@pytest.mark.parametrize(
    ("begun", "lost", "left"),
    [
        (
            "payloads/.etcd-amd64.tar.gz.*",
            ["payloads/etcd-amd64.tar.gz", "payloads/etcd-amd64.json", "nodes/etcd-1.tar.gz"],
            {"payload:etcd-amd64", "node:etcd-1"},
        ),
        ("nodes/.etcd-1.tar.gz.*", ["nodes/etcd-1.tar.gz", "seeds/etcd-1.iso"], {"node:etcd-1"}),
        ("seeds/.etcd-1.iso.*", ["seeds/etcd-1.iso"], {"node:etcd-1"}),
    ],
    ids=["payload", "node", "seed"],
)
def test_cut_off_anywhere_the_next_run_continues(
    apart: Desk, number: signal.Signals, begun: str, lost: list[str], left: set[str]
) -> None:
    before = apart.digests()
    for name in lost:
        (apart.build / name).unlink()
    code, told = interrupt(apart, begun, number)
    assert code == (-9 if number == signal.SIGKILL else 130), told
    assert "Traceback" not in told
    assert not (apart.build / lost[0]).exists(), "nothing half-written has the name"
    if number != signal.SIGKILL:
        assert "the next doit continues" in told
        assert not list(apart.build.glob("*/.*")), "it tidies up"
    assert made(apart.doit("node:etcd-1")) == left
    assert apart.digests() == before
    assert not list(apart.build.glob("*/.*")), "what a killed run left is gone"


def without_machines(desk: Desk) -> dict[str, str]:
    """Removes the machines' artifacts; what they were."""
    before = desk.digests()
    for kind in ("nodes", "seeds"):
        shutil.rmtree(desk.build / kind)
    return before


def test_machines_are_the_same_whether_baked_side_by_side_or_not(many: Desk) -> None:
    before = without_machines(many)
    assert len(made(many.doit("node"))) == 61
    assert many.digests() == before
    without_machines(many)
    command = ["taskset", "--cpu-list", "0", *many.project.command("node", f"cluster={many.file}")]
    subprocess.run(command, cwd=many.project.root, check=True, capture_output=True)
    assert many.digests() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_cut_off_between_many_machines_the_next_run_continues(many: Desk, number: signal.Signals) -> None:
    before = without_machines(many)
    process = many.start("node")
    while process.poll() is None and len(list(many.build.glob("seeds/*.iso"))) < 10:
        time.sleep(0.001)
    process.send_signal(number)  # not to its processes, as a service manager does it
    told = process.communicate(timeout=60)[0]
    assert process.returncode == (-9 if number == signal.SIGKILL else 130), told
    assert "Traceback" not in told
    there = {name: digest for name, digest in many.digests().items() if "/." not in name}
    assert 0 < len(there) < len(before) and there.items() <= before.items()
    if number != signal.SIGKILL:
        assert "the next doit continues" in told
        assert not list(many.build.glob("*/.*")), "it tidies up"
    assert "Another bake" not in (told := many.doit("node")), "nothing of the killed run is left"
    assert len(made(told)) < 61 or number == signal.SIGKILL
    assert many.digests() == before
    assert not list(many.build.glob("*/.*"))


@pytest.mark.parametrize("begun", ["nodes/.etcd-1.tar.gz.*", "seeds/.etcd-1.iso.*"], ids=["node", "seed"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_cut_off_while_an_artifact_is_changed_the_next_run_continues(
    apart: Desk, number: signal.Signals, begun: str
) -> None:
    """An edited machine's large artifacts are changed where they lie, without a name meanwhile."""
    before = apart.digests()
    folder, _, name = begun.removesuffix(".*").partition("/.")
    target = apart.build / folder / name
    assert target.stat().st_size > WORTH_KEEPING

    def another_serial(text: str) -> str:
        return text.replace("192.168.10.31}", f"192.168.10.31, serial: A{time.monotonic_ns()}}}")

    for _ in range(20):  # it takes a few milliseconds, so that a signal may come too late
        with edited(apart.file, another_serial):
            code, told = interrupt(apart, begun, number)
            if code:
                break
    assert code == (-9 if number == signal.SIGKILL else 130), told
    assert not target.exists(), "nothing half-changed has the name"
    assert made(apart.doit("node:etcd-1")) == {"node:etcd-1"}
    assert apart.digests() == before
    assert not list(apart.build.glob("*/.*"))


def test_a_task_that_was_cut_off_runs_again_though_its_inputs_are_back(apart: Desk) -> None:
    """Between the tarball and the ISO: the one is of the edited machine, the other of the one before."""
    before = apart.digests()
    for name in ("nodes/etcd-1.tar.gz", "seeds/etcd-1.iso"):  # large ones would be without a name meanwhile
        os.link(apart.build / name, apart.build / f"{name}.kept")
    with edited(apart.file, lambda text: text.replace("192.168.10.31}", "192.168.10.31, serial: CUT}")):
        code, told = interrupt(apart, "seeds/.etcd-1.iso.*", signal.SIGKILL)
    for aside in apart.build.glob("*/*.kept"):
        aside.unlink()
    assert code == -9, told
    assert (apart.build / "seeds/etcd-1.iso").exists()
    assert made(apart.doit("node:etcd-1")) == {"node:etcd-1"}
    assert apart.digests() == before


def test_two_bakes_at_once_do_no_harm(apart: Desk) -> None:
    before = apart.digests()
    for name in before:
        (apart.build / name).unlink()
    both = [apart.start("node:etcd-1"), apart.start("node:etcd-1")]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted("Another bake is running" in told for told in said) == [False, True]
    assert [len(made(told)) for told in sorted(said, key=lambda told: "Another" in told)] == [2, 0]
    assert apart.digests() == before


# ---- what it looks like ---------------------------------------------------------------------------------------------


def on_a_terminal(desk: Desk, **environment: str) -> str:
    """What `doit node:etcd-1` writes to a terminal of 100 columns."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    process = subprocess.Popen(
        desk.project.command("node:etcd-1", f"cluster={desk.file}"),
        cwd=desk.project.root,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env={**{k: v for k, v in os.environ.items() if k != "NO_COLOR"}, "TERM": "xterm-256color", **environment},
    )
    os.close(follower)
    seen = b""
    with suppress(OSError):  # EIO: the other end is closed
        while data := os.read(leader, 1 << 16):
            seen += data
    os.close(leader)
    assert process.wait() == 0, seen
    return seen.decode()


COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-7]|9[0-7]|38;[\d;]+)m")


def test_a_terminal_shows_something_live(apart: Desk) -> None:
    payload = apart.build / "payloads/etcd-amd64.tar.gz"
    payload.unlink()
    seen = on_a_terminal(apart)
    assert len(set(re.findall(r"packing etcd amd64.*?([\d.]+ MB) / [\d.]+ MB", seen))) > 1, "it moves"
    assert COLOUR.search(seen)
    payload.unlink()
    assert not COLOUR.search(on_a_terminal(apart, NO_COLOR="1"))


def test_elsewhere_plain_lines(apart: Desk) -> None:
    (apart.build / "payloads/etcd-amd64.tar.gz").unlink()
    told = apart.doit("node:etcd-1", TERM="xterm-256color")
    assert made(told) == {"payload:etcd-amd64"}
    assert "\x1b" not in told and "\r" not in told


# ---- a newer Nodebake ----------------------------------------------------------------------------------------------


def test_other_code_rebuilds_but_a_worker_keeps_its_bytes(small: Desk) -> None:
    """Here it is code that only the control planes' objects come from. The last test, for it leaves much to rebake."""
    before, stamps = small.digests(), small.stamps()
    recipe = small.project.root / "recipes/objects.py"
    with edited(recipe, lambda text: text.replace('"cpu": "100m"', '"cpu": "101m"')):
        told = small.doit("node:worker-1")
        assert {"payload:worker-amd64", "node:worker-1"} <= made(told)
        assert machine("worker-1") <= changed(stamps, small.stamps())
        assert small.digests() == before
