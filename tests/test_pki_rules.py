"""Certificates by the rules of RFC 5280, judged by pkilint: all that are baked, and those that control planes make."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from controller import credentials
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from pkilint.loader import RFC5280CertificateDocumentLoader
from pkilint.pkix import certificate, extension, name
from pkilint.validation import ValidationFindingSeverity

from recipes import certificates
from recipes.kit import pki, store
from recipes.kit.model import Cluster, Endpoint, KeyType, Validity
from recipes.kit.profiles import AUTHORITIES, DESK, holds, profiles_of
from recipes.kit.store import Secrets
from tests import samples
from tests.test_certificates import data, embedded

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
LINTER = certificate.create_pkix_certificate_validator_container(
    certificate.create_decoding_validators(name.ATTRIBUTE_TYPE_MAPPINGS, extension.EXTENSION_MAPPINGS),
    [
        certificate.create_issuer_validator_container([]),
        certificate.create_validity_validator_container(),
        certificate.create_subject_validator_container([]),
        certificate.create_extensions_validator_container([]),
        certificate.create_spki_validator_container([]),
    ],
)
# pkilint wants a dot in every name, as public ones have. RFC 1034, section 3.5, which RFC 5280 goes by, does not.
ONE_LABEL = re.compile(r'Invalid domain name syntax: "[a-z]([a-z0-9-]{0,61}[a-z0-9])?"')
CLUSTERS = {
    "stacked": samples.ha(
        name="a" * 63,  # the longest there may be: organizations have up to 64 characters
        dns_domain="bake.test",
        vip=IPv4Address("192.168.10.9"),
        control_plane_endpoint=Endpoint("k8s.example.org", 443),
        cert_sans=("api.example.org", "10.1.2.3"),
    ),
    "external etcd": samples.external_etcd(),
    "load balancers": samples.balanced(),
    "one machine": samples.single(),
}


def findings(pem: bytes) -> list[str]:
    """What pkilint finds that is more than a remark."""
    document = RFC5280CertificateDocumentLoader().load_pem_document(pem.decode(), "certificate")
    found = [each for result in LINTER.validate(document.root) for each in result.finding_descriptions]
    return [
        f"{each.finding.code}: {each.message}"
        for each in found
        if each.finding.severity <= ValidationFindingSeverity.WARNING and not ONE_LABEL.fullmatch(each.message or "")
    ]


def baked(cluster: Cluster, secrets: Secrets) -> Iterator[tuple[str, bytes]]:
    """(where, PEM) of every certificate in every artifact, and of admin.conf's."""
    for node in cluster.nodes:
        for file in certificates.for_node(cluster, node, secrets):
            if file.path.endswith(".crt"):
                yield f"{node.name}:{file.path}", data(file)
            elif file.path.endswith(".conf"):
                yield f"{node.name}:{file.path}", embedded(data(file), "certificate")
    yield "admin.conf", embedded(certificates.admin_conf(cluster, secrets), "certificate")


@pytest.mark.parametrize(
    ("kind", "key_type"),
    [*((kind, "ecdsa-p256") for kind in CLUSTERS), ("one machine", "ecdsa-p384"), ("one machine", "rsa-2048")],
)
def test_a_linter_finds_nothing_in_what_is_baked(kind: str, key_type: KeyType, tmp_path: Path) -> None:
    cluster = replace(CLUSTERS[kind], key_type=key_type)
    checked = dict(baked(cluster, store.open(tmp_path / "s", cluster, now=NOW)))
    leaves = sum(len(profiles_of(node)) for node in cluster.nodes)
    copies = sum(
        any(holds(node, holder) for holder in holders)
        for node in cluster.nodes
        for authority in AUTHORITIES
        for _, holders in authority.certificates
    )
    assert len(checked) == leaves + copies + 1
    assert {where: found for where, pem in checked.items() if (found := findings(pem))} == {}


