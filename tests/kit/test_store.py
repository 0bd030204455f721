"""The secret store: minted once, whole or not at all, private, and never minted anew in silence."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from recipes.kit import pki, store, vault
from recipes.kit.errors import BakeError
from recipes.kit.model import Cluster
from recipes.kit.profiles import DESK, PROFILES
from tests import samples

NOW = datetime(2026, 11, 23, 12, 0, 0, 250, tzinfo=UTC)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "ha.yaml.secrets"


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def with_new_machines(cluster: Cluster) -> Cluster:
    plane = samples.node("ca", "control-plane", 14, runs_etcd=True)  # the name of a folder in the store, too
    return replace(cluster, nodes=(*cluster.nodes, plane, samples.node("worker-4", "worker", 24)))


def test_the_store_lies_beside_the_cluster_file() -> None:
    assert store.default_directory(Path("/desk/ha.yaml")) == Path("/desk/ha.yaml.secrets")


def test_everything_that_the_cluster_needs_is_minted(directory: Path) -> None:
    secrets = store.open(directory, samples.ha(), now=NOW)
    assert secrets.minted == NOW.replace(microsecond=0)
    assert secrets.install_by == secrets.minted + timedelta(days=90)
    assert set(secrets.authorities) == {"kubernetes", "kubelet-serving", "etcd", "front-proxy"}
    owners = {"control-1", "control-2", "control-3"}
    wanted = {(owner, spec.name) for owner in owners for spec in PROFILES if spec.name != "admin"} | {(DESK, "admin")}
    assert set(secrets.leaf_keys) == wanted
    assert len(set(secrets.leaf_keys.values())) == len(wanted)
    assert len(secrets.encryption_keys[1]) == len(secrets.serial_seed) == 32
    assert set(secrets.tokens) == {*owners, "worker-1", "worker-2", "worker-3"}
    assert secrets.ssh_host_keys == {}
    assert pki.public_pem(secrets.service_account.private_pem) == secrets.service_account.public_pem


def test_tokens_have_the_form_that_kubernetes_wants_and_are_unique(directory: Path) -> None:
    workers = tuple(samples.node(f"worker-{i}", "worker", 1) for i in range(2000))
    secrets = store.open(directory, samples.ha(nodes=(*samples.ha().control_planes, *workers)), now=NOW)
    assert all(re.fullmatch(r"[a-z0-9]{6}\.[a-z0-9]{16}", token.bearer) for token in secrets.tokens.values())
    assert len({token.id for token in secrets.tokens.values()}) == 2003
    assert len({token.secret for token in secrets.tokens.values()}) == 2003
    assert len({*"".join(token.secret for token in secrets.tokens.values())}) == 36


def test_opening_again_mints_nothing(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = store.open(directory, samples.ha(), now=NOW)
    before = contents(directory)
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert store.open(directory, samples.ha(), now=NOW + timedelta(days=30)) == first
    assert contents(directory) == before


def test_new_machines_get_theirs_and_the_rest_stays(directory: Path) -> None:
    first = store.open(directory, samples.ha(), now=NOW)
    second = store.open(directory, with_new_machines(samples.ha()), now=NOW + timedelta(days=1))
    assert second.tokens.items() > first.tokens.items()
    assert second.tokens.keys() - first.tokens.keys() == {"ca", "worker-4"}
    assert second.leaf_keys.items() > first.leaf_keys.items()
    assert replace(second, tokens=first.tokens, leaf_keys=first.leaf_keys, later={}) == first
    # What is new begins when it was minted.
    begun = first.minted + timedelta(days=1)
    assert set(second.later) == {"ca", "worker-4"}
    assert second.life("worker-4") == (begun, begun + timedelta(days=90))
    assert second.life("worker-1") == (first.minted, first.install_by)
    # A machine that leaves and returns is the same machine.
    store.open(directory, samples.ha(), now=NOW)
    assert store.open(directory, with_new_machines(samples.ha()), now=NOW + timedelta(days=2)) == second


def test_it_is_private_whatever_the_umask(directory: Path) -> None:
    for umask in (0o000, 0o177):
        where = directory.with_name(f"{umask}")
        old = os.umask(umask)
        try:
            store.open(where, samples.single(), now=NOW)
        finally:
            os.umask(old)
        for path in (where, *where.rglob("*")):
            assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_git_ignores_it(directory: Path) -> None:
    git = ["git", "-C", str(directory.parent)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    store.open(directory, samples.single(), now=NOW)
    status = subprocess.run([*git, "status", "--porcelain"], check=True, capture_output=True)
    assert status.stdout == b""


@pytest.mark.parametrize("name", [".", "ca/etcd.key", "tokens.json", "keys/control-2/etcd-peer.key", "cluster.json"])
@pytest.mark.parametrize("mode", [0o040, 0o004, 0o010])
def test_it_is_refused_when_others_may_read_it(directory: Path, name: str, mode: int) -> None:
    store.open(directory, samples.ha(), now=NOW)
    path = directory / name
    path.chmod(path.stat().st_mode | mode)
    with pytest.raises(BakeError, match="others") as caught:
        store.open(directory, samples.ha(), now=NOW)
    assert f"chmod -R go= {directory}" in str(caught.value.remedy)
    subprocess.run(["chmod", "-R", "go=", str(directory)], check=True)
    store.open(directory, samples.ha(), now=NOW)


def test_it_is_refused_when_someone_else_owns_it(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.open(directory, samples.ha(), now=NOW)
    monkeypatch.setattr(os, "geteuid", lambda: directory.stat().st_uid + 1)
    with pytest.raises(BakeError, match="belongs to user"):
        store.open(directory, samples.ha(), now=NOW)


def test_root_opens_what_the_person_has_who_called_sudo(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.open(directory, samples.ha(), now=NOW)
    person = os.stat_result((0o040700, 0, 0, 1, 4711, 4711, 0, 0, 0, 0))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("SUDO_UID", "4711")
    vault._private(person, directory, directory)
    monkeypatch.setenv("SUDO_UID", "4712")
    with pytest.raises(BakeError, match="belongs to user 4711"):
        vault._private(person, directory, directory)


def minted_files() -> list[str]:
    """One file of each kind."""
    return [
        *(f"ca/{name}.{half}" for name in ("kubernetes", "etcd") for half in ("crt", "key")),
        "keys/control-1/kube-apiserver.key",
        "keys/_desk/admin.key",
        "service-account.key",
        "service-account.pub",
        "signing.key",
        "signing.pub",
        "encryption.key",
        "serial.seed",
        "tokens.json",
        "cluster.json",
    ]


@pytest.mark.parametrize("name", minted_files())
def test_a_missing_half_is_an_error(directory: Path, name: str) -> None:
    store.open(directory, samples.ha(), now=NOW)
    (directory / name).unlink()
    before = contents(directory)
    with pytest.raises(BakeError, match=f"{name} in the secret store is missing") as caught:
        store.open(directory, samples.ha(), now=NOW)
    assert "backup" in str(caught.value.remedy)
    assert "strangers" in str(caught.value.remedy)
    assert contents(directory) == before


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    """One bit of the fortieth byte: in a key's or certificate's payload."""
    at = min(40, len(data) // 2)
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize("name", minted_files())
@pytest.mark.parametrize("damage", [cut, flip, lambda data: b""])
def test_a_damaged_half_is_an_error(directory: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    store.open(directory, samples.ha(), now=NOW)
    path = directory / name
    path.write_bytes(damage(path.read_bytes()))
    before = contents(directory)
    with pytest.raises(BakeError, match=f"{name} in the secret store is damaged"):
        store.open(directory, samples.ha(), now=NOW)
    assert contents(directory) == before


def test_a_half_of_another_cluster_is_an_error(directory: Path) -> None:
    store.open(directory, samples.ha(), now=NOW)
    other = directory.with_name("other")
    store.open(other, samples.ha(), now=NOW)
    (directory / "ca/etcd.crt").write_bytes((other / "ca/etcd.crt").read_bytes())
    with pytest.raises(BakeError, match=r"ca/etcd\.crt .* damaged"):
        store.open(directory, samples.ha(), now=NOW)


def test_a_token_written_by_hand_is_an_error(directory: Path) -> None:
    token = store.open(directory, samples.ha(), now=NOW).tokens["worker-1"]
    path = directory / "tokens.json"
    path.write_text(path.read_text().replace(token.bearer, "abcdef.0123456789abcdef"))
    with pytest.raises(BakeError, match=r"tokens\.json in the secret store is damaged"):
        store.open(directory, samples.ha(), now=NOW)


def test_a_journal_written_by_hand_is_an_error(directory: Path) -> None:
    store.open(directory, samples.single(), now=NOW)
    before = contents(directory)
    for text in ("", "{}", '{"sha256": "", "content": {"tokens.json": ""}}'):
        (directory / "journal").write_text(text)
        (directory / "journal").chmod(0o600)
        with pytest.raises(BakeError, match="journal in the secret store is damaged"):
            store.open(directory, samples.single(), now=NOW)
    (directory / "journal").unlink()
    assert contents(directory) == before


def test_another_clusters_store_is_refused(directory: Path) -> None:
    store.open(directory, samples.ha(), now=NOW)
    with pytest.raises(BakeError, match=r"belongs to the cluster 'ha'.*describes 'single'"):
        store.open(directory, samples.single(), now=NOW)


def test_another_key_type_is_told(directory: Path) -> None:
    store.open(directory, samples.ha(), now=NOW)
    with pytest.raises(BakeError, match="minted as ecdsa-p256, the cluster file now says ecdsa-p384"):
        store.open(directory, samples.ha(key_type="ecdsa-p384"), now=NOW)


def test_install_by_follows_the_file_and_the_time_of_minting(directory: Path) -> None:
    store.open(directory, samples.ha(), now=NOW)
    later = NOW + timedelta(days=5)
    longer = store.open(directory, samples.ha(install_by=timedelta(days=200)), now=later)
    assert longer.install_by == datetime(2027, 6, 11, 12, 0, tzinfo=UTC)
    dated = store.open(directory, samples.ha(install_by=datetime(2028, 1, 1, tzinfo=UTC)), now=later)
    assert dated.install_by == datetime(2028, 1, 1, tzinfo=UTC)


def test_a_past_install_by_is_refused_where_nothing_was_minted(directory: Path) -> None:
    with pytest.raises(BakeError, match="2026-11-23T12:00:00") as caught:
        store.open(directory, samples.ha(install_by=NOW), now=NOW)
    assert "2027-02-21" in str(caught.value.remedy)
    assert not any(path.suffix == ".key" for path in directory.rglob("*"))
    minted = store.open(directory, samples.ha(), now=NOW)
    assert store.open(directory, samples.ha(), now=NOW + timedelta(days=91)) == minted


def test_certificates_that_ran_out_are_refused(directory: Path) -> None:
    cluster = samples.ha(install_by=datetime(2050, 1, 1, tzinfo=UTC))
    store.open(directory, cluster, now=NOW)
    ended = r"baked certificates of control-1, control-2, control-3, admin\.conf ended on 2029-11-23"
    with pytest.raises(BakeError, match=ended) as caught:
        store.open(directory, cluster, now=NOW + timedelta(days=1096))
    assert caught.value.remedy == "doit rekey control-1 control-2 control-3 admin.conf"
    with pytest.raises(BakeError, match="authorities of this cluster ended on 2036-11-22"):
        store.open(directory, cluster, now=NOW + timedelta(days=3652))


def test_ssh_host_keys_are_minted_by_choice_and_once(directory: Path) -> None:
    store.open(directory, samples.ha(), now=NOW)
    assert not (directory / "ssh-host-keys.json").exists()
    cluster = samples.ha(bake_ssh_host_keys=True)
    keys = store.open(directory, cluster, now=NOW).ssh_host_keys
    assert set(keys) == {node.name for node in cluster.nodes}
    assert store.open(directory, cluster, now=NOW).ssh_host_keys == keys
    private = directory / "key"
    private.write_bytes(keys["worker-1"].private)
    private.chmod(0o600)
    shown = subprocess.run(["ssh-keygen", "-y", "-f", str(private)], check=True, capture_output=True, text=True)
    assert keys["worker-1"].public.split()[:2] == shown.stdout.split()[:2]
    assert keys["worker-1"].public.endswith(" root@worker-1")


def test_encryption_keys_are_minted_by_number_and_stay(directory: Path) -> None:
    def keys(*numbers: int) -> Mapping[int, bytes]:
        return store.open(directory, replace(samples.ha(), encryption_keys=numbers), now=NOW).encryption_keys

    [first] = keys(1).values()
    both = keys(2, 1)
    assert both[1] == first != both[2] and len(both[2]) == 32
    assert keys(2) == both, "for backups of what the old one wrote"
    (directory / "encryption-2.key").unlink()
    with pytest.raises(BakeError, match=r"encryption-2\.key in the secret store is missing"):
        keys(2)


def test_openssl_verifies_what_was_signed(directory: Path, tmp_path: Path) -> None:
    secrets = store.open(directory, samples.ha(key_type="ecdsa-p384"), now=NOW)
    data, signature, public = (tmp_path / name for name in ("data", "signature", "public"))
    data.write_bytes(b"what was baked")
    signature.write_bytes(store.sign(secrets, b"what was baked"))
    public.write_bytes(secrets.signing.public_pem)
    assert store.sign(secrets, b"what was baked") == signature.read_bytes()
    command = ["openssl", "dgst", "-sha256", "-verify", str(public), "-signature", str(signature), str(data)]
    assert subprocess.run(command, capture_output=True).returncode == 0
    data.write_bytes(b"what was tampered with")
    assert subprocess.run(command, capture_output=True).returncode != 0
    der = subprocess.run(
        ["openssl", "pkey", "-pubin", "-in", str(public), "-outform", "DER"], check=True, capture_output=True
    )
    assert store.fingerprint(secrets) == hashlib.sha256(der.stdout).hexdigest()


def test_no_repr_shows_a_secret(directory: Path) -> None:
    secrets = store.open(directory, samples.ha(bake_ssh_host_keys=True), now=NOW)
    parts = [secrets, secrets.service_account, secrets.signing, dict(secrets.authorities), dict(secrets.tokens)]
    shown = "".join(f"{part!r}{part}" for part in [*parts, dict(secrets.ssh_host_keys)])
    assert "PRIVATE" not in shown
    assert str(secrets.encryption_keys[1]) not in shown
    assert not any(token.secret in shown for token in secrets.tokens.values())
    assert secrets.cluster_id in shown


@pytest.mark.parametrize("name", ["tokens.json", "ssh-host-keys.json"])
def test_no_traceback_shows_a_secret(directory: Path, name: str) -> None:
    cluster = samples.ha(bake_ssh_host_keys=True)
    secrets = store.open(directory, cluster, now=NOW)
    (directory / name).write_text((directory / name).read_text() + "}")
    with pytest.raises(BakeError) as caught:
        store.open(directory, cluster, now=NOW)
    exceptions: list[BaseException | None] = [caught.value, caught.value.__cause__, caught.value.__context__]
    shown = "".join(traceback.format_exception(caught.value)) + "".join(f"{vars(e)}" for e in exceptions if e)
    assert not any(token.secret in shown for token in secrets.tokens.values())
    assert "PRIVATE" not in shown


def killed_after(steps: int, directory: Path, cluster: Cluster, change: Callable[[], object] | None = None) -> bool:
    """Open the store, or change it, in a child that SIGKILL ends at a step; whether it got that far.

    The steps: each write before it is synced and renamed, each folder's sync, the end.
    """
    child = os.fork()
    if child == 0:  # no test runner's code may run in here
        try:
            count = itertools.count()

            def step(*_: object, **__: object) -> None:
                if next(count) == steps:
                    os.kill(os.getpid(), signal.SIGKILL)

            unlink = Path.unlink

            def step_and_unlink(path: Path, **options: bool) -> None:
                step()
                unlink(path, **options)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "fsync", step)
                patch.setattr(Path, "unlink", step_and_unlink)
                change() if change else store.open(directory, cluster, now=NOW)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """No power is cut here, so the disk need not be waited for."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def test_a_first_minting_that_is_killed_anywhere_continues(tmp_path: Path, unsynced: None) -> None:
    cluster = samples.single()
    for steps in itertools.count():
        directory = tmp_path / f"{steps}"
        killed = killed_after(steps, directory, cluster)
        secrets = store.open(directory, cluster, now=NOW)
        assert store.open(directory, cluster, now=NOW) == secrets
        assert not [path for path in directory.rglob("*") if path.suffix == ".new" or path.name == "journal"]
        if not killed:
            break
    assert steps > 30


