"""Ending: by a signal as by an interrupt, so that what is unfinished is cleared away; and with one's parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

COMMAND = "PEFT_ARENA_COMMAND"
"""Environment variable with the number of the command's process, for those it starts."""
_PR_SET_PDEATHSIG = 1
_NO_LEAKS = "ignore:resource_tracker:UserWarning"


class Ended(SystemExit):
    """The process was told to end; the text says by what, and the code is 128 and the signal's number."""

    def __init__(self, number: int) -> None:
        """Keep the signal."""
        super().__init__(128 + number)
        self.by = signal.Signals(number).name

    def __str__(self) -> str:
        return f"ended by {self.by}"


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block by :class:`Ended`, as Ctrl-C does; only the main thread can ask for this.

    SIGHUP stays ignored where it is, as under nohup.
    """

    def stop(number: int, frame: object) -> None:
        raise Ended(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wanted = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) not in (signal.SIG_IGN, None)]
    former = {one: signal.signal(one, stop) for one in wanted}
    try:
        yield
    finally:
        for one, handler in former.items():
            signal.signal(one, handler)


def end_with_parent() -> None:
    """Let the kernel kill this process when the thread that started it ends; does nothing where it cannot.

    Whoever calls this must still look whether the parent was gone before.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))


def silence_leaks() -> None:
    """Keep what tracks semaphores for this process from saying that ended workers left some, which it removes.

    It is a process of its own that gets this one's options for warnings when it starts: call this before.
    """
    if _NO_LEAKS not in sys.warnoptions:
        sys.warnoptions.append(_NO_LEAKS)


def open_standard_streams() -> None:
    """Open the null device in place of standard streams that are closed.

    Else the next file that is opened would take their number, and what libraries print would go into it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
