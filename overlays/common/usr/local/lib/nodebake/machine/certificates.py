"""Until when the machine's certificates hold."""

from __future__ import annotations

import base64
import re
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from machine.system import System, run

WARNED = timedelta(days=90)  # before the end of a baked one, which nobody renews
ROTATED = 0.1  # of its life is left: a kubelet renews its own long before
KUBELET = "/var/lib/kubelet/pki"
CLIENT, SERVER = f"{KUBELET}/kubelet-client-current.pem", f"{KUBELET}/kubelet-server-current.pem"
_PLACES = (
    "etc/kubernetes/pki/*.crt",
    "etc/etcd/pki/*.crt",
    "etc/kubernetes/*.conf",
    "var/lib/kubelet/pki/*-current.pem",
)
_EMBEDDED = re.compile(r"client-certificate-data: *[\"']?([A-Za-z0-9+/=]+)")


@dataclass(frozen=True)
class Certificate:
    """problem: it has ended, or cannot be read; warning: it ends soon."""

    path: str
    subject: str
    start: datetime | None
    end: datetime | None
    problem: str | None = None
    warning: str | None = None


def each(system: System) -> Iterator[tuple[str, bytes]]:
    """(path, PEM) of every certificate that there is, sorted by path."""
    for path in sorted(name for place in _PLACES for name in system.glob(place)):
        pem = system.read(path)
        if pem is not None and path.endswith(".conf"):
            embedded = _EMBEDDED.search(pem.decode(errors="replace"))
            pem = _decoded(embedded[1]) if embedded else None
        if pem is not None:
            yield path, pem


def look(system: System, now: datetime) -> list[Certificate]:
    """In the order of each()."""
    found = []
    for path, pem in each(system):
        if told := describe(pem, "-subject", "-startdate", "-enddate"):
            found.append(_judged(path, told, now))
        elif run(["openssl", "version"]).code != 0:
            system.cannot_see("the certificates", "openssl is not installed")
            break
        else:
            found.append(Certificate(path, "", None, None, "is no certificate that can be read"))
    return found


def describe(pem: bytes, *options: str) -> str:
    """What `openssl x509` says of the first certificate; "" if there is none."""
    told = run(["openssl", "x509", "-noout", *options], data=pem)
    return told.text if told.code == 0 else ""


def _judged(path: str, told: str, now: datetime) -> Certificate:
    fields = dict(line.split("=", 1) for line in told.splitlines() if "=" in line)
    subject = fields.get("subject", "").strip()
    try:
        start, end = (
            datetime.fromtimestamp(ssl.cert_time_to_seconds(fields[name]), UTC) for name in ("notBefore", "notAfter")
        )
    except (KeyError, ValueError, OverflowError):
        return Certificate(path, subject, None, None, "has dates that cannot be read")
    problem = warning = None
    if end <= now:
        problem = f"ended on {end:%Y-%m-%d %H:%M} UTC"
    elif start > now:
        problem = f"holds from {start:%Y-%m-%d %H:%M} UTC on only: look at the clock"
    elif end - now < ((end - start) * ROTATED if path.startswith(KUBELET) else WARNED):
        warning = f"ends on {end:%Y-%m-%d %H:%M} UTC"
    return Certificate(path, subject, start, end, problem, warning)


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text)
    except ValueError:
        return b""
