"""One worker process: bound to the command that started it, heard through a pipe of its own, ended for certain.

A pipe for each worker, because a queue they share has a lock, and a worker killed while it holds that stops all others.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from typing import NamedTuple

import psutil

from peft_arena.core.ending import end_with_parent
from peft_arena.core.errors import UserError, first_line
from peft_arena.store.store import Store
from peft_arena.work.order import TRACE_LENGTH, BusyError, Order, do, hush

EXIT_FAILED = 1
EXIT_BUSY = 75
EXIT_MORE = 76
EXIT_DONE = 77
"""Not 0, which code of the user's own may end the process with before it is done."""
UNKNOWN_CODE = 255
"""What multiprocessing says where the process that forks was killed, and nobody knows how a worker ended."""
FAILED = "failed"
HELLO = "hello"
PATIENCE_S = 10.0
"""Time for a worker to end by itself."""
_LOOK_S = 0.05
_CHUNK = 1 << 16


class ServerLostError(Exception):
    """The process that workers are forked from is gone; the text says how it ended."""


class News(NamedTuple):
    """What a worker says."""

    stage: str
    fraction: float
    """Of the stage."""
    detail: str


class Worker:
    """A worker process and the order it works on, as the command sees them."""

    def __init__(self, context: ForkServerContext, order: Order) -> None:
        """Start a process on an order.

        Raises:
            ServerLostError: the process that workers are forked from ended before it had forked this one.
        """
        self.order = order
        self.run_id = order.run.run_id
        self.said: str | None = None
        """Why it failed, in its own words."""
        self._server: int | None = None
        self._rest = b""
        self._from, to = context.Pipe(duplex=False)
        os.set_blocking(self._from.fileno(), False)
        self._process = context.Process(target=work, args=(order, to), name=self.run_id)
        try:
            self._process.start()
        except (EOFError, OSError) as error:
            self._from.close()
            gone = isinstance(error, EOFError | ConnectionError)
            how = "was ended before it had forked a worker" if gone else f"could not be asked for a worker ({error})"
            raise ServerLostError(how) from error
        finally:
            to.close()
        try:
            self._seen = psutil.Process(self._process.pid)  # knows the process by more than its number
        except psutil.NoSuchProcess:
            self._seen = None

    def news(self) -> list[News]:
        """Return what the worker said since the last call; never waits."""
        with contextlib.suppress(BlockingIOError, OSError):
            while chunk := os.read(self._from.fileno(), _CHUNK):
                self._rest += chunk
        *lines, self._rest = self._rest.split(b"\n")
        found = [News(*json.loads(line)) for line in lines]
        for one in found:
            if one.stage == HELLO:
                self._server = int(one.detail)
            elif one.stage == FAILED:
                self.said = one.detail
        return [one for one in found if one.stage not in (HELLO, FAILED)]

    def code(self) -> int | None:
        """Return the code the worker ended with, None while it runs.

        Raises:
            ServerLostError: it cannot be known any more, and the worker may live on.
        """
        if self._process.is_alive():
            return None
        code = self._process.exitcode
        if code == UNKNOWN_CODE:
            self.news()
            how = None if self._server is None else _ending(self._server)
            if self._server is None or how is not None:
                raise ServerLostError(how or "was ended")
        return code

    def end(self) -> None:
        """End the worker: ask first, then kill it and whatever it started, and wait until it is gone."""
        seen = self._seen
        if seen is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            below = seen.children(recursive=True)
            seen.terminate()
            seen.resume()  # one that is stopped hears of nothing
            _gone_after(seen, PATIENCE_S)
            for process in (seen, *below):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            _gone_after(seen, PATIENCE_S)
        self._from.close()


def _gone_after(process: psutil.Process, seconds: float) -> bool:
    """Wait until a process is gone; one that only waits to be reaped is."""
    deadline = time.monotonic() + seconds
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_S)
    return True


def _ending(server: int) -> str | None:
    """Say how the forking process, a child of this one, ended; None while it runs. It stays to be waited for."""
    for _ in range(20):  # its pipes are closed a moment before it can be waited for
        try:
            found = os.waitid(os.P_PID, server, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return "was ended"
        if found is not None:
            if found.si_code == os.CLD_EXITED:
                return f"ended with code {found.si_status}"
            name = signal.Signals(found.si_status).name
            return f"was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
        time.sleep(_LOOK_S)
    return None


def work(order: Order, to: Connection) -> None:
    """Run in the worker process: do the order and end with a code that says how it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _follow_parents()
    say = _speaker(to)
    say(HELLO, 0.0, str(os.getppid()))
    import torch

    hush()
    torch.set_num_threads(order.threads)
    try:
        more = do(order, say)
    except BusyError:
        raise SystemExit(EXIT_BUSY) from None
    except UserError as error:
        say(FAILED, 0.0, str(error))
        raise SystemExit(EXIT_FAILED) from None
    except Exception as error:  # noqa: BLE001 - whatever it is, the user sees one line, and the log the rest
        reason = f"{type(error).__name__}: {first_line(error)}"
        trace = "".join(traceback.format_exception(error))[-TRACE_LENGTH:]
        with contextlib.suppress(UserError):
            Store(order.root).run(order.run).event("failed", stage="start", reason=reason, traceback=trace)
        say(FAILED, 0.0, reason)
        raise SystemExit(EXIT_FAILED) from None
    raise SystemExit(EXIT_MORE if more else EXIT_DONE)


def _speaker(to: Connection) -> Callable[[str, float, str], None]:
    """Return what sends news; where nobody is left to hear them the process ends."""

    def say(stage: str, fraction: float, detail: str) -> None:
        line = memoryview(json.dumps([stage, fraction, detail]).encode() + b"\n")
        try:
            while line:
                line = line[os.write(to.fileno(), line) :]
        except BrokenPipeError:
            os._exit(EXIT_FAILED)

    return say


def _follow_parents() -> None:
    """End this process when the one that asked for the work, or the one it was forked from, is gone, however it went.

    The kernel sees to the second, and the second ends with the first (:mod:`peft_arena.work.forking`); the thread
    is for systems whose kernel does not.
    """
    end_with_parent()
    server = sys.modules.get("peft_arena.work.forking")
    if server is not None and os.getppid() != server.SERVER:
        os._exit(EXIT_FAILED)

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            wait([parent.sentinel])
            os._exit(EXIT_FAILED)

    threading.Thread(target=watch, daemon=True).start()
