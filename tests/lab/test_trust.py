"""A machine whose system has the cluster's key, and strangers' media: none is run, whatever verifier it brings."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from recipes import seed
from recipes.kit import inventory
from recipes.kit.model import Node
from tests.conftest import Project, copy_project
from tests.lab import host
from tests.lab.checks import wait_machine_installed
from tests.lab.container import Container
from tests.lab.host import Argument
from tests.lab.lab import Lab
from tests.lab.machine import Machine
from tests.lab.namespaces import Namespaces
from tests.lab.network import Switch
from tests.lab.scenario import BOOT, CLUSTERS

NAME = "trust"
FILE = f"recipes/clusters/{NAME}.yaml"
REFUSED = "nodebake-trust: the seed on the volume cidata is not signed by a key that this system trusts"


def trusting(tarball: Path) -> type[Container]:
    """Machines onto whose disk the tarball was unpacked, and that get a seed's documents from the volume alone."""

    class Trusting(Container):
        def __init__(self, node: Node, folder: Path, inside: Namespaces, switch: Switch) -> None:
            super().__init__(node, folder, inside, switch)
            inside.run(["tar", "-xzf", tarball, "-C", self._disk])

        def _nspawn(self, namespace: str) -> list[Argument]:
            words = super()._nspawn(namespace)
            return [word for word in words if not str(word).endswith(":/var/lib/cloud/seed/nocloud")]

    return Trusting


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """Baked by the desk, after somebody else had baked the same cluster file with keys of their own: theirs.iso."""
    copy = copy_project(tmp_path)
    shutil.copy(CLUSTERS / f"{NAME}.yaml", copy.clusters)
    copy.remember(NAME)
    shutil.copytree(copy.clusters / f"{NAME}.yaml.secrets", copy.root / "theirs")
    copy.doit(f"cluster={FILE}", "secrets=theirs")
    shutil.copy(copy.root / f"build/{NAME}/seeds/only.iso", copy.root / "theirs.iso")
    copy.doit(f"cluster={FILE}")
    return copy


@pytest.fixture
def lab(project: Project) -> Iterator[Lab]:
    cluster = inventory.load(project.root / FILE, now=datetime.now(UTC))
    with Lab(project.root / "build" / NAME, cluster) as made:
        made.machine("only", trusting(made.build / "trust.tar.gz"))
        yield made


def opened(iso: Path, folder: Path) -> Path:
    folder.mkdir()
    host.run(["bsdtar", "-xf", iso, "-C", folder])
    return folder


def is_refused(machine: Machine, iso: Path, says: str) -> None:
    """Before cloud-init read a word of it."""
    machine.insert(iso)
    machine.power_on()
    machine.wait(lambda: says in machine.console, 60, "it is refused on the console")
    up = (
        "systemctl",
        "is-active",
        "multi-user.target",
    )  # two minutes: without a network configuration it waits for one
    machine.wait(lambda: machine.run(*up).returncode == 0, 240, "it is up")
    for path in ("/pwned", "/var/lib/nodebake", "/etc/systemd/system/nodebake-first-boot.service"):
        machine.run(f"test ! -e {path}")
    machine.run("test ! -e /var/lib/cloud/instance")
    assert machine.run("systemctl", "is-active", "cloud-init-local.service", check=False).stdout.strip() == "inactive"
    machine.crash()


@pytest.mark.matrix
def test_a_system_that_has_the_key_runs_nothing_of_a_strangers_medium(
    project: Project, lab: Lab, tmp_path: Path
) -> None:
    only, own = lab.machine("only"), lab.build / "seeds" / "only.iso"
    is_refused(only, project.root / "theirs.iso", REFUSED)

    documents = {"user-data": b"#cloud-config\nbootcmd: [[touch, /pwned]]\n", "meta-data": b"instance-id: x\n"}
    documents["network-config"] = b"version: 2\n"
    (tmp_path / "note").write_text("of a stranger")
    plain = seed.write_iso(
        {**documents, "note": tmp_path / "note"}, tmp_path / "plain.iso", label=seed.LABEL, mtime=1_790_000_000
    )
    is_refused(only, plain.path, "nodebake-trust: the volume cidata has no SHA256SUMS")

    # What cloud-init reads is ours, the artifact is not: our own first boot refuses it.
    ours, theirs = opened(own, tmp_path / "our-seed"), opened(project.root / "theirs.iso", tmp_path / "their-seed")
    shutil.copy(theirs / "node.tar.gz", ours)
    contents = {path.name: path if path.suffix == ".gz" else path.read_bytes() for path in ours.iterdir()}
    only.insert(seed.write_iso(contents, tmp_path / "mixed.iso", label=seed.LABEL, mtime=1_790_000_000).path)
    only.power_on()
    only.wait(lambda: "which this system does not trust" in only.console, 120, "first boot refuses it")
    only.run("test ! -e /opt/nodebake -a ! -e /etc/nodebake")

    only.insert(own)
    wait_machine_installed(only, BOOT)
    assert "which this system trusts" in only.console
