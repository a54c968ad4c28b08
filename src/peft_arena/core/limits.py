"""A limit of processor time for a piece of work that somebody else's text decides: a template, a regular expression."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt what is done inside after so many seconds of this process's own time.

    Python's loops and its regular expressions are interrupted; one long operation on numbers or texts is not. Outside
    the main thread, which alone is told of signals, and inside another limit nothing is limited.

    Raises:
        TimeoutError: the time is over.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_VIRTUAL)[0] > 0:
        yield
        return

    def over(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"takes more than {seconds:g} s")

    before = signal.signal(signal.SIGVTALRM, over)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
