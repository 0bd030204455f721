"""Debian packages -> their closure over the minimal system, resolved by apt in a private root and locked.

apt runs as the desk's own user with a root, a state and a status of its own below build/apt: nothing of the desk is
read but where its mirror is and how to reach it (proxies, certificates, waiting times). What was resolved is remembered
with the cluster as a lock (name, version, SHA-256 from the signed index): a bake whose lock and cache are whole runs no
apt. The packages are brought by apt as well, not by kit.download, so that the desk's apt settings hold for them too.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote

from recipes.kit.download import Cache, Desk, NotServed, Unreachable, WrongBytes
from recipes.kit.errors import BakeError
from recipes.kit.hashing import hash_file
from recipes.kit.locks import locked
from recipes.kit.model import Arch, Cluster, Fetched, Origin

SUITE = "trixie"  # Debian 13, what the machines run
SECURITY = f"{SUITE}-security"
SOURCES = Path("/etc/apt")  # where the desk's own apt is told its mirrors
KEYRINGS = tuple(
    Path(folder, f"debian-archive-keyring.{ending}")
    for folder in ("/usr/share/keyrings", "/etc/apt/keyrings")
    for ending in ("gpg", "pgp")
)
BASE = ("?essential", "?priority(required)", "apt", "systemd-sysv")  # the minimal system, together with what these need
SECTION = "packages"  # of what the cluster remembers
# What comes with the packages that are named: what they need beyond the minimal system, all that they need, or nothing.
Scope = Literal["beyond", "whole", "only"]

# The suites of Debian itself: an archive that a source names one of them for is asked before any other.
_DEBIAN = re.compile(
    r"(stable|oldstable|oldoldstable|testing|unstable|sid|bullseye|bookworm|trixie|forky|duke)"
    r"(-updates|-proposed-updates|-backports(-sloppy)?)?/?"
)
_SECURITY = re.compile(r"\w+(-security|/updates)")
_DISTRUST = re.compile(r"GPG error|NO_PUBKEY|BADSIG|not signed|signature|NODATA", re.IGNORECASE)
_ABSENT = re.compile(r"\b404\b|File not found")
_URI = re.compile(r"^'([^']+)' (\S+) (\d+) SHA256:([0-9a-f]{64})$", re.MULTILINE)
_OPTIONS = ("-qq", "--yes", "--no-install-recommends", "--no-upgrade", "-o", "Acquire::ForceHash=SHA256")


@dataclass(frozen=True, slots=True)
class Deb:
    """One line of the lock."""

    name: str
    version: str
    arch: str  # "amd64", "arm64" or "all"
    path: str  # below the archive, as in a URL: "pool/main/h/haproxy/haproxy_3.0.11-1%2bdeb13u5_amd64.deb"
    security: bool  # from the security archive
    size: int  # bytes
    sha256: str

    def __post_init__(self) -> None:
        """Names become paths and lines on machines, whoever signed the index or edited the lock."""
        forms = {"name": r"[a-z0-9][a-z0-9+.-]*", "version": r"[A-Za-z0-9.+~:-]+", "arch": "amd64|arm64|all"}
        forms |= {"file": r"[A-Za-z0-9.+~:_-]+\.deb", "sha256": "[0-9a-f]{64}"}
        for field, form in forms.items():
            if not re.fullmatch(form, text := str(getattr(self, field))):
                raise BakeError(
                    f"{text!r} is no Debian package's {field}", remedy="set `debianMirror:` to a true mirror of Debian"
                )

    @property
    def file(self) -> str:
        return unquote(self.path.rsplit("/", 1)[-1])

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


class Source(NamedTuple):
    """One archive of the desk's apt."""

    uri: str
    suites: tuple[str, ...]
    components: tuple[str, ...]


class _Unusable(Exception):
    """A source that did not give what was asked of it; the text is apt's."""


def obtain(names: Sequence[str], arch: Arch, cluster: Cluster, desk: Desk) -> list[Fetched]:
    """names with all they need beyond a minimal Debian 13, each a verified .deb, in the order of their names.

    The first time they are resolved and the lock is remembered; from then on the lock decides. A locked version that
    is neither in the cache nor on the mirror is an error with `packages: locked`; otherwise everything is resolved
    anew, and each change is told with both versions. Raises BakeError without apt, a mirror, Debian's keys or right
    bytes.
    """
    strict = cluster.packages == "locked"
    return _locked(names, "beyond", arch, desk, cluster.debian_mirror, strict)


