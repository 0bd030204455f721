"""What baking thousands of machines costs: large.yaml at several sizes, and what an edit of it costs then.

README.md says what exactly is measured.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from recipes.kit import kept
from recipes.kit.archive import END_MEMBER
from tests.bench import measure, table
from tests.bench.measure import Goal, Run
from tests.conftest import ROOT, Project, copy_project

SIZES = (50, 500, 5_000)  # workers
LARGEST = SIZES[-1]
FULL = 50  # workers with full media: 20 GB
ROUNDS = 5
SMALL = 3  # times in a round that a smaller size is baked: what a machine more costs there is a small difference of two
WORKER = "node:worker-3"
PYTHON = [sys.executable, "-c", "pass"]


def main(desk: str) -> None:
    """Writes build/bench/scale.md and scale.json, and prints the former."""
    folder = ROOT / "build" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="project-", dir=folder) as copy:
        project = copy_project(Path(copy))
        # In turns, since a host is faster at one time than at another.
        runs = [(workers, whole(project, workers)) for workers in (*SIZES[:-1] * SMALL, LARGEST) * ROUNDS]
        bakes = {size: min((run for of, run in runs if of == size), key=lambda run: run.seconds) for size in SIZES}
        size = on_disk(project.root / "build" / f"large-{LARGEST}")
        edits = small(project)
        goals = [*summed_up(bakes, size, edits), full_media(project)]
    costs = per_machine(bakes)
    text = markdown(goals, bakes, costs, desk)
    (folder / "scale.md").write_text(text)
    facts = {
        "goals": table.facts(goals),
        "per machine": costs,
        "bakes": {size: vars(run) for size, run in bakes.items()},
    }
    (folder / "scale.json").write_text(json.dumps({**facts, "desk": desk}, indent=1) + "\n")
    print(text, end="")


def cluster_file(project: Project, workers: int, *, late: int = 0) -> Path:
    """large.yaml with so many workers. late: of them, those that take the place of the last ones."""
    text = (project.clusters / "large.yaml").read_text()
    text = text.replace("name: large\n", f"name: large-{workers}\n", 1).replace(
        f"count: {LARGEST}", f"count: {workers - late}", 1
    )
    if late:
        text = text.rstrip("\n") + f"\n  - {{name: late, role: worker, count: {late}, firstAddress: 172.16.4.1}}\n"
    file = project.clusters / f"large-{workers}.yaml"
    file.write_text(text)
    return file


def whole(project: Project, workers: int) -> Run:
    """A full bake of a new cluster, minting included; the cache of components is warm."""
    file = cluster_file(project, workers)
    for before in (project.root / "build" / file.stem, file.with_name(f"{file.name}.secrets")):
        shutil.rmtree(before, ignore_errors=True)
    project.remember(file.stem)
    project.doit(f"cluster={file}", "binaries", "packages", "images")  # what is in the cache is looked up once
    (file.with_name(f"{file.name}.secrets") / kept.NAME).unlink()  # so that the cluster file is read, too
    measure.settle()
    tell(f"{workers} workers")
    return measure.run(project.command(f"cluster={file}"), project.root)


def small(project: Project) -> Mapping[str, Run]:
    """With the largest cluster baked: Python alone; a bake of nothing, of one machine, a list; a worker in another's
    place."""
    file = cluster_file(project, LARGEST)
    found: dict[str, Run] = {}
    for name, command in {
        "python": PYTHON,
        "no-op": project.command(f"cluster={file}"),
        WORKER: project.command(f"cluster={file}", WORKER),
        "list": project.command(f"cluster={file}", "list"),
    }.items():
        tell(name)
        measure.run(command, project.root)  # fills caches
        found[name] = min((measure.run(command, project.root) for _ in range(5)), key=lambda run: run.seconds)
    cluster_file(project, LARGEST, late=1)
    tell("another worker")
    found["another worker"] = measure.run(project.command(f"cluster={file}"), project.root)
    shutil.rmtree(project.root / "build" / file.stem)
    return found


def full_media(project: Project) -> Goal:
    """Machines whose payload is there, against cat of payload and identity to as many tarballs and seeds."""
    file = cluster_file(project, FULL)
    file.write_text(file.read_text().replace("media: thin", "media: full"))
    build = project.root / "build" / file.stem
    shutil.rmtree(build)
    project.doit(f"cluster={file}", "payload")
    tell(f"{FULL} workers with full media")
    measure.settle()
    baked = measure.run(project.command(f"cluster={file}", "node"), project.root)
    parts = project.root / "build" / "parts"
    parts.mkdir()
    lines = ["set -e"]
    for tarball in sorted((build / "nodes").iterdir()):
        role = "control-plane" if tarball.name.startswith("control") else "worker"
        payload = build / "payloads" / f"{role}-amd64.tar.gz"
        with tarball.open("rb") as made:
            made.seek(payload.stat().st_size - len(END_MEMBER))
            (parts / f"{tarball.name}.identity").write_bytes(made.read())
        identity, copy = parts / f"{tarball.name}.identity", parts / tarball.name
        lines += [f"cat {payload} {identity} >{copy}", f"cat {copy} >{copy}.iso"]
    shutil.rmtree(build / "nodes")
    shutil.rmtree(build / "seeds")
    measure.settle()
    copied = measure.run(["sh", "-c", "\n".join([*lines, "sync"])], project.root)
    shutil.rmtree(parts)
    return Goal(f"{FULL} machines with full media", baked.seconds, copied.seconds, 1.5, "cat of the same bytes, synced")


def on_disk(folder: Path) -> int:
    """Bytes that a cluster's folder takes up."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*"))


