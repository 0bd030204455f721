"""`doit lab`: a baked cluster switched on for an operator who wants to try it; it stays until `doit lab:down`.

A process of its own holds the lab, since everything in there ends with it. The API servers are reached from the host
through one port of the loopback: a small program inside of the lab's network has that socket and passes on what comes.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import yaml

from recipes.kit import inventory
from recipes.kit.atomic import write
from recipes.kit.errors import BakeError
from recipes.kit.model import Cluster
from recipes.records import read_fetched
from tests.lab import checks, host
from tests.lab.checks import Clock
from tests.lab.host import LabError
from tests.lab.lab import Lab
from tests.lab.machine import WentOff, wait

ROOT = Path(__file__).parents[2]
MINUTES = 15  # until all nodes are Ready at the latest
ARCHIVES = (".tar", ".tar.gz", ".tgz")
# What first boot says before it ends in vain: the reason, and the remedy below it.
_REFUSED = re.compile(r"first-boot: ([^\r\n]+)\r*\n[^\r\n]*?(  -> [^\r\n]+)")


def check(cluster: Cluster, images: Path | None) -> None:
    """Raises LabError where this host cannot run this lab, or images are asked for and are not there."""
    host.prepare()
    if other := [f"{node.name} ({node.arch})" for node in cluster.nodes if node.arch != "amd64"]:
        raise LabError(
            f"The lab's machines are amd64, these are not: {', '.join(other)}",
            where=cluster.file,
            remedy="Say cluster= with another cluster file.",
        )
    if images is not None:
        archives(images)


def archives(folder: Path) -> list[Path]:
    """The image archives in a folder. Raises LabError where there is none."""
    if not folder.is_dir():
        raise LabError("There is no such folder", where=folder, remedy="Say images= with a folder of image archives.")
    found = sorted(path for path in folder.iterdir() if path.name.endswith(ARCHIVES))
    if not found:
        kinds = ", ".join(f"*{ending}" for ending in ARCHIVES)
        raise LabError(f"No image archive lies there ({kinds})", where=folder, remedy="Put some there (docker save).")
    return found


def up(build: Path, cluster: Cluster, images: Path | None) -> None:
    """Starts a trial and waits until its nodes are Ready; tells how to reach it. Raises LabError."""
    check(cluster, images)
    folder = build / "lab"
    if _running(folder) is not None:
        raise LabError("This cluster's lab is up already", where=folder, remedy="Use it, or end it: doit lab:down")
    folder.mkdir(parents=True, exist_ok=True)
    _forget(folder)  # of one that was killed
    words = [build, cluster.file, *([images] if images else [])]
    command = [sys.executable, "-m", "tests.lab.trial", *(os.fspath(word.absolute()) for word in words)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=ROOT
        )
    try:
        with (folder / "log").open(errors="replace") as log_so_far:
            while True:
                ended, ready = process.poll() is not None, (folder / "ready").exists()
                sys.stdout.write(log_so_far.read())
                sys.stdout.flush()
                if ended:
                    raise LabError("The lab did not come up", where=folder / "log", remedy="See what it says above.")
                if ready:
                    break
                time.sleep(0.3)
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        print("The lab is down.")
        raise
    here = Path(os.path.relpath(folder))
    command = [f"{here}/kubectl", f"--kubeconfig={here}/kubeconfig", "get", "nodes"]
    nodes = host.run(command, timeout=30).stdout
    print(f"\n{' '.join(command)}\n{nodes}\n`doit lab:down` ends it, and removes its machines' disks.")


def down(build: Path) -> None:
    """Ends the trial; where none runs, says so."""
    folder = build / "lab"
    pid = _running(folder)
    if pid is None:
        _forget(folder)  # of one that was killed
        print("No lab of this cluster is up.")
        return
    try:
        os.kill(pid, signal.SIGTERM)
    except PermissionError:
        raise LabError("The lab is root's", remedy="Run it with sudo.") from None
    wait(lambda: not _holds(pid, folder), 120, "the lab has ended")  # its file goes before it does
    print("The lab is down.")


def _running(folder: Path) -> int | None:
    """The PID of the process that holds this lab."""
    try:
        pid = int((folder / "pid").read_text())
    except (OSError, ValueError):
        return None
    return pid if _holds(pid, folder) else None


def _holds(pid: int, folder: Path) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"tests.lab.trial" in words and os.fsencode(folder.parent.absolute()) in words


def _forget(folder: Path) -> None:
    for name in ("ready", "pid", "kubeconfig"):
        (folder / name).unlink(missing_ok=True)


# ---- the process that holds the lab


def hold(build: Path, cluster_file: Path, images: Path | None) -> None:
    """From the first machine's power-on until SIGTERM."""
    folder = build / "lab"
    signal.signal(signal.SIGTERM, _end)
    write(folder / "pid", f"{os.getpid()}\n".encode())
    try:
        cluster = inventory.load(cluster_file, now=datetime.now(UTC))
        say("preparing the lab (the first one on this host makes the machines' disk: about a minute)")
        with Lab(build, cluster) as lab:
            switch_on(lab)
            for archive in archives(images) if images else ():
                load(lab, archive)
            write(folder / "kubeconfig", kubeconfig(build, pass_on(lab)), mode=0o600)
            kubectl = next(file for file in read_fetched(build / "binaries" / "amd64.json") if file.name == "kubectl")
            write(folder / "kubectl", kubectl.path.read_bytes(), mode=0o755)
            write(folder / "ready", b"")
            while lab.inside.alive:
                time.sleep(1)
    finally:
        _forget(folder)


