"""Leaves secrets out of text: by their looks, and those of this machine by their very values."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable

from machine.system import System

HIDDEN = "[removed]"

_PEM = re.compile(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY.*?(?:-----END [A-Z0-9 ]*PRIVATE KEY-----|\Z)", re.DOTALL)
_PEM_END = re.compile(r"\A(?:(?!-----BEGIN ).)*?-----END [A-Z0-9 ]*PRIVATE KEY-----", re.DOTALL)  # the rest of one
_BOOTSTRAP_TOKEN = re.compile(r"(?<![a-z0-9])[a-z0-9]{6}\.[a-z0-9]{16}(?![a-z0-9])")
_JWT = re.compile(r"\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*")
_HEADER = re.compile(r"((?:proxy-)?authorization[\"']?[ \t]*[:=][ \t]*)(\S[^\r\n]*)", re.IGNORECASE)
_BEARER = re.compile(r"\b(bearer[ \t]+)([\w.~+/=-]+)", re.IGNORECASE)
_URL = re.compile(r"(\b[a-z][a-z0-9+.-]{0,20}://)([^\s/@:]*:[^\s/@]+)(?=@)", re.IGNORECASE)
# The name of a value ends so: token, bootstrap-token, "token-secret", AUTH_PASS, PrivateKey.
_NAMED = re.compile(
    r"""((?:client-key-data|(?<!initial-cluster-)token|token-secret|secret|passw(?:or)?d|passphrase|auth[_-]?pass|identitytoken
        |(?:private|preshared|api|access|secret)[_-]?key|(?<=["'])auth)["']?[ \t]*[:=][ \t]*)
        ("(?:[^"\\\n]|\\.)*"|'[^'\n]*'|[^\s"',;&}\]]+)""",
    re.IGNORECASE | re.VERBOSE,
)
# Where a blank stands between name and value: command lines, and configuration files that are made like that.
_SPACED = re.compile(
    r"(?<!\S)((?:--?(?:password|passwd|token|secret)|auth_pass|(?:wpa-)?psk)[ \t]+)(\S+)", re.IGNORECASE
)
_LOGIN = re.compile(r"(?<!\S)((?:-u|--user)[ \t]+[^\s:]+:)(\S+)")
_WORD = re.compile(r"[A-Za-z0-9+/_=-]{10,}")

# Where this machine's secrets lie. What is named or looks like one in there is one, wherever else it turns up.
_PLACES = (
    *("etc/kubernetes/pki/*.key", "etc/etcd/pki/*.key", "etc/kubernetes/*.conf", "etc/kubernetes/encryption.yaml"),
    *(
        "etc/nodebake/objects/*",
        "var/lib/kubelet/pki/*.pem",
        "var/lib/kubelet/config.json",
        "var/lib/kubelet/*.conf",
    ),
    *("var/lib/kubelet/kubeconfig", "etc/ssh/ssh_host_*_key", "run/nodebake-controller/*"),
)


def _encodings(word: bytes) -> tuple[str, ...]:
    """What base64 makes of a word, wherever in its groups of three bytes it begins."""
    made = []
    for shift in range(3):
        whole = (len(word) + shift) // 3 * 3 - shift
        text = base64.b64encode(bytes(shift) + word[:whole]).decode()
        made.append(text[4:] if shift else text)
    return tuple(made)


_ENCODED_KEY = _encodings(b"PRIVATE KEY")


class Scrubber:
    """known: values that are secrets, whatever they look like."""

    def __init__(self, known: Iterable[str] = ()) -> None:
        values = {value for value in known if len(value) >= 4}
        self._words = {value for value in values if _WORD.fullmatch(value)}
        self._others = sorted(values - self._words, key=len, reverse=True)

    @classmethod
    def of(cls, system: System) -> Scrubber:
        """One that knows this machine's secrets, as far as this user may read them."""
        texts = [system.text(path, 64 << 20) for place in _PLACES for path in system.glob(place)]
        return cls(value for text in texts if text is not None for value in _secrets(text))

    def scrub(self, text: str) -> str:
        text = _PEM_END.sub(HIDDEN, text)
        text = _PEM.sub(HIDDEN, text)
        text = _HEADER.sub(rf"\g<1>{HIDDEN}", text)
        text = _BEARER.sub(rf"\g<1>{HIDDEN}", text)
        text = _URL.sub(rf"\g<1>{HIDDEN}", text)
        text = _NAMED.sub(rf"\g<1>{HIDDEN}", text)
        text = _SPACED.sub(rf"\g<1>{HIDDEN}", text)
        text = _LOGIN.sub(rf"\g<1>{HIDDEN}", text)
        text = _JWT.sub(HIDDEN, text)
        text = _BOOTSTRAP_TOKEN.sub(HIDDEN, text)
        for value in self._others:
            text = text.replace(value, HIDDEN)
        return _WORD.sub(self._word, text)

    def _word(self, found: re.Match[str]) -> str:
        word = found[0]
        if word in self._words or word.strip("=") in self._words or any(key in word for key in _ENCODED_KEY):
            return HIDDEN
        return word


def _secrets(text: str) -> Iterable[str]:
    """The values in a file that holds secrets."""
    for block in _PEM.findall(text):
        yield from (line for line in block.splitlines() if not line.startswith("-----"))
    for _, value in _NAMED.findall(text):
        yield from _parts(value.strip("\"'"))
    for token in _BOOTSTRAP_TOKEN.findall(text):
        yield from _parts(token)
    try:
        auths = json.loads(text)["auths"].values()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return
    for each in auths:
        pair = base64.b64decode(str(each.get("auth", "")) if isinstance(each, dict) else "").decode(errors="replace")
        yield pair
        yield pair.partition(":")[2]


def _parts(value: str) -> Iterable[str]:
    """A value, and the longer parts of it; a bootstrap token's id alone is no secret."""
    yield value
    yield value.strip("=")
    yield from (part for part in value.split(".")[1:] if len(part) >= 10)
