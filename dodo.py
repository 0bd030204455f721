"""The task graph: `doit` bakes the whole cluster, `doit node:NAME` one machine, `doit list` names what there is.

Arguments: cluster=FILE  secrets=DIR  key=FILE  source=release|modules  mirror=URL-or-DIR  images=DIR (doit lab)
           registry=oci://HOST/REPOSITORY (doit publish)
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any, cast, get_args

from recipes import report
from recipes.bake import PACKAGE, Bake, code
from recipes.kit import graph, kept, store, vault
from recipes.kit.choices import Choices
from recipes.kit.download import Desk
from recipes.kit.errors import BakeError, BakeErrors
from recipes.kit.graph import SIDE_BY_SIDE, Same, action, argument
from recipes.kit.model import Arch, Node, Role, Source
from recipes.kit.profiles import ADMIN_CONF, DESK
from recipes.kit.progress import for_this_terminal
from recipes.kit.vault import Key
from recipes.records import still_there

Task = dict[str, Any]


def give_back(secrets: Path) -> None:
    """Under sudo: what root wrote in the person's folders is the person's, as what they bake themselves. Not build/lab:
    the machines' disks."""
    person, group = (int(os.environ.get(name, "0")) for name in ("SUDO_UID", "SUDO_GID"))
    if os.geteuid() != 0 or person == 0:
        return
    for top in (graph.BUILD, secrets):
        if top.absolute().parent.stat().st_uid != person:
            continue
        for folder, folders, files in os.walk(top):
            if Path(folder) == graph.BUILD and "lab" in folders:
                folders.remove("lab")
            for path in (Path(folder), *(Path(folder, file) for file in files)):
                if path.lstat().st_uid == 0:
                    os.chown(path, person, group, follow_symlinks=False)


@cache
def bake() -> Bake:
    graph.only_arguments("cluster", "secrets", "key", "source", "mirror", "images", "registry")
    now = datetime.now(UTC)
    file = Path(argument("cluster") or PACKAGE / "clusters" / "ha.yaml")
    where = Path(argument("secrets") or store.default_directory(file))
    cluster = kept.load(file, now=now, code=code(), store=where)
    desk = Desk(
        build=graph.BUILD.absolute(),
        mirror=argument("mirror"),
        source=cast(Source | None, argument("source", one_of=get_args(Source))),
        progress=for_this_terminal(),
        choices=Choices(where / "choices.json"),
    )
    key = argument("key")
    atexit.register(give_back, where)
    return Bake(cluster, desk, where, now, key=Key(Path(key).expanduser() if key else None))


DOIT_CONFIG = {
    "dep_file": str(bake().folder / ".state.db"),
    "backend": "state",
    "check_file_uptodate": graph.Checker,
    "reporter": graph.Reporter,
    "verbosity": 2,
    "default_tasks": ["binaries", "packages", "images", "payload", "node", "volume", "desk", "schema"],
}


def still(record: Path) -> Callable[[], bool]:
    """An `uptodate` check: what a record names has not been cleared out of the cache."""
    return partial(still_there, record)


def architectures() -> list[Arch]:
    return sorted({node.arch for node in bake().cluster.nodes})


def task__store() -> Task:
    """tell what the cluster file's rules warn of, and mint what the secret store lacks"""
    return {"actions": [action(bake().begin)], "uptodate": [False]}


def task_binaries() -> Iterator[Task]:
    """download or build the components"""
    for arch in architectures():
        yield {
            "name": arch,
            "actions": [action(bake().make_binaries, arch)],
            "task_dep": ["_store"],
            "targets": [bake().record("binaries", arch)],
            "uptodate": [Same(bake().inputs_of_binaries, arch), still(bake().record("binaries", arch))],
            "clean": True,
        }


def task_packages() -> Iterator[Task]:
    """fetch the Debian packages that the machines lack, with their closure"""
    for role, arch in bake().cluster.payloads:
        yield {
            "name": f"{role}-{arch}",
            "actions": [action(bake().make_packages, role, arch)],
            "task_dep": ["_store"],
            "targets": [bake().record("packages", f"{role}-{arch}")],
            "uptodate": [
                Same(bake().inputs_of_packages, role, arch),
                still(bake().record("packages", f"{role}-{arch}")),
            ],
            "clean": True,
        }


def task_images() -> Iterator[Task]:
    """make or fetch the container images"""
    for arch in architectures():
        yield {
            "name": arch,
            "actions": [action(bake().make_images, arch)],
            "file_dep": [bake().record("binaries", arch)],
            "targets": [bake().record("images", arch)],
            "uptodate": [Same(bake().inputs_of_images, arch), still(bake().record("images", arch))],
            "clean": True,
        }


