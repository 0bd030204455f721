"""The encrypted secret store: the same secrets, for those who have the key; nothing is lost, nothing is left behind."""

from __future__ import annotations

import io
import itertools
import os
import pty
import signal
import subprocess
import sys
import tarfile
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import pyrage
import pytest

from recipes.kit import store, vault
from recipes.kit.errors import BakeError
from recipes.kit.vault import ENCRYPTED, Key
from tests import samples
from tests.kit.test_store import with_new_machines

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
CLUSTER = samples.single()
LARGER = with_new_machines(CLUSTER)
ROOT = Path(__file__).parents[2]
OPEN = {".gitignore", "choices.json", "generation.json", "members.json"}  # what is never encrypted


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A store that was minted, with what lies beside the secrets."""
    where = tmp_path / "single.yaml.secrets"
    store.open(where, CLUSTER, now=NOW)
    for name in OPEN - {".gitignore"}:
        (where / name).write_text("{}\n")
        (where / name).chmod(0o600)
    return where


@pytest.fixture
def identity(tmp_path: Path) -> Path:
    return key_file(
        tmp_path / "identity", f"# created: today\n# public key: age1\n{pyrage.x25519.Identity.generate()}\n"
    )


def key_file(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


def files(directory: Path) -> dict[str, bytes]:
    found = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name != ".lock"}


def refused(action: Callable[[], object], *says: str) -> str:
    with pytest.raises(BakeError) as caught:
        action()
    told = "".join(traceback.format_exception(caught.value))
    assert all(part in str(caught.value) for part in says), str(caught.value)
    return told


def test_what_is_encrypted_opens_by_the_key_alone_and_comes_back_as_it_was(directory: Path, identity: Path) -> None:
    before, secrets = files(directory), store.open(directory, CLUSTER, now=NOW)
    vault.encrypt(directory, Key(identity), [])
    assert set(files(directory)) == {*OPEN, ENCRYPTED}
    assert (directory / ENCRYPTED).stat().st_mode & 0o777 == 0o600
    assert store.open(directory, CLUSTER, now=NOW, key=Key(identity)) == secrets
    assert store.is_minted(directory)
    stranger = key_file(directory.with_name("stranger"), f"{pyrage.x25519.Identity.generate()}\n")
    refused(lambda: store.open(directory, CLUSTER, now=NOW, key=Key(stranger)), "does not open the secret store")
    refused(lambda: store.open(directory, CLUSTER, now=NOW), "encrypted for a key", "key=FILE")
    refused(lambda: vault.decrypt(directory, Key(stranger)), "does not open the secret store")
    vault.decrypt(directory, Key(identity))
    assert files(directory) == before
    refused(lambda: vault.decrypt(directory, Key(identity)), "not encrypted")


def test_nothing_that_is_secret_can_be_read(directory: Path, identity: Path) -> None:
    before = files(directory)
    vault.encrypt(directory, Key(identity), [])
    data = (directory / ENCRYPTED).read_bytes()
    for name, held in before.items():
        if name not in OPEN:
            assert not any(line in data for line in held.splitlines() if len(line) > 20), name
    assert data.startswith(b"age-encryption.org/v1\n-> X25519 ")


def test_a_new_machine_is_minted_into_it(directory: Path, identity: Path) -> None:
    first = store.open(directory, CLUSTER, now=NOW)
    vault.encrypt(directory, Key(identity), [])
    before = (directory / ENCRYPTED).read_bytes()
    assert store.open(directory, CLUSTER, now=NOW, key=Key(identity)) == first
    looked = store.open(directory, LARGER, now=NOW, mint=False, key=Key(identity))
    assert looked.tokens == first.tokens
    assert (directory / ENCRYPTED).read_bytes() == before, "nothing was minted"
    second = store.open(directory, LARGER, now=NOW, key=Key(identity))
    assert second.tokens.items() > first.tokens.items()
    assert replace(second, tokens=first.tokens, leaf_keys=first.leaf_keys) == first
    assert store.open(directory, LARGER, now=NOW, key=Key(identity)) == second
    assert set(files(directory)) == {*OPEN, ENCRYPTED}


def test_it_may_be_encrypted_from_the_beginning(tmp_path: Path, identity: Path) -> None:
    directory = tmp_path / "new"
    vault.encrypt(directory, Key(identity), [])
    secrets = store.open(directory, CLUSTER, now=NOW, key=Key(identity))
    assert store.open(directory, CLUSTER, now=NOW, key=Key(identity)) == secrets
    assert set(files(directory)) == {".gitignore", ENCRYPTED}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that takes age a second on purpose, for each try at a passphrase, is left out."""

    def sealed(data: bytes, passphrase: str) -> bytes:
        return b"age-encryption.org/v1\n-> scrypt " + passphrase.encode() + b"\n" + data

    def opened(data: bytes, passphrase: str) -> bytes:
        head = sealed(b"", passphrase)
        if not data.startswith(head):
            raise pyrage.DecryptError("Decryption failed")
        return data.removeprefix(head)

    monkeypatch.setattr(pyrage.passphrase, "encrypt", sealed)
    monkeypatch.setattr(pyrage.passphrase, "decrypt", opened)


