"""Go programs from Go modules, the same bytes wherever they are built."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from recipes.kit.download import Unreachable
from recipes.kit.errors import BakeError
from recipes.kit.model import Arch
from recipes.kit.progress import Progress

OLDEST_GO = (1, 26, 8)  # containerd 2.3.6 asks for it
TRIPLETS: dict[Arch, str] = {"amd64": "x86_64-linux-gnu", "arm64": "aarch64-linux-gnu"}
# From the user's Go settings only what says where modules come from and where caches lie: the rest changes bytes.
USER_SETTINGS = (
    *("GOPROXY", "GONOPROXY", "GOPRIVATE", "GOSUMDB", "GONOSUMDB", "GOINSECURE", "GOAUTH", "GOVCS"),
    *("GOPATH", "GOMODCACHE", "GOCACHE"),
)
# Variables by which a compiler or linker could be led to other bytes.
STRAY = re.compile(
    r"GO|CGO_|(CC|CXX|AR|FC|CPATH|LIBRARY_PATH|COMPILER_PATH|GCC_EXEC_PREFIX|LD_RUN_PATH)$|.*_INCLUDE_PATH$|PKG_CONFIG"
)
# What a static link takes from the C toolchain into the binary.
STATIC_PARTS = (
    *("libc.a", "libpthread.a", "libresolv.a", "libgcc.a", "libgcc_eh.a"),
    *("crt1.o", "crti.o", "crtbeginT.o", "crtend.o", "crtn.o"),
)


@dataclass(frozen=True, slots=True)
class Go:
    program: Path
    version: str  # "go1.26.8"


@dataclass(frozen=True, slots=True)
class CCompiler:
    """A C compiler that links statically; identity names all of it that gets into a static binary."""

    program: str
    identity: str  # "gcc 12.2.0 (3f2a9c01d4e5)"


def native_arch() -> Arch | None:
    """The desk's own architecture."""
    names: dict[str, Arch] = {"x86_64": "amd64", "aarch64": "arm64", "arm64": "arm64"}
    return names.get(platform.machine())


@cache
def find_go() -> Go:
    """The first Go on PATH, or beside the running Python, that is new enough. Raises BakeError with the remedy."""
    beside = Path(sys.executable).parent / "go"
    candidates = [Path(found) for found in (shutil.which("go"), str(beside) if beside.exists() else None) if found]
    seen = []
    for program in candidates:
        version = _output([str(program), "env", "GOVERSION"], {**os.environ, "GOTOOLCHAIN": "local"}).split(" ")[0]
        numbers = re.fullmatch(r"go(\d+)\.(\d+)(?:\.(\d+))?", version)
        if numbers and tuple(int(number or 0) for number in numbers.groups()) >= OLDEST_GO:
            return Go(program, version)
        seen.append(f"{program} is {version or 'broken'}")
    needed = ".".join(map(str, OLDEST_GO))
    raise BakeError(
        f"building from Go modules needs Go {needed} or newer; {', '.join(seen) or 'there is none on this desk'}",
        remedy="pip install -e '.[go]' (into the virtual environment that doit runs from), or install Go from go.dev",
    )


@cache
def find_c_compiler(arch: Arch) -> CCompiler:
    """A C compiler for arch that can link statically, tried on a tiny program. Raises BakeError with the remedy."""
    program = "gcc" if arch == native_arch() else f"{TRIPLETS[arch].replace('_', '-')}-gcc".replace("x86-64", "x86_64")
    package = "gcc libc6-dev" if program == "gcc" else f"gcc-{TRIPLETS[arch].replace('_', '-')} libc6-dev-{arch}-cross"
    remedy = f"apt install {package}"
    if shutil.which(program) is None:
        raise BakeError(
            f"building runc and flannel for {arch} needs a C compiler: there is no {program}", remedy=remedy
        )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "tiny.c"
        source.write_text('#include <stdio.h>\nint main(void) { return puts("") < 0; }\n', encoding="ascii")
        tried = subprocess.run(
            [program, "-static", "-o", f"{folder}/tiny", str(source)], capture_output=True, text=True, check=False
        )
    if tried.returncode != 0:
        raise BakeError(
            f"{program} cannot link a static program for {arch}: {tried.stderr[-300:].strip()}", remedy=remedy
        )
    environment = {**os.environ, "LC_ALL": "C"}
    digest = hashlib.sha256()
    for command in ([program, "--version"], [program, "-Wl,--version"]):
        digest.update(_output(command, environment).partition("\n")[0].encode())
    for part in STATIC_PARTS:
        path = Path(_output([program, f"-print-file-name={part}"], environment))
        digest.update(f"\n{part} ".encode() + (path.read_bytes() if path.is_absolute() else b""))
    version = _output([program, "-dumpfullversion"], environment)
    return CCompiler(program, f"gcc {version} ({digest.hexdigest()[:12]})")


def library_identity(headers: Path, name: str, arch: Arch) -> str:
    """What a static library adds to a toolchain's identity: "libseccomp 2.5.4 (1b2c3d4e5f60)"."""
    folder = headers / "usr/lib" / TRIPLETS[arch]
    try:
        stated = re.search(r"^Version: *(\S+)", (folder / f"pkgconfig/{name}.pc").read_text("utf-8"), re.MULTILINE)
        content = (folder / f"{name}.a").read_bytes()
    except FileNotFoundError as missing:
        raise BakeError(f"{name}'s headers for {arch} are not complete", where=str(missing.filename)) from missing
    return f"{name} {stated[1] if stated else 'unknown'} ({hashlib.sha256(content).hexdigest()[:12]})"


