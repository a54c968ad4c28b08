"""Run a study: plan it, work on what is missing, say what happened."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from peft_arena.store.store import Store
from peft_arena.study.known_data import Note
from peft_arena.study.model import Study
from peft_arena.study.preflight import check_arms, check_place, check_study
from peft_arena.study.study_file import Execution
from peft_arena.work.order import Order
from peft_arena.work.plan import RunPlan, plan


@dataclass(frozen=True)
class StudyOutcome:
    """What a command on a study did."""

    plans: list[RunPlan]
    """The state afterwards."""
    worked: int
    """Runs that were worked on."""
    failed: dict[str, str]
    """Run id to reason."""
    notes: tuple[Note, ...] = ()
    """What defaults took less of than they say; empty where nothing was worked on."""

    @property
    def complete(self) -> bool:
        """Whether every run that is not refused is done."""
        return all(item.state in {"done", "refused"} for item in self.plans)


def orders_for(study: Study, store: Store, execution: Execution) -> list[Order]:
    """Return an order for every run with something missing, the base model first."""
    threads = execution.threads or max(1, (os.cpu_count() or 1) // execution.jobs)
    sources = {run.id for run in study.sources()}
    orders = []
    for item in plan(study, store):
        if item.state in {"done", "refused"}:
            continue
        train_only = item.run.id in sources
        orders.append(
            Order(
                root=store.root.resolve(),
                run=item.run,
                evaluations=() if train_only else tuple(study.evaluations(item.run)),
                geometry=() if train_only else tuple(study.geometry(item.run)),
                scans=() if train_only else tuple(study.scans(item.run)),
                at_save_points=study.file.evaluate_at == "save_points",
                eval_batch_size=execution.eval_batch_size,
                resume_every=execution.resume_every,
                recompute=execution.recompute_activations,
                latency_repeats=execution.latency_repeats,
                threads=threads,
                train_only=train_only,
            )
        )
    return orders


def run_study(study: Study, root: Path, jobs: int | None = None, quiet: bool = False) -> StudyOutcome:
    """Work on everything that is missing of a study.

    Args:
        study: the study.
        root: the runs directory, shared by all studies; runs of other studies with the same spec are reused.
        jobs: runs at once, over what the study's file says.
        quiet: show nothing while working.

    Raises:
        UserError: what :func:`peft_arena.study.preflight.check_study` refuses, or the directory cannot be written to.
    """
    from peft_arena.work.pool import run_orders
    from peft_arena.work.progress import Board

    check_arms(study)
    store = Store(root)
    execution = study.file.execution
    if jobs is not None:
        execution = execution.model_copy(update={"jobs": jobs})
    orders = orders_for(study, store, execution)
    if not orders:
        return StudyOutcome(plan(study, store), 0, {})
    notes = check_study(study)
    check_place(root)
    store.check_writable()
    with Board(len(orders), quiet=quiet) as board:
        outcome = run_orders(orders, execution.jobs, board)
    return StudyOutcome(plan(study, store), len(orders), outcome.failed, tuple(notes))
