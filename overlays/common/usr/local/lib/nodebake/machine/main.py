"""nodebake status | health | diagnose | apply"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from machine import report, status
from machine.system import System

HEALTHY, UNHEALTHY, USAGE = 0, 1, 2
FIRST_BOOT = "/opt/nodebake/first-boot"
FIRST_BOOT_UNIT = "nodebake-first-boot.service"
APPLY_UNIT = "nodebake-apply.service"
LAST_WORDS = [
    *("journalctl", "--quiet", f"--unit={APPLY_UNIT}", "--invocation=0", "--identifier=first-boot"),
    *("--output=cat", "--lines=10"),
]


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code."""
    try:
        return _run(arguments)
    except BrokenPipeError:  # `nodebake status | head` is no mistake
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNHEALTHY


def _run(arguments: Sequence[str] | None) -> int:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    given = _parser().parse_args(arguments)
    system = System(Path(getattr(given, "root", "/")).absolute())
    if not system.root.is_dir():
        return _fail(f"there is no folder {system.root}", USAGE)
    if given.command == "status":
        return _status(system, as_json=given.json)
    if given.command == "health":
        problems = status.health(system)
        print(*problems, sep="\n", end="\n" if problems else "", flush=True)
        return UNHEALTHY if problems else HEALTHY
    if given.command == "diagnose":
        return _diagnose(system, given.output)
    return _apply(given.folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nodebake", description="What this machine of a Nodebake cluster is and how it fares."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shown = commands.add_parser(
        "status",
        help="what is done, what it waits for, units, endpoints, certificates",
        epilog="Exit code: 0 installed and healthy, 1 not (yet), 2 wrong usage.",
    )
    shown.add_argument("--json", action="store_true", help="for programs")
    commands.add_parser("health", help="one line for each thing that is not well; none, and exit code 0, when all is")
    diagnosed = commands.add_parser("diagnose", help="one archive for support, secrets left out")
    diagnosed.add_argument(
        "--output", metavar="FILE", type=Path, help="instead of nodebake-<node>-<time>.tar.gz in /root or here"
    )
    for each in (shown, diagnosed):
        each.add_argument("--root", metavar="DIR", default="/", help="a machine that does not run, mounted there")
    applied = commands.add_parser("apply", help="make this machine what a later artifact says")
    applied.add_argument("folder", metavar="DIR", type=Path, help="has node.tar.gz in it")
    return parser


def _status(system: System, *, as_json: bool) -> int:
    found = status.gather(system)
    if as_json:
        print(found.json(), flush=True)
    else:
        print(*report.lines(found, colour=report.may_colour()), sep="\n", flush=True)
    return HEALTHY if found.healthy else UNHEALTHY


def _diagnose(system: System, output: Path | None) -> int:
    from machine import diagnose

    try:
        made = diagnose.write(system, output)
    except OSError as error:
        return _fail(f"the archive cannot be written: {error.strerror}: {error.filename}", UNHEALTHY)
    print(made.path, flush=True)
    if made.missing:
        more = "" if os.geteuid() == 0 else "; root sees more"
        print(f"not all could be had: about.txt in the archive tells what is missing{more}", file=sys.stderr)
    return HEALTHY


def _apply(folder: Path) -> int:
    """As a unit of its own: it goes on when the session that began it ends. Where it ends too early, first boot's unit
    goes on, which does nothing on a machine that was left as it was."""
    if not folder.is_dir():
        return _fail(f"there is no folder {folder}", USAGE)
    command = ["systemd-run", "--quiet", "--collect", "--wait", f"--unit={APPLY_UNIT}"]
    # Not by OnFailure=: systemd keeps a unit whose handler runs, and then takes no other one with its name.
    command.append(f"--property=ExecStopPost=-/usr/bin/systemctl start --no-block {FIRST_BOOT_UNIT}")
    try:
        subprocess.run(["systemctl", "stop", FIRST_BOOT_UNIT], check=True)  # it may wait for an earlier artifact
        print(f"what it does: journalctl --follow --unit {APPLY_UNIT}", flush=True)
        code = subprocess.run([*command, FIRST_BOOT, "install", "--medium", folder.absolute()]).returncode
        if code != 0:
            subprocess.run(["journalctl", "--sync"])
            subprocess.run(LAST_WORDS, stdout=sys.stderr)
        return code
    except (OSError, subprocess.CalledProcessError) as error:
        return _fail(f"{FIRST_BOOT} cannot be run: {error}", UNHEALTHY)


def _fail(text: str, code: int) -> int:
    print(f"nodebake: {text}", file=sys.stderr)
    return code
