"""Everything that doit needs to be told: with dodo.py the only place that knows doit (0.37).

doit's own parts are replaced where they do not fit a bake: state is committed task by task (doit's SQLite backend
writes at exit, so that SIGKILL loses all of it), files are compared by a SHA-256 that is computed once per run (doit's
MD5 is computed per task), and failures that a person can mend are told without a traceback.
"""

from __future__ import annotations

import atexit
import difflib
import gc
import inspect
import os
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from doit import cmd_run, doit_cmd, get_var
from doit.cmd_base import DodoTaskLoader, DoitCmdBase
from doit.cmd_clean import Clean as DoitClean
from doit.cmd_run import Run as DoitRun
from doit.dependency import FileChangedChecker, SqliteDB
from doit.exceptions import InvalidCommand, InvalidTask, TaskFailed
from doit.reporter import ConsoleReporter
from doit.runner import Runner as DoitRunner

from recipes.kit.atomic import settle, to_settle, unsettled
from recipes.kit.crew import CORES, Crew
from recipes.kit.errors import BakeError, BakeErrors
from recipes.kit.hashing import sha256_of
from recipes.kit.locks import locked

BUILD = Path("build")
SECONDS = 2.0  # of work that SIGKILL may cost
SIDE_BY_SIDE: dict[str, str] = {}  # a task's `meta`, where it may run beside others of its kind
WORTH_A_CREW = 20  # such tasks; fewer are done before there are other processes
# doit's others are for mending doit itself.
COMMANDS = ("clean", "decrypt", "encrypt", "help", "info", "list", "rekey", "verify")

# Machines and tasks stay until the end, so looking for garbage among thousands of them again and again finds none; nor
# does the last look, which Python takes when it ends.
gc.set_threshold(100_000)
atexit.register(gc.freeze)


def argument(name: str, *, one_of: Sequence[str] = ()) -> str | None:
    """The value of `name=value` on doit's command line. Raises BakeError for a value that is not one_of."""
    value: str | None = get_var(name)
    if value is not None and one_of and value not in one_of:
        raise BakeError(f"{name}={value} is unknown", remedy=f"say {name}= with one of: {', '.join(one_of)}")
    if value == "":
        raise BakeError(f"{name}= says nothing", remedy=f"give it a value, or leave {name}= out")
    return value


def only_arguments(*known: str) -> None:
    """Raises BakeErrors for every name=value on doit's command line whose name is not known: a slip of the finger
    must not bake something else."""
    given: dict[str, str] = doit_cmd._CMDLINE_VARS or {}
    remedy = f"There are {', '.join(f'{name}=' for name in known)}."
    errors = [
        BakeError(f"there is no argument {name}=", remedy=f"{_meant(name, known, '=')}{remedy}")
        for name in given
        if name not in known
    ]
    if errors:
        raise BakeErrors(errors)


def _meant(name: str, known: Iterable[str], ending: str = "") -> str:
    close = [f"{other}{ending}" for other in difflib.get_close_matches(name, list(known), n=3)]
    return f"Did you mean {' or '.join(close)}? " if close else ""


class Loader(DodoTaskLoader):  # type: ignore[misc]
    """Loads dodo.py; a mistake of the person's is told as one. `named` are the tasks asked for, so that no sub-task of
    another kind is made: with 5,000 machines that costs more than baking one, or than telling the kinds of tasks."""

    named: tuple[str, ...] | None = None

    def setup(self, opt_values: Any) -> None:
        self._all = opt_values.get("subtasks", True)  # `doit list` alone knows that option
        with _told():
            super().setup(opt_values)

    def load_tasks(self, cmd: Any, pos_args: list[str]) -> Any:
        names = [argument for argument in pos_args if not argument.startswith("-")]
        wanted = names or cmd.sel_tasks or ()
        if cmd.execute_tasks and wanted and not any("*" in name or "/" in name for name in wanted):  # no target's path
            Loader.named = tuple(wanted)
        elif not self._all and not names:
            Loader.named = ()
        with _told():
            tasks = super().load_tasks(cmd, pos_args)
            if not isinstance(cmd, _Own) and cmd.get_name() != "help":  # their words are no tasks
                _check_names(tasks, names)
            return tasks


