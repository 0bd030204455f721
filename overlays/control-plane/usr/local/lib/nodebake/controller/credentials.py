"""Client certificates of ten minutes, minted on the machine from the CA key that lies there for signing anyway."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

LIFETIME = timedelta(minutes=10)
_BACKDATED = timedelta(seconds=30)
_SIGNS = x509.KeyUsage(True, *[False] * 8)  # digital signatures, and nothing else


@dataclass(frozen=True, slots=True)
class Authority:
    """The cluster's CA: paths of its certificate and of its key, PEM."""

    certificate: Path
    key: Path


class Identity:
    """Who the daemon is towards the API server: a certificate and its key in one PEM file that only this user reads.

    Any thread may ask for it. The file is renewed when half of its life is over.
    """

    def __init__(self, authority: Authority, file: Path, common_name: str, organization: str | None = None) -> None:
        self.file = file
        self._authority, self._common_name, self._organization = authority, common_name, organization
        self._lock = threading.Lock()
        self._version = 0
        self._good: tuple[datetime, datetime] | None = None  # from when, and until when it need not be renewed

    def fresh(self) -> int:
        """Sees to it that the file holds a certificate with half of its life left; a number that changes with it."""
        with self._lock:
            # Both sides are looked at: a clock may have been set back.
            if self._good is None or not self._good[0] <= datetime.now(UTC) < self._good[1]:
                self._mint()
            return self._version

    def doubt(self, version: int) -> None:
        """The API server did not take the certificate of that version: the next one is new."""
        with self._lock:
            if version == self._version:
                self._good = None

    def remove(self) -> None:
        with self._lock:
            self.file.unlink(missing_ok=True)
            self._good = None

    def _mint(self) -> None:
        now = datetime.now(UTC).replace(microsecond=0)
        start, end = now - _BACKDATED, now + LIFETIME
        write_private(self.file, mint(self._authority, self._common_name, self._organization, start, end))
        self._version += 1
        self._good = (start, end - LIFETIME / 2)


def mint(authority: Authority, common_name: str, organization: str | None, start: datetime, end: datetime) -> bytes:
    """A fresh P-256 key and a client certificate for it, one PEM."""
    issuer = x509.load_pem_x509_certificate(authority.certificate.read_bytes())
    issuer_key = load_pem_private_key(authority.key.read_bytes(), password=None)
    if not isinstance(issuer_key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise TypeError(f"{authority.key} is neither an ECDSA nor an RSA key")
    key = ec.generate_private_key(ec.SECP256R1())
    names = [x509.NameAttribute(NameOID.COMMON_NAME, common_name)]
    if organization is not None:
        names.insert(0, x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization))
    issuer_identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name(names))
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_SIGNS, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_identifier), False)
        .sign(issuer_key, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return certificate.public_bytes(Encoding.PEM) + private


def write_private(path: Path, data: bytes) -> None:
    """Writes a file of mode 0600 whole; whoever reads it meanwhile finds the old one or the new one."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
        out.write(data)
    temporary.replace(path)
