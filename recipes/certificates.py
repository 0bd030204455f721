"""Node -> certificates: issued from the profile table out of the secret store's keys, the same bytes every time.

The table itself, PROFILES, lies in recipes/kit/profiles.py, because the store mints keys by it.
"""

from __future__ import annotations

from recipes.kit import pki
from recipes.kit.kubeconfig import Credential, kubeconfig
from recipes.kit.model import Cluster, File, Node, Origin
from recipes.kit.profiles import AUTHORITIES, DESK, PKI, PROFILES, CertificateSpec, holds, profile_table, profiles_of
from recipes.kit.store import BACKDATED, Secrets

__all__ = ["PROFILES", "admin_conf", "for_node", "kubeconfig", "profile_table"]

_OWN_API_SERVER = "https://127.0.0.1:6443"
_ADMIN = next(spec for spec in PROFILES if spec.holder == "desk")


def for_node(cluster: Cluster, node: Node, secrets: Secrets) -> list[File]:
    """CA certificates, and on control planes and etcd members certificates and keys too; sorted by path.

    A worker's list holds no private key. A key is root's alone (0600): systemd hands it to the daemons that need it.
    """
    files: list[File] = []
    for authority in AUTHORITIES:
        pair = secrets.authorities[authority.name]
        for path, holders in authority.certificates:
            if any(holds(node, holder) for holder in holders):
                files.append(_file(secrets, path, pair.cert_pem))
        if authority.key is not None and node.role == "control-plane":
            files.append(_file(secrets, authority.key, pair.key_pem, secret=True))
    for spec in profiles_of(node):
        key = secrets.leaf_keys[node.name, spec.name]
        certificate = _issue(cluster, node, spec, secrets)
        if spec.form == "pair":
            files.append(_file(secrets, f"{spec.path}.crt", certificate))
            files.append(_file(secrets, f"{spec.path}.key", key, secret=True))
        else:
            config = kubeconfig(
                {cluster.name: _OWN_API_SERVER},
                authority=secrets.authorities["kubernetes"].cert_pem,
                credential=Credential(spec.common_name, certificate, key),
            )
            files.append(_file(secrets, f"{spec.path}.conf", config, secret=True))
    if node.role == "control-plane":
        private, public = secrets.service_account
        files += [
            _file(secrets, f"{PKI}/sa.pub", public),
            _file(secrets, f"{PKI}/sa.key", private, secret=True),
        ]
    return sorted(files, key=lambda file: file.path)


def admin_conf(cluster: Cluster, secrets: Secrets) -> bytes:
    """The operator's kubeconfig: the shared endpoint first, where there is one, then each control plane."""
    servers: dict[str, str] = {}
    if cluster.control_plane_endpoint is not None:
        servers[cluster.name] = f"https://{cluster.control_plane_endpoint}"
    elif cluster.vip is not None:
        servers[cluster.name] = f"https://{cluster.vip}:6443"
    for node in cluster.control_planes:
        servers[f"{cluster.name}-{node.name}"] = f"https://{node.address}:6443"
    return kubeconfig(
        servers,
        authority=secrets.authorities["kubernetes"].cert_pem,
        credential=Credential(
            f"{cluster.name}-admin",
            _issue(cluster, None, _ADMIN, secrets),
            secrets.leaf_keys[DESK, _ADMIN.name],
        ),
    )


def _issue(cluster: Cluster, node: Node | None, spec: CertificateSpec, secrets: Secrets) -> bytes:
    sans = spec.sans.names(cluster, node) if spec.sans is not None and node is not None else ()
    owner = node.name if node is not None else DESK
    minted = secrets.life(owner).minted
    return pki.leaf(
        pki.Subject(spec.common_name, spec.organization, spec.server, spec.client, sans),
        secrets.leaf_keys[owner, spec.name],
        secrets.authorities[spec.authority],
        start=minted - BACKDATED,
        end=minted + cluster.validity.leaf,
        serial_seed=secrets.serial_seed,
    )


def _file(secrets: Secrets, path: str, data: bytes, *, secret: bool = False) -> File:
    origin = Origin("certificates", secrets.minted.date().isoformat(), "baked")
    return File(path, data=data, mode=0o600 if secret else 0o644, origin=origin)
