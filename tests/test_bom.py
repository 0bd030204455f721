"""The bill of materials: CycloneDX's own schema takes it, and it says of each fetched file what the bake knew."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL

from recipes import bom, images
from recipes import node as nodes
from recipes.components import load_components
from recipes.kit import buildinfo
from recipes.kit.gotool import find_go
from recipes.kit.model import Fetched, File, Origin
from tests import artifacts, samples
from tests.conftest import Project

BUILT, RELEASED = "modules (go1.26.8)", "release"


def parsed(document: bytes) -> dict[str, Any]:
    """The document, after CycloneDX's schema and the package URLs' own reader have taken it."""
    errors = JsonStrictValidator(SchemaVersion.V1_6).validate_str(document.decode())
    assert errors is None, errors
    read: dict[str, Any] = json.loads(document)
    refs = [component["bom-ref"] for component in read["components"]]
    assert len(set(refs)) == len(refs)
    assert {each["ref"] for each in read["dependencies"]} == {*refs, read["metadata"]["component"]["bom-ref"]}
    for component in read["components"]:
        url = component.get("purl", "pkg:generic/nodebake")
        assert PackageURL.from_string(url).to_string() == url
    return read


def by_name(document: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {component["name"]: component for component in document["components"]}


def properties(component: Mapping[str, Any]) -> dict[str, str]:
    return {each["name"]: each["value"] for each in component["properties"]}


def payload(parts: artifacts.Parts, *, mtime: int = artifacts.MTIME) -> tuple[list[File], bytes]:
    cluster = samples.ha()
    contents = parts.payload(cluster, cluster.control_planes[0])
    made = bom.payload("ha/x", "0123", "amd64", contents, parts.binaries, parts.images, mtime=mtime)
    assert made.data is not None
    return contents, made.data


def test_every_fetched_file_is_there_with_its_digest(tmp_path: Path) -> None:
    contents, made = payload(artifacts.Parts(tmp_path))
    fetched = {file.path: file.sha256 for file in contents if file.source is not None}
    assert len(fetched) > 20
    document = parsed(made)
    told = {
        properties(component)["nodebake:path"]: component["hashes"]
        for component in document["components"]
        if "properties" in component
    }
    assert told == {path: [{"alg": "SHA-256", "content": sha256}] for path, sha256 in fetched.items()}
    assert document["metadata"]["timestamp"] == "2026-09-21T14:13:20Z"


def test_the_same_contents_give_the_same_bytes_and_others_another_number(tmp_path: Path) -> None:
    parts = artifacts.Parts(tmp_path)
    (_, one), (_, same), (_, other) = payload(parts), payload(parts), payload(parts, mtime=artifacts.MTIME + 1)
    assert one == same
    assert json.loads(one)["serialNumber"] != json.loads(other)["serialNumber"]


def test_a_machines_own_part_names_its_payload(tmp_path: Path) -> None:
    cluster = samples.ha()
    minted = artifacts.secrets(tmp_path, cluster)
    files = nodes.identity(cluster, cluster.workers[0], minted, sums="ab" * 32)
    document = parsed(next(file.data for file in files if file.path == bom.IDENTITY) or b"")
    assert document["metadata"]["component"]["name"] == "ha/worker-1"
    [part] = document["components"]
    assert (part["name"], part["hashes"][0]["content"]) == ("ha/worker-amd64", "ab" * 32)
    assert part["externalReferences"] == [{"type": "bom", "url": "payload.cdx.json"}]
    sums = next(file.data for file in files if file.path.endswith("/node.SHA256SUMS")) or b""
    assert bom.IDENTITY.encode().lstrip(b"/") in sums, "it is signed as every other file"


def test_a_machine_may_be_called_as_its_payload_is() -> None:
    document = parsed(bom.identity("ha/worker-amd64", "ha/worker-amd64", "ab" * 32, artifacts.NOW).data or b"")
    [part] = document["components"]
    assert document["metadata"]["component"]["name"] == part["name"]
    assert document["metadata"]["component"]["bom-ref"] != part["bom-ref"]


def test_a_released_file_says_where_it_was_fetched_from(tmp_path: Path) -> None:
    component = load_components()["etcd"]
    program = artifacts.Parts(tmp_path).binary("etcd", "etcd")
    origin = Origin("etcd", component.version, RELEASED)
    file = File("/opt/nodebake/x/bin/etcd", source=program.path, sha256=program.sha256, origin=origin)
    document = parsed(bom.payload("ha/x", "0", "arm64", [file], {}, [], mtime=0).data or b"")
    [told] = document["components"]
    url = PackageURL.from_string(told["purl"])
    digest = component.release.sha256["arm64"][""]  # type: ignore[index]
    where = f"https://github.com/etcd-io/etcd/releases/download/{component.version}/etcd-{component.version}-linux-arm64.tar.gz"
    assert (url.type, url.name, url.version) == ("generic", "etcd", component.version)
    assert url.qualifiers == {"checksum": f"sha256:{digest}", "download_url": where}
    assert url.subpath == f"etcd-{component.version}-linux-arm64/etcd"
    [reference] = told["externalReferences"]
    assert (reference["url"], reference["hashes"][0]["content"]) == (where, digest)


def test_a_debian_package_is_known_by_its_version_and_architecture() -> None:
    deb = Fetched("a_1%3a2.0-1+deb13u5_all.deb", Path("x"), "0" * 64, 1, Origin("a", "1:2.0-1+deb13u5", "debian"))
    document = parsed(bom.system("debian", "1", "amd64", [deb], mtime=0))
    [told] = document["components"]
    assert told["purl"] == "pkg:deb/debian/a@1:2.0-1%2Bdeb13u5?arch=all&distro=debian-13"
    assert told["version"] == "1:2.0-1+deb13u5"


def test_images_made_here_name_what_is_in_them_and_others_that_nobody_knows(tmp_path: Path) -> None:
    parts = artifacts.Parts(tmp_path / "parts")
    coredns = replace(parts.binary("coredns", "coredns"), origin=Origin("coredns", "v1", BUILT))
    given = "q.invalid:5000/team/app:2"
    made = [
        parts.image("coredns", "nodebake.local/coredns:v1"),
        replace(
            parts.image("pause", "nodebake.local/pause:3"),
            archive=parts.fetched("pause.tar", b"p", "catatonit", "0.2.1-2"),
        ),
        replace(parts.image(given, given), archive=parts.fetched("app.tar", b"a", given, "")),
    ]
    sources = {"coredns": BUILT, "catatonit": "debian", given: "operator"}
    made = [
        replace(
            image,
            archive=replace(
                image.archive,
                origin=replace(image.archive.origin, source=sources[image.archive.origin.component]),
            ),
        )
        for image in made
    ]
    files = [
        File(
            f"/opt/nodebake/x/images/{image.archive.name}",
            source=image.archive.path,
            sha256=image.archive.sha256,
            origin=image.archive.origin,
        )
        for image in made
    ]
    document = parsed(bom.payload("t", "1", "amd64", files, {"coredns": [coredns]}, made, mtime=0).data or b"")
    told, needs = by_name(document), {each["ref"]: each.get("dependsOn") for each in document["dependencies"]}
    own, pause, app = (told[image.reference] for image in made)
    assert needs[own["bom-ref"]] == [told["coredns"]["bom-ref"]]
    assert told["coredns"]["hashes"][0]["content"] == coredns.sha256
    assert needs[pause["bom-ref"]] == ["pkg:deb/debian/catatonit@0.2.1-2?arch=amd64&distro=debian-13"]
    assert document["compositions"] == [{"aggregate": "unknown", "assemblies": [app["bom-ref"]]}]
    url = PackageURL.from_string(app["purl"])
    assert isinstance(url.qualifiers, dict)
    assert url.qualifiers["repository_url"] == "q.invalid:5000/team/app"
    assert (url.name, url.qualifiers["tag"], own["version"]) == ("app", "2", "v1")


def test_an_image_that_was_made_here_has_the_digest_that_a_registry_would_know_it_by(tmp_path: Path) -> None:
    members = [images._Member("x", 0o644, b"x")]
    archive = tmp_path / "a.tar"
    with archive.open("wb") as out:
        images._write_tar(
            [*members, images._Member("index.json", 0o644, b'{"manifests":[{"digest":"sha256:d"}]}')], out
        )
    assert bom._manifest_of(archive) == "sha256:d"
    archive.write_bytes(b"no tar")
    assert bom._manifest_of(archive) is None


# ---- what programs say of themselves --------------------------------------------------------------------------------


def test_modules_are_those_that_go_itself_reads(binaries: Path) -> None:
    """Against `go version -m`, for a program of each component."""
    for name in ("kubelet", "etcd", "runc", "flanneld", "coredns"):
        told = buildinfo.read(binaries / name)
        done = subprocess.run(
            [find_go().program, "version", "-m", binaries / name], capture_output=True, text=True, check=True
        )
        said = [
            (instead or path, another or release)  # a line that begins with => takes the place of the one before
            for path, release, instead, another in re.findall(
                r"^\t(?:mod|dep)\t(\S+)\t(v\S+).*(?:\n\t=>\t(\S+)\t(v\S+).*)?$", done.stdout, re.MULTILINE
            )
        ]
        assert told is not None and len(said) > 5
        assert told.go == done.stdout.partition(": ")[2].partition("\n")[0]
        assert [(module.path, module.version) for module in told.modules] == said


def test_what_is_no_go_program_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "program"
    for data in (b"", b"\x7fELF", b"\x7fELF\x02\x01" + bytes(60), b"\x7fELF\x02\x01" + b"\xff" * 600, b"#!/bin/sh\n"):
        path.write_bytes(data)
        assert buildinfo.read(path) is None


def test_the_payloads_of_a_bake_say_it_all(baked: Project) -> None:
    folder = baked.root / "build" / "ha" / "payloads"
    for role in ("control-plane", "worker"):
        beside = folder / f"{role}-amd64.cdx.json"
        inside = subprocess.run(
            ["tar", "-xzOf", folder / f"{role}-amd64.tar.gz", bom.PATH.lstrip("/")], capture_output=True, check=True
        )
        assert inside.stdout == beside.read_bytes()
        document = parsed(inside.stdout)
        kinds = {PackageURL.from_string(each["purl"]).type for each in document["components"]}
        assert {"golang", "deb", "oci"} <= kinds
        told = by_name(document)
        assert told["kubelet"]["version"] == load_components()["kubernetes"].version
        record = json.loads((folder / f"{role}-amd64.json").read_text())
        [entry] = [file for file in record["files"] if file["path"] == bom.PATH]
        assert entry["sha256"], "it is signed as every other file"
        fetched = {
            file["sha256"] for file in record["files"] if file["component"] != "configuration" and "sha256" in file
        }
        assert fetched <= {each["hashes"][0]["content"] for each in document["components"] if "hashes" in each}
        needs = {each["ref"]: each.get("dependsOn", []) for each in document["dependencies"]}
        assert any(ref.startswith("pkg:golang/k8s.io/cri-api@") for ref in needs[told["kubelet"]["bom-ref"]])