def test_a_passphrase_may_lie_in_a_file(directory: Path, tmp_path: Path) -> None:
    """With age's own work, once."""
    secrets = store.open(directory, CLUSTER, now=NOW)
    right = key_file(tmp_path / "right", "correct horse\r\nanother line\n")
    vault.encrypt(directory, Key(right), [])
    assert (directory / ENCRYPTED).read_bytes().startswith(b"age-encryption.org/v1\n-> scrypt ")
    assert store.open(directory, CLUSTER, now=NOW, key=Key(right)) == secrets
    wrong = key_file(tmp_path / "wrong", "battery staple\n")
    told = refused(lambda: store.open(directory, CLUSTER, now=NOW, key=Key(wrong)), "this passphrase does not open")
    assert "battery" not in told


@pytest.mark.usefixtures("quick")
def test_whoever_has_another_key_now(directory: Path, identity: Path, tmp_path: Path) -> None:
    """Encrypted anew for others, for a pair of SSH keys, and back for a passphrase."""
    secrets = store.open(directory, CLUSTER, now=NOW)
    passphrase = key_file(tmp_path / "passphrase", "correct horse\n")
    vault.encrypt(directory, Key(passphrase), [])
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "ssh"], check=True)
    own = pyrage.x25519.Identity.generate()
    listed = tmp_path / "recipients"
    listed.write_text(f"# us\n{own.to_public()}\n\n{(tmp_path / 'ssh.pub').read_text()}")
    other = pyrage.x25519.Identity.from_str(identity.read_text().splitlines()[-1]).to_public()
    vault.encrypt(directory, Key(passphrase), [str(listed), str(other)])
    for key in (tmp_path / "ssh", key_file(tmp_path / "own", str(own)), identity):
        assert store.open(directory, CLUSTER, now=NOW, key=Key(key)) == secrets
    store.open(directory, LARGER, now=NOW, key=Key(tmp_path / "ssh"))
    assert store.open(directory, LARGER, now=NOW, key=Key(identity)).tokens.items() > secrets.tokens.items()
    refused(lambda: store.open(directory, CLUSTER, now=NOW, key=Key(passphrase)), "no key that can be used")
    vault.decrypt(directory, Key(identity))
    assert "age-recipients" not in files(directory)
    refused(lambda: vault.encrypt(directory, Key(tmp_path / "ssh"), []), "doit encrypt", "ssh.pub")