def per_machine(bakes: Mapping[int, Run]) -> dict[str, float]:
    """Seconds that each further machine costs, between one size and the next."""
    steps = itertools.pairwise(SIZES)
    return {f"{few} to {many}": (bakes[many].seconds - bakes[few].seconds) / (many - few) for few, many in steps}


def summed_up(bakes: Mapping[int, Run], size: int, edits: Mapping[str, Run]) -> list[Goal]:
    start, largest = edits["python"].seconds, bakes[LARGEST]
    few, many = per_machine(bakes).values()
    return [
        Goal(f"full bake, {LARGEST} workers", largest.seconds, 60, 1, "the goal"),
        Goal("peak memory of it", largest.peak, 500e6, 1, "500 MB", "MB"),
        Goal("disk that it takes", size, 3e9, 1, "3000 MB", "MB"),
        Goal("a thousand machines more, at 5,000", 1000 * many, 1000 * few, 1.2, "at 500"),
        Goal("no-op, beyond Python's start", edits["no-op"].seconds - start, 1.5, 1, "the goal"),
        Goal(f"doit {WORKER}, beyond Python's start", edits[WORKER].seconds - start, 0.3, 1, "the goal"),
        Goal("doit list, beyond Python's start", edits["list"].seconds - start, 0.5, 1, "at once"),
        Goal("another worker, with the control planes", edits["another worker"].seconds - start, 5, 1, "a few seconds"),
    ]


def markdown(goals: Sequence[Goal], bakes: Mapping[int, Run], costs: Mapping[str, float], desk: str) -> str:
    lines = [
        *table.rows(goals),
        "",
        f"The fastest of {ROUNDS} full bakes ({ROUNDS * SMALL} of the smaller ones), of five other runs; {desk}.",
        "",
        *(
            f"- {size} workers: {run.seconds:.1f} s, {run.processor:.1f} s of processor, {run.peak / 1e6:.0f} MB"
            for size, run in bakes.items()
        ),
        *(f"- one machine more, {steps} workers: {seconds * 1e3:.1f} ms" for steps, seconds in costs.items()),
    ]
    return "\n".join(lines) + "\n"


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
