"""Checks of what a method says about itself: card, settings, counts, sizes, seeds, calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from peft_arena.core.errors import UserError
from peft_arena.methods.base import Calibration, Capability, Method
from peft_arena.methods.registry import METHODS
from peft_arena.testing.subject import Subject, calibration, logits, refuses, tiny_model, tokens, train
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


def check_quantized_base(trial: Trial) -> None:
    """Check that a method which needs a quantised base refuses a plain one; others are tried on plain ones."""
    if trial.plain.has(Capability.NEEDS_QUANTIZED_BASE):
        assert trial.plain.has(Capability.QUANTIZED_BASE), "it needs a quantised base and does not declare to take one"
        assert refuses(trial.plain.attach), "it needs a quantised base, and attaches to a plain one"


def check_calibration(trial: Trial) -> None:
    """Check that a method asks for calibration data exactly if its card says so, and refuses to do without."""
    subject, method = trial.plain, trial.plain.make()
    needs = subject.has(Capability.NEEDS_CALIBRATION)
    assert needs == (method.calibration_examples > 0), (
        f"calibration_examples is {method.calibration_examples}, and the card says needs_calibration: {needs}"
    )
    if not needs:
        return
    for what, given in (("without", None), ("with empty", Calibration([]))):
        attach = partial(method.attach, subject.model(), seed=0, calibration=given)
        assert refuses(attach), f"attaches {what} calibration data"


@on_each_model
def check_count(life: Life) -> None:
    """Check the declared number of trained parameters, with and without weights."""
    method, kind = life.subject.make(), life.subject.kind
    declared = method.trained_count(life.subject.model())
    if declared is None and method.card.name not in METHODS:
        return
    assert declared == life.parameters, f"count() says {declared}, {life.parameters} parameters train"
    shapes = method.trained_count(tiny_model(kind, life.subject.dtype, device="meta"))
    assert shapes == declared, f"count() says {shapes} without weights (meta device), {declared} with them"


def check_sizes(trial: Trial) -> None:
    """Check the sizes a budget may choose from: they fit, their count grows, and no other is taken for one of them."""
    setting = trial.plain.method.size
    if setting is not None:
        _check_inside(trial.odd, setting)
        _check_outside(trial.plain, setting, _check_inside(trial.plain, setting))


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
    first, same, other = (subject.attach(seed=seed).state() for seed in (5, 5, 6))
    assert list(first) == list(same) == list(other), "names of the state depend on the seed"
    assert all(torch.equal(first[name], same[name]) for name in first), "the same seed gives another start"
    differs = any(not torch.equal(first[name], other[name]) for name in first)
    assert differs == subject.method.card.random_init, f"another seed changes the start: {differs}; the card disagrees"


def check_fields(trial: Trial) -> None:
    """Check that every setting changes something, and that equal settings change nothing."""
    subject = trial.plain
    reference = fingerprint(subject)
    repeated = fingerprint(subject)
    assert not changed(reference, repeated), f"two equal runs differ in {changed(reference, repeated)}"
    kind, given = subject.method.Config, subject.make().config
    for name, alternative in kind.alternatives.items():
        default = kind.model_fields[name].get_default(call_default_factory=True)
        value = alternative if _set(subject, name, alternative) != getattr(given, name) else default
        assert _set(subject, name, value) != getattr(given, name), f"{name}: its alternative is its default"
        other = replace(subject, config={**subject.config, name: value})
        assert changed(reference, fingerprint(other)), f"setting {name} to {value!r} changed nothing"


def _set(subject: Subject, name: str, value: object) -> object:
    return getattr(subject.make(**{name: value}).config, name)


def fingerprint(subject: Subject) -> dict[str, Any]:
    """Return what a setting can change: start, optimizer groups, losses in training mode, outputs afterwards."""
    attached = subject.attach()
    start = {f"start {name}": tensor.clone() for name, tensor in attached.state().items()}
    groups = [(len(g["params"]), g["lr"], g["weight_decay"]) for g in attached.parameter_groups(1.0, 0.1)]
    losses = train(attached, subject.learning_rate, steps=2)[0] if attached.trained() else []
    return {**start, "groups": groups, "losses": losses, "outputs": logits(attached.model, tokens())}


def changed(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Return the names under which two fingerprints differ."""
    import torch

    def equal(one: object, two: object) -> bool:
        if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
            return one.shape == two.shape and torch.equal(one, two)
        return bool(one == two)

    return sorted(name for name in {*first, *second} if not equal(first.get(name), second.get(name)))
