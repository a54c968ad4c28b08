"""Conformance suite for fine-tuning methods: what a card declares is tried on tiny models.

In a test file, one test per check::

    test_my_method = method_tests(MyMethod, {"rank": 4})

or all at once: that raises AssertionError with a reason, or returns a record of what was tried, found and not tested::

    check_method(MyMethod(MyConfig(rank=4)))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peft_arena.core.errors import UserError
from peft_arena.core.provenance import versions
from peft_arena.methods.base import Method
from peft_arena.store.conformance import Facts, MethodRecord
from peft_arena.testing import (
    apart_checks,
    card_checks,
    equation_checks,
    file_checks,
    life_checks,
    optimizer_checks,
    precision_checks,
    rl_checks,
    row_checks,
    settings_checks,
    weight_checks,
)
from peft_arena.testing.fresh import reader
from peft_arena.testing.subject import (
    EXACT,
    MERGE,
    ROUNDED,
    STEPS,
    Kind,
    Subject,
    advance,
    altered_shared_models,
    calibration,
    difference,
    global_random_untouched,
    logits,
    one_thread,
    refuses,
    tiny_model,
    tokens,
    train,
)
from peft_arena.testing.trial import Trial

__all__ = [
    "CHECKS",
    "EXACT",
    "MERGE",
    "ROUNDED",
    "STEPS",
    "Facts",
    "Kind",
    "MethodRecord",
    "Subject",
    "advance",
    "calibration",
    "check_method",
    "difference",
    "global_random_untouched",
    "logits",
    "method_tests",
    "refuses",
    "run_check",
    "tiny_model",
    "tokens",
    "train",
]

Check = Callable[[Trial], str | dict[str, str] | None]
"""Raises AssertionError where a method is wrong; returns why nothing was tested, or by model why not there."""
NEEDS_QUANTIZED = "it takes only quantised models, and the suite has none"
LIBRARIES = ("torch", "transformers", "peft", "trl")

ALWAYS: Mapping[str, Check] = {
    "card": card_checks.check_card,
    "quantized_base": card_checks.check_quantized_base,
}
"""Checks that need no model with plain weights."""
CHECKS: Mapping[str, Check] = {
    **ALWAYS,
    "start": life_checks.check_start,
    "mode": life_checks.check_mode,
    "count": card_checks.check_count,
    "training": life_checks.check_training,
    "optimizer": optimizer_checks.check_optimizer,
    "gradients": optimizer_checks.check_gradients,
    "mixed_precision": precision_checks.check_mixed_precision,
    "recompute": precision_checks.check_recompute,
    "state": life_checks.check_state,
    "resume": life_checks.check_resume,
    "evaluation": row_checks.check_evaluation,
    "rows": row_checks.check_rows,
    "disabled": life_checks.check_disabled,
    "checkpoint": life_checks.check_checkpoint,
    "damage": file_checks.check_damage,
    "peft_adapter": file_checks.check_peft_adapter,
    "lora_adapter": file_checks.check_lora_adapter,
    "weights": weight_checks.check_weights,
    "path": weight_checks.check_path,
    "merge": life_checks.check_merge,
    "equation": equation_checks.check_equation,
    "generation": life_checks.check_generation,
    "online_rl": rl_checks.check_online_rl,
    "calibration": card_checks.check_calibration,
    "sizes": card_checks.check_sizes,
    "seeds": card_checks.check_seeds,
    "fields": settings_checks.check_fields,
    "settings": settings_checks.check_settings,
    "apart": apart_checks.check_apart,
    "fresh_process": file_checks.check_fresh_process,
}
"""Every check by name; a card's ``known_failures`` are of these names."""


class Result(NamedTuple):
    """What became of one check that did not find the method wrong."""

    check: str
    not_tested: Mapping[str, str] = {}
    """Why nothing was tried, by the check's name, or not on a model, by ``check on model``."""
    known_failure: str = ""
    """It failed, as the card says: the card's reason."""

    @property
    def passed(self) -> bool:
        """Whether it was tried, at least in part, and found nothing."""
        return not self.known_failure and self.check not in self.not_tested


