"""The health endpoints of this machine's own daemons, asked over loopback; and what the API server says of its Node."""

from __future__ import annotations

import http.client
import json
import re
import socket
import ssl
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from machine.system import System

_ADDRESS = "127.0.0.1"
_CA = "etc/kubernetes/pki/kubernetes-ca.crt"  # where there is an API server, or a way to one
_SECONDS = 3.0
_AS_NODE = "etc/kubernetes/kube-proxy.conf"  # says where the API is, and speaks as this machine's Node
_WORSE = ("MemoryPressure", "DiskPressure", "PIDPressure", "NetworkUnavailable")
_LARGEST = 16 << 20  # bytes of a Node
_CERTIFICATE = "var/lib/kubelet/pki/kubelet-client-current.pem"


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


def ask_node(system: System, name: str) -> Endpoint | None:
    """What the API server says of this Node, asked with the kubelet's certificate; None where there is none."""
    config = system.text(_AS_NODE) or ""
    if (server := re.search(r'^ +server: "(https://[^"]+)"$', config, re.MULTILINE)) is None:
        return None
    if not system.exists(_CERTIFICATE):
        return None
    url = f"{server[1]}/api/v1/nodes/{name}"
    return Endpoint("node", url, _ask_node(system, url))


def _ask_node(system: System, url: str) -> str | None:
    address = urlsplit(url)
    try:
        trust = ssl.create_default_context(cafile=str(system.path(_CA)))
        trust.load_cert_chain(system.path(_CERTIFICATE))
        connection = http.client.HTTPSConnection(address.hostname or "", address.port, timeout=_SECONDS, context=trust)
        connection.request("GET", address.path, headers={"Connection": "close"})
        answer = connection.getresponse()
        told = answer.read(_LARGEST)
    except ssl.SSLCertVerificationError as error:
        return f"the certificate of {url} is not to be trusted: {error.verify_message}"
    except (OSError, http.client.HTTPException):
        return f"{url} does not answer"
    if answer.status != 200:
        return f"{url} answers {answer.status}"
    try:
        return _condition(json.loads(told)["status"]["conditions"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"{url} tells no conditions"


def _condition(conditions: list[dict[str, Any]]) -> str | None:
    """What is wrong with a Node: it is not Ready, or something of the kubelet's that would better not be."""
    known = {str(each["type"]): each for each in conditions}
    ready = known.get("Ready", {})
    wrong = [each for name, each in known.items() if name in _WORSE and each["status"] == "True"]
    if ready.get("status") != "True":
        return f"is not Ready: {ready.get('message', 'the kubelet has not said so yet')}"
    return "; ".join(f"{each['type']}: {each.get('message', '')}" for each in wrong) or None


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