def obtain_system(names: Sequence[str], arch: Arch, cluster: Cluster, desk: Desk) -> list[Fetched]:
    """As obtain(), but with the minimal Debian 13 itself: all that a disk which boots has to have."""
    strict = cluster.packages == "locked"
    return _locked([*BASE, *names], "whole", arch, desk, cluster.debian_mirror, strict)


def obtain_alone(names: Sequence[str], arch: Arch, cluster: Cluster, desk: Desk) -> list[Fetched]:
    """As obtain(), but nothing of what these packages need."""
    return _locked(names, "only", arch, desk, cluster.debian_mirror, cluster.packages == "locked")


def headers(arch: Arch, desk: Desk, mirror: str | None = None) -> Path:
    """A folder with Debian 13's libseccomp-dev unpacked: usr/include, usr/lib/<triplet>/libseccomp.a and its .pc file.

    The static library needs no symbol that is newer than glibc 2.34, so it links on a Debian 12 desk (gcc 12) as well.
    """
    return _unpacked(_locked(["libseccomp-dev"], "only", arch, desk, mirror, False), "libseccomp-dev", desk)


def unpacked(names: Sequence[str], scope: Scope, arch: Arch, cluster: Cluster, desk: Desk) -> Path:
    """A folder with these packages of Debian 13 and what the scope adds to them, unpacked, never installed."""
    strict = cluster.packages == "locked"
    return _unpacked(_locked(names, scope, arch, desk, cluster.debian_mirror, strict), names[0], desk)


def catatonit(arch: Arch, desk: Desk, mirror: str | None = None) -> Fetched:
    """Debian 13's catatonit, one static program: `catatonit -P` is a pause where upstream's image cannot be reached."""
    [package] = _locked(["catatonit"], "only", arch, desk, mirror, False)
    program = _unpacked([package], "catatonit", desk) / "usr/bin/catatonit"
    return Fetched("catatonit", program, hash_file(program), program.stat().st_size, package.origin)


def _locked(
    names: Sequence[str], scope: Scope, arch: Arch, desk: Desk, mirror: str | None, strict: bool
) -> list[Fetched]:
    """What the lock for these names says, from the cache or the mirror; without a lock, resolved and locked."""
    cache = desk.cache
    wanted = sorted(set(names))
    key = " ".join([arch, *([scope] if scope != "beyond" else []), *wanted])
    remembered: list[dict[str, Any]] | None = desk.choices.get(SECTION, key)
    debs = [Deb(**line) for line in remembered or ()]
    missing = [deb for deb in debs if cache.find(deb.sha256) is None]
    if remembered is None or missing:
        with _archive(arch, mirror, desk) as archive:
            if remembered is None:
                debs = archive.resolve(wanted, scope)
                missing = [deb for deb in debs if cache.find(deb.sha256) is None]
            if gone := archive.download(missing, cache):
                if strict or remembered is None:
                    raise NotServed(
                        f"the mirror does not have {', '.join(map(str, gone))}",
                        where=archive.main,
                        remedy="Set `debianMirror:` to an archive that has them, or allow others: `packages: current`.",
                    )
                before, debs = debs, archive.resolve(wanted, scope)
                if lost := archive.download([deb for deb in debs if cache.find(deb.sha256) is None], cache):
                    raise NotServed(f"the mirror's index names {lost[0]}, but it is not there", where=archive.main)
                for line in _differences(before, debs):
                    desk.progress.warn(f"the mirror no longer has all that was locked: {line}")
        desk.choices.remember(SECTION, key, [asdict(deb) for deb in debs])
    return [
        Fetched(deb.file, cache.path(deb.sha256), deb.sha256, deb.size, Origin(deb.name, deb.version, "debian"))
        for deb in debs
    ]


def _differences(before: Iterable[Deb], after: Iterable[Deb]) -> Iterator[str]:
    """Told for people: "haproxy 3.0.11-1 -> 3.0.12-1"."""
    old, new = ({deb.name: deb.version for deb in debs} for debs in (before, after))
    for name in sorted(old | new):
        if old.get(name) != new.get(name):
            yield f"{name} {old.get(name, 'not needed')} -> {new.get(name, 'not needed')}"


