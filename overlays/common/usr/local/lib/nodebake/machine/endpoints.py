"""The health endpoints of this machine's own daemons, asked over loopback."""

from __future__ import annotations

import http.client
import socket
import ssl
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from machine.system import System

_ADDRESS = "127.0.0.1"
_CA = "etc/kubernetes/pki/kubernetes-ca.crt"  # where there is an API server, or a way to one
_SECONDS = 3.0


@dataclass(frozen=True)
class Probe:
    """tls: "" none, "verified" by the cluster's CA, "unverified" for a daemon that signs for itself."""

    unit: str
    port: int
    path: str
    tls: str = ""

    @property
    def url(self) -> str:
        return f"http{'s' if self.tls else ''}://{_ADDRESS}:{self.port}{self.path}"


PROBES = (
    Probe("etcd.service", 2381, "/health"),
    Probe("kube-apiserver.service", 6443, "/readyz", "verified"),
    Probe("kube-controller-manager.service", 10257, "/healthz", "unverified"),
    Probe("kube-scheduler.service", 10259, "/healthz", "unverified"),
    Probe("api-balancer.service", 6443, "/readyz", "verified"),
    Probe("kubelet.service", 10248, "/healthz"),
    Probe("kube-proxy.service", 10256, "/healthz"),
    Probe("flanneld.service", 10271, "/healthz"),
)


@dataclass(frozen=True)
class Endpoint:
    """problem: None when it answers that all is well."""

    name: str  # of the unit, without ending
    url: str
    problem: str | None


def ask(system: System, units: Iterable[str]) -> list[Endpoint]:
    """Those of the units given, all at once."""
    wanted = [probe for probe in PROBES if probe.unit in set(units)]
    if not wanted:
        return []
    with ThreadPoolExecutor(len(wanted)) as pool:
        problems = list(pool.map(lambda probe: _ask(system, probe), wanted))
    return [
        Endpoint(probe.unit.removesuffix(".service"), probe.url, problem)
        for probe, problem in zip(wanted, problems, strict=True)
    ]


def _ask(system: System, probe: Probe) -> str | None:
    try:
        with socket.create_connection((_ADDRESS, probe.port), _SECONDS) as plain:
            if not probe.tls:
                return _get(plain, probe)
            with _trust(system, probe).wrap_socket(plain, server_hostname="kubernetes") as encrypted:
                return _get(encrypted, probe)
    except ssl.SSLCertVerificationError as error:
        return f"the certificate of {probe.url} is not to be trusted: {error.verify_message}"
    except (OSError, http.client.HTTPException):
        # Refused, reset, cut off: which of them changes from one moment to the next.
        return f"{probe.url} does not answer"


def _trust(system: System, probe: Probe) -> ssl.SSLContext:
    if probe.tls == "verified":
        return ssl.create_default_context(cafile=str(system.path(_CA)))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # loopback, and nothing secret is said
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _get(connected: socket.socket, probe: Probe) -> str | None:
    connection = http.client.HTTPConnection("kubernetes", probe.port)
    connection.sock = connected
    connection.request("GET", probe.path, headers={"Connection": "close"})
    answer = connection.getresponse()
    answer.read(1 << 16)
    return None if answer.status == 200 else f"{probe.url} answers {answer.status}"