def check_method(
    method: str | type[Method] | Method,
    config: Mapping[str, Any] | None = None,
    *,
    directory: Path | None = None,
    learning_rate: float = 5e-3,
    awkward: Mapping[str, Any] | None = None,
) -> MethodRecord:
    """Check a method on tiny models: untied, tied, with awkward sizes, with biases, and in bfloat16.

    Args:
        method: a registered name, a method class, or a method with its settings.
        config: settings that fit sizes 64, 32 and 128; not with a method that has them.
        directory: an empty directory for checkpoints; a temporary one if not given.
        learning_rate: with which the loss falls within four steps.
        awkward: settings for sizes 72, 36 and 140; None: the same.

    Returns:
        What was tried, what was measured by model, and what was not tested, with reasons.

    Raises:
        AssertionError: the method does not do what its card and the contract say; begins with the check's name.
    """
    reader()
    trial = Trial(method, config, directory=directory, learning_rate=learning_rate, awkward=awkward)
    return record_of(trial, [run_check(trial, name) for name in CHECKS])


def record_of(trial: Trial, results: Sequence[Result]) -> MethodRecord:
    """Return the record of a trial whose checks were run."""
    method = trial.plain.make()
    return MethodRecord(
        name=trial.name,
        source=trial.source(),
        config=method.config.model_dump(mode="json"),
        learning_rate=trial.plain.learning_rate,
        versions=versions(LIBRARIES),
        passed=tuple(result.check for result in results if result.passed),
        not_tested={place: reason for result in results for place, reason in result.not_tested.items()},
        known_failures={result.check: result.known_failure for result in results if result.known_failure},
        models=trial.facts(),
    )


def method_tests(
    method: str | type[Method] | Method,
    config: Mapping[str, Any] | None = None,
    *,
    learning_rate: float = 5e-3,
    awkward: Mapping[str, Any] | None = None,
) -> Callable[[str], None]:
    """Return a pytest function with one case per check; the arguments are those of :func:`check_method`."""
    import pytest

    trials: list[Trial] = []

    def test(check: str) -> None:
        if not trials:
            reader()
            trials.append(Trial(method, config, learning_rate=learning_rate, awkward=awkward))
        reason = run_check(trials[0], check).not_tested.get(check)
        if reason:
            pytest.skip(reason)

    return pytest.mark.parametrize("check", list(CHECKS))(test)


def run_check(trial: Trial, name: str) -> Result:
    """Run one check of :data:`CHECKS`; one that the card lists as a known failure must fail.

    Raises:
        AssertionError: the check failed, or did not fail though it is listed.
    """
    known = trial.plain.method.card.known_failures
    stray = set(known) - (set(CHECKS) - {"card"})
    assert not stray, f"{trial.name}: known_failures names {', '.join(sorted(stray))}, which is no check that may fail"
    if name not in ALWAYS and not trial.plain_models:
        return Result(name, {name: NEEDS_QUANTIZED})
    try:
        with one_thread():
            left = CHECKS[name](trial)
    except Exception as error:
        trial.forget()
        altered_shared_models()
        if name in known:
            return Result(name, known_failure=known[name])
        if isinstance(error, AssertionError | UserError):
            raise AssertionError(f"{trial.name}, check {name}: {error}") from error
        error.add_note(f"in check {name} of method {trial.name}")
        raise
    assert name not in known, f"{trial.name}: check {name} is listed in known_failures, and does not fail; remove it"
    return Result(name, _not_tested(name, left, set(trial.subjects)))


def _not_tested(name: str, left: str | dict[str, str] | None, models: set[str]) -> dict[str, str]:
    """Return what a check left out, by the check's name if that is everything."""
    if not left:
        return {}
    if isinstance(left, str):
        return {name: left}
    if set(left) == models and len(set(left.values())) == 1:
        return {name: next(iter(left.values()))}
    return {f"{name} on {model}": reason for model, reason in left.items()}
