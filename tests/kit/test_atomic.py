"""Files that are there whole or not at all, and what is kept of the file that was there before."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.kit import atomic
from recipes.kit.errors import BakeError

OLD, NEW = b"old " * 10, b"new"


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in a folder of its own that is large enough to be kept."""
    monkeypatch.setattr(atomic, "WORTH_KEEPING", len(OLD))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_bytes(OLD)
    return tmp_path / "out" / "file"


def kept(target: Path) -> bytes:
    """What replacing() gave to keep while it put NEW in the target's place."""
    with atomic.replacing(target, keep=True) as out:
        found = out.read()
        out.seek(0)
        out.write(NEW)
        out.truncate()
    assert target.read_bytes() == NEW
    assert target.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    return found


def test_a_large_file_is_kept_and_has_no_name_meanwhile(target: Path) -> None:
    before = target.stat().st_ino
    with atomic.replacing(target, keep=True) as out:
        assert not target.exists()
        assert out.read() == OLD
    assert target.read_bytes() == OLD and target.stat().st_ino == before
    assert kept(target) == OLD
    assert target.stat().st_ino == before


def test_without_being_asked_nothing_is_kept(target: Path) -> None:
    with atomic.replacing(target) as out:
        assert target.read_bytes() == OLD and out.read() == b""


def test_a_small_file_is_written_anew(target: Path) -> None:
    target.write_bytes(OLD[1:])
    assert kept(target) == b""


def test_a_copy_made_of_hard_links_stays_as_it_is(target: Path, tmp_path: Path) -> None:
    os.link(target, tmp_path / "copy")
    assert kept(target) == b""
    assert (tmp_path / "copy").read_bytes() == OLD


def test_what_a_link_points_at_stays_as_it_is(target: Path, tmp_path: Path) -> None:
    target.rename(tmp_path / "elsewhere")
    target.symlink_to(tmp_path / "elsewhere")
    assert kept(target) == b""
    assert (tmp_path / "elsewhere").read_bytes() == OLD and not target.is_symlink()


def test_whoever_has_it_open_sees_no_change(target: Path) -> None:
    reader = subprocess.Popen(
        ["sh", "-c", 'exec 3<"$1"; echo; read go; cat <&3', "sh", target],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert reader.stdout is not None and reader.stdout.readline() == b"\n"
    assert kept(target) == b""
    seen, _ = reader.communicate(b"\n", timeout=60)
    assert seen == OLD


def test_where_there_are_no_leases_it_is_written_anew(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError("not here")

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    assert kept(target) == b""


def test_an_error_leaves_nothing_that_was_changed(target: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic.replacing(target, keep=True) as out:
        out.write(NEW)
        raise KeyboardInterrupt
    assert list(target.parent.iterdir()) == []


def test_killed_while_it_changes_it_has_no_name(target: Path) -> None:
    program = """
import os, signal, sys
from pathlib import Path
from recipes.kit import atomic
from recipes.kit.errors import BakeError
atomic.WORTH_KEEPING = 1
with atomic.replacing(Path(sys.argv[1]), keep=True) as out:
    out.write(b"new")
    out.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program, target])
    assert done.returncode == -signal.SIGKILL
    assert not target.exists()
    [left] = target.parent.iterdir()
    assert left.name.startswith(".file.") and left.read_bytes() == NEW + OLD[3:]


def test_a_full_disk_is_told_and_what_was_there_stays(tmp_path: Path) -> None:
    """On a small disk of its own, which a namespace of its own lets one mount without root."""
    script = """
import sys
from pathlib import Path
from recipes.kit import atomic
from recipes.kit.errors import BakeError
from recipes.kit.errors import BakeError
target = Path(sys.argv[1]) / "f"
atomic.write(target, b"before")
try:
    atomic.write(target, bytes(1 << 20))
except BakeError as error:
    print(error, [path.name for path in target.parent.iterdir()], target.read_bytes())
"""
    mounted = 'mount -t tmpfs -o size=256k tmpfs "$1" && exec "$2" -c "$3" "$1"'
    own = ["unshare", "--map-root-user", "--mount", "sh", "-c", mounted]
    command = [*own, "sh", str(tmp_path), sys.executable, script]
    done = subprocess.run(command, capture_output=True, text=True)
    if "unshare:" in done.stderr:
        pytest.skip(f"this desk does not let a process have a namespace of its own: {done.stderr}")
    assert done.stdout == f"{tmp_path}: the disk is full\n  -> make room, then run again ['f'] b'before'\n", done.stderr


def test_a_folder_of_somebody_elses_is_told(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        command = ["chattr", "+i", str(tmp_path)]  # nobody may write there, not even root
        if subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("this file system cannot keep root from writing")
    else:
        tmp_path.chmod(0o500)
    try:
        with pytest.raises(BakeError, match="may not write here"):
            atomic.write(tmp_path / "sub" / "f", b"")
    finally:
        if os.geteuid() == 0:
            subprocess.run(["chattr", "-i", tmp_path], check=True)
        tmp_path.chmod(0o700)