def task_payload() -> Iterator[Task]:
    """pack what all machines of one role share"""
    for role, arch in bake().cluster.payloads:
        records = [
            bake().record("binaries", arch),
            bake().record("images", arch),
            bake().record("packages", f"{role}-{arch}"),
        ]
        yield {
            "name": f"{role}-{arch}",
            "actions": [action(bake().make_payload, role, arch)],
            "file_dep": records,
            "targets": [bake().payload(role, arch), bake().payload_record(role, arch), bake().payload_bom(role, arch)],
            "uptodate": [Same(bake().inputs_of_payload, role, arch)],
            "clean": True,
        }


def task_node() -> Iterator[Task]:
    """bake one machine: its tarball and its seed ISO"""
    shared = payload_records()
    for node in wanted_nodes("node", "image", whole=("lab",)):
        yield {
            "name": node.name,
            "actions": [action(bake().make_node, node)],
            "meta": SIDE_BY_SIDE,
            "file_dep": [shared[node.role, node.arch]],
            "targets": [bake().tarball(node), bake().seed(node)],
            "uptodate": [Same(bake().inputs_of_node, node)],
            "clean": True,
        }


def task_certs() -> Iterator[Task]:
    """bake what renews a machine that runs: its certificates and token, without the payload that it has"""
    shared = payload_records()
    for node in wanted_nodes("certs"):
        yield {
            "name": node.name,
            "actions": [action(bake().make_certs, node)],
            "meta": SIDE_BY_SIDE,
            "file_dep": [shared[node.role, node.arch]],
            "targets": [bake().certs(node)],
            "uptodate": [Same(bake().inputs_of_node, node)],
            "clean": True,
        }


def task__base() -> Task:
    """tell what the desk lacks to make disk images, before a bake that may take long"""
    nodes = wanted_nodes("image") or bake().cluster.nodes
    return {"actions": [action(bake().check_base, arch) for arch in sorted({node.arch for node in nodes})]}


def task_base() -> Iterator[Task]:
    """make or fetch the disk that disk images begin with"""
    for arch in architectures():
        yield {
            "name": arch,
            "actions": [action(bake().make_base, arch)],
            "task_dep": ["_base", "_store"],
            "targets": bake().base_files(arch),
            "uptodate": [Same(bake().inputs_of_base, arch), still(bake().record("bases", arch))],
            "clean": True,
        }


def task_image() -> Iterator[Task]:
    """bake one machine's disk image: a Debian that boots, and its seed on the same disk"""
    for node in wanted_nodes("image"):
        yield {
            "name": node.name,
            "actions": [action(bake().make_disk, node)],
            "task_dep": ["_base"],
            "file_dep": [bake().record("bases", node.arch), bake().seed(node)],
            "targets": [bake().disk(node)],
            "uptodate": [Same(code)],
            "clean": True,
        }


def wanted_nodes(*kinds: str, whole: Collection[str] = ()) -> list[Node]:
    """Only the machines that were named, where some were: the others' tasks would cost time and are not needed."""
    names = graph.named(*kinds, whole=whole)
    return list(bake().cluster.nodes) if names is None else [bake().cluster.node(name) for name in names]


def payload_records() -> dict[tuple[Role, Arch], Path]:
    return {payload: bake().payload_record(*payload) for payload in bake().cluster.payloads}


def task_volume() -> Iterator[Task]:
    """write the payloads' volume that machines with thin media share"""
    if any(node.media == "thin" for node in bake().cluster.nodes):
        yield {
            "name": "payloads",
            "actions": [action(bake().make_volume)],
            "file_dep": list(payload_records().values()),
            "targets": [bake().volume],
            "uptodate": [Same(code)],
            "clean": True,
        }


def task__publish() -> Task:
    """tell that no registry is named, before a bake that may take long"""
    return {"actions": [action(registry)]}


def task_publish() -> Iterator[Task]:
    """push the payloads to an OCI registry: the cluster file's payloadServer, or registry=oci://HOST/REPOSITORY"""
    for role, arch in bake().cluster.payloads:
        yield {
            "name": f"{role}-{arch}",
            "actions": [action(publish, role, arch)],
            "task_dep": ["_publish"],
            "file_dep": [bake().payload_record(role, arch)],
            "uptodate": [False],  # the registry alone knows what it has
        }


