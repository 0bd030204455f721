"""Hundreds of machines fetch their payload from one server: first boot's own program, nginx, and a line between them.

Server and machines are in network namespaces of their own; what the server sends is held to a bandwidth. README.md says
what exactly is measured.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from recipes import seed
from recipes.kit import overlay, sizing
from tests.conftest import ROOT
from tests.lab import host
from tests.lab.namespaces import Namespaces

MACHINES = 500
PAYLOAD = 1_000_000  # bytes: as much less than a worker's as the line is slower than a rack's
MEGABITS = 100
LIMIT = 50  # connections that the server takes, where it is told to refuse more
READY = 100.0  # seconds for so many programs to start, before the first may ask
SERVER, CLIENT = "10.0.0.1", "10.0.0.2"
FOLDER = ROOT / "build" / "bench"
NGINX = """\
daemon off;
user root;
worker_processes 1;
pid nginx.pid;
error_log error.log;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    sendfile on;
    client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    limit_conn_zone $server_name zone=all:1m;
    server {{ listen {server}:80; root .; {limit} }}
}}
"""


@dataclass(frozen=True)
class Way:
    """How they come: within so many seconds; to a server that refuses more than so many connections (0: none)."""

    name: str
    span: float
    limit: int


@dataclass(frozen=True)
class Told:
    """Seconds from when the first may ask: when the first, the median and the last machine had its payload. peak: of
    connections at a time; retried: machines that had to ask more than once; tries: all requests beyond the first."""

    way: Way
    first: float
    median: float
    last: float
    peak: int
    retried: int
    tries: int
    failed: int
    late: int  # programs that had not started when the first was to ask


def main(desk: str) -> None:
    """Writes build/bench/crowd.md and crowd.json, and prints the former."""
    span = MACHINES * PAYLOAD * sizing.BANDWIDTH**-1 * 1000 / MEGABITS
    ways = [
        Way(f"{how}, {server}", seconds, limit)
        for server, limit in (("a server that takes all", 0), (f"a server that takes {LIMIT}", LIMIT))
        for how, seconds in (("all at once", 0.0), (f"spread over {span:.0f} s", span))
    ]
    told = []
    for way in ways:
        print(way.name, file=sys.stderr, flush=True)
        told.append(run(way, MACHINES, PAYLOAD, READY))
    text = markdown(told, desk)
    facts = {"machines": MACHINES, "payload": PAYLOAD, "megabits": MEGABITS, "desk": desk}
    (FOLDER / "crowd.md").write_text(text)
    (FOLDER / "crowd.json").write_text(json.dumps({**facts, "runs": [asdict(each) for each in told]}, indent=1) + "\n")
    print(text, end="")


def markdown(told: Sequence[Told], desk: str) -> str:
    lines = [
        "| how they come | first, median, last | connections at most | asked again | failed |",
        "|---|---|---|---|---|",
    ]
    for each in told:
        again = f"{each.retried} machines, {each.tries} times"
        times = f"{each.first:.0f} s, {each.median:.0f} s, {each.last:.0f} s"
        lines.append(f"| {each.way.name} | {times} | {each.peak} | {again} | {each.failed} |")
    size = f"{MACHINES} machines, {PAYLOAD / 1e6:g} MB each, from nginx on a line of {MEGABITS} Mbit/s"
    least = MACHINES * PAYLOAD * 8 / MEGABITS / 1e6
    return "\n".join([*lines, "", f"{size}, which needs {least:.0f} s for the bytes alone; {desk}.", ""])


def run(way: Way, machines: int, size: int, ready: float) -> Told:
    """One round, in namespaces of its own."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    nginx = obtain()
    with tempfile.TemporaryDirectory(prefix="crowd-", dir=FOLDER) as made:
        folder = Path(made)
        data = os.urandom(size)
        (folder / "payload").write_bytes(data)
        limit = f"limit_conn all {way.limit};" if way.limit else ""
        (folder / "nginx.conf").write_text(NGINX.format(server=SERVER, limit=limit))
        namespaces = Namespaces()
        try:
            for command in (
                "ip netns add server",
                "ip link add client type veth peer name server netns server",
                f"ip address add {CLIENT}/24 dev client",
                "ip link set client up",
                f"ip -n server address add {SERVER}/24 dev server",
                "ip -n server link set server up",
                f"tc -n server qdisc add dev server root tbf rate {MEGABITS}mbit burst 64kb latency 50ms",
            ):
                namespaces.run(command.split())
            server = namespaces.start(
                ["ip", "netns", "exec", "server", nginx, "-e", "error.log", "-p", folder, "-c", "nginx.conf"]
            )
            job = {"folder": made, "digest": hashlib.sha256(data).hexdigest(), "size": size, "machines": machines}
            words = json.dumps({**job, "span": way.span, "ready": ready})
            program = "import sys; from tests.bench import crowd; crowd.inside(sys.argv[1])"
            done = namespaces.run([sys.executable, "-c", program, words], timeout=ready + way.span + 600)
            assert server.poll() is None, (folder / "error.log").read_text()
            return Told(way, **json.loads(done.stdout))
        finally:
            namespaces.close()


