"""Applies the cluster's objects, whoever's artifact is newest, until the API server has taken every one.

A round: write the inventory, take the lease, look once more whether nobody else was quicker, apply the rights and then,
with kubectl, the other objects, and last of all write that this generation was applied. With the rights machines join
and the daemon's other threads begin, while kubectl is still at work. The inventory goes first and waits for nobody: a
machine that is denied shall be so at once, and objects of the operator may not be taken before machines have joined (a
webhook that answers for them runs as a pod). A control plane that is killed anywhere in between, or another one, finds
`applied` behind and does the round again. Whose artifact is older than what the cluster holds applies nothing.

A new API server takes its first bindings from system:masters alone. So a certificate of that group is minted for a
round, and removed with it. Where the daemon's own rights were taken away, that counts as objects to apply.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from controller.api import APPLY, Api, Json, Refused
from controller.credentials import Authority, Identity
from controller.inventory import NAME, NAMESPACE, Artifact, Published, config_map, published, read_artifact, signature
from controller.lease import ANSWERED, SECONDS, Lease
from controller.log import Expected, Trouble, say

CONFIG_MAPS = f"/api/v1/namespaces/{NAMESPACE}/configmaps"

_POLL = 5.0  # seconds between two looks at the artifact's files
_AGAIN = 300.0  # seconds after which the cluster is asked again without any reason
_APPLIED_WITHIN = 540.0  # seconds for kubectl: the certificate's life
_WAITING = 120.0  # seconds to wait for the lease with one certificate
_RENEWED = SECONDS / 5
_TRIES = 40  # to find that what was just applied is heeded: an API server sees it a moment later
_MANAGER = "nodebake"  # of the fields that are applied


@dataclass(frozen=True, slots=True)
class Place:
    """The API server's URL, the cluster's CA, the artifact's folder, kubectl, a folder in memory, this node's name."""

    server: str
    authority: Authority
    artifact: Path
    kubectl: Path
    runtime: Path
    node: str


class Applier:
    def __init__(self, place: Place, own: Identity, changed: Callable[[], None]) -> None:
        """own: who the daemon is otherwise. changed: told when the artifact was read anew."""
        self._place, self._changed = place, changed
        self._api = Api(place.server, place.authority.certificate, own)
        self._masters = Identity(place.authority, place.runtime / "apply.pem", "nodebake:apply", "system:masters")
        self.allowed = threading.Event()  # set once the cluster gives us our rights
        self._wake = threading.Event()
        self._artifact: Artifact | None = None
        self._read: object = None
        self._told = ""
        self._child: subprocess.Popen[str] | None = None

    def artifact(self) -> Artifact | None:
        """This machine's, None until it was read."""
        return self._artifact

    def wake(self) -> None:
        """The cluster holds something else than before."""
        self._wake.set()

    def stop(self) -> None:
        """The program ends: nothing privileged is left behind."""
        if self._child is not None:
            self._child.kill()
        self._masters.remove()

    def run(self) -> NoReturn:
        trouble = Trouble("cluster objects", longest=60)
        while True:
            self._wake.clear()
            try:
                try:
                    self._refresh()
                except (OSError, Expected):
                    self._seen()  # all the same: one can judge by the cluster's inventory without an artifact
                    raise
                led = self._round()
                trouble.over()
                self._rest(1.0 if led else _AGAIN)
            except Exception as error:
                self._rest(trouble.wait(error))

    def _rest(self, seconds: float) -> None:
        """Waits until the cluster's inventory or the artifact changed, or seconds are over."""
        until, before = time.monotonic() + seconds, self._read
        while (left := until - time.monotonic()) > 0 and not self._wake.wait(min(_POLL, left)):
            now = signature(self._place.artifact)
            if now != self._read and now == before:
                return  # changed, and complete: it did not change since the last look
            before = now

    def _refresh(self) -> None:
        found = signature(self._place.artifact)
        if found == self._read:
            return
        try:
            self._artifact = read_artifact(self._place.artifact)
        except (ValueError, KeyError, TypeError) as error:
            raise Expected(f"the artifact in {self._place.artifact} cannot be read: {type(error).__name__}") from error
        self._read = found
        self._tell(f"the artifact on this machine is generation {self._artifact.inventory.generation}")
        self._changed()

    def _round(self) -> bool:
        """Whether there was something to apply, by us or by another."""
        artifact = self._artifact
        if artifact is None or not self._due(artifact):
            return False
        api = Api(self._place.server, self._place.authority.certificate, self._masters, ANSWERED)
        try:
            self._lead(api, artifact)
        finally:
            api.close()
            self._masters.remove()
        return True

    def _seen(self) -> Published | None:
        """What the cluster holds, as far as our own rights go."""
        found = _get(self._api)
        self.allowed.set()
        return found

    def _due(self, artifact: Artifact) -> bool:
        """Whether this artifact is to be applied, as far as we can see."""
        own = artifact.inventory.generation
        try:
            found = self._seen()
        except Refused as refused:
            if refused.code != 403:
                raise
            return True
        if found is None or own > found.generation:
            return True
        if own < found.generation:
            self._tell(
                f"the cluster is at generation {found.generation}, this machine's artifact at {own}: it applies"
                " nothing, and judges by the cluster's inventory"
            )
        elif found.applied >= own:
            self._tell(f"generation {own} is applied")
        return own == found.generation and found.applied < own

    def _lead(self, api: Api, artifact: Artifact) -> None:
        """With the rights to do everything."""
        own = artifact.inventory.generation
        _publish(api, artifact)
        lease = Lease(api, self._place.node)
        until = time.monotonic() + _WAITING
        while not lease.take():
            if time.monotonic() > until:
                raise Expected("another control plane is applying")
            time.sleep(0.5)
            if not self._due(artifact):
                return
        try:
            if not self._due(artifact):
                return
            self._grant(api, artifact.rights, lease)
            self._kubectl(artifact.objects, lease)
            lease.renew()
            found = _get(api)
            if found is None or found.generation != own:
                return  # a newer one came: it is applied by whose artifact it is
            api.call("PUT", f"{CONFIG_MAPS}/{NAME}", config_map(artifact.inventory, own, found.version))
        finally:
            lease.release()

    def _grant(self, api: Api, rights: Sequence[Json], lease: Lease) -> None:
        """Applies the rights, and sees to it that ours are heeded."""
        renewed = time.monotonic()
        for one in rights:
            if time.monotonic() - renewed > _RENEWED:
                lease.renew()
                renewed = time.monotonic()
            api.call("PATCH", _path(one), one, query={"fieldManager": _MANAGER, "force": "true"}, kind=APPLY)
        for _ in range(_TRIES):
            try:
                self._seen()
                return
            except Refused as refused:
                if refused.code != 403:
                    raise
            time.sleep(0.05)

    def _kubectl(self, objects: Path, lease: Lease) -> None:
        place, certificate = self._place, self._masters.file
        self._masters.remove()
        self._masters.fresh()  # with its whole life before it
        command = [
            *(str(place.kubectl), "apply", "--server-side", "--force-conflicts", f"--field-manager={_MANAGER}"),
            *("--kubeconfig=/dev/null", f"--server={place.server}"),
            f"--certificate-authority={place.authority.certificate}",
            *(f"--client-certificate={certificate}", f"--client-key={certificate}"),
            *(f"--cache-dir={place.runtime}/cache", "--request-timeout=60s", f"--filename={objects}"),
        ]
        environment = {"PATH": os.environ.get("PATH", ""), "HOME": str(place.runtime)}
        until = time.monotonic() + _APPLIED_WITHIN
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        ) as process:
            self._child = process
            try:
                while True:
                    try:
                        _, told = process.communicate(timeout=_RENEWED)
                        break
                    except subprocess.TimeoutExpired:
                        if time.monotonic() > until:
                            raise Expected("kubectl takes too long") from None
                        lease.renew()
            finally:
                process.kill()
                self._child = None
        if process.returncode != 0:
            lines = [line for line in told.splitlines() if line.strip()]
            more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
            raise Expected(f"kubectl could not apply everything: {'; '.join(lines[:3])}{more}")

    def _tell(self, text: str) -> None:
        if text != self._told:
            self._told = text
            say(f"cluster objects: {text}")


def _path(right: Json) -> str:
    """Where a role or a binding lies."""
    metadata = right["metadata"]
    folder = f"/namespaces/{metadata['namespace']}" if "namespace" in metadata else ""
    return f"/apis/{right['apiVersion']}{folder}/{right['kind'].lower()}s/{metadata['name']}"


def _get(api: Api) -> Published | None:
    try:
        return published(api.call("GET", f"{CONFIG_MAPS}/{NAME}"))
    except Refused as refused:
        if refused.code == 404:
            return None
        raise


def _publish(api: Api, artifact: Artifact) -> None:
    """Writes the artifact's inventory, unless the cluster's is as new."""
    own = artifact.inventory
    while True:
        found = _get(api)
        try:
            if found is None:
                api.call("POST", CONFIG_MAPS, config_map(own, 0))
            elif own.generation > found.generation:
                api.call("PUT", f"{CONFIG_MAPS}/{NAME}", config_map(own, found.applied, found.version))
            elif own.generation < found.generation:
                raise Expected(f"generation {found.generation} took our rights; that artifact has to mend it")
            return
        except Refused as refused:
            if refused.code != 409:  # another control plane was quicker
                raise
