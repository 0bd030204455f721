"""The same work by a bake and by the shell script that one would write instead, on the same machine in one run.

The scripts lie in by_hand/. README.md says what exactly is compared.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from statistics import median

from recipes.kit import pki
from recipes.kit.archive import END_MEMBER
from recipes.kit.model import Address
from recipes.kit.profiles import AUTHORITIES, profiles_of
from tests import samples
from tests.bench import measure, scale, table
from tests.bench.measure import Goal, Run
from tests.conftest import ROOT, Project, copy_project

BY_HAND = Path(__file__).parent / "by_hand"
# What the scripts run, and the Debian package that has it.
PROGRAMS = {"pigz": "pigz", "xorriso": "xorriso", "openssl": "openssl", "awk": "mawk"}
LEVELS = (6, 1)  # pigz' own, and the one whose bytes are about as many as ours
MACHINES = (50, 500)  # with certificates
WORKERS = 500
FEW = 101  # workers of the cluster before: the payload is the same


def main(desk: str, rounds: int) -> None:
    """Writes build/bench/others.md and others.json, and prints the former."""
    lacking = [package for program, package in PROGRAMS.items() if shutil.which(program) is None]
    if lacking:
        sys.exit(f"The scripts that a bake is compared with need more programs: apt install {' '.join(lacking)}")
    folder = ROOT / "build" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    goals: list[Goal] = []
    facts: list[str] = []
    with tempfile.TemporaryDirectory(prefix="project-", dir=folder) as copy:
        project = copy_project(Path(copy))
        for compare in (artifacts, workers, certificates):
            more, told = compare(project, rounds)
            goals += more
            facts += told
    lines = [*table.rows(goals), "", f"Medians of {rounds} rounds; {desk}.", "", *(f"- {fact}" for fact in facts)]
    text = "\n".join(lines) + "\n"
    (folder / "others.md").write_text(text)
    told_all = {"goals": table.facts(goals), "facts": facts, "rounds": rounds, "desk": desk}
    (folder / "others.json").write_text(json.dumps(told_all, indent=1) + "\n")
    print(text, end="")


def by_hand(name: str, *arguments: Path | int) -> list[str]:
    return [str(BY_HAND / name), *map(str, arguments)]


def in_turns(commands: dict[str, tuple[list[str], Path]], cwd: Path, rounds: int) -> dict[str, float]:
    """Median seconds of each command; before it the folder that it fills is removed and made again."""
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for number in range(rounds):
        for name, (command, out) in commands.items():
            tell(f"{name}, {number + 1} of {rounds}")
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            measure.settle()
            runs[name].append(measure.run(command, cwd))
    return {name: median(run.seconds for run in each) for name, each in runs.items()}


# ---- tarballs and ISOs of the sample cluster


def artifacts(project: Project, rounds: int) -> tuple[list[Goal], list[str]]:
    project.remember("ha")
    project.doit()
    build, work = project.root / "build" / "ha", project.root / "work"
    staged = work / "staged"
    stage(build, staged)
    measure.warm(path for path in staged.rglob("*") if path.is_file() and not path.is_symlink())
    outs = {f"tar, pigz -{level}, xorriso": work / f"level-{level}" for level in LEVELS}
    scripts = {
        name: (by_hand("artifacts", staged, out, level), out)
        for (name, out), level in zip(outs.items(), LEVELS, strict=True)
    }
    found = in_turns({"doit": (project.command(), build), **scripts}, project.root, rounds)
    name = "worker-1.tar.gz"
    ours = members(build / "nodes" / name)
    assert all(members(out / "nodes" / name) == ours for out in outs.values()), "other files"
    sizes = {"doit": size(build / "nodes"), **{script: size(out / "nodes") for script, out in outs.items()}}
    shutil.rmtree(work)
    goals = [Goal("tarballs and ISOs of 6 machines", found["doit"], found[script], 1, script) for script in outs]
    return goals, [f"tarballs by {script}: {total / 1e9:.2f} GB" for script, total in sizes.items()]


def stage(build: Path, staged: Path) -> None:
    """Each machine's files in a tree of its own; those of a payload are hard links of one copy."""
    for tarball in sorted((build / "nodes").iterdir()):
        name = tarball.name.removesuffix(".tar.gz")
        role = "control-plane" if name.startswith("control") else "worker"
        payload = build / "payloads" / f"{role}-amd64.tar.gz"
        shared = staged.with_name(role)
        if not shared.exists():
            shared.mkdir(parents=True)
            subprocess.run(["tar", "-xzf", payload, "-C", shared], check=True)
        root = staged / name / "root"
        root.parent.mkdir(parents=True)
        subprocess.run(["cp", "-al", shared, root], check=True)
        with tarball.open("rb") as file:
            file.seek(payload.stat().st_size - len(END_MEMBER))
            subprocess.run(["tar", "-xzf", "-", "-C", root], stdin=file, check=True)
        documents(build / "seeds" / f"{name}.iso", staged / name / "seed")


