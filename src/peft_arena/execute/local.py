"""Many runs on this machine: one process per run, so that memory is measured and freed per run.

Workers are forked from a server process that has imported the heavy libraries once (``forkserver``), which makes a
worker start in a fraction of a second instead of ten.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.queues import SimpleQueue
from typing import Protocol

from peft_arena.core.ending import ended_by_sigterm
from peft_arena.core.errors import UserError
from peft_arena.execute.plan import waits_for
from peft_arena.execute.work import BusyError, Order, do, hush
from peft_arena.store.store import RunDirectory, Store

POLL_S = 0.1
BUSY_POLL_S = 2.0
FAILED = "failed"
Message = tuple[str, str, float, str]
"""Run id, stage, fraction of it, detail."""


class Watcher(Protocol):
    """Is told what happens, to show it."""

    def started(self, run_id: str) -> None:
        """Say that work on a run began."""

    def progress(self, run_id: str, stage: str, fraction: float, detail: str) -> None:
        """Say how far a stage of a run is."""

    def ended(self, run_id: str, problem: str) -> None:
        """Say that a run ended, with the problem that ended it or an empty string."""


@dataclass
class _Running:
    """A worker process and the order it works on."""

    order: Order
    process: ForkServerProcess


@dataclass
class Outcome:
    """What became of the orders."""

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Run id to reason."""


def run_orders(orders: Sequence[Order], jobs: int, watcher: Watcher) -> Outcome:
    """Work on all orders, ``jobs`` at a time; a failing run does not stop the others.

    A run that begins at another one is started when that is trained, and has failed when that has. Runs that another
    process holds are waited for and then checked again, so that two commands on one study share the work.
    Interrupting ends the workers; every finished record stays and the runs can be resumed.
    """
    outcome = Outcome()
    waiting = list(orders)
    later: list[tuple[float, Order]] = []
    running: list[_Running] = []
    said: dict[str, str] = {}
    sources = _Sources(watcher)
    threads = orders[0].threads if orders else 1
    with ended_by_sigterm(), _fork_server(threads) as context:
        messages = context.SimpleQueue()
        try:
            while waiting or later or running:
                now = time.monotonic()
                waiting += [order for due, order in later if due <= now]
                later = [(due, order) for due, order in later if due > now]
                sources.drop_lost(waiting, {order.run.run_id for order in _all(waiting, later, running)}, outcome)
                while len(running) < jobs and (ready := sources.first_ready(waiting)) is not None:
                    waiting.remove(ready)
                    running.append(_start(context, ready, messages, watcher))
                _show(messages, watcher, said)
                for worker in [worker for worker in running if not worker.process.is_alive()]:
                    running.remove(worker)
                    _show(messages, watcher, said)
                    code = worker.process.exitcode
                    if code == EXIT_MORE:
                        waiting.insert(0, worker.order)
                    elif code == EXIT_BUSY:
                        watcher.progress(worker.order.run.run_id, "another process works on it", 0.0, "")
                        later.append((time.monotonic() + BUSY_POLL_S, worker.order))
                    else:
                        _note(worker.order, code, said, outcome, watcher)
                time.sleep(POLL_S)
        finally:
            for worker in running:
                worker.process.terminate()
            for worker in running:
                worker.process.join(10)
    return outcome


def _all(
    waiting: Sequence[Order], later: Sequence[tuple[float, Order]], running: Sequence[_Running]
) -> Iterator[Order]:
    yield from waiting
    yield from (order for _, order in later)
    yield from (worker.order for worker in running)


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


EXIT_FAILED = 1
EXIT_BUSY = 75
EXIT_MORE = 76
EXIT_DONE = 77
"""Not 0, which code of the user's own may end the process with before it is done."""


def _worker(order: Order, messages: SimpleQueue[Message]) -> None:
    """Run in the worker process: do the order and end with a code that says how it went."""
    import torch

    hush()
    _follow_parent()
    torch.set_num_threads(order.threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run_id = order.run.run_id
    try:
        more = do(order, lambda *news: messages.put((run_id, *news)))
    except BusyError:
        raise SystemExit(EXIT_BUSY) from None
    except UserError as error:
        messages.put((run_id, FAILED, 0.0, str(error)))
        raise SystemExit(EXIT_FAILED) from None
    raise SystemExit(EXIT_MORE if more else EXIT_DONE)


def _follow_parent() -> None:
    """End this process when the one that asked for the work is gone, however it went."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            wait([parent.sentinel])
            os._exit(EXIT_FAILED)

    threading.Thread(target=watch, daemon=True).start()


def _start(context: ForkServerContext, order: Order, messages: SimpleQueue[Message], watcher: Watcher) -> _Running:
    process = context.Process(target=_worker, args=(order, messages), name=order.run.run_id)
    process.start()
    watcher.started(order.run.run_id)
    return _Running(order, process)


def _show(messages: SimpleQueue[Message], watcher: Watcher, said: dict[str, str]) -> None:
    """Pass on what workers say, and keep the last word of those that failed."""
    while not messages.empty():
        run_id, stage, fraction, detail = messages.get()
        if stage == FAILED:
            said[run_id] = detail
        else:
            watcher.progress(run_id, stage, fraction, detail)


def _note(order: Order, code: int | None, said: dict[str, str], outcome: Outcome, watcher: Watcher) -> None:
    """Note how a run ended; a worker that died without a word is written into the run's log."""
    run_id = order.run.run_id
    if code == EXIT_DONE:
        outcome.finished.append(run_id)
        watcher.ended(run_id, "")
        return
    reason = said.get(run_id, f"the worker process ended with code {code} before it was done")
    if code is not None and code < 0:
        hint = " (out of memory?)" if -code == signal.SIGKILL else ""
        reason = f"the worker process was ended by {signal.Signals(-code).name}{hint}"
    if run_id not in said:
        run = Store(order.root).run(order.run)
        try:
            run.event("failed", stage=_stage_of(run.events()), reason=reason)
        except UserError as error:
            reason = f"{reason}; {error}"
    outcome.failed[run_id] = reason
    watcher.ended(run_id, reason)


def _stage_of(events: list[dict[str, object]]) -> str:
    for event in reversed(events):
        if event.get("event") == "started":
            return str(event.get("stage"))
    return "start"


@contextmanager
def _fork_server(threads: int) -> Iterator[ForkServerContext]:
    """Give a context whose server has imported the heavy libraries, with the thread count of the workers."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TOKENIZERS_PARALLELISM")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update({"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)})
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["peft_arena.execute.preload"])
    try:
        yield context
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
