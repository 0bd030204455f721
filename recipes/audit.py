"""Who may have what: one table of secrets and machines, and the search of every artifact for what goes beyond it.

Where a certificate's key lies is taken from the profile table (kit/profiles.py). Which keys stay at the desk is said
here once more, so that a mistake in a recipe, or in that table, fails the bake.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from recipes import images, node, tokens
from recipes.kit import pki
from recipes.kit.errors import BakeError, BakeErrors
from recipes.kit.model import Cluster, File, Node
from recipes.kit.profiles import (
    ADMIN_GROUP,
    AUTHORITIES,
    DESK,
    PKI,
    PROFILES,
    AuthoritySpec,
    CertificateSpec,
    Holder,
    holds,
)
from recipes.kit.search import Known
from recipes.kit.store import Secrets

_ROLES: tuple[Holder, ...] = ("control-plane", "etcd-member", "worker", "load-balancer")
_KUBELETS: tuple[Holder, ...] = ("control-plane", "worker")
# Whatever the profile table says: only these CAs sign in the datacenter, only these machines have private keys, and
# nobody there is one of these groups.
_SIGNING = ("kubernetes", "kubelet-serving")
_KEYED = ("control-plane", "etcd-member")
_ALMIGHTY = ("system:masters", ADMIN_GROUP)
_TELLING = re.compile(r"\.(?:key|p12|pfx|jks|kubeconfig)$|_key$|/id_[a-z0-9]+$|admin\.conf$")
_WORTH = 16  # characters from which on a password is looked for by itself: a shorter one may be a word


@dataclass(frozen=True, slots=True)
class Place:
    """Where a secret may lie on machines of one kind: in this file, which that one user alone may read (0600)."""

    holder: Holder
    path: str
    owner: str = "root"
    everyones: bool = False  # of all machines that may join; else of the machine itself, where each has one of its own


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """A kind of secret. places: none where it never leaves the desk."""

    name: str
    places: tuple[Place, ...] = ()
    each: bool = False  # each machine has one of its own


@dataclass(frozen=True, slots=True)
class Secret:
    """One secret of the store; of: the machine that it was minted for, where it is one's."""

    kind: Kind
    of: str | None = None

    def __str__(self) -> str:
        return f"{self.kind.name} of {self.of}" if self.of else self.kind.name


def _authority(spec: AuthoritySpec) -> Kind:
    key = spec.key if spec.name in _SIGNING else None
    return Kind(f"{spec.name} CA's key", (Place("control-plane", key),) if key else ())


def _leaf(spec: CertificateSpec) -> Kind:
    path = f"{spec.path}.key" if spec.form == "pair" else f"{spec.path}.conf"
    goes = spec.holder in _KEYED and spec.organization not in _ALMIGHTY
    return Kind(f"{spec.name}'s key", (Place(spec.holder, path),) if goes else (), each=True)


_AUTHORITY: dict[str, Kind] = {spec.name: _authority(spec) for spec in AUTHORITIES}
_LEAF = {spec.name: _leaf(spec) for spec in PROFILES}
_SERVICE_ACCOUNT = Kind("service accounts' key", (Place("control-plane", f"{PKI}/sa.key"),))
_ENCRYPTION = Kind("encryption key of Secrets", (Place("control-plane", "/etc/kubernetes/encryption.yaml"),))
_TOKEN = Kind(
    "bootstrap token",
    (
        *(Place(holder, tokens.PATH) for holder in _KUBELETS),
        Place("control-plane", "/etc/nodebake/objects/90-tokens.yaml", "nodebake", everyones=True),
    ),
    each=True,
)
_OPERATORS = Place("control-plane", "/etc/nodebake/objects/10-cluster.yaml", "nodebake")
_REGISTRY = Kind(
    "registries' passwords",
    (*(Place(holder, "/var/lib/kubelet/config.json") for holder in _KUBELETS), _OPERATORS),
)
_SSH = Kind("SSH host key, where it is baked", tuple(Place(role, node.HOST_KEY) for role in _ROLES), each=True)
_OBJECTS = Kind("what is secret in the operator's objects", (_OPERATORS,))
_MANIFESTS = Kind("key that signs manifests")
_SERIALS = Kind("seed of serial numbers")
_MASTERS = Kind("credential of system:masters")

TABLE: tuple[Kind, ...] = (
    *_AUTHORITY.values(),
    *(_SERVICE_ACCOUNT, _ENCRYPTION),
    *_LEAF.values(),
    *(_TOKEN, _REGISTRY, _SSH, _OBJECTS, _MANIFESTS, _SERIALS, _MASTERS),
)
_PLACES = tuple((kind, place) for kind in TABLE for place in kind.places)
_PATHS = frozenset(place.path for _, place in _PLACES)


