"""Cluster -> what an operating system is given, so that it takes media of this cluster alone.

The key, what checks a seed by it before cloud-init reads any, and the setting that lets cloud-init read nothing else.
None of it comes with a medium, so that no medium can bring its own.
"""

from __future__ import annotations

from pathlib import Path

from recipes.kit import archive, overlay
from recipes.kit.archive import Packed
from recipes.kit.model import Cluster, File
from recipes.kit.store import Secrets

FOLDER = "/etc/nodebake-trust"


def files(cluster: Cluster, secrets: Secrets) -> list[File]:
    return [
        *overlay.render(overlay.OVERLAYS / overlay.TRUST, {}),
        File(f"{FOLDER}/{cluster.name}.pub", data=secrets.signing.public_pem),
    ]


def write(cluster: Cluster, secrets: Secrets, target: Path, *, mtime: int) -> Packed:
    """The tarball to unpack on the root of an image; the same bytes always. mtime: since the epoch."""
    return archive.write_node(files(cluster, secrets), target, mtime=mtime)