def task_desk() -> Task:
    """write what the administrators need: admin.conf, trust.tar.gz, known_hosts"""
    return {
        "actions": [action(bake().make_desk)],
        "task_dep": ["_store"],
        "targets": bake().desk_files,
        "uptodate": [Same(bake().inputs_of_desk)],
        "clean": True,
    }


def task_schema() -> Task:
    """write the cluster file's JSON Schema, for editors"""
    return {
        "actions": [action(bake().make_schema)],
        "targets": [bake().schema],
        "uptodate": [Same(code)],
        "clean": True,
    }


def task__lab() -> Task:
    """tell what a lab lacks on this host, before a bake that may take long"""
    return {"actions": [action(lab_check)]}


def task_lab() -> Task:
    """boot what was baked on this host, in containers (root); images=DIR: more image archives to load"""
    return {"actions": [action(lab_up)], "task_dep": ["_lab", "node", "volume", "desk"]}


def task_lab_down() -> Task:
    """end what `doit lab` booted (root)"""
    return {"basename": "lab:down", "actions": [action(lab_down)]}


def lab_images() -> Path | None:
    images = argument("images")
    return Path(images) if images else None


def lab_check() -> None:
    from tests.lab import trial

    trial.check(bake().cluster, lab_images())


def lab_up() -> None:
    from tests.lab import trial

    trial.up(bake().folder, bake().cluster, lab_images())


def lab_down() -> None:
    from tests.lab import trial

    trial.down(bake().folder)


def leftovers() -> list[Path]:
    """What `doit clean` finds when the tasks have cleaned up: of machines that the cluster file has no more."""
    return bake().artifacts


def registry() -> None:
    bake().registry(argument("registry"))


def publish(role: Role, arch: Arch) -> None:
    print(bake().publish(role, arch, argument("registry")))


def info(names: list[str]) -> None:
    """What `doit info [NODE ...]` prints."""
    look = replace(bake(), minting=False)
    if not names:
        print(report.cluster(look))
    for node in [look.cluster.node(name.removeprefix("node:")) for name in names]:
        print(report.machine(look, node))


def rekey(names: list[str]) -> None:
    """What `doit rekey NODE ...` does."""
    if not names:
        raise BakeError(
            "there is no NODE to rekey", remedy=f"say doit rekey NODE ..., or {ADMIN_CONF} for the administrators'"
        )
    here = bake()
    named = [name.removeprefix("node:") for name in names]
    owners = dict.fromkeys(DESK if name == ADMIN_CONF else here.cluster.node(name).name for name in named)
    before = store.open(here.where, here.cluster, now=here.now, mint=False, key=here.key)
    store.rekey(here.where, here.cluster, owners, now=here.now, key=here.key)
    print(report.rekeyed(replace(here, minting=False), list(owners), before))


def verify(names: list[str]) -> None:
    """What `doit verify FILE ...` does: a line for each file that is whole; then BakeErrors for the others."""
    from recipes.verify import Verifier

    if not names:
        raise BakeError("there is no FILE to check", remedy="say doit verify FILE ...")
    verifier, errors = Verifier(replace(bake(), minting=False)), list[BakeError]()
    for name in names:
        try:
            print(f"{name}: {verifier.of(Path(name))}", flush=True)
        except BakeError as error:
            errors.append(error)
    if errors:
        raise BakeErrors(errors)


def encrypt(recipients: list[str]) -> None:
    """What `doit encrypt [RECIPIENT ...]` does."""
    vault.encrypt(bake().where, bake().key, recipients)
    print(f"{bake().where / vault.ENCRYPTED} holds the secret store now; its plain files are removed.")
    print("What was baked is secret still: admin.conf, seeds, tarballs. A backup may hold the plain files.")


def decrypt(words: list[str]) -> None:
    """What `doit decrypt` does."""
    if words:
        raise BakeError(f"there is nothing like {words[0]} to decrypt", remedy="say doit decrypt")
    vault.decrypt(bake().where, bake().key)
    print(f"The files of {bake().where} can be read again.")


def at_end(selected: list[str]) -> None:
    """What a finished bake ends with: every machine, and every disk image, that was asked for."""
    for kind, told in (("node", report.summary), ("image", report.disks), ("certs", report.renewals)):
        names = {name for one in selected for part, _, name in [one.partition(":")] if part == kind}
        if names:
            print(told(bake(), [node for node in bake().cluster.nodes if kind in selected or node.name in names]))


graph.Reporter.at_end = at_end
