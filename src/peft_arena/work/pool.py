"""Many runs on this machine: one process per run, so that memory is measured and freed per run.

Workers are forked from a server process that has imported the heavy libraries once (``forkserver``), which makes a
worker start in a fraction of a second instead of ten.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.util
import os
import signal
import tempfile
import time
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.context import ForkServerContext
from typing import Any, Protocol

from peft_arena.core.ending import COMMAND, ended_by_signals, silence_leaks
from peft_arena.core.errors import UserError
from peft_arena.core.parts import scratch
from peft_arena.core.stage import StageId
from peft_arena.store.store import RunDirectory, Store
from peft_arena.work.order import Order
from peft_arena.work.plan import waits_for
from peft_arena.work.worker import EXIT_BUSY, EXIT_DONE, EXIT_MORE, ServerLostError, Worker

POLL_S = 0.1
BUSY_POLL_S = 2.0
SERVER_LOSSES = 3
"""So many times the process that workers are forked from is started anew; then the work is given up."""
SERVER = "the process that workers are forked from"
_LAST = -200
"""Priority of what is done at the end after multiprocessing has removed its sockets."""
_SOCKET_PATH = 70
"""Longest directory of a socket, in characters, under the system's limit for the whole path."""


class Watcher(Protocol):
    """Is told what happens, to show it."""

    def started(self, run_id: str) -> None:
        """Say that work on a run began."""

    def progress(self, run_id: str, stage: str, fraction: float, detail: str) -> None:
        """Say how far a stage of a run is."""

    def ended(self, run_id: str, problem: str) -> None:
        """Say that a run ended, with the problem that ended it or an empty string."""

    def note(self, text: str) -> None:
        """Say what concerns all runs, in one line."""