@pytest.mark.parametrize("key_type", ["ecdsa-p256", "rsa-2048"])
def test_nor_in_what_the_controller_makes_for_itself(key_type: KeyType, tmp_path: Path) -> None:
    cluster = replace(samples.single(), key_type=key_type)
    pair = store.open(tmp_path / "s", cluster, now=NOW).authorities["kubernetes"]
    authority = credentials.Authority(tmp_path / "ca.crt", tmp_path / "ca.key")
    authority.certificate.write_bytes(pair.cert_pem)
    authority.key.write_bytes(pair.key_pem)
    made = credentials.mint(authority, "nodebake:controller", "system:masters", NOW, NOW + credentials.LIFETIME)
    pem = x509.load_pem_x509_certificate(made).public_bytes(Encoding.PEM)
    assert findings(pem) == []


Spoil = Callable[[x509.CertificateBuilder], x509.CertificateBuilder]
SPOILT: dict[str, tuple[Spoil, str]] = {
    "no authority key id": (lambda builder: builder, "authority_key_identifier_extension_absent"),
    "an authority that says nothing of its key's use": (
        lambda builder: builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), True),
        "ca_certificate_no_ku_extension",
    ),
    "no name for a DNS name": (
        lambda builder: builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("no name.test")]), False),
        "invalid_domain_name_syntax",
    ),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_the_linter_does_find_what_is_wrong(spoilt: str) -> None:
    spoil, code = SPOILT[spoilt]
    key = ec.generate_private_key(ec.SECP256R1())
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "one")]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "another")]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW)
        .not_valid_after(NOW + timedelta(days=1))
    )
    found = findings(spoil(builder).sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))
    assert any(code in each for each in found), found


def test_key_ids_lead_from_each_certificate_to_its_authority(tmp_path: Path) -> None:
    cluster = CLUSTERS["stacked"]
    secrets = store.open(tmp_path / "s", cluster, now=NOW)
    authorities = [pki.load_certificate(pair.cert_pem) for pair in secrets.authorities.values()]
    by_id = {key_id(authority): authority for authority in authorities}
    assert len(by_id) == len({authority.subject for authority in authorities}) == len(AUTHORITIES)
    for where, pem in baked(cluster, secrets):
        made = x509.load_pem_x509_certificate(pem)
        own = x509.SubjectKeyIdentifier.from_public_key(made.public_key()).digest
        assert key_id(made) == own, where
        named = made.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
        assert (named.authority_cert_issuer, named.authority_cert_serial_number) == (None, None)
        issuer = by_id[named.key_identifier or b""]
        assert made.issuer == issuer.subject, where
        made.verify_directly_issued_by(issuer)


def key_id(made: x509.Certificate) -> bytes:
    return made.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest


def test_serial_numbers_are_as_random_as_the_stores_seed(tmp_path: Path) -> None:
    """RFC 5280, section 4.1.2.2: positive, 20 octets at most. 158 bits, each of which hangs on the seed of 256 that
    the system's generator gave: of 64 seeds every bit has both values."""
    cluster = samples.single()
    secrets = store.open(tmp_path / "s", cluster, now=NOW)
    other = store.open(tmp_path / "t", cluster, now=NOW)
    assert len(secrets.serial_seed) == 32 and secrets.serial_seed != other.serial_seed
    numbers = []
    for seed in range(64):
        pem = pki.leaf(
            pki.Subject("one", client=True),
            secrets.leaf_keys[DESK, "admin"],
            secrets.authorities["kubernetes"],
            start=NOW,
            end=NOW + timedelta(days=1),
            serial_seed=seed.to_bytes(32, "big"),
        )
        numbers.append(x509.load_pem_x509_certificate(pem).serial_number)
    assert {number.bit_length() for number in numbers} == {159}
    always, never = numbers[0], ~numbers[0]
    for number in numbers:
        always, never = always & number, never & ~number
    assert (always, never & ((1 << 159) - 1)) == (1 << 158, 0)


def test_the_documentation_has_the_shelf_life() -> None:
    """As it is without a word of it in the cluster file."""
    text = (Path(__file__).parent.parent / "README.md").read_text()
    told = dict(re.findall(r"^\| [^|]+ \| (\d+) days \| `([\w.]+)` \|$", text, re.MULTILINE))
    wanted = {f"validity.{each.name}": getattr(Validity(), each.name) for each in fields(Validity)}
    wanted["installBy"] = samples.ha().install_by
    assert {what: timedelta(days=int(days)) for days, what in told.items()} == wanted
