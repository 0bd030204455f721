"""The first-boot program, run by a real shell on real tarballs, in a folder that stands for /."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from recipes import seed
from recipes.kit import archive, overlay
from recipes.kit.model import File
from tests import artifacts, samples, servers

PROGRAM = overlay.OVERLAYS / "common" / seed.FIRST_BOOT
DAMAGED, MISSING, FORGED, USAGE = 65, 66, 67, 64
MANIFEST = "opt/nodebake/manifest"


@pytest.fixture(scope="module")
def baked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(payload, full node tarball, thin one) of worker-1."""
    folder = tmp_path_factory.mktemp("baked")
    cluster = samples.ha()
    minted = artifacts.secrets(folder, cluster)
    parts = artifacts.Parts(folder / "cache")
    payload, full = artifacts.bake(folder, cluster, cluster.workers[0], parts, minted)
    thin_node = cluster.workers[0]._replace(media="thin")
    _, thin = artifacts.bake(folder / "thin", cluster, thin_node, parts, minted)
    return payload, full, thin


def run(*arguments: object, shell: str = "sh") -> subprocess.CompletedProcess[str]:
    command = [shell, str(PROGRAM), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def rebuilt(tarball: Path, folder: Path, change: Callable[[Path], None]) -> Path:
    """The tarball with its unpacked files changed, packed anew."""
    root = folder / "rebuilt"
    root.mkdir()
    subprocess.run(["tar", "-xzpf", tarball, "-C", root], check=True)
    change(root)
    made = folder / "node.tar.gz"
    subprocess.run(["tar", "-czf", made, "-C", root, "."], check=True)
    return made


def tree(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir() or path.is_symlink()}


@pytest.mark.parametrize("shell", ["sh", "dash", "bash"])
def test_a_whole_tarball_is_verified(baked: tuple[Path, Path, Path], tmp_path: Path, shell: str) -> None:
    done = run("verify", "--root", tmp_path, baked[1], shell=shell)
    assert done.returncode == 0, done.stderr
    assert "as it was baked for worker-1 (cluster ha)" in done.stdout
    assert tree(tmp_path) == set(), "checking must leave nothing behind"


def test_thin_needs_its_payload(baked: tuple[Path, Path, Path], tmp_path: Path) -> None:
    payload, _, thin = baked
    done = run("verify", "--root", tmp_path, thin)
    assert done.returncode == MISSING and "worker-amd64.tar.gz is missing" in done.stderr
    assert run("verify", "--root", tmp_path, thin, payload).returncode == 0
    medium = tmp_path / "medium"
    medium.mkdir()
    shutil.copy(thin, medium / "node.tar.gz")
    shutil.copy(payload, medium / payload.name)
    assert run("verify", "--root", tmp_path, medium).returncode == 0


def test_thin_takes_its_payload_from_a_server(tmp_path: Path) -> None:
    """Without a machine that it would be: a check, and files that are put in place below a folder."""
    with servers.serving() as server:
        cluster = samples.ha(payload_server=server.url)
        node = cluster.workers[0]._replace(media="thin")
        minted = artifacts.secrets(tmp_path, cluster)
        payload, thin = artifacts.bake(tmp_path, cluster, node, artifacts.Parts(tmp_path / "cache"), minted)
        server.answers[f"/{payload.name}"] = [servers.body(payload.read_bytes())]
        done = run("verify", "--root", tmp_path / "none", thin)
        assert done.returncode == 0 and f"fetching {server.url}/worker-amd64.tar.gz" in done.stdout, done.stderr
        medium, root = tmp_path / "medium", tmp_path / "root"
        medium.mkdir()
        root.mkdir()
        shutil.copy(thin, medium / "node.tar.gz")
        assert run("install", "--root", root, "--medium", medium).returncode == 0
        left = {path.name for path in (root / "var/lib/nodebake").iterdir()}
    assert left == {"etcd-of", "first-boot", "lock"}
    assert not list(Path(tempfile.gettempdir()).glob("staging.*.payload"))


def test_another_clusters_payload_is_refused(baked: tuple[Path, Path, Path], tmp_path: Path) -> None:
    cluster = samples.ha(name="other", dns_domain="other.local")
    minted = artifacts.secrets(tmp_path, cluster)
    parts = artifacts.Parts(tmp_path / "cache")
    payload, _ = artifacts.bake(tmp_path, cluster, cluster.workers[0], parts, minted)
    assert run("verify", "--root", tmp_path, baked[2], payload).returncode == FORGED


def test_install_puts_everything_in_place_and_can_be_repeated(baked: tuple[Path, Path, Path], tmp_path: Path) -> None:
    medium, root = tmp_path / "medium", tmp_path / "root"
    medium.mkdir()
    (root / "etc").mkdir(parents=True)
    (root / "etc").chmod(0o751)
    (root / "etc" / "mine").write_text("kept")
    shutil.copy(baked[1], medium / "node.tar.gz")
    for _ in range(2):
        done = run("install", "--root", root, "--medium", medium)
        assert done.returncode == 0, done.stderr
        assert os.access(root / "opt/nodebake/current/bin/kubelet", os.X_OK)
        assert (root / "etc/kubernetes/bootstrap-kubelet.conf").stat().st_mode & 0o777 == 0o600
        assert (root / "etc/systemd/system/multi-user.target.wants/kubelet.service").is_symlink()
        assert (root / "etc/mine").read_text() == "kept"
        assert (root / "etc").stat().st_mode & 0o777 == 0o751, "a folder of the system keeps its mode"
        left = {path.name for path in (root / "var/lib/nodebake").iterdir()}
        assert left == {"etcd-of", "first-boot", "lock"}, "put in place: the machine itself goes on"


@pytest.fixture
def installed(baked: tuple[Path, Path, Path], tmp_path: Path) -> Path:
    """A root with worker-1 in place, and a medium beside it that has its identity alone."""
    root, medium = tmp_path / "root", tmp_path / "medium"
    medium.mkdir()
    root.mkdir()
    shutil.copy(baked[1], medium / "node.tar.gz")
    assert run("install", "--root", root, "--medium", medium).returncode == 0
    shutil.copy(baked[2], medium / "node.tar.gz")
    return root


def entries(root: Path) -> dict[str, tuple[int, int, str]]:
    """Path -> inode, links, and where a link leads."""
    found = {name: root / name for name in tree(root) if not name.startswith("var/lib/nodebake/")}
    return {
        name: (path.lstat().st_ino, path.lstat().st_nlink, str(path.readlink()) if path.is_symlink() else "")
        for name, path in found.items()
    }


def test_an_identity_alone_is_enough_where_its_payload_is_in_place(installed: Path) -> None:
    """The payload stays where it is, byte and inode, but for its symbolic links."""
    before = entries(installed)
    done = run("install", "--root", installed, "--medium", installed.parent / "medium")
    assert done.returncode == 0 and "taking the payload that this machine has" in done.stdout, done.stderr
    after = entries(installed)
    assert {name: (links, to) for name, (_, links, to) in after.items()} == {
        name: (links, to) for name, (_, links, to) in before.items()
    }
    new = {name for name in after if after[name][0] != before[name][0]}
    own = run_tar_list(installed.parent / "medium" / "node.tar.gz")
    assert {name for name in new if not (installed / name).is_symlink()} == own
    assert set(new - own) == {name for name in after if (installed / name).is_symlink()}
    assert [path.name for path in (installed / "var/lib/nodebake").glob("staging*")] == []


def run_tar_list(tarball: Path) -> set[str]:
    """The files in a tarball."""
    listed = subprocess.run(["tar", "-tzf", tarball], capture_output=True, text=True, check=True).stdout.split()
    return {name for name in listed if not name.endswith("/")}


def test_where_nothing_can_be_linked_the_payload_is_copied(installed: Path, tmp_path: Path) -> None:
    """As in a check on another file system than the payload's."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "ln").symlink_to("/bin/false")
    text = PROGRAM.read_text().replace("PATH=", f"PATH={programs}:", 1)
    (tmp_path / "first-boot").write_text(text)
    command: list[str | Path] = [
        "sh",
        tmp_path / "first-boot",
        "verify",
        "--root",
        installed,
        installed.parent / "medium",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "every byte is as it was baked for worker-1" in done.stdout, done.stderr
    assert all(links == 1 for _, links, _ in entries(installed).values())


@pytest.mark.parametrize("change", ["a byte", "a mode", "gone", "a link"])
def test_a_payload_that_was_changed_on_the_machine_is_refused(installed: Path, change: str) -> None:
    config = installed / "etc/containerd/config.toml"
    if change == "a byte":
        config.write_text(config.read_text() + "#")
    elif change == "a mode":
        config.chmod(0o600)
    elif change == "gone":
        config.unlink()
    else:
        current = installed / "opt/nodebake/current"
        to = current.readlink()
        current.unlink()
        current.symlink_to(f"./{to}")
    before = entries(installed)
    done = run("install", "--root", installed, "--medium", installed.parent / "medium")
    assert done.returncode == DAMAGED and "take the node's whole artifact" in done.stderr, done.stdout + done.stderr
    assert ("opt/nodebake/current" if change == "a link" else "etc/containerd/config.toml") in done.stderr
    assert entries(installed) == before


def test_an_identity_alone_is_refused_where_another_payload_is_in_place(installed: Path) -> None:
    sums = installed / MANIFEST / "payload.SHA256SUMS"
    sums.write_text(sums.read_text() + "\n")
    done = run("install", "--root", installed, "--medium", installed.parent / "medium")
    assert done.returncode == MISSING and "this machine has none or another one" in done.stderr


def test_another_payload_that_lies_beside_it_is_passed_over(installed: Path, tmp_path: Path) -> None:
    """As on a volume of an earlier bake that was left in the drive."""
    cluster = samples.ha(dns_domain="other.local")
    minted = artifacts.secrets(tmp_path, cluster)
    payload, _ = artifacts.bake(tmp_path, cluster, cluster.workers[0], artifacts.Parts(tmp_path / "cache"), minted)
    medium = installed.parent / "medium"
    shutil.copy(payload, medium / "payload.tar.gz")
    done = run("install", "--root", installed, "--medium", medium)
    assert done.returncode == 0, done.stderr
    assert f"{medium}/payload.tar.gz is another payload" in done.stdout
    assert "taking the payload that this machine has" in done.stdout


def test_install_after_a_cut_goes_on(baked: tuple[Path, Path, Path], tmp_path: Path) -> None:
    medium, root = tmp_path / "medium", tmp_path / "root"
    medium.mkdir()
    shutil.copy(baked[1], medium / "node.tar.gz")
    (root / "var/lib/nodebake/staging.abc/etc").mkdir(parents=True)
    (root / f"{MANIFEST}").mkdir(parents=True)
    assert run("install", "--root", root, "--medium", medium).returncode == 0
    assert not (root / "var/lib/nodebake/staging.abc").exists()


def test_a_machine_keeps_to_its_clusters_key(baked: tuple[Path, Path, Path], tmp_path: Path) -> None:
    (tmp_path / MANIFEST).mkdir(parents=True)
    (tmp_path / MANIFEST / "signing.pub").write_text("another key")
    done = run("verify", "--root", tmp_path, baked[1])
    assert done.returncode == FORGED and "another cluster's key" in done.stderr


def change_byte(root: Path) -> None:
    (root / "etc/containerd/config.toml").write_text("changed")


def change_sums(root: Path) -> None:
    with (root / MANIFEST / "payload.SHA256SUMS").open("a") as file:
        file.write("")
    path = root / MANIFEST / "payload.SHA256SUMS"
    path.write_text(path.read_text().replace("a", "b", 1))


def change_signature(root: Path) -> None:
    path = root / MANIFEST / "node.SHA256SUMS.sig"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")


def change_mode(root: Path) -> None:
    (root / "opt/nodebake/first-boot").chmod(0o4755)


def change_link(root: Path) -> None:
    (root / "opt/nodebake/current").unlink()
    (root / "opt/nodebake/current").symlink_to("/tmp")  # noqa: S108


def add_file(root: Path) -> None:
    (root / "etc/more").write_text("more")


def remove_file(root: Path) -> None:
    (root / "etc/containerd/config.toml").unlink()


def open_folder(root: Path) -> None:
    (root / "etc/kubernetes").chmod(0o777)


def add_folder(root: Path) -> None:
    (root / "etc/kubernetes/more").mkdir()


def remove_identity(root: Path) -> None:
    for path in (root / MANIFEST).glob("node.*"):
        path.unlink()


CHANGES: dict[Callable[[Path], None], int] = {
    change_byte: DAMAGED,
    change_sums: FORGED,
    change_signature: FORGED,
    change_mode: DAMAGED,
    change_link: DAMAGED,
    add_file: DAMAGED,
    remove_file: DAMAGED,
    remove_identity: DAMAGED,
    open_folder: DAMAGED,
    add_folder: DAMAGED,
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_any_change_is_refused_before_anything_is_touched(
    baked: tuple[Path, Path, Path], tmp_path: Path, change: Callable[[Path], None]
) -> None:
    medium, root = tmp_path / "medium", tmp_path / "root"
    medium.mkdir()
    rebuilt(baked[1], medium, change)
    done = run("install", "--root", root, "--medium", medium)
    assert done.returncode == CHANGES[change], done.stdout + done.stderr
    assert "->" in done.stderr, "an error says what to do"
    assert tree(root) == {"var/lib/nodebake/lock"}


def test_an_unchanged_tarball_packed_anew_is_accepted(baked: tuple[Path, Path, Path], tmp_path: Path) -> None:
    made = rebuilt(baked[1], tmp_path, lambda root: None)
    assert run("verify", "--root", tmp_path / "root", made).returncode == 0


def test_a_cut_tarball_is_refused(baked: tuple[Path, Path, Path], tmp_path: Path) -> None:
    half = tmp_path / "node.tar.gz"
    half.write_bytes(baked[1].read_bytes()[:-100])
    assert run("verify", "--root", tmp_path, half).returncode == DAMAGED


def test_what_is_no_artifact_is_refused(tmp_path: Path) -> None:
    archive.write_node([File("/etc/x", data=b"x")], tmp_path / "x.tar.gz", mtime=0)
    assert run("verify", "--root", tmp_path, tmp_path / "x.tar.gz").returncode == DAMAGED
    assert run("verify", "--root", tmp_path, tmp_path / "gone.tar.gz").returncode == MISSING


@pytest.mark.parametrize("arguments", [(), ("help",), ("verify",), ("verify", "--unknown"), ("install", "more")])
def test_wrong_usage_is_told(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = run(*arguments[:1], *(("--root", tmp_path) if arguments else ()), *arguments[1:])
    assert done.returncode == USAGE and "first-boot verify" in done.stderr
