"""What a bake remembers of the one before it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from recipes.bake import Bake
from recipes.kit.choices import Choices
from recipes.kit.download import Desk
from recipes.kit.progress import Lines
from tests import artifacts, samples


def baked(folder: Path, numbers: str, *, minting: bool = True) -> str:
    """The founders, where control planes with these numbers are the etcd members."""
    planes = (samples.node(f"control-{one}", "control-plane", 10 + int(one), runs_etcd=True) for one in numbers)
    desk = Desk(build=folder / "build", progress=Lines(), choices=Choices(folder / "choices.json"))
    cluster = replace(samples.ha(), nodes=(*planes, *samples.ha().workers))
    bake = Bake(cluster, desk, folder, artifacts.NOW, minting=minting)
    assert all(bake.joins(node) == (node.name not in bake.founders) for node in cluster.etcd_members)
    assert not any(bake.joins(node) for node in cluster.workers)
    return "".join(sorted(name.removeprefix("control-") for name in bake.founders))


@pytest.mark.parametrize(
    ("bakes", "founders"),
    [
        ("123 123", "123"),
        ("1 123", "1"),
        ("1 123 123", "1"),
        ("123 1", "1"),
        ("123 1 123", "1"),  # whoever was away has lost its place
        ("123 345", "3"),
        ("123 345 456", ""),
        ("123 345 456 345", ""),
        ("123 789", "789"),  # another cluster
    ],
)
def test_who_begins_the_cluster(tmp_path: Path, bakes: str, founders: str) -> None:
    assert [baked(tmp_path, numbers) for numbers in bakes.split()][-1] == founders


def test_looking_remembers_nothing(tmp_path: Path) -> None:
    assert baked(tmp_path, "1", minting=False) == "1"
    assert baked(tmp_path, "123") == "123"
