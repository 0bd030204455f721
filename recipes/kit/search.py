"""Finds secrets in bytes: known ones by their value, in whatever form, and unknown ones by their looks.

Looked into is what a text holds in base64, hexadecimal or PEM, behind JSON's or YAML's escapes, and what is gzipped;
one within another. What is no text is searched for values and DER private keys only: programs bring PEM keys of their
own tests.
"""

from __future__ import annotations

import binascii
import re
import string
import zlib
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

_DEPTH = 4  # encodings within each other
_LARGEST = 64 << 20  # bytes that gzip members may unpack to; the rest is not looked at
_SHORTEST = 16  # characters of a run that is looked at
_NUMBER = 32  # bytes, and no number has less, but for zeros before it

_ESCAPE = b"\\"
_DIGITS = f"{string.ascii_letters}{string.digits}+/".encode()  # base64's
_ONLY_RUNS = bytes(byte if byte in _DIGITS else 0x20 for byte in range(256))
_WORD = re.compile(rb"(?<![A-Za-z0-9])[a-z0-9]{16}(?![A-Za-z0-9])")
_HEX = re.compile(rb"(?:[0-9a-fA-F]{2}){32,}")
_WRAPPED = re.compile(rb"\n(?<=[A-Za-z0-9+/]{60}\n)\s*(?=[A-Za-z0-9+/])")  # base64 goes on in the next line
_PEM = re.compile(rb"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----([A-Za-z0-9+/=\s]*)")
# PKCS #8 (a number, then an algorithm), SEC 1 (1, then a number of a curve's size) and PKCS #1 (0, then a modulus).
_DER = re.compile(
    rb"\x30(?:[\x10-\x7f]|\x81.|\x82..)(?:\x02\x01[\x00\x01]\x30[\x05-\x20]\x06[\x03-\x0a]"
    rb"|\x02\x01\x01\x04[\x20\x30\x42]|\x02\x01\x00\x02[\x40-\x82])",
    re.DOTALL,
)
_TOKEN = re.compile(rb"(?<![A-Za-z0-9.])[a-z0-9]{6}\.([a-z0-9]{16})(?![A-Za-z0-9])")
_KUBECONFIG = re.compile(rb"\bkind[\"']?:\s*[\"']?Config\b")
_CREDENTIAL = re.compile(rb"[\s\"'{,](?:token|password)[\"']?:\s*[\"']?(?![a-z0-9]{6}\.[a-z0-9]{16}\b)[^\s\"']")
_MASTERS = b"system:masters"  # a group that may do everything, by no binding that could be taken back


@dataclass(frozen=True, slots=True)
class Found(Generic[T]):
    """What some bytes hold. looks: what it looks like, of secrets that are not known."""

    known: frozenset[T]
    looks: frozenset[str]


@dataclass(frozen=True, slots=True)
class Known(Generic[T]):
    """Values that can be found, each with what it is. Of words and blobs there may be any number; each of the others
    costs time."""

    texts: Mapping[bytes, T] = field(default_factory=dict)
    numbers: Mapping[bytes, T] = field(default_factory=dict)  # 32 random bytes and more, so that they are no text
    words: Mapping[bytes, T] = field(default_factory=dict)  # 16 small letters and digits, neither before nor behind
    blobs: Mapping[bytes, T] = field(default_factory=dict)  # what a PEM private key decodes to

    def search(self, data: bytes) -> Found[T]:
        known: set[T] = set()
        looks: set[str] = set()
        for part, runs in _parts(data, _DEPTH):
            if runs is None:
                known |= (here := self._keys(part))
                if _DER.search(part) and not here:
                    looks.add("a private key (DER)")
                if part.startswith(b"\x30\x82") and _MASTERS in part:
                    looks.add(f"a certificate of {_MASTERS.decode()}")
                continue
            known |= {what for value, what in self.texts.items() if value in part}
            words = {word for run in runs for word in _WORD.findall(run)}
            known |= {self.words[word] for word in words if word in self.words}
            looks.update(self._unknown_credentials(part, words))
            for body in _PEM.findall(part) if runs else ():
                known |= (here := self._keys(_decoded(body)))
                if not here:
                    looks.add("a private key (PEM)")
        return Found(frozenset(known), frozenset(looks))

    def _keys(self, blob: bytes) -> set[T]:
        if len(blob) <= _NUMBER:  # mostly a digest
            return {self.numbers[form] for form in (blob, blob.lstrip(b"\0")) if form in self.numbers}
        found = {what for value, what in self.numbers.items() if value in blob}
        return found | ({self.blobs[blob]} if blob in self.blobs else set())

    def _unknown_credentials(self, text: bytes, words: Set[bytes]) -> Iterator[str]:
        possible = any(b"." + word in text for word in words if word not in self.words)
        if possible and any(secret not in self.words for secret in _TOKEN.findall(text)):
            yield "a bootstrap token"
        if b"Config" in text and _KUBECONFIG.search(text) and _CREDENTIAL.search(text):
            yield "a kubeconfig with a credential"


def _parts(data: bytes, depth: int) -> Iterator[tuple[bytes, list[bytes] | None]]:
    """The data and all that is encoded in it; of texts (without escapes) the runs of base64's digits, else None."""
    if data.startswith(b"\x1f\x8b"):
        data = _gunzipped(data)
    if not _is_text(data):
        yield data, None
        return
    if _ESCAPE in data:
        yield data, []
        data = data.replace(b"\\n", b"\n").replace(_ESCAPE, b"")
    data = data.replace(b"\r\n", b"\n")
    runs = _runs(data)
    yield data, runs
    if not depth:
        return
    yield from ((binascii.unhexlify(run), None) for run in runs if _HEX.fullmatch(run))
    joined = _WRAPPED.sub(b"", data)
    for run in runs if len(joined) == len(data) else _runs(joined):
        if not _HEX.fullmatch(run):
            yield from _parts(_decoded(run), depth - 1)


def _runs(text: bytes) -> list[bytes]:
    return [run for run in text.translate(_ONLY_RUNS).split() if len(run) >= _SHORTEST]


def _is_text(data: bytes) -> bool:
    if b"\0" in data:
        return False
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _decoded(base64: bytes) -> bytes:
    """As far as it is base64: what is cut off at its end is left out."""
    digits = b"".join(base64.split()).rstrip(b"=")
    if len(digits) % 4 == 1:
        digits = digits[:-1]
    return binascii.a2b_base64(digits + b"=" * (-len(digits) % 4))


def _gunzipped(data: bytes) -> bytes:
    """What the members hold, as far as they can be read."""
    unpacked = b""
    while data.startswith(b"\x1f\x8b") and len(unpacked) < _LARGEST:
        member = zlib.decompressobj(wbits=31)
        try:
            unpacked += member.decompress(data, _LARGEST - len(unpacked))
        except zlib.error:
            break
        data = member.unused_data
    return unpacked
