"""The cluster file as text: what is refused, where, and in which words."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from recipes.kit import clusterfile, formats, places
from recipes.kit.errors import BakeError, Place
from tests.samples import SSH_KEY

NODE = "- {name: a, role: control-plane, address: 192.168.10.11}"


def read(directory: Path, text: str | bytes) -> clusterfile.Document:
    file = directory / "c.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return clusterfile.read(file)


def told(document: clusterfile.Document) -> list[tuple[int | None, int | None, str, str]]:
    made = []
    for error in document.errors:
        assert isinstance(error.where, Place)
        made.append((error.where.line, error.where.column, error.what, error.remedy or ""))
    return sorted(made)


# text, line, column, part of what, part of the remedy
MISTAKES = {
    "empty": ("", 1, 1, "empty", "examples"),
    "only a comment": ("# nothing\n", 1, 1, "empty", "examples"),
    "list at the top": ("- name: a\n", 1, 1, "A list stands where", "name:"),
    "text at the top": ("hello\n", 1, 1, "Text stands where", "name:"),
    "not YAML": ("name: a\nnodes: [\n", 3, 1, "not YAML", "brackets"),
    "a tab": ("name: a\nnetworking:\n\tpodSubnet: 10.0.0.0/16\n", 3, 1, "not YAML", "no tabs"),
    "a control character": ("name: a\x07b\n", 1, 8, "control character", "invisible"),
    "an escaped one": ('name: "a\\x07b"\n', 1, 7, "U+0007", "without that character"),
    "an escaped line end": ('name: "a\\nb"\n', 1, 7, "U+000A", "one line"),
    "a line separator": ("name: a\ninstallBy: 9\u2028d\n", 2, 13, "U+2028 stands here", "Remove"),
    "a line end in a needed list": (
        'name: a\nusers:\n  - {name: x, sshAuthorizedKeys: ["a\\n"]}\n', 3, 35, "U+000A", "one line"
    ),
    "a line end in a key": ('name: a\n"na\\nme": b\n', 2, 1, "U+000A", "one line"),
    "reversed writing": ("name: a\u202eb\n", 1, 7, "U+202E", "without"),
    "duplicate key": ("name: a\netcd: stacked\nname: b\n", 3, 1, "second time; the first is in line 1", "Remove one"),
    "anchor": ("name: &x a\n", 1, 7, "anchor", "Remove"),
    "alias": ("name: a\nnetworking: *x\n", 2, 13, "alias", "Write the value out"),
    "merge key": ("name: a\nnetworking:\n  <<: {dnsDomain: x}\n", 3, 3, "merge key", "Write the keys out"),
    "tag": ("name: !!str a\n", 1, 7, "tag", "Remove"),
    "two documents": ("name: a\n---\nname: b\n", 2, 1, "second YAML document", "---"),
    "a list as key": ("? [a]\n: b\n", 1, 3, "where a key is meant", "word"),
    "too deep": ("[" * 30 + "]" * 30, 1, 21, "deeper than 20", "brackets"),
    "yes": ("name: yes\n", 1, 7, "true or false", '"yes"'),
    "no": ("name: no\n", 1, 7, "true or false", '"no"'),
    "on": ("name: on\n", 1, 7, "true or false", '"on"'),
    "Off": ("name: Off\n", 1, 7, "true or false", '"Off"'),
    "true for text": ("name: true\n", 1, 7, "text is meant", '"true"'),
    "octal": ("name: 0644\n", 1, 7, "octal", '"0644"'),
    "octal where a number is meant": ("name: a\nmaxPods: 0110\n", 2, 10, "octal", "Write 110"),
    "base 60": ("name: 12:34:56\n", 1, 7, "base 60", '"12:34:56"'),
    "float": ("name: 1.10\n", 1, 7, "a number", '"1.10"'),
    "float where a number is meant": ("name: a\nmaxPods: 1.10\n", 2, 10, "whole number", "digits alone"),
    "exponent": ("name: 1e3\n", 1, 7, "a number", '"1e3"'),
    "date": ("name: 2027-02-01\n", 1, 7, "a date", '"2027-02-01"'),
    "number": ("name: 12\n", 1, 7, "is a number", '"12"'),
    "no value": ("name:\n", 1, 6, "name has no value", "remove the key"),
    "null": ("name: a\nvirtualIP: null\n", 2, 12, "virtualIP has no value", "remove the key"),
    "text for a number": ('name: a\nmaxPods: "50"\n', 2, 10, "whole number", "Write 50, without quotes"),
    "text for a list": ("name: a\ndnsUpstream: 10.0.0.1\n", 2, 14, "a list is meant", "[10.0.0.1]"),
    "list for text": ("name: [a]\n", 1, 7, "A list stands where text", "one value"),
    "mapping for a list": ("name: a\npools: {a: b}\n", 2, 8, "A mapping stands where a list", "'- '"),
    "text for a mapping": ("name: a\nnetworking: x\n", 2, 13, "a mapping is meant", "key: value"),
    "yes for true": ("name: a\nnodes: [{name: a, role: etcd, address: 10.0.0.1, denied: yes}]", 2, 58, "some", "true"),
    "unknown key": ("name: a\ninstalby: 90d\n", 2, 1, "no key instalby", "installBy"),
    "unknown key inside": ("name: a\nnetworking: {pod_subnet: 10.0.0.0/16}\n", 2, 14, "pod_subnet", "podSubnet"),
    "unknown key far off": ("name: a\nzzz: 1\n", 2, 1, "no key zzz", "Remove it; there are apiServer"),
    "number as key": ("name: a\nno: 1\n", 2, 1, "The key no", '"no"'),
    "no name": ("etcd: stacked\n", 1, 1, "The cluster file has no name", "Add name:"),
    "no address": ("name: a\nnodes:\n  - {name: a, role: worker}\n", 3, 5, "entry of nodes has no address", "address:"),
    "a choice": ("name: a\netcd: stakced\n", 2, 7, "not one of the choices", "mean stacked? It may be stacked or ext"),
    "capital in a name": ("name: Ha\n", 1, 7, "RFC 1123", "lower-case"),
    "underscore in a name": ("name: h_a\n", 1, 7, "RFC 1123", "lower-case"),
    "a long name": (f"name: {'a' * 64}\n", 1, 7, "RFC 1123", "63"),
    "localhost": ("name: localhost\n", 1, 7, "reserved", "another"),
    "digits as a name": ('name: "12"\n', 1, 7, "all digits", "letter"),
    "bits behind the prefix": ("name: a\nnetworking: {podSubnet: 10.1.2.3/16}\n", 2, 25, "bits set", "10.1.0.0/16"),
    "no prefix": ("name: a\nnetworking: {podSubnet: 10.1.0.0}\n", 2, 25, "no prefix", "10.244.0.0/16"),
    "IPv6 network": ('name: a\nnetworking: {podSubnet: "fd00::/48"}\n', 2, 25, "IPv6", "IPv4"),
    "IPv6 address": ("name: a\nvirtualIP: fe80::1\n", 2, 12, "IPv6", "IPv4"),
    "IPv6 endpoint": ('name: a\ncontrolPlaneEndpoint: "[fd00::1]:6443"\n', 2, 23, "IPv6", "IPv4"),
    "address with prefix": ("name: a\nvirtualIP: 10.0.0.1/24\n", 2, 12, "not an IPv4 address", "(10.0.0.1)"),
    "no address at all": ("name: a\nvirtualIP: 10.0.0.256\n", 2, 12, "not an IPv4 address", "0 to 255"),
    "loopback": ("name: a\nvirtualIP: 127.0.0.1\n", 2, 12, "loopback", "your own"),
    "URL as endpoint": ('name: a\ncontrolPlaneEndpoint: "https://x:1"\n', 2, 23, "is a URL", "host:port"),
    "port": ("name: a\ncontrolPlaneEndpoint: x.y:70000\n", 2, 23, "port", "65535"),
    "SAN": ("name: a\napiServer: {certSANs: [a_b]}\n", 2, 24, "not a DNS name", "lower-case"),
    "numbers as a host": ("name: a\napiServer: {certSANs: [1.2.3]}\n", 2, 24, "not an IPv4", "four numbers"),
    "duration": ("name: a\ninstallBy: 3 months\n", 2, 12, "neither a date nor a duration", "90d"),
    "no such day": ("name: a\ninstallBy: 2027-02-30\n", 2, 12, "not in the calendar", "2027-02-01"),
    "century": ("name: a\nvalidity: {ca: 99999d}\n", 2, 16, "century", "36500d"),
    "a small number": ("name: a\nmaxPods: 0\n", 2, 10, "less than 1", "1 or more"),
    "a large number": ("name: a\nmachineNetwork: {mtu: 9999}\n", 2, 23, "more than 9216", "9216 or less"),
    "credentials": ('name: a\ndebianMirror: "http://u:p@x.y/"\n', 2, 15, "credentials", "Take them out"),
    "no URL": ("name: a\ndebianMirror: x.y\n", 2, 15, "not a URL", "https://"),
    "root": ("name: a\nusers: [{name: root, sshAuthorizedKeys: []}]\n", 2, 16, "account or a group", "another"),
    "build's own folder": ("name: downloads\n", 1, 7, "build/downloads is not for a cluster", "another"),
    "password in the user's name": (
        'name: a\nregistries: [{host: r.x, username: "u:p", passwordFile: p}]\n', 2, 36, "no user name", "passwordFile"
    ),
    "a group": ("name: a\nusers: [{name: sudo, sshAuthorizedKeys: []}]\n", 2, 16, "a group of the system", "another"),
    "no keys": ("name: a\nusers: [{name: x, sshAuthorizedKeys: []}]\n", 2, 38, "list is empty", "at least one"),
    "bad key": ("name: a\nusers: [{name: x, sshAuthorizedKeys: [a b]}]\n", 2, 39, "SSH public key", ".pub"),
    "old key": ("name: a\nusers: [{name: x, sshAuthorizedKeys: [ssh-dss AAAA]}]\n", 2, 39, "SSH public key", ".pub"),
    "cut key": (f"name: a\nusers: [{{name: x, sshAuthorizedKeys: [{SSH_KEY[:60]}]}}]", 2, 39, "cut off", "whole line"),
}  # fmt: skip
NODE_MISTAKES = {
    "MAC without quotes": ("mac: 52:54:00:00:10:11", 56, "base 60", '"52:54:00:00:10:11"'),
    "MAC": ('mac: "52:54:00:00:10"', 56, "not a MAC address", "quotes"),
    "multicast MAC": ('mac: "01:00:5e:00:00:01"', 56, "multicast", "again"),
    "interface": ("interface: a/b", 62, "not an interface name", "eno1"),
    "bond": ("bond: lacp", 57, "not one of the choices", "802.3ad"),
    "vlan": ("vlan: 4095", 57, "more than 4094", "4094"),
    "label's value": ("labels: {rack: 12}", 66, "is a number", '"12"'),
    "label's form": ('labels: {rack: "-"}', 66, "not a label's value", "first and last"),
    "label's key": ('labels: {"a b": x}', 60, "not a Kubernetes key", "[prefix/]name"),
    "role label": ('labels: {node-role.kubernetes.io/x: ""}', 60, "may not set", "prefix of your own"),
    "restricted label": ("labels: {node-restriction.kubernetes.io/x: z}", 60, "may not set", "`storage`"),
    "kubelet's label": ("labels: {kubernetes.io/os: linux}", 60, "itself", "Remove"),
    "taint": ('taints: ["a=b"]', 60, "not a taint", "NoSchedule"),
    "Kubernetes' taint": ("taints: [node.kubernetes.io/not-ready:NoExecute]", 60, "Kubernetes itself", "your own"),
    "size": ("volumes: [{name: a, path: /srv, size: 10XB}]", 89, "not a size", "100Gi"),
    "path up": ("volumes: [{name: a, path: /srv/../x, size: 1Gi}]", 77, "not a path for a volume", "'..'"),
    "relative path": ("volumes: [{name: a, path: srv, size: 1Gi}]", 77, "not a path for a volume", "absolute"),
    "system path": ("volumes: [{name: a, path: /etc/x, size: 1Gi}]", 77, "belongs to the machine", "/srv"),
    "above a system path": (
        "volumes: [{name: a, path: /var/lib, size: 1Gi}]",
        77,
        "In /var/lib lies /var/lib/apt",
        "/srv",
    ),
    "far above a system path": ("volumes: [{name: a, path: /var, size: 1Gi}]", 77, "In /var lies /var/", "/srv"),
    "a link to a system path": ("volumes: [{name: a, path: /lib64/x, size: 1Gi}]", 77, "lies in /lib64", "/srv"),
    "administrators' keys": ("volumes: [{name: a, path: /home/admin, size: 1Gi}]", 77, "lies in /home", "/srv"),
    "the pods' bridge": ("interface: cni0", 62, "not an interface name", "eno1"),
    "all cards": ("links: [{name: all}]", 66, "not one interface's name", "eno1"),
    "serial": ("serial: 12345", 59, "is a number", '"12345"'),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_with_its_place_and_remedy(name: str, tmp_path: Path) -> None:
    text, line, column, what, remedy = MISTAKES[name]
    mistakes = told(read(tmp_path, text))
    assert any(
        (at, across) == (line, column) and what in said and remedy in mend for at, across, said, mend in mistakes
    ), mistakes


@pytest.mark.parametrize("name", formats.BUILD_FOLDERS)
def test_a_folder_that_build_uses_is_no_clusters(name: str, tmp_path: Path) -> None:
    (error,) = read(tmp_path, f"name: {name}\n").errors
    assert f"build/{name}" in error.what


def test_every_folder_of_build_is_known() -> None:
    """What the code puts beside the clusters' own: `build / "downloads"` and the like."""
    root = Path(clusterfile.__file__).parents[2]
    folder = re.compile(r"""(?:desk\.build|self\.build|ROOT / "build"|\bbuild) / "([a-z-]+)\"""")
    found = {
        name
        for files in ("dodo.py", "recipes/**/*.py", "tests/conftest.py", "tests/lab/*.py", "tests/bench/*.py")
        for path in root.glob(files)
        for name in folder.findall(path.read_text())
    }
    of_a_cluster = {"binaries", "certs", "disks", "nodes", "payloads", "seeds"}  # a lab's `build` is one cluster's
    assert found - of_a_cluster == set(formats.BUILD_FOLDERS)


