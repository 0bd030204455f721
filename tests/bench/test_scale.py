"""That the bench of large clusters bakes what it says, and counts as it says."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from recipes.kit import inventory
from recipes.kit.model import Cluster
from tests.bench import scale
from tests.bench.measure import Run
from tests.conftest import copy_project


def test_the_cluster_has_as_many_workers_and_keeps_their_addresses(tmp_path: Path) -> None:
    project = copy_project(tmp_path)

    def made(**late: int) -> Cluster:
        return inventory.load(scale.cluster_file(project, 50, **late), now=datetime.now(UTC))

    some, others = made(), made(late=1)
    assert (some.name, len(some.workers), len(some.control_planes)) == ("large-50", 50, 5)
    assert [node.name for node in others.workers if node not in some.workers] == ["late-1"]


def test_a_machine_costs_what_it_adds() -> None:
    bakes = {50: Run(10, 0, 0), 500: Run(14.5, 0, 0), 5_000: Run(82, 0, 600_000_000)}
    assert scale.per_machine(bakes) == {"50 to 500": 0.01, "500 to 5000": 0.015}
    edits = {
        name: Run(seconds, 0, 0)
        for name, seconds in (
            ("python", 0.1),
            ("no-op", 1.5),
            (scale.WORKER, 0.5),
            ("list", 0.2),
            ("another worker", 2),
        )
    }
    goals = {goal.name: goal for goal in scale.summed_up(bakes, 2_000_000_000, edits)}
    assert {name: goal.met for name, goal in goals.items()} == {
        "full bake, 5000 workers": False,
        "peak memory of it": False,
        "disk that it takes": True,
        "a thousand machines more, at 5,000": False,
        "no-op, beyond Python's start": True,
        "doit node:worker-3, beyond Python's start": False,
        "doit list, beyond Python's start": True,
        "another worker, with the control planes": True,
    }
