"""A bake with everything secret that there can be: nothing that it writes, prints or shows in /proc tells any of it,
save the store and the artifacts."""

from __future__ import annotations

import base64
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pyrage
import pytest
import yaml

from recipes.kit import inventory, pki, store
from recipes.kit.store import Secrets
from recipes.kit.vault import ENCRYPTED, Key
from tests.conftest import REMEMBERED, ROOT, Project, copy_project
from tests.samples import SSH_KEY
from tests.test_audit import PASSWORD, forms, values

CLUSTER = f"""\
name: canary
etcd: external
media: thin
loadBalancer: nodes
virtualIP: 192.168.10.9
sshHostKeys: baked
users: [{{name: admin, sshAuthorizedKeys: ["{SSH_KEY}"]}}]
extraObjects: [objects.yaml]
registries: [{{host: registry.example, username: robot, passwordFile: password}}]
machineNetwork: {{subnet: 192.168.10.0/24, interface: eth0}}
nodes:
  - {{name: balancer-1, role: load-balancer, address: 192.168.10.5}}
  - {{name: control-1, role: control-plane, address: 192.168.10.11}}
  - {{name: worker-1, role: worker, address: 192.168.10.21}}
  - {{name: etcd-1, role: etcd, address: 192.168.10.31}}
"""
DEFECT = """\
def digest_of_sums(files: object, part: str) -> str:
    return part[9]
"""
# What may hold secrets, below the folder of all: finished, or under way by a name that begins with a dot.
MAY = re.compile(
    r"project/(recipes/clusters/(password|objects\.yaml)"
    r"|build/canary/(nodes/\.?(balancer|control|worker|etcd)-1\.tar\.gz|seeds/\.?(balancer|control|worker|etcd)-1\.iso"
    r"|\.?admin\.conf)(\.\w+)?)"
)


@dataclass
class Watch:
    """Command lines and environments of every process below one, as /proc shows them while it runs."""

    seen: set[bytes] = field(default_factory=set)
    processes: set[int] = field(default_factory=set)

    def over(self, process: subprocess.Popen[bytes]) -> None:
        while process.poll() is None:
            for number in self._family(process.pid):
                self.processes.add(number)
                for name in ("cmdline", "environ"):
                    try:
                        self.seen.add(Path(f"/proc/{number}/{name}").read_bytes())
                    except OSError:
                        continue
            time.sleep(0.005)

    def _family(self, number: int) -> Iterator[int]:
        yield number
        try:
            below = [
                list(map(int, each.read_text().split())) for each in Path(f"/proc/{number}/task").glob("*/children")
            ]
        except OSError:  # it has ended
            return
        for children in below:
            for child in children:
                yield from self._family(child)


