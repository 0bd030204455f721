"""Approves or refuses kubelets' certificate requests as judge.py says; a token is good for the first key it asked with.

That key's digest is kept in an annotation of the token's Secret, written by compare-and-swap before the approval: of
two keys that three control planes see in whatever order, one is first, and a control plane that was killed in between
finds its digest there and goes on. Who loses the token to a thief is refused, and the log names both keys.

A kubelet that rotates its certificates (rotateCertificates) has the key that it asks with in its memory alone until the
certificate comes (rotateCerts in client-go's certificate_manager.go; pki/kubelet-client.key.tmp is for those that do
not rotate). If it ends between the approval and that moment, by a power cut, or by itself because nobody has signed for
five minutes, it comes back with another key. So the first key holds a token for a minute only, unless its Node has come
by then; after that the next key takes its place. Each control plane counts that minute by itself: no clock is compared
with another machine's. Whose Node is there has joined, and no other key will do until that Node is deleted.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from controller.api import MERGE, METADATA, Api, Json, Refused
from controller.inventory import NAMESPACE, NODES, Inventory
from controller.judge import CLIENT, SERVING, Pin, Request, Verdict, judge
from controller.log import say, shown
from controller.mirror import Mirror
from controller.work import Work

REQUESTS = "/apis/certificates.k8s.io/v1/certificatesigningrequests"
FIRST_KEY = "nodebake.local/first-key"
_DECIDED = frozenset(("Approved", "Denied", "Failed"))


def undecided(item: Json) -> Json | None:
    """What the mirror keeps: requests that still wait, of the two signers."""
    if item["spec"]["signerName"] not in (CLIENT, SERVING):
        return None
    conditions = item.get("status", {}).get("conditions") or ()
    return None if any(condition["type"] in _DECIDED for condition in conditions) else item


class Approver:
    def __init__(
        self,
        api: Api,
        inventory: Callable[[], Inventory | None],
        held_for: Callable[[str, str], float],
        *,
        forfeit_after: float,
    ) -> None:
        """inventory: the cluster's, None while it has none. held_for: Tokens.held_for. forfeit_after: seconds after
        which a first key that no Node has come of gives way; from a certificate to a Node are seconds, and a
        controller-manager that has to take over signs after half a minute."""
        self.work = Work("certificates")
        self._api, self._inventory = api, inventory
        self._held_for, self._forfeit_after = held_for, forfeit_after
        self._waiting: dict[str, str] = {}  # request -> what was said of it

    def changed(self, name: str, before: Json | None, after: Json | None) -> None:
        if after is None:
            self._waiting.pop(name, None)
        else:
            self.work.add(name)

    def look(self, requests: Mirror[Json], name: str) -> None:
        item, inventory = requests.get(name), self._inventory()
        if item is None or inventory is None:
            return  # looked at again when there is one
        request = Request.of(item)
        verdict = judge(request, inventory, datetime.now(UTC))
        if verdict.pin is not None:
            flaw = self._pin(verdict.pin)
            verdict = Verdict("refuse", flaw) if flaw is not None else verdict
        if verdict.decision in ("approve", "refuse"):
            self._write(item, request, verdict)
        elif verdict.decision == "wait" and self._waiting.get(name) != verdict.why:
            self._waiting[name] = verdict.why
            say(f"{_title(request)}: left waiting: {verdict.why}")

    def _pin(self, pin: Pin) -> str | None:
        """Makes this key the token's, if it has none yet or one that nothing came of; otherwise says what is wrong."""
        path = f"/api/v1/namespaces/{NAMESPACE}/secrets/bootstrap-token-{pin.token_id}"
        try:
            metadata = self._api.call("GET", path, accept=METADATA)["metadata"]
            annotations = metadata.get("annotations", {})
            first = annotations.get(FIRST_KEY)
            if first == pin.key:
                return None
            if first is not None:
                flaw = self._held(pin, first)
                if flaw is not None:
                    return flaw
                say(f"token {pin.token_id} of {pin.node}: nothing came of its first key {first[:16]}...; it is forfeit")
            patch = {"resourceVersion": metadata["resourceVersion"], "annotations": {FIRST_KEY: pin.key}}
            self._api.call("PATCH", path, {"metadata": patch}, kind=MERGE, accept=METADATA)
        except Refused as refused:
            if refused.code != 404:
                raise  # 409: another control plane was quicker; this request is looked at again
            return f"the token {pin.token_id} was retired, or its time is over"
        return None

    def _held(self, pin: Pin, first: str) -> str | None:
        """Why the token is still its first key's, or None."""
        keys = f"the token {pin.token_id} was first used with the key {shown(first, 16)} and now with {pin.key[:16]}..."
        if self._held_for(pin.token_id, first) < self._forfeit_after:
            return f"{keys}; for {self._forfeit_after:g} s it is the first one's"
        try:
            self._api.call("GET", f"{NODES}/{pin.node}", accept=METADATA)
        except Refused as refused:
            if refused.code == 404:
                return None
            raise
        return (
            f"{keys}, and the Node {pin.node} has joined with the first; to install that machine anew, delete its Node;"
            " if nobody does that, somebody else has its token"
        )

    def _write(self, item: Json, request: Request, verdict: Verdict) -> None:
        approved = verdict.decision == "approve"
        condition = {
            "type": "Approved" if approved else "Denied",
            "status": "True",
            "reason": "Nodebake" + ("Approved" if approved else "Refused"),
            "message": verdict.why,
        }
        status = item.get("status", {})
        decided = {**item, "status": {**status, "conditions": [*(status.get("conditions") or ()), condition]}}
        self._api.call("PUT", f"{REQUESTS}/{request.name}/approval", decided)  # 409: another one has decided
        say(f"{_title(request)}: {'approved' if approved else 'refused'}: {verdict.why}")


def _title(request: Request) -> str:
    return f"request {shown(request.name)} of {shown(request.username)}"