@pytest.mark.parametrize(
    "text", ["", "# only a remark\n", "age1nonsense\n", "ssh-ed25519 AAAA\n", "AGE-SECRET-KEY-1ABC\n"]
)
def test_what_is_no_recipient_is_told_and_never_shown(directory: Path, tmp_path: Path, text: str) -> None:
    before = files(directory)
    listed = tmp_path / "recipients"
    listed.write_text(text)
    told = refused(lambda: vault.encrypt(directory, Key(), [str(listed)]), str(listed), "recipient")
    assert "SECRET-KEY-1ABC" not in told
    assert files(directory) == before
    refused(lambda: vault.encrypt(directory, Key(), [str(tmp_path / "gone")]), "No such file")
    refused(lambda: vault.encrypt(directory, Key(), ["age1nonsense"]), "age1nonsense", "no recipient")


def test_a_key_that_cannot_be_used_is_told(directory: Path, identity: Path, tmp_path: Path) -> None:
    vault.encrypt(directory, Key(identity), [])
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", tmp_path / "ssh"], check=True)
    broken = key_file(tmp_path / "broken", "AGE-SECRET-KEY-1ABCDEF\n")
    for path in (tmp_path / "ssh", broken):
        told = refused(partial(vault.decrypt, directory, Key(path)), str(path), "no key that can be used")
        assert "SECRET-KEY-1ABC" not in told
    refused(lambda: vault.decrypt(directory, Key(tmp_path / "gone")), "cannot be read: No such file")
    identity.chmod(0o640)
    refused(lambda: vault.decrypt(directory, Key(identity)), "others on this computer may read the key", "chmod go=")


def test_it_is_refused_when_others_may_read_or_damage_it(directory: Path, identity: Path) -> None:
    vault.encrypt(directory, Key(identity), [])
    path = directory / ENCRYPTED
    path.chmod(0o644)
    refused(lambda: store.open(directory, CLUSTER, now=NOW, key=Key(identity)), "others on this computer may read")
    path.chmod(0o600)
    whole = path.read_bytes()
    for place in (30, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        refused(lambda: store.open(directory, CLUSTER, now=NOW, key=Key(identity)), "or the file is damaged")
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        refused(lambda: store.open(directory, CLUSTER, now=NOW, key=Key(identity)), "or the file is damaged")


def test_other_secrets_beside_it_are_not_taken_for_what_was_left(directory: Path, identity: Path) -> None:
    """Somebody put a backup of the plain store, older or newer, where the encrypted one is: neither may be lost."""
    store.open(directory, LARGER, now=NOW)
    newer = (directory / "tokens.json").read_bytes()
    vault.encrypt(directory, Key(identity), [])
    (directory / "tokens.json").write_bytes(newer.replace(b"only", b"onlx"))
    (directory / "tokens.json").chmod(0o600)
    before = files(directory)
    for action in (
        lambda: store.open(directory, CLUSTER, now=NOW, key=Key(identity)),
        lambda: vault.encrypt(directory, Key(identity), []),
        lambda: vault.decrypt(directory, Key(identity)),
    ):
        refused(action, "tokens.json lies in the secret store unencrypted")
    assert files(directory) == before


def killed_after(steps: int, action: Callable[[], object]) -> bool:
    """Do it in a child that SIGKILL ends at a step; whether it got that far. Steps: syncs, renames, removals."""
    child = os.fork()
    if child == 0:  # no test runner's code may run in here
        try:
            count = itertools.count()

            def step(*words: Any, real: Callable[..., object] = lambda _: None, **more: Any) -> object:
                if next(count) == steps:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*words, **more)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "fsync", step)
                for name in ("unlink", "rename", "replace", "rmdir"):
                    patch.setattr(Path, name, partialmethod(step, real=getattr(Path, name)))
                action()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("what", ["encrypt", "decrypt", "mint"])
