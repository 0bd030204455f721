"""What was baked, for people: the table at the end of a bake, and `doit info`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path

from recipes.bake import Bake, some
from recipes.kit import sizing, store
from recipes.kit.model import SCALES, Cluster, Node
from recipes.kit.profiles import ADMIN_CONF, DESK, expiries
from recipes.kit.progress import amount
from recipes.records import read_fetched, read_images

ROWS = 24  # a table of 5,000 machines is for a file, not for a screen


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; nothing that a log could not show."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    filled = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in filled)


def facts(*named: tuple[str, str]) -> list[str]:
    """Lines of "name  value"."""
    return table(named[0], named[1:]).splitlines()


def summary(bake: Bake, nodes: Sequence[Node]) -> str:
    """The end of a bake: machines, artifacts, sizes, sources, expiry, and what to do next."""
    shown = nodes if len(nodes) <= ROWS else nodes[: ROWS // 2]
    rows = [
        (
            node.name,
            node.role,
            str(node.address),
            node.media,
            _size(bake.tarball(node)),
            _size(bake.seed(node)),
            _first_expiry(bake, node),
        )
        for node in shown
    ]
    lines = ["", table(("MACHINE", "ROLE", "ADDRESS", "MEDIA", "TARBALL", "SEED", "CERTIFICATES UNTIL"), rows)]
    if len(nodes) > len(shown):
        lines.append(f"... and {len(nodes) - len(shown)} machines more")
    lines += ["", f"Sources: {_sources(bake)}", *_until(bake, nodes), "", *_next(bake)]
    return "\n".join(lines)


def disks(bake: Bake, nodes: Sequence[Node]) -> str:
    """The end of a bake of disk images: sizes, and how they are written."""
    shown = nodes if len(nodes) <= ROWS else nodes[: ROWS // 2]
    rows = [
        (node.name, str(bake.disk(node)), _size(bake.disk(node)), amount(bake.disk_layout(node).size, "bytes"))
        for node in shown
    ]
    lines = ["", table(("MACHINE", "DISK IMAGE", "SIZE", "ON THE DISK"), rows)]
    if len(nodes) > len(shown):
        lines.append(f"... and {len(nodes) - len(shown)} machines more")
    write = f"gzip -dc {bake.disk(nodes[0])} | sudo dd of=/dev/sdX bs=4M conv=fsync"
    return "\n".join(
        [*lines, "", *_until(bake, nodes)[:1], f"To write one: {write}", "They hold secrets, as the seeds do."]
    )


def renewals(bake: Bake, nodes: Sequence[Node]) -> str:
    """The end of a bake of what renews machines that run: sizes, until when, and how it is applied."""
    shown = nodes if len(nodes) <= ROWS else nodes[: ROWS // 2]
    rows = [(node.name, str(bake.certs(node)), _size(bake.certs(node)), _first_expiry(bake, node)) for node in shown]
    lines = ["", table(("MACHINE", "RENEWAL", "SIZE", "CERTIFICATES UNTIL"), rows)]
    if len(nodes) > len(shown):
        lines.append(f"... and {len(nodes) - len(shown)} machines more")
    lines += [
        "",
        "On one machine after the other, from a folder DIR where it lies as node.tar.gz: nodebake apply DIR",
        "They hold secrets, as the seeds do, and are for machines that have the payload which was baked last.",
    ]
    return "\n".join(lines)


def rekeyed(bake: Bake, owners: Sequence[str], before: store.Secrets) -> str:
    """The end of a rekeying: what is new, what has to change on a running cluster, and what to do next."""
    rows, objects, machines = [], list[str](), list[str]()
    for owner in owners:
        node = next((node for node in bake.cluster.nodes if node.name == owner), None)
        leaves = [day for name, day in _expiries(bake, node) if not name.endswith("-ca")]
        certificates = f"{len(leaves)}, until {min(leaves)}" if leaves else "-"
        if node is None:
            rows.append((ADMIN_CONF, certificates, "-", "-"))
            continue
        machines.append(owner)
        ids = [each.tokens[owner].id for each in (before, bake.secrets) if owner in each.tokens]
        token = " -> ".join(ids) if node.runs_kubelet else "-"
        rows.append((owner, certificates, token, _day(bake.secrets.life(owner).install_by)))
        if node.runs_kubelet:
            objects += [f"Secret bootstrap-token-{old}: goes" for old in ids[:-1]]
            objects += [f"Secret bootstrap-token-{ids[-1]}: comes, unless {owner} is a Node"] if not node.denied else []
    steps = ["doit"]
    if objects:
        planes = " ".join(f"certs:{node.name}" for node in bake.cluster.control_planes)
        listed = "".join(f"\n       {each}" for each in (*objects, "ConfigMap nodebake-inventory: the next generation"))
        steps.append(
            f"If the cluster runs: doit {planes}, and nodebake apply DIR on one\n"
            f"     control plane after the other. The first one changes in kube-system:{listed}"
        )
    if machines:
        steps.append(
            f"{some(machines)}: what is not installed gets its new seed; what runs, its renewal (doit certs:NODE)."
        )
    lines = [table(("MINTED ANEW", "CERTIFICATES", "TOKEN", "INSTALL BY"), rows), "", "Next:"]
    lines += [f"  {number}. {step}" for number, step in enumerate(steps, 1)]
    lines += [f"Back up {bake.where} again. Old certificates hold until their end: none can be called back."]
    return "\n".join(lines)


def cluster(bake: Bake) -> str:
    """`doit info`: the cluster, as far as it is baked."""
    cluster = bake.cluster
    roles = Counter(node.role for node in cluster.nodes)
    members = [node.name for node in cluster.etcd_members]
    endpoint = cluster.control_plane_endpoint or cluster.vip or "each control plane"
    lines = facts(
        ("cluster", f"{cluster.name} ({cluster.file})"),
        ("machines", ", ".join(f"{count} {role}" for role, count in roles.items())),
        ("etcd", f"{cluster.etcd}: {', '.join(members)}"),
        ("API", f"load balancer: {cluster.load_balancer}; endpoint: {endpoint}"),
        ("pods", f"{cluster.pod_subnet} by {cluster.pod_network}; services {cluster.service_subnet}"),
        ("store", str(bake.where)),
        *_size_of(cluster),
        *_distribution(bake),
    )
    if not bake.minted:
        return "\n".join([*lines, "", "Nothing is baked yet: run doit."])
    lines += ["", *_until(bake, cluster.nodes), "", table(("COMPONENT", "VERSION", "SOURCE"), _components(bake))]
    lines += ["", table(("WHAT ENDS", "OF", "WHEN"), _ends(bake))]
    return "\n".join(lines)


def _size_of(cluster: Cluster) -> list[tuple[str, str]]:
    """What the number of nodes sets, and which machines it wants (recipes/clusters/README.md, Sizes)."""
    size, nodes = sizing.of(cluster), len(cluster.kubelets)
    told = [
        ("sized for", f"up to {size.workers:,} workers: each API server takes {size.requests:,} requests at a time"),
        ("heartbeats", f"{sizing.heartbeats(nodes):,.1f} writes/s of {nodes:,} nodes"),
    ]
    if cluster.pod_network == "flannel" and size.workers > SCALES[0]:
        cost = f"{sizing.watch_bytes(nodes) / 1e6:,.0f} MB/s at {sizing.NODE_OBJECT // 1000} kB a Node"
        told.append(("flannel", f"{sizing.watch_events(nodes):,.0f} events/s from all API servers, {cost}"))
    told += [(f"{role} wants", str(wanted)) for role, wanted in sizing.machines(cluster).items()]
    cpus, memory = sizing.WORKER_OVERHEAD
    told.append(("worker wants", f"what its pods want, {cpus} CPUs and {memory} MiB"))
    return [
        *told,
        (
            "etcd's disk",
            f"one synchronous write in under {sizing.SYNC_LIMIT} ms (99th percentile); first boot measures the average",
        ),
    ]


def _distribution(bake: Bake) -> list[tuple[str, str]]:
    """What the payloads' server has to send, as far as they are baked."""
    sizes = {(role, arch): bake.payload(role, arch) for role, arch in bake.cluster.payloads}
    there = {payload: path.stat().st_size for payload, path in sizes.items() if path.exists()}
    found = [there.get((node.role, node.arch), 0) for node in bake.cluster.fetching]
    if not sum(found):
        return []
    total = sum(found)
    spread = sizing.spread(len(found), there.get(("worker", bake.cluster.fetching[-1].arch), 0))
    begin = f"workers begin within {sizing.duration(spread)}" if spread else "all begin at once"
    servers = f"{sizing.servers(total)} server{'s' if sizing.servers(total) > 1 else ''}"
    times = f"{sizing.duration(sizing.sending(total))} at 1 Gbit/s, {sizing.duration(sizing.sending(total, 10))} at 10"
    return [
        ("payloads from", f"{bake.cluster.payload_server}: {amount(total, 'bytes')} to {len(found):,} machines"),
        ("", f"{times}; within an hour by {servers} with 1 Gbit/s; {begin}"),
    ]


