"""The secret store: what was minted once for a cluster, beside its cluster file.

    <cluster file>.secrets/            0700, files 0600, ignored by git
      cluster.json                     id, time of minting, key type, what was minted later or anew, and the SHA-256 of
                                       every key and certificate below
      ca/<name>.crt, .key              the authorities
      keys/<node>/<profile>.key        private keys of the baked certificates (keys/_desk: admin.conf's)
      service-account.key, .pub        signs service account tokens
      signing.key, .pub                signs the artifacts' manifests
      encryption.key                   encrypts Secrets in etcd (32 bytes, base64); from the second on: encryption-2.key
      serial.seed                      certificates' serial numbers come from it (32 bytes, base64)
      tokens.json                      node -> bootstrap token
      ssh-host-keys.json               node -> SSH host key, only where the cluster file asks for baked ones

Whatever changes in here is written into `journal` first, whole; from then on it holds: whoever finds a journal writes
what it says, and removes it. What cluster.json lists and the folder has not, or not with these bytes, is damage and an
error. What a machine that joins later needs is minted when first asked for; what those had that were removed stays.
Minted anew is only what rekey() is asked for. Nothing in here is for editing: the JSON files carry their own digest.

All of that may lie in one encrypted file of the folder instead (vault.py).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets as random
import shlex
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from recipes.kit.errors import BakeError
from recipes.kit.locks import locked
from recipes.kit.model import Cluster
from recipes.kit.profiles import ADMIN_CONF, AUTHORITIES, DESK, KeyPair, leaf_owners
from recipes.kit.vault import ENCRYPTED, UNDER_WAY, Folder, Key, open_files, prepare

BACKDATED = timedelta(hours=1)  # notBefore lies this long before minting: a machine's clock may be a little behind

_RECORD = "cluster.json"
_JOURNAL = "journal"
_TOKENS = "tokens.json"
_SSH = "ssh-host-keys.json"
_ENCRYPTION = re.compile(r"encryption(?:-(\d+))?\.key")
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


@dataclass(frozen=True, slots=True)
class Token:
    """A bootstrap token; the id is no secret."""

    id: str
    secret: str = field(repr=False)

    @property
    def bearer(self) -> str:
        return f"{self.id}.{self.secret}"


class Life(NamedTuple):
    """When a machine's keys and token were minted, and until when it may join. UTC, whole seconds."""

    minted: datetime
    install_by: datetime


class PlainPair(NamedTuple):
    """A key pair without a certificate, both PEM."""

    private_pem: bytes
    public_pem: bytes

    def __repr__(self) -> str:
        return "PlainPair()"


@dataclass(frozen=True, slots=True)
class SshHostKey:
    """An Ed25519 host key: the bytes of ssh_host_ed25519_key and the line of ssh_host_ed25519_key.pub, no newline."""

    private: bytes = field(repr=False)
    public: str


@dataclass(frozen=True)
class Secrets:
    """Everything minted for a cluster. Times are UTC and whole seconds. repr() shows no secret."""

    cluster_id: str
    minted: datetime
    install_by: datetime  # of what was minted then
    authorities_end: datetime
    authorities: Mapping[str, KeyPair] = field(repr=False)  # by profiles.Authority
    leaf_keys: Mapping[tuple[str, str], bytes] = field(repr=False)  # (node or profiles.DESK, profile) -> PEM
    service_account: PlainPair = field(repr=False)
    signing: PlainPair = field(repr=False)
    encryption_keys: Mapping[int, bytes] = field(repr=False)  # by number, 32 bytes each; those of earlier days included
    serial_seed: bytes = field(repr=False)  # 32 bytes
    tokens: Mapping[str, Token] = field(repr=False)  # by node; machines that were removed from the file included
    ssh_host_keys: Mapping[str, SshHostKey] = field(repr=False)  # by node; empty unless the cluster bakes them
    later: Mapping[str, Life]  # node or profiles.DESK -> what was minted after the cluster, or anew

    def life(self, owner: str) -> Life:
        """Of a machine, or of profiles.DESK."""
        return self.later.get(owner, self._first)

    @cached_property
    def _first(self) -> Life:
        return Life(self.minted, self.install_by)


