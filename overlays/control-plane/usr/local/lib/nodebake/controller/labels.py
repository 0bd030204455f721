"""Gives Nodes the labels that kubelets may not give themselves (NodeRestriction): role and storage. The cluster file's
other labels too, which a kubelet only sets when it first registers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from controller.api import MERGE, Api, Json, Refused
from controller.inventory import NODES, STORAGE, Inventory
from controller.log import say
from controller.mirror import Mirror
from controller.work import Work


@dataclass(frozen=True, slots=True)
class Seen:
    """A Node as the mirror keeps it."""

    uid: str
    created: str  # RFC 3339, UTC
    ready: bool
    labels: Mapping[str, str]


def keep(item: Json) -> Seen:
    metadata = item["metadata"]
    conditions = item.get("status", {}).get("conditions") or ()
    ready = any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)
    return Seen(metadata["uid"], metadata["creationTimestamp"], ready, metadata.get("labels", {}))


def differing(has: Mapping[str, str], wanted: Mapping[str, str]) -> dict[str, str | None]:
    """What to patch: label -> value, or None to remove it."""
    patch: dict[str, str | None] = {key: value for key, value in wanted.items() if has.get(key) != value}
    if STORAGE in has and STORAGE not in wanted:
        patch[STORAGE] = None
    return patch


class Labeller:
    def __init__(self, api: Api, inventory: Callable[[], Inventory | None]) -> None:
        self.work = Work("labels")
        self._api, self._inventory = api, inventory
        self._sent: dict[str, tuple[Seen, dict[str, str | None]]] = {}  # what was patched last, and upon which state

    def node_changed(self, name: str, before: Seen | None, after: Seen | None) -> None:
        if after is not None:
            self.work.add(name)
        else:
            self._sent.pop(name, None)

    def look(self, nodes: Mirror[Seen], name: str) -> None:
        inventory, node = self._inventory(), nodes.get(name)
        kubelet = inventory.kubelets.get(name) if inventory is not None else None
        if kubelet is None or node is None:
            return
        patch = differing(node.labels, kubelet.labels)
        sent = self._sent.get(name)
        if not patch or (sent is not None and sent[0] is node and sent[1] == patch):
            return  # what was sent comes back through the mirror
        try:
            self._api.call("PATCH", f"{NODES}/{name}", {"metadata": {"labels": patch}}, kind=MERGE)
        except Refused as refused:
            if refused.code != 404:
                raise
        else:
            self._sent[name] = (node, patch)
            changes = [f"{key}={value}" if value is not None else f"{key} removed" for key, value in patch.items()]
            say(f"node {name}: labelled {', '.join(changes)}")
