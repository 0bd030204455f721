"""The secret store: what was minted once for a cluster, beside its cluster file.

    <cluster file>.secrets/            0700, files 0600, ignored by git
      cluster.json                     id, time of minting, key type, and the SHA-256 of every key and certificate below
      ca/<name>.crt, .key              the authorities
      keys/<node>/<profile>.key        private keys of the baked certificates (keys/_desk: admin.conf's)
      service-account.key, .pub        signs service account tokens
      signing.key, .pub                signs the artifacts' manifests
      encryption.key                   encrypts Secrets in etcd (32 bytes, base64)
      serial.seed                      certificates' serial numbers come from it (32 bytes, base64)
      tokens.json                      node -> bootstrap token
      ssh-host-keys.json               node -> SSH host key, only where the cluster file asks for baked ones

cluster.json is written last, so it commits what it lists. While it is missing, `minting` says that the first minting is
under way: whoever finds that mark mints anew, for nothing of it was ever handed out. What cluster.json lists and the
folder has not, or not with these bytes, is damage and an error. A key of a machine that joined later is minted when
first asked for; those of removed machines stay. Nothing in here is for editing: the JSON files carry their own digest.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import secrets as random
import shlex
import stat
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from recipes.kit.errors import BakeError
from recipes.kit.locks import locked
from recipes.kit.model import Cluster
from recipes.kit.profiles import AUTHORITIES, KeyPair, leaf_owners

BACKDATED = timedelta(hours=1)  # notBefore lies this long before minting: a machine's clock may be a little behind

_RECORD = "cluster.json"
_MARK = "minting"
_TOKENS = "tokens.json"
_SSH = "ssh-host-keys.json"
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


@dataclass(frozen=True, slots=True)
class Token:
    """A bootstrap token; the id is no secret."""

    id: str
    secret: str = field(repr=False)

    @property
    def bearer(self) -> str:
        return f"{self.id}.{self.secret}"


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
    install_by: datetime
    authorities_end: datetime
    authorities: Mapping[str, KeyPair] = field(repr=False)  # by profiles.Authority
    leaf_keys: Mapping[tuple[str, str], bytes] = field(repr=False)  # (node or profiles.DESK, profile) -> PEM
    service_account: PlainPair = field(repr=False)
    signing: PlainPair = field(repr=False)
    encryption_key: bytes = field(repr=False)  # 32 bytes
    serial_seed: bytes = field(repr=False)  # 32 bytes
    tokens: Mapping[str, Token] = field(repr=False)  # by node; machines that were removed from the file included
    ssh_host_keys: Mapping[str, SshHostKey] = field(repr=False)  # by node; empty unless the cluster bakes them


@dataclass(frozen=True)
class _Record:
    """cluster.json."""

    cluster: str
    id: str
    minted: str
    keyType: str
    authoritiesEnd: str
    files: dict[str, str]  # path in the store -> SHA-256 in hex

    @property
    def time(self) -> datetime:
        return datetime.fromisoformat(self.minted)

    @property
    def end(self) -> datetime:
        return datetime.fromisoformat(self.authoritiesEnd)


def default_directory(cluster_file: Path) -> Path:
    return cluster_file.with_name(cluster_file.name + ".secrets")


def open(directory: Path, cluster: Cluster, *, now: datetime, mint: bool = True) -> Secrets:
    """What was minted for the cluster; mints what is missing. now: an aware datetime, the time of a first minting.

    With mint=False the store is left as it is, and what a machine lacks in there is missing in the mappings.

    Any number of processes may call it at once, and any of them may be killed at any time. Raises BakeError when the
    store is damaged, readable by others or another cluster's, and when installBy or the certificates have run out.
    """
    try:
        _prepare(directory)
        with locked(directory / ".lock"):
            if mint and not (directory / ".gitignore").exists():
                _write(directory, ".gitignore", b"*\n")
            return _open(directory, cluster, now.astimezone(UTC).replace(microsecond=0), mint)
    except OSError as error:
        raise BakeError(
            f"the secret store cannot be used: {error.strerror or error}",
            where=str(error.filename or directory),
            remedy="mend that (space, rights, a writable file system), then bake again: nothing was lost",
        ) from error


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


def _open(directory: Path, cluster: Cluster, now: datetime, mint: bool) -> Secrets:
    record = _read_record(directory, cluster)
    first = record is None
    if record is None:
        if not mint:
            raise BakeError("nothing was minted for this cluster yet", where=directory, remedy="bake it: doit")
        record = _Record(
            cluster.name,
            str(uuid.uuid4()),
            now.isoformat(),
            cluster.key_type,
            (now + cluster.validity.ca).isoformat(),
            {},
        )
    install_by = _resolve_install_by(cluster, record, now)

    found = {name: _read_listed(directory, name, digest) for name, digest in record.files.items()}
    if not first:
        _check_lifetimes(directory, cluster, record, now)
    tokens = {} if first else _read_tokens(directory)
    ssh = {} if first else _read_ssh(directory)
    if not mint:
        return _secrets(cluster, record, install_by, found, tokens, ssh)

    minted = _mint_cluster(cluster, record.time) if first else {}
    minted |= {
        name: _adopt(directory, name, first) or _new_key(cluster)
        for owner, spec in leaf_owners(cluster)
        if (name := _key_file(owner, spec.name)) not in found
    }
    tokens_minted = _mint_tokens(cluster, tokens)
    ssh_minted = _mint_ssh(cluster, ssh)

    if first:
        _write(directory, _MARK, b"The first minting is under way; what is here now will be minted anew.\n")
        _sync(directory)
    for name, data in minted.items():
        _write(directory, name, data)
    if first or tokens_minted:
        tokens |= tokens_minted
        _write_json(directory, _TOKENS, {name: token.bearer for name, token in sorted(tokens.items())})
    if ssh_minted:
        ssh |= ssh_minted
        shown = {name: {"private": key.private.decode(), "public": key.public} for name, key in sorted(ssh.items())}
        _write_json(directory, _SSH, shown)
    found |= minted
    if minted or tokens_minted or ssh_minted:
        for folder in sorted({(directory / name).parent for name in minted} | {directory / "keys", directory}):
            _sync(folder)
    if minted:
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(found.items())}
        _write_json(directory, _RECORD, asdict(replace(record, files=digests)))
        _sync(directory)
    (directory / _MARK).unlink(missing_ok=True)
    return _secrets(cluster, record, install_by, found, tokens, ssh)


def _secrets(
    cluster: Cluster,
    record: _Record,
    install_by: datetime,
    found: Mapping[str, bytes],
    tokens: Mapping[str, Token],
    ssh: Mapping[str, SshHostKey],
) -> Secrets:
    """found: path in the store -> bytes."""
    named = {node.name for node in cluster.nodes}
    keys = {(owner, spec.name): _key_file(owner, spec.name) for owner, spec in leaf_owners(cluster)}
    return Secrets(
        cluster_id=record.id,
        minted=record.time,
        install_by=install_by,
        authorities_end=record.end,
        authorities={
            spec.name: KeyPair(found[f"ca/{spec.name}.crt"], found[f"ca/{spec.name}.key"]) for spec in AUTHORITIES
        },
        leaf_keys={key: found[name] for key, name in keys.items() if name in found},
        service_account=PlainPair(found["service-account.key"], found["service-account.pub"]),
        signing=PlainPair(found["signing.key"], found["signing.pub"]),
        encryption_key=base64.b64decode(found["encryption.key"]),
        serial_seed=base64.b64decode(found["serial.seed"]),
        tokens=tokens,
        ssh_host_keys={name: key for name, key in ssh.items() if name in named} if cluster.bake_ssh_host_keys else {},
    )


def _key_file(owner: str, profile: str) -> str:
    return f"keys/{owner}/{profile}.key"


def _resolve_install_by(cluster: Cluster, record: _Record, now: datetime) -> datetime:
    """installBy, a pure function of the cluster file and the time of minting; an error when it has passed."""
    by = cluster.install_by
    install_by = record.time + by if isinstance(by, timedelta) else by.astimezone(UTC).replace(microsecond=0)
    if install_by <= now:
        how = f" ({record.minted}, when the store was minted, plus {by.days} days)" if isinstance(by, timedelta) else ""
        raise BakeError(
            f"installBy {install_by.isoformat()} has passed{how}: the cluster would refuse every bootstrap token",
            where=cluster.file,
            remedy="write a later date as installBy, such as "
            f"{(now + timedelta(days=90)).date()}, and bake again; machines that have joined need nothing",
        )
    return install_by


def _check_lifetimes(directory: Path, cluster: Cluster, record: _Record, now: datetime) -> None:
    """An error when what would be issued has already run out, or CAs shall live otherwise than minted."""
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
    if record.time + cluster.validity.leaf <= now:
        raise BakeError(
            f"the baked certificates of this cluster ended on {(record.time + cluster.validity.leaf).date()}",
            where=cluster.file,
            remedy="give them a longer validity there, counted from minting; they are issued again from the same keys",
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


def _read_record(directory: Path, cluster: Cluster) -> _Record | None:
    """cluster.json, or None when nothing was minted yet or the first minting was cut off."""
    try:
        data = _read(directory, _RECORD)
    except FileNotFoundError:
        left = ("ca", "keys", _TOKENS, "service-account.key", "signing.key", "encryption.key", "serial.seed")
        if not (directory / _MARK).exists() and any((directory / name).exists() for name in left):
            raise _damage(directory, _RECORD, "is missing, though keys are there") from None
        return None
    try:
        record = _Record(**_parse(directory, _RECORD, data))
    except TypeError:
        raise BakeError(
            "this secret store was written by another version of Nodebake",
            where=directory / _RECORD,
            remedy=f"bake with that version, or {_ANEW.format(path=shlex.quote(str(directory)))}",
        ) from None
    if record.cluster != cluster.name:
        raise BakeError(
            f"this secret store belongs to the cluster {record.cluster!r}, the cluster file describes {cluster.name!r}",
            where=directory,
            remedy=f"name the cluster {record.cluster!r} again, or choose another folder with `doit secrets=DIR`",
        )
    if record.keyType != cluster.key_type:
        raise BakeError(
            f"this cluster's keys were minted as {record.keyType}, the cluster file now says {cluster.key_type}",
            where=directory,
            remedy=f"write keyType: {record.keyType} again, or {_ANEW.format(path=shlex.quote(str(directory)))}",
        )
    return record


def _read_listed(directory: Path, name: str, digest: str) -> bytes:
    try:
        data = _read(directory, name)
    except FileNotFoundError:
        raise _damage(directory, name, "is missing") from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise _damage(directory, name, "is damaged: it is not what was minted")
    return data


def _adopt(directory: Path, name: str, first: bool) -> bytes | None:
    """A key that was minted for a new machine by a run that was cut off before it could list it."""
    if first:
        return None
    from recipes.kit import pki

    try:
        data = _read(directory, name)
        pki.load_key(data)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise _damage(directory, name, "is damaged: it holds no private key") from None
    return data


def _read_tokens(directory: Path) -> dict[str, Token]:
    try:
        raw = _parse(directory, _TOKENS, _read(directory, _TOKENS))
    except FileNotFoundError:
        raise _damage(directory, _TOKENS, "is missing") from None
    return {node: Token(*bearer.split(".")) for node, bearer in raw.items()}


def _read_ssh(directory: Path) -> dict[str, SshHostKey]:
    try:
        raw = _parse(directory, _SSH, _read(directory, _SSH))
    except FileNotFoundError:
        return {}
    return {node: SshHostKey(key["private"].encode(), key["public"]) for node, key in raw.items()}


def _parse(directory: Path, name: str, data: bytes) -> dict[str, Any]:
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
        raise _damage(directory, name, "is damaged: it is not what was written")
    return content


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


_ANEW = (
    "move the whole folder {path} away to mint a new cluster (machines that were installed from the old one are then "
    "strangers to it)"
)


def _damage(directory: Path, name: str, what: str) -> BakeError:
    return BakeError(
        f"{name} in the secret store {what}",
        where=directory / name,
        remedy="restore the folder from a backup, or " + _ANEW.format(path=shlex.quote(str(directory))),
    )


# --- the folder


def _prepare(directory: Path) -> None:
    if not directory.exists():
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)  # whatever the umask took
    found = directory.stat()
    if not stat.S_ISDIR(found.st_mode):
        raise BakeError(
            "the secret store is not a folder", where=directory, remedy="choose one with `doit secrets=DIR`"
        )
    _private(found, directory, directory)


def _private(found: os.stat_result, path: Path, directory: Path) -> None:
    if found.st_uid != os.geteuid():
        raise BakeError(
            f"the secret store belongs to user {found.st_uid}, this is user {os.geteuid()}",
            where=path,
            remedy=f"bake as its owner, or give it to this user: chown -R {os.geteuid()} {shlex.quote(str(directory))}",
        )
    if found.st_mode & 0o077:
        raise BakeError(
            "others on this computer may read the secret store",
            where=path,
            remedy=f"chmod -R go= {shlex.quote(str(directory))}, and consider whether someone already has",
        )


def _read(directory: Path, name: str) -> bytes:
    path = directory / name
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as stream:
        _private(os.fstat(descriptor), path, directory)
        return stream.read()


def _write_json(directory: Path, name: str, content: object) -> None:
    sealed = {"sha256": _digest(content), "content": content}
    _write(directory, name, json.dumps(sealed, indent=1).encode() + b"\n")


def _write(directory: Path, name: str, data: bytes) -> None:
    """Whole or not at all. Only the lock's holder writes, so a fixed temporary name serves."""
    path = directory / name
    for folder in reversed([*path.relative_to(directory).parents][:-1]):
        (directory / folder).mkdir(mode=0o700, exist_ok=True)
        (directory / folder).chmod(0o700)
    temporary = path.with_name(path.name + ".new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        os.fchmod(descriptor, 0o600)
        stream.write(data)
        stream.flush()
        os.fsync(descriptor)
    temporary.rename(path)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
