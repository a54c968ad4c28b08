"""Checks that attachments have nothing in common, and that nothing is left changed that is not the method's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_arena.methods.base import Attached, Capability
from peft_arena.testing.subject import altered_shared_models, difference, every_tensor, logits, tokens, train
from peft_arena.testing.trial import Life, Trial

if TYPE_CHECKING:
    from torch import Tensor


def check_apart(trial: Trial) -> None:
    """Check two attachments side by side, and after all other checks the base models and fresh models."""
    import torch

    life, subject = trial.life("untied"), trial.plain
    first, second = subject.attach(), subject.attach()
    for name, tensor in first.state().items():
        same = name in life.start and torch.equal(tensor, life.start[name])
        assert same, f"a new attachment begins elsewhere than the first one did, in {name}: something was remembered"
    before = {name: tensor.detach().clone() for name, tensor in every_tensor(second.model).items()}
    shared = _places(first) & _places(second)
    assert not shared, "two attachments share memory of what trains"
    if first.trained():
        train(first, subject.learning_rate, steps=1)
    moved = [name for name, tensor in every_tensor(second.model).items() if not torch.equal(tensor, before[name])]
    assert not moved, f"training one attachment changed another, in {moved[:3]}"
    gap = difference(logits(subject.model(), tokens()), life.pretrained)
    assert gap == 0, f"after all of this a fresh model without the method gives outputs {gap} away"
    altered = altered_shared_models()
    assert not altered, f"the method changed models that it was only to look at: {', '.join(altered)}"
    for name in trial.subjects:
        _check_base(trial.life(name), name)


def _places(attached: Attached) -> set[int]:
    return {p.untyped_storage().data_ptr() for p in attached.trained().values()}


def _check_base(life: Life, name: str) -> None:
    """Check that the base is still, bit for bit, what it was before the method was attached."""
    import torch

    if life.subject.has(Capability.CHANGES_BASE):
        return
    fresh = life.subject.untouched()
    pairs: list[tuple[str, Tensor, Tensor]] = [
        *((place, now, was) for now, (place, was) in zip(life.base, fresh.named_parameters(), strict=True)),
        *((place, now, was) for now, (place, was) in zip(life.buffers, fresh.named_buffers(), strict=True)),
    ]
    wrong = [place for place, now, was in pairs if not torch.equal(now, was)]
    assert not wrong, f"on the {name} model: weights or buffers of the base are not what they were: {wrong[:3]}"
