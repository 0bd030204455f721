"""That the time of a bake is put down to what it was spent on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.bench import phases, sampler
from tests.bench.measure import Run
from tests.bench.phases import Phase

DODO = """\
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from recipes.kit.hashing import hash_all
from recipes.kit.pki import new_keys

def others():
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        pool.submit(new_keys).result()

def task_all():
    return {"actions": [hash_all, others]}
"""
BUSY = """\
import time

def {name}():
    until = time.process_time() + 0.1
    while time.process_time() < until:
        pass
"""


def test_every_process_tells_what_it_was_at(tmp_path: Path) -> None:
    (tmp_path / "dodo.py").write_text(DODO)
    folder = tmp_path / "recipes" / "kit"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent):
        (package / "__init__.py").touch()
    (folder / "hashing.py").write_text(BUSY.format(name="hash_all"))
    (folder / "pki.py").write_text(BUSY.format(name="new_keys"))
    subprocess.run([sys.executable, sampler.__file__, "out"], cwd=tmp_path, check=True, capture_output=True)
    crew, first = (json.loads(line) for line in (tmp_path / "out").read_text().splitlines())
    assert "hash" in first["clock"] and first["processor"]["hash"] > 0
    assert crew["processor"]["keys, certificates, tokens"] > 0 and "hash" not in crew["processor"]


def test_while_doit_waits_the_crew_counts() -> None:
    told = [
        {"clock": {"hash": 1.0, sampler.WAITING: 4.0}, "processor": {"hash": 2.0, sampler.WAITING: 0.1}},
        {"clock": {"render": 3.0, sampler.IDLE: 5.0}, "processor": {"render": 3.0}},
        {"clock": {"render": 3.0, "hash": 2.0}, "processor": {"render": 2.0, "hash": 1.0}},
    ]
    found = phases.summed_up(told)
    assert found == {"render": Phase(3.0, 5.0), "hash": Phase(2.0, 3.0)}
    text = phases.markdown({"ha": told}, [], {"ha": (Run(10, 7, 0), Run(6, 7, 0))}, "a desk")
    assert "| render | 3.00 s | 5.00 s |" in text and "| all | 5.00 s | 8.00 s |" in text
    assert "ha: 10.0 s on one core, 6.0 s on all" in text