@dataclass(frozen=True)
class _Record:
    """cluster.json."""

    cluster: str
    id: str
    minted: str
    keyType: str
    authoritiesEnd: str
    files: dict[str, str]  # path in the store -> SHA-256 in hex
    later: dict[str, str] = field(default_factory=dict)  # node or profiles.DESK -> when it was minted, or minted anew

    @property
    def time(self) -> datetime:
        return datetime.fromisoformat(self.minted)

    @property
    def end(self) -> datetime:
        return datetime.fromisoformat(self.authoritiesEnd)


def default_directory(cluster_file: Path) -> Path:
    return cluster_file.with_name(cluster_file.name + ".secrets")


def is_minted(directory: Path) -> bool:
    """Whether anything was; of an encrypted store it is taken for granted."""
    return (directory / _RECORD).exists() or (directory / ENCRYPTED).exists()


def open(directory: Path, cluster: Cluster, *, now: datetime, mint: bool = True, key: Key | None = None) -> Secrets:
    """What was minted for the cluster; mints what is missing. now: an aware datetime, the time of minting.

    With mint=False nothing is minted, and what a machine lacks in there is missing in the mappings. key opens an
    encrypted store; None: a passphrase is asked for.

    Any number of processes may call it at once, and any of them may be killed at any time. Raises BakeError when the
    store is damaged, readable by others or another cluster's, and, if it mints, when certificates have run out.
    """
    with _held(directory, key, make=mint) as files:
        if mint and not (directory / ".gitignore").exists():
            Folder(directory).write(".gitignore", b"*\n")
        return _open(files, cluster, _whole(now), mint)


def rekey(
    directory: Path, cluster: Cluster, owners: Collection[str], *, now: datetime, key: Key | None = None
) -> Secrets:
    """Mints anew whatever these machines (or profiles.DESK) have of their own: keys, token, SSH host key. Their
    certificates, and the time in which they may join, begin now. All of it or nothing; errors as open()'s."""
    with _held(directory, key, make=False) as files:
        return _rekey(files, cluster, owners, _whole(now))


@contextmanager
def _held(directory: Path, key: Key | None, *, make: bool) -> Iterator[Folder]:
    """What is in the folder, private, for this process alone, and with nothing half done in it."""
    if not make and not directory.exists():
        raise _nothing(directory)
    try:
        prepare(directory)
        with locked(directory / ".lock"):
            files = open_files(directory, key or Key())
            _finish(files)
            yield files
    except OSError as error:
        raise BakeError(
            f"the secret store cannot be used: {error.strerror or error}",
            where=str(error.filename or directory),
            remedy="mend that (space, rights, a writable file system), then bake again: nothing was lost",
        ) from error


def _nothing(directory: Path) -> BakeError:
    return BakeError("nothing was minted for this cluster yet", where=directory, remedy="bake it: doit")


def _whole(moment: datetime) -> datetime:
    return moment.astimezone(UTC).replace(microsecond=0)


def sign(secrets: Secrets, data: bytes) -> bytes:
    """The cluster's signature over data, always the same: ECDSA P-256 with SHA-256, DER.

    `openssl dgst -sha256 -verify signing.pub -signature SIG DATA` checks it.
    """
    from recipes.kit import pki  # here and below: most bakes mint and sign nothing, and need not wait for it

    return pki.sign(secrets.signing.private_pem, data)


def fingerprint(secrets: Secrets) -> str:
    """SHA-256 of the signing public key (DER SubjectPublicKeyInfo) in hex, for people to compare."""
    return fingerprint_of(secrets.signing.public_pem)


def fingerprint_of(public_pem: bytes) -> str:
    """The same of any public key."""
    body = [line for line in public_pem.splitlines() if not line.startswith(b"-----")]
    return hashlib.sha256(base64.b64decode(b"".join(body))).hexdigest()


@dataclass(frozen=True)
class _Held:
    """What lies in the folder. files: path in the store -> bytes."""

    record: _Record
    files: Mapping[str, bytes]
    tokens: Mapping[str, Token]
    ssh: Mapping[str, SshHostKey]


def _open(files: Folder, cluster: Cluster, now: datetime, mint: bool) -> Secrets:
    held = _read_all(files, cluster)
    if not mint:
        if held is None:
            raise _nothing(files.directory)
        return _secrets(cluster, held)
    if held is not None:
        _check_lifetimes(files.directory, cluster, held.record, now)
    whole = _complete(cluster, held or _first(cluster, now), now)
    _commit(files, held, whole)
    return _secrets(cluster, whole)


