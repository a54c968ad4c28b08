"""Intruder dimensions: scale down the large singular directions that fine-tuning added, and leave all else.

Differences from the paper are on the card.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from peft_arena.methods.base import Capability
from peft_arena.paths.base import TUNED, Plan, Progress, Rule, RuleCard, RuleConfig
from peft_arena.paths.strength import may_change

if TYPE_CHECKING:
    from torch import Tensor

    from peft_arena.weights.change import LowRank, Svd
    from peft_arena.weights.effective import EffectiveWeights


class IntruderConfig(RuleConfig):
    """Settings of the rule."""

    top: int = Field(default=10, ge=1)
    """So many of the first left singular vectors of the tuned weight are looked at."""
    threshold: float = Field(default=0.5, gt=0, le=1)
    """One is an intruder if its largest |cosine| with any left singular vector of W0 is below this."""


class Intruder(Rule):
    """W1 + (f - 1) sum_j s_j u_j v_j^T over the intruders j of the tuned weight W1 of each linear layer.

    W0 = U0 diag(s0) V0^T and W1 = W0 + D = U diag(s) V^T. Intruders are those of the first ``top`` columns u_j of U
    with max_i |u_j^T u0_i| < ``threshold`` (Shuttleworth et al., 2024, with k and epsilon). Factor 1 is the tuned
    model; factor 0 is the tuned model without intruders, not the pretrained one.

    The sum is taken of W1 and added as it is, so that the rank of the change grows by the number of intruders. The
    output layer and parameters that are no weight of a linear layer stay as tuned.
    """

    Config: ClassVar[type[RuleConfig]] = IntruderConfig
    config: IntruderConfig
    card: ClassVar[RuleCard] = RuleCard(
        name="intruder",
        title="Intruder dimensions",
        paper="Shuttleworth et al., 2024, LoRA vs Full Fine-tuning: An Illusion of Equivalence",
        url="https://arxiv.org/abs/2410.21228",
        description="Singular directions of the tuned weight that are unlike all of the pretrained one are scaled.",
        zero="the tuned model without its intruder dimensions, which is not the pretrained model",
        one=TUNED,
        needs=frozenset({Capability.LORA_ADAPTER}),
        deviations=(
            "peft's reduce_intruder_dimension cuts the result back to the adapter's rank: here it is exact, and the "
            "rank grows by the number of intruders.",
        ),
    )

    def refuses(self, weights: EffectiveWeights) -> str:
        """Return the first change of a linear layer that is not low-rank; empty if there is none."""
        from peft_arena.weights.change import LowRank

        changed = [name for name in weights.modules() if may_change(weights, name)]
        for name in changed:
            change = weights.changes.makers[weights.base_weights.canonical(f"{name}.weight")]()
            if change is not None and not isinstance(change, LowRank):
                return f"it is for low-rank changes, such as those of LoRA, and that of {name} is none"
        return "" if changed else "it is for low-rank changes of linear layers, and no linear layer is changed"

    def plan(self, weights: EffectiveWeights, progress: Progress) -> Plan:
        """Decompose each changed weight once, and W0 unless its decomposition is kept."""
        found: dict[str, LowRank] = {}
        changed = [name for name in weights.modules() if may_change(weights, name)]
        for done, name in enumerate(changed):
            progress(done / len(changed), name)
            intruders = self._of_layer(weights, name)
            if intruders is not None:
                found[f"{name}.weight"] = intruders
        progress(1.0, "")

        def at(factor: float) -> EffectiveWeights:
            if factor == 1.0 or not found:
                return weights
            return weights.plus({name: _times(change, factor - 1) for name, change in found.items()})

        return at

    def _of_layer(self, weights: EffectiveWeights, name: str) -> LowRank | None:
        """Return sum_j s_j u_j v_j^T over the intruders of one linear layer; None if it has none."""
        import torch

        from peft_arena.weights.svd import svd

        base, change = weights.pair(name)
        if change is None:
            return None
        before = self.cache.get(base, weights.base_hash(f"{name}.weight"), torch.float32)
        after = svd(base + change.dense(base), torch.float32)
        return intruders(before.left, after, self.config.top, self.config.threshold)


def intruders(before: Tensor, after: Svd, top: int, threshold: float) -> LowRank | None:
    """Return the part of a tuned weight that lies in its intruder dimensions.

    Args:
        before: left singular vectors of W0 as columns, shape (out, k).
        after: decomposition of the tuned weight.
        top: how many of its first left singular vectors are looked at.
        threshold: an intruder's largest |cosine| with any of W0's is below this.

    Returns:
        sum_j s_j u_j v_j^T as factors of the rank of the number of intruders; None if there are none.
    """
    from peft_arena.weights.change import LowRank

    nearest = (after.left[:, :top].T @ before).abs().amax(dim=1)  # (top,)
    places = (nearest < threshold).nonzero().flatten()
    if not len(places):
        return None
    return LowRank(after.left[:, places] * after.values[places], after.right[places].clone())


def _times(change: LowRank, factor: float) -> LowRank:
    from peft_arena.weights.change import LowRank

    return LowRank(factor * change.b, change.a)