def machine(bake: Bake, node: Node) -> str:
    """`doit info NODE`: one machine's artifact: what is in it, from where, until when."""
    lines = facts(
        ("machine", f"{node.name} ({node.role}, {node.arch}, media {node.media})"),
        ("address", ", ".join(str(address) for address in node.network.addresses)),
        ("matched by", ", ".join(link.mac or f"interface {link.name}" for link in node.network.links)),
        ("tarball", f"{bake.tarball(node)} {_size(bake.tarball(node))}"),
        ("seed", f"{bake.seed(node)} {_size(bake.seed(node))}"),
        ("disk image", f"{bake.disk(node)} {_size(bake.disk(node))}"),
    )
    if not bake.minted or not bake.tarball(node).exists():
        return "\n".join([*lines, "", f"It is not baked yet: run doit node:{node.name}"])
    lines += ["", *_until(bake, [node])]
    if ends := [*_expiries(bake, node), *_issued(bake, node)]:
        lines += ["", table(("WHAT ENDS", "WHEN"), ends)]
    lines += ["", table(("COMPONENT", "VERSION", "SOURCE", "FILES", "SIZE"), _contents(bake, node))]
    return "\n".join(lines)


def _contents(bake: Bake, node: Node) -> list[tuple[str, ...]]:
    """What the payload holds, by component: files and bytes. With thin media it lies beside the artifact."""
    from recipes import payload

    found: dict[tuple[str, str, str], list[int]] = {}
    [files] = payload.read_record(bake.payload(node.role, node.arch), "files")
    for entry in files:
        key = (entry.get("component") or "configuration", entry.get("version") or "", entry.get("source") or "baked")
        if key[2] == "debian":
            key = ("Debian packages", "", "debian")
        found.setdefault(key, []).append(entry.get("size") or 0)
    return [(*key, str(len(sizes)), amount(sum(sizes), "bytes")) for key, sizes in sorted(found.items())]


