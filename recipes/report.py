"""What was baked, for people: the table at the end of a bake, and `doit info`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path

from recipes.bake import Bake
from recipes.kit import store
from recipes.kit.model import Node
from recipes.kit.profiles import expiries
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
    lines += ["", f"Sources: {_sources(bake)}", *_until(bake), "", *_next(bake)]
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
    return "\n".join([*lines, "", *_until(bake)[:1], f"To write one: {write}", "They hold secrets, as the seeds do."])


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
    )
    if not bake.minted:
        return "\n".join([*lines, "", "Nothing is baked yet: run doit."])
    lines += ["", *_until(bake), "", table(("COMPONENT", "VERSION", "SOURCE"), _components(bake))]
    lines += ["", table(("CERTIFICATE", "UNTIL"), [(name, _day(moment)) for name, moment in _expiries(bake, None)])]
    return "\n".join(lines)


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
    lines += ["", *_until(bake)]
    if ends := _expiries(bake, node):
        lines += ["", table(("CERTIFICATE", "UNTIL"), [(name, _day(moment)) for name, moment in ends])]
    lines += ["", table(("COMPONENT", "VERSION", "SOURCE", "FILES", "SIZE"), _contents(bake, node))]
    return "\n".join(lines)


def _contents(bake: Bake, node: Node) -> list[tuple[str, ...]]:
    """What the payload holds, by component: files and bytes. With thin media it lies beside the artifact."""
    found: dict[tuple[str, str, str], list[int]] = {}
    for entry in json.loads(bake.payload_record(node.role, node.arch).read_text())["files"]:
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


def _until(bake: Bake) -> list[str]:
    return [
        f"Install by {_day(bake.secrets.install_by)}: bootstrap tokens end then, and first boot refuses.",
        f"Manifests are signed with the key {store.fingerprint(bake.secrets)}.",
    ]


def _next(bake: Bake) -> list[str]:
    thin = any(node.media == "thin" for node in bake.cluster.nodes)
    return [
        "Next:",
        f"  1. Give each machine its own ISO of {bake.folder / 'seeds'} (virtual media, USB stick, CD).",
        *([f"     Those with thin media need {bake.volume} besides, the same for all."] if thin else []),
        "  2. Switch them on, in any order.",
        f"  3. kubectl --kubeconfig {bake.folder / 'admin.conf'} get nodes",
        f"Keep {bake.where} safe: it holds the cluster's keys.",
    ]


def _first_expiry(bake: Bake, node: Node) -> str:
    """Of the certificates that are baked for this machine; a kubelet's own is issued, and renewed, in the cluster."""
    leaves = [moment for name, moment in _expiries(bake, node) if not name.endswith("-ca")]
    return _day(min(leaves)) if leaves else "issued on joining" if node.runs_kubelet else "-"


def _expiries(bake: Bake, node: Node | None) -> list[tuple[str, datetime]]:
    secrets = bake.secrets
    return expiries(bake.cluster, node, minted=secrets.minted, authorities_end=secrets.authorities_end)


def _day(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%d")


def _size(path: Path) -> str:
    return amount(path.stat().st_size, "bytes") if path.exists() else "-"