def documents(iso: Path, target: Path) -> None:
    """What a seed holds beside the tarball."""
    target.mkdir()
    names = ("user-data", "meta-data", "network-config", "SHA256SUMS", "SHA256SUMS.sig", "first-boot")
    wanted = [word for name in names for word in ("-extract", f"/{name}", str(target / name))]
    subprocess.run(["xorriso", "-osirrox", "on", "-indev", iso, *wanted], check=True, capture_output=True)
    for name in names:
        (target / name).chmod(0o644)


def members(tarball: Path) -> list[str]:
    """The files in a tarball; folders are listed by one and not by the other."""
    told = subprocess.run(["tar", "-tzf", tarball], check=True, capture_output=True, text=True).stdout.splitlines()
    return sorted(name.removeprefix("./") for name in told if not name.endswith("/"))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


# ---- identities and seeds of many workers


def workers(project: Project, rounds: int) -> tuple[list[Goal], list[str]]:
    """The payload is there, and so are the control planes' keys: measured are 399 tokens more, and all machines."""
    file = scale.cluster_file(project, WORKERS)
    whole = file.read_text()
    file.write_text(whole.replace(f"count: {WORKERS}", f"count: {FEW}"))
    project.remember(file.stem)
    project.doit(f"cluster={file}", "payload", "node:worker-1")
    build, work = project.root / "build" / file.stem, project.root / "work"
    key, listed, template = template_of(project, file, work)
    file.write_text(whole)
    before = work / "before"
    shutil.copytree(build, before)
    store = file.with_name(f"{file.name}.secrets")
    shutil.copytree(store, work / "store")
    ours: list[Run] = []
    theirs: list[Run] = []
    for number in range(rounds):
        tell(f"{WORKERS} workers, {number + 1} of {rounds}")
        for there, kept in ((build, before), (store, work / "store")):
            shutil.rmtree(there)
            shutil.copytree(kept, there)
        measure.settle()
        ours.append(measure.run(project.command(f"cluster={file}", "node"), project.root))
        out = work / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        measure.settle()
        theirs.append(measure.run(by_hand("workers", template, key, listed, out), project.root))
    assert len(list((work / "out" / "seeds").iterdir())) == WORKERS
    shutil.rmtree(work)
    bake, hand = (median(run.seconds for run in runs) for runs in (ours, theirs))
    return [Goal(f"tokens, identities and seeds of {WORKERS} workers", bake, hand, 1, "the script, on all cores")], []


def template_of(project: Project, file: Path, work: Path) -> tuple[Path, Path, Path]:
    """The signing key, the list of machines, and worker-1's files with words in place of what is its own."""
    build, template = project.root / "build" / file.stem, work / "template"
    (template / "root").mkdir(parents=True)
    subprocess.run(["tar", "-xzf", build / "nodes" / "worker-1.tar.gz", "-C", template / "root"], check=True)
    documents(build / "seeds" / "worker-1.iso", template / "seed")
    store = file.with_name(f"{file.name}.secrets")
    token = json.loads((store / "tokens.json").read_text())["content"]["worker-1"]
    for path in template.rglob("*"):
        if path.is_file() and not path.is_symlink():
            data = path.read_bytes().replace(token.encode(), b"TOKEN").replace(b"worker-1", b"NAME")
            path.write_bytes(data.replace(b"172.16.8.1", b"ADDRESS"))
    listed = work / "list"
    hosts = range(1, WORKERS + 1)
    listed.write_text("".join(f"worker-{at} 172.16.{8 + at // 256}.{at % 256}\n" for at in hosts))
    return store / "signing.key", listed, template


