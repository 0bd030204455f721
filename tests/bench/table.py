"""What was measured, as a table for the README and as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.bench.measure import Goal


@dataclass(frozen=True)
class Result:
    """goals: the rows; parts: medians of single parts (s); rounds: of full bakes; size: of all artifacts (bytes)."""

    goals: Sequence[Goal]
    parts: Mapping[str, float]
    desk: str
    rounds: int
    size: int


def rows(goals: Sequence[Goal]) -> list[str]:
    """Head and rows of the table."""
    lines = ["| What | Measured | Against | Ratio | Goal | |", "|---|---|---|---|---|---|"]
    for goal in goals:
        if goal.unit == "MB":
            cells = [f"{goal.measured / 1e6:.0f} MB", goal.against]
        else:
            cells = [f"{goal.measured:.2f} s", f"{goal.reference:.2f} s ({goal.against})"]
        met = "met" if goal.met else "**missed**"
        lines.append("| " + " | ".join([goal.name, *cells, f"{goal.ratio:.2f}x", f"<= {goal.limit:g}x", met]) + " |")
    return lines


def markdown(result: Result) -> str:
    """The table, and below it where the time of the least work goes."""
    lines = [
        *rows(result.goals),
        "",
        f"Medians of {result.rounds} rounds, warm page cache, {result.size / 1e9:.2f} GB of artifacts; {result.desk}.",
        "",
        *(f"- {name}: {seconds:.2f} s" for name, seconds in result.parts.items()),
    ]
    return "\n".join(lines) + "\n"


def written(result: Result, folder: Path) -> str:
    """Writes folder/bench.md and folder/bench.json; returns the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    text = markdown(result)
    (folder / "bench.md").write_text(text)
    (folder / "bench.json").write_text(json.dumps({**asdict(result), "goals": facts(result.goals)}, indent=1) + "\n")
    return text


def facts(goals: Sequence[Goal]) -> list[dict[str, object]]:
    """For JSON."""
    return [{**asdict(goal), "ratio": goal.ratio, "met": goal.met} for goal in goals]
