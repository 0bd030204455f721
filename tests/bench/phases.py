"""Where the time of a full bake goes, by phase; and that it is no slower where there is one core.

README.md says what exactly is measured.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench import measure, sampler, scale, table
from tests.bench.measure import Goal, Run
from tests.conftest import ROOT, Project, copy_project

SAMPLE = "ha"
MANY = 500  # workers of the cluster that is baked on one core and on all
ALONE = ("taskset", "--cpu-list", "0")


@dataclass(frozen=True)
class Phase:
    """Seconds by the clock and of processor."""

    clock: float
    processor: float


def main(desk: str) -> None:
    """Writes build/bench/phases.md and phases.json, and prints the former."""
    folder = ROOT / "build" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="project-", dir=folder) as copy:
        project = copy_project(Path(copy))
        files = {SAMPLE: project.clusters / f"{SAMPLE}.yaml"}
        files |= {f"large-{many}": scale.cluster_file(project, many) for many in (MANY, scale.LARGEST)}
        for name, file in files.items():
            project.remember(name)
            project.doit(f"cluster={file}", "binaries", "packages", "images")  # what is in the cache is looked up once
        bakes = {name: sampled(project, files[name]) for name in (SAMPLE, f"large-{scale.LARGEST}")}
        cores = {name: one_and_all(project, files[name]) for name in (SAMPLE, f"large-{MANY}")}
    goals = [
        Goal(f"{name}: processor on one core", alone.processor, every.processor, 1.05, "on all cores")
        for name, (alone, every) in cores.items()
    ]
    text = markdown(bakes, goals, cores, desk)
    (folder / "phases.md").write_text(text)
    facts = {
        "phases": {
            name: {phase: vars(spent) for phase, spent in summed_up(processes).items()}
            for name, processes in bakes.items()
        },
        "goals": table.facts(goals),
        "cores": {name: [vars(run) for run in runs] for name, runs in cores.items()},
    }
    (folder / "phases.json").write_text(json.dumps({**facts, "desk": desk}, indent=1) + "\n")
    print(text, end="")


def sampled(project: Project, file: Path) -> list[Mapping[str, Mapping[str, float]]]:
    """What each process of a full bake told: the first line is of the last to end, which is doit's own."""
    ready(project, file)
    out = project.root / "build" / "sampled"
    out.unlink(missing_ok=True)
    tell(f"{file.stem}, phases")
    measure.run([sys.executable, sampler.__file__, out, f"cluster={file}"], project.root)
    return [json.loads(line) for line in reversed(out.read_text().splitlines())]


def one_and_all(project: Project, file: Path) -> tuple[Run, Run]:
    """A full bake on one core, and one on all."""
    runs = []
    for prefix in (ALONE, ()):
        ready(project, file)
        tell(f"{file.stem}, {'one core' if prefix else 'all cores'}")
        runs.append(measure.run([*prefix, *project.command(f"cluster={file}")], project.root))
    return runs[0], runs[1]


def ready(project: Project, file: Path) -> None:
    """Nothing of it is baked; only the cache of components and the secret store are there, once it was minted."""
    shutil.rmtree(project.root / "build" / file.stem, ignore_errors=True)
    measure.warm(path for path in (project.root / "build" / "downloads").rglob("*") if path.is_file())
    measure.settle()


def summed_up(processes: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Phase]:
    """By phase, the longest first. While doit waited for its crew, the clock is divided as the crew's own was."""
    first, *crew = processes
    clock: defaultdict[str, float] = defaultdict(float, first["clock"])
    processor: defaultdict[str, float] = defaultdict(float, first["processor"])
    shares: defaultdict[str, float] = defaultdict(float)
    for process in crew:
        for phase, spent in process["processor"].items():
            processor[phase] += spent
        for phase, spent in process["clock"].items():
            shares[phase] += spent if phase != sampler.IDLE else 0.0
    waited = clock.pop(sampler.WAITING, 0.0)
    for phase, share in shares.items():
        clock[phase] += waited * share / sum(shares.values())
    phases = {phase: Phase(clock[phase], processor[phase]) for phase in clock.keys() | processor.keys()}
    for unnamed in (sampler.IDLE, sampler.WAITING):
        phases.pop(unnamed, None)
    return dict(sorted(phases.items(), key=lambda item: -item[1].clock))


def markdown(
    bakes: Mapping[str, Sequence[Mapping[str, Mapping[str, float]]]],
    goals: Sequence[Goal],
    cores: Mapping[str, tuple[Run, Run]],
    desk: str,
) -> str:
    found = {name: summed_up(processes) for name, processes in bakes.items()}
    lines = ["| Phase | " + " | ".join(f"{name}, clock | processor" for name in found) + " |"]
    lines.append("|---" * (1 + 2 * len(found)) + "|")
    for phase in dict.fromkeys(phase for phases in found.values() for phase in phases):
        spent = [phases.get(phase, Phase(0, 0)) for phases in found.values()]
        lines.append(f"| {phase} | " + " | ".join(f"{one.clock:.2f} s | {one.processor:.2f} s" for one in spent) + " |")
    total = [(sum(p.clock for p in each.values()), sum(p.processor for p in each.values())) for each in found.values()]
    lines.append("| all | " + " | ".join(f"{clock:.2f} s | {processor:.2f} s" for clock, processor in total) + " |")
    lines += ["", *table.rows(goals), "", f"One round; {desk}.", ""]
    for name, (alone, every) in cores.items():
        lines.append(f"- {name}: {alone.seconds:.1f} s on one core, {every.seconds:.1f} s on all")
    return "\n".join(lines) + "\n"


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