class Audit:
    """Searches the artifacts of one cluster, by names and contents, for its store's secrets and for whatever looks like
    one. Each method raises BakeErrors with all that goes beyond the table."""

    def __init__(self, cluster: Cluster, secrets: Secrets) -> None:
        self._known = _known(cluster, secrets)
        self._joining = frozenset(node.name for node in cluster.kubelets if not node.denied)

    def payload(self, files: Iterable[File], of: str) -> None:
        """A payload has no secret at all. What is streamed from the cache is not searched: others made it, and digests
        or signatures pin it. of: what errors call it."""
        _raise([error for file in files for error in self._beyond(file, {}, None)], of)

    def identity(self, files: Iterable[File], machine: Node) -> None:
        allowed: dict[str, list[tuple[Kind, Place]]] = {}
        for kind, place in _PLACES:
            if holds(machine, place.holder):
                allowed.setdefault(place.path, []).append((kind, place))
        _raise([error for file in files for error in self._beyond(file, allowed, machine)], machine.name)

    def seed(self, documents: Mapping[str, bytes], machine: Node) -> None:
        """What a seed has beside the tarball: cloud-init keeps copies of it that anybody on the machine may read."""
        # First boot is in every payload as well.
        files = [File(f"/{name}", data=data) for name, data in documents.items() if name != "first-boot"]
        self.payload(files, f"{machine.name}'s seed")

    def _beyond(
        self, file: File, allowed: Mapping[str, Sequence[tuple[Kind, Place]]], machine: Node | None
    ) -> Iterator[tuple[str, str]]:
        """(path, what is wrong)"""
        here = allowed.get(file.path, ())
        if not here and (file.path in _PATHS or _TELLING.search(file.path)):
            yield file.path, "by its name this is a secret that is not for this machine"
        for _, place in here:
            if (file.mode, file.owner) != (0o600, place.owner):
                yield file.path, f"this holds a secret: it must be {place.owner}'s alone (0600)"
        if file.data is None:
            return
        found = self._known.search(file.data)
        wrong = sorted(str(secret) for secret in found.known if not self._may(secret, here, machine))
        if wrong:
            more = f" and {len(wrong) - 1} secrets more" if len(wrong) > 1 else ""
            yield file.path, f"this holds the {wrong[0]}{more}"
        if _OBJECTS not in (kind for kind, _ in here):
            for look in sorted(found.looks):
                yield file.path, f"this holds what looks like {look}, and is none of the store"

    def _may(self, secret: Secret, here: Sequence[tuple[Kind, Place]], machine: Node | None) -> bool:
        return any(
            kind == secret.kind
            and (
                not kind.each
                or (place.everyones and secret.of in self._joining)
                or (machine is not None and secret.of == machine.name and not place.everyones)
            )
            for kind, place in here
        )


def _known(cluster: Cluster, secrets: Secrets) -> Known[Secret]:
    numbers = {key: Secret(_ENCRYPTION) for key in secrets.encryption_keys.values()}
    numbers[secrets.serial_seed] = Secret(_SERIALS)
    keys = {
        secrets.signing.private_pem: Secret(_MANIFESTS),
        secrets.service_account.private_pem: Secret(_SERVICE_ACCOUNT),
        **{pair.key_pem: Secret(_AUTHORITY[name]) for name, pair in secrets.authorities.items()},
        **{key: Secret(_LEAF[profile], of if of != DESK else None) for (of, profile), key in secrets.leaf_keys.items()},
    }
    texts: dict[bytes, Secret] = {}
    for user, password in filter(None, map(images.credentials, cluster.registries)):
        texts[f"{user}:{password}".encode()] = Secret(_REGISTRY)
        if len(password) >= _WORTH:
            texts[password.encode()] = Secret(_REGISTRY)
    return Known(
        texts=texts,
        numbers=numbers | {pki.private_number(pem): secret for pem, secret in keys.items()},
        words={token.secret.encode(): Secret(_TOKEN, of) for of, token in secrets.tokens.items()},
        blobs={_body(key.private): Secret(_SSH, of) for of, key in secrets.ssh_host_keys.items()},
    )


def _body(pem: bytes) -> bytes:
    return base64.b64decode(b"".join(pem.splitlines()[1:-1]))


def _raise(wrong: Sequence[tuple[str, str]], of: str) -> None:
    if wrong:
        remedy = "take it out of what brings it; recipes/README.md has the table of who may have what"
        raise BakeErrors([BakeError(what, where=f"{of}:{path}", remedy=remedy) for path, what in wrong])


def table() -> str:
    """The table in Markdown, for the documentation."""
    rows = [("secret", *_ROLES, "in the file (which this user alone reads)"), ("---",) * (len(_ROLES) + 2)]
    rows += [(kind.name, *(_has(kind, role) for role in _ROLES), _files(kind)) for kind in TABLE]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _has(kind: Kind, role: Holder) -> str:
    amounts = (
        "all machines'" if place.everyones else "its own" if kind.each else "yes"
        for place in kind.places
        if place.holder == role
    )
    return ", ".join(dict.fromkeys(amounts))


def _files(kind: Kind) -> str:
    files = dict.fromkeys(f"`{place.path}` ({place.owner})" for place in kind.places)
    return "<br>".join(files) or "in no artifact"