def named(*kinds: str, whole: Collection[str] = ()) -> list[str] | None:
    """The names asked for as `doit kind:name`; None when every one may be needed, as for `doit kind`, or for a task of
    `whole`, which depends on all."""
    if Loader.named is None or not {*kinds, *whole}.isdisjoint(Loader.named):
        return None
    asked = (name.partition(":") for name in Loader.named)
    return list(dict.fromkeys(name for kind, _, name in asked if kind in kinds))


def _check_names(tasks: Sequence[Any], names: Sequence[str]) -> None:
    """Raises BakeErrors for names that are neither a task's nor a target's."""
    known = {task.name for task in tasks} | {target for task in tasks for target in task.targets}
    kinds = [task.name for task in tasks if ":" not in task.name and not task.name.startswith("_")]
    errors = []
    for name in names:
        if name in known or ("*" in name and any(fnmatch(task.name, name) for task in tasks)):
            continue
        kind, colon, _ = name.partition(":")
        there = [task.name for task in tasks if task.name.startswith(f"{kind}:")] if colon else []
        listed = ", ".join(there or sorted(kinds)) + ("" if there else f"; and the commands {', '.join(COMMANDS)}")
        remedy = f"{_meant(name, there or [*kinds, *COMMANDS])}There are {listed}."
        errors.append(BakeError(f"there is no task {name}", remedy=remedy))
    if errors:
        raise BakeErrors(errors)


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except BakeError as error:
        raise InvalidCommand(_in_words(error)) from error


def _in_words(error: BakeError) -> str:
    """For doit, which puts "ERROR: " before it: each of several errors begins with that."""
    return "\nERROR: ".join(map(str, error.errors)) if isinstance(error, BakeErrors) else str(error)


