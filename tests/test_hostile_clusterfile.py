"""A cluster file of somebody who means harm: whatever text stands in whatever field, it is refused with one clear
error, or it arrives on the machines as exactly that text, and as nothing else.

What a machine gets is made twice, once of a harmless file and once of the other; each file is read by a parser of its
own format (reading.py). The two may differ in the one value and in nothing more: no key, line, directive, word or path.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from recipes import certificates, images, node, seed
from recipes.kit import archive, distribution, inventory, overlay, store
from recipes.kit.errors import BakeError, BakeErrors, Place
from recipes.kit.model import Cluster, File
from tests import artifacts, reading, samples

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
IMAGES = {"pause": "registry.k8s.io/pause:3.10.2", "coredns": "registry.k8s.io/coredns/coredns:v1.14.6"}
Loc = tuple[str | int, ...]

# Every text in it stands there once, and in no other file of a machine.
SHARED: dict[str, Any] = {
    "name": "q-cluster",
    "networking": {"dnsDomain": "q-domain.test"},
    "controlPlaneEndpoint": "q-endpoint.test:7443",
    "apiServer": {"certSANs": ["q-san.test"]},
    "machineNetwork": {
        "subnet": "192.168.10.0/24",
        "gateway": "192.168.10.254",
        "nameservers": ["192.168.10.253"],
        "search": ["q-search.test"],
        "ntp": ["q-time.test"],
    },
    "dnsUpstream": ["192.168.10.252:5353"],
    "virtualIP": "192.168.10.251",
    "payloadServer": "http://q-payloads.test:8080/q",
    "debianMirror": "http://q-debian.test/debian",
    "storageClasses": ["q-class"],
    "users": [{"name": "q_user", "sshAuthorizedKeys": [samples.SSH_KEY]}],
    "registries": [
        {
            "host": "q-registry.test:5000",
            "mirrors": ["https://q-mirror.test/q"],
            "ca": "ca.pem",
            "username": "q-puller",
            "passwordFile": "password",
        }
    ],
    "images": [f"q-images.test/q:1@sha256:{'0123456789abcdef' * 4}"],
    "extraObjects": ["objects.yaml"],
    "nodes": [
        {
            "name": "q-control",
            "role": "control-plane",
            "address": "192.168.10.11",
            "extraAddresses": ["10.30.0.11/24"],
            "mac": "52:54:00:00:10:0b",
            "interface": "q-card",
            "serial": "Q-SERIAL",
        },
        {
            "name": "q-worker",
            "role": "worker",
            "media": "thin",
            "denied": True,
            "address": "192.168.10.21",
            "links": [{"name": "q-link", "mac": "52:54:00:00:10:15"}, {"name": "q-other"}],
            "bond": "802.3ad",
            "vlan": 7,
            "labels": {"q-label.test/q-key": "q-value"},
            "taints": ["q-taint=q-tainted:NoSchedule"],
            "storage": "q-storage",
            "volumes": [{"name": "q-volume", "path": "/srv/q-path", "size": "77Gi"}],
        },
    ],
    "pools": [
        {
            "name": "q-pool",
            "role": "worker",
            "count": 1,
            "firstAddress": "192.168.10.31",
            "macs": ["52:54:00:00:10:1f"],
            "serials": ["Q-NUMBER"],
        }
    ],
}
BALANCED = {
    **SHARED,
    "loadBalancer": "nodes",
    "etcd": "external",
    "nodes": [
        *SHARED["nodes"],
        {"name": "q-member", "role": "etcd", "address": "192.168.10.41", "interface": "q-nic"},
        {"name": "q-balancer", "role": "load-balancer", "address": "192.168.10.51", "interface": "q-eth"},
    ],
}
CLUSTERS = {"shared": SHARED, "balanced": BALANCED}


def beside(folder: Path) -> None:
    """The files that a cluster file names."""
    (folder / "ca.pem").write_text("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n")
    (folder / "password").write_text("hunter2\n")
    (folder / "objects.yaml").write_text("apiVersion: q.invalid/v1\nkind: Thing\nmetadata: {name: q}\n")


def slots(tree: Any, loc: Loc = ()) -> Iterator[Loc]:
    """Where a text stands, or (with "[key]" at the end) a key that may be any."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from slots(value, (*loc, key))
            if loc[-1:] == ("labels",):
                yield (*loc, key, "[key]")
    elif isinstance(tree, list):
        for at, value in enumerate(tree):
            yield from slots(value, (*loc, at))
    else:
        yield loc


