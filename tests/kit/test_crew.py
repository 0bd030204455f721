"""Processes that do work of one kind side by side."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recipes.kit import crew
from recipes.kit.crew import Crew
from recipes.kit.errors import BakeError


def test_every_name_comes_back_with_its_result_from_another_process() -> None:
    told: dict[str, tuple[str, int]] = {}
    with Crew(lambda name: (name.upper(), os.getpid())) as made:
        for number in range(40):
            made.begin(f"n{number}")
            if made.busy:
                name, result = made.next()
                told[name] = result
        assert len(made) < 40
        while made:
            name, result = made.next()
            told[name] = result
    assert {name: result for name, (result, _) in told.items()} == {f"n{n}": f"N{n}" for n in range(40)}
    assert os.getpid() not in {process for _, process in told.values()}


def test_what_has_begun_comes_to_its_end(tmp_path: Path) -> None:
    def slowly(name: str) -> None:
        (tmp_path / f"{name}.begun").touch()
        time.sleep(0.5)
        (tmp_path / f"{name}.done").touch()

    with pytest.raises(KeyboardInterrupt), Crew(slowly) as made:
        for number in range(10 * crew.CORES):
            made.begin(str(number))
        while not list(tmp_path.glob("*.begun")):
            time.sleep(0.01)
        raise KeyboardInterrupt
    begun, done = ({path.stem for path in tmp_path.glob(f"*.{kind}")} for kind in ("begun", "done"))
    assert begun == done and len(done) < 10 * crew.CORES


def test_a_process_that_is_killed_is_told() -> None:
    with Crew(lambda name: os.kill(os.getpid(), signal.SIGKILL)) as made:
        made.begin("worker-1")
        with pytest.raises(BakeError, match="a process that baked worker-1 or another machine was killed"):
            made.next()


def test_none_outlives_the_one_that_began_it(tmp_path: Path) -> None:
    script = f"""
import os, pathlib, time
from recipes.kit.crew import Crew
def work(name):
    pathlib.Path({str(tmp_path)!r}, str(os.getpid())).touch()
    time.sleep(60)
with Crew(work) as made:
    made.begin("a")
    made.begin("b")
    made.next()
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    while not (there := [int(path.name) for path in tmp_path.iterdir()]):
        time.sleep(0.05)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(Path(f"/proc/{each}/cmdline").exists() for each in there):
        time.sleep(0.05)
    assert not [each for each in there if Path(f"/proc/{each}/cmdline").exists()]
