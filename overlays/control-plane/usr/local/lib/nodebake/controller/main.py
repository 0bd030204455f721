"""Arguments, threads, readiness."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

from controller import labels, tokens
from controller.api import METADATA, METADATA_LIST, Api, Json, Refused
from controller.approve import REQUESTS, Approver, undecided
from controller.credentials import Authority, Identity
from controller.inventory import NAME, NODES, Inventory, Published, published
from controller.labels import Labeller, Seen
from controller.log import Trouble, say
from controller.mirror import Mirror
from controller.objects import CONFIG_MAPS, Applier, Place
from controller.tokens import SECRETS, TYPE, Token, Tokens

COMMON_NAME = "nodebake:controller"  # what the cluster's objects bind its rights to


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    given = _parser().parse_args(arguments)
    runtime: Path = given.runtime
    runtime.mkdir(mode=0o700, parents=True, exist_ok=True)
    for leftover in runtime.glob("*.pem"):  # of one that was killed
        leftover.unlink()
    place = Place(
        server=given.server,
        authority=Authority(given.authority, given.authority_key),
        artifact=given.artifact,
        kubectl=given.kubectl,
        runtime=runtime,
        node=given.node,
    )
    controller = Controller(place, given.retire_after, given.forfeit_after)

    def end(number: int, frame: FrameType | None) -> None:
        controller.applier.stop()
        os._exit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    controller.run()


def _parser() -> argparse.ArgumentParser:
    def folder_of(name: str) -> Path:
        """A folder that systemd makes for the unit."""
        return Path(os.environ.get(name, "/nonexistent").partition(":")[0])

    parser = argparse.ArgumentParser(prog="nodebake-controller", description="Runs on every control plane.")
    add = parser.add_argument
    add("--server", required=True, help="this machine's API server, https://host:port")
    add("--authority", type=Path, required=True, help="certificate of the cluster's CA, PEM")
    add("--authority-key", type=Path, default=folder_of("CREDENTIALS_DIRECTORY") / "kubernetes-ca.key")
    add("--artifact", type=Path, required=True, help="folder with inventory.json and objects/")
    add("--kubectl", type=Path, required=True)
    add("--runtime", type=Path, default=folder_of("RUNTIME_DIRECTORY"), help="folder in memory, for certificates")
    add("--node", default=os.environ.get("NODE_NAME", socket.gethostname()), help="this machine's name")
    add("--forfeit-after", type=float, default=60, metavar="SECONDS", help="a first key has, until its Node is there")
    add("--retire-after", type=float, default=60, metavar="SECONDS", help="a Node is Ready, before its token goes")
    return parser


class Controller:
    """The threads and what they share."""

    def __init__(self, place: Place, retire_after: float, forfeit_after: float) -> None:
        self._place = place
        self._own = Identity(place.authority, place.runtime / "controller.pem", COMMON_NAME)
        self.applier = Applier(place, self._own, self._look_at_everything)
        self.tokens = Tokens(self._api(), self._inventory, self.applier.artifact, retire_after=retire_after)
        self.approver = Approver(self._api(), self._inventory, self.tokens.held_for, forfeit_after=forfeit_after)
        self.labeller = Labeller(self._api(), self._inventory)
        self._published: Mirror[Published] = Mirror(
            "inventory",
            self._api(),
            CONFIG_MAPS,
            published,
            self._published_changed,
            self._look_at_everything,
            query={"fieldSelector": f"metadata.name={NAME}"},
        )
        self.nodes: Mirror[Seen] = Mirror(
            "nodes", self._api(), NODES, labels.keep, self._node_changed, self._look_at_everything
        )
        self.secrets: Mirror[Token] = Mirror(
            "tokens",
            self._api(),
            SECRETS,
            tokens.keep,
            self.tokens.secret_changed,
            self._look_at_everything,
            query=TYPE,
            accept=(METADATA_LIST, METADATA),
        )
        self.requests: Mirror[Json] = Mirror(
            "certificates", self._api(), REQUESTS, undecided, self.approver.changed, lambda: None
        )
        self._last: Inventory | None = None

    def run(self) -> NoReturn:
        self._wait_for_server()
        _start("objects", self.applier.run)
        self.applier.allowed.wait()  # a new API server knows nothing of our rights before its first objects
        loops: dict[str, Callable[[], object]] = {
            "inventory": self._published.run,
            "nodes": self.nodes.run,
            "secrets": self.secrets.run,
            "requests": self.requests.run,
            "approve": partial(self.approver.work.run, partial(self.approver.look, self.requests)),
            "tokens": partial(self.tokens.work.run, partial(self.tokens.look, self.nodes, self.secrets)),
            "labels": partial(self.labeller.work.run, partial(self.labeller.look, self.nodes)),
        }
        for name, loop in loops.items():
            _start(name, loop)
        while True:
            signal.pause()

    def _api(self) -> Api:
        return Api(self._place.server, self._place.authority.certificate, self._own)

    def _inventory(self) -> Inventory | None:
        """The cluster's, but not one that this machine's artifact is about to replace. One that cannot be read changes
        nothing until it is replaced."""
        own = self.applier.artifact()
        newer = own is not None and self._last is not None and own.inventory.generation > self._last.generation
        return None if newer else self._last

    def _published_changed(self, name: str, before: Published | None, after: Published | None) -> None:
        if after is not None and after.inventory is None:
            say("inventory: what the cluster holds cannot be read")
        elif after is not None and after.inventory != self._last:
            self._last = after.inventory
            say(f"inventory: the cluster holds generation {after.generation}")
            self._look_at_everything()
        self.applier.wake()

    def _node_changed(self, name: str, before: Seen | None, after: Seen | None) -> None:
        self.tokens.node_changed(name, before, after)
        self.labeller.node_changed(name, before, after)

    def _look_at_everything(self) -> None:
        """A list is there, or another inventory, or another artifact."""
        inventory = self._last
        if inventory is not None:
            self.tokens.work.add_all(inventory.kubelets)
            self.labeller.work.add_all(self.nodes.names())
            self.approver.work.add_all(self.requests.names())

    def _wait_for_server(self) -> None:
        """Until it answers at all: for system:masters a new one does all before it is ready, which is when it has its
        own roles, a second later."""
        trouble = Trouble(f"the API server {self._place.server}", longest=1)
        api = self._api()
        while True:
            try:
                api.ready()
                break
            except Refused:
                break
            except OSError as error:
                time.sleep(trouble.wait(error))
        api.close()
        _notify(f"READY=1\nSTATUS=speaks with {self._place.server}")
        say(f"the API server {self._place.server} answers")


def _start(name: str, loop: Callable[[], object]) -> None:
    """The loop for ever in a thread of its own; should it end all the same, the program does, to be started again."""

    def guarded() -> None:
        try:
            loop()
        finally:
            traceback.print_exc()
            os._exit(1)

    threading.Thread(target=guarded, name=name, daemon=True).start()


def _notify(text: str) -> None:
    """Tells systemd (sd_notify)."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.connect(f"\0{address[1:]}" if address.startswith("@") else address)
        channel.sendall(text.encode())
