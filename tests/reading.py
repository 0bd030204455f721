"""What is in a machine's files, as those who read them see it: each format by a parser of its own.

Values come out as trees of dict, list, tuple and str; what knows no quotes as lines of words. Whoever compares two such
trees sees a further key, line, directive or word.
"""

from __future__ import annotations

import base64
import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import yaml
from cryptography import x509

from recipes.kit import places
from recipes.kit.model import File

YAML = re.compile(r"/etc/(kubernetes|nodebake/objects)/.*\.(yaml|conf)|(user|meta)-data|network-config")
INI = re.compile(r"/etc/systemd/.*\.(service|timer|conf)")
# What follows from all bytes together: digests, sizes, and ids made of them.
_FOLLOWS = re.compile(r"\b[0-9a-f]{64}\b|\b[0-9a-f]{16}\b|\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b")


@lru_cache(maxsize=1024)
def content(file: File) -> Any:
    """AssertionError: it is not what its kind of file is."""
    if file.data is None:
        return ("link to", file.link)
    text = file.data.decode("utf-8", "surrogateescape")
    if file.path.endswith((".key", ".sig", ".pub", "ssh_host_ed25519_key")):
        return "a key or a signature"
    if file.path.endswith(".crt") and "/certs.d/" not in file.path:  # there lies what the operator gave
        return certificate(file.data)
    if file.path.endswith(".json"):
        return of_json(json.loads(text, object_pairs_hook=_unique))
    if file.path.endswith(".toml"):
        return tomllib.loads(text)
    if file.path.endswith(".env"):
        return environment(text)
    if YAML.fullmatch(file.path) and text.startswith('{"apiVersion":'):  # JSON, whatever its name ends with
        return of_json(json.loads(text, object_pairs_hook=_unique))
    if YAML.fullmatch(file.path):
        return [of_yaml(node) for node in yaml.compose_all(text, Loader=places.LOADER)]
    if INI.fullmatch(file.path):
        return ini(text)
    return words(text)


def words(text: str) -> Any:
    """Lines of words; what stands between quotes is one, as it is meant."""
    return tuple(tuple(map(_meant, _WORD.findall(line))) for line in text.split("\n"))


_WORD = re.compile(r'"(?:[^"\\]|\\.)*"|\S+')


def _meant(word: str) -> str:
    try:
        return str(json.loads(word)) if word.startswith('"') else word
    except ValueError:
        return word


def leaf(text: str) -> Any:
    """A value that may be a small file itself."""
    if "\n" in text:
        return words(text)
    return text


def of_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        made = {key: of_json(item) for key, item in value.items() if key != "size"}
        if set(made) == {"auth"}:  # a registry's
            return base64.b64decode(made["auth"]).decode().split(":", 1)
        if "ref" in made and "dependsOn" in made:  # by name, in the order of names
            made["dependsOn"] = dict.fromkeys(made["dependsOn"])
        return made
    if isinstance(value, list):
        items = [of_json(item) for item in value]
        named = all(isinstance(item, dict) and "ref" in item for item in items)
        return _unique([(item["ref"], item) for item in items]) if items and named else items
    return leaf(value) if isinstance(value, str) else value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs), f"a key stands twice: {[key for key, _ in pairs]}"
    return dict(pairs)


def of_yaml(node: yaml.Node | None) -> Any:
    """As a reader of YAML 1.1 and one of 1.2 take it, which must be the same."""
    if isinstance(node, yaml.MappingNode):
        return {
            key: _embedded(item) if key.endswith("-data") else item
            for key, item in _unique([(_text(key), of_yaml(value)) for key, value in node.value]).items()
        }
    if isinstance(node, yaml.SequenceNode):
        return [of_yaml(item) for item in node.value]
    assert isinstance(node, yaml.ScalarNode)
    return leaf(_text(node)) if node.tag == "tag:yaml.org,2002:str" else (node.tag, node.value)


def _text(node: yaml.Node) -> str:
    assert isinstance(node, yaml.ScalarNode)
    bare = not node.style  # libyaml says "", PyYAML None
    assert not bare or places.is_text(node.value), f"some readers take {node.value!r} for something else than text"
    return str(node.value)


def _embedded(data: str) -> Any:
    decoded = base64.b64decode(data)
    return "a key" if b"PRIVATE KEY" in decoded else certificate(decoded)


def certificate(data: bytes) -> Any:
    made = x509.load_pem_x509_certificate(data)
    if made.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
        return "a CA"  # of the secret store, whatever the cluster file says today
    subject = [(part.oid.dotted_string, str(part.value)) for part in made.subject]
    try:
        names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return {"subject": subject}
    return {"subject": subject, "names": {str(name.value): type(name).__name__ for name in names}}


_LINE = re.compile(r"[A-Z_]+='[^'\\]*'")


def environment(text: str) -> dict[str, Any]:
    """As systemd and a shell read it, which must be the same."""
    lines = [line for line in text.split("\n") if line and not line.startswith("#")]
    assert all(_LINE.fullmatch(line) for line in lines), lines
    told = _unique([(line.partition("=")[0], line.partition("=")[2][1:-1]) for line in lines])
    clean = ["env", "-i", "PATH=/usr/bin:/bin", "sh", "-euc", "set -a; . /dev/stdin; env -0"]
    done = subprocess.run(clean, input=text.encode("utf-8", "surrogateescape"), capture_output=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    sourced = dict(entry.split("=", 1) for entry in done.stdout.decode("utf-8", "surrogateescape").split("\0") if entry)
    assert {key: value for key, value in sourced.items() if key not in ("PATH", "PWD", "OLDPWD", "SHLVL", "_")} == told
    labels = [label.split("=", 1) for label in told["NODE_LABELS"].split(",") if label]
    return {**told, "NODE_LABELS": dict(labels)}


def ini(text: str) -> Any:
    """A unit's lines: section, key, and the words of a command line or of the value."""
    section, found = "", []
    for line in text.replace("\\\n", " ").split("\n"):
        line = line.strip()
        if line.startswith("["):
            section = line
        elif line and not line.startswith(("#", ";")):
            key, equals, value = line.partition("=")
            assert equals, line
            split = shlex.split(value) if key.startswith("Exec") else value.split()
            found.append((section, key, tuple(word.replace("%%", "%").replace("$$", "$") for word in split)))
    return tuple(found)


def replaced(tree: Any, changes: Mapping[str, str]) -> Any:
    """The same tree with other values in its texts, and without what follows from all bytes together."""
    if isinstance(tree, str):
        return leaf(_swapped(tree, changes))
    if isinstance(tree, Mapping):
        return {_swapped(key, changes): replaced(item, changes) for key, item in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(replaced(item, changes) for item in tree)
    return tree


def _swapped(text: str, changes: Mapping[str, str]) -> str:
    made = re.sub("|".join(map(re.escape, changes)), lambda found: changes[found[0]], text) if changes else text
    return _FOLLOWS.sub("#", made)
