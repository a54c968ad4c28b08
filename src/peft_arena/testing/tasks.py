"""Conformance of tasks: what every task must do, ours or a contributor's, checked in seconds without a model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from peft_arena.assets.wheel_files import Wheel, wheel_path
from peft_arena.core.errors import UserError
from peft_arena.store.conformance import ConformanceRecord
from peft_arena.tasks.base import Task
from peft_arena.testing import (
    task_answer_checks,
    task_data_checks,
    task_fresh,
    task_likelihood_checks,
    task_near_checks,
    task_prompt_checks,
)
from peft_arena.testing.task_answer_checks import NASTY_TEXTS
from peft_arena.testing.task_child import LOADING
from peft_arena.testing.task_trial import NotTestedError, TaskTrial

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CHECKS", "NASTY_TEXTS", "SUITE", "WAIVABLE", "check_task", "need_wheel"]

SUITE = 3
"""Version of the checks; raised when one is added or says more."""
CHECKS: Mapping[str, Callable[[TaskTrial], None]] = {
    "card": task_data_checks.check_card,
    "splits": task_data_checks.check_splits,
    "items": task_data_checks.check_items,
    "prompts": task_prompt_checks.check_prompts,
    "overlap": task_data_checks.check_overlap,
    "reordered": task_data_checks.check_reordered,
    "duplicates": task_data_checks.check_duplicates,
    "order": task_data_checks.check_order,
    "settings": task_data_checks.check_settings,
    "shots": task_prompt_checks.check_shots,
    "asked": task_prompt_checks.check_asked,
    "options": task_likelihood_checks.check_options,
    "likelihoods": task_likelihood_checks.check_likelihoods,
    "texts": task_likelihood_checks.check_texts,
    "golds": task_answer_checks.check_golds,
    "scores": task_answer_checks.check_scores,
    "odd_texts": task_answer_checks.check_odd_texts,
    "stops": task_answer_checks.check_stops,
    "limit": task_answer_checks.check_limit,
    "wrong": task_answer_checks.check_wrong,
    "silent": task_answer_checks.check_silent,
    "partial": task_answer_checks.check_partial,
    "numbers": task_near_checks.check_numbers,
    "listing": task_answer_checks.check_listing,
    "judge_state": task_answer_checks.check_judge_state,
    "gold_marks": task_prompt_checks.check_gold_marks,
    "answer_in_prompt": task_prompt_checks.check_answer_in_prompt,
    "gold_cycle": task_prompt_checks.check_gold_cycle,
    "echo": task_near_checks.check_echo,
    "chance": task_likelihood_checks.check_chance,
    "process": task_fresh.check_process,
}
"""Every check by name, in the order they are tried."""
WAIVABLE = frozenset(
    {
        "answer_in_prompt",
        "chance",
        "duplicates",
        "echo",
        "gold_cycle",
        "gold_marks",
        "listing",
        "numbers",
        "options",
        "partial",
        "reordered",
        "stops",
    }
)
"""Checks of what data may be by its nature; a card's ``waived`` is of these names."""


def check_task(task: Task, sample: int = 40, tokenizer: PreTrainedTokenizerBase | None = None) -> ConformanceRecord:
    """Check that a task keeps the contract of :class:`peft_arena.tasks.base.Task`; docs/extending.md lists the checks.

    Args:
        task: the task, with the settings to check it with.
        sample: items of each split whose prompt and scoring are checked; all are checked for content.
        tokenizer: of a model that is to answer; the answers are then written in its tokens too.

    Returns:
        Which checks passed, and which were not tested and why.

    Raises:
        AssertionError: the task breaks the contract; the message names the check and says how.
        UserError: it is called by the module of a task that another process loads for a check.
    """
    if LOADING in os.environ:
        raise UserError(
            "check_task is called where the module of the task is loaded, so that each new process that loads it calls "
            "it again; put the call into a test, or behind: if __name__ == '__main__'"
        )
    waived = task.card.waived
    stray = set(waived) - WAIVABLE
    assert not stray, (
        f"{task.card.name}: the card waives {', '.join(sorted(stray))}; only {', '.join(sorted(WAIVABLE))} may be"
    )
    trial = TaskTrial(task, sample, tokenizer)
    left = {name: _untested(trial, name, waived.get(name)) for name in CHECKS}
    return ConformanceRecord(
        name=task.card.name,
        suite=SUITE,
        config=task.config.model_dump(mode="json"),
        passed=tuple(name for name, why in left.items() if not why),
        not_tested={name: why for name, why in left.items() if why},
    )


def _untested(trial: TaskTrial, name: str, reason: str | None) -> str:
    """Try one check and return why it was not tested, empty if it passed; one that is waived must fail.

    A waived check need not fail where there is nothing to try.
    """
    try:
        CHECKS[name](trial)
    except NotTestedError as why:
        return str(why)
    except AssertionError as error:
        if reason is not None:
            return f"waived: {reason} (found: {error})"
        raise AssertionError(f"{trial.name}, check {name}: {error}") from error
    assert reason is None, f"{trial.name}: check {name} is waived and does not fail; remove it from the card's waived"
    return ""


def need_wheel(wheel: Wheel) -> None:
    """Skip the running test where a wheel cannot be had; on continuous integration (``CI=true``) fail instead.

    Needs pytest.
    """
    import pytest

    try:
        wheel_path(wheel)
    except UserError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"{wheel.filename} cannot be had: {error}")
