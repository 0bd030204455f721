"""A local copy of a collection of the API server's, kept up by one list and then a watch."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import Generic, NoReturn, TypeVar

from controller.api import Api, Json, Refused
from controller.log import Trouble, say

Kept = TypeVar("Kept")

_PAGE = "500"
_GONE = 410


class Mirror(Generic[Kept]):
    """name -> what is kept of each object. One thread runs it, any may read.

    keep: object -> what of it is kept, or None for nothing; it should be small and compare equal when nothing of
    interest changed. changed: told the name, and what was kept before and is now (None: nothing), of every difference.
    When `synced` is set, the first list is there; `complete` is told each time that a list is.
    """

    def __init__(
        self,
        what: str,
        api: Api,
        path: str,
        keep: Callable[[Json], Kept | None],
        changed: Callable[[str, Kept | None, Kept | None], None],
        complete: Callable[[], None],
        *,
        query: Mapping[str, str] | None = None,
        accept: tuple[str, str] = ("application/json", "application/json"),
    ) -> None:
        """accept: of lists, and of watches."""
        self.synced = threading.Event()
        self._what, self._api, self._path, self._query = what, api, path, dict(query or {})
        self._keep, self._changed, self._complete, self._accept = keep, changed, complete, accept
        self._items: dict[str, Kept] = {}
        self._broken: dict[str, str] = {}

    def get(self, name: str) -> Kept | None:
        return self._items.get(name)

    def names(self) -> list[str]:
        return list(self._items)

    def run(self) -> NoReturn:
        trouble = Trouble(self._what)
        version: str | None = None
        while True:
            try:
                if version is None:
                    version = self._list()
                    trouble.over()
                started = time.monotonic()
                for kind, item in self._api.watch(
                    self._path, {**self._query, "resourceVersion": version}, self._accept[1]
                ):
                    version = item["metadata"]["resourceVersion"]
                    if kind != "BOOKMARK":
                        self._take(item, gone=kind == "DELETED")
                    trouble.over()
                time.sleep(max(0.0, started + 1 - time.monotonic()))  # if it ends every watch at once
            except Refused as refused:
                if refused.code == _GONE:  # the version is too old by now: that is how it should be
                    version = None
                    time.sleep(random.uniform(0, 1))  # noqa: S311
                else:
                    time.sleep(trouble.wait(refused))
            except Exception as error:
                time.sleep(trouble.wait(error))

    def _list(self) -> str:
        """Returns the version of the list, which a watch goes on from."""
        found: set[str] = set()
        query = {**self._query, "limit": _PAGE}
        while True:
            page = self._api.call("GET", self._path, query=query, accept=self._accept[0])
            for item in page["items"] or ():  # null where only metadata is asked for and there is none
                found.add(str(item["metadata"]["name"]))
                self._take(item)
            follow = page["metadata"].get("continue")
            if not follow:
                break
            query["continue"] = follow
        for name in self._items.keys() - found:
            self._put(name, None)
        self.synced.set()
        self._complete()
        return str(page["metadata"]["resourceVersion"])

    def _take(self, item: Json, *, gone: bool = False) -> None:
        name = str(item["metadata"]["name"])
        try:
            kept = None if gone else self._keep(item)
        except (ValueError, KeyError, TypeError) as error:  # what was known of it stays
            if self._broken.get(name) != str(error):
                say(f"{self._what}: {name} cannot be read: {type(error).__name__}: {error}")
                self._broken[name] = str(error)
            return
        self._broken.pop(name, None)
        self._put(name, kept)

    def _put(self, name: str, kept: Kept | None) -> None:
        before = self._items.get(name)
        if kept is None:
            self._items.pop(name, None)
        else:
            self._items[name] = kept
        if before != kept:
            self._changed(name, before, kept)
