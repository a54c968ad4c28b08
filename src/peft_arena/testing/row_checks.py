"""Checks of evaluation: nothing is drawn, and a row's output depends on its own tokens alone, each on those before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft_arena.testing.alternatives import alternatives_of
from peft_arena.testing.subject import MERGE, difference, global_random_untouched, logits, tokens, under_noise
from peft_arena.testing.trial import Life, Trial, on_each_model

if TYPE_CHECKING:
    from torch import Tensor, nn

PADDED = 4
"""Tokens of padding."""


def check_evaluation(trial: Trial) -> None:
    """Check that evaluation draws no random numbers, whatever the settings, and that all modules follow the mode."""
    _evaluates(trial)
    for one in alternatives_of(trial).values():
        assert one.drawn == 0, f"with {one.said}, two evaluations of the same tokens differ by {one.drawn}"


@on_each_model
def _evaluates(life: Life) -> None:
    model = life.attached.model
    for name, one, before in (("trained", model, life.tuned), ("restored", life.reread.model, None)):
        with global_random_untouched():
            found = under_noise(one, 1) if before is None else before
            gap = difference(found, logits(one, tokens()))
            assert gap == 0, f"two evaluations of the {name} model differ by {gap}"
        stuck = [place for place, module in one.named_modules() if module.training]
        assert not stuck, f"a {name} model in evaluation mode has modules in training mode: {stuck[:3]}"


def check_rows(trial: Trial) -> dict[str, str]:
    """Check that other rows, padding, labels and later tokens change nothing of a token's logits."""
    import torch

    life = trial.life("untied")
    model, ids = life.attached.model.eval(), tokens()
    whole = _run(model, ids)
    alone = torch.cat([_run(model, row[None]) for row in ids])
    turned = _run(model, ids.flip(0)).flip(0)
    padding = torch.zeros_like(ids[:, :PADDED])
    mask = torch.cat([torch.ones_like(ids), padding], 1)
    right = _run(model, torch.cat([ids, padding], 1), attention_mask=mask)
    later = torch.cat([ids[:, :5], (ids[:, 5:] + 7) % 199 + 1], 1)
    seen = {
        "tokens after it": difference(_run(model, later)[:, :5], whole[:, :5]),
        "the other rows of its batch": difference(alone, whole),
        "its place in the batch": difference(turned, whole),
        "padding on its right": difference(right[:, : ids.shape[1]], whole),
        "a mask that hides nothing": difference(_run(model, ids, attention_mask=torch.ones_like(ids)), whole),
        "the labels": difference(_run(model, ids, labels=ids), whole),
    }
    left = _left_padded(life, ids)
    if left is not None:
        seen["padding on its left"] = difference(left, whole)
    for what, gap in seen.items():
        assert gap <= MERGE, f"logits of a token depend on {what}: they differ by {gap}"
    return {} if left is not None else {"rows padded on the left": "the arena never pads them so for this method"}


def _left_padded(life: Life, ids: Tensor) -> Tensor | None:
    """Return the logits of rows padded on the left as decoding pads them; None where it does not."""
    import torch

    from peft_arena.models.modes import accepts, virtual_tokens

    model = life.attached.model
    if virtual_tokens(model) or not accepts(model, "position_ids"):
        return None
    padding = torch.zeros_like(ids[:, :PADDED])
    mask = torch.cat([padding, torch.ones_like(ids)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    filled = torch.cat([padding + 5, ids], 1)
    return _run(model, filled, attention_mask=mask, position_ids=positions)[:, PADDED:]


def _run(model: nn.Module, ids: Tensor, **given: Any) -> Tensor:
    """Return the logits of the given tokens, shape (rows, tokens, vocabulary)."""
    import torch

    with torch.no_grad():
        found: Tensor = model(input_ids=ids, **given).logits[:, -ids.shape[1] :].float()
    return found