def _unpacked(packages: Sequence[Fetched], name: str, desk: Desk) -> Path:
    """The packages unpacked (never installed) in one folder, named after their bytes."""
    digest = packages[0].sha256
    if len(packages) > 1:
        digest = hashlib.sha256("".join(package.sha256 for package in packages).encode()).hexdigest()
    folder = desk.build / "unpacked" / f"{name}-{digest[:16]}"
    if not folder.is_dir():
        _program("dpkg-deb", "dpkg")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as temporary:
            made = Path(temporary, "made")
            for package in packages:
                done = subprocess.run(["dpkg-deb", "--extract", package.path, made], capture_output=True, text=True)
                if done.returncode:
                    raise BakeError(
                        f"the package cannot be unpacked: {_first_line(done.stderr)[:500]}",
                        where=package.path,
                        remedy="remove it and run doit once more",
                    )
            made.chmod(0o755)
            os.sync()  # what has the name is taken for whole from now on, also after a power cut
            try:
                made.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another bake was first
                    raise
    return folder


# -- the archive ------------------------------------------------------------------------------------------------------


class _Archive:
    """Debian 13 on a mirror, through an apt of its own. Made by _archive(), which holds its lock."""

    def __init__(self, root: Path, arch: Arch, keyring: Path, desk: Desk) -> None:
        self.root = root
        self.main = ""  # the base URI that answered
        self._desk = desk
        self._arch = arch
        self._keyring = keyring
        self._security = ""
        for folder in ("etc/apt.conf.d", "etc/preferences.d", "state/lists/partial", "cache/archives/partial"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        (root / "apt.conf").write_text(
            f'Dir "{root}";\n'
            f'Dir::Etc "{root}/etc";\n'
            f'Dir::State "{root}/state";\n'
            f'Dir::State::status "{root}/status";\n'
            f'Dir::Cache "{root}/cache";\n'
            f'Dir::Etc::netrc "{SOURCES}/auth.conf";\n'
            f'Dir::Etc::netrcparts "{SOURCES}/auth.conf.d";\n'
            f'APT::Architecture "{arch}";\n'
            f'APT::Architectures {{ "{arch}"; }};\n'
            'APT::Sandbox::User "";\n'
            'APT::Update::Error-Mode "any";\n'
            'Acquire::Languages "none";\n'
            'Acquire::Retries "2";\n'
            'Acquire::http::Timeout "20";\n'
            'Acquire::https::Timeout "20";\n' + _carried_over()
        )

    def connect(self, uris: Sequence[str], security_of: Mapping[str, Sequence[str]]) -> None:
        """Takes the first URI that is Debian's archive, signed by Debian; security_of says where its updates may be."""
        failures = []
        for uri in uris:
            main = self._source(uri, SUITE)
            try:
                self._update([main])
            except _Unusable as error:
                failures.append((uri, str(error)))
                continue
            for failed, why in failures:
                self._desk.progress.warn(f"{failed} was passed over: {_first_line(why)}")
            self.main = _folder(uri)
            self._extend(main, self._source(uri, f"{SUITE}-updates"), security_of.get(uri, ()))
            return
        uri, why = failures[0]
        if _DISTRUST.search(why):
            raise BakeError(
                f"the mirror's signature is not Debian's: {_first_line(why)}",
                where=uri,
                remedy="Update this desk's package debian-archive-keyring, or set `debianMirror:` to a true mirror.",
            )
        raise BakeError(
            f"no Debian 13 there: {_first_line(why)}",
            where=uri,
            remedy="Check the network and apt's proxy, or set `debianMirror:` to one that has Debian 13 (trixie).",
        )

    def _extend(self, main: str, updates: str, securities: Sequence[str]) -> None:
        """Adds trixie-updates and trixie-security where they are; all at once first, one by one if that fails."""
        why = f"{self.main} has none beside it"
        for security in securities[:1]:
            try:
                self._update([main, updates, self._source(security, SECURITY)])
            except _Unusable:
                break
            self._security = _folder(security)
            return
        lines = [main]
        for line, uri in [(updates, ""), *((self._source(uri, SECURITY), uri) for uri in securities)]:
            if self._security:
                break
            try:
                self._update([*lines, line])
            except _Unusable as error:
                if _DISTRUST.search(str(error)):
                    raise BakeError(
                        f"a signature is not Debian's: {_first_line(str(error))}",
                        where=uri or self.main,
                        remedy="Set `debianMirror:` to a true mirror.",
                    ) from None
                if uri and not _ABSENT.search(str(error)):
                    why = f"{uri}: {_first_line(str(error))}"
                continue
            lines.append(line)
            self._security = _folder(uri) if uri else ""
        self._update(lines)
        if not self._security:
            self._desk.progress.warn(f"packages come without security updates, no {SECURITY}: {why}")

    def resolve(self, names: Sequence[str], scope: Scope) -> list[Deb]:
        """names and what the scope adds to them, by name."""
        with self._desk.progress.step(f"resolve Debian packages ({self._arch})", None, "packages") as advance:
            base = self._install_base() if scope == "beyond" else self._install_nothing()
            verb = "download" if scope == "only" else "install"
            listed = self._apt(verb, "--print-uris", *_OPTIONS, *names)
            debs = sorted((self._deb(*match.groups()) for match in _URI.finditer(listed)), key=lambda deb: deb.name)
            # apt offers a package that is there in the same version, where one of the same source is new.
            debs = [deb for deb in debs if base.get(deb.name) != deb.version]
            advance(len(debs))
        return debs

    def download(self, debs: Sequence[Deb], cache: Cache) -> list[Deb]:
        """Brings them into the cache; returns those that the mirror does not have."""
        if not debs:
            return []
        uris = {deb: self._uri(deb) for deb in debs}
        folder = self.root / "incoming"
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
        folder.mkdir()
        total = sum(deb.size for deb in debs)
        with self._desk.progress.step(f"Debian packages ({self._arch})", total, "bytes") as advance:
            complaint = ""
            remote = [deb for deb in debs if not _is_local(uris[deb])]
            for deb in debs:
                if deb not in remote and (local := _local(uris[deb])).is_file():
                    shutil.copyfile(local, folder / deb.sha256)
            if remote:
                triples = [(uris[deb], str(folder / deb.sha256), f"SHA256:{deb.sha256}") for deb in remote]
                command = [
                    "/usr/lib/apt/apt-helper",
                    "-qq",
                    "download-file",
                    *(part for three in triples for part in three),
                ]
                with tempfile.TemporaryFile("w+") as log:
                    with subprocess.Popen(command, env=self._environment, stdout=log, stderr=log) as helper:
                        while True:
                            try:
                                helper.wait(0.2)
                                break
                            except subprocess.TimeoutExpired:
                                advance(sum(file.stat().st_size for file in _files(folder)))
                    log.seek(0)
                    complaint = log.read()
            gone = [deb for deb in debs if not self._keep(folder / deb.sha256, deb, uris[deb], complaint, cache)]
            advance(total)
        return gone

    def _keep(self, file: Path, deb: Deb, uri: str, complaint: str, cache: Cache) -> bool:
        """Into the cache, if its bytes are right. False: the mirror does not have it."""
        if file.is_file():
            if hash_file(file) == deb.sha256:
                cache.add(file, deb.sha256)
                return True
            reason = "Hash Sum mismatch"
        else:
            found = re.search(rf"^E: Failed to fetch {re.escape(uri)}\s+(.*)$", complaint, re.MULTILINE)
            reason = found[1] if found else "404" if _is_local(uri) else _first_line(complaint)
        if "Hash Sum mismatch" in reason or "unexpected size" in reason:
            raise WrongBytes(
                f"the bytes of {deb} are not those that Debian signed",
                where=uri,
                remedy="The mirror or something on the way damages or replaces files: set `debianMirror:` to another.",
            )
        if re.match(r"404|410", reason):
            return False
        raise Unreachable(
            f"{deb} could not be fetched: {reason}", where=uri, remedy="Check the network and bake again."
        )

    def _install_nothing(self) -> dict[str, str]:
        (self.root / "status").write_text("")
        return {}

    def _install_base(self) -> dict[str, str]:
        """Writes the minimal system into the status as installed; returns name -> version.

        A machine may have been installed from any point release of Debian 13, so the versions are the lowest that one
        can have (_floor), and what the wanted packages need in a newer one becomes part of the closure.
        """
        self._install_nothing()
        planned = self._apt("install", "--simulate", *_OPTIONS[1:], *BASE)
        found = re.findall(r"^Inst (\S+) \((\S+) ", planned, re.MULTILINE)
        shown = self._tool("apt-cache", "show", *(f"{name}={version}" for name, version in found))
        stanzas = [stanza for text in re.split(r"\n\n+", shown) if (stanza := _installed(text))]
        (self.root / "status").write_text("\n".join(stanzas))
        return {name: _floor(version) for name, version in found}

    def _deb(self, uri: str, file: str, size: str, sha256: str) -> Deb:
        name, version, rest = (unquote(part) for part in file.split("_"))
        security = not uri.startswith(self.main)
        path = uri.removeprefix(self._security if security else self.main)
        return Deb(name, version, rest.removesuffix(".deb"), path, security, int(size), sha256)

    def _uri(self, deb: Deb) -> str:
        return ((self._security if deb.security else "") or self.main) + deb.path

    def _source(self, uri: str, suite: str) -> str:
        return f"deb [signed-by={self._keyring}] {uri} {suite} main\n"

    def _update(self, lines: Sequence[str]) -> None:
        (self.root / "etc/sources.list").write_text("".join(lines))
        with self._desk.progress.step(f"Debian's index ({self._arch})", None, "files"):
            done = self._call("apt-get", "update", "-q")
        if done.returncode:
            raise _Unusable(done.stderr)

    @property
    def _environment(self) -> dict[str, str]:
        return {**os.environ, "APT_CONFIG": str(self.root / "apt.conf"), "LC_ALL": "C"}

    def _call(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=self._environment, capture_output=True, text=True, check=False)

    def _tool(self, *command: str) -> str:
        done = self._call(*command)
        if done.returncode:
            reasons = re.findall(r"^E: (.*)$", done.stderr, re.MULTILINE) or [done.stderr.strip()]
            raise BakeError(
                f"apt cannot resolve the packages: {'; '.join(reasons)}",
                where=self.main,
                remedy="Set `debianMirror:` to a complete archive of Debian 13 (trixie).",
            )
        return done.stdout

    def _apt(self, *arguments: str) -> str:
        return self._tool("apt-get", *arguments)


@contextmanager
def _archive(arch: Arch, mirror: str | None, desk: Desk) -> Iterator[_Archive]:
    """The archive, connected; one bake at a time uses an architecture's private root."""
    _program("apt-get", "apt")
    keyring = next((path for path in KEYRINGS if path.is_file()), None)
    if keyring is None:
        raise BakeError(
            "Debian's archive keys are not on this desk",
            where=KEYRINGS[0],
            remedy="Install the package debian-archive-keyring.",
        )
    uris, security_of = _candidates(_desk_sources(), mirror)
    if not uris:
        raise BakeError(
            "this desk's apt knows no Debian mirror",
            where=SOURCES,
            remedy="Set `debianMirror:` in the cluster file to the URL of a Debian mirror that has Debian 13 (trixie).",
        )
    root = (desk.build / "apt" / arch).resolve()
    with locked(root / "lock"):
        archive = _Archive(root, arch, keyring, desk)
        archive.connect(uris, security_of)
        yield archive


def _program(name: str, package: str) -> None:
    if shutil.which(name) is None:
        raise BakeError(
            f"{name} is not on this desk; the machines' Debian packages are resolved by it",
            remedy=f"Bake on Debian or a relative of it, or install the package {package}.",
        )


# -- what the desk says -----------------------------------------------------------------------------------------------


def _candidates(sources: Sequence[Source], mirror: str | None) -> tuple[list[str], dict[str, list[str]]]:
    """Base URIs that may be Debian's archive, the likeliest first, and for each where its security updates may be."""
    if mirror is not None:
        uri = f"file:{mirror}" if mirror.startswith("/") else mirror
        return [uri], {uri: _siblings(uri)}
    ranked: dict[str, int] = {}
    securities: list[str] = []
    for source in sources:
        if "main" not in source.components:
            continue
        known = any(_DEBIAN.fullmatch(suite) for suite in source.suites)
        if all(_SECURITY.fullmatch(suite) for suite in source.suites):
            securities.append(source.uri)
        else:
            ranked[source.uri] = min(ranked.get(source.uri, 1), 0 if known else 1)
    uris = sorted(ranked, key=lambda uri: ranked[uri])
    return uris, {uri: list(dict.fromkeys([*securities, *_siblings(uri)])) for uri in uris}


def _siblings(uri: str) -> list[str]:
    """Where mirrors keep the security archive: http://host/debian -> http://host/debian-security."""
    base = uri.rstrip("/")
    return [f"{base}-security", f"{base.rsplit('/', 1)[0]}/debian-security"] if not base.endswith("-security") else []


def _desk_sources() -> list[Source]:
    """The archives of binary packages in sources.list, *.list and *.sources, in apt's own order of reading."""
    files = [SOURCES / "sources.list", *sorted((SOURCES / "sources.list.d").glob("*"))]
    found: list[Source] = []
    for file in files:
        if file.suffix not in (".list", ".sources") or not file.is_file():
            continue
        text = file.read_text(errors="replace")
        for source in _deb822(text) if file.suffix == ".sources" else _one_line(text):
            found += [source._replace(uri=uri) for uri in _expanded(source.uri)]
    return found


def _deb822(text: str) -> Iterator[Source]:
    text = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))
    for stanza in re.split(r"\n\s*\n", text):
        fields = {
            match[1].lower(): match[2].split()
            for match in re.finditer(r"^([\w-]+):(.*(?:\n[ \t].*)*)", stanza, re.MULTILINE)
        }
        if "deb" in fields.get("types", ()) and fields.get("enabled", ["yes"]) != ["no"]:
            for uri in fields.get("uris", ()):
                yield Source(uri, tuple(fields.get("suites", ())), tuple(fields.get("components", ())))