def at(tree: Any, loc: Loc) -> Any:
    """KeyError, IndexError, TypeError: nothing is there."""
    for step in loc:
        tree = tree[step]
    return tree


def with_text(tree: Any, loc: Loc, text: Any) -> Any:
    if not loc:
        return text
    if loc[1:] == ("[key]",):
        return {text if key == loc[0] else key: value for key, value in tree.items()}
    if isinstance(tree, dict):
        return {key: with_text(value, loc[1:], text) if key == loc[0] else value for key, value in tree.items()}
    return [with_text(value, loc[1:], text) if place == loc[0] else value for place, value in enumerate(tree)]


class Bare(str):
    """A text that stands in the file as it is."""


def written(tree: Any, indent: str = "") -> str:
    """YAML by lines; texts in quotes, with JSON's escapes."""
    if isinstance(tree, dict):
        return "".join(f"{indent}{scalar(key)}:{written_value(value, indent)}" for key, value in tree.items())
    return "".join(f"{indent}-{written_value(value, indent)}" for value in tree)


def written_value(value: Any, indent: str) -> str:
    return f"\n{written(value, indent + '  ')}" if isinstance(value, (dict, list)) else f" {scalar(value)}\n"


def scalar(value: Any) -> str:
    return str(value) if isinstance(value, Bare) else json.dumps(value, ensure_ascii=False)


SLOTS = [
    pytest.param(name, loc, id=f"{name}: {'.'.join(map(str, loc))}")
    for name, tree in CLUSTERS.items()
    for loc in slots(tree)
    if name == "shared" or loc not in set(slots(SHARED))
]

# ---- what somebody might try ----------------------------------------------------------------------------------------

WORDS = (
    *("yes", "no", "on", "off", "y", "n", "null", "~", "true", "1e3", "0x1", "0o17", "017", "1_0", "12:30", "1.5"),
    *("-1", "12e03", ".5", "2027-02-01", "nan", ".inf", "=", "<<", "?", "-", "0", "00", "1", "1.e+3", "6e6", "0b1"),
    *("default", "all", "lo", "localhost", "server", "defaults", "*", ".", "..", "self", "none", "any"),
)
PIECES = (
    *("\n", "\r", "\r\n", "\0", "\t", " ", "\x0b", "\x1b[2J", "\x7f", "\x85", "\u2028", "\u2029", "\ufeff"),
    *("\u202e", "\u00a0", "\u200b", "\u0130", "\u212a", "\uff11", "\u0663", "\U0001f600", "\ud7ff", "\ufffe"),
    *("'", '"', "\\", "`id`", "$(id)", "$HOME", "${IFS}", "$$", ";", "&", "|", ">", "<", "!", "#", " #", ": ", "%"),
    *("%h", "%%", "{{ cluster.file }}", "{%", "{#", "@INTERFACE@", "*a", "&a", "!!int 1", "- ", "? ", "\n---\n"),
    *("[", "]", "{", "}", ",", "=", "@", "/", "//", "..", "../", "/../", "/./", "~", "^", "?", "(", ")", "\\n", "%0a"),
    *("--", "-rf", "--flag=x", "\nExecStart=/bin/id\n", "\n[Service]\n", "'\nX='1", "\nserver x 1.2.3.4:1", "}\n"),
    *("a" * 64, "a" * 260, "1" * 30, ":1", ":99999", ":0x1", "/32", ",x=y", "=x", ":NoExecute", "://", "?x", "#x"),
)

ALWAYS = (
    *("\n", "\0", "\x85", "\u2028", "\U00010000", "'", '"', "\\"),
    *("$(id)", "{{ 1 }}", "%n", " #", ": ", " ", ",x=y", "*"),
)


def hostile(given: str) -> st.SearchStrategy[str]:
    """Around what is meant there: texts that begin, end or go on as something else."""
    piece = st.one_of(st.sampled_from(PIECES), st.sampled_from(WORDS), st.characters(exclude_categories=["Cs"]))
    place = st.integers(0, len(given))
    return st.one_of(
        st.sampled_from(WORDS),
        st.tuples(place, place, piece).map(lambda cut: given[: min(cut[:2])] + cut[2] + given[max(cut[:2]) :]),
        st.tuples(st.sampled_from(WORDS), piece).map("".join),
        st.lists(piece, min_size=1, max_size=3).map("".join),
        st.text("abcxyz0159-._e", min_size=1, max_size=12),
    )


