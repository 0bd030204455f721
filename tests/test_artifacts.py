"""What was really baked, looked at with the tools that others have: tar, gzip, bsdtar, xorriso, openssl, containerd."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import stat
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes import closure, payload
from recipes.bake import Bake
from recipes.components import load_components
from recipes.kit import inventory, overlay, store
from recipes.kit.archive import END_MEMBER
from recipes.kit.choices import Choices
from recipes.kit.download import Desk
from recipes.kit.errors import BakeErrors
from recipes.kit.model import USERS, Arch, Cluster, Fetched, File, Image, Node
from recipes.kit.progress import Lines
from recipes.records import read_fetched, read_images
from tests.conftest import Project, copy_project
from tests.samples import SSH_KEY

MANIFEST = "opt/nodebake/manifest"
SEED = {"user-data", "meta-data", "network-config", "SHA256SUMS", "SHA256SUMS.sig", "first-boot", "node.tar.gz"}
ROOT = os.geteuid() == 0
DAMAGED, FORGED = 65, 67

THIN = {
    # The example with etcd, two balancers and their address, bonds and a VLAN; of its four workers, one.
    "external-etcd": None,
    "single": """
name: single
installBy: 30d
media: thin
sshHostKeys: baked
users: [{name: admin, sshAuthorizedKeys: ["%(key)s"]}]
images: [app.tar]
registries:
  - {host: "registry.example.internal:5000", mirrors: ["https://mirror.example.internal"], ca: ca.pem,
     username: puller, passwordFile: puller.password}
machineNetwork: {subnet: 192.168.10.0/24, interface: e*}
nodes: [{name: only, role: control-plane, address: 192.168.10.11}]
""",
    "balanced": """
name: balanced
media: thin
loadBalancer: nodes
virtualIP: 192.168.10.9
machineNetwork: {subnet: 192.168.10.0/24, interface: eno1}
nodes:
  - {name: balancer-1, role: load-balancer, address: 192.168.10.5}
  - {name: balancer-2, role: load-balancer, address: 192.168.10.6}
  - {name: control-1, role: control-plane, address: 192.168.10.11}
  - {name: worker-1, role: worker, address: 192.168.10.21}
""",
}
PASSWORD = "correct horse battery staple 4711"
APP = "registry.example.internal:5000/app:1.0"


# -- what the tests look at -------------------------------------------------------------------------------------------


@dataclass
class Thin:
    """Three clusters with thin media, baked in one project."""

    project: Project

    def folder(self, cluster: str) -> Path:
        return self.project.root / "build" / cluster

    def file(self, cluster: str) -> Path:
        return self.project.clusters / f"{cluster}.yaml"

    def node(self, cluster: str, name: str) -> Path:
        return self.folder(cluster) / "nodes" / f"{name}.tar.gz"


@pytest.fixture(scope="module")
def thin(baked: Project, tmp_path_factory: pytest.TempPathFactory) -> Thin:
    project = copy_project(tmp_path_factory.mktemp("thin"))
    made = Thin(project)
    make_app(project.clusters / "app.tar")
    (project.clusters / "puller.password").write_text(f"{PASSWORD}\n")
    certificate = next((baked.clusters / "ha.yaml.secrets" / "ca").glob("*.crt"))
    shutil.copy(certificate, project.clusters / "ca.pem")
    for name, text in THIN.items():
        if text is None:
            text = made.file(name).read_text().replace("count: 4", "count: 1") + "media: thin\n"
        made.file(name).write_text(text % {"key": SSH_KEY} if "%(" in text else text)
        project.remember(name)
        project.doit(f"cluster=recipes/clusters/{name}.yaml")
    return made


def make_app(target: Path) -> None:
    """An operator's image as `docker save` writes it."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        info = tarfile.TarInfo("hello")
        info.size = 5
        tar.addfile(info, io.BytesIO(b"hello"))
    data = layer.getvalue()
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Cmd": ["/hello"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(data).hexdigest()}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [APP], "Layers": ["layer.tar"]}]
    parts = {
        "config.json": json.dumps(config).encode(),
        "layer.tar": data,
        "manifest.json": json.dumps(manifest).encode(),
    }
    with tarfile.open(target, "w") as tar:
        for name, part in parts.items():
            info = tarfile.TarInfo(name)
            info.size = len(part)
            tar.addfile(info, io.BytesIO(part))


def unpacked(tarball: Path, root: Path) -> Path:
    root.mkdir()
    owner = "--same-owner" if ROOT else "--no-same-owner"
    subprocess.run(["tar", "-xzpf", tarball, "-C", root, "--numeric-owner", owner], check=True)
    return root


@pytest.fixture(scope="module")
def plane(baked: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """control-1's tarball, unpacked by GNU tar."""
    return unpacked(ha(baked) / "nodes" / "control-1.tar.gz", tmp_path_factory.mktemp("unpacked") / "control-1")


@pytest.fixture(scope="module")
def worker(baked: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """worker-1's tarball, unpacked by GNU tar."""
    return unpacked(ha(baked) / "nodes" / "worker-1.tar.gz", tmp_path_factory.mktemp("unpacked") / "worker-1")


def ha(baked: Project) -> Path:
    return baked.root / "build" / "ha"


def need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


def output(*words: object) -> str:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sums(root: Path) -> dict[str, str]:
    """Path -> SHA-256 as both manifests tell it."""
    lines = [
        line.split("  ", 1)
        for part in ("payload", "node")
        for line in (root / MANIFEST / f"{part}.SHA256SUMS").read_text().splitlines()
    ]
    return {path: digest for digest, path in lines}


def identity(payload_tarball: Path, tarball: Path) -> dict[str, bytes]:
    """The files of a full node tarball behind its payload's head, path -> bytes."""
    with tarball.open("rb") as stream:
        stream.seek(payload_tarball.stat().st_size - len(END_MEMBER))
        return members(stream.read())


def members(data: bytes) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(data))) as tar:
        for member in tar:
            if member.isfile() and (stream := tar.extractfile(member)) is not None:
                found[member.name] = stream.read()
    return found


