"""Files and programs of the machine, or of a folder that holds one (a rescue system's mount)."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO


@dataclass(frozen=True)
class Ran:
    """A program's answer. trouble: why there is none, or not a whole one; for people, else ""."""

    text: str
    code: int | None = None
    trouble: str = ""


@dataclass
class System:
    """root: where the machine's files lie. unseen: what could not be looked at, and why; for people, each once."""

    root: Path = Path("/")
    unseen: list[str] = field(default_factory=list)

    @property
    def live(self) -> bool:
        """Whether it runs: only then are there units and endpoints to ask."""
        return self.root == Path("/")

    def path(self, name: str) -> Path:
        """name: absolute, as on the machine."""
        return self.root / name.lstrip("/")

    def cannot_see(self, what: str, why: str = "only root may look") -> None:
        line = f"{what}: {why}"
        if line not in self.unseen:
            self.unseen.append(line)

    def exists(self, name: str) -> bool | None:
        """None: not to be seen by this user."""
        try:
            self.path(name).stat()
        except PermissionError:
            self.cannot_see(name)
            return None
        except OSError:
            return False
        return True

    def read(self, name: str, limit: int = 4 << 20, *, tail: bool = False) -> bytes | None:
        """At most limit bytes of a regular file, the last ones with tail; None if there is none, or it is not to be
        seen."""
        path, name = self.path(name), f"/{name.lstrip('/')}"
        try:
            if not path.resolve().is_relative_to(self.root.resolve()):
                self.cannot_see(name, f"the link leads out of {self.root}")
                return None
            kind = path.stat().st_mode
            if not stat.S_ISREG(kind):
                if not stat.S_ISDIR(kind):
                    self.cannot_see(name, "it is no regular file")
                return None
            with path.open("rb") as file:
                if tail:
                    file.seek(max(0, path.stat().st_size - limit))
                return _read(file, limit)
        except FileNotFoundError:
            return None
        except PermissionError:
            self.cannot_see(name)
        except (OSError, RuntimeError) as error:  # RuntimeError: links that go round in a circle
            self.cannot_see(name, getattr(error, "strerror", None) or str(error))
        return None

    def text(self, name: str, limit: int = 4 << 20, *, tail: bool = False) -> str | None:
        data = self.read(name, limit, tail=tail)
        return None if data is None else data.decode(errors="replace")

    def glob(self, pattern: str) -> list[str]:
        """The files that match, as names on the machine, sorted. A folder that is not to be seen is told."""
        folder = re.split(r"[*?]", pattern.strip("/"), maxsplit=1)[0].rpartition("/")[0]
        try:
            self.path(folder).stat()
            if not os.access(self.path(folder), os.R_OK | os.X_OK):
                raise PermissionError
            found = sorted(str(path.relative_to(self.root)) for path in self.root.glob(pattern.strip("/")))
        except PermissionError:
            self.cannot_see(f"/{folder}")
            return []
        except (OSError, RuntimeError):
            return []
        return [f"/{name}" for name in found]


def _read(file: BinaryIO, limit: int) -> bytes:
    """At most limit bytes. In pieces: the kernel makes room for all that is asked for of a file in /proc."""
    read = b""
    while chunk := file.read(min(1 << 16, limit - len(read))):
        read += chunk
    return read


def run(
    command: Sequence[str],
    *,
    data: bytes | None = None,
    seconds: float = 20,
    limit: int = 4 << 20,
    errors: bool = False,
) -> Ran:
    """Runs a program, at most so long, and keeps at most limit bytes of what it says. errors: on stderr too."""
    environment = {**os.environ, "LC_ALL": "C", "SYSTEMD_PAGER": "", "SYSTEMD_COLORS": "0", "NO_COLOR": "1"}
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE if data is not None else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if errors else subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        why = "is not installed" if isinstance(error, FileNotFoundError) else error.strerror
        return Ran("", None, f"{command[0]} {why}")
    late = threading.Event()

    def end() -> None:
        late.set()
        kill(process)

    timer = threading.Timer(seconds, end)
    timer.start()
    try:
        if process.stdin is not None and data is not None:
            try:
                process.stdin.write(data)
                process.stdin.close()
            except BrokenPipeError:
                pass
        stdout = process.stdout
        said = stdout.read(limit + 1) if stdout is not None else b""
        if len(said) > limit:
            kill(process)
        code = process.wait()
    finally:
        timer.cancel()
        if process.stdout is not None:
            process.stdout.close()
    trouble = ""
    if late.is_set():
        trouble = f"{command[0]} did not answer within {seconds:.0f} s"
    elif len(said) > limit:
        trouble = f"{command[0]} said more than {limit} bytes, the rest is left out"
    return Ran(said[:limit].decode(errors="replace"), code, trouble)


def kill(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