@dataclass
class Desk:
    """A project whose every file, and every place that a program writes to unasked, lies below one folder."""

    folder: Path
    project: Project
    key: Path | None  # the store is encrypted for
    watch: Watch = field(default_factory=Watch)
    runs: int = 0

    @property
    def store(self) -> Path:
        return self.project.clusters / "canary.yaml.secrets"

    def doit(self, *words: str) -> int:
        """Its exit code; what it said, started and removed lies in run-1, run-2 ..."""
        self.runs += 1
        run = self.folder / f"run-{self.runs}"
        run.mkdir()
        which = ["cluster=recipes/clusters/canary.yaml", *([f"key={self.key}"] if self.key else [])]
        homes = {"HOME": "home", "TMPDIR": "tmp", "XDG_CACHE_HOME": "home", "XDG_RUNTIME_DIR": "home"}
        environment = {**os.environ, **{name: str(self.folder / where) for name, where in homes.items()}}
        with (run / "output").open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-B", ROOT / "tests" / "spy.py", run, *words, *which],
                cwd=self.project.root,
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
            watching = threading.Thread(target=self.watch.over, args=(process,))
            watching.start()
            process.wait()
            watching.join()
        return process.returncode

    def output(self, run: int) -> str:
        return (self.folder / f"run-{run}" / "output").read_text()

    def events(self, kind: str) -> Iterator[tuple[Path, str]]:
        """(folder of the run, what follows the kind)"""
        for number in range(1, self.runs + 1):
            run = self.folder / f"run-{number}"
            for line in (run / "events").read_text(errors="surrogateescape").splitlines():
                if line.startswith(f"{kind} "):
                    yield run, line.removeprefix(f"{kind} ")

    def removed(self) -> dict[Path, Path]:
        """Where it was kept -> where it had been."""
        events = ((run / "kept", text.partition(" ")) for run, text in self.events("kept"))
        return {folder / number: Path(path) for folder, (number, _, path) in events}

    @property
    def cache(self) -> Path:
        return (self.project.root / "build/downloads").resolve()

    @property
    def minted(self) -> Secrets:
        now = datetime.now(UTC)
        cluster = inventory.load(self.project.clusters / "canary.yaml", now=now)
        return store.open(self.store, cluster, now=now, mint=False, key=Key(self.key))

    def needles(self) -> list[bytes]:
        """Each secret in every form in which it could stand somewhere, and that one line can hold."""
        minted = self.minted
        objects = yaml.safe_load((self.project.clusters / "objects.yaml").read_text())
        known = [*values(minted).values(), objects["stringData"]["password"].encode()]
        pairs = (minted.service_account, minted.signing)
        keys = [*(pair.private_pem for pair in pairs), *(pair.key_pem for pair in minted.authorities.values())]
        # Of PKCS #8 for P-256 the secret begins 48 characters into the base64, of OpenSSH's behind the public half.
        known += [key.splitlines()[1][44:] for key in (*keys, *minted.leaf_keys.values())]
        known += [key.private.splitlines()[4][10:34] for key in minted.ssh_host_keys.values()]
        lines = [max(re.split(rb"[\n\0]", form), key=len) for value in known for form in forms(value)]
        assert len(known) > 40 and min(map(len, lines)) > 6
        return lines


@pytest.fixture(scope="module", params=["plain", "encrypted"])
def desk(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Desk:
    """Baked whole, the store minted; then twice in vain: by a defect of ours, and with a store that is damaged.

    encrypted: of one machine, what is to do with an encrypted store, which is so from the beginning.
    """
    if not REMEMBERED.exists():  # nothing was baked here before: the cache is filled by the sample cluster
        request.getfixturevalue("baked")
    folder = tmp_path_factory.mktemp("secrecy")
    for name in ("project", "home", "tmp"):
        (folder / name).mkdir()
    key = folder / "key" if request.param == "encrypted" else None
    made = Desk(folder, copy_project(folder / "project"), key)
    made.project.remember("canary")
    clusters = made.project.clusters
    (clusters / "canary.yaml").write_text(CLUSTER)
    (clusters / "password").write_text(f"{PASSWORD}\n")
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "own"}}
    own = {"password": base64.b64encode(os.urandom(24)).decode()}
    (clusters / "objects.yaml").write_text(yaml.safe_dump({**secret, "stringData": own}))
    if key is not None:
        key.write_text(str(pyrage.x25519.Identity.generate()))
        key.chmod(0o600)
        assert made.doit("encrypt") == 0, made.output(1)
    words = ["node:worker-1", "desk"] if key is not None else []
    assert made.doit(*words) == 0, made.output(made.runs)

    for tarball in (made.project.root / "build/canary/nodes").iterdir():
        tarball.unlink()
    (made.project.root / "build/canary/admin.conf").unlink()
    broken = made.project.root / "recipes/kit/manifest.py"
    broken.write_text(f"{broken.read_text()}\n\n{DEFECT}")
    assert made.doit("node:worker-1") != 0
    damaged = made.store / ("tokens.json" if key is None else ENCRYPTED)
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-9])
    assert made.doit("node:worker-1") != 0
    damaged.write_bytes(whole)
    return made


