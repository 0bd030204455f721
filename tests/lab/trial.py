"""`doit lab`: a baked cluster switched on for an operator who wants to try it; it stays until `doit lab:down`.

A process of its own holds the lab, since everything in there ends with it. The API servers are reached from the host
through one port of the loopback: a small program inside of the lab's network has that socket and passes on what comes.
"""

from __future__ import annotations

import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import yaml

from recipes.kit import inventory
from recipes.kit.atomic import write
from recipes.records import read_fetched
from tests.lab import checks, host
from tests.lab.host import LabError
from tests.lab.lab import Lab
from tests.lab.machine import wait

MINUTES = 15  # until it is Ready at the latest


def up(build: Path, cluster_file: Path, images: Path | None) -> None:
    """Starts a trial and waits until its nodes are Ready; tells how to reach it. Raises LabError."""
    host.prepare()
    folder = build / "lab"
    if _running(folder) is not None:
        raise LabError("This cluster's lab is up already", where=folder, remedy="Use it, or end it: doit lab:down.")
    folder.mkdir(parents=True, exist_ok=True)
    words = [build, cluster_file, *([images] if images else [])]
    command = [sys.executable, "-m", "tests.lab.trial", *map(str, words)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd=Path(__file__).parents[2],
        )
    shown = 0
    try:
        while not (folder / "ready").exists():
            ended = process.poll() is not None
            told = (folder / "log").read_text(errors="replace")
            sys.stdout.write(told[shown:])
            sys.stdout.flush()
            shown = len(told)
            if ended:
                raise LabError("The lab did not come up", where=folder / "log", remedy="Read that, and what it names.")
            time.sleep(0.5)
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    print(_how(folder))


def _how(folder: Path) -> str:
    return f"""The cluster is up. It needs nothing of this host but memory, and it reaches nothing outside.

  {folder}/kubectl --kubeconfig {folder}/kubeconfig get nodes

  doit lab:down    ends it, and removes its machines' disks"""


def down(build: Path) -> None:
    """Ends the trial; where none runs, says so."""
    folder = build / "lab"
    pid = _running(folder)
    if pid is None:
        print(f"No lab of this cluster is up ({folder}).")
        return
    os.kill(pid, signal.SIGTERM)
    wait(lambda: _running(folder) is None, 60, "the lab has ended")
    print("The lab is down.")


def _running(folder: Path) -> int | None:
    """The PID of the process that holds this lab."""
    try:
        pid = int((folder / "pid").read_text())
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return None
    return pid if b"tests.lab.trial" in words and os.fsencode(folder.parent) in words else None


# ---- the process that holds the lab


def hold(build: Path, cluster_file: Path, images: Path | None) -> None:
    folder = build / "lab"
    (folder / "ready").unlink(missing_ok=True)
    write(folder / "pid", f"{os.getpid()}\n".encode())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    cluster = inventory.load(cluster_file, now=datetime.now(UTC))
    with Lab(build, cluster) as lab, socket.create_server(("127.0.0.1", 0)) as server:
        for node in cluster.nodes:
            say(f"switching on {node.name}")
            machine = lab.machine(node.name)
            if node.media == "thin":
                machine.insert(lab.payload_volume)
            machine.power_on()
        say("waiting until all nodes are Ready")
        clock = checks.wait_ready(lab, MINUTES * 60)
        say(", ".join(f"{what} after {seconds} s" for what, seconds in clock.reached.items()))
        for archive in sorted(images.glob("*.tar*")) if images else ():
            load(lab, archive)
        pass_on(lab, server)
        write(folder / "kubeconfig", kubeconfig(build, server.getsockname()[1]), mode=0o600)
        obtained = read_fetched(build / "binaries" / "amd64.json")
        shutil.copyfile(next(file.path for file in obtained if file.name == "kubectl"), folder / "kubectl")
        (folder / "kubectl").chmod(0o755)
        write(folder / "ready", b"")
        try:
            while lab.inside.alive:
                time.sleep(1)
        finally:
            for name in ("ready", "pid", "kubeconfig"):
                (folder / name).unlink(missing_ok=True)


def say(text: str) -> None:
    print(text, flush=True)


def load(lab: Lab, archive: Path) -> None:
    """An image archive into every node's containerd."""
    for node in lab.cluster.kubelets:
        machine = lab.machine(node.name)
        say(f"loading {archive.name} on {node.name}")
        place = f"/var/lib/{archive.name}"
        target = Path(f"/proc/{machine.first}/root{place}")
        shutil.copyfile(archive, target)
        try:
            machine.run("/opt/nodebake/current/bin/ctr", "--namespace=k8s.io", "images", "import", place, timeout=600)
        finally:
            target.unlink()


def kubeconfig(build: Path, port: int) -> bytes:
    """The desk's admin.conf, for the port on the loopback."""
    config = yaml.safe_load((build / "admin.conf").read_text())
    first = config["contexts"][0]["context"]["cluster"]
    (cluster,) = (each for each in config["clusters"] if each["name"] == first)
    cluster["cluster"]["server"] = f"https://127.0.0.1:{port}"
    kept = {"clusters": [cluster], "contexts": config["contexts"][:1]}
    text: str = yaml.safe_dump({**config, **kept, "current-context": config["contexts"][0]["name"]})
    return text.encode()


def pass_on(lab: Lab, server: socket.socket) -> None:
    """Starts the program that has the host's socket and connects to the API servers."""
    planes = [str(node.address) for node in lab.cluster.control_planes]
    program = [sys.executable, "-m", "tests.lab.trial", "--pass-on", str(server.fileno()), *planes]
    subprocess.Popen(
        [os.fspath(word) for word in lab.inside.command(program)],
        stdin=subprocess.DEVNULL,
        pass_fds=[server.fileno()],
        cwd=Path(__file__).parents[2],
    )


def relay(listening: int, planes: Sequence[str]) -> None:
    """Passes each connection on to the first API server that takes it."""
    with socket.socket(fileno=listening) as server, selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is server:
                    client, _ = server.accept()
                    if (behind := _connected(planes)) is None:
                        client.close()
                        continue
                    selector.register(client, selectors.EVENT_READ, behind)
                    selector.register(behind, selectors.EVENT_READ, client)
                    continue
                source, target = key.fileobj, key.data
                assert isinstance(source, socket.socket)
                try:
                    data = source.recv(1 << 16)
                    target.sendall(data)
                except OSError:
                    data = b""
                if not data:
                    for end in (source, target):
                        selector.unregister(end)
                        end.close()
                    break  # what else was ready may be the other end of this one


def _connected(planes: Sequence[str]) -> socket.socket | None:
    for plane in planes:
        try:
            return socket.create_connection((plane, 6443), timeout=3)
        except OSError:
            continue
    return None


if __name__ == "__main__":
    if sys.argv[1] == "--pass-on":
        relay(int(sys.argv[2]), sys.argv[3:])
    else:
        hold(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None)