# ---- certificates


def certificates(project: Project, rounds: int) -> tuple[list[Goal], list[str]]:
    """Of control planes with etcd, which have every kind: more of them than any cluster has."""
    work = project.root / "work"
    cas = authorities(work / "cas")
    goals, facts = [], []
    for machines in MACHINES:
        lines = requests(machines)
        listed = work / "list"
        listed.write_text("".join(lines))
        ours, theirs = work / "ours", work / "theirs"
        commands = {"ours": (mint(cas, listed, ours), ours)}
        commands |= {"openssl": (by_hand("certificates", cas, listed, theirs), theirs)}
        found = in_turns(commands, ROOT, rounds)
        check(lines, cas, ours, theirs)
        what = f"{len(lines)} keys and certificates of {machines} machines"
        goals.append(Goal(what, found["ours"], found["openssl"], 1, "openssl, on all cores"))
        rates = ", ".join(f"{name} {len(lines) / seconds:.0f}" for name, seconds in found.items())
        facts.append(f"certificates a second, {machines} machines: {rates}")
    shutil.rmtree(work)
    return goals, facts


def mint(*arguments: Path) -> list[str]:
    return [sys.executable, "-m", "tests.bench.mint", *map(str, arguments)]


def authorities(folder: Path) -> Path:
    """The folder with a CA of each kind, as openssl makes them."""
    folder.mkdir(parents=True)
    for spec in AUTHORITIES:
        path = folder / spec.name
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc"]
        command += ["-subj", f"/CN={spec.common_name}", "-days", "3652"]
        command += ["-keyout", f"{path}.key", "-out", f"{path}.crt"]
        subprocess.run(command, check=True, capture_output=True)
    return folder


def requests(machines: int) -> list[str]:
    """path|ca|subject|uses|names of each certificate of so many control planes."""
    cluster = samples.ha()
    lines = []
    for number in range(machines):
        address = Address(IPv4Address(0xAC100800 + number), IPv4Network("172.16.0.0/16"))  # 172.16.8.0 and on
        network = cluster.nodes[0].network._replace(addresses=(address,))
        node = cluster.nodes[0]._replace(name=f"control-{number + 1}", network=network)
        for spec in profiles_of(node):
            uses = ",".join(use for use, wanted in (("serverAuth", spec.server), ("clientAuth", spec.client)) if wanted)
            names = spec.sans.names(cluster, node) if spec.sans is not None else ()
            sans = ",".join(f"{'IP' if name[0].isdigit() else 'DNS'}:{name}" for name in names)
            organization = f"/O={spec.organization}" if spec.organization else ""
            subject = f"{organization}/CN={spec.common_name}"
            lines.append(f"{node.name}/{spec.name}|{spec.authority}|{subject}|{uses}|{sans}\n")
    return lines


def check(lines: Sequence[str], cas: Path, *outs: Path) -> None:
    """That all are there, and that the CA's key has signed the last one, for the same names."""
    name, ca, *_ = lines[-1].split("|")
    told = []
    for out in outs:
        assert len(list(out.glob("*/*.crt"))) == len(lines) == len(list(out.glob("*/*.key")))
        subprocess.run(
            ["openssl", "verify", "-CAfile", cas / f"{ca}.crt", out / f"{name}.crt"], check=True, capture_output=True
        )
        certificate = pki.load_certificate((out / f"{name}.crt").read_bytes())
        told.append((certificate.subject, certificate.issuer))
    assert told[0] == told[-1]


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
