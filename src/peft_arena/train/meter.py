"""The progress bar of a training: steps, loss or reward, tokens per second, time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from peft_arena.train.outcome import StepInfo

REDRAW_S = 0.5


@contextmanager
def meter(wanted: bool, title: str, total: int, done: int, tokens: int) -> Iterator[Callable[[StepInfo], None]]:
    """Show a bar on stderr while the block runs, if one is wanted and stderr is a terminal.

    Args:
        wanted: whether to show a bar at all.
        title: what is being trained.
        total: all steps.
        done: steps an earlier process did.
        tokens: their tokens.

    Yields:
        What to call after each step.
    """
    if not wanted or not sys.stderr.isatty():
        yield _nothing
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[said]} {task.fields[speed]} tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as bar:
        task = bar.add_task(title, total=total, completed=done, said="", speed="-")
        start = time.monotonic()
        drawn = 0.0

        def show(info: StepInfo) -> None:
            nonlocal drawn
            now = time.monotonic()
            if now - drawn < REDRAW_S and info.step < total:
                return
            drawn = now
            speed = (info.tokens - tokens) / max(now - start, 1e-9)
            bar.update(task, completed=info.step, said=info.said, speed=f"{speed:.0f}", refresh=True)

        yield show


def _nothing(_: StepInfo) -> None:
    """Show nothing."""
