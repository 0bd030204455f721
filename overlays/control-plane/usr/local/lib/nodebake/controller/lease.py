"""The Lease that whoever applies the cluster's objects holds, so that one does at a time."""

from __future__ import annotations

import time
from datetime import UTC, datetime

from controller.api import Api, Json, Refused
from controller.inventory import NAMESPACE
from controller.log import Expected

NAME = "nodebake-apply"
SECONDS = 20  # a holder that was killed blocks the others for so long
ANSWERED = SECONDS / 4  # within which a request has to be answered, so that a holder notices in time
_LEASES = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases"


class Lost(Expected):
    """Somebody else holds the lease, or soon may."""


class Lease:
    """One try to hold it. No clock is compared with another machine's: a lease that did not change for SECONDS while we
    looked is over."""

    def __init__(self, api: Api, holder: str) -> None:
        """holder: this node; one that was killed takes its own lease back at once."""
        self._api, self._holder = api, holder
        self._seen: tuple[str, float] | None = None  # resourceVersion, monotonic
        self._held: Json = {}
        self._renewed = 0.0

    def take(self) -> bool:
        """Tries once. False while another one holds it: try again within SECONDS."""
        try:
            lease = self._api.call("GET", f"{_LEASES}/{NAME}")
        except Refused as refused:
            if refused.code != 404:
                raise
            lease = None
        if lease is not None and lease["spec"].get("holderIdentity") not in (None, "", self._holder):
            version, now = lease["metadata"]["resourceVersion"], time.monotonic()
            if self._seen is None or self._seen[0] != version:
                self._seen = (version, now)
            if now - self._seen[1] < SECONDS:
                return False
        try:
            self._write(lease, self._holder)
        except Refused as refused:
            if refused.code == 409:
                return False
            raise
        return True

    def renew(self) -> None:
        """Raises Lost when it may be another's before the next time; called every few seconds."""
        try:
            self._write(self._held, self._holder)
        except Refused as refused:
            if refused.code in (404, 409):
                raise Lost("another control plane took over") from refused
            self._survive(refused)
        except OSError as error:
            self._survive(error)

    def release(self) -> None:
        """As far as that can be done: it ends by itself."""
        try:
            self._write(self._held, "")
        except (Refused, OSError):
            return

    def _survive(self, error: Exception) -> None:
        if time.monotonic() - self._renewed > SECONDS * 2 / 3:
            raise Lost(f"the lease could not be renewed: {error}") from error

    def _write(self, before: Json | None, holder: str) -> None:
        started = time.monotonic()
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = {"holderIdentity": holder, "leaseDurationSeconds": SECONDS, "acquireTime": now, "renewTime": now}
        metadata: Json = {"name": NAME, "namespace": NAMESPACE}
        lease: Json = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}
        if before is None:
            self._held = self._api.call("POST", _LEASES, lease)
        else:
            metadata["resourceVersion"] = before["metadata"]["resourceVersion"]
            self._held = self._api.call("PUT", f"{_LEASES}/{NAME}", lease)
        self._renewed = started