def loaded(project: Project, name: str) -> tuple[Cluster, Bake]:
    now = datetime.now(UTC)
    cluster = inventory.load(project.clusters / f"{name}.yaml", now=now)
    where = store.default_directory(project.clusters / f"{name}.yaml")
    desk = Desk(
        build=project.root / "build",
        mirror=None,
        source=None,
        progress=Lines(),
        choices=Choices(where / "choices.json"),
    )
    return cluster, Bake(cluster, desk, where, now)


# -- tarballs ---------------------------------------------------------------------------------------------------------


def test_every_reader_of_tarballs_agrees(baked: Project, worker: Path) -> None:
    """GNU tar (which unpacked), gzip, bsdtar and Python, on names, kinds, owners, modes, times and bytes."""
    need("bsdtar")
    tarball = ha(baked) / "nodes" / "worker-1.tar.gz"
    output("gzip", "-t", tarball)
    options = "mtree:!all,type,mode,uid,gid,size,sha256,link,time"
    listed = output("bsdtar", "-cf", "-", "--format=mtree", f"--options={options}", f"@{tarball}")
    by_bsdtar: dict[str, tuple[str, str | None]] = {}
    for line in listed.splitlines():
        if line.startswith("./"):
            name, *words = line.split()
            keys = dict(word.split("=", 1) for word in words)
            about = f"{keys['type']} {int(keys['mode'], 8):o} {keys['uid']} {keys['gid']} {keys['time'].split('.')[0]}"
            by_bsdtar[name[2:]] = (f"{about} {keys.get('link', keys.get('size'))}", keys.get("sha256digest"))
    by_python: dict[str, tuple[str, str | None]] = {}
    kinds = {tarfile.REGTYPE: "file", tarfile.DIRTYPE: "dir", tarfile.SYMTYPE: "link"}
    with tarfile.open(tarball) as tar:
        for member in tar:
            content = tar.extractfile(member) if member.isfile() else None
            digest = hashlib.file_digest(content, "sha256").hexdigest() if content else None  # type: ignore[arg-type]
            size = member.size if member.isfile() else member.linkname or None
            about = f"{kinds[member.type]} {member.mode:o} {member.uid} {member.gid} {member.mtime} {size}"
            by_python[member.name] = (about, digest)
    assert by_bsdtar == by_python
    told = {name: digest for name, (_, digest) in by_python.items() if digest is not None}
    unsigned = {f"{MANIFEST}/{part}.SHA256SUMS{end}" for part in ("payload", "node") for end in ("", ".sig")}
    assert {name: digest for name, digest in told.items() if name not in unsigned} == {
        name: digest for name, digest in sums(worker).items() if name not in unsigned
    }
    gnu = {path.relative_to(worker).as_posix() for path in worker.rglob("*") if not path.is_dir() or path.is_symlink()}
    assert gnu == {name for name, (about, _) in by_python.items() if not about.startswith("dir")}


def test_a_payload_is_a_tarball_in_its_own_right(baked: Project) -> None:
    for role in ("worker", "control-plane"):
        tarball = ha(baked) / "payloads" / f"{role}-amd64.tar.gz"
        listed = output("tar", "-tzf", tarball).splitlines()
        told = [entry["path"].lstrip("/") for entry in json.loads(payload.record_beside(tarball).read_text())["files"]]
        files = [name for name in listed if not name.endswith("/")]
        assert sorted(files) == sorted(
            [*told, *(f"{MANIFEST}/payload.{end}" for end in ("json", "tree", "SHA256SUMS", "SHA256SUMS.sig"))]
        )
        assert len(listed) == len(set(listed))


