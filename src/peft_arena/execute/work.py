"""The work of one run: train, cost, evaluate, each stage skipped if its record is on disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import Timeout

from peft_arena.core.errors import UserError
from peft_arena.core.specs import EvalSpec, RunSpec
from peft_arena.execute.plan import COST_INFERENCE, COST_TRAINING, TRAIN, evaluation_name
from peft_arena.store.store import RunDirectory, Store

if TYPE_CHECKING:
    from peft_arena.methods.base import Attached
    from peft_arena.models.load import Loaded

Report = Callable[[str, float], None]
"""Called with a stage and the fraction of it that is done."""


@dataclass(frozen=True)
class Order:
    """What one worker is asked to do. Everything in it is plain text or numbers, so it crosses processes."""

    root: Path
    run: RunSpec
    evaluations: tuple[EvalSpec, ...]
    at_save_points: bool
    eval_batch_size: int | None
    resume_every: int | None
    latency_repeats: int
    jobs: int
    """Runs worked on at once on this machine: timings say so."""
    threads: int


class Busy(Exception):
    """Another process works on this run."""


def do(order: Order, report: Report = lambda stage, fraction: None) -> None:
    """Do what is missing of a run, under its lock.

    Raises:
        Busy: another process holds the run.
        UserError: a stage failed; it is in the event log, and what was finished stays.
    """
    run = Store(order.root).run(order.run)
    try:
        with run.lock().acquire(timeout=0):
            run.create()
            _Worker(order, run, report).go()
    except Timeout:
        raise Busy(run.run_id) from None


class _Worker:
    """Carries out one order; loads the model once per state of its weights."""

    def __init__(self, order: Order, run: RunDirectory, report: Report) -> None:
        self.order = order
        self.run = run
        self.report = report

    def go(self) -> None:
        if self.order.run.is_base:
            self._measure(0)
            return
        if self.run.training() is None:
            self._stage(TRAIN, self._train)
        training = self.run.training()
        assert training is not None, "training ended without a record"
        points = training.save_points if self.order.at_save_points else (training.steps,)
        for step in points:
            self._measure(step, final=step == training.steps)

    def _stage(self, name: str, work: Callable[[], None]) -> None:
        self.run.event("started", stage=name, process=os.getpid())
        self.report(name, 0.0)
        try:
            work()
        except UserError as error:
            self.run.event("failed", stage=name, reason=str(error))
            raise
        except MemoryError:
            self.run.event("failed", stage=name, reason="out of memory")
            raise UserError(f"{name}: out of memory") from None
        except Exception as error:
            reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
            self.run.event("failed", stage=name, reason=reason, traceback=_traceback(error))
            raise UserError(f"{name}: {reason}") from error
        self.run.event("finished", stage=name)
        self.report(name, 1.0)

    def _train(self) -> None:
        from peft_arena.cost.record import training_cost
        from peft_arena.methods.registry import make_method
        from peft_arena.models.load import load
        from peft_arena.tasks.registry import make_task
        from peft_arena.train.sft import train_sft

        spec = self.order.run
        assert spec.train is not None
        loaded = load(spec.model)
        method = make_method(spec.method.name, spec.method.config)
        attached = method.attach(loaded.model, seed=spec.seed)
        task = make_task(spec.train.task.name, spec.train.task.config)
        raise NotImplementedError

    def _measure(self, step: int, final: bool = True) -> None:
        point = self.run.point(step)
        missing = [spec for spec in self.order.evaluations if self.run.evaluation(point, spec) is None]
        costed = not final or self.run.cost("inference") is not None
        if not missing and costed:
            return
        loaded, attached = self._restore(step)


def _traceback(error: BaseException) -> str:
    import traceback

    return "".join(traceback.format_exception(error))[-4000:]
