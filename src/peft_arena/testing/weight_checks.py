"""Check of a checkpoint's weights, read without the method where they have a closed form, against the method itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_arena.methods.base import Capability
from peft_arena.testing.subject import EXACT, MERGE, ROUNDED, difference, logits, refuses, tokens
from peft_arena.testing.trial import Life, linear_weights, on_each_model

if TYPE_CHECKING:
    from peft_arena.weights.effective import EffectiveWeights


@on_each_model
def check_weights(life: Life) -> None:
    """Check changes against ``delta``, and both ends of the path against the pretrained and the tuned model."""
    from peft_arena.weights.base import BaseWeights
    from peft_arena.weights.effective import effective_weights, no_weights

    subject = life.subject
    method = subject.make()
    base = BaseWeights.of_model(subject.model())
    if not subject.has(Capability.LINEAR_DELTA) and not subject.has(Capability.MERGEABLE):
        assert no_weights(method), "a method that declares no weights has some"
        assert refuses(lambda: effective_weights(base, life.saved, method)), "prompts were taken for weights"
        return
    found = effective_weights(base, life.saved, method)
    if subject.has(Capability.LINEAR_DELTA):
        _check_changes(life, found)
    for factor, wanted, name in ((0.0, life.pretrained, "pretrained"), (1.0, life.tuned, "tuned")):
        model = subject.model()
        found.load_into(model)
        found.interpolated(factor).load_into(model)
        gap = difference(logits(model, tokens()), wanted)
        limit = 0.0 if factor == 0 else MERGE if subject.exact else ROUNDED
        assert gap <= limit, f"at factor {factor:g} of the path the model is {gap} away from the {name} one"


def _check_changes(life: Life, found: EffectiveWeights) -> None:
    import torch

    attached = life.attached if life.subject.exact else life.restored()
    for name in linear_weights(life.subject.model()):
        delta, pair = attached.delta(name), found.pair(name)
        wanted = torch.zeros_like(pair.base) if delta is None else delta
        change = torch.zeros_like(pair.base) if pair.change is None else pair.change.dense(pair.base)
        gap = difference(change, wanted)
        assert gap <= EXACT, f"the change of {name} read from the checkpoint is {gap} away from delta()"