@pytest.mark.parametrize("name", NODE_MISTAKES)
def test_a_mistake_in_a_node(name: str, tmp_path: Path) -> None:
    entry, column, what, remedy = NODE_MISTAKES[name]
    text = f"name: a\nnodes:\n- {{name: a, role: worker, address: 192.168.10.11, {entry}}}\n"
    ((line, across, said, mend),) = told(read(tmp_path, text))
    assert (line, across) == (3, column)
    assert what in said
    assert remedy in mend


def test_nobody_needs_to_know_pydantic(tmp_path: Path) -> None:
    for text, *_ in MISTAKES.values():
        for *_, what, remedy in told(read(tmp_path, text)):
            words = f"{what} {remedy}".lower()
            assert not any(
                word in words for word in ("pydantic", "input should", "valid string", "validator", "python")
            )
            assert "not allowed" not in words  # the last resort


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BakeError, match="no such file"):
        clusterfile.read(tmp_path / "missing.yaml")
    with pytest.raises(BakeError, match="directory"):
        clusterfile.read(tmp_path)
    with pytest.raises(BakeError, match=r"c\.yaml:2:4: Is not UTF-8: byte 0xff"):
        read(tmp_path, b"name: a\n# \xe9\xff\n".replace(b"\xe9", b" "))