def test_a_machine_whose_minting_is_killed_anywhere_continues(tmp_path: Path, unsynced: None) -> None:
    cluster = samples.single()
    larger = with_new_machines(cluster)
    for steps in itertools.count():
        directory = tmp_path / f"{steps}"
        first = store.open(directory, cluster, now=NOW)
        killed = killed_after(steps, directory, larger)
        whole = {name: data for name, data in contents(directory).items() if name.endswith(".key")}
        second = store.open(directory, larger, now=NOW)
        assert contents(directory).items() >= whole.items()
        assert second.leaf_keys.items() > first.leaf_keys.items()
        assert second.tokens.items() > first.tokens.items()
        assert store.open(directory, larger, now=NOW) == second
        assert not [path for path in directory.rglob("*") if path.suffix == ".new" or path.name == "journal"]
        if not killed:
            break
    assert steps > 10


LATER = NOW + timedelta(days=120)


def test_rekeying_is_of_what_a_machine_alone_has(directory: Path) -> None:
    cluster = samples.ha(bake_ssh_host_keys=True)
    before = store.open(directory, cluster, now=NOW)
    after = store.rekey(directory, cluster, ["control-2", "worker-3"], now=LATER)
    begun = LATER.replace(microsecond=0)
    assert after.later == {name: (begun, begun + timedelta(days=90)) for name in ("control-2", "worker-3")}
    for kind in ("tokens", "ssh_host_keys"):
        old, new = getattr(before, kind), getattr(after, kind)
        assert {name for name in old if new[name] != old[name]} == {"control-2", "worker-3"}
        assert old.keys() == new.keys()
    assert {key for key in before.leaf_keys if after.leaf_keys[key] != before.leaf_keys[key]} == {
        key for key in before.leaf_keys if key[0] == "control-2"
    }
    same = {kind: getattr(before, kind) for kind in ("tokens", "ssh_host_keys", "leaf_keys", "later")}
    assert replace(after, **same) == before
    # The same from then on, until it is asked for once more.
    assert store.open(directory, cluster, now=LATER + timedelta(days=100)) == after
    assert store.open(directory, cluster, now=LATER, mint=False) == after
    again = store.rekey(directory, cluster, ["worker-3"], now=LATER)
    assert again.tokens["worker-3"] != after.tokens["worker-3"] and again.later == after.later