def test_whatever_is_killed_anywhere_loses_nothing(
    tmp_path: Path, identity: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    key = Key(identity)
    action: dict[str, Callable[[Path], object]] = {
        "encrypt": lambda directory: vault.encrypt(directory, key, []),
        "decrypt": lambda directory: vault.decrypt(directory, key),
        "mint": lambda directory: store.open(directory, LARGER, now=NOW, key=key),
    }
    for steps in itertools.count():
        directory = tmp_path / f"{steps}"
        first = store.open(directory, CLUSTER, now=NOW)
        if what != "encrypt":
            vault.encrypt(directory, key, [])
        killed = killed_after(steps, partial(action[what], directory))
        assert store.open(directory, CLUSTER, now=NOW, key=key).tokens.items() >= first.tokens.items()
        left = {name for name in files(directory) if not name.startswith(".")} - OPEN
        assert left == {ENCRYPTED} or ENCRYPTED not in left, "no plain file stays beside the encrypted ones"
        if not killed:
            break
    assert steps > 3


def test_without_nodebake_a_tarball_comes_out(directory: Path, identity: Path) -> None:
    before = files(directory)
    vault.encrypt(directory, Key(identity), [])
    own = pyrage.x25519.Identity.from_str(identity.read_text().splitlines()[-1])
    with tarfile.open(fileobj=io.BytesIO(pyrage.decrypt((directory / ENCRYPTED).read_bytes(), [own]))) as tar:
        held = {info.name: stream.read() for info in tar if (stream := tar.extractfile(info)) is not None}
    recipient = held.pop("age-recipients")
    assert recipient.decode().strip() == str(own.to_public())
    assert held == {name: data for name, data in before.items() if name not in OPEN}


# ---- the terminal ---------------------------------------------------------------------------------------------------

PROGRAM = """\
import sys; from pathlib import Path; from datetime import datetime
from recipes.kit import store, vault; from recipes.kit.errors import BakeError; from tests import samples
import pyrage
pyrage.passphrase.encrypt = lambda data, word: b"age-encryption.org/v1\\n-> scrypt " + word.encode() + b"\\n" + data
pyrage.passphrase.decrypt = lambda data, word: data.split(b"\\n", 2)[2]
directory, key = Path(sys.argv[1]), vault.Key()
try:
    if sys.argv[2] == "encrypt":
        vault.encrypt(directory, key, [])
    for _ in range(3):
        store.open(directory, samples.single(), now=datetime.fromisoformat("2026-11-23T12:00:00+00:00"), key=key)
    print("opened")
except BakeError as error:
    print(error)
"""


def typed(directory: Path, command: str, *lines: str) -> str:
    """What a terminal shows when these lines are typed, each at a question."""
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # heard, even where pytest ignores it
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", PROGRAM, str(directory), command])  # noqa: S606
    told = b""
    waiting = list(lines)
    while True:
        try:
            told += os.read(terminal, 4096)
        except OSError:  # it has ended
            break
        if waiting and told.count(b": ") > len(lines) - len(waiting):
            os.write(terminal, waiting.pop(0).encode() + b"\n")
    os.waitpid(child, 0)
    os.close(terminal)
    return told.decode()


def test_the_terminal_is_asked_once_and_shows_nothing(directory: Path) -> None:
    told = typed(directory, "encrypt", "correct horse", "correct horse")
    assert told.count("passphrase of") == 1 and told.count("Once more") == 1 and "opened" in told
    assert "horse" not in told
    told = typed(directory, "open", "correct horse")
    assert told.count("Passphrase of") == 1 and "opened" in told and "horse" not in told


def test_two_passphrases_that_differ_change_nothing(directory: Path) -> None:
    before = files(directory)
    assert "differ" in typed(directory, "encrypt", "correct horse", "battery staple")
    assert "empty" in typed(directory, "encrypt", "", "")
    assert "no passphrase was given" in typed(directory, "encrypt", "\x04")
    assert "no passphrase was given" in typed(directory, "encrypt", "correct horse", "\x03")
    assert files(directory) == before


def test_without_a_terminal_it_says_what_to_do(directory: Path) -> None:
    command = ["setsid", sys.executable, "-c", PROGRAM, str(directory), "encrypt"]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert "without a terminal" in done.stdout and "key=FILE" in done.stdout, done.stdout + done.stderr