def _components(bake: Bake) -> list[tuple[str, str, str]]:
    """(name, version, source) of everything but Debian's packages, which are counted as one."""
    found: set[tuple[str, str, str]] = set()
    for record in sorted((bake.folder / "binaries").glob("*.json")):
        found |= {(file.origin.component, file.origin.version, file.origin.source) for file in read_fetched(record)}
    for record in sorted((bake.folder / "images").glob("*.json")):
        found |= {(f"image {each.reference}", "", each.archive.origin.source) for each in read_images(record)}
    debs = {file.name for record in (bake.folder / "packages").glob("*.json") for file in read_fetched(record)}
    return [*sorted(found), *([(f"{len(debs)} packages", "", "debian")] if debs else [])]


def _sources(bake: Bake) -> str:
    components = _components(bake)
    counted = Counter(source.partition(" (")[0] for _, _, source in components if source != "debian")
    told = [f"{count} from {source}" for source, count in sorted(counted.items())]
    return ", ".join([*told, *(f"{name} from {source}" for name, _, source in components if source == "debian")])


def _until(bake: Bake, nodes: Sequence[Node]) -> list[str]:
    dates: dict[str, list[str]] = {}
    for node in nodes:
        dates.setdefault(_day(bake.secrets.life(node.name).install_by), []).append(node.name)
    told = [date if len(dates) == 1 else f"{date} ({some(names)})" for date, names in sorted(dates.items())]
    return [
        f"Install by {', '.join(told)}: bootstrap tokens end then, and first boot refuses.",
        f"Manifests are signed with the key {store.fingerprint(bake.secrets)}.",
    ]


