"""A lab: the machines of one baked cluster on a switch of their own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from recipes.kit.model import Cluster
from recipes.records import read_fetched
from tests.lab import host, runs
from tests.lab.container import Container
from tests.lab.host import LAB, Argument
from tests.lab.machine import Machine, wait
from tests.lab.namespaces import Namespaces
from tests.lab.network import Switch
from tests.lab.wire import Stray

FAILED = LAB / "failed"
_Value = TypeVar("_Value")
alive: list[Lab] = []  # of this process


class Lab:
    """build: the folder of one baked cluster, build/<cluster>. To be used by `with`.

    kind: what its machines are, containers or virtual machines. Everything lives in namespaces that end with this
    process. When the block ends by an exception, what the machines logged is kept.
    """

    def __init__(self, build: Path, cluster: Cluster, kind: type[Machine] = Container) -> None:
        self.build, self.cluster, self._kind = build.resolve(), cluster, kind
        self.machines: dict[str, Machine] = {}  # those that were asked for

    def __enter__(self) -> Lab:
        host.prepare()
        with ExitStack() as stack:
            self.folder = stack.enter_context(runs.begun())
            self.inside = Namespaces()
            stack.callback(self.inside.close)
            self.switch = Switch(self.cluster, self.inside)
            alive.append(self)
            stack.callback(alive.remove, self)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if kind is not None and issubclass(kind, Exception):
                test = os.environ.get("PYTEST_CURRENT_TEST", "lab").removesuffix(" (call)")
                print(f"What the machines logged is kept in {self.keep_logs(test)}", file=sys.stderr)

    def machine(self, name: str, kind: type[Machine] | None = None) -> Machine:
        """A machine of the cluster: its empty disk, and its own ISO in the drive. Switched off at first.

        kind: at the first time, where it is another than the lab's."""
        if name not in self.machines:
            node = self.cluster.node(name)
            made = (kind or self._kind)(node, self.folder / name, self.inside, self.switch)
            made.insert(self.build / "seeds" / f"{name}.iso")
            self.machines[name] = made
        return self.machines[name]

    def reinstalled(self, name: str) -> Machine:
        """The same machine, which is off, with a new and empty disk."""
        self.machines.pop(name).scrap()
        return self.machine(name)

    def wait(self, condition: Callable[[], _Value], seconds: float, what: str) -> _Value:
        """As wait() of machine.py, with the patience of this lab's machines."""
        return wait(condition, seconds * self._kind.patience, what, self._kind.pause)

    @property
    def payload_volume(self) -> Path:
        """The ISO that machines with thin media share: for insert()."""
        return self.build / "payloads" / "payloads.iso"

    def serve(self, folder: Path, port: int = 8080) -> str:
        """An HTTP server on the machines' network, as long as the lab is there; its URL."""
        address = next(iter(self.switch.addresses.values()))
        command: list[Argument] = [
            sys.executable,
            "-m",
            "http.server",
            "--bind",
            str(address),
            "--directory",
            folder,
            str(port),
        ]
        self.inside.start(command)
        self.inside.run(["sh", "-c", f"until ss -Hltn sport = {port} | grep -q .; do sleep 0.1; done"], timeout=10)
        return f"http://{address}:{port}/"

    def kubectl(
        self, *words: Argument, check: bool = True, stdin: str | None = None, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """The desk's kubectl with the desk's admin.conf, on the machines' network."""
        program = self.folder / "kubectl"
        if not program.exists():
            obtained = read_fetched(self.build / "binaries" / "amd64.json")
            shutil.copyfile(next(file.path for file in obtained if file.name == "kubectl"), program)
            program.chmod(0o755)
        home = f"HOME={self.folder}"  # kubectl keeps a cache there
        on = [
            node.name
            for node in self.cluster.control_planes
            if node.name in self.machines and self.machines[node.name].is_on
        ]
        context = [f"--context={self.cluster.name}-{on[0]}"] if on else []
        command = ["env", home, program, f"--kubeconfig={self.build / 'admin.conf'}", *context, *words]
        return self.inside.run(command, check=check, stdin=stdin, timeout=timeout * self._kind.patience)

    def strays(self) -> list[Stray]:
        """What machines sent so far to addresses outside of the cluster's networks."""
        return self.switch.strays()

    def keep_logs(self, test: str) -> Path:
        """Keeps what every machine logged, under build/lab/failed/<test>, and gives back where."""
        target = FAILED / re.sub(r"[^\w.-]+", "-", test.rsplit("/", 1)[-1]).strip("-") / self.cluster.name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        if self.inside.alive:
            for machine in self.machines.values():
                machine.keep_logs(target / machine.name)
            (target / "strays.log").write_text("".join(f"{stray}\n" for stray in self.strays()))
        return target