class Run(DoitRun):  # type: ignore[misc]
    """`doit` and `doit TASK`: one bake at a time in a folder; Ctrl-C and SIGTERM end it tidily."""

    def execute(self, params: Any, args: list[str]) -> int:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            with locked(BUILD / ".lock", waiting=_waiting):
                return int(super().execute(params, args))
        except (BakeError, sqlite3.OperationalError) as error:  # the second is of State
            full = BakeError(
                f"what is baked cannot be written down: {error}", where=BUILD, remedy="make room, or mend it"
            )
            print(f"ERROR: {_in_words(error if isinstance(error, BakeError) else full)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("Interrupted. Nothing half-written counts as done; the next doit continues.", file=sys.stderr)
            return 130


class Runner(DoitRunner):  # type: ignore[misc]
    """doit's, but that tasks of which there are many and each is small (`SIDE_BY_SIDE` in their `meta`) run in several
    processes. doit's own way to do that would run every task so, and leaves processes behind when it is killed."""

    def run_tasks(self, task_dispatcher: Any) -> None:
        self._tasks = task_dispatcher.tasks
        many = sum(self._small(task) for task in self._tasks.values()) >= WORTH_A_CREW
        if not many or CORES == 1:
            super().run_tasks(task_dispatcher)
            return
        ready, node = task_dispatcher.generator, None
        with Crew(self._make) as crew:
            self._nodes = {}
            while not self._stop_running:
                try:
                    node = ready.send(node)  # what was done, for what is next
                except StopIteration:
                    break
                if node == "hold on":  # all that is left waits for what runs
                    node = self._end_one(crew)
                elif self.select_task(node, self._tasks):
                    if self._small(node.task):
                        self.reporter.execute_task(node.task)
                        self._nodes[node.task.name] = node
                        crew.begin(node.task.name)
                        node = self._end_one(crew) if crew.busy else None
                    else:
                        self.process_task_result(node, self.execute_task(node.task))
            while crew:
                self._end_one(crew)

    def _small(self, task: Any) -> bool:
        return task.meta is SIDE_BY_SIDE

    def _make(self, name: str) -> tuple[Any, list[Path]]:
        """In another process: how it failed, if it did, and what it has left to sync."""
        return self._tasks[name].execute(self.stream), unsettled()

    def _end_one(self, crew: Crew[tuple[Any, list[Path]]]) -> Any:
        try:
            name, (failure, left) = crew.next()
        except BakeError as error:
            raise InvalidTask(_in_words(error)) from error
        to_settle(left)
        node = self._nodes.pop(name)
        self.process_task_result(node, failure)
        return node


cmd_run.Runner = Runner  # doit has no other place to say it


class Clean(DoitClean):  # type: ignore[misc]
    """`doit clean`: never under the hands of a bake. Store and cache are no targets, so they stay."""

    def execute(self, params: Any, args: list[str]) -> Any:
        if not args:  # whatever was baked, also what a plain `doit` does not bake
            params["cleanall"] = True
        with _told(), locked(BUILD / ".lock", waiting=_waiting):
            result = super().execute(params, args)
            targets = {target for task in self.task_list for target in task.targets}
            left = [path for path in self.loader.namespace["leftovers"]() if str(path) not in targets]
            for path in left if not args else ():
                self.outstream.write(f"no task's any more - removing file '{path}'\n")
                if not params["dryrun"]:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            return result


def _waiting() -> None:
    print("Another bake is running in this folder: waiting until it is done.", file=sys.stderr, flush=True)


class State(SqliteDB):  # type: ignore[misc]
    """doit's state, written soon after a task is done and not when doit ends, and forgotten when the task begins: of
    one that was cut off, a target may be new and the next one old. Losing it costs time, never truth: it is written
    only when what the tasks made is on the disk."""

    opened: State | None = None

    def __init__(self, name: str, codec: Any, *, module_name: str | None = None) -> None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        super().__init__(name, codec, module_name=module_name)
        self._done: list[str] = []
        self._written = time.monotonic()
        State.opened = self

    def _sqlite3(self, name: str) -> sqlite3.Connection:
        connection: sqlite3.Connection = super()._sqlite3(name)
        connection.execute("pragma journal_mode=wal")
        connection.execute("pragma synchronous=off")
        return connection

    def set(self, task_id: str, dependency: str, value: Any) -> None:
        super().set(task_id, dependency, value)
        if dependency == "deps:":  # the last thing that doit says of a finished task
            self._done.append(task_id)
            if time.monotonic() - self._written > SECONDS:
                self._write()

    def remove(self, task_id: str) -> None:
        super().remove(task_id)
        self._conn.commit()

    def dump(self) -> None:
        self._write()
        super().dump()

    def _write(self) -> None:
        settle()
        rows = [(task_id, self.codec.encode(self._cache[task_id])) for task_id in self._done]
        self._conn.executemany("insert or replace into doit values (?,?)", rows)
        self._conn.commit()
        self._dirty.difference_update(self._done)
        self._done.clear()
        self._written = time.monotonic()


class Checker(FileChangedChecker):  # type: ignore[misc]
    """A file is the same when its time and size are, or else its SHA-256; each file is hashed once per run."""

    def check_modified(self, file_path: str, file_stat: os.stat_result, state: Sequence[Any]) -> bool:
        time, size, digest = state
        if file_stat.st_size != size:
            return True
        return file_stat.st_mtime_ns != time and sha256_of(Path(file_path)) != str(digest)

    def get_state(self, dep: str, current_state: Sequence[Any] | None) -> tuple[int, int, str] | None:
        path = Path(dep)
        stat = path.stat()
        if current_state and tuple(current_state[:2]) == (stat.st_mtime_ns, stat.st_size):
            return None
        return stat.st_mtime_ns, stat.st_size, sha256_of(path)


class Same:
    """An `uptodate` check: the task's inputs that are no files have the digest that they had when it last ran.

    digest is called when the task's turn has come, after everything that it depends on is done.
    """

    __signature__ = inspect.Signature(  # which doit asks for every time
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("task", "values")]
    )

    def __init__(self, digest: Callable[..., str], *arguments: object) -> None:
        self._digest = partial(digest, *arguments)

    def __call__(self, task: Any, values: dict[str, Any]) -> bool:
        digest = self._digest()
        task.value_savers.append(lambda: {"inputs": digest})
        return values.get("inputs") == digest