def _one_line(text: str) -> Iterator[Source]:
    for line in text.splitlines():
        if match := re.match(r"\s*deb\s+(?:\[[^]]*\]\s*)?(\S+)\s+(\S+)\s+([^#]*)", line):
            yield Source(match[1], (match[2],), tuple(match[3].split()))


def _expanded(uri: str) -> list[str]:
    """A list of mirrors in a file (Debian's cloud images have one) becomes its lines; what cannot serve, nothing."""
    if match := re.match(r"mirror(?:\+file)?:(?:file:)?/*(/.*)", uri):
        listed = Path(match[1])
        lines = listed.read_text(errors="replace").splitlines() if listed.is_file() else []
        return [_as_apt_prints(line.split()[0]) for line in lines if line.strip() and not line.startswith("#")]
    return [_as_apt_prints(uri)] if re.match(r"(https?|file|copy):", uri) else []


def _as_apt_prints(uri: str) -> str:
    return re.sub(r"^(file|copy):/+", r"\1:/", uri)


def _carried_over() -> str:
    """How the desk's apt reaches its mirror, as lines of apt's own configuration."""
    parts = ("Acquire::http", "Acquire::https", "Acquire::Check-Valid-Until", "Acquire::Check-Date")
    command = ["apt-config", "dump", "--no-empty", *parts]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}, check=False)
    return done.stdout if done.returncode == 0 else ""