def _first(cluster: Cluster, now: datetime) -> _Held:
    """What belongs to the cluster as a whole."""
    if (install_by := _life(cluster, now).install_by) <= now:
        raise BakeError(
            f"installBy {install_by.isoformat()} has passed: the cluster would refuse every bootstrap token",
            where=cluster.file,
            remedy=f"write a later date as installBy, such as {(now + timedelta(days=90)).date()}, and bake again",
        )
    end = now + cluster.validity.ca
    record = _Record(cluster.name, str(uuid.uuid4()), now.isoformat(), cluster.key_type, end.isoformat(), {})
    return _Held(record, _mint_cluster(cluster, now), {}, {})


def _complete(cluster: Cluster, held: _Held, now: datetime) -> _Held:
    """With what machines lack. Those of which there was nothing begin now."""
    keys = {
        name: _new_key(cluster)
        for owner, spec in leaf_owners(cluster)
        if (name := _key_file(owner, spec.name)) not in held.files
    }
    encryption = {
        name: _text(random.token_bytes(32))
        for name in map(_encryption_file, cluster.encryption_keys)
        if name not in held.files
    }
    tokens = _mint_tokens(cluster, held.tokens)
    known = {*held.tokens, *_owners_of(held.files)}
    new = {*tokens, *_owners_of(keys)} - known if held.record.time != now else set[str]()
    return _Held(
        replace(held.record, later={**held.record.later, **dict.fromkeys(sorted(new), now.isoformat())}),
        {**held.files, **keys, **encryption},
        {**held.tokens, **tokens},
        {**held.ssh, **_mint_ssh(cluster, held.ssh)},
    )


def _rekey(files: Folder, cluster: Cluster, owners: Collection[str], now: datetime) -> Secrets:
    held = _read_all(files, cluster)
    if held is None:
        raise _nothing(files.directory)
    _check_authorities(files.directory, cluster, held.record, now)
    left = _Held(
        replace(held.record, later={**held.record.later, **dict.fromkeys(owners, now.isoformat())}),
        {name: data for name, data in held.files.items() if not _owners_of([name]) & set(owners)},
        {owner: token for owner, token in held.tokens.items() if owner not in owners},
        {owner: key for owner, key in held.ssh.items() if owner not in owners},
    )
    whole = _complete(cluster, left, now)
    _commit(files, held, whole)
    return _secrets(cluster, whole)


def _secrets(cluster: Cluster, held: _Held) -> Secrets:
    record, found, ssh = held.record, held.files, held.ssh
    named = {node.name for node in cluster.nodes}
    keys = {(owner, spec.name): _key_file(owner, spec.name) for owner, spec in leaf_owners(cluster)}
    return Secrets(
        cluster_id=record.id,
        minted=record.time,
        install_by=_life(cluster, record.time).install_by,
        authorities_end=record.end,
        authorities={
            spec.name: KeyPair(found[f"ca/{spec.name}.crt"], found[f"ca/{spec.name}.key"]) for spec in AUTHORITIES
        },
        leaf_keys={key: found[name] for key, name in keys.items() if name in found},
        service_account=PlainPair(found["service-account.key"], found["service-account.pub"]),
        signing=PlainPair(found["signing.key"], found["signing.pub"]),
        encryption_keys={
            int(name[1] or 1): base64.b64decode(data)
            for file, data in found.items()
            if (name := _ENCRYPTION.fullmatch(file))
        },
        serial_seed=base64.b64decode(found["serial.seed"]),
        tokens=held.tokens,
        ssh_host_keys={name: key for name, key in ssh.items() if name in named} if cluster.bake_ssh_host_keys else {},
        later={owner: _life(cluster, datetime.fromisoformat(at)) for owner, at in record.later.items()},
    )


def _life(cluster: Cluster, minted: datetime) -> Life:
    """A pure function of the cluster file and the time of minting."""
    by = cluster.install_by
    return Life(minted, minted + by if isinstance(by, timedelta) else _whole(by))


def _encryption_file(number: int) -> str:
    return "encryption.key" if number == 1 else f"encryption-{number}.key"


def _key_file(owner: str, profile: str) -> str:
    return f"keys/{owner}/{profile}.key"


def _owners_of(files: Iterable[str]) -> set[str]:
    """Whose keys are among these paths in the store."""
    return {name.split("/")[1] for name in files if name.startswith("keys/")}