def _next(bake: Bake) -> list[str]:
    server, thin = bake.cluster.payload_server, any(node.media == "thin" for node in bake.cluster.nodes)
    pushed = f"{server} (doit publish)" if (server or "").startswith("oci") else f"{server} ({bake.volume.parent})"
    volume = f"     Those with thin media need {bake.volume} besides, the same for all"
    return [
        "Next:",
        f"  1. Give each machine its own ISO of {bake.folder / 'seeds'} (virtual media, USB stick, CD).",
        *([f"{volume}{f', or fetch their payload from {pushed}' if server else ''}."] if thin else []),
        "  2. Switch them on, in any order.",
        f"  3. kubectl --kubeconfig {bake.folder / 'admin.conf'} get nodes",
        f"Keep {bake.where} safe: it holds the cluster's keys.",
    ]


def _first_expiry(bake: Bake, node: Node) -> str:
    """Of the certificates that are baked for this machine; a kubelet's own is issued, and renewed, in the cluster."""
    leaves = [day for name, day in _expiries(bake, node) if not name.endswith("-ca")]
    return min(leaves) if leaves else "issued on joining" if node.runs_kubelet else "-"


def _ends(bake: Bake) -> Iterable[tuple[str, str, str]]:
    """(what, whose, when): each CA once, and whatever else machines and administrators have, by its date."""
    yield from ((name, ADMIN_CONF if name == "admin" else "the cluster", day) for name, day in _expiries(bake, None))
    owners: dict[tuple[str, str], list[str]] = {}
    for node in bake.cluster.nodes:
        for name, day in (*_expiries(bake, node), *_issued(bake, node)):
            if not name.endswith("-ca"):
                owners.setdefault((name, day), []).append(node.name)
    yield from ((name, some(names), day) for (name, day), names in owners.items())


def _issued(bake: Bake, node: Node) -> list[tuple[str, str]]:
    """What a machine joins with, and what it is given then."""
    if not node.runs_kubelet:
        return []
    days = bake.cluster.validity.kubelet.days
    return [
        ("bootstrap token", _day(bake.secrets.life(node.name).install_by)),
        ("kubelet's two, once it has joined", f"{days} days, renewed by itself"),
    ]


def _expiries(bake: Bake, node: Node | None) -> list[tuple[str, str]]:
    """Of certificates that are baked, or without a machine the desk's: (name, day)."""
    secrets, owner = bake.secrets, node.name if node is not None else DESK
    found = expiries(bake.cluster, node, minted=secrets.life(owner).minted, authorities_end=secrets.authorities_end)
    return [(name, _day(moment)) for name, moment in found]


def _day(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%d")


def _size(path: Path) -> str:
    return amount(path.stat().st_size, "bytes") if path.exists() else "-"
