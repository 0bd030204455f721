"""Requests to the API server, and watches of it."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from controller.credentials import Identity
from controller.log import Expected

Json = dict[str, Any]

MERGE = "application/merge-patch+json"
APPLY = "application/apply-patch+yaml"  # of which JSON is a part
# Objects without their contents: of Secrets, nothing secret ever comes here.
METADATA = "application/json;as=PartialObjectMetadata;v=v1;g=meta.k8s.io"
METADATA_LIST = "application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io"

_WATCHED = 540  # seconds after which the API server ends a watch
# Bookmarks come about every minute: a watch that says nothing for longer has lost its server, whatever TCP thinks.
_SILENT = 100.0


class Refused(Expected):
    """An answer that is no success."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"the API server answers {code}: {message}")
        self.code = code

    @property
    def passing(self) -> bool:
        """Whether the server itself is at fault or busy, so that any other request would fare no better."""
        return self.code in (401, 403, 429) or self.code >= 500


class Api:
    """One thread's way to the API server. Connections are kept and made again when they break."""

    def __init__(self, server: str, authority: Path, identity: Identity, answered: float = 30.0) -> None:
        """server: https://host:port. authority: the CA that its certificate must come from. answered: seconds in which
        a request has to be."""
        parts = urlsplit(server)
        if parts.scheme != "https" or parts.hostname is None:
            raise ValueError(f"{server} is no https:// address")
        self._host, self._port = parts.hostname, parts.port or 443
        self._authority, self._identity, self._answered = authority, identity, answered
        self._version = 0
        self._context: ssl.SSLContext | None = None
        self._kept: http.client.HTTPSConnection | None = None

    def call(
        self,
        method: str,
        path: str,
        body: Json | None = None,
        *,
        query: Mapping[str, str] | None = None,
        kind: str = "application/json",
        accept: str = "application/json",
    ) -> Any:
        """The answer's JSON. Refused for an answer that is no success, OSError for none."""
        target = f"{path}?{urlencode(query)}" if query else path
        data = None if body is None else json.dumps(body).encode()
        return json.loads(self._answer(method, target, data, {"Accept": accept, "Content-Type": kind}))

    def ready(self) -> None:
        """Refused or OSError unless the API server says that it is."""
        self._answer("GET", "/readyz", None, {})

    def _answer(self, method: str, target: str, data: bytes | None, headers: dict[str, str]) -> bytes:
        reused = self._fresh()
        try:
            status, answer = self._ask(method, target, data, headers)
        except TimeoutError:
            raise
        except OSError:
            if not reused:
                raise
            status, answer = self._ask(method, target, data, headers)  # an idle connection had been closed
        if status == 401:
            self._identity.doubt(self._version)
        if not 200 <= status < 300:
            raise Refused(status, _message(answer))
        return answer

    def watch(self, path: str, query: Mapping[str, str], accept: str) -> Iterator[tuple[str, Json]]:
        """(type, object) of every event, until the API server ends the watch. Refused and OSError as for call()."""
        asked = {**query, "watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": str(_WATCHED)}
        self._fresh()
        connection = self._connect(_SILENT)
        try:
            connection.request("GET", f"{path}?{urlencode(asked)}", headers={"Accept": accept})
            response = connection.getresponse()
            if response.status != 200:
                if response.status == 401:
                    self._identity.doubt(self._version)
                raise Refused(response.status, _message(response.read()))
            for line in response:
                event = json.loads(line)
                if event["type"] == "ERROR":
                    raise Refused(int(event["object"].get("code", 500)), str(event["object"].get("message")))
                yield event["type"], event["object"]
        except (http.client.HTTPException, json.JSONDecodeError) as error:
            raise _broken(error) from error
        finally:
            connection.close()

    def close(self) -> None:
        if self._kept is not None:
            self._kept.close()
            self._kept = None

    def _fresh(self) -> bool:
        """Renews what hangs on the certificate: the API server looks at its dates with every request. Says whether a
        connection is left from before."""
        version = self._identity.fresh()
        if version != self._version or self._context is None:
            self.close()
            context = ssl.create_default_context(cafile=self._authority)
            context.verify_flags |= ssl.VERIFY_X509_STRICT  # newer Pythons' default
            context.load_cert_chain(self._identity.file)
            self._context, self._version = context, version
        return self._kept is not None

    def _ask(self, method: str, target: str, data: bytes | None, headers: dict[str, str]) -> tuple[int, bytes]:
        if self._kept is None:
            self._kept = self._connect(self._answered)
        try:
            self._kept.request(method, target, body=data, headers=headers)
            response = self._kept.getresponse()
            return response.status, response.read()
        except http.client.HTTPException as error:
            self.close()
            raise _broken(error) from error
        except OSError:
            self.close()
            raise

    def _connect(self, timeout: float) -> http.client.HTTPSConnection:
        connection = http.client.HTTPSConnection(self._host, self._port, timeout=timeout, context=self._context)
        connection.connect()
        for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)):
            connection.sock.setsockopt(socket.IPPROTO_TCP, option, value)
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return connection


def _broken(error: Exception) -> OSError:
    return ConnectionError(f"the API server's answer broke off ({type(error).__name__})")


def _message(answer: bytes) -> str:
    """Of a Status, its message."""
    try:
        return str(json.loads(answer)["message"])
    except (ValueError, KeyError, TypeError):
        return answer[:200].decode("utf-8", "replace").strip() or "nothing"