def _check_lifetimes(directory: Path, cluster: Cluster, record: _Record, now: datetime) -> None:
    """An error when what would be issued has already run out, or CAs shall live otherwise than minted."""
    _check_authorities(directory, cluster, record, now)
    owners = dict.fromkeys(owner for owner, _ in leaf_owners(cluster))
    ends = {owner: datetime.fromisoformat(record.later.get(owner, record.minted)) for owner in owners}
    ended = {owner: at + cluster.validity.leaf for owner, at in ends.items() if at + cluster.validity.leaf <= now}
    if ended:
        words = " ".join(ADMIN_CONF if owner == DESK else owner for owner in ended)
        raise BakeError(
            f"the baked certificates of {words.replace(' ', ', ')} ended on {min(ended.values()).date()}",
            where=directory,
            remedy=f"doit rekey {words}",
        )


def _check_authorities(directory: Path, cluster: Cluster, record: _Record, now: datetime) -> None:
    if record.time + cluster.validity.ca != record.end:
        raise BakeError(
            f"this cluster's CAs were minted for {(record.end - record.time).days} days, the cluster file now says "
            f"{cluster.validity.ca.days}",
            where=cluster.file,
            remedy=f"write validity.ca: {(record.end - record.time).days}d again",
        )
    if record.end <= now:
        raise BakeError(
            f"the authorities of this cluster ended on {record.end.date()}",
            where=directory,
            remedy=_ANEW.format(path=shlex.quote(str(directory))),
        )


# --- minting


def _mint_cluster(cluster: Cluster, minted: datetime) -> dict[str, bytes]:
    """What belongs to the cluster as a whole, path in the store -> bytes."""
    from recipes.kit import pki

    seed = random.token_bytes(32)
    files = {"serial.seed": _text(seed), "encryption.key": _text(random.token_bytes(32))}
    for spec in AUTHORITIES:
        key = pki.new_key(cluster.key_type)
        subject = pki.Subject(spec.common_name, organization=cluster.name)
        start, end = minted - BACKDATED, minted + cluster.validity.ca
        files[f"ca/{spec.name}.key"] = key
        files[f"ca/{spec.name}.crt"] = pki.authority(subject, key, start=start, end=end, serial_seed=seed)
    for name, key in (("service-account", pki.new_key(cluster.key_type)), ("signing", pki.new_key("ecdsa-p256"))):
        files[f"{name}.key"] = key
        files[f"{name}.pub"] = pki.public_pem(key)
    return files


def _new_key(cluster: Cluster) -> bytes:
    from recipes.kit import pki

    return pki.new_key(cluster.key_type)


def _mint_tokens(cluster: Cluster, existing: Mapping[str, Token]) -> dict[str, Token]:
    ids = {token.id for token in existing.values()}
    minted: dict[str, Token] = {}
    for node in cluster.kubelets:
        if node.name in existing:
            continue
        while (identity := _letters(6)) in ids:
            pass
        ids.add(identity)
        minted[node.name] = Token(identity, _letters(16))
    return minted


def _mint_ssh(cluster: Cluster, existing: Mapping[str, SshHostKey]) -> dict[str, SshHostKey]:
    if not cluster.bake_ssh_host_keys:
        return {}
    return {node.name: _ssh_host_key(node.name) for node in cluster.nodes if node.name not in existing}


def _ssh_host_key(node: str) -> SshHostKey:
    from recipes.kit import pki

    private, public = pki.new_ssh_host_key()
    return SshHostKey(private, f"{public} root@{node}")


def _letters(count: int) -> str:
    return "".join(random.choice(_LETTERS) for _ in range(count))


def _text(data: bytes) -> bytes:
    return base64.b64encode(data) + b"\n"


# --- reading


def _read_all(files: Folder, cluster: Cluster) -> _Held | None:
    """None: nothing was minted yet."""
    record = _read_record(files, cluster)
    if record is None:
        return None
    listed = {name: _read_listed(files, name, digest) for name, digest in record.files.items()}
    return _Held(record, listed, _read_tokens(files), _read_ssh(files))