# ---- what becomes of it ---------------------------------------------------------------------------------------------


def loaded(tree: Any, folder: Path) -> Cluster:
    file = folder / "c.yaml"
    file.write_text(written(tree), encoding="utf-8")
    return inventory.load(file, now=NOW)


@dataclass(frozen=True)
class Harmless:
    """A cluster, and what its machines get."""

    tree: dict[str, Any]
    folder: Path
    cluster: Cluster
    secrets: store.Secrets
    machines: dict[str, Any]


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Harmless]:
    made = {}
    for name, tree in CLUSTERS.items():
        folder = tmp_path_factory.mktemp(name)
        beside(folder)
        cluster = loaded(tree, folder)
        secrets = artifacts.secrets(folder, cluster)
        made[name] = Harmless(tree, folder, cluster, secrets, everything(cluster, secrets))
    return made


def named(secrets: store.Secrets, before: Cluster, after: Cluster) -> store.Secrets:
    """The same secrets, of machines that are called otherwise."""
    names = {old.name: new.name for old, new in zip(before.nodes, after.nodes, strict=True)}
    keys = {(names.get(owner, owner), profile): key for (owner, profile), key in secrets.leaf_keys.items()}
    tokens = {names.get(owner, owner): token for owner, token in secrets.tokens.items()}
    return replace(secrets, leaf_keys=keys, tokens=tokens)


def everything(cluster: Cluster, secrets: store.Secrets) -> dict[str, Any]:
    """What every machine gets of the cluster file: path, with the machine or role before it -> what is read there."""
    return {place: reading.content(file) for place, file in made(cluster, secrets).items()}


def made(cluster: Cluster, secrets: store.Secrets) -> dict[str, File]:
    found: dict[str, list[File]] = {}
    for role, arch in cluster.payloads:
        files = [*overlay.payload(cluster.shared, role, arch, IMAGES), *images.registry_files(cluster.shared)]
        found[role] = [file for file in files if not file.path.startswith("/usr/local/")]
    for place, one in enumerate(cluster.nodes):
        documents = seed.documents(cluster, one, sums="0" * 64, sign=bytes)
        fetch = distribution.fetch(cluster, one, sha256="0" * 64, size=1)
        found[str(place)] = [
            *node.identity(cluster, one, secrets, sums="0" * 64, fetch=fetch, image=IMAGES, generation=7),
            *(File(name, data=data) for name, data in documents.items() if name in seed.READ),
        ]
    found["desk"] = [File("/etc/kubernetes/admin.conf", data=certificates.admin_conf(cluster, secrets))]
    for files in found.values():
        archive._checked(file for file in files if file.path.startswith("/"))
    return {f"{whose} {file.path}": file for whose, files in found.items() for file in files}


# ---- through the front door -----------------------------------------------------------------------------------------

ADDRESSES = (
    "address",
    "dnsUpstream",
    "extraAddresses",
    "firstAddress",
    "gateway",
    "nameservers",
    "subnet",
    "virtualIP",
)
CHOICES = ("bond", "count", "denied", "etcd", "loadBalancer", "media", "role", "vlan")
FILES = ("ca", "extraObjects", "passwordFile")


