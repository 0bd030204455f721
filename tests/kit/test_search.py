"""Secrets in bytes: known ones in every form, unknown ones by their looks, and nothing else."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from recipes.kit import pki
from recipes.kit.profiles import KeyPair
from recipes.kit.search import Found, Known
from tests import samples

YEAR = timedelta(days=365)
NUMBER = bytes(range(0x80, 0xA0))
TOKEN = b"zq3w9x0k5m7n1p2r"
KNOWN = Known(texts={b"robot:wonder ful": "password"}, numbers={NUMBER: "number"}, words={TOKEN: "token"})
NOTHING: Found[str] = Found(frozenset(), frozenset())

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey
KEYS: dict[str, Callable[[], Key]] = {
    "P-256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "P-384": lambda: ec.generate_private_key(ec.SECP384R1()),
    # One in 256 keys: its number begins with a zero, which OpenSSH leaves out.
    "P-256, zero first": lambda: ec.derive_private_key(int.from_bytes(bytes(range(1, 32))), ec.SECP256R1()),
    "P-384, zero first": lambda: ec.derive_private_key(int.from_bytes(bytes(range(1, 48))), ec.SECP384R1()),
    "RSA": lambda: rsa.generate_private_key(public_exponent=65537, key_size=2048),
}
FORMS = {
    "PKCS8": PrivateFormat.PKCS8,
    "traditional": PrivateFormat.TraditionalOpenSSL,
    "OpenSSH": PrivateFormat.OpenSSH,
}
# How a text may lie in another.
WRAPPED: dict[str, Callable[[bytes], bytes]] = {
    "alone": lambda text: text,
    "Windows' lines": lambda text: text.replace(b"\n", b"\r\n"),
    "JSON": lambda text: json.dumps({"a": "b", "key": text.decode()}).encode(),
    "JSON in JSON": lambda text: json.dumps({"all": json.dumps({"key": text.decode()})}).encode(),
    "YAML": lambda text: yaml.safe_dump({"a": {"key": text.decode()}}, width=1000).encode(),
    "a YAML block": lambda text: b"key: |\n" + b"".join(b"    " + line + b"\n" for line in text.splitlines()),
    "base64": lambda text: b"client-key-data: " + base64.b64encode(text) + b"\n",
    "base64 in lines": lambda text: b"data:\n" + base64.encodebytes(text),
    "base64 twice": lambda text: json.dumps({"data": base64.b64encode(base64.b64encode(text)).decode()}).encode(),
    "gzip": lambda text: gzip.compress(b"before\n" + text),
    "gzip, second member": lambda text: gzip.compress(b"before\n") + gzip.compress(text),
    "gzip in base64": lambda text: b"data: " + base64.b64encode(gzip.compress(text)),
}
wrapped = pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)


@wrapped
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("kind", KEYS)
def test_a_private_key_is_found_in_every_form(kind: str, form: PrivateFormat, wrap: Callable[[bytes], bytes]) -> None:
    key = KEYS[kind]()
    number = pki.private_number(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    known = Known(numbers={number: "mine"})
    text = wrap(key.private_bytes(Encoding.PEM, form, NoEncryption()))
    assert known.search(text) == Found(frozenset({"mine"}), frozenset())
    assert "a private key (PEM)" in KNOWN.search(text).looks
    if form is not PrivateFormat.OpenSSH:
        binary = key.private_bytes(Encoding.DER, form, NoEncryption())
        for data in (binary, wrap(base64.b64encode(binary)), b"\0\1\2" + binary + b"\3"):
            assert known.search(data) == Found(frozenset({"mine"}), frozenset())
            assert KNOWN.search(data).looks == {"a private key (DER)"}


@wrapped
def test_an_ssh_host_key_is_found_by_what_its_pem_decodes_to(wrap: Callable[[bytes], bytes]) -> None:
    private, _ = pki.new_ssh_host_key()
    blob = base64.b64decode(b"".join(private.splitlines()[1:-1]))
    assert Known(blobs={blob: "mine"}).search(wrap(private)) == Found(frozenset({"mine"}), frozenset())
    assert KNOWN.search(wrap(private)).looks == {"a private key (PEM)"}


def test_an_encrypted_key_is_a_key() -> None:
    key = KEYS["P-256"]()
    for form in (PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL):
        text = key.private_bytes(Encoding.PEM, form, BestAvailableEncryption(b"secret"))
        assert KNOWN.search(text).looks == {"a private key (PEM)"}


@wrapped
@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b"secret: " + base64.b64encode(NUMBER), "number"),
        (b"secret: " + NUMBER.hex().encode(), "number"),
        (b"secret: " + NUMBER.hex().upper().encode(), "number"),
        (b"token-secret: " + TOKEN, "token"),
        (b"kind: Config\nusers:\n- user:\n    token: abc123." + TOKEN, "token"),
        (b"https://robot:wonder ful@registry.example", "password"),
    ],
)
def test_a_known_value_is_found(text: bytes, what: str, wrap: Callable[[bytes], bytes]) -> None:
    assert KNOWN.search(wrap(text + b"\n")) == Found(frozenset({what}), frozenset())


def test_a_password_with_a_backslash_is_found() -> None:
    known = Known(texts={b'robot:a\\b"c, d': "password"})
    assert known.search(b'robot:a\\b"c, d').known == {"password"}
    auth = {"auth": base64.b64encode(b'robot:a\\b"c, d').decode()}
    assert known.search(json.dumps(auth).encode()).known == {"password"}


@given(st.text(), st.text(), st.sampled_from([base64.b64encode(NUMBER), NUMBER.hex().encode(), TOKEN]))
def test_whatever_is_around_it(before: str, behind: str, value: bytes) -> None:
    assert KNOWN.search(f"{before}\n".encode() + value + f" {behind}".encode()).known <= {"number", "token"}
    if "\0" not in before + behind:
        assert KNOWN.search(f'{before}\n"'.encode() + value + f'" {behind}'.encode()).known


@given(st.binary())
def test_bytes_of_any_kind_are_searched(data: bytes) -> None:
    KNOWN.search(data)
    KNOWN.search(b"\x1f\x8b" + data)
    KNOWN.search(gzip.compress(data)[:-3])


@pytest.mark.parametrize(
    ("text", "look"),
    [
        (b"token: abc123.0123456789abcdef\n", "a bootstrap token"),
        (
            b"apiVersion: v1\nkind: Config\nusers:\n- name: a\n  user:\n    token: eyJhbGci",
            "a kubeconfig with a credential",
        ),
        (b'{"kind":"Config","users":[{"user":{"password":"x"}}]}', "a kubeconfig with a credential"),
        (b"kind: Config\nusers:\n- user:\n    password: 'hunter'\n", "a kubeconfig with a credential"),
    ],
)
def test_what_is_unknown_is_known_by_its_looks(text: bytes, look: str) -> None:
    assert KNOWN.search(text).looks == {look}


@wrapped
def test_a_certificate_of_the_almighty_group_is_found(wrap: Callable[[bytes], bytes]) -> None:
    seed, start = bytes(32), datetime(2026, 1, 1, tzinfo=UTC)
    key = pki.new_key("ecdsa-p256")
    issuer = KeyPair(pki.authority(pki.Subject("ca"), key, start=start, end=start + YEAR, serial_seed=seed), key)
    for organization, looks in (("system:masters", {"a certificate of system:masters"}), ("nodes", set())):
        subject = pki.Subject("someone", organization, client=True)
        certificate = pki.leaf(subject, key, issuer, start=start, end=start + YEAR, serial_seed=seed)
        assert KNOWN.search(wrap(certificate)).looks == looks


@pytest.mark.parametrize(
    "text",
    [
        b"ab" * 32 + b"  opt/nodebake/1234567890abcdef/bin/kube-controller-manager\n",
        b"opt/nodebake/1234567890abcdef: file.1234567890abcdef\n",
        b'_PEM = re.compile(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY.*?(?:-----END [A-Z0-9 ]*PRIVATE KEY-----|\\Z)")\n',
        b"kind: Config\nusers:\n- user:\n    client-key: /var/lib/kubelet/pki/kubelet-client-current.pem\n",
        b"kind: Role\nrules:\n- token: yes\n",
        samples.SSH_KEY.encode(),
    ],
)
def test_nothing_else_is(text: bytes) -> None:
    assert KNOWN.search(text) == NOTHING


def test_a_programs_own_test_keys_are_none() -> None:
    pem = KEYS["P-256"]().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    assert KNOWN.search(b"\x7fELF\0" + pem + b"\0") == NOTHING