# -- what apt says ----------------------------------------------------------------------------------------------------


def _installed(stanza: str) -> str | None:
    """A stanza of the index as dpkg's status would have it on the oldest Debian 13."""
    fields = dict(re.findall(r"^([\w-]+): (.*(?:\n[ \t].*)*)", stanza, re.MULTILINE))
    if "Package" not in fields:
        return None
    kept = {
        name: fields[name]
        for name in ("Package", "Architecture", "Essential", "Multi-Arch", "Provides")
        if name in fields
    }
    for name in ("Pre-Depends", "Depends"):
        if name in fields:
            # Lower bounds go: in the older system they were lower. Exact ones follow the version that is claimed.
            loose = re.sub(r"\s*\(>[>=] [^)]*\)", "", fields[name])
            kept[name] = re.sub(r"\(= ([^)]*)\)", lambda match: f"(= {_floor(match[1])})", loose)
    kept |= {"Version": _floor(fields["Version"]), "Status": "install ok installed"}
    kept |= {"Maintainer": "none", "Description": "none"}  # dpkg's status may not be without
    return "".join(f"{name}: {value}\n" for name, value in kept.items())


def _floor(version: str) -> str:
    """The lowest version of the same package that an older Debian 13 can have.

    An update of a stable release appends +deb13uN to the version that was there; a new upstream version is ~deb13uN,
    and then nothing but its first number is known of the one before.
    """
    if "~deb13u" in version:
        first = re.match(r"(\d+:)?\d+", version)
        return first[0] if first else "0"
    return version.split("+deb13u")[0]


def _folder(uri: str) -> str:
    return uri if uri.endswith("/") else f"{uri}/"


def _is_local(uri: str) -> bool:
    return uri.startswith(("file:", "copy:"))


def _local(uri: str) -> Path:
    return Path("/" + unquote(uri.split(":", 1)[1]).lstrip("/"))


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _first_line(text: str) -> str:
    lines = [line.strip().removeprefix("E: ").removeprefix("W: ") for line in text.splitlines() if line.strip()]
    return lines[0] if lines else "apt does not say why"
