"""Judges a kubelet's certificate request by the inventory. Pure: no I/O, no clock.

A kubelet asks for three kinds of certificate: its first client certificate with its bootstrap token, its next ones as
the node that it is by then, and its serving certificates, as that node too. With `approval: group` client certificates
are the controller-manager's to approve.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from controller.api import Json
from controller.inventory import Inventory, Kubelet
from controller.log import shown

CLIENT = "kubernetes.io/kube-apiserver-client-kubelet"
SERVING = "kubernetes.io/kubelet-serving"

BOOTSTRAP = "system:bootstrap:"
NODE = "system:node:"
NODES = "system:nodes"

_ALWAYS = frozenset(("digital signature", "key encipherment"))
# What Go's pem.Decode and we read alike: one block, nothing around it, no headers in it.
_PEM = re.compile(
    rb"\s*-----BEGIN CERTIFICATE REQUEST-----[ \t\r]*\n[A-Za-z0-9+/=\s]+-----END CERTIFICATE REQUEST-----\s*"
)


@dataclass(frozen=True, slots=True)
class Request:
    """A CertificateSigningRequest. Who asks is what the API server saw, not what the request says."""

    name: str
    signer: str
    username: str
    groups: tuple[str, ...]
    usages: frozenset[str]
    pem: bytes

    @classmethod
    def of(cls, item: Json) -> Request:
        spec = item["spec"]
        return cls(
            name=item["metadata"]["name"],
            signer=spec["signerName"],
            username=spec.get("username", ""),
            groups=tuple(spec.get("groups", ())),
            usages=frozenset(spec.get("usages", ())),
            pem=base64.b64decode(spec["request"]),
        )


@dataclass(frozen=True, slots=True)
class Pin:
    """A token, the machine that it is for, and the key (SHA-256 of its SubjectPublicKeyInfo, hex) that must be the
    first it asked with."""

    token_id: str
    node: str
    key: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """approve, refuse; wait: the inventory knows nothing of it, a later one may; ignore: somebody else's."""

    decision: Literal["approve", "refuse", "wait", "ignore"]
    why: str  # for people
    pin: Pin | None = None  # approve only if this holds


def judge(request: Request, inventory: Inventory, now: datetime) -> Verdict:
    """now: an aware datetime."""
    client = request.signer == CLIENT
    if client and inventory.approval == "group":
        return Verdict("ignore", "")
    token_id = _behind(BOOTSTRAP, request.username)
    name = _behind(NODE, request.username)
    if token_id is not None:
        kubelet = inventory.by_token.get(token_id)
        whose = f"the token {shown(token_id)}"
    elif name is not None:
        kubelet = inventory.kubelets.get(name)
        whose = f"the node {shown(name)}"
    else:
        return Verdict("wait", "who asks is no kubelet; only a person may approve this")
    if kubelet is None:
        return Verdict(
            "wait",
            f"{whose} is not in the inventory of generation {inventory.generation}; if it shall join, bake the cluster"
            " with it and apply that",
        )
    flaw = (
        (_flaw_of_token(request, kubelet, now) if token_id is not None else _flaw_of_node(request))
        or (f"{kubelet.name} is denied" if kubelet.denied else None)
        or _flaw_of_usages(request.usages, "client auth" if client else "server auth")
    )
    if flaw is not None:
        return Verdict("refuse", flaw)
    asked = _parse(request.pem)
    if isinstance(asked, str):
        return Verdict("refuse", asked)
    flaw = _flaw_of_subject(asked, kubelet) or (_flaw_of_client(asked) if client else _flaw_of_serving(asked, kubelet))
    if flaw is not None:
        return Verdict("refuse", flaw)
    what = "client" if client else "serving"
    pin = Pin(token_id, kubelet.name, _digest(asked)) if token_id is not None else None
    return Verdict("approve", f"{what} certificate of {kubelet.name}, as baked", pin)


def _behind(prefix: str, text: str) -> str | None:
    return text.removeprefix(prefix) if text.startswith(prefix) else None


def _flaw_of_token(request: Request, kubelet: Kubelet, now: datetime) -> str | None:
    if request.signer != CLIENT:
        return "a bootstrap token may ask for a client certificate only"
    if "system:bootstrappers" not in request.groups:
        return "who asks is not in the group system:bootstrappers"
    if now >= kubelet.install_by:
        return f"{kubelet.name} was to be installed by {kubelet.install_by.isoformat()}"
    return None


def _flaw_of_node(request: Request) -> str | None:
    return None if NODES in request.groups else f"who asks is not in the group {NODES}"


def _flaw_of_usages(usages: frozenset[str], needed: str) -> str | None:
    if needed not in usages:
        return f"the usage {needed} is missing"
    extra = usages - _ALWAYS - {needed}
    return f"usages that no kubelet has: {shown(', '.join(sorted(extra)))}" if extra else None


def _parse(pem: bytes) -> x509.CertificateSigningRequest | str:
    """The request in a PEM, its signature checked; or what is wrong with it."""
    if not _PEM.fullmatch(pem):
        return "the request is not one PEM block"
    try:
        asked = x509.load_pem_x509_csr(pem)
        asked.extensions  # noqa: B018 - parsed when asked for
        if not asked.is_signature_valid:
            return "the request's signature is wrong"
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature, x509.DuplicateExtension) as error:
        return f"the request cannot be read: {shown(error)}"
    return asked


def _flaw_of_subject(asked: x509.CertificateSigningRequest, kubelet: Kubelet) -> str | None:
    names = [str(each.value) for each in asked.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    groups = [str(each.value) for each in asked.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)]
    if names != [f"{NODE}{kubelet.name}"]:
        return f"it is for the name {shown(', '.join(names) or 'of nobody')}, and who asks is {kubelet.name}"
    if groups != [NODES]:
        return f"it is for the organization {shown(', '.join(groups) or 'of nobody')}, not {NODES}"
    if len(list(asked.subject)) != 2:
        return "its subject says more than a name and an organization"
    others = [each.oid.dotted_string for each in asked.extensions if not isinstance(each.value, _SANS)]
    return f"it has extensions that no kubelet asks for: {', '.join(others)}" if others else None


_SANS = x509.SubjectAlternativeName


def _alternatives(asked: x509.CertificateSigningRequest) -> list[x509.GeneralName]:
    return [name for each in asked.extensions if isinstance(each.value, _SANS) for name in each.value]


def _flaw_of_client(asked: x509.CertificateSigningRequest) -> str | None:
    return "a client certificate has no alternative names" if len(asked.extensions) else None


def _flaw_of_serving(asked: x509.CertificateSigningRequest, kubelet: Kubelet) -> str | None:
    alternatives = _alternatives(asked)
    if not alternatives:
        return "a serving certificate needs an address or a name"
    for name in alternatives:
        if isinstance(name, x509.IPAddress):
            if str(name.value) not in kubelet.addresses:
                return f"{name.value} is no address of {kubelet.name}"
        elif isinstance(name, x509.DNSName):
            if name.value != kubelet.name:
                return f"{shown(name.value)} is not the name {kubelet.name}"
        else:
            return f"it has an alternative name of the kind {type(name).__name__}"
    return None


def _digest(asked: x509.CertificateSigningRequest) -> str:
    key = asked.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(key).hexdigest()