def test_the_desk_is_rekeyed_alone(directory: Path) -> None:
    before = store.open(directory, samples.ha(), now=NOW)
    after = store.rekey(directory, samples.ha(), [DESK], now=LATER)
    assert {key for key in before.leaf_keys if after.leaf_keys[key] != before.leaf_keys[key]} == {(DESK, "admin")}
    assert (after.tokens, set(after.later)) == (before.tokens, {DESK})


def test_rekeying_takes_a_date_as_it_stands(directory: Path) -> None:
    store.open(directory, samples.ha(), now=NOW)
    date = datetime(2028, 1, 1, tzinfo=UTC)
    after = store.rekey(directory, samples.ha(install_by=date), ["worker-1"], now=LATER)
    assert after.life("worker-1").install_by == after.life("worker-2").install_by == date


def test_what_ran_out_is_rekeyed(directory: Path) -> None:
    cluster, late = samples.ha(), NOW + timedelta(days=1200)
    store.open(directory, cluster, now=NOW)
    store.rekey(directory, cluster, ["control-1", "control-2", "control-3"], now=late)
    with pytest.raises(BakeError, match=r"certificates of admin\.conf ended on 2029-11-23"):
        store.open(directory, cluster, now=late)
    store.rekey(directory, cluster, [DESK], now=late)
    store.open(directory, cluster, now=late)
    with pytest.raises(BakeError, match="authorities of this cluster ended"):
        store.rekey(directory, cluster, [DESK], now=NOW + timedelta(days=3652))


