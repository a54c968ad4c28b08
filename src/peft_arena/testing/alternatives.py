"""A method with each of its settings changed in turn: tried once, and looked at by several checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from peft_arena.core.errors import UserError
from peft_arena.testing.subject import Subject, difference, logits, tokens, train, under_noise
from peft_arena.testing.trial import Trial

if TYPE_CHECKING:
    from peft_arena.methods.base import Attached


@dataclass(frozen=True)
class Tried:
    """What one attachment did."""

    subject: Subject
    said: str
    """The settings that were changed, for messages."""
    fingerprint: Mapping[str, Any]
    """What a setting can change: start, optimizer groups, losses in training mode, outputs afterwards."""
    drawn: float
    """Difference of two evaluations under other random states."""
    attached: Attached
    """Trained for two steps."""


def alternatives_of(trial: Trial) -> dict[str, Tried]:
    """Return what the method did with each setting changed alone, by its name."""
    for name in trial.plain.method.Config.alternatives:
        if name not in trial.kept:
            value = alternative_value(trial.plain, name)
            trial.kept[name] = tried(changed_setting(trial.plain, name), f"{name} = {value!r}")
    return trial.kept


def alternative_value(subject: Subject, name: str) -> Any:
    """Return a value of a setting unlike the one under test: its alternative, or its default."""
    kind, given = subject.method.Config, getattr(subject.make().config, name)
    alternative = kind.alternatives[name]
    default = kind.model_fields[name].get_default(call_default_factory=True)
    value = alternative if _set(subject, name, alternative) != given else default
    assert _set(subject, name, value) != given, f"{name}: its alternative is its default"
    return value


def changed_setting(subject: Subject, name: str) -> Subject:
    """Return a subject with one setting changed."""
    return replace(subject, config={**subject.config, name: alternative_value(subject, name)})


def all_changed(trial: Trial) -> list[Tried]:
    """Return one try with every setting changed at once; where that is refused, the tries of one setting each."""
    names = list(trial.plain.method.Config.alternatives)
    together = {name: alternative_value(trial.plain, name) for name in names}
    try:
        return [tried(replace(trial.plain, config={**trial.plain.config, **together}), "every setting changed")]
    except UserError:
        return list(alternatives_of(trial).values())


def tried(subject: Subject, said: str) -> Tried:
    """Attach, train two steps, and evaluate twice."""
    attached = subject.attach()
    start = {f"start {name}": tensor.clone() for name, tensor in attached.state().items()}
    groups = [(len(g["params"]), g["lr"], g["weight_decay"]) for g in attached.parameter_groups(1.0, 0.1)]
    losses = train(attached, subject.learning_rate, steps=2)[0] if attached.trained() else []
    outputs, again = logits(attached.model, tokens()), under_noise(attached.model, 2)
    found = {**start, "groups": groups, "losses": losses, "outputs": outputs}
    return Tried(subject, said, found, difference(outputs, again), attached)


def _set(subject: Subject, name: str, value: object) -> object:
    return getattr(subject.make(**{name: value}).config, name)