def action(make: Callable[..., None], *arguments: object) -> Callable[[], TaskFailed | None]:
    """A recipe as a doit action: a BakeError fails the task with its own words; anything else is a defect of ours."""

    def run() -> TaskFailed | None:
        try:
            make(*arguments)
        except BakeError as error:
            return TaskFailed(_in_words(error))
        return None

    return run


class Reporter(ConsoleReporter):  # type: ignore[misc]
    """One line for each thing made, errors in one voice, and `at_end` once everything that was asked for is there."""

    desc = "one line for each thing made"
    at_end: Callable[[list[str]], None] | None = None

    def initialize(self, tasks: Any, selected_tasks: list[str]) -> None:
        self._selected = list(selected_tasks)
        self._failed = False

    def execute_task(self, task: Any) -> None:
        if State.opened is not None:
            State.opened.remove(task.name)
        if task.actions and not task.name.startswith("_"):
            self.write(f"{task.title()}\n")
            self.outstream.flush()

    def skip_uptodate(self, task: Any) -> None:
        pass

    def add_failure(self, task: Any, fail: Any) -> None:
        self._failed = True
        sys.stdout.flush()
        print(f"ERROR: {fail.message}", file=sys.stderr)
        if fail.traceback:
            print("".join(fail.traceback), file=sys.stderr)

    def runtime_error(self, msg: str) -> None:
        self._failed = True
        print(f"ERROR: {msg}", file=sys.stderr)

    def complete_run(self) -> None:
        if not self._failed and sys.exc_info()[0] is None and Reporter.at_end is not None:
            Reporter.at_end(self._selected)


class _Own(DoitCmdBase):  # type: ignore[misc]
    """A command of ours that bakes nothing; dodo.py says how, in a function of the command's name."""

    doc_description = None
    execute_tasks = False

    def _execute(self, pos_args: list[str]) -> int:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `doit info | head` is no mistake
        with _told():
            self.loader.namespace[self.get_name()](pos_args)
        return 0


class Info(_Own):
    """`doit info [NODE]`: what is in the cluster or in one machine's artifact, from where, until when."""

    doc_purpose = "show the cluster, or one machine: what is in it, from where, until when"
    doc_usage = "[NODE]"


class _Alone(_Own):
    """One that nobody may do while a bake goes on."""

    def _execute(self, pos_args: list[str]) -> int:
        with _told(), locked(BUILD / ".lock", waiting=_waiting):
            return super()._execute(pos_args)


class Rekey(_Alone):
    """`doit rekey NODE ...`: new keys, tokens and dates in the store; the next bake takes them."""

    doc_purpose = "mint anew what machines have of their own: keys, token, dates"
    doc_usage = "NODE ..."


class Encrypt(_Alone):
    """`doit encrypt [RECIPIENT ...]`: the secret store in one file, by age."""

    doc_purpose = "encrypt the secret store: for a passphrase, what is in key=FILE, or age's recipients"
    doc_usage = "[RECIPIENT ...]"


class Decrypt(_Alone):
    """`doit decrypt`: its files again as they were."""

    doc_purpose = "put the secret store's files into its folder again"
    doc_usage = ""


class Verify(_Alone):
    """`doit verify FILE ...`: whether artifacts are as they were baked, for this cluster."""

    doc_purpose = "check artifacts: every byte, and that they are this cluster's"
    doc_usage = "FILE ..."