@dataclass(frozen=True, slots=True)
class Build:
    """One `go build`: main packages of one module with the same settings."""

    module: Path  # folder with go.mod and go.sum; only read
    packages: Sequence[str]
    tags: Sequence[str]
    ldflags: str


def go_build(
    build: Build,
    into: Path,
    arch: Arch,
    go: Go,
    progress: Progress,
    *,
    title: str,
    compiler: CCompiler | None = None,
    headers: Path | None = None,
) -> None:
    """Build each package into the empty folder into/bin; into is scratch space. With a compiler, cgo and static.

    headers: a folder with usr/include and usr/lib/<triplet>, for what cgo packages ask pkg-config.
    """
    environment = _environment(go, arch, into)
    ldflags = f"-s -w {build.ldflags}".rstrip()
    if compiler is not None:
        environment |= _cgo(compiler, arch, into, headers)
        # The build id of a cgo package holds the compiler's path and the headers'; without it bytes do not.
        ldflags += " -linkmode external -extldflags -static -buildid="
    flags = ["-trimpath", "-tags", ",".join(build.tags), "-ldflags", ldflags]
    binaries = into / "bin"
    binaries.mkdir(parents=True)
    listing = [str(go.program), "list", "-deps", "-f", "{{.ImportPath}}", "-tags", flags[2], *build.packages]
    with progress.step(f"{title}: modules", None, "files") as advance:
        packages = _run(
            listing, build.module, environment, title, _counting(advance, re.compile(r"go: downloading "))
        ).split()
    with progress.step(title, len(packages), "packages") as advance:
        command = [str(go.program), "build", "-v", *flags, "-o", f"{binaries}/", *build.packages]
        _run(command, build.module, environment, title, _counting(advance, re.compile(r"\S+$")))
        advance(len(packages))


def _counting(advance: Callable[[int], None], wanted: re.Pattern[str]) -> Callable[[str], bool]:
    """A reader of lines that counts those that match wanted, and says whether a line was one."""
    done = 0

    def read(line: str) -> bool:
        nonlocal done
        if not wanted.match(line):
            return False
        done += 1
        advance(done)
        return True

    return read


def _run(
    command: list[str], folder: Path, environment: Mapping[str, str], title: str, told: Callable[[str], bool]
) -> str:
    """Run go; returns its output. told() sees each line of its messages and takes those that are only progress."""
    rest: list[str] = []
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as output,
        subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.PIPE, text=True, encoding="utf-8"
        ) as process,
    ):
        try:
            assert process.stderr is not None  # noqa: S101 - PIPE was asked for
            rest += [line for line in process.stderr if not told(line.rstrip())]
            code = process.wait()
        except BaseException:
            process.terminate()
            raise
        output.seek(0)
        printed = output.read()
    if code == 0:
        return printed
    said = "".join(rest[-15:]).strip()
    if re.search(r"dial tcp|no such host|i/o timeout|connection re(fused|set)|TLS handshake|proxyconnect", said):
        raise Unreachable(
            f"{title}: the Go modules cannot be downloaded:\n{said}",
            remedy="check GOPROXY, HTTPS_PROXY and the network",
        )
    raise BakeError(f"{title}: go {command[1]} failed:\n{said}", where=folder, remedy="read go's words above")


def _environment(go: Go, arch: Arch, scratch: Path) -> dict[str, str]:
    """The user's environment without all that could change bytes, and with all that fixes them."""
    settings = json.loads(_output([str(go.program), "env", "-json", *USER_SETTINGS], os.environ))
    temporary = scratch / "tmp"
    temporary.mkdir(parents=True)
    return {
        **{name: value for name, value in os.environ.items() if not STRAY.match(name)},
        **{name: value for name, value in settings.items() if value},
        "GOENV": "off",
        "GOTOOLCHAIN": "local",
        "GOWORK": "off",
        "GOFLAGS": "-mod=readonly -buildvcs=false",
        "GOOS": "linux",
        "GOARCH": arch,
        "GOAMD64": "v1",
        "GOARM64": "v8.0",
        "CGO_ENABLED": "0",
        "GOTMPDIR": str(temporary),
        "LC_ALL": "C",
    }


def _cgo(compiler: CCompiler, arch: Arch, scratch: Path, headers: Path | None) -> dict[str, str]:
    """cgo's settings. The stand-in for pkg-config names the library; where it lies goes by variables that Go's cache
    knows of (what pkg-config says is not part of its keys), and so does which version lies there."""
    script = scratch / "pkg-config"
    script.write_text(
        '#!/bin/sh\ncase $1 in --libs) for name; do :; done; echo "-l${name#lib}" ;; esac\n', encoding="ascii"
    )
    script.chmod(0o755)
    here = headers.absolute() if headers else None
    stated = sorted((headers / "usr/lib" / TRIPLETS[arch] / "pkgconfig").glob("*.pc")) if headers else []
    salt = hashlib.sha256(b"".join(path.read_bytes() for path in stated)).hexdigest()[:16]
    return {
        "CGO_ENABLED": "1",
        "CC": compiler.program,
        "PKG_CONFIG": _quoted(str(script)),
        "CGO_CFLAGS": "-g0 -O2" + (" " + _quoted(f"-I{here}/usr/include") + f" -DLIBRARIES_{salt}" if here else ""),
        "CGO_LDFLAGS": "-O2" + (" " + _quoted(f"-L{here}/usr/lib/{TRIPLETS[arch]}") if here else ""),
    }


def _quoted(word: str) -> str:
    """As go splits its variables: by white space, except between quotes."""
    return f'"{word}"' if "'" in word else f"'{word}'"


def _output(command: list[str], environment: Mapping[str, str]) -> str:
    """What a short command prints, or "" if it fails."""
    with contextlib.suppress(OSError):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""
    return ""
