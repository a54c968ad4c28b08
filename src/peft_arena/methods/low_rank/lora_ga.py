"""LoRA-GA: low-rank adaptation whose first step goes where that of full fine-tuning would.

With G = U S V^T the gradient of the loss at the pretrained weight, A starts from ``rank`` rows of V^T and B from other
``rank`` columns of U, both of one length, and s B0 A0 is taken out of the frozen weight, see :mod:`split`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from peft_arena.core.errors import UserError
from peft_arena.methods.base import Calibration, Capability, MethodCard, MethodConfig
from peft_arena.methods.calibrate import batches_of, check_directions, gradients
from peft_arena.methods.low_rank.lora import RankConfig
from peft_arena.methods.low_rank.split import SPLIT, SPLIT_DEVIATIONS, Factors, SplitMethod, principal

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

GAMMA = 16.0


class LoraGaConfig(RankConfig):
    """Settings of LoRA-GA."""

    direction: Literal["ArB2r", "A2rBr", "ArBr"] = "ArB2r"
    """Which of the 2 * rank largest singular vectors of the gradient go to A and which to B: the first to A and the
    second to B, the other way round, or in turn."""
    length: Literal["stable", "unit", "gd"] = "stable"
    """Length of every row of A and column of B at the start: out^(1/4) / sqrt(gamma), 1, or rank / alpha."""
    gamma: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Divides the starting product when ``length`` is ``stable``; None: 16."""
    svd_iterations: int | None = Field(default=None, ge=1)
    """Power iterations of a fast randomised SVD; None computes the exact one, which takes minutes on large models."""
    calibration_examples: int = Field(default=64, ge=1)
    """Training examples from which the gradient is estimated."""

    alternatives: ClassVar[Mapping[str, Any]] = {
        **RankConfig.alternatives,
        "direction": "ArBr",
        "length": "unit",
        "gamma": 4.0,
        "svd_iterations": 2,
        "calibration_examples": 6,
    }

    @model_validator(mode="after")
    def _gamma_is_used(self) -> Self:
        if self.gamma is not None and self.length != "stable":
            raise ValueError(f"gamma is only used with length = 'stable', not with {self.length!r}")
        return self


class LoraGa(SplitMethod):
    """LoRA-GA: LoRA that starts from the gradient of the loss."""

    Config: ClassVar[type[MethodConfig]] = LoraGaConfig
    config: LoraGaConfig
    card: ClassVar[MethodCard] = MethodCard(
        name="lora_ga",
        title="LoRA-GA",
        family="low-rank",
        paper="Wang et al., 2024, LoRA-GA: Low-Rank Adaptation with Gradient Approximation",
        url="https://arxiv.org/abs/2407.05000",
        capabilities=SPLIT | {Capability.NEEDS_CALIBRATION},
        parameters="rank * sum over targets of (in + out)",
        equation="R + alpha / rank * lora_B @ lora_A",
        learning_rate=5e-5,
        micro_learning_rate=1e-3,
        deviations=(
            "no dropout: it would drop a part of the pretrained weight",
            "the product is scaled by alpha / rank as in LoRA; the paper's analysis has rsLoRA's 1 / sqrt(rank)",
            "both factors have the paper's length; peft 0.21.2 also multiplies B by the gradient's singular values",
            "exact SVD unless svd_iterations is given; then the seed draws the randomised one",
            "the gradient is the mean over labelled tokens, taken in evaluation mode",
            *SPLIT_DEVIATIONS,
        ),
        description=(
            "Starts A and B from singular vectors of the loss's gradient on training examples, and takes their product "
            "out of the frozen weight."
        ),
    )

    def linears(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        """Return the target layers; see :meth:`PeftMethod.linears`.

        Raises:
            UserError: a setting does not fit the model.
        """
        found = super().linears(model)
        for name, layer in found.items():
            limit = min(layer.in_features, layer.out_features) // 2
            if self.config.rank > limit:
                shape = f"{layer.out_features} x {layer.in_features}"
                raise UserError(
                    f"rank: {self.config.rank} is above half the smaller side of {name} ({shape}), as A and B take "
                    f"different singular vectors; allowed: 1 to {limit}"
                )
        return found

    def sizes(self, model: PreTrainedModel) -> Sequence[Any]:
        """Return the ranks for which the gradient has twice as many singular vectors."""
        given = super().sizes(model)
        return given[: (len(given) + given[0] - 1) // 2] if given else given

    def starts(
        self, model: PreTrainedModel, layers: Mapping[str, nn.Linear], calibration: Calibration | None
    ) -> Iterator[tuple[str, Factors]]:
        """Give the starting factors; see :meth:`SplitMethod.starts`."""
        for name, gradient in gradients(model, layers, batches_of(calibration, self.card.name)):
            yield name, self.along(gradient, name)

    def along(self, gradient: Tensor, name: str) -> Factors:
        """Return the starting factors for the gradient of one weight.

        Args:
            gradient: shape (out, in), float32.
            name: of the layer, for messages.

        Raises:
            UserError: the gradient has too low a rank.
        """
        rank = self.config.rank
        left, values, right = principal(gradient, 2 * rank, self.config.svd_iterations)
        check_directions(name, values, float(values[0]))
        first, second = slice(0, rank), slice(rank, 2 * rank)
        rows, columns = {
            "ArB2r": (first, second),
            "A2rBr": (second, first),
            "ArBr": (slice(1, 2 * rank, 2), slice(0, 2 * rank, 2)),
        }[self.config.direction]
        gamma = GAMMA if self.config.gamma is None else self.config.gamma
        length = {"stable": len(gradient) ** 0.25 / gamma**0.5, "unit": 1.0, "gd": 1 / self.scale}[self.config.length]
        return Factors(length * right[rows], length * left[:, columns])