def expected(loc: Loc, new: str, before: Harmless, after: Cluster) -> dict[str, Any] | None:
    """What the machines get now; None where a good value of that field changes more than itself."""
    old = loc[-2] if loc[-1] == "[key]" else at(before.tree, loc)
    key = next(step for step in reversed(loc) if isinstance(step, str) and step != "[key]")
    swapped = {str(old): new}
    match key:
        case _ if key in ADDRESSES:
            assert set(new) <= set("0123456789./:")
            return None
        case _ if key in CHOICES:
            assert re.fullmatch("[a-z0-9.-]+", new)
            return None
        case _ if key in FILES:
            assert (before.folder / new).resolve().parent == before.folder.resolve()
            swapped = {}
        case "images" if new.startswith((".", "/")):
            swapped = {}
        case "controlPlaneEndpoint" | "certSANs" if re.fullmatch("[0-9.:]+", new):
            return None
        case "controlPlaneEndpoint":
            endpoint = after.control_plane_endpoint
            assert endpoint is not None and new in (endpoint.host, str(endpoint))
            swapped = {str(before.cluster.control_plane_endpoint): str(endpoint), "q-endpoint.test": endpoint.host}
        case "mac" | "macs":
            swapped = {str(old): new.lower().replace("-", ":")}
        case "interface" if set(new) & set("*?"):
            swapped = {str(old): "nic0"}  # beside a MAC address a pattern is no name
        case "payloadServer":
            swapped = {str(old): new.rstrip("/")}
        case "taints":
            swapped = {}
    made: dict[str, Any] = reading.replaced(before.machines, swapped)
    if key == "taints":
        subject, _, effect = new.rpartition(":")
        word, _, value = subject.partition("=")
        ((own,),) = [made[path] for path in made if path.endswith("10-node.conf") and "q-taint" in str(made[path])]
        own["registerWithTaints"] = [{"key": word, **({"value": value} if value else {}), "effect": effect}]
    if key == "interface" and set(new) & set("*?") and "mac" not in at(before.tree, loc[:-1]):
        made[f"{loc[-2]} network-config"][0]["ethernets"]["nic0"]["match"] = {"name": new}
    if key == "mirrors" and re.search("/v2(/|$)", new):
        for path in made:
            if path.endswith("/hosts.toml"):
                made[path]["host"][new]["override_path"] = True
    return made


def is_refused(error: BakeError, file: Path) -> None:
    """In one word, with a place, as a terminal can show it."""
    assert isinstance(error, BakeErrors) and len(error.errors) == 1, str(error)
    (told,) = error.errors
    assert isinstance(told.where, Place) and told.where.file == file
    assert told.where.line and told.where.column and told.remedy
    assert all(char.isprintable() or char == "\n" for char in str(error))
    assert len(str(error)) < 1500


def try_it(loc: Loc, text: str, before: Harmless) -> None:
    tree = with_text(before.tree, loc, text)
    file = before.folder / "c.yaml"
    try:
        after = loaded(tree, before.folder)
    except BakeError as error:
        is_refused(error, file)
        return
    assert "\n" not in text
    now = expected(loc, text, before, after)
    if now is not None:
        there = everything(after, named(before.secrets, before.cluster, after))
        assert reading.replaced(there, {}) == now


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_harmless_file_says_each_thing_once(name: str, harmless: dict[str, Harmless]) -> None:
    """Otherwise the tests below would see nothing: each text is found on the machines, and none within another."""
    before = harmless[name]
    texts = [str(loc[-2] if loc[-1] == "[key]" else at(before.tree, loc)) for loc in slots(before.tree)]
    told = [text for text in texts if re.match("(https?://)?q[-_]", text, re.IGNORECASE)]
    assert len(told) > 25
    assert [(one, other) for one in told for other in told if one in other and one is not other] == []
    machines = str(before.machines)
    assert [one for one in told if one.split("=")[0] not in machines] == [
        text for text in told if "q-debian" in text or "q-images" in text
    ]


@pytest.mark.parametrize(("name", "loc"), SLOTS)
def test_any_text_in_a_field(name: str, loc: Loc, harmless: dict[str, Harmless]) -> None:
    before = harmless[name]
    given_there = str(loc[-2] if loc[-1] == "[key]" else at(before.tree, loc))

    @settings(max_examples=10, deadline=None, database=None)
    @given(text=hostile(given_there))
    def tried(text: str) -> None:
        try_it(loc, text, before)

    for piece in ALWAYS:
        tried = example(given_there[:3] + piece + given_there[3:])(tried)
    tried()


TOGETHER: tuple[Loc, ...] = (
    *(("name",), ("networking", "dnsDomain"), ("storageClasses", 0), ("users", 0, "name"), ("nodes", 0, "name")),
    *(("machineNetwork", "search", 0), ("nodes", 0, "interface"), ("nodes", 0, "serial"), ("nodes", 1, "storage")),
    *(("nodes", 1, "labels", "q-label.test/q-key"), ("nodes", 1, "volumes", 0, "name"), ("pools", 0, "name")),
)


