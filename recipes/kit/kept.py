"""A cluster file that did not change is not read again: reading it is half of what a bake of nothing takes."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import sys
from contextlib import suppress
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from recipes.kit import atomic, model
from recipes.kit.errors import BakeError
from recipes.kit.hashing import signature
from recipes.kit.model import Cluster

NAME: Final = ".cluster"  # in the secret store, which is the operator's alone; no secret itself
_MODULES: Final = frozenset((model.__name__, "datetime", "ipaddress", type(Path()).__module__))


def load(file: Path, *, now: datetime, code: str, store: Path) -> Cluster:
    """inventory.load(file, now=now), or what it gave the last time, kept in the secret store where there is one: for as
    long as the cluster file, what it names and the digest of the code are the same. Raises as inventory.load()."""
    path = Path(os.path.abspath(file))  # noqa: PTH100 (a link stays a link)
    premises = _premises(path, code)
    if premises and (cluster := _read(store / NAME, premises, now)) is not None:
        return cluster

    from recipes.kit import inventory  # and with it pydantic

    cluster = inventory.load(file, now=now)
    if store.is_dir() and premises and premises == _premises(path, code):  # not written while it was read
        with suppress(BakeError, OSError):  # else it is read again the next time
            body = pickle.dumps((cluster, _signatures(cluster), now))
            atomic.write(store / NAME, _seal(premises, body) + body, mode=0o600)
    return cluster


def _premises(path: Path, code: str) -> bytes:
    """What decides about the Cluster besides the files named in it; nothing where the file cannot be read twice."""
    with suppress(OSError, ValueError):
        if path.is_file():
            readers = [sys.version, version("pydantic"), version("pyyaml"), os.geteuid()]
            return repr((path, signature(path.stat()), path.read_bytes(), code, readers)).encode()
    return b""


def _read(kept: Path, premises: bytes, now: datetime) -> Cluster | None:
    with suppress(Exception):  # whatever is wrong with it, there is the cluster file
        whole = kept.read_bytes()
        seal, body = whole[:32], whole[32:]
        if seal == _seal(premises, body):
            cluster, signatures, then = _Unpickler(io.BytesIO(body)).load()
            # Time that passes makes no cluster wrong: a date that was not too far ahead is none now.
            if isinstance(cluster, Cluster) and _signatures(cluster) == signatures and then <= now:
                return cluster
    return None


def _seal(premises: bytes, body: bytes) -> bytes:
    """Tells damage, and what was read of another file or by other code."""
    return hashlib.sha256(hashlib.sha256(premises).digest() + body).digest()


def _signatures(cluster: Cluster) -> list[tuple[int, ...]]:
    return [signature(path.stat()) for path in cluster.files]


class _Unpickler(pickle.Unpickler):
    """Calls nothing but what a Cluster's parts are made by."""

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name) if module in _MODULES and "." not in name else None
        if not isinstance(found, type):
            raise pickle.UnpicklingError(f"{module}.{name} is no part of a cluster")
        return found
