"""Checks of a checkpoint's weights, read without the method where they have a closed form, against the method itself.

Both ends of the path, what kind it is, and points on it as files of the adapter's own type.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_arena.methods.base import Capability, PathKind
from peft_arena.testing.subject import EXACT, MERGE, ROUNDED, difference, logits, refuses, tokens
from peft_arena.testing.trial import Life, linear_weights, on_each_model

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from peft_arena.core.specs import Way
    from peft_arena.weights.effective import EffectiveWeights

ORTHOGONAL = 1e-5
"""Largest ||R^T R - I||_F of a rotation's blocks, on its path and beyond the tuned model."""
ON_THE_WAY = (0.3, 1.0, 1.2)
HALFWAY = 0.5


@on_each_model
def check_weights(life: Life) -> str | None:
    """Check changes against ``delta``, and both ends of the path against the pretrained and the tuned model."""
    from peft_arena.methods.base import no_weights
    from peft_arena.weights.base import BaseWeights
    from peft_arena.weights.effective import effective_weights

    subject = life.subject
    method = subject.make()
    base = BaseWeights.of_model(subject.untouched())
    if not subject.has(Capability.LINEAR_DELTA) and not subject.has(Capability.MERGEABLE):
        assert no_weights(method), "a method that declares no weights has some"
        assert refuses(lambda: effective_weights(base, life.saved, method)), "prompts were taken for weights"
        return None
    found = effective_weights(base, life.saved, method)
    if subject.has(Capability.LINEAR_DELTA):
        _check_changes(life, found)
    model = subject.model()
    found.load_into(model)
    for factor, wanted, name in ((0.0, life.pretrained, "pretrained"), (1.0, life.tuned, "tuned")):
        found.interpolated(factor).load_into(model)
        gap = difference(logits(model, tokens()), wanted)
        limit = 0.0 if factor == 0 else MERGE if subject.exact else ROUNDED
        assert gap <= limit, f"at factor {factor:g} of the path the model is {gap} away from the {name} one"
    return None


def _check_changes(life: Life, found: EffectiveWeights) -> None:
    import torch

    restored = None if life.subject.exact else life.reread
    for name in linear_weights(life.subject.untouched()):
        delta, pair = life.deltas[name] if restored is None else restored.delta(name), found.pair(name)
        wanted = torch.zeros_like(pair.base) if delta is None else delta
        change = torch.zeros_like(pair.base) if pair.change is None else pair.change.dense(pair.base)
        gap = difference(change, wanted)
        assert gap <= EXACT, f"the change of {name} read from the checkpoint is {gap} away from delta()"


@on_each_model
def check_path(life: Life) -> str | None:
    """Check the card's path against the weights, every way's ends, and a point in files of the adapter's own type."""
    from peft_arena.methods.base import no_weights
    from peft_arena.weights.base import BaseWeights
    from peft_arena.weights.effective import effective_weights

    subject = life.subject
    method, said = subject.make(), subject.method.card.path
    if no_weights(method):
        assert said is PathKind.NONE, f"the card names a path, {said}, of a method that has no weights"
        return "the method has no weights, and so no path"
    assert said is not PathKind.NONE, "the card names no path of a method that has weights"
    found = effective_weights(BaseWeights.of_model(subject.untouched()), life.saved, method)
    changes = [found.pair(name).change for name in found.modules()]
    kinds = {change.path for change in changes if change is not None}
    assert found.path_kinds() | kinds == {said}, (
        f"the card says that the path is {said}, the weights go {' and '.join(sorted(found.path_kinds() | kinds))}"
    )
    if not subject.exact:
        return None
    model = subject.model()
    ways: tuple[Way, ...] = ("linear", "sqrt") if said is PathKind.CAYLEY else ("linear",)  # check_weights goes "own"
    for way in ways:
        _check_ends(life, model, found.along(way), way)
    if said is PathKind.CAYLEY:
        for factor in ON_THE_WAY:
            away = found.interpolated(factor).orthogonality()
            assert away is not None, f"at factor {factor:g} there is no rotation though the card says {said}"
            assert away <= ORTHOGONAL, f"at factor {factor:g} of the path ||R^T R - I|| is {away}: no rotation"
    _check_files(life, model, found.interpolated(HALFWAY))
    return None


def _check_ends(life: Life, model: PreTrainedModel, found: EffectiveWeights, way: str) -> None:
    """Check both ends of a way, the tuned one first, on a model that is moved from point to point."""
    for factor, wanted, name in ((1.0, life.tuned, "tuned"), (0.0, life.pretrained, "pretrained")):
        gap = difference(_outputs(model, found.interpolated(factor)), wanted)
        assert gap <= MERGE, f"at factor {factor:g} of the way {way} the model is {gap} away from the {name} one"


def _check_files(life: Life, model: PreTrainedModel, point: EffectiveWeights) -> None:
    """Check that a point, written in files of the adapter's own type, is restored by the method as what it is."""
    from peft_arena.weights.adapter_files import express, write_adapter

    files = express(point)
    if files is None:
        return
    out = life.directory / "on-the-path"
    if not out.exists():
        write_adapter(files, out)
    restored = life.subject.make().restore(life.subject.model(), out)
    gap = difference(logits(restored.model, tokens()), _outputs(model, point))
    assert gap <= MERGE, f"at factor {point.factor:g} the adapter's files give {gap} else than the weights"


def _outputs(model: PreTrainedModel, point: EffectiveWeights) -> Tensor:
    point.load_into(model)
    return logits(model, tokens())