@pytest.mark.parametrize("word", sorted(set(WORDS)))
def test_a_word_that_means_something_to_somebody(word: str, harmless: dict[str, Harmless]) -> None:
    """Wherever it may stand, all at once."""
    before = harmless["shared"]
    tree, swapped = before.tree, {}
    for loc in TOGETHER:
        try:
            loaded(with_text(tree, loc, word), before.folder)
        except BakeErrors:
            continue
        tree = with_text(tree, loc, word)
        swapped[str(at(before.tree, loc))] = word
    after = loaded(tree, before.folder)
    there = everything(after, named(before.secrets, before.cluster, after))
    assert reading.replaced(there, {}) == reading.replaced(before.machines, swapped)


def as_read(tree: Any) -> Any:
    """As a reader of YAML that takes every word for text."""
    if isinstance(tree, dict):
        return {key: as_read(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [as_read(value) for value in tree]
    return tree if isinstance(tree, str) else json.dumps(tree)


@settings(max_examples=80, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_text_without_quotes(data: st.DataObject, harmless: dict[str, Harmless]) -> None:
    """What is accepted is what every reader takes it for."""
    before = harmless["shared"]
    loc = data.draw(st.sampled_from(list(slots(SHARED))))
    key = loc[-1] == "[key]"
    text = data.draw(hostile(str(loc[-2] if key else at(before.tree, loc))))
    tree = with_text(before.tree, loc, Bare(text))
    try:
        after = loaded(tree, before.folder)
    except BakeErrors as error:
        assert all(isinstance(one.where, Place) and one.where.line and one.where.column for one in error.errors)
        assert all(char.isprintable() or char == "\n" for char in str(error))
        return
    read = yaml.load(written(tree), Loader=yaml.BaseLoader)  # noqa: S506 - it makes texts alone
    try:
        (found,) = at(read, loc[:-2]) if key else (at(read, loc),)
    except (LookupError, TypeError, ValueError):
        return  # it is another file, with other keys: each of them is looked at as well
    if read == as_read(with_text(before.tree, loc, found)):
        now = expected(loc, found, before, after)
        if now is not None:
            there = everything(after, named(before.secrets, before.cluster, after))
            assert reading.replaced(there, {}) == now


# ---- past the door --------------------------------------------------------------------------------------------------


def put(tree: Any, old: str, new: str) -> Any:
    """The same model with another text, which no rule of the cluster file has seen."""
    if isinstance(tree, str):
        return tree.replace(old, new)
    if isinstance(tree, tuple):
        items = [put(item, old, new) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{field.name: put(getattr(tree, field.name), old, new) for field in fields(tree)})
    return tree


UNCHECKED = (
    *("q-cluster", "q-domain.test", "q-endpoint.test", "q-san.test", "q-search.test", "q-time.test", "192.168.10.252"),
    *("http://q-payloads.test:8080/q", "q-class", "q_user", samples.SSH_KEY, "q-registry.test:5000", "q-puller"),
    *(
        "https://q-mirror.test/q",
        "q-control",
        "52:54:00:00:10:0b",
        "q-card",
        "Q-SERIAL",
        "q-worker",
        "q-link",
        "q-other",
    ),
    *("q-label.test/q-key", "q-value", "q-storage", "q-volume", "/srv/q-path", "77Gi", "q-pool", "Q-NUMBER"),
)

OTHERWISE = {
    "q-puller": {":"},  # ends the name, and nothing can be quoted there (RFC 7617): that is for the rule alone
    "q-other": {"*", "?", "["},  # a pattern
}


@pytest.mark.parametrize("old", UNCHECKED)
def test_what_no_rule_has_seen_is_quoted_all_the_same(old: str, harmless: dict[str, Harmless]) -> None:
    """Templates do not rely on the cluster file's rules: what they cannot write is an error."""
    before = harmless["shared"]

    @settings(max_examples=3, deadline=None, database=None)
    @given(new=hostile(old))
    def tried(new: str) -> None:
        if set(new) & OTHERWISE.get(old, set()):
            return
        after = put(before.cluster, old, new)
        try:
            files = made(after, named(before.secrets, before.cluster, after))
        except (BakeError, ValueError):
            return
        there = {place: reading.content(file) for place, file in files.items()}
        swapped = {old: new.rstrip("/")} if old.startswith("http:") else {old: new}
        now = reading.replaced(before.machines, swapped)
        for path, content in now.items():
            if path.endswith("hosts.toml") and old.startswith("https:") and re.search("/v2(/|$)", new):
                content["host"][new]["override_path"] = True
        assert reading.replaced(there, {}) == now

    for piece in ALWAYS:
        tried = example(old[:3] + piece + old[3:])(tried)
    tried()
