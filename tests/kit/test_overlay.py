"""Trees of files: paths, modes, links, templates and their filters."""

from __future__ import annotations

import json
import shlex
import tomllib
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from recipes.kit import overlay
from recipes.kit.errors import BakeError
from tests import samples


def make(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / "tree" / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root / "tree"


def rendered(tree: Path, **context: object) -> dict[str, str]:
    return {file.path: (file.data or b"").decode() for file in overlay.render(tree, context)}


def test_a_path_in_the_tree_is_the_path_on_the_machine(tmp_path: Path) -> None:
    tree = make(tmp_path, etc__plain="{{ kept }}\n")
    (tree / "etc/made.conf.j2").write_text("name={{ name }}\n")
    (tree / "etc/masked.service").symlink_to("/dev/null")
    (tree / "etc/folder").symlink_to("elsewhere")
    (tree / "etc/run.j2").write_text("#!/bin/sh\n")
    (tree / "etc/run.j2").chmod(0o700)
    (tree / "etc/plain").chmod(0o600)

    files = {file.path: file for file in overlay.render(tree, {"name": "x"})}

    assert list(files) == ["/etc/folder", "/etc/made.conf", "/etc/masked.service", "/etc/plain", "/etc/run"]
    assert files["/etc/plain"].data == b"{{ kept }}\n"
    assert files["/etc/made.conf"].data == b"name=x\n"
    assert (files["/etc/masked.service"].link, files["/etc/folder"].link) == ("/dev/null", "elsewhere")
    assert (files["/etc/run"].mode, files["/etc/plain"].mode) == (0o755, 0o644)
    assert {file.owner for file in files.values()} == {"root"}


def test_what_python_compiled_is_left_out(tmp_path: Path) -> None:
    tree = make(tmp_path, lib__module="x")
    (tree / "lib/__pycache__").mkdir()
    (tree / "lib/__pycache__/module.pyc").write_bytes(b"x")
    assert set(rendered(tree)) == {"/lib/module"}


def test_a_template_that_renders_to_nothing_is_left_out(tmp_path: Path) -> None:
    tree = make(tmp_path)
    (tmp_path / "tree/etc").mkdir(parents=True)
    (tree / "etc/unit.j2").write_text("{% if wanted %}\n[Unit]\n{% endif %}\n\n")
    assert rendered(tree, wanted=False) == {}
    assert rendered(tree, wanted=True) == {"/etc/unit": "[Unit]\n\n"}


def test_an_unknown_name_is_an_error_with_its_place(tmp_path: Path) -> None:
    tree = make(tmp_path, etc__x="")
    (tree / "etc/bad.j2").write_text("one\ntwo {{ nodee.name }}\n")
    with pytest.raises(BakeError, match="nodee") as caught:
        overlay.render(tree, {})
    assert str(caught.value.where) == f"{tree}/etc/bad.j2:2"


def test_a_broken_template_is_an_error_with_its_place(tmp_path: Path) -> None:
    tree = make(tmp_path, etc__x="")
    (tree / "etc/bad.j2").write_text("one\n{% if %}\n")
    with pytest.raises(BakeError) as caught:
        overlay.render(tree, {})
    assert str(caught.value.where) == f"{tree}/etc/bad.j2:2"


def test_a_missing_tree_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BakeError, match="does not exist"):
        overlay.render(tmp_path / "nothing", {})


def test_snippets_are_included_and_are_inputs(tmp_path: Path) -> None:
    tree = make(tmp_path, etc__x="")
    (tree / "etc/unit.j2").write_text('{% include "part" %}')
    (tmp_path / "snippets").mkdir()
    (tmp_path / "snippets/part").write_text("of {{ name }}\n")
    assert rendered(tree, name="x")["/etc/unit"] == "of x\n"
    names = [path.relative_to(tmp_path).as_posix() for path in overlay.inputs(["tree"], tmp_path)]
    assert names == ["snippets/part", "tree/etc/unit.j2", "tree/etc/x"]


TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(TEXT)
def test_env_reads_the_same_in_a_shell(value: str) -> None:
    """What the filter lets through, a shell reads as it was; systemd takes single quotes literally as well."""
    try:
        line = overlay._env(value)
    except ValueError:
        assert any(char in "'\\" or ord(char) < 32 or ord(char) == 127 for char in value)
    else:
        assert shlex.split(line) == [value]
        assert "\n" not in line


@given(TEXT)
def test_quoted_reads_the_same_everywhere(value: str) -> None:
    try:
        quoted = overlay.quoted(value)
    except ValueError:
        assert not value.isprintable()
    else:
        assert yaml.safe_load(quoted) == json.loads(quoted) == tomllib.loads(f"x = {quoted}")["x"] == value


@given(TEXT)
def test_a_word_stays_one_without_quotes(value: str) -> None:
    try:
        assert overlay.word(value) == value
    except ValueError:
        return
    assert value.isascii() and value.split() == [value]
    assert set(value).isdisjoint("\"'\\#;!%$&|<>(){}[]=,*?~`@+")
    assert not value.startswith("-")


def test_unit_takes_specifiers_and_variables_literally() -> None:
    assert overlay._unit("plain-1.2") == "plain-1.2"
    assert overlay._unit("50%") == "50%%"
    assert overlay._unit('a $b "c" \\') == '"a $$b \\"c\\" \\\\"'
    with pytest.raises(ValueError, match="unit"):
        overlay._unit("two\nlines")


def test_taints() -> None:
    assert overlay._taint("key=value:NoSchedule") == {"key": "key", "value": "value", "effect": "NoSchedule"}
    assert overlay._taint("a/b=:NoExecute") == {"key": "a/b", "effect": "NoExecute"}
    assert overlay._taint("a/b:NoExecute") == {"key": "a/b", "effect": "NoExecute"}


def test_layers() -> None:
    ha, apart, balanced = samples.ha(), samples.external_etcd(), samples.balanced()
    assert overlay.layers(ha, "control-plane") == ("common", "worker", "control-plane", "etcd")
    assert overlay.layers(ha, "worker") == ("common", "worker", "load-balancer")
    assert overlay.layers(apart, "etcd") == ("common", "etcd")
    assert overlay.layers(apart, "control-plane") == ("common", "worker", "control-plane")
    assert overlay.layers(balanced, "worker") == ("common", "worker")
    assert overlay.layers(balanced, "load-balancer") == ("common", "load-balancer", "virtual-address")
    held = replace(ha, vip=IPv4Address("192.168.10.9"))
    assert overlay.layers(held, "control-plane")[-1] == "virtual-address"
    assert "virtual-address" not in overlay.layers(held, "worker")


def test_packages_follow_the_layers() -> None:
    ha = samples.ha()
    assert "haproxy" in overlay.packages(ha, "worker")
    assert "haproxy" not in overlay.packages(ha, "control-plane")
    assert "python3-cryptography" in overlay.packages(ha, "control-plane")
    assert "keepalived" in overlay.packages(samples.balanced(), "load-balancer")
    listed = yaml.safe_load((overlay.OVERLAYS / "packages.yaml").read_text())
    trees = {path.name for path in overlay.OVERLAYS.iterdir() if path.is_dir()}
    assert set(listed) == trees - {overlay.IDENTITY, overlay.SNIPPETS, overlay.TRUST}