def held(needles: list[bytes], paths: list[Path], patterns: Path) -> set[Path]:
    """Those of the files that hold a needle; patterns: where a file of them may be written."""
    patterns.write_bytes(b"\n".join(needles))
    names = b"\0".join(os.fsencode(path) for path in paths)
    command = ["xargs", "-0r", "grep", "-lZaF", "-f", str(patterns), "--"]
    done = subprocess.run(command, input=names, env={**os.environ, "LC_ALL": "C"}, capture_output=True)
    assert not done.stderr, done.stderr
    return {Path(os.fsdecode(name)) for name in filter(None, done.stdout.split(b"\0"))}


def test_what_fails_is_told_in_full(desk: Desk) -> None:
    defect, damage = (desk.output(run) for run in (desk.runs - 1, desk.runs))
    assert "Traceback" in defect and "IndexError" in defect
    assert " damaged" in damage and "Traceback" not in damage


def test_of_all_that_was_written_or_said_only_the_store_and_the_artifacts_hold_a_secret(
    desk: Desk, tmp_path: Path
) -> None:
    """Also what was removed again, doit's database, the output with a traceback, and each program's command line."""
    payloads = desk.project.root / "build/canary/payloads"  # compressed: the tests of artifacts look into them
    files = [path for path in desk.folder.rglob("*") if path.is_file() and not path.is_symlink()]
    files = [path for path in files if not (path.parent == payloads and path.suffix in (".gz", ".iso"))]
    assert any(path.name.startswith(".state.db") for path in files)
    files += [path for path in desk.cache.rglob("*") if recent(path, desk)]
    removed = desk.removed()
    assert len(removed) > 3
    hits = {removed.get(path, path) for path in held(desk.needles(), files, tmp_path / "needles")}
    places = {path.relative_to(desk.folder).as_posix() for path in hits}
    inside = {place for place in places if place.startswith("project/recipes/clusters/canary.yaml.secrets/")}
    assert {place for place in places - inside if not MAY.fullmatch(place)} == set()
    assert bool(inside) == (desk.key is None), "plain secrets are in a store that is not encrypted alone"
    assert desk.project.clusters / "password" in hits, "it does search"


def recent(path: Path, desk: Desk) -> bool:
    return path.is_file() and path.stat().st_mtime > (desk.project.clusters / "canary.yaml").stat().st_mtime


def test_nothing_is_written_elsewhere(desk: Desk) -> None:
    written = [Path(path) for _, path in desk.events("written")]
    assert len(written) > 20
    inside = (desk.folder, desk.cache, Path("/dev/null"), Path("/dev/tty"))
    assert [path for path in written if not any(path.is_relative_to(place) for place in inside)] == []


def test_proc_shows_no_secret(desk: Desk) -> None:
    """Sampled as often as possible; the search above has besides what each program was started with."""
    assert len(desk.watch.processes) > 3, "the bakes' own processes and at least one that they started"
    assert len(list(desk.events("subprocess.Popen"))) > 3
    seen = b"\n".join(desk.watch.seen)
    assert b"canary.yaml" in seen and b"TMPDIR=" in seen
    assert [needle for needle in desk.needles() if needle in seen] == []


def test_whoever_shows_a_secret_is_caught(desk: Desk, tmp_path: Path) -> None:
    """The search itself, tried on what it must find."""
    token = desk.minted.tokens["worker-1"].bearer.encode()
    key = desk.minted.authorities["kubernetes"].key_pem
    leaks = {
        tmp_path / str(at): text
        for at, text in enumerate((token, base64.b64encode(token), key, pki.private_number(key).hex().encode()))
    }
    for path, text in leaks.items():
        path.write_bytes(b"one line\nMORE=" + text + b"\n")
    assert held(desk.needles(), list(leaks), tmp_path / "needles") == set(leaks)
