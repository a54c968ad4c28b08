"""Checks of what a method says about itself: card, counts, sizes, seeds, calibration."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from peft_arena.core.errors import UserError
from peft_arena.methods.base import Calibration, Capability, Method
from peft_arena.methods.registry import METHODS
from peft_arena.testing.equation import names_in
from peft_arena.testing.equation_checks import FUNCTIONS
from peft_arena.testing.subject import Subject, calibration, refuses, tiny_model
from peft_arena.testing.trial import Life, Trial, on_each_model

ENOUGH = 8
"""Calibration examples with which any size can be attached: data may limit it too."""
MANY = 40
"""Sizes of a list that are counted; of longer ones, so many evenly spread."""


def check_card(trial: Trial) -> None:
    """Check that a card is complete and does not contradict itself, and that every setting is explained."""
    subject = trial.plain
    card, config = subject.method.card, subject.method.Config
    assert card.title and card.paper and card.parameters and card.description, f"{card.name}: an empty card entry"
    trains = subject.has(Capability.TRAINS)
    assert trains == (card.learning_rate is not None), f"{card.name}: a learning rate if and only if it trains"
    assert trains or not config.model_fields, f"{card.name}: settings of a method that does not train do nothing"
    for name, field in config.model_fields.items():
        assert name in config.alternatives, f"{card.name}: Config.alternatives has no value for {name}"
        assert field.description, f"{card.name}: the setting {name} has no docstring"
    stray = set(config.alternatives) - set(config.model_fields)
    assert not stray, f"{card.name}: Config.alternatives names {stray}, which are no fields"
    size = subject.method.size
    assert size is None or size in config.model_fields, f"{card.name}: its size '{size}' is no setting"
    if card.equation is not None:
        names, functions = names_in(card.equation)
        unknown = sorted(functions - set(FUNCTIONS))
        assert not unknown, f"{card.name}: its equation calls {', '.join(unknown)}; known: {', '.join(FUNCTIONS)}"
        assert names & {"W", "R"}, f"{card.name}: its equation does not begin from a weight, W or R: {card.equation}"


def check_quantized_base(trial: Trial) -> str | None:
    """Check that a method which needs a quantised base refuses a plain one; others are tried on plain ones."""
    if trial.plain.has(Capability.NEEDS_QUANTIZED_BASE):
        assert trial.plain.has(Capability.QUANTIZED_BASE), "it needs a quantised base and does not declare to take one"
        assert refuses(trial.plain.attach), "it needs a quantised base, and attaches to a plain one"
        return None
    return "the method takes plain weights, and is tried on them"


def check_calibration(trial: Trial) -> str | None:
    """Check that a method asks for calibration data exactly if its card says so, and refuses to do without."""
    subject, method = trial.plain, trial.plain.make()
    needs = subject.has(Capability.NEEDS_CALIBRATION)
    assert needs == (method.calibration_examples > 0), (
        f"calibration_examples is {method.calibration_examples}, and the card says needs_calibration: {needs}"
    )
    if not needs:
        return "the method takes no calibration data"
    for what, given in (("without", None), ("with empty", Calibration([]))):
        attach = partial(method.attach, subject.model(), seed=0, calibration=given)
        assert refuses(attach), f"attaches {what} calibration data"
    return None


@on_each_model
def check_count(life: Life) -> str | None:
    """Check the declared number of trained parameters, with and without weights."""
    method, kind = life.subject.make(), life.subject.kind
    declared = method.trained_count(life.subject.untouched())
    if declared is None and method.card.name not in METHODS:
        return "the method offers no count"
    assert declared == life.parameters, f"count() says {declared}, {life.parameters} parameters train"
    shapes = method.trained_count(tiny_model(kind, life.subject.dtype, device="meta"))
    assert shapes == declared, f"count() says {shapes} without weights (meta device), {declared} with them"
    return None


def check_sizes(trial: Trial) -> str | None:
    """Check the sizes a budget may choose from: they fit, their count grows, and no other is taken for one of them."""
    setting = trial.plain.method.size
    if setting is None:
        return "no setting sizes the method"
    _check_inside(trial.odd, setting)
    _check_outside(trial.plain, setting, _check_inside(trial.plain, setting))
    return None


def _check_inside(subject: Subject, setting: str) -> list[Any]:
    """Check the sizes that are offered for a model, and return them."""
    model = tiny_model(subject.kind, device="meta")
    values = list(subject.make().sizes(model))
    assert values, f"sizes() offers no {setting} for the {subject.kind} model"
    some = [values[index * (len(values) - 1) // (MANY - 1)] for index in range(MANY)] if len(values) > MANY else values
    counts = [_count(subject, model, setting, value) for value in some]
    assert counts == sorted(counts), f"the count does not grow along sizes(): {counts}"
    for value, declared in ((some[0], counts[0]), (some[-1], counts[-1])):
        found = _attached(subject, setting, value)
        assert found == declared, f"{setting}={value}: count() says {declared}, {found} parameters train"
    return values


def _check_outside(subject: Subject, setting: str, values: Sequence[Any]) -> None:
    """Check that numbers just outside of the sizes are refused, or are sizes of their own."""
    if not all(isinstance(value, int | float) for value in values):
        return
    model = tiny_model(subject.kind, device="meta")
    assert refuses(partial(subject.make, **{setting: -1})), f"{setting}=-1 is taken"
    for value in _outside(values):
        try:
            declared = _count(subject, model, setting, value)
        except UserError as error:
            assert "\n" not in str(error), f"{setting}={value} is refused in more than one line"
            assert refuses(partial(_attached, subject, setting, value)), f"{setting}={value} is attached, not counted"
            continue
        found = _attached(subject, setting, value)
        assert found == declared, f"{setting}={value}, outside sizes(): count() says {declared}, {found} train"
        nearest = min(values, key=lambda known: abs(known - value))
        assert declared != _count(subject, model, setting, nearest), (
            f"{setting}={value}, outside sizes(), is silently taken for {nearest}"
        )


def _count(subject: Subject, model: Any, setting: str, value: object) -> int:
    found = subject.make(**{setting: value}).trained_count(model)
    assert found is not None, f"a method with a size needs count(); it has none for {setting}={value}"
    return found


def _attached(subject: Subject, setting: str, value: object) -> int:
    """Attach with another size and return the number of trained parameters."""
    method: Method = subject.make(**{setting: value})
    given = calibration(max(method.calibration_examples, ENOUGH) if method.calibration_examples else 0)
    return sum(p.numel() for p in method.attach(subject.model(), seed=0, calibration=given).trained().values())


def _outside(values: Sequence[Any]) -> list[Any]:
    """Return values just outside of a list of numbers: below, above, and in its first gap."""
    if not all(isinstance(value, int) for value in values):
        return [] if 0 in values else [0]
    known, low, high = set(values), min(values), max(values)
    gap = [value for value in range(low, high) if value not in known][:1]
    return sorted({0, low - 1, high + 1, *gap} - known)


def check_seeds(trial: Trial) -> None:
    """Check that a seed fixes the start, and that another one changes it exactly where the card says so."""
    import torch

    subject = trial.plain
    first, same, other = trial.life("untied").start, subject.attach().state(), subject.attach(seed=6).state()
    assert list(first) == list(same) == list(other), "names of the state depend on the seed"
    assert all(torch.equal(first[name], same[name]) for name in first), "the same seed gives another start"
    differs = any(not torch.equal(first[name], other[name]) for name in first)
    assert differs == subject.method.card.random_init, f"another seed changes the start: {differs}; the card disagrees"