def inside(words: str) -> None:
    """In the machines' namespace: starts them all, and prints what became of them."""
    job = json.loads(words)
    folder, count = Path(job["folder"]), job["machines"]
    functions = (overlay.OVERLAYS / "common" / seed.FIRST_BOOT).read_text().removesuffix('main "$@"\n')
    begin = uptime() + job["ready"]
    processes: dict[int, tuple[subprocess.Popen[bytes], Path]] = {}
    for number in range(count):
        share = int.from_bytes(hashlib.sha256(f"worker-{number}".encode()).digest()[:8]) / 2**64
        after = begin + share * job["span"]
        log = folder / f"{number}.log"
        call = f"fetch http://{SERVER}/payload {job['digest']} {job['size']} {after:.2f} {folder}/{number}.payload"
        with log.open("wb") as out:
            process = subprocess.Popen(["sh", "-c", f"{functions}\n{call}"], stdout=out, stderr=out)
        processes[process.pid] = process, log
    ended: list[float] = []
    peak = failed = late = 0
    sampled = False
    while processes:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            process, _ = processes.pop(pid)
            process.returncode = os.waitstatus_to_exitcode(status)
            failed += process.returncode != 0
            if process.returncode == 0:
                ended.append(uptime() - begin)
            continue
        if not sampled and uptime() >= begin:
            late = sum("waiting for" not in log.read_text() for _, log in processes.values())
            sampled = True
        peak = max(peak, connections())
        time.sleep(0.1)
    tries = [(folder / f"{number}.log").read_text().count("trying again") for number in range(count)]
    times = {"first": min(ended), "median": median(ended), "last": max(ended)}
    found = {"peak": peak, "retried": sum(map(bool, tries)), "tries": sum(tries), "failed": failed, "late": late}
    print(json.dumps({**times, **found}))


def connections() -> int:
    """To the server, as the machines see them; those are counted too whose answer is a refusal."""
    to = f" {int.from_bytes(bytes(map(int, SERVER.split('.'))), 'little'):08X}:0050 01 "
    return Path("/proc/net/tcp").read_text().count(to)


def uptime() -> float:
    return float(Path("/proc/uptime").read_text().split()[0])


def obtain() -> Path:
    """Debian's nginx: the program alone, unpacked and not installed."""
    folder = FOLDER / "nginx"
    program = folder / "usr/sbin/nginx"
    if not program.exists():
        folder.mkdir(parents=True, exist_ok=True)
        host.run(["sh", "-c", f"cd '{folder}' && apt-get -qq download nginx && dpkg-deb -x nginx_*.deb ."], timeout=120)
    return program