def test_words_that_are_no_trap_are_taken(tmp_path: Path) -> None:
    text = "name: a\ninstallBy: 2027-02-01\nswap: off\npodNetwork: none\nnetworking: {podSubnet: 10.1.0.0/16}\n"
    document = read(tmp_path, text)
    assert document.errors == ()
    assert document.shape is not None
    assert document.shape.install_by == datetime(2027, 2, 1, 23, 59, 59, tzinfo=UTC)
    assert (document.shape.swap, document.shape.pod_network) == ("off", "none")
    assert document.shape.networking.pod_subnet == IPv4Network("10.1.0.0/16")
    weeks = read(tmp_path, "name: a\ninstallBy: 2w\n").shape
    assert weeks is not None
    assert weeks.install_by == timedelta(days=14)


def test_what_is_wrong_is_taken_out_and_the_rest_is_kept(tmp_path: Path) -> None:
    document = read(tmp_path, f"name: a\nmaxPods: x\nnodes:\n{NODE}\n- {{name: b, role: worker}}\n")
    assert document.shape is not None
    assert [node.name for node in document.shape.nodes] == ["a"]
    assert not document.whole("maxPods")
    assert not document.whole("nodes")
    assert document.whole("pools")
    assert document.place("nodes", 0, "address") == Place(document.file, 4, 43)
    assert document.place("nodes", 0, "address", key=True) == Place(document.file, 4, 34)
    assert document.place("nodes", 0, "subnet") == Place(document.file, 4, 3)  # not written: its node


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    assert read(tmp_path, "\ufeffname: a\n").errors == ()


def test_columns_count_characters(tmp_path: Path) -> None:
    ((line, column, *_),) = told(read(tmp_path, 'nodes: []\nname: "ää"\npools: {ü: 1}\n'))[:1]
    assert (line, column) == (2, 7)


@pytest.mark.parametrize("text", ["10.96", "+1", "0x1F", "0o17", "1_000", ".5", ".inf", "~", "Null", "TRUE", "y", "-0"])
def test_bare_words_that_readers_take_for_something_else(text: str, tmp_path: Path) -> None:
    tree, errors = places.parse(tmp_path / "x.yaml", f"a: {text}\n")
    assert not errors
    assert isinstance(places.plain(tree)["a"], places.Odd) if tree else False


@pytest.mark.parametrize(
    "text", ["10.0.0.1", "10.0.0.0/8", "90d", "802.3ad", "off-line", "none", "1.2.3", "e*", "node"]
)
def test_bare_words_that_are_text(text: str, tmp_path: Path) -> None:
    tree, errors = places.parse(tmp_path / "x.yaml", f"a: {text}\n")
    assert not errors
    assert tree is not None
    assert places.plain(tree) == {"a": text}