def test_nothing_is_rekeyed_where_nothing_was_minted(directory: Path) -> None:
    with pytest.raises(BakeError, match="nothing was minted"):
        store.rekey(directory, samples.ha(), ["worker-1"], now=NOW)
    assert not directory.exists()
    directory.mkdir(mode=0o700)
    with pytest.raises(BakeError, match="nothing was minted"):
        store.rekey(directory, samples.ha(), ["worker-1"], now=NOW)


def test_a_rekeying_that_is_killed_anywhere_is_whole_or_did_not_happen(tmp_path: Path, unsynced: None) -> None:
    cluster, outcomes = samples.single(), set()
    for steps in itertools.count():
        directory = tmp_path / f"{steps}"
        before = store.open(directory, cluster, now=NOW)
        written = contents(directory)

        def change(where: Path = directory) -> None:
            store.rekey(where, cluster, ["only"], now=LATER)

        killed = killed_after(steps, directory, cluster, change)
        after = store.open(directory, cluster, now=LATER, mint=False)
        assert not [path for path in directory.rglob("*") if path.name.startswith("journal")]
        if after == before:
            assert contents(directory).items() >= written.items()
        else:
            assert after.life("only").minted > before.minted and after.tokens["only"] != before.tokens["only"]
            kept = {key for key in before.leaf_keys if after.leaf_keys[key] == before.leaf_keys[key]}
            assert kept == {(DESK, "admin")}
        assert store.open(directory, cluster, now=LATER) == after
        outcomes.add(after == before)
        if not killed:
            break
    assert outcomes == {True, False} and steps > 10


