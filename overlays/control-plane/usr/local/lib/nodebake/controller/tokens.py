"""Brings each machine's bootstrap token into the cluster for as long as it may be needed, and no longer.

A token is needed until its Node is there and Ready, and from when that Node is deleted, which is how a reinstall
begins. It is retired only some time after Ready, so that a kubelet that loses power right after it joined, and with
that what its disk had not got yet, can still fetch the certificate that it was given. One whose machine has another by
now goes at once.

Secrets are created, never overwritten: the annotation with the first key lies on them. Only names come here, what is in
the cluster's Secrets does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from controller.api import Api, Json, Refused
from controller.approve import FIRST_KEY
from controller.inventory import NAME, NAMESPACE, NODES, Artifact, Inventory, Kubelet, published
from controller.labels import Seen
from controller.log import say
from controller.mirror import Mirror
from controller.objects import CONFIG_MAPS
from controller.work import Work

SECRETS = f"/api/v1/namespaces/{NAMESPACE}/secrets"
PREFIX = "bootstrap-token-"
TYPE = {"fieldSelector": "type=bootstrap.kubernetes.io/token"}
MACHINE = "nodebake.local/machine"  # the label


@dataclass(frozen=True, slots=True)
class Token:
    """A Secret as the mirror keeps it."""

    uid: str
    created: str  # RFC 3339, UTC
    first: str  # the key that it first asked with, "" before anybody has
    machine: str  # whose it is, "" where the artifact did not say


def keep(item: Json) -> Token:
    metadata = item["metadata"]
    first = metadata.get("annotations", {}).get(FIRST_KEY, "")
    return Token(metadata["uid"], metadata["creationTimestamp"], first, metadata.get("labels", {}).get(MACHINE, ""))


class Tokens:
    def __init__(
        self,
        api: Api,
        inventory: Callable[[], Inventory | None],
        artifact: Callable[[], Artifact | None],
        *,
        retire_after: float,
    ) -> None:
        """retire_after: seconds that a Node is Ready before its token goes."""
        self.work = Work("tokens")
        self._api, self._inventory, self._artifact = api, inventory, artifact
        self._retire_after = retire_after
        self._ready: dict[str, float] = {}  # Node -> since when, monotonic
        self._first_seen: dict[str, tuple[str, float]] = {}  # Secret -> its first key, since when, monotonic
        self._deleted: dict[str, str] = {}  # Node -> when the one that was deleted had been created
        self._of: dict[str, set[str]] = {}  # machine -> its Secrets

    def node_changed(self, name: str, before: Seen | None, after: Seen | None) -> None:
        if before is not None and (after is None or after.uid != before.uid):
            self._deleted[name] = before.created
            self._ready.pop(name, None)
        if after is not None and after.ready:
            self._ready.setdefault(name, time.monotonic())
        else:
            self._ready.pop(name, None)
        self.work.add(name)

    def secret_changed(self, name: str, before: Token | None, after: Token | None) -> None:
        first = after.first if after is not None else ""
        if self._first_seen.get(name, ("", 0.0))[0] != first:
            self._first_seen[name] = (first, time.monotonic())
        if before is not None:
            self._of[before.machine].discard(name)
        if after is not None:
            self._of.setdefault(after.machine, set()).add(name)
        inventory = self._inventory()
        kubelet = inventory.by_token.get(name.removeprefix(PREFIX)) if inventory is not None else None
        if kubelet is not None:
            self.work.add(kubelet.name)
        elif after is not None and after.machine:
            self.work.add(after.machine)

    def held_for(self, token_id: str, first: str) -> float:
        """Seconds for which this control plane has known that key as the token's first one. No clock is compared with
        another machine's."""
        known, since = self._first_seen.get(PREFIX + token_id, ("", 0.0))
        return time.monotonic() - since if known == first else 0.0

    def look(self, nodes: Mirror[Seen], secrets: Mirror[Token], name: str) -> float | None:
        inventory = self._inventory()
        if inventory is None or not nodes.synced.is_set() or not secrets.synced.is_set():
            return None  # looked at again when they are there
        kubelet = inventory.kubelets.get(name)
        if kubelet is None:
            return None
        own = PREFIX + kubelet.token_id
        for other in self._of.get(name, set()) - {own}:
            self._forget(other, secrets.get(other), name, inventory)
        secret, node = secrets.get(own), nodes.get(name)
        if secret is None:
            if node is None and not kubelet.denied:
                self._bring(kubelet)
            return None
        if kubelet.denied:
            self._delete(kubelet, secret, "it is denied")
        elif node is None:
            if secret.first and secret.created <= self._deleted.get(name, ""):
                self._delete(kubelet, secret, "its Node was deleted; a fresh one follows")
        elif name in self._ready:
            left = self._ready[name] + self._retire_after - time.monotonic()
            if left > 0:
                return left
            self._delete(kubelet, secret, "it has joined")
        return None

    def _bring(self, kubelet: Kubelet) -> None:
        artifact = self._artifact()
        secret = artifact.tokens.get(kubelet.token_id) if artifact is not None else None
        now = datetime.now(UTC)
        if secret is None or now >= kubelet.install_by:
            return
        if now >= datetime.fromisoformat(secret["stringData"]["expiration"]):
            return  # of an older artifact than the cluster's: it would be cleaned away at once, again and again
        try:  # the mirror may be late, and a token that was retired must not come back
            self._api.call("GET", f"{NODES}/{kubelet.name}")
            return
        except Refused as refused:
            if refused.code != 404:
                raise
        try:
            self._api.call("POST", SECRETS, secret)
        except Refused as refused:
            if refused.code != 409:
                raise
        else:
            say(f"token {kubelet.token_id} of {kubelet.name}: brought, until {secret['stringData']['expiration']}")

    def _forget(self, name: str, secret: Token | None, machine: str, inventory: Inventory) -> None:
        """A Secret that this inventory does not know. A newer one might, and would be in the cluster by now."""
        held = published(self._api.call("GET", f"{CONFIG_MAPS}/{NAME}"))
        if secret is not None and held.generation == inventory.generation:
            self._delete_secret(name, secret, machine, "that machine has another")

    def _delete(self, kubelet: Kubelet, secret: Token, why: str) -> None:
        self._delete_secret(PREFIX + kubelet.token_id, secret, kubelet.name, why)

    def _delete_secret(self, name: str, secret: Token, machine: str, why: str) -> None:
        """The very Secret that was looked at, not one that came after it."""
        options = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": secret.uid}}
        try:
            self._api.call("DELETE", f"{SECRETS}/{name}", options)
        except Refused as refused:
            if refused.code not in (404, 409):
                raise
        else:
            say(f"token {name.removeprefix(PREFIX)} of {machine}: deleted, for {why}")