@pytest.mark.parametrize("name", ["plane", "worker"])
def test_owners_modes_and_times_are_fixed(baked: Project, name: str, request: pytest.FixtureRequest) -> None:
    root: Path = request.getfixturevalue(name)
    minted = datetime.fromisoformat(
        json.loads((baked.clusters / "ha.yaml.secrets" / "cluster.json").read_text())["content"]["minted"]
    )
    described = [
        entry
        for part in ("payload", "node")
        for entry in json.loads((root / MANIFEST / f"{part}.json").read_text())["files"]
    ]
    for entry in described:
        found = (root / entry["path"].lstrip("/")).lstat()
        assert found.st_mtime == minted.timestamp(), entry["path"]
        if ROOT:
            assert (found.st_uid, found.st_gid) == (USERS[entry["owner"]],) * 2, entry["path"]
        if "link" in entry:
            continue
        assert f"{stat.S_IMODE(found.st_mode):04o}" == entry["mode"]
        assert entry["mode"] in ("0644", "0755", "0600"), entry["path"]  # no setuid, nothing others may write
        content = (root / entry["path"].lstrip("/")).read_bytes() if found.st_size < 1 << 20 else b""
        if re.search(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----\n[A-Za-z0-9+/]{60}", content):
            assert entry["mode"] == "0600", entry["path"]
    for entry in ("/etc/kubernetes/bootstrap-kubelet.conf", "/etc/nodebake/objects/90-tokens.yaml"):
        path = root / entry.lstrip("/")
        assert not path.exists() or stat.S_IMODE(path.stat().st_mode) == 0o600
    keys = [path for path in root.rglob("*.key") if path.is_file()]
    assert all(stat.S_IMODE(key.stat().st_mode) == 0o600 for key in keys)
    assert bool(keys) == (name == "plane"), "a worker has no key of its own"


@pytest.mark.parametrize("name", ["plane", "worker"])
def test_manifests_are_checked_by_openssl_and_coreutils_alone(name: str, request: pytest.FixtureRequest) -> None:
    need("openssl", "sha256sum")
    root: Path = request.getfixturevalue(name)
    folder = root / MANIFEST
    for part in ("node", "payload"):
        listed = folder / f"{part}.SHA256SUMS"
        signature = folder / f"{part}.SHA256SUMS.sig"
        output("openssl", "dgst", "-sha256", "-verify", folder / "signing.pub", "-signature", signature, listed)
        done = subprocess.run(
            ["sha256sum", "--strict", "--quiet", "-c", f"{MANIFEST}/{part}.SHA256SUMS"],
            cwd=root,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["plane", "worker"])
def test_every_file_tells_where_it_is_from(name: str, request: pytest.FixtureRequest) -> None:
    root: Path = request.getfixturevalue(name)
    pinned = {component.name: component.version for component in load_components().values()}
    for part in ("payload", "node"):
        for entry in json.loads((root / MANIFEST / f"{part}.json").read_text())["files"]:
            if "link" in entry:
                continue
            assert {"path", "size", "mode", "owner", "sha256", "component", "version", "source"} <= set(entry), entry
            if re.search(r"/[0-9a-f]{16}/(bin|cni)/", entry["path"]):
                assert entry["version"] == pinned[entry["component"]], entry
                assert entry["source"] == "release" or entry["source"].startswith("modules (go1."), entry


# -- programs, images, packages ---------------------------------------------------------------------------------------

NO_FLAG = {"kubectl": ["version", "--client"], "etcdctl": ["version"], "etcdutl": ["version"]}


def test_every_program_is_of_its_architecture_and_version(plane: Path) -> None:
    entries = json.loads((plane / MANIFEST / "payload.json").read_text())["files"]
    programs = [entry for entry in entries if re.search(r"/[0-9a-f]{16}/(bin|cni)/", entry["path"])]
    names = {Path(entry["path"]).name for entry in programs}
    assert {"kube-apiserver", "etcd", "kubelet", "containerd", "runc", "flanneld", "crictl", "bridge"} <= names
    for entry in programs:
        path = plane / entry["path"].lstrip("/")
        with path.open("rb") as stream:
            head = stream.read(20)
        assert head[:6] == b"\x7fELF\x02\x01" and int.from_bytes(head[18:20], "little") == 62, path.name
        words = NO_FLAG.get(path.name, ["--version"])
        done = subprocess.run([path, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30)
        number = re.escape(entry["version"].removeprefix("v"))
        assert re.search(rf"\bv?{number}\b", done.stdout + done.stderr), f"{path.name}: {done.stdout}{done.stderr}"


def blobs(archive: Path) -> tuple[dict[str, bytes], dict[str, int]]:
    """Small members (documents) by name, and every member's size."""
    documents: dict[str, bytes] = {}
    sizes: dict[str, int] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            sizes[member.name] = member.size
            if (stream := tar.extractfile(member)) is not None:
                data = stream.read()
                if member.name.startswith("blobs/sha256/"):
                    assert hashlib.sha256(data).hexdigest() == member.name.rpartition("/")[2]
                if len(data) < 1 << 20:
                    documents[member.name] = data
    return documents, sizes


def test_image_archives_are_oci_layouts(plane: Path, worker: Path) -> None:
    archives = sorted((plane / "opt/nodebake/current/images").iterdir())
    assert [path.name for path in archives] == ["coredns.tar", "pause.tar"]
    for path in archives:
        assert sha256(path) == sha256(worker / "opt/nodebake/current/images" / path.name)
        documents, sizes = blobs(path)

        def document(descriptor: dict[str, Any], *, found: dict[str, bytes], size: dict[str, int]) -> Any:
            name = f"blobs/{descriptor['digest'].replace(':', '/')}"
            assert size[name] == descriptor["size"], name
            return json.loads(found[name])

        assert json.loads(documents["oci-layout"]) == {"imageLayoutVersion": "1.0.0"}
        index = json.loads(documents["index.json"])
        assert index["schemaVersion"] == 2 and index["manifests"]
        for top in index["manifests"]:
            assert "/" in top["annotations"]["io.containerd.image.name"]
            manifest = document(top, found=documents, size=sizes)
            config = document(manifest["config"], found=documents, size=sizes)
            assert (config["architecture"], config["os"]) == ("amd64", "linux")
            assert len(config["rootfs"]["diff_ids"]) == len(manifest["layers"])
            for layer in manifest["layers"]:
                assert sizes[f"blobs/{layer['digest'].replace(':', '/')}"] == layer["size"]


@pytest.fixture
def containerd(plane: Path, tmp_path: Path) -> Iterator[list[str]]:
    """The payload's own containerd in a folder of its own; the start of a ctr command for it."""
    if not ROOT:
        pytest.skip("containerd asks for root")
    programs = plane / "opt/nodebake/current/bin"
    address = Path(f"/tmp/nodebake-{os.getpid()}.sock")  # noqa: S108 - a socket's path must be short
    config = tmp_path / "config.toml"
    off = ("cri.v1.images", "cri.v1.runtime", "grpc.v1.cri", "internal.v1.opt", "nri.v1.nri")
    disabled = json.dumps([f"io.containerd.{name}" for name in off])
    config.write_text(
        f'version = 3\nroot = "{tmp_path}/root"\nstate = "{tmp_path}/state"\ndisabled_plugins = {disabled}\n'
        f'[grpc]\naddress = "{address}"\n[ttrpc]\naddress = "{address}.ttrpc"\n'
    )
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [programs / "containerd", "--config", config], stdout=out, stderr=subprocess.STDOUT, cwd=tmp_path
        )
    try:
        deadline = time.monotonic() + 30
        while "containerd successfully booted" not in log.read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.skip(f"containerd does not start on this desk: {log.read_text()[-500:]}")
            time.sleep(0.1)
        yield [str(programs / "ctr"), "--address", str(address), "--namespace", "k8s.io"]
    finally:
        process.terminate()
        process.wait()
        for path in (address, Path(f"{address}.ttrpc")):
            path.unlink(missing_ok=True)


def test_containerd_imports_the_images_by_the_names_that_are_asked_for(
    plane: Path, thin: Thin, containerd: list[str], tmp_path: Path
) -> None:
    program = (plane / "usr/local/lib/nodebake/import-images").read_text()
    options = ["images", "import", "--local", "--sync-fs"]
    assert " ".join(options) in program
    options.append("--label=io.cri-containerd.pinned=pinned")
    single = thin.folder("single") / "payloads" / "control-plane-amd64.tar.gz"
    subprocess.run(
        ["tar", "-xzf", single, "-C", tmp_path, "--wildcards", "--strip-components=4", "*/images/app.tar"], check=True
    )
    for archive in [*(plane / "opt/nodebake/current/images").iterdir(), tmp_path / "app.tar"]:
        output(*containerd, *options, archive)
    listed = {line.split()[0]: line for line in output(*containerd, "images", "ls").splitlines()[1:]}
    config = (plane / "etc/containerd/config.toml").read_text()
    (sandbox,) = re.findall(r"sandbox\s*=\s*['\"]([^'\"]+)", config)
    objects = (plane / "etc/nodebake/objects/10-cluster.yaml").read_text()
    asked = {sandbox, APP, *re.findall(r"^\s*(?:- )?image: [\"']?([^\s\"']+)", objects, re.MULTILINE)}
    assert len(asked) == 3 and asked <= set(listed), listed
    assert all("io.cri-containerd.pinned=pinned" in line and "linux/amd64" in line for line in listed.values())


# What Debian 13's minimal system has (Essential and required packages, apt, and what these need).
MINIMAL = """
adduser apt base-files base-passwd bash bsdutils coreutils dash debconf debianutils diffutils dpkg findutils
gcc-14-base grep gzip hostname init-system-helpers libacl1 libapparmor1 libattr1 libaudit1 libblkid1 libbsd0
libbz2-1.0 libc-bin libc6 libcap-ng0 libcrypt1 libdb5.3t64 libgcc-s1 libgmp10 liblz4-1 liblzma5 libmd0 libmount1
libpam-modules libpam-runtime libpam0g libseccomp2 libselinux1 libsemanage2 libsepol2 libsmartcols1 libsqlite3-0
libstdc++6 libsystemd0 libtinfo6 libudev1 libuuid1 libxxhash0 libzstd1 login lsb-base mawk mount ncurses-base
ncurses-bin passwd perl-base sed systemd systemd-sysv sysvinit-utils tar tzdata util-linux zlib1g
"""


@pytest.mark.parametrize("name", ["plane", "worker"])
def test_the_packages_closure_is_whole(name: str, request: pytest.FixtureRequest) -> None:
    need("dpkg-deb")
    root: Path = request.getfixturevalue(name)
    fields = ("Package", "Version", "Architecture", "Provides", "Depends", "Pre-Depends")
    there: dict[str, str | None] = {}
    controls: list[dict[str, str]] = []
    debs = sorted((root / "opt/nodebake/current/packages").iterdir())
    assert len(debs) > 30
    for deb in debs:
        assert "Package:" in output("dpkg-deb", "-I", deb)
        lines = output("dpkg-deb", "-f", deb, *fields).splitlines()
        control = dict(line.split(": ", 1) for line in lines)
        assert control["Architecture"] in ("amd64", "all")
        controls.append(control)
        there[control["Package"]] = control["Version"]
        for provided in filter(None, control.get("Provides", "").split(",")):
            there.setdefault(re.split(r"[ (:]", provided.strip())[0], None)
    for control in controls:
        for clause in ",".join([control.get("Depends", ""), control.get("Pre-Depends", "")]).split(","):
            choices = [choice.strip() for choice in clause.split("|") if choice.strip()]
            assert not choices or any(satisfied(choice, there) for choice in choices), f"{control['Package']}: {clause}"
    programs = ["nft", "openssl", "ip"] if name == "plane" else ["nft", "haproxy", "conntrack"]
    contents = "".join(output("dpkg-deb", "-c", deb) for deb in debs if deb.name.startswith(tuple("ochni")))
    for program in programs:
        assert re.search(rf"bin/{program}( |$)", contents, re.MULTILINE), program


def satisfied(choice: str, there: dict[str, str | None]) -> bool:
    found = re.fullmatch(r"([a-z0-9.+-]+)(?::\w+)?(?: \((<<|<=|=|>=|>>) ([^)]+)\))?", choice)
    assert found is not None, choice
    name, relation, version = found.groups()
    if name not in there:
        return name in MINIMAL.split()
    if relation is None or (have := there[name]) is None:
        return True
    operator = {"<<": "lt", "<=": "le", "=": "eq", ">=": "ge", ">>": "gt"}[relation]
    return subprocess.run(["dpkg", "--compare-versions", have, operator, version]).returncode == 0


# -- seeds ------------------------------------------------------------------------------------------------------------


def digest_of_output(*words: object) -> str:
    with subprocess.Popen([*map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        digest = hashlib.file_digest(process.stdout, "sha256").hexdigest()  # type: ignore[arg-type]
    assert process.returncode == 0, words
    return digest


def by_xorriso(iso: Path, folder: Path) -> dict[str, str]:
    names = re.findall(r"'/(.+)'", output("xorriso", "-indev", iso, "-find", "/", "-type", "f"))
    output("osirrox", "-indev", iso, "-extract", "/", folder / "osirrox")
    listed = output("xorriso", "-indev", iso, "-lsl", "/")
    assert all(re.search(rf"-r-.r-.r-. .* '{re.escape(name)}'", listed) for name in names), listed
    return {name: sha256(folder / "osirrox" / name) for name in names}


def by_isoinfo(extension: str) -> Callable[[Path, Path], dict[str, str]]:
    def read(iso: Path, _: Path) -> dict[str, str]:
        names = [line.lstrip("/") for line in output("isoinfo", extension, "-f", "-i", iso).splitlines()]
        return {name: digest_of_output("isoinfo", extension, "-i", iso, "-x", f"/{name}") for name in names}

    return read


def by_bsdtar(iso: Path, folder: Path) -> dict[str, str]:
    (folder / "bsdtar").mkdir()
    output("bsdtar", "-xf", iso, "-C", folder / "bsdtar")
    return {path.name: sha256(path) for path in (folder / "bsdtar").iterdir()}


READERS: list[tuple[str, Callable[[Path, Path], dict[str, str]]]] = [
    ("xorriso", by_xorriso),
    ("isoinfo", by_isoinfo("-R")),
    ("isoinfo", by_isoinfo("-J")),
    ("bsdtar", by_bsdtar),
]


@pytest.mark.parametrize(("program", "read"), READERS, ids=["xorriso", "rock-ridge", "joliet", "bsdtar"])
def test_every_reader_of_isos_agrees(
    baked: Project, tmp_path: Path, program: str, read: Callable[[Path, Path], dict[str, str]]
) -> None:
    need(program)
    iso = ha(baked) / "seeds" / "worker-1.iso"
    found = read(iso, tmp_path)
    subprocess.run(["chmod", "-R", "u+w", tmp_path], check=True)  # what an ISO holds may not be written to
    tarball = ha(baked) / "nodes" / "worker-1.tar.gz"
    assert found.keys() == SEED
    assert found["node.tar.gz"] == sha256(tarball)
    program_in_overlay = baked.root / "overlays/common/opt/nodebake/first-boot"
    assert found["first-boot"] == sha256(program_in_overlay)


def test_every_seed_is_labelled_and_named_after_its_artifact(baked: Project, thin: Thin) -> None:
    need("bsdtar")
    seen: set[str] = set()
    for folder in (ha(baked), *(thin.folder(name) for name in THIN)):
        for iso in sorted((folder / "seeds").glob("*.iso")):
            with iso.open("rb") as stream:
                stream.seek(16 * 2048)
                descriptor = stream.read(2048)
            assert descriptor[1:6] == b"CD001" and descriptor[40:72].rstrip() == b"cidata"
            assert stat.S_IMODE(iso.stat().st_mode) == 0o600
            meta = yaml.safe_load(output("bsdtar", "-xOf", iso, "meta-data"))
            assert re.fullmatch(rf"{iso.stem}-[0-9a-f]{{16}}", meta["instance-id"])
            assert meta["local-hostname"] == iso.stem
            seen.add(meta["instance-id"])
    assert len(seen) == 6 + 8 + 1 + 4


SCHEMA = """
import json, sys, yaml
from cloudinit.config.schema import get_schema, validate_cloudconfig_schema
from cloudinit.net import network_state
schema = get_schema()
for name, user_data, network in json.load(sys.stdin):
    config = yaml.safe_load(user_data)
    if sys.argv[1] == "old":
        # Debian 12's schema knew neither `locale: false` nor that nobody may be a user yet, though its code did.
        assert config.pop("locale") is False
        config["users"] or config.pop("users")
    try:
        validate_cloudconfig_schema(config, schema, strict=True)
        network_state.parse_net_config_data(yaml.safe_load(network))
    except Exception as error:
        sys.exit(f"{name}: {error}")
"""


def test_cloud_init_takes_every_machines_documents(baked: Project, thin: Thin) -> None:
    need("bsdtar", "cloud-init")
    python = "/usr/bin/python3"
    if subprocess.run([python, "-c", "import cloudinit.config.schema"], capture_output=True).returncode != 0:
        pytest.skip("cloud-init's Python modules are not installed")
    told = subprocess.run(["cloud-init", "--version"], capture_output=True, text=True)
    old = int((told.stdout + told.stderr).split()[-1].split(".")[0]) < 23
    documents = []
    for folder in (ha(baked), *(thin.folder(name) for name in THIN)):
        for iso in sorted((folder / "seeds").glob("*.iso")):
            user_data, network = (output("bsdtar", "-xOf", iso, name) for name in ("user-data", "network-config"))
            assert user_data.startswith("#cloud-config\n") and "PRIVATE KEY" not in user_data
            documents.append((str(iso), user_data, network))
    given = json.dumps(documents)
    words = [python, "-c", SCHEMA, "old" if old else "new"]
    done = subprocess.run(words, input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_thin_media(thin: Thin, tmp_path: Path) -> None:
    """The identity alone is small; the payloads travel on one volume that first boot finds by its label."""
    need("bsdtar")
    for name in THIN:
        folder = thin.folder(name)
        for path in [*(folder / "nodes").iterdir(), *(folder / "seeds").iterdir()]:
            assert path.stat().st_size < 300_000, path
        volume = folder / "payloads" / "payloads.iso"
        with volume.open("rb") as stream:
            stream.seek(16 * 2048 + 40)
            assert stream.read(32).rstrip() == b"nodebake"
        payloads = sorted((folder / "payloads").glob("*.tar.gz"))
        assert output("bsdtar", "-tf", volume).split() == [".", *(path.name for path in payloads)]
    smallest = thin.folder("balanced") / "payloads" / "load-balancer-amd64.tar.gz"
    volume = smallest.with_name("payloads.iso")
    assert digest_of_output("bsdtar", "-xOf", volume, smallest.name) == sha256(smallest)


# -- first boot -------------------------------------------------------------------------------------------------------


def verify(program: Path, root: Path, *tarballs: Path) -> subprocess.CompletedProcess[str]:
    root.mkdir(exist_ok=True)
    command = ["sh", str(program), "verify", "--root", str(root), *map(str, tarballs)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_artifacts_own_first_boot_accepts_it(baked: Project, worker: Path, tmp_path: Path) -> None:
    done = verify(worker / "opt/nodebake/first-boot", tmp_path / "root", ha(baked) / "nodes" / "worker-1.tar.gz")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "as it was baked for worker-1 (cluster ha)" in done.stdout


@pytest.mark.parametrize(
    ("cluster", "node", "role"),
    [
        ("external-etcd", "etcd-2", "etcd"),
        ("external-etcd", "balancer-1", "load-balancer"),
        ("single", "only", "control-plane"),
        ("balanced", "balancer-2", "load-balancer"),
    ],
)
def test_first_boot_accepts_thin_media_with_their_payload(
    thin: Thin, tmp_path: Path, cluster: str, node: str, role: str
) -> None:
    program = thin.project.root / "overlays/common/opt/nodebake/first-boot"
    together = thin.folder(cluster) / "payloads" / f"{role}-amd64.tar.gz"
    done = verify(program, tmp_path / "root", thin.node(cluster, node), together)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"as it was baked for {node} (cluster {cluster})" in done.stdout


def test_a_changed_byte_anywhere_is_refused(thin: Thin, tmp_path: Path) -> None:
    """Of each kind of file in the artifact one has a bit turned round."""
    whole = tmp_path / "whole"
    whole.mkdir()
    for tarball in (
        thin.folder("balanced") / "payloads" / "load-balancer-amd64.tar.gz",
        thin.node("balanced", "balancer-1"),
    ):
        subprocess.run(["tar", "-xzpf", tarball, "-C", whole], check=True)
    program = whole / "opt/nodebake/first-boot"
    patterns = (
        *("opt/nodebake/*/packages/haproxy_*.deb", "etc/systemd/system/api-vip.service", "etc/nodebake/node.env"),
        *("opt/nodebake/first-boot", "usr/local/lib/nodebake/check-api", f"{MANIFEST}/signing.pub"),
        *(f"{MANIFEST}/node.json", f"{MANIFEST}/payload.tree", f"{MANIFEST}/payload.SHA256SUMS"),
        f"{MANIFEST}/node.SHA256SUMS.sig",
    )
    sample = [next(whole.glob(pattern)) for pattern in patterns]
    packed = tmp_path / "node.tar.gz"
    kept = tmp_path / "program"
    shutil.copy(program, kept)

    def refused() -> subprocess.CompletedProcess[str]:
        subprocess.run(["tar", "-cf", packed, "-I", "gzip -1", "-C", whole, "."], check=True)
        return verify(kept, tmp_path / "root", packed)

    assert refused().returncode == 0, "unchanged it is accepted"
    for path in sample:
        data = path.read_bytes()
        place = len(data) // 2
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        done = refused()
        assert done.returncode in (DAMAGED, FORGED), f"{path}: {done.stdout}{done.stderr}"
        path.write_bytes(data)


# -- an artifact of an edited machine ------------------------------------------------------------------------------


def test_an_edited_machine_s_artifacts_are_changed_where_they_lie(rebaking: Project) -> None:
    names = ("nodes/worker-1.tar.gz", "seeds/worker-1.iso")
    file = rebaking.clusters / "ha.yaml"

    def bake(mac: str) -> list[tuple[int, str]]:
        text = re.sub(r'(name: worker-1,.*mac: ")[0-9a-f:]+"', rf'\g<1>{mac}"', file.read_text())
        file.write_text(text)
        rebaking.doit("node:worker-1")
        return [((ha(rebaking) / name).stat().st_ino, sha256(ha(rebaking) / name)) for name in names]

    before = [((ha(rebaking) / name).stat().st_ino, sha256(ha(rebaking) / name)) for name in names]
    first = bake("52:54:00:00:10:a1")  # the files are hard links of another project's, so they are written anew
    second = bake("52:54:00:00:10:a2")
    assert [number for number, _ in second] == [number for number, _ in first]
    for name in names:
        (ha(rebaking) / name).unlink()
    fresh = bake("52:54:00:00:10:a2")
    assert [digest for _, digest in fresh] == [digest for _, digest in second]
    assert len({*before, *first, *second}) == 6


# -- the closure proof on real parts ----------------------------------------------------------------------------------


@dataclass
class Parts:
    """control-1 of ha, as the bake hands it to the proof."""

    cluster: Cluster
    node: Node
    images: list[Image]
    debs: list[Fetched]
    files: list[File]  # payload and identity
    own: set[str]  # the identity's paths


@pytest.fixture(scope="module")
def parts(baked: Project) -> Parts:
    cluster, bake = loaded(baked, "ha")
    node = cluster.control_planes[0]
    by_component: dict[str, list[Fetched]] = {}
    for file in read_fetched(bake.record("binaries", "amd64")):
        by_component.setdefault(file.origin.component, []).append(file)
    images = read_images(bake.record("images", "amd64"))
    debs = read_fetched(bake.record("packages", "control-plane-amd64"))
    contents = payload.files(bake.shared, node.role, node.arch, by_component, images, debs)
    own = bake.identity(node, sums="0" * 64)
    return Parts(cluster, node, images, debs, [*contents, *own], {file.path for file in own})


def holes(parts: Parts, files: Sequence[File], arch: Arch = "amd64") -> str:
    wanted = overlay.packages(parts.cluster, "control-plane")
    shared = [file for file in files if file.path not in parts.own]
    try:
        proven = closure.prove_payload(shared, parts.cluster, "control-plane", arch, parts.images, wanted)
        own = [file for file in files if file.path in parts.own]
        packed = {file.sha256 for file in shared}
        closure.prove(
            proven, parts.cluster, parts.node, own, lambda: [deb for deb in parts.debs if deb.sha256 in packed]
        )
    except BakeErrors as errors:
        return str(errors)
    return ""


def test_what_was_baked_is_closed(parts: Parts) -> None:
    assert holes(parts, parts.files) == ""


def test_to_prove_every_machine_no_package_is_unpacked(baked: Project) -> None:
    """That would take seconds; what the payloads' records tell is enough."""
    cluster, bake = loaded(baked, "ha")

    def refuse() -> list[Fetched]:
        raise AssertionError("something is named that is only a link in a large package")

    for node in cluster.nodes:
        sums, proven = payload.read_record(bake.payload(node.role, node.arch), "sums", "proven")
        closure.prove(closure.Proven.from_record(proven), cluster, node, bake.identity(node, sums=sums), refuse)


@pytest.mark.parametrize(
    ("removed", "named"),
    [
        (r"/bin/kube-scheduler$", "kube-scheduler"),
        (r"/bin/runc$", "runc"),
        (r"/bin/ctr$", "ctr"),
        (r"/images/pause\.tar$", "pause"),
        (r"/images/coredns\.tar$", "coredns"),
        (r"/packages/nftables_", "nft"),
        (r"/packages/iptables_", "iptables"),
        (r"/system/containerd\.service$", "containerd.service"),
        (r"/system/etcd\.service$", "etcd.service"),
        (r"/lib/nodebake/import-images$", "import-images"),
        (r"/etc/kubernetes/pki/kube-apiserver\.key$", "kube-apiserver.key"),
        (r"/etc/kubernetes/audit-policy\.yaml$", "audit-policy.yaml"),
        (r"/etc/nodebake/node\.env$", "node.env"),
        (r"^/opt/nodebake/current$", "/opt/nodebake/current"),
    ],
)
def test_what_is_missing_is_named(parts: Parts, removed: str, named: str) -> None:
    left = [file for file in parts.files if not re.search(removed, file.path)]
    assert len(left) == len(parts.files) - 1
    assert named in holes(parts, left)


def test_a_program_of_another_architecture_is_named(parts: Parts, tmp_path: Path) -> None:
    [file] = [file for file in parts.files if file.path.endswith("/bin/etcd")]
    assert file.source is not None
    with file.source.open("rb") as stream:
        head = bytearray(stream.read(4096))
    head[18:20] = (183).to_bytes(2, "little")
    foreign = tmp_path / "etcd"
    foreign.write_bytes(head)
    changed = [replace(each, source=foreign, sha256=sha256(foreign)) if each is file else each for each in parts.files]
    told = holes(parts, changed)
    assert "/bin/etcd" in told and "arm64" in told and "amd64" in told
    assert "/bin/kubelet" in holes(parts, parts.files, "arm64")


def test_a_bake_with_a_hole_fails_and_leaves_the_old_payload(rebaking: Project) -> None:
    unit = rebaking.root / "overlays/worker/etc/systemd/system/kubelet.service"
    unit.write_text(unit.read_text().replace("[Service]\n", "[Service]\nExecStartPre=/usr/bin/no-such-program\n"))
    before = sha256(ha(rebaking) / "payloads" / "worker-amd64.tar.gz")
    told = rebaking.doit("node:worker-1", fails=True).stdout
    assert "/usr/bin/no-such-program is named here, but is not in the artifact" in told
    assert "kubelet.service" in told and "Traceback" not in told
    assert sha256(ha(rebaking) / "payloads" / "worker-amd64.tar.gz") == before


def test_a_hole_in_one_machine_s_identity_fails_that_machine_alone(rebaking: Project) -> None:
    """The payload is not packed anew: what it brings is known from its record."""
    rebaking.doit("node:worker-1", "node:worker-2")  # a project that was moved packs its payloads once more
    template = rebaking.root / "overlays/node/etc/nodebake/node.env.j2"
    template.write_text(template.read_text() + "{% if node.name == 'worker-2' %}EXTRA=/srv/absent{% endif %}\n")
    names = ("nodes/worker-1.tar.gz", "nodes/worker-2.tar.gz", "seeds/worker-2.iso", "payloads/worker-amd64.tar.gz")
    before = {name: (ha(rebaking) / name).stat() for name in names}
    rebaking.doit("node:worker-1")
    told = rebaking.doit("node:worker-2", fails=True).stdout
    assert "worker-2:/etc/nodebake/node.env: /srv/absent is named here, but is not in the artifact" in told
    assert "Traceback" not in told
    changed = [name for name in names if (ha(rebaking) / name).stat().st_mtime_ns != before[name].st_mtime_ns]
    assert changed == ["nodes/worker-1.tar.gz"]
    assert sorted(path.name for path in (ha(rebaking) / "nodes").iterdir()) == sorted(
        f"{node.name}.tar.gz" for node in loaded(rebaking, "ha")[0].nodes
    )


# -- the operator's own -----------------------------------------------------------------------------------------------


def test_the_operators_images_and_registries_are_in_the_artifact(thin: Thin) -> None:
    tarball = thin.folder("single") / "payloads" / "control-plane-amd64.tar.gz"
    app = sha256(thin.project.clusters / "app.tar")
    record = json.loads(payload.record_beside(tarball).read_text())
    [image] = [entry for entry in record["files"] if entry["path"].endswith("/images/app.tar")]
    assert image["sha256"] == app and image["source"] == "operator"
    folder = "etc/containerd/certs.d/registry.example.internal:5000"
    hosts = output("tar", "-xzOf", tarball, f"{folder}/hosts.toml")
    assert '[host."https://mirror.example.internal"]' in hosts and f'ca = "/{folder}/ca.crt"' in hosts
    own = members(thin.node("single", "only").read_bytes())
    auth = json.loads(own["var/lib/kubelet/config.json"])["auths"]["registry.example.internal:5000"]["auth"]
    assert base64.b64decode(auth).decode() == f"puller:{PASSWORD}"
    assert b"PRIVATE KEY" in own["etc/ssh/ssh_host_ed25519_key"]
    assert "only,192.168.10.11 ssh-ed25519 " in (thin.folder("single") / "known_hosts").read_text()


def test_a_new_password_reaches_the_machines(thin: Thin) -> None:
    file = thin.project.clusters / "puller.password"
    before = sha256(thin.node("single", "only"))
    file.write_text("another\n")
    try:
        thin.project.doit("cluster=recipes/clusters/single.yaml", "node:only")
        assert sha256(thin.node("single", "only")) != before
    finally:
        file.write_text(f"{PASSWORD}\n")
        thin.project.doit("cluster=recipes/clusters/single.yaml", "node:only")


# -- secrets ----------------------------------------------------------------------------------------------------------


def secrets_of(folder: Path) -> dict[str, bytes]:
    """What must not be seen -> by what it is found: a piece of a key's base64, a token's secret half, an encryption
    key in three spellings."""
    found: dict[str, bytes] = {}
    for path in sorted(folder.rglob("*.key")):
        data = path.read_bytes()
        name = path.relative_to(folder).as_posix()
        if b"-----BEGIN" in data:
            # Of PKCS #8 for P-256 the secret starts 48 characters into the base64; what is before is the same in all.
            found[name] = data.splitlines()[1][44:]
            found[f"{name}, base64 in base64"] = base64.b64encode(data)[104:122]
        else:
            raw = base64.b64decode(data)
            found |= {name: data.strip(), f"{name}, hex": raw.hex().encode()}
    seed = (folder / "serial.seed").read_bytes().strip()
    found |= {"serial.seed": seed, "serial.seed, hex": base64.b64decode(seed).hex().encode()}
    for node, token in json.loads((folder / "tokens.json").read_text())["content"].items():
        found[f"token of {node}"] = token.split(".")[1].encode()
        found[f"token of {node}, base64"] = base64.b64encode(token.split(".")[1].encode())
    ssh = folder / "ssh-host-keys.json"
    if ssh.exists():
        for node, pair in json.loads(ssh.read_text())["content"].items():
            found[f"SSH host key of {node}"] = pair["private"].splitlines()[4][10:34].encode()  # behind the public half
    return found


def seen_in(data: bytes, secrets: dict[str, bytes]) -> list[str]:
    return [name for name, needle in secrets.items() if needle in data]


def test_the_search_finds_what_is_there(baked: Project, plane: Path) -> None:
    secrets = secrets_of(baked.clusters / "ha.yaml.secrets")
    key = (plane / "etc/kubernetes/pki/kubernetes-ca.key").read_bytes()
    assert seen_in(key, secrets) == ["ca/kubernetes.key"]
    assert "token of worker-2, base64" in seen_in(
        (plane / "etc/nodebake/objects/90-tokens.yaml").read_bytes(), secrets
    ) or "token of worker-2" in seen_in((plane / "etc/nodebake/objects/90-tokens.yaml").read_bytes(), secrets)
    assert "encryption.key" in seen_in((plane / "etc/kubernetes/encryption.yaml").read_bytes(), secrets)


@pytest.mark.parametrize("name", ["plane", "worker"])
def test_payloads_hold_no_secret(baked: Project, name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Every file in the unpacked artifact that holds any secret is one of the identity's, and 0600."""
    root: Path = request.getfixturevalue(name)
    patterns = tmp_path / "patterns"
    patterns.write_bytes(b"\n".join(secrets_of(baked.clusters / "ha.yaml.secrets").values()))
    environment = {**os.environ, "LC_ALL": "C"}
    words = ["grep", "-rlaF", "-f", str(patterns), "."]
    done = subprocess.run(words, cwd=root, env=environment, capture_output=True, text=True)
    hit = {line.removeprefix("./") for line in done.stdout.splitlines()}
    assert "etc/kubernetes/bootstrap-kubelet.conf" in hit
    shared = {
        entry["path"].lstrip("/") for entry in json.loads((root / MANIFEST / "payload.json").read_text())["files"]
    }
    assert hit.isdisjoint(shared)
    assert all(stat.S_IMODE((root / path).stat().st_mode) == 0o600 for path in hit), hit
    if name == "worker":
        assert hit == {"etc/kubernetes/bootstrap-kubelet.conf"}


def test_each_machine_has_its_own_secrets_only(baked: Project) -> None:
    secrets = secrets_of(baked.clusters / "ha.yaml.secrets")
    for number in (1, 2, 3):
        tarball = ha(baked) / "nodes" / f"worker-{number}.tar.gz"
        own = identity(ha(baked) / "payloads" / "worker-amd64.tar.gz", tarball)
        assert seen_in(b"\0".join(own.values()), secrets) == [f"token of worker-{number}"]
        assert not [path for path, data in own.items() if b"PRIVATE KEY" in data]
        tarball = ha(baked) / "nodes" / f"control-{number}.tar.gz"
        own = identity(ha(baked) / "payloads" / "control-plane-amd64.tar.gz", tarball)
        held = set(seen_in(b"\0".join(own.values()), secrets))
        assert {"ca/kubernetes.key", "ca/kubelet-serving.key", "service-account.key", "encryption.key"} <= held
        never = ("ca/etcd.key", "ca/front-proxy.key", "signing.key", "serial.seed", "keys/_desk")
        others = tuple(f"keys/control-{other}/" for other in (1, 2, 3) if other != number)
        assert not [name for name in held if name.startswith((*never, *others))]


def test_balancers_hold_no_key_and_etcd_no_token(thin: Thin) -> None:
    for cluster, names in (("balanced", ("balancer-1", "balancer-2")), ("external-etcd", ("balancer-1", "balancer-2"))):
        secrets = secrets_of(store.default_directory(thin.file(cluster)))
        for name in names:
            own = b"\0".join(members(thin.node(cluster, name).read_bytes()).values())
            assert seen_in(own, secrets) == [] and b"PRIVATE KEY" not in own
    secrets = secrets_of(store.default_directory(thin.file("external-etcd")))
    for number in (1, 2, 3):
        own = b"\0".join(members(thin.node("external-etcd", f"etcd-{number}").read_bytes()).values())
        held = seen_in(own, secrets)
        assert held and all(name.startswith(f"keys/etcd-{number}/") for name in held)


def test_a_bake_that_would_give_away_a_secret_fails(rebaking: Project) -> None:
    before = sha256(ha(rebaking) / "payloads" / "worker-amd64.tar.gz")
    token = json.loads((rebaking.clusters / "ha.yaml.secrets" / "tokens.json").read_text())["content"]["worker-2"]
    shared = rebaking.root / "overlays/worker/etc/motd"
    shared.write_text(f"{base64.b64encode(token.encode()).decode()}\n")
    told = rebaking.doit("node:worker-1", fails=True).stdout
    assert "ERROR: payload worker amd64:/etc/motd: this holds the bootstrap token of worker-2\n" in told
    assert sha256(ha(rebaking) / "payloads" / "worker-amd64.tar.gz") == before
    shared.unlink()
    own = rebaking.root / "overlays/node/etc/nodebake/node.env.j2"
    own.write_text(own.read_text() + f"{{% if node.name == 'worker-1' %}}A={token}{{% endif %}}\n")
    told += rebaking.doit("node:worker-1", fails=True).stdout
    assert "ERROR: worker-1:/etc/nodebake/node.env: this holds the bootstrap token of worker-2\n" in told
    assert token.split(".")[1] not in told and "Traceback" not in told
