"""VeRA: two frozen random matrices shared by all layers, and two trained vectors in each.

W = W0 + diag(b) B diag(d) A, with A (rank, in) and B (out, rank) cut from one random pair that is as large as the
largest target; d starts at ``d_initial`` and b at zero. The pair is drawn from the seed and saved with the adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from peft_arena.core.ids import seed_for
from peft_arena.methods.adapter import ADAPTER, TASK, WEIGHT_ADAPTER, PeftAttached, PeftMethod
from peft_arena.methods.base import MethodCard, MethodConfig
from peft_arena.methods.targets import AdaptedConfig

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel


class VeraConfig(AdaptedConfig):
    """Settings of VeRA."""

    rank: int = Field(default=256, ge=1)
    """Rows of the shared random matrix A. It may exceed a layer's size: each row adds a trained entry of d."""
    d_initial: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    """Starting value of every entry of d."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability with which an input of A is zeroed in training."""

    alternatives: ClassVar[Mapping[str, Any]] = {
        **AdaptedConfig.alternatives,
        "rank": 16,
        "d_initial": 0.5,
        "dropout": 0.5,
    }


class VeraAttached(PeftAttached):
    """VeRA in place on a model."""

    def frozen(self) -> dict[str, Tensor]:
        """Return the random matrices."""
        tuner: Any = self.model.base_model
        return {"projection.a": tuner.vera_A[ADAPTER], "projection.b": tuner.vera_B[ADAPTER]}


class Vera(PeftMethod):
    """VeRA: trained scaling vectors around shared random matrices."""

    Config: ClassVar[type[MethodConfig]] = VeraConfig
    config: VeraConfig
    size: ClassVar[str | None] = "rank"
    derived_settings: ClassVar[frozenset[str]] = frozenset({"projection_prng_key"})
    card: ClassVar[MethodCard] = MethodCard(
        name="vera",
        title="VeRA",
        family="random projection",
        paper="Kopiczko et al., 2023, VeRA: Vector-based Random Matrix Adaptation",
        url="https://arxiv.org/abs/2310.11454",
        capabilities=WEIGHT_ADAPTER,
        parameters="sum over targets of (out + rank)",
        equation="W + column(vera_lambda_b) * (rows_of(vera_B, W) @ (column(vera_lambda_d) * columns_of(vera_A, W)))",
        learning_rate=5e-3,
        micro_learning_rate=0.1,
        micro_rl_learning_rate=3e-2,
        random_init=True,
        deviations=(
            "layers of different shapes share one pair of matrices, as large as the largest; each takes a corner",
            "the random matrices are saved with the adapter, which makes its file larger than what is trained",
        ),
        description="Adds diag(b) B diag(d) A to each target weight: A and B are random and frozen, b and d train.",
    )

    def sizes(self, model: PreTrainedModel) -> range:
        """Return every rank up to 65536: each adds one trained entry to every target."""
        return range(1, 65537)

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        layers = self.linears(model).values()
        return sum(layer.out_features + self.config.rank for layer in layers)

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's VeRA configuration; its own seed is derived from the run's."""
        import peft

        return peft.VeraConfig(
            task_type=TASK,
            r=self.config.rank,
            d_initial=self.config.d_initial,
            vera_dropout=self.config.dropout,
            target_modules=patterns,
            projection_prng_key=seed_for(seed, "vera", "projection"),
            save_projection=True,
            bias="none",
        )

    def hold(self, model: PeftModel, base: str) -> PeftAttached:
        """Return the attachment whose state holds the random matrices too."""
        return VeraAttached(self, model, base)
