"""import-images keeps the payload's images in containerd's store: with a stand-in for ctr, and with containerd."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from recipes.kit import overlay
from recipes.kit.model import Fetched, Image, Origin
from tests import samples
from tests.artifacts import Parts
from tests.layout import Layout, on_loopback

PROGRAM = "usr/local/lib/nodebake/import-images"
UNITS = overlay.OVERLAYS / "worker/etc/systemd/system"
PINNED = "io.cri-containerd.pinned"


def image(
    folder: Path, name: str, names: list[str], *, docker: bool = False, zipped: bool = False, content: str = ""
) -> Image:
    """A small real image. names: what containerd shall file it as; the first is the reference."""
    layer = packed({"hello": content or name})
    digest = hashlib.sha256(layer).hexdigest()
    config = json.dumps(
        {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]}}
    )
    if docker:
        manifest = json.dumps([{"Config": "config.json", "RepoTags": names, "Layers": ["layer.tar"]}])
        data = packed({"config.json": config, "layer.tar": layer, "manifest.json": manifest})
    else:
        kind = "application/vnd.oci.image"
        blobs: dict[str, str | bytes] = {}

        def blob(media_type: str, content: str | bytes) -> dict[str, object]:
            raw = content if isinstance(content, bytes) else content.encode()
            blobs[f"blobs/sha256/{hashlib.sha256(raw).hexdigest()}"] = raw
            return {"mediaType": media_type, "digest": f"sha256:{hashlib.sha256(raw).hexdigest()}", "size": len(raw)}

        parts = {
            "config": blob(f"{kind}.config.v1+json", config),
            "layers": [blob(f"{kind}.layer.v1.tar", layer)],
        }
        top = blob(f"{kind}.manifest.v1+json", json.dumps({"schemaVersion": 2, **parts}))
        named = [{**top, "annotations": {"io.containerd.image.name": each}} for each in names]
        index = json.dumps({"schemaVersion": 2, "manifests": named})
        data = packed({**blobs, "index.json": index, "oci-layout": '{"imageLayoutVersion":"1.0.0"}'})
    data = gzip.compress(data) if zipped else data
    sha256 = hashlib.sha256(data).hexdigest()
    (folder / sha256).write_bytes(data)
    fetched = Fetched(f"{name}.tar", folder / sha256, sha256, len(data), Origin(name, "1", "operator"))
    return Image(name, names[0], fetched)


def packed(files: Mapping[str, str | bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


@dataclass
class Machine:
    """The program and what it works on, under a folder."""

    root: Path

    @property
    def current(self) -> Path:
        return self.root / "opt/nodebake/current"

    @property
    def mark(self) -> Path:
        return self.root / "var/lib/containerd/nodebake-images"

    def bring(self, parts: Parts) -> None:
        """The payload's images and their list, as a bake puts them there."""
        cluster = samples.ha()
        files = {file.path: file for file in parts.payload(cluster, cluster.workers[0])}
        shutil.rmtree(self.current / "images", ignore_errors=True)
        (self.current / "images").mkdir(parents=True)
        for path, file in files.items():
            if "/images/" in path and file.source is not None:
                shutil.copy(file.source, self.current / "images" / Path(path).name)
        listed = files["/etc/nodebake/images"].data
        assert listed is not None
        for folder in ("etc/nodebake", "var/lib/containerd"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        (self.root / "etc/nodebake/images").write_bytes(listed)
        text = (overlay.OVERLAYS / "worker" / PROGRAM).read_text()
        for path in ("/opt/nodebake/current", "/etc/nodebake/", "/var/lib/containerd/"):
            assert path in text
            text = text.replace(path, f"{self.root}{path}")
        (self.root / "import-images").write_text(text)

    def start(self, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["sh", self.root / "import-images"],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, **environment: str) -> tuple[int, str]:
        """(exit code, what it said)"""
        process = self.start(**environment)
        said, _ = process.communicate(timeout=60)
        return process.returncode, said


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    made = Parts(tmp_path / "cache")
    made.images = [image(made.folder, name, [f"nodebake.local/{name}:1"]) for name in ("pause", "coredns")]
    return made


# ---- with a stand-in for ctr: a store is a folder, an image in it a file with its status, a record of calls beside it

CTR = """#!/bin/sh
case "$CONTAINERD_NAMESPACE $1 $2" in
"k8s.io images check")
    [ "$3" = 'labels."io.cri-containerd.pinned"==pinned' ] || exit 9
    echo "REF TYPE DIGEST STATUS SIZE UNPACKED"
    for file in @/store/*; do
        [ -e "$file" ] || continue
        echo "$(basename "$file" | tr = /) type sha256:x $(cat "$file") (2/2) 1 KiB/1 KiB true"
    done
    ;;
"k8s.io images import")
    sha256=$(sha256sum)
    sha256=${sha256%% *}
    name=$(sed -n "s/^$sha256 \\([^ ]*\\) .*/\\1/p" @/etc/nodebake/images | head -n 1)
    echo "$name" >>@/imported
    [ ! -e "@/broken-$name" ] || exit 1
    while read -r digest _ reference; do
        if [ "$digest" = "$sha256" ]; then echo complete >"@/store/$(echo "$reference" | tr / =)"; fi
    done <@/etc/nodebake/images
    ;;
"k8s.io images label")
    [ "$4" = "io.cri-containerd.pinned=" ] || exit 9
    [ ! -e @/silent ] || exit 1
    rm "@/store/$(echo "$3" | tr / =)" # the question above does not tell of it any more
    ;;
"k8s.io images ls")
    [ ! -e @/silent ] || exit 1
    name=$(echo "$4" | sed 's/^name=="//; s/"$//')
    [ ! -e "@/store/$(echo "$name" | tr / =)" ] || echo "$name"
    ;;
*) exit 9 ;;
esac
"""


@dataclass
class Pretended(Machine):
    def __post_init__(self) -> None:
        (self.root / "store").mkdir(parents=True)
        (self.current / "bin").mkdir(parents=True)
        (self.current / "bin/ctr").write_text(CTR.replace("@", str(self.root)))
        (self.current / "bin/ctr").chmod(0o755)

    def file(self, reference: str) -> Path:
        return self.root / "store" / reference.replace("/", "=")

    def imported(self) -> list[str]:
        """The archives that were imported since one last asked."""
        record = self.root / "imported"
        names = record.read_text().split() if record.exists() else []
        record.unlink(missing_ok=True)
        return sorted(names)


@pytest.fixture
def pretended(tmp_path: Path, parts: Parts) -> Pretended:
    machine = Pretended(tmp_path / "machine")
    machine.bring(parts)
    return machine


def test_imported_once_and_then_quiet(pretended: Pretended) -> None:
    code, said = pretended.run()
    assert code == 0 and "importing coredns.tar for nodebake.local/coredns:1" in said
    assert pretended.imported() == ["coredns.tar", "pause.tar"]
    changed = pretended.mark.stat().st_mtime_ns
    assert pretended.run() == (0, "")
    assert pretended.imported() == []
    assert pretended.mark.stat().st_mtime_ns == changed


@pytest.mark.parametrize("status", [None, "incomplete", "unavailable", "error"])
def test_what_is_gone_or_damaged_comes_back(pretended: Pretended, status: str | None) -> None:
    pretended.run()
    pretended.imported()
    if status is None:  # deleted, or no longer pinned: either way the question's answer lacks it
        pretended.file("nodebake.local/coredns:1").unlink()
    else:
        pretended.file("nodebake.local/coredns:1").write_text(status)
    assert pretended.run()[0] == 0
    assert pretended.imported() == ["coredns.tar"]
    assert pretended.run() == (0, "")


def test_another_archive_for_a_reference_is_imported(pretended: Pretended, parts: Parts) -> None:
    pretended.run()
    pretended.imported()
    parts.images[1] = image(parts.folder, "coredns", ["nodebake.local/coredns:1"], content="other bytes")
    pretended.bring(parts)
    pretended.run()
    assert pretended.imported() == ["coredns.tar"]
    assert pretended.run() == (0, "")


def test_a_wiped_store_is_filled_again(pretended: Pretended) -> None:
    pretended.run()
    pretended.imported()
    shutil.rmtree(pretended.root / "store")
    (pretended.root / "store").mkdir()
    pretended.mark.unlink()
    assert pretended.run()[0] == 0
    assert pretended.imported() == ["coredns.tar", "pause.tar"]


def test_what_fails_is_told_and_keeps_no_other_back(pretended: Pretended) -> None:
    broken = pretended.root / "broken-coredns.tar"
    broken.touch()
    for _ in range(2):
        code, said = pretended.run()
        assert code == 1 and "coredns.tar did not bring nodebake.local/coredns:1" in said
    assert pretended.imported() == ["coredns.tar", "coredns.tar", "pause.tar"]
    broken.unlink()
    assert pretended.run()[0] == 0
    assert pretended.run() == (0, "")


def test_a_failed_import_over_an_older_image_is_tried_again(pretended: Pretended, parts: Parts) -> None:
    """The older image stays, whole and pinned, and must not pass for the new one."""
    pretended.run()
    parts.images[1] = image(parts.folder, "coredns", ["nodebake.local/coredns:1"], content="other bytes")
    pretended.bring(parts)
    (pretended.root / "broken-coredns.tar").touch()
    assert pretended.run()[0] == 1
    (pretended.root / "broken-coredns.tar").unlink()
    pretended.imported()
    assert pretended.run()[0] == 0
    assert pretended.imported() == ["coredns.tar"]


def test_references_may_share_an_archive(pretended: Pretended, parts: Parts) -> None:
    parts.images.append(replace(parts.images[1], reference="another.example/name:2"))
    pretended.bring(parts)
    pretended.run()
    assert pretended.imported() == ["coredns.tar", "pause.tar"]
    pretended.file("another.example/name:2").unlink()
    pretended.run()
    assert pretended.imported() == ["coredns.tar"]


@pytest.mark.parametrize("present", [True, False], ids=["there", "removed by hand"])
def test_what_only_an_earlier_payload_brought_is_pinned_no_more(
    pretended: Pretended, parts: Parts, present: bool
) -> None:
    """Whether or not this one brings something new."""
    pretended.run()
    coredns = parts.images.pop()
    pretended.bring(parts)
    if not present:
        pretended.file(coredns.reference).unlink()
    code, said = pretended.run()
    assert code == 0 and f"{coredns.reference} is of an earlier payload" in said
    assert not pretended.file(coredns.reference).exists() and pretended.file("nodebake.local/pause:1").exists()
    assert pretended.run() == (0, "")
    pretended.imported()
    parts.images.append(coredns)  # the way back
    pretended.bring(parts)
    assert pretended.run()[0] == 0
    assert pretended.imported() == ["coredns.tar"]


def test_what_could_not_be_unpinned_is_tried_again(pretended: Pretended, parts: Parts) -> None:
    """As where containerd is being restarted."""
    pretended.run()
    coredns = parts.images.pop()
    pretended.bring(parts)
    (pretended.root / "silent").touch()
    for _ in range(2):
        assert "is of an earlier payload" in pretended.run()[1]
    (pretended.root / "silent").unlink()
    assert pretended.run()[0] == 0
    assert not pretended.file(coredns.reference).exists()
    assert pretended.run() == (0, "")


def test_one_run_at_a_time(pretended: Pretended) -> None:
    runs = [pretended.start() for _ in range(4)]
    said = [process.communicate(timeout=60)[0] for process in runs]
    assert [process.returncode for process in runs] == [0] * 4
    assert pretended.imported() == ["coredns.tar", "pause.tar"]
    assert sorted(map(bool, said)) == [False, False, False, True]


# ---- what the payload brings


def test_the_payload_lists_every_reference(parts: Parts) -> None:
    cluster, given = samples.ha(), f"registry.example/app:1@sha256:{'0' * 64}"
    parts.images.append(replace(parts.images[1], reference=given))
    files = {file.path: file for file in parts.payload(cluster, cluster.workers[0])}
    pause, coredns = (each.archive.sha256 for each in parts.images[:2])
    assert (files["/etc/nodebake/images"].data or b"").decode().splitlines() == sorted(
        [
            f"{pause} pause.tar nodebake.local/pause:1",
            f"{coredns} coredns.tar nodebake.local/coredns:1",
            f"{coredns} coredns.tar registry.example/app:1",
            f"{coredns} coredns.tar registry.example/app@sha256:{'0' * 64}",
        ]
    )
    wants = "/etc/systemd/system/{}.target.wants/nodebake-images.{}"
    assert {wants.format("timers", "timer"), wants.format("multi-user", "service")} < set(files)
    apart = samples.external_etcd()
    assert "/etc/nodebake/images" not in {file.path for file in parts.payload(apart, apart.etcd_members[0])}


# ---- the units


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_takes_the_timer(tmp_path: Path) -> None:
    folder = tmp_path / "etc/systemd/system"
    folder.mkdir(parents=True)
    for place in ("/usr/lib/systemd/system", "/lib/systemd/system"):
        if Path(place).is_dir() and not (tmp_path / "usr").exists():
            shutil.copytree(place, tmp_path / "usr/lib/systemd/system", symlinks=True)
    for path in [*UNITS.glob("nodebake-images.*"), UNITS / "containerd.service"]:
        text = path.read_text().replace("/opt/nodebake/current/bin/containerd", "/true")
        (folder / path.name).write_text(text.replace("/usr/local/lib/nodebake/import-images", "/true"))
    (tmp_path / "true").write_text("#!/bin/sh\n")
    (tmp_path / "true").chmod(0o755)
    command = ["systemd-analyze", f"--root={tmp_path}", "--man=no", "verify", "nodebake-images.timer"]
    told = subprocess.run(command, capture_output=True, text=True)
    ours = [line for line in (told.stdout + told.stderr).splitlines() if "nodebake-images" in line]
    assert (told.returncode, ours) == (0, [])


def test_the_timer_can_start_the_service_again() -> None:
    """A oneshot that remained active would be started once and never again; one that required containerd would start
    what somebody has stopped."""
    service = (UNITS / "nodebake-images.service").read_text()
    assert "RemainAfterExit" not in service
    assert "Requires=" not in service and "Wants=" not in service


# ---- with containerd


@pytest.fixture(scope="module")
def containerd(binaries: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Layout]:
    if os.geteuid() != 0:
        if os.environ.get("CI") == "true":
            pytest.fail("needs root: containerd mounts")
        pytest.skip("needs root: containerd mounts")
    cluster = on_loopback(samples.ha(), os.getpid())
    machine = Layout(tmp_path_factory.mktemp("c") / "m", cluster, cluster.workers[0], binaries)
    with machine.running("containerd.service") as running:
        running.until("containerd successfully booted")
        yield machine


@pytest.fixture
def real(containerd: Layout, parts: Parts, binaries: Path) -> Iterator[Machine]:
    machine = Machine(containerd.root)
    machine.bring(parts)
    (machine.current / "bin").unlink(missing_ok=True)
    (machine.current / "bin").symlink_to(binaries)
    yield machine
    ask(machine, "ctr", "images", "rm", *ask(machine, "ctr", "images", "ls", "-q").split())
    machine.mark.unlink(missing_ok=True)


def environment(machine: Machine) -> dict[str, str]:
    return {"CONTAINERD_ADDRESS": f"{machine.root}/run/containerd/containerd.sock"}


def ask(machine: Machine, program: str, *words: str) -> str:
    socket = environment(machine)["CONTAINERD_ADDRESS"]
    end = f"unix://{socket}"
    where = ["-n", "k8s.io", "-a", socket] if program == "ctr" else ["-r", end, "-i", end, "-t", "10s"]
    command = [str(machine.current / "bin" / program), *where, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def cri(machine: Machine) -> dict[str, bool]:
    """What the kubelet sees: reference -> pinned."""
    found = json.loads(ask(machine, "crictl", "images", "-o", "json"))["images"]
    return {
        name: bool(each.get("pinned")) for each in found for name in [*each["repoTags"], *each["repoDigests"]] if name
    }


@contextmanager
def soon() -> Iterator[Callable[[Callable[[], bool]], None]]:
    """The CRI plugin follows containerd's own events, a moment later."""

    def wait(check: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not check():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    yield wait


REFERENCE = "nodebake.local/coredns:1"


def delete_by_cri(machine: Machine) -> None:
    ask(machine, "crictl", "rmi", REFERENCE)


def delete_name(machine: Machine) -> None:
    ask(machine, "ctr", "images", "rm", "--sync", REFERENCE)


def unpin(machine: Machine) -> None:
    ask(machine, "ctr", "images", "label", REFERENCE, f"{PINNED}=")


def damage(machine: Machine) -> None:
    """Its layer goes."""
    layer = hashlib.sha256(packed({"hello": "coredns"})).hexdigest()
    ask(machine, "ctr", "content", "rm", f"sha256:{layer}")


@pytest.mark.parametrize("harm", [delete_by_cri, delete_name, unpin, damage])
def test_containerd_gets_back_what_it_lost(real: Machine, harm: Callable[[Machine], None]) -> None:
    code, said = real.run(**environment(real))
    assert code == 0, said
    wanted = {"nodebake.local/pause:1": True, REFERENCE: True}
    with soon() as wait:
        wait(lambda: cri(real) == wanted)
        assert real.run(**environment(real)) == (0, "")
        harm(real)
        code, said = real.run(**environment(real))
        assert code == 0 and "importing coredns.tar" in said and "pause" not in said
        wait(lambda: cri(real) == wanted)
        status = ask(real, "ctr", "images", "check", f"name=={REFERENCE}")
        assert "complete (2/2)" in status and "true" in status
        assert real.run(**environment(real)) == (0, "")


def test_containerd_lets_go_of_what_an_earlier_payload_brought(real: Machine, parts: Parts) -> None:
    assert real.run(**environment(real))[0] == 0
    parts.images.pop()
    real.bring(parts)
    assert real.run(**environment(real))[0] == 0
    with soon() as wait:
        wait(lambda: cri(real) == {"nodebake.local/pause:1": True, REFERENCE: False})
    assert real.run(**environment(real)) == (0, "")


def test_containerd_files_the_operators_images_as_the_list_says(real: Machine, parts: Parts) -> None:
    digest = f"sha256:{'0' * 64}"
    given = f"registry.example/by/digest:1.0@{digest}"
    by_digest = image(
        parts.folder, "digest", [f"registry.example/by/digest@{digest}", "registry.example/by/digest:1.0"]
    )
    saved = image(parts.folder, "saved", ["app:1.0"], docker=True)
    zipped = image(parts.folder, "zipped", ["registry.example/zipped:1"], zipped=True)
    parts.images += [replace(by_digest, reference=given), replace(saved, reference="docker.io/library/app:1.0"), zipped]
    real.bring(parts)
    code, said = real.run(**environment(real))
    assert code == 0, said
    listed = {line.split()[2] for line in (real.root / "etc/nodebake/images").read_text().splitlines()}
    names = {name for name in ask(real, "ctr", "images", "ls", "-q").split() if not name.startswith("sha256:")}
    assert names == listed
    assert len(names) == 6
    with soon() as wait:
        wait(lambda: list(cri(real).values()) == [True] * 6)
    assert real.run(**environment(real)) == (0, "")