def test_a_minting_that_is_under_way_is_not_taken_for_done(directory: Path) -> None:
    assert killed_after(20, directory, samples.ha())
    assert (directory / "journal").exists()
    assert not (directory / "cluster.json").exists()
    whole = store.open(directory, samples.ha(), now=NOW, mint=False)
    assert whole == store.open(directory, samples.ha(), now=NOW + timedelta(days=9))


def test_other_files_may_lie_there_first(directory: Path) -> None:
    directory.mkdir(mode=0o700)
    (directory / "choices.json").write_text("{}")
    store.open(directory, samples.ha(), now=NOW)
    assert (directory / "choices.json").read_text() == "{}"


def test_processes_that_open_it_at_once_agree(directory: Path) -> None:
    program = (
        "import hashlib, sys; from pathlib import Path; from datetime import datetime, UTC\n"
        "from recipes.kit import store; from tests import samples\n"
        "sys.stdin.read()\n"
        "secrets = store.open(Path(sys.argv[1]), samples.ha(), now=datetime.now(UTC))\n"
        "shown = [sorted(secrets.tokens.items()), secrets.authorities['etcd'].key_pem, secrets.cluster_id]\n"
        "print(hashlib.sha256(repr([t.bearer for _, t in shown.pop(0)] + shown).encode()).hexdigest())\n"
    )
    command = [sys.executable, "-c", program, str(directory)]
    root = Path(__file__).parents[2]
    running = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) for _ in range(4)
    ]
    for process in running:  # each has started up by the time it reads to the end of its input
        assert process.stdin is not None
        process.stdin.close()
    answers = {process.stdout.read() for process in running if process.stdout}
    assert [process.wait() for process in running] == [0] * 4
    assert len(answers) == 1
    assert len(answers.pop()) == 65


def test_what_the_system_refuses_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BakeError, match="not a folder"):
        store.open(tmp_path / "file", samples.ha(), now=NOW)
    with pytest.raises(BakeError, match="cannot be used: Not a directory"):
        store.open(tmp_path / "file" / "below", samples.ha(), now=NOW)
