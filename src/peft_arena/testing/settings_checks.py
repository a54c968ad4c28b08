"""Checks of settings: each changes something, none makes evaluation random, and what is restored goes by them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_arena.core.errors import UserError
from peft_arena.methods.base import Attached, Capability
from peft_arena.testing.alternatives import Tried, all_changed, alternative_value, alternatives_of, tried
from peft_arena.testing.equation import names_in
from peft_arena.testing.life_checks import reload_limit
from peft_arena.testing.subject import EXACT, MERGE, difference, logits, tokens
from peft_arena.testing.trial import Life, Trial, linear_weights

CLEAR = 0.01
"""Difference of logits from which on a setting says what the trained numbers mean, whatever else is rounded.

A method that saves its result as a plain LoRA may restore it whatever its own settings are: they say how it was found,
and the numbers of a setting that acts in training alone differ by less. A setting that changes outputs by less than
this is therefore not tried here; ``equation`` tries those that the card's equation names.
"""


def check_fields(trial: Trial) -> str | None:
    """Check that every setting changes something, and that equal settings change nothing."""
    subject = trial.plain
    reference, life = tried(subject, "").fingerprint, trial.life("untied")
    begun = {f"start {name}": tensor for name, tensor in life.start.items()}
    again = {name: value for name, value in reference.items() if name.startswith("start ")}
    assert not changed(begun, again), f"two equal runs differ in {changed(begun, again)}"
    first, second = life.losses[:1], reference["losses"][:1]  # schedules of the method know the number of steps
    assert first == second, f"two equal runs differ in their losses: {first} and {second}"
    for name, one in alternatives_of(trial).items():
        value = alternative_value(subject, name)
        assert changed(reference, one.fingerprint), f"setting {name} to {value!r} changed nothing"
    return None if subject.method.Config.alternatives else "the method has no settings"


def changed(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Return the names under which two fingerprints differ."""
    import torch

    def equal(one: object, two: object) -> bool:
        if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
            return one.shape == two.shape and torch.equal(one, two)
        return bool(one == two)

    return sorted(name for name in {*first, *second} if not equal(first.get(name), second.get(name)))


def check_settings(trial: Trial) -> str | None:
    """Check restoring, changes and merging with changed settings, and that a checkpoint of others is not its own."""
    if not trial.plain.method.Config.alternatives:
        return "the method has no settings"
    for one in all_changed(trial):
        _check_own(one)
    for name, one in alternatives_of(trial).items():
        _check_others(trial.life("untied"), name, one)
    return None


def _check_own(one: Tried) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        saved = Path(scratch) / "checkpoint"
        one.attached.save(saved)
        restored = one.subject.make().restore(one.subject.model(), saved)
    gap = difference(logits(restored.model, tokens()), one.fingerprint["outputs"])
    assert gap <= reload_limit(one.subject), f"with {one.said}, the restored model is {gap} away from the saved one"
    _check_merge(one, restored)


def _check_merge(one: Tried, restored: Attached) -> None:
    """Check the merged model and the changes of weights with changed settings; the restored one is used up."""
    import torch

    if not one.subject.has(Capability.MERGEABLE):
        return
    before = linear_weights(one.subject.untouched())
    try:
        linear = one.subject.has(Capability.LINEAR_DELTA)
        deltas = {name: one.attached.delta(name) for name in before} if linear else {}
        merged = restored.merged()
    except UserError:
        return  # not with these settings
    gap = difference(logits(merged, tokens()), one.fingerprint["outputs"])
    assert gap <= MERGE, f"with {one.said}, the merged model is {gap} away from the tuned one"
    after = linear_weights(merged)
    for name, delta in deltas.items():
        change = torch.zeros_like(before[name]) if delta is None else delta
        gap = difference(before[name] + change, after[name])
        assert gap <= EXACT, f"with {one.said}, delta of {name} is {gap} away from merged minus pretrained"


def _check_others(life: Life, name: str, one: Tried) -> None:
    """Check that a method with a changed setting does not restore a checkpoint as if it were not changed.

    It may do so only if the setting says nothing about what the trained numbers mean: dropout, or how they began.
    """
    try:
        one.attached.load_state(life.state())
        meant = difference(logits(one.attached.model, tokens()), life.tuned)
    except UserError:
        if name not in names_in(life.subject.method.card.equation or "W")[0]:
            return  # what is saved may have another form than what trains, and not depend on it
        meant = float("inf")
    if meant <= CLEAR:
        return
    try:
        restored = one.subject.make().restore(life.subject.model(), life.saved)
    except UserError:
        return
    gap = difference(logits(restored.model, tokens()), life.tuned)
    assert gap > MERGE, f"with {one.said}, restore() took a checkpoint of other settings and ignored its own"
