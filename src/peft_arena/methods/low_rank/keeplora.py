"""KeepLoRA: low-rank adaptation that keeps out of the directions the pretrained weight uses most.

1. G is the gradient of the task's loss at the pretrained weight W0, on training examples.
2. With P the ``protected_rank`` principal right singular vectors of W0 as columns, G' = G (I - P P^T).
3. The largest ``rank`` components U S V^T of G' start A0 = V^T and B0 = U S.
4. A is frozen; only B trains, so that a change of W0 never reaches inputs in the span of P.

s B0 A0 is taken out of the frozen weight, see :mod:`split`: the model starts as the pretrained one, whatever the size
of B0. As A is shared, a checkpoint is a LoRA of the same rank, s (B - B0) A.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from peft_arena.core.errors import UserError
from peft_arena.methods.base import Calibration, Capability, MethodCard, MethodConfig
from peft_arena.methods.calibrate import batches_of, check_directions, gradients
from peft_arena.methods.low_rank.lora import RankConfig
from peft_arena.methods.low_rank.split import ROUNDED, SPLIT, SWITCHED_OFF, Factors, SplitMethod, principal

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


class KeepLoraConfig(RankConfig):
    """Settings of KeepLoRA."""

    protected_rank: int | None = Field(default=None, ge=1)
    """Principal right singular vectors of each weight that the change must not touch; None: 4 * rank."""
    svd_iterations: int | None = Field(default=None, ge=1)
    """Power iterations of fast randomised SVDs; None computes the exact ones, which takes minutes on large models."""
    calibration_examples: int = Field(default=64, ge=1)
    """Training examples from which the gradient is estimated."""

    alternatives: ClassVar[Mapping[str, Any]] = {
        **RankConfig.alternatives,
        "protected_rank": 12,
        "svd_iterations": 2,
        "calibration_examples": 6,
    }


class KeepLora(SplitMethod):
    """KeepLoRA: LoRA with a frozen A from the gradient's part outside the weight's principal directions."""

    Config: ClassVar[type[MethodConfig]] = KeepLoraConfig
    config: KeepLoraConfig
    freezes_a: ClassVar[bool] = True
    card: ClassVar[MethodCard] = MethodCard(
        name="keeplora",
        title="KeepLoRA",
        family="low-rank",
        paper="Luo et al., 2026, KeepLoRA: Continual Learning with Residual Gradient Adaptation",
        url="https://arxiv.org/abs/2601.19659",
        capabilities=SPLIT | {Capability.NEEDS_CALIBRATION},
        parameters="rank * sum over targets of out",
        equation="R + alpha / rank * lora_B @ lora_A",
        learning_rate=2e-4,
        micro_learning_rate=1e-2,
        deviations=(
            "one task: no directions of earlier tasks are protected",
            "a fixed number of directions is protected, 4 * rank unless given; the authors go by a share of the energy",
            "no dropout: it would drop a part of the pretrained weight",
            "exact SVDs unless svd_iterations is given; then the seed draws the randomised ones",
            "weight decay draws B to zero, and so away from its start B0, at which the model is the pretrained one",
            "a checkpoint is a LoRA of the same rank, s (B - B0) A, on the pretrained model",
            ROUNDED,
            SWITCHED_OFF,
        ),
        description=(
            "Adds s (B - B0) A to each target weight. A is frozen: the main row directions of the loss's gradient on "
            "training examples, after the principal directions of the weight are taken out of it."
        ),
    )

    def linears(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        """Return the target layers; see :meth:`PeftMethod.linears`.

        Raises:
            UserError: a setting does not fit the model.
        """
        found = super().linears(model)
        for name, layer in found.items():
            room = min(layer.out_features, layer.in_features - self.config.rank)
            if self.protected > room:
                shape = f"{layer.out_features} x {layer.in_features}"
                origin = "" if self.config.protected_rank is not None else " (4 * rank, as none is given)"
                raise UserError(
                    f"protected_rank: {self.protected}{origin} does not fit {name} ({shape}), whose rows must have "
                    f"{self.config.rank} directions left; allowed with this rank: 1 to {room}"
                )
        return found

    @property
    def protected(self) -> int:
        """How many principal directions of a weight are protected."""
        return self.config.protected_rank or 4 * self.config.rank

    def sizes(self, model: PreTrainedModel) -> Sequence[Any]:
        """Return the ranks with which the protected directions fit the targets."""
        from peft_arena.methods.targets import linear_targets

        layers = linear_targets(model, self.config.targets, self.config.layers).values()
        given = self.config.protected_rank

        def fits(rank: int) -> bool:
            protected = given or 4 * rank
            return all(protected <= min(layer.out_features, layer.in_features - rank) for layer in layers)

        return [rank for rank in super().sizes(model) if fits(rank)]

    def starts(
        self, model: PreTrainedModel, layers: Mapping[str, nn.Linear], calibration: Calibration | None
    ) -> Iterator[tuple[str, Factors]]:
        """Give the starting factors; see :meth:`SplitMethod.starts`."""
        for name, gradient in gradients(model, layers, batches_of(calibration, self.card.name)):
            yield name, self.outside(layers[name].weight.detach().float(), gradient, name)

    def outside(self, weight: Tensor, gradient: Tensor, name: str) -> Factors:
        """Return the factors of the gradient's part outside a weight's principal directions.

        Args:
            weight: shape (out, in), float32.
            gradient: shape (out, in), float32.
            name: of the layer, for messages.

        Raises:
            UserError: that part has too low a rank.
        """
        iterations = self.config.svd_iterations
        _, _, protected = principal(weight, self.protected, iterations)
        rest = gradient - (gradient @ protected.T) @ protected
        left, values, right = principal(rest, self.config.rank, iterations)
        check_directions(name, values, float(gradient.norm()))
        return Factors(right.clone(), left * values)
