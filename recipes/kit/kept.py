"""A cluster file that did not change is not read again: reading it is half of what a bake of nothing takes."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from contextlib import suppress
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from recipes.kit import atomic, model
from recipes.kit.errors import BakeError
from recipes.kit.hashing import signature
from recipes.kit.model import Cluster

_MODULES: Final = (model.__name__, "datetime", "ipaddress", "pathlib")  # whose types a Cluster consists of


def load(file: Path, *, now: datetime, code: str, folder: Path) -> Cluster:
    """inventory.load(file, now=now), or what it gave the last time, kept in folder: as long as the cluster file, the
    files that it names, the digest of the code and the person are the same. Raises what inventory.load() raises.

    That time has passed since makes no kept cluster wrong: a date that was not too far ahead is none now.
    """
    path = Path(os.path.abspath(file))  # noqa: PTH100 (a link stays a link)
    premises = _premises(path, code)
    kept = folder / hashlib.sha256(os.fsencode(path)).hexdigest()
    if premises and (cluster := _read(kept, premises)) is not None:
        return cluster

    from recipes.kit import inventory  # and with it pydantic

    cluster = inventory.load(file, now=now)
    if premises and premises == _premises(path, code):  # not written while it was read
        with suppress(BakeError, OSError):  # else it is read again the next time
            body = pickle.dumps((cluster, _signatures(cluster)))
            atomic.write(kept, _seal(premises, body) + body, mode=0o600)
    return cluster


def _premises(path: Path, code: str) -> bytes:
    """What decides about the Cluster besides the files named in it; nothing where the file cannot be read twice."""
    with suppress(OSError, ValueError):
        if path.is_file():
            readers = [version(name) for name in ("pydantic", "pyyaml")]
            return repr((path, path.read_bytes(), code, readers, os.geteuid())).encode()
    return b""


def _read(kept: Path, premises: bytes) -> Cluster | None:
    with suppress(OSError, pickle.UnpicklingError):
        whole = kept.read_bytes()
        seal, body = whole[:32], whole[32:]
        if seal == _seal(premises, body):
            cluster, signatures = _Unpickler(io.BytesIO(body)).load()
            return cluster if _signatures(cluster) == signatures else None
    return None


def _seal(premises: bytes, body: bytes) -> bytes:
    return hashlib.sha256(hashlib.sha256(premises).digest() + body).digest()


def _signatures(cluster: Cluster) -> list[tuple[int, ...]]:
    return [signature(path.stat()) for path in cluster.files]


class _Unpickler(pickle.Unpickler):
    """Makes nothing but a Cluster's parts, whoever wrote the file: a build folder may come from elsewhere."""

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name) if module in _MODULES and "." not in name else None
        if not isinstance(found, type):
            raise pickle.UnpicklingError(f"{module}.{name} is no part of a cluster")
        return found
