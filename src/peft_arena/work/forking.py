"""Imported first by the process that workers are forked from: binds it to the command's process, then loads the rest.

It leaves interrupts to the command, and ends with it: before the imports, which take seconds.
"""

import contextlib
import gc
import os
import signal
import sys

from peft_arena.core.ending import COMMAND, end_with_parent

SERVER = os.getpid()
"""The process that workers are forked from, as they see it."""


def _bind_worker() -> None:
    """Let a worker end with this process from its first moment on: it may be stopped before it says so itself."""
    if os.getppid() == SERVER:  # and not what a worker forks
        end_with_parent()


if any("multiprocessing.forkserver" in word for word in sys.orig_argv):  # not where a test imports this
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    os.register_at_fork(after_in_child=_bind_worker)
    if os.environ.get(COMMAND, str(os.getppid())) != str(os.getppid()):
        os._exit(1)  # the command was gone before
    with contextlib.suppress(Exception):  # what cannot be imported is said by each worker, in one line
        import peft_arena.work.preload  # noqa: F401
    gc.freeze()  # what is loaded stays: a worker's collections need not walk it, which takes 0.2 s each
