"""Faults put into a forked child of the test's process: fast, for the libraries are loaded, and nothing to undo."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from peft_arena.core.errors import UserError
from peft_arena.store.store import Store
from peft_arena.study.read_study import read_study
from peft_arena.work.order import do
from peft_arena.work.run_study import orders_for

STUDY = """\
name: faulty
title: A study of seconds
model: {name: micro}
targets:
  - {task: micro-reverse, items: 4}
retention:
  - {task: micro-sort, items: 4}
train:
  schedule: {steps: 4}
  batch_size: 2
  learning_rate: 1e-3
  validation_items: 2
  save_points: [0.5, 1.0]
arms:
  - {method: lora}
seeds: [0]
execution: {jobs: 1, threads: 1, resume_every: 1, latency_repeats: 2}
"""
REFUSED, CRASHED = 2, 99


class Ended(NamedTuple):
    """How a child ended."""

    code: int
    """Of the process; minus the signal's number where a signal ended it."""
    text: str
    """What it wrote to standard output and error."""


def in_child(work: Callable[[], object], said: Path) -> Ended:
    """Do something in a forked child; a user error is its one line, anything else that is raised a traceback."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = CRASHED
        try:
            for number in (1, 2):
                os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            work()
            code = 0
        except UserError as error:
            os.write(2, f"{error}\n".encode())
            code = REFUSED
        except BaseException:  # noqa: BLE001 - the parent looks for it
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    text = said.read_text() if said.exists() else ""
    said.unlink(missing_ok=True)
    return Ended(os.waitstatus_to_exitcode(status), text)


def work_on(study: Path, runs: Path) -> None:
    """Do all of a study in this process, the parts in the order a command would have them."""
    import torch

    torch.set_num_threads(1)  # not in the parent: its threads would not live in the child
    loaded = read_study(study)
    store = Store(runs)
    for order in orders_for(loaded, store, loaded.file.execution):
        while do(order):
            pass


def at_call(owner: Any, name: str, number: int, act: Callable[..., Any], where: str = "") -> None:
    """Let something else happen at a call of a function, the first being 1.

    Args:
        owner: module or class.
        name: of the function.
        number: of the call, among those that count.
        act: is called with the function and its arguments instead.
        where: only calls count whose arguments, as text, have this.
    """
    function = getattr(owner, name)
    calls = [0]

    def changed(*given: Any, **named: Any) -> Any:
        if where in f"{given} {named}":
            calls[0] += 1
            if calls[0] == number:
                return act(function, *given, **named)
        return function(*given, **named)

    setattr(owner, name, changed)


def from_call(owner: Any, name: str, number: int, act: Callable[..., Any], where: str = "") -> None:
    """The same for a call and every later one."""
    function = getattr(owner, name)
    calls = [0]

    def changed(*given: Any, **named: Any) -> Any:
        calls[0] += where in f"{given} {named}"
        if where in f"{given} {named}" and calls[0] >= number:
            return act(function, *given, **named)
        return function(*given, **named)

    setattr(owner, name, changed)


def killed(function: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """End the process where it is."""
    os.kill(os.getpid(), signal.SIGKILL)


def killed_after(function: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """Do what was asked, and end the process then."""
    function(*given, **named)
    os.kill(os.getpid(), signal.SIGKILL)


def half_written(function: Callable[..., int], handle: int, data: bytes) -> int:
    """Write the first half of what was to be written, and end the process then."""
    function(handle, data[: len(data) // 2])
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def refused(number: int) -> Callable[..., Any]:
    """Return what raises the error of that number, as the system does."""

    def act(function: Callable[..., Any], *given: Any, **named: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return act


def raised(error: BaseException) -> Callable[..., Any]:
    """Return what raises an error."""

    def act(function: Callable[..., Any], *given: Any, **named: Any) -> Any:
        raise error

    return act