@dataclass
class Outcome:
    """What became of the orders."""

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Run id to reason."""


def run_orders(orders: Sequence[Order], jobs: int, watcher: Watcher) -> Outcome:
    """Work on all orders, ``jobs`` at a time; a failing run does not stop the others.

    A run that begins at another one is started when that is trained, and has failed when that has. Runs that another
    process holds are waited for and then checked again, so that two commands on one study share the work. Where the
    process that workers are forked from is killed, its workers are ended and their runs begun again from their last
    resume states. Interrupting ends the workers; every finished record stays and the runs can be resumed.
    """
    with ended_by_signals(), _fork_server(orders[0].threads if orders else 1) as context:
        return _Pool(context, orders, jobs, watcher).work()


class _Pool:
    """The orders of one call and the workers that are on some of them."""

    def __init__(self, context: ForkServerContext, orders: Sequence[Order], jobs: int, watcher: Watcher) -> None:
        self.context = context
        self.jobs = jobs
        self.watcher = watcher
        self.outcome = Outcome()
        self.waiting = list(orders)
        self.later: list[tuple[float, Order]] = []
        self.running: list[Worker] = []
        self.losses = 0

    def work(self) -> Outcome:
        """Go on until nothing is left to do."""
        sources = _Sources(self.watcher)
        try:
            while self.waiting or self.later or self.running:
                now = time.monotonic()
                self.waiting += [order for due, order in self.later if due <= now]
                self.later = [(due, order) for due, order in self.later if due > now]
                sources.drop_lost(self.waiting, {order.run.run_id for order in self._all()}, self.outcome)
                try:
                    self._start(sources)
                    self._look()
                except ServerLostError as lost:
                    self._again(str(lost))
                time.sleep(POLL_S)
        finally:
            for worker in self.running:
                worker.end()
        return self.outcome

    def _all(self) -> Iterator[Order]:
        yield from self.waiting
        yield from (order for _, order in self.later)
        yield from (worker.order for worker in self.running)

    def _start(self, sources: _Sources) -> None:
        while len(self.running) < self.jobs and (ready := sources.first_ready(self.waiting)) is not None:
            self.running.append(Worker(self.context, ready))
            self.waiting.remove(ready)
            self.watcher.started(ready.run.run_id)

    def _look(self) -> None:
        """Pass on what the workers say, and see which have ended."""
        for worker in list(self.running):
            code = worker.code()  # asked for before the news: what it said last is then among them
            for news in worker.news():
                self.watcher.progress(worker.run_id, *news)
            if code is None:
                continue
            self.running.remove(worker)
            if code == EXIT_MORE:
                self.waiting.insert(0, worker.order)
            elif code == EXIT_BUSY:
                self.watcher.progress(worker.run_id, "another process works on it", 0.0, "")
                self.later.append((time.monotonic() + BUSY_POLL_S, worker.order))
            else:
                _note(worker, code, self.outcome, self.watcher)
            worker.end()

    def _again(self, how: str) -> None:
        """End all workers after the process they were forked from was lost, and put their orders back."""
        self.losses += 1
        stopped, self.running = self.running, []
        for worker in stopped:
            worker.end()
        self.waiting = [*(worker.order for worker in stopped), *self.waiting]
        if self.losses < SERVER_LOSSES:
            self.watcher.note(f"{SERVER} {how}; its workers were ended, and are started again")
            return
        reason = f"{SERVER} was lost {self.losses} times and {how} last; the same command goes on from here"
        for order in [*self.waiting, *(order for _, order in self.later)]:
            self.outcome.failed[order.run.run_id] = reason
            self.watcher.ended(order.run.run_id, reason)
        self.waiting, self.later = [], []


class _Sources:
    """Keeps orders back until the run they begin at is trained, by what is on disk."""

    def __init__(self, watcher: Watcher) -> None:
        self.watcher = watcher
        self.free: set[str] = set()
        """Ids of runs that need not wait any more."""
        self.told: set[str] = set()

    def first_ready(self, waiting: Sequence[Order]) -> Order | None:
        """Return the first order that need not wait for another run."""
        for order in waiting:
            source = self._source(order)
            if source is None:
                return order
            if order.run.run_id not in self.told:
                self.told.add(order.run.run_id)
                self.watcher.progress(order.run.run_id, f"waits for {source.run_id}", 0.0, "")
        return None

    def drop_lost(self, waiting: list[Order], at_work: Collection[str], outcome: Outcome) -> None:
        """Give up orders whose run to begin at has failed, or is nobody's work.

        Args:
            waiting: is shortened.
            at_work: ids of the runs of all orders that are not done.
            outcome: gets the reasons.
        """
        lost = True
        while lost:  # one that is given up may be begun at itself
            lost = False
            for order in list(waiting):
                source = self._source(order)
                if source is None or (source.run_id in at_work and source.run_id not in outcome.failed):
                    continue
                said = outcome.failed.get(source.run_id)
                problem = "is not trained, and nothing here trains it" if said is None else f"failed: {said}"
                outcome.failed[order.run.run_id] = f"source run {source.run_id} {problem}"
                self.watcher.ended(order.run.run_id, outcome.failed[order.run.run_id])
                waiting.remove(order)
                lost = True

    def _source(self, order: Order) -> RunDirectory | None:
        if order.run.id in self.free:
            return None
        source = waits_for(Store(order.root).run(order.run))
        if source is None:
            self.free.add(order.run.id)
        return source


def _note(worker: Worker, code: int, outcome: Outcome, watcher: Watcher) -> None:
    """Note how a run ended; a worker that died without a word is written into the run's log."""
    run_id = worker.run_id
    if code == EXIT_DONE:
        outcome.finished.append(run_id)
        watcher.ended(run_id, "")
        return
    reason = worker.said or f"the worker process ended with code {code} before it was done"
    if code < 0:
        hint = " (out of memory?)" if -code == signal.SIGKILL else ""
        reason = f"the worker process was ended by {signal.Signals(-code).name}{hint}"
    if worker.said is None:
        run = Store(worker.order.root).run(worker.order.run)
        try:
            run.event("failed", **_last_started(run.events()), reason=reason)
        except UserError as error:
            reason = f"{reason}; {error}"
    outcome.failed[run_id] = reason
    watcher.ended(run_id, reason)


def _last_started(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the log says of the stage that was begun last."""
    for event in reversed(events):
        if event.get("event") == "started":
            return {name: event[name] for name in ("stage", *StageId._fields) if name in event}
    return {"stage": "start"}


@contextmanager
def _fork_server(threads: int) -> Iterator[ForkServerContext]:
    """Give a context whose server has imported the heavy libraries, with the thread count of the workers."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TOKENIZERS_PARALLELISM", COMMAND)
    before = {name: os.environ.get(name) for name in names}
    os.environ.update({"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)})
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ[COMMAND] = str(os.getpid())
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["peft_arena.work.forking"])
    _own_sockets()
    silence_leaks()
    # multiprocessing starts a killed tracker of shared memory anew; there is none here that it could have lost
    warnings.filterwarnings("ignore", message="resource_tracker: process died unexpectedly")
    try:
        yield context
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@cache
def _own_sockets() -> None:
    """Let multiprocessing keep its sockets in a directory that is removed even where this process is killed."""
    kept = ExitStack()
    folder = kept.enter_context(scratch("workers"))
    multiprocessing.util.Finalize(None, kept.close, exitpriority=_LAST)
    if len(str(folder)) > _SOCKET_PATH:
        return
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        multiprocessing.util.get_temp_dir()
    finally:
        tempfile.tempdir = before
