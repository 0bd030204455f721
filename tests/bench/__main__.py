"""`python -m tests.bench [ROUNDS]`: bakes the sample cluster and measures it against the goals; see README.md.

`python -m tests.bench boot [ROUNDS]`: boots clusters in the lab and measures those; see boot.py.
`python -m tests.bench scale`: bakes clusters of up to 5,000 machines; see scale.py.
`python -m tests.bench phases`: where the time of a full bake goes; see phases.py.
`python -m tests.bench others [ROUNDS]`: the same work by shell scripts; see others.py.
`python -m tests.bench flood`: 5,000 machines ask for their certificates; see flood.py.
`python -m tests.bench crowd`: 500 machines fetch their payload from one server; see crowd.py.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from recipes import payload
from tests.bench import boot, crowd, measure, others, phases, scale
from tests.bench.measure import Floor, Goal, Run
from tests.bench.table import Result, written
from tests.conftest import REMEMBERED, ROOT, Project, copy_project

CLUSTER = "ha"
THIN = "thin"  # the same cluster on thin media: nothing large is written for a machine
NODE = "worker-3"
IMPORTS = [sys.executable, "-c", "import doit, jinja2, pydantic"]


def main() -> None:
    if sys.argv[1:2] == ["boot"]:
        boot.main(int(sys.argv[2]) if len(sys.argv) > 2 else 3, desk())
        return
    if sys.argv[1:2] == ["scale"]:
        scale.main(desk())
        return
    if sys.argv[1:2] == ["phases"]:
        phases.main(desk())
        return
    if sys.argv[1:2] == ["others"]:
        others.main(desk(), int(sys.argv[2]) if len(sys.argv) > 2 else 3)
        return
    if sys.argv[1:2] == ["crowd"]:
        crowd.main(desk())
        return
    if sys.argv[1:2] == ["flood"]:
        from tests.bench import flood  # wants the daemon's own modules

        flood.main(desk())
        return
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    (ROOT / "build" / "bench").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="project-", dir=ROOT / "build" / "bench") as folder:
        result = bench(copy_project(Path(folder)), rounds)
    print(written(result, ROOT / "build" / "bench"), end="")


def bench(project: Project, rounds: int) -> Result:
    """Measures in a project that is a copy; what is compared is measured in turns, so that both see the same desk."""
    project.remember(CLUSTER)
    tell("baking once, so that the cache is filled and the store minted")
    project.doit()
    text = (
        (project.clusters / f"{CLUSTER}.yaml").read_text().replace(f"name: {CLUSTER}\n", "name: thin\nmedia: thin\n", 1)
    )
    (project.clusters / f"{THIN}.yaml").write_text(text)
    project.remember(THIN)
    project.doit(f"cluster=recipes/clusters/{THIN}.yaml")
    if not REMEMBERED.exists():
        REMEMBERED.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(project.clusters / f"{CLUSTER}.yaml.secrets" / "choices.json", REMEMBERED)
    bakes, floors = rebakes(project, rounds)
    small = small_runs(project, rounds)
    imports = median(run.seconds for run in small["imports"])
    seconds = median(run.seconds for run in bakes)
    goals = [
        Goal(
            "full re-bake, warm cache",
            seconds,
            median(each.seconds for each in floors),
            1.5,
            "hashing, compressing and writing the same bytes once",
        ),
        Goal("no-op", median(run.seconds for run in small["no-op"]), imports, 3, "importing libraries"),
        Goal(
            "one changed node, thin media",
            median(run.seconds for run in small["changed, thin"]),
            imports,
            4,
            "the same",
        ),
        Goal("one changed node, full media", median(run.seconds for run in small["changed"]), imports, 4, "the same"),
        Goal("peak memory", max(run.peak for run in bakes), 300e6, 1, "300 MB", "MB"),
    ]
    parts = {
        "floor: hashing": median(each.hashing for each in floors),
        "floor: compressing": median(each.compressing for each in floors),
        "floor: writing, synced": median(each.writing for each in floors),
        "processor, re-bake": median(run.processor for run in bakes),
        "processor, floor": median(each.processor for each in floors),
        **{f"processor, {name}": median(run.processor for run in runs) for name, runs in small.items()},
    }
    return Result(goals, parts, desk(), rounds, sum(path.stat().st_size for path in artifacts(project)))


def rebakes(project: Project, rounds: int) -> tuple[list[Run], list[Floor]]:
    """Full bakes without any artifact, record or state, each followed by the least work for the same bytes."""
    bakes: list[Run] = []
    floors: list[Floor] = []
    for number in range(rounds):
        tell(f"full re-bake {number + 1} of {rounds}")
        every, distinct = inputs(project)
        measure.warm(distinct)
        shutil.rmtree(project.root / "build" / CLUSTER)
        measure.settle()
        bakes.append(measure.run(project.command(), project.root))
        measure.warm([*distinct, *artifacts(project)])
        measure.settle()
        floors.append(measure.floor(distinct, every, artifacts(project), project.root / "build" / "floor"))
    return bakes, floors


def small_runs(project: Project, rounds: int) -> dict[str, list[Run]]:
    """Imports, a bake of nothing and a bake of one machine whose MAC address was edited, in turns."""
    runs: dict[str, list[Run]] = {"imports": [], "no-op": [], "changed": [], "changed, thin": []}
    full, thin = (project.clusters / f"{name}.yaml" for name in (CLUSTER, THIN))
    for number in range(-1, 2 * rounds):
        tell(f"small runs {number + 1} of {2 * rounds}")
        for file in (full, thin):
            file.write_text(measure.change_mac(file.read_text(), NODE))
        measure.warm(artifacts(project))
        measure.settle()
        turn = {
            "imports": measure.run(IMPORTS, project.root),
            "changed": measure.run(project.command(), project.root),
            "no-op": measure.run(project.command(), project.root),
            "changed, thin": measure.run(project.command(f"cluster={thin}"), project.root),
        }
        for name, run in turn.items():
            if number >= 0:  # the first turn fills caches
                runs[name].append(run)
    return runs


def artifacts(project: Project) -> list[Path]:
    """Payloads, node tarballs and seeds: everything large that a bake writes."""
    folder = project.root / "build" / CLUSTER
    return sorted(path for path in folder.rglob("*") if path.suffix in (".gz", ".iso"))


def inputs(project: Project) -> tuple[list[Path], list[Path]]:
    """The files that the payloads are packed from: one after the other for every payload; and each one once."""
    folder = project.root / "build" / CLUSTER
    known: dict[str, Path] = {}
    for kind in ("binaries", "packages", "images"):
        for record in sorted((folder / kind).glob("*.json")):
            for entry in json.loads(record.read_text()):
                fetched = entry.get("archive", entry)
                known[fetched["sha256"]] = project.root / fetched["path"]
    every = [
        known[entry["sha256"]]
        for tarball in sorted((folder / "payloads").glob("*.tar.gz"))
        for entry in payload.read_record(tarball, "files")[0]
        if entry.get("sha256") in known
    ]
    return every, sorted(set(every))


def desk() -> str:
    """The machine in a line: processors, kernel, Python, the file system of build/."""
    system = subprocess.run(["stat", "-f", "-c", "%T", ROOT / "build"], capture_output=True, text=True).stdout.strip()
    return (
        f"{measure.CORES} cores, {platform.system()} {platform.machine()}, Python {platform.python_version()}, {system}"
    )


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