def _end(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not cut cleaning up short
    sys.exit(0)


def say(text: str) -> None:
    print(text, flush=True)


def switch_on(lab: Lab) -> None:
    """All machines, until all nodes are Ready; tells what is reached, and what first boot refuses. Raises LabError."""
    clock = Clock()
    for node in lab.cluster.nodes:
        say(f"switching on {node.name}")
        machine = lab.machine(node.name)
        if node.media == "thin":
            machine.insert(lab.payload_volume)
        machine.power_on()
    wanted = {node.name for node in lab.cluster.kubelets}
    reached: set[str] = set()
    refused: set[tuple[str, str]] = set()

    def all_ready() -> bool:
        time.sleep(0.5)  # asking costs as well
        for machine in lab.machines.values():
            if not machine.is_on:
                raise WentOff(f"It went off\n{machine.console[-2000:]}", where=machine.name)
            for what, remedy in _REFUSED.findall(machine.console):
                if (machine.name, what) not in refused:
                    refused.add((machine.name, what))
                    say(f"{machine.name} refuses, and will try again: {what}\n{remedy}")
        ready = checks.ready_nodes(lab)
        clock.mark("now")
        for what in [*(() if reached else ("the API",)), *sorted(ready - reached)]:
            say(f"{what} is {'Ready' if what in ready else 'there'} after {clock.reached['now']} s")
        reached.update(ready, {"the API"})
        return ready >= wanted

    wait(all_ready, MINUTES * 60, "all nodes are Ready")


def load(lab: Lab, archive: Path) -> None:
    """An image archive into every node's containerd, pinned: there is no registry that would give it again."""
    for node in lab.cluster.kubelets:
        machine = lab.machine(node.name)
        say(f"loading {archive.name} on {node.name}")
        place = f"/var/lib/{archive.name}"
        target = Path(f"/proc/{machine.first}/root{place}")
        with (
            gzip.open(archive) if archive.name.endswith("gz") else archive.open("rb") as source,
            target.open("wb") as out,
        ):
            shutil.copyfileobj(source, out, 1 << 20)
        try:
            ctr = ("/opt/nodebake/current/bin/ctr", "--namespace=k8s.io", "images", "import", "--local")
            machine.run(*ctr, "--label=io.cri-containerd.pinned=pinned", place, timeout=600)
        finally:
            target.unlink()


def kubeconfig(build: Path, port: int) -> bytes:
    """The desk's admin.conf, for the port on the loopback."""
    config = yaml.safe_load((build / "admin.conf").read_text())
    context = config["contexts"][0]
    (cluster,) = (each for each in config["clusters"] if each["name"] == context["context"]["cluster"])
    cluster["cluster"]["server"] = f"https://127.0.0.1:{port}"
    kept = {"clusters": [cluster], "contexts": [context], "current-context": context["name"]}
    text: str = yaml.safe_dump({**config, **kept})
    return text.encode()


def pass_on(lab: Lab) -> int:
    """Starts the program that takes connections on the host's loopback and passes them on in the lab; the port."""
    planes = [str(node.address) for node in lab.cluster.control_planes]
    with socket.create_server(("127.0.0.1", 0), backlog=128) as server:
        program = [sys.executable, "-m", "tests.lab.trial", "--pass-on", str(server.fileno()), *planes]
        command = [os.fspath(word) for word in lab.inside.command(program)]
        subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[server.fileno()], cwd=ROOT)
        port: int = server.getsockname()[1]
    return port


def relay(listening: int, planes: Sequence[str]) -> None:
    """Passes each connection on to the first API server that takes it."""
    with socket.socket(fileno=listening) as server:
        while True:
            client, _ = server.accept()
            threading.Thread(target=_relayed, args=(client, planes), daemon=True).start()


def _relayed(client: socket.socket, planes: Sequence[str]) -> None:
    with client:
        if (behind := _connected(planes)) is None:
            return
        with behind:
            back = threading.Thread(target=_pumped, args=(behind, client), daemon=True)
            back.start()
            _pumped(client, behind)
            back.join()


def _pumped(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def _connected(planes: Sequence[str]) -> socket.socket | None:
    for plane in planes:
        with suppress(OSError):
            behind = socket.create_connection((plane, 6443), timeout=3)
            behind.settimeout(None)  # a watch may be silent for hours
            return behind
    return None


def main(words: Sequence[str]) -> None:
    if words[0] == "--pass-on":
        relay(int(words[1]), words[2:])
        return
    try:
        hold(Path(words[0]), Path(words[1]), Path(words[2]) if words[2:] else None)
    except BakeError as error:
        sys.exit(f"ERROR: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
