"""Checks that training follows the loss: gradients are its slopes, and training mode computes what evaluation does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_arena.methods.base import Attached
from peft_arena.methods.state import seed_torch
from peft_arena.testing.subject import MERGE, STEPS, Subject, difference, logits, tokens

if TYPE_CHECKING:
    from torch import Tensor, nn

NUDGE = 0.05
"""Standard deviation of what is added to every trained number, so that gradients are tried away from the start."""
CHANGE = 4e-3
"""By how much the first step along the gradient of one parameter is to change the loss, which is about 8."""
NOISE = 2e-6
"""Error of a difference of two such losses in float32."""
REACH = 0.1
"""Longest such step, as a part of the parameter's own length or of 1, whichever is more."""
SHORTER = (1.0, 1 / 4, 1 / 16, 1 / 64)
"""Parts of the first step that are tried until one fits: long ones cross kinks, such as those of a ReLU."""
SLOPE = 0.05
"""Largest part by which the length of a gradient may differ from the slope of the loss along it, besides the noise.

The slope along an orthogonal projection of the loss's gradient is the projection's length: such gradients pass.
"""


def check_slopes(subject: Subject) -> dict[str, str]:
    """Check each parameter's gradient against differences of the loss, and the outputs of the two modes.

    Returns:
        Why something was not tested, by what.
    """
    attached = _moved(subject)
    return {**_check_modes(attached), **_check_each_slope(subject, attached)}


def _moved(subject: Subject) -> Attached:
    """Return an attachment in training whose numbers are away from their start."""
    import torch

    attached = subject.attach()
    attached.begin(STEPS)
    generator = torch.Generator().manual_seed(23)
    with torch.no_grad():
        for parameter in attached.trained().values():
            parameter.add_(NUDGE * torch.randn(parameter.shape, generator=generator))
    return attached


def _check_modes(attached: Attached) -> dict[str, str]:
    """Check that without dropout and other noise, training mode gives the outputs of evaluation mode."""
    first, second = (_in_training(attached.model, seed) for seed in (1, 2))
    if difference(first, second) > 0:
        return {"the mode of training": "the method draws random numbers in training"}
    gap = difference(first, logits(attached.model, tokens()))
    assert gap <= MERGE, (
        f"nothing is random, and in training mode the outputs are {gap} away from those in evaluation mode"
    )
    return {}


def _in_training(model: nn.Module, seed: int) -> Tensor:
    """Return the logits of a pass in training mode, with a random state of its own."""
    import torch

    ids = tokens()
    model.train()
    with torch.no_grad(), torch.random.fork_rng():
        seed_torch(seed)
        found: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :].float()
    return found


def _check_each_slope(subject: Subject, attached: Attached) -> dict[str, str]:
    if subject.method.card.other_gradients:
        return {"the slopes of the loss": subject.method.card.other_gradients}
    attached.model.train()
    _loss(attached).backward()
    gradients = {name: p.grad.clone() for name, p in attached.trained().items() if p.grad is not None}
    attached.model.zero_grad(set_to_none=True)
    wrong = [found for name, gradient in gradients.items() if (found := _wrong_slope(attached, name, gradient))]
    assert not wrong, (
        f"gradients are not those of the loss: {wrong[0]} ({len(wrong)} of {len(gradients)} parameters); if that is "
        "meant, the card says why (other_gradients)"
    )
    return {}


def _wrong_slope(attached: Attached, name: str, gradient: Tensor) -> str:
    """Return what is wrong with the gradient of one parameter; empty if nothing, or if it is too short to tell."""
    parameter, length = attached.trained()[name], float(gradient.norm())
    if length == 0:
        return ""
    longest = min(CHANGE / length, REACH * max(1.0, float(parameter.detach().norm())))
    seen: list[float] = []
    for step in (longest * part for part in SHORTER):
        if NOISE / step > length / 2:
            break
        seen.append(_slope(attached, parameter, gradient / length, step))
        if abs(seen[-1] - length) <= SLOPE * length + NOISE / step:
            return ""
    if not seen:
        return ""
    return f"{name} has a gradient of length {length:.4g}, along which the loss rises by {seen[-1]:.4g}"


def _slope(attached: Attached, parameter: Tensor, direction: Tensor, step: float) -> float:
    """Return the slope of the loss along a direction of one parameter, by the difference of two losses."""
    import torch

    start = parameter.detach().clone()
    losses = []
    with torch.no_grad():
        for side in (1, -1):
            parameter.copy_(start + side * step * direction)
            losses.append(float(_loss(attached)))
        parameter.copy_(start)
    return (losses[0] - losses[1]) / (2 * step)


def _loss(attached: Attached) -> Tensor:
    """Return the loss of one pass in training mode, with what the method adds, under one random state."""
    import torch

    ids = tokens()
    with torch.random.fork_rng():
        seed_torch(5)
        loss: Tensor = attached.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        extra = attached.extra_loss()
    return loss if extra is None else loss + extra