def _read_record(files: Folder, cluster: Cluster) -> _Record | None:
    """cluster.json, or None when nothing was minted yet."""
    try:
        data = files.read(_RECORD)
    except FileNotFoundError:
        left = ("ca", "keys", _TOKENS, "service-account.key", "signing.key", "encryption.key", "serial.seed")
        if any(map(files.exists, left)):
            raise _damage(files, _RECORD, "is missing, though keys are there") from None
        return None
    try:
        record = _Record(**_parse(files, _RECORD, data))
    except TypeError:
        raise BakeError(
            "this secret store was written by another version of Nodebake",
            where=files.directory / _RECORD,
            remedy=f"bake with that version, or {_ANEW.format(path=shlex.quote(str(files.directory)))}",
        ) from None
    if record.cluster != cluster.name:
        raise BakeError(
            f"this secret store belongs to the cluster {record.cluster!r}, the cluster file describes {cluster.name!r}",
            where=files.directory,
            remedy=f"name the cluster {record.cluster!r} again, or choose another folder with `doit secrets=DIR`",
        )
    if record.keyType != cluster.key_type:
        raise BakeError(
            f"this cluster's keys were minted as {record.keyType}, the cluster file now says {cluster.key_type}",
            where=files.directory,
            remedy=f"write keyType: {record.keyType} again, or {_ANEW.format(path=shlex.quote(str(files.directory)))}",
        )
    return record


def _read_listed(files: Folder, name: str, digest: str) -> bytes:
    try:
        data = files.read(name)
    except FileNotFoundError:
        raise _damage(files, name, "is missing") from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise _damage(files, name, "is damaged: it is not what was minted")
    return data


def _read_tokens(files: Folder) -> dict[str, Token]:
    try:
        raw = _parse(files, _TOKENS, files.read(_TOKENS))
    except FileNotFoundError:
        raise _damage(files, _TOKENS, "is missing") from None
    return {node: Token(*bearer.split(".")) for node, bearer in raw.items()}


def _read_ssh(files: Folder) -> dict[str, SshHostKey]:
    try:
        raw = _parse(files, _SSH, files.read(_SSH))
    except FileNotFoundError:
        return {}
    return {node: SshHostKey(key["private"].encode(), key["public"]) for node, key in raw.items()}


def _parse(files: Folder, name: str, data: bytes) -> dict[str, Any]:
    """The content of one of the store's JSON files, which carry their own digest."""
    content: dict[str, Any] | None = None
    try:
        sealed = json.loads(data)
        if sealed["sha256"] == _digest(sealed["content"]):
            content = sealed["content"]
    except (ValueError, TypeError, KeyError):
        pass
    # Raised out here, so that no exception carries the text, which is secret, into a traceback.
    if content is None:
        raise _damage(files, name, "is damaged: it is not what was written")
    return content


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


_ANEW = (
    "move the whole folder {path} away to mint a new cluster (machines that were installed from the old one are then "
    "strangers to it)"
)


def _damage(files: Folder, name: str, what: str) -> BakeError:
    return BakeError(
        f"{name} in the secret store {what}",
        where=files.directory / name,
        remedy="restore the folder from a backup, or " + _ANEW.format(path=shlex.quote(str(files.directory))),
    )


# --- writing


def _commit(files: Folder, before: _Held | None, whole: _Held) -> None:
    """Makes the folder hold this: all of it or nothing, whenever this is cut off."""
    if whole == before:
        return
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(whole.files.items())}
    there = before.files if before is not None else {}
    changed = {name: data for name, data in whole.files.items() if there.get(name) != data}
    changed[_TOKENS] = _sealed({name: token.bearer for name, token in sorted(whole.tokens.items())})
    if whole.ssh:
        ssh = {name: {"private": key.private.decode(), "public": key.public} for name, key in sorted(whole.ssh.items())}
        changed[_SSH] = _sealed(ssh)
    changed[_RECORD] = _sealed(asdict(replace(whole.record, files=digests)))
    files.write(_JOURNAL, _sealed({name: data.decode() for name, data in changed.items()}))
    files.sync([_JOURNAL])
    _finish(files)


def _finish(files: Folder) -> None:
    """Does what the journal says, if there is one."""
    try:
        told = _parse(files, _JOURNAL, files.read(_JOURNAL))
    except FileNotFoundError:
        files.remove(f"{_JOURNAL}{UNDER_WAY}")  # of one that was cut off before it held
        return
    for name, text in told.items():
        files.write(name, text.encode())
    files.sync([*told, "keys/_", _RECORD])
    files.remove(_JOURNAL)
    files.commit()


def _sealed(content: object) -> bytes:
    return json.dumps({"sha256": _digest(content), "content": content}, indent=1).encode() + b"\n"
