"""Keys and certificates in memory: deterministic once the key exists, no I/O, no clock.

Certificates are a pure function of keys, names, times and the serial seed: ECDSA signs deterministically (RFC 6979),
RSA signs with PKCS #1 v1.5, and the serial number is a keyed digest of everything else in the certificate.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from ipaddress import IPv4Address

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from recipes.kit.model import KeyType
from recipes.kit.profiles import KeyPair

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


@dataclass(frozen=True, slots=True)
class Subject:
    """What a certificate says of its holder. sans: DNS names and IPv4 addresses as text."""

    common_name: str
    organization: str | None = None
    server: bool = False
    client: bool = False
    sans: tuple[str, ...] = ()


def new_key(key_type: KeyType) -> bytes:
    """A fresh private key, PKCS #8 PEM, unencrypted (etcd refuses encrypted ones)."""
    key: PrivateKey
    match key_type:
        case "ecdsa-p256":
            key = ec.generate_private_key(ec.SECP256R1())
        case "ecdsa-p384":
            key = ec.generate_private_key(ec.SECP384R1())
        case _:
            key = rsa.generate_private_key(public_exponent=65537, key_size=int(key_type.removeprefix("rsa-")))
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@lru_cache(maxsize=256)
def load_key(pem: bytes) -> PrivateKey:
    """The key in a PEM; ValueError or TypeError if it is none, or of a kind that was never minted here."""
    # The costly proof that an RSA key's numbers fit is left out: the store compares every key file with its digest.
    key = load_pem_private_key(pem, password=None, unsafe_skip_rsa_key_validation=True)
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise TypeError("neither an ECDSA nor an RSA key")
    return key


@lru_cache(maxsize=64)
def load_certificate(pem: bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem)


def public_pem(key_pem: bytes) -> bytes:
    return load_key(key_pem).public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def private_number(key_pem: bytes) -> bytes:
    """The number that makes it secret, of RSA one of the primes. Without the zeros before it: so every encoding of the
    key holds it, whether of a fixed length or of the least."""
    key = load_key(key_pem)
    if isinstance(key, rsa.RSAPrivateKey):
        return key.private_numbers().p.to_bytes(key.key_size // 16, "big")
    return key.private_numbers().private_value.to_bytes((key.key_size + 7) // 8, "big").lstrip(b"\0")


def authority(subject: Subject, key_pem: bytes, *, start: datetime, end: datetime, serial_seed: bytes) -> bytes:
    """A self-signed CA certificate that may sign leaves only, PEM."""
    key = load_key(key_pem)
    builder = (
        _builder(subject, key, start, end)
        .issuer_name(_name(subject))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key())
            ),
            critical=False,
        )
    )
    return _sign(builder, key, serial_seed)


def leaf(
    subject: Subject, key_pem: bytes, issuer: KeyPair, *, start: datetime, end: datetime, serial_seed: bytes
) -> bytes:
    """A leaf certificate signed by issuer, PEM; it never outlives its issuer."""
    key, issuer_key = load_key(key_pem), load_key(issuer.key_pem)
    issuer_certificate = load_certificate(issuer.cert_pem)
    purposes = [
        *([ExtendedKeyUsageOID.SERVER_AUTH] if subject.server else []),
        *([ExtendedKeyUsageOID.CLIENT_AUTH] if subject.client else []),
    ]
    issuer_identifier = issuer_certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = (
        _builder(subject, key, start, min(end, issuer_certificate.not_valid_after_utc))
        .issuer_name(issuer_certificate.subject)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(enciphers_keys=isinstance(key, rsa.RSAPrivateKey)), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_identifier), False)
    )
    if subject.sans:
        builder = builder.add_extension(x509.SubjectAlternativeName([*map(_alternative, subject.sans)]), critical=False)
    return _sign(builder, issuer_key, serial_seed)


def _builder(subject: Subject, key: PrivateKey, start: datetime, end: datetime) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .public_key(key.public_key())
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _sign(builder: x509.CertificateBuilder, key: PrivateKey, serial_seed: bytes) -> bytes:
    p384 = isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP384R1)
    algorithm = hashes.SHA384() if p384 else hashes.SHA256()
    deterministic = True if isinstance(key, ec.EllipticCurvePrivateKey) else None
    # The draft has everything but the serial number, so no two different certificates share one: it is signed only
    # because the library gives the to-be-signed bytes of nothing else.
    draft = builder.serial_number(1).sign(key, algorithm, ecdsa_deterministic=deterministic)
    digest = hmac.digest(serial_seed, draft.tbs_certificate_bytes, "sha256")
    # 159 bits, the highest always set: positive and of one length, within RFC 5280's 20 octets.
    serial = (int.from_bytes(digest[:20], "big") >> 1) | 1 << 158
    certificate = builder.serial_number(serial).sign(key, algorithm, ecdsa_deterministic=deterministic)
    return certificate.public_bytes(Encoding.PEM)


def _name(subject: Subject) -> x509.Name:
    parts = [x509.NameAttribute(NameOID.COMMON_NAME, subject.common_name)]
    if subject.organization is not None:
        parts.insert(0, x509.NameAttribute(NameOID.ORGANIZATION_NAME, subject.organization))
    return x509.Name(parts)


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(IPv4Address(name))
    except ValueError:
        return x509.DNSName(name)


def _usage(*, signs_certificates: bool = False, enciphers_keys: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=enciphers_keys,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def sign(key_pem: bytes, data: bytes) -> bytes:
    """ECDSA with SHA-256 (DER), always the same for the same key and data (RFC 6979)."""
    key = load_key(key_pem)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TypeError("manifests are signed with an elliptic curve key")
    return key.sign(data, ec.ECDSA(hashes.SHA256(), deterministic_signing=True))


def signed(public_pem: bytes, signature: bytes, data: bytes) -> bool:
    """Whether this is the signature of sign() by that key."""
    key = load_pem_public_key(public_pem)
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise TypeError("manifests are signed with an elliptic curve key")
    try:
        key.verify(signature, data, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def new_ssh_host_key() -> tuple[bytes, str]:
    """An Ed25519 host key: OpenSSH's private format (which has a random number in it), and the public line."""
    key = Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), public
