"""kubeconfig files, complete in themselves: CA, certificate, key or token are embedded."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field

from recipes.kit.overlay import quoted


@dataclass(frozen=True, slots=True)
class Credential:
    """Who calls: a client certificate with its key (PEM), or a bearer token."""

    user: str  # the name inside of the file
    certificate: bytes | None = None
    key: bytes | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)


def kubeconfig(servers: Mapping[str, str], *, authority: bytes, credential: Credential) -> bytes:
    """A kubeconfig with a context for each server; the first is the current one.

    servers: context name -> https URL, at least one. authority: the CA's certificate, PEM.
    ValueError: a name, URL or token holds a control character.
    """
    # Written by hand: a YAML library takes milliseconds, and a large cluster has thousands of these.
    ca = _base64(authority)
    user = quoted(credential.user)
    lines = ["apiVersion: v1", "kind: Config", f"current-context: {quoted(next(iter(servers)))}", "clusters:"]
    for name, server in servers.items():
        lines += [
            f"- name: {quoted(name)}",
            "  cluster:",
            f"    server: {quoted(server)}",
            f"    certificate-authority-data: {ca}",
        ]
    lines.append("contexts:")
    for name in map(quoted, servers):
        lines += [f"- name: {name}", "  context:", f"    cluster: {name}", f"    user: {user}"]
    lines += ["users:", f"- name: {user}", "  user:"]
    if credential.token is not None:
        lines.append(f"    token: {quoted(credential.token)}")
    if credential.certificate is not None and credential.key is not None:
        lines.append(f"    client-certificate-data: {_base64(credential.certificate)}")
        lines.append(f"    client-key-data: {_base64(credential.key)}")
    return ("\n".join(lines) + "\n").encode()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
