"""PSOFT: a rotation inside the principal subspace of every weight.

W0 = U S V^T + rest, with the ``rank`` largest singular components in front. W = U S R V^T + rest, where R is a trained
rotation (Cayley transform of a skew-symmetric matrix, the identity at the start) between two trained scale vectors,
ones at the start. Only R and the vectors train: about rank^2 / 2 numbers whatever the layer's size.
``peft``'s ``psoft_alpha`` is not a setting: it divides one factor and multiplies the result, and nothing depends on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from peft_arena.core.ids import seed_for
from peft_arena.methods.adapter import ADAPTER, TASK, WEIGHT_ADAPTER, tuner_layers
from peft_arena.methods.base import Capability, MethodCard, MethodConfig
from peft_arena.methods.low_rank.lowrank import LowRankMethod
from peft_arena.methods.orthogonal.oft import distinct_terms
from peft_arena.methods.targets import AdaptedConfig

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel


class PsoftConfig(AdaptedConfig):
    """Settings of PSOFT."""

    rank: int = Field(default=32, ge=2)
    """Dimensions of the principal subspace; at most the smaller side of every target."""
    in_scale: bool = True
    """Train a scale for each dimension before the rotation."""
    out_scale: bool = True
    """Train a scale for each dimension behind the rotation."""
    neumann_terms: int | None = Field(default=None, ge=2)
    """Terms of a series that replaces the inverse in the Cayley transform; None solves it exactly."""
    svd_iterations: int | None = Field(default=None, ge=1)
    """Power iterations of a fast randomised SVD; None computes the exact one, which takes minutes on large models."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability with which an input of the change is zeroed in training."""

    alternatives: ClassVar[Mapping[str, Any]] = {
        **AdaptedConfig.alternatives,
        "rank": 16,
        "in_scale": False,
        "out_scale": False,
        "neumann_terms": 5,
        "svd_iterations": 1,
        "dropout": 0.5,
    }

    @field_validator("neumann_terms")
    @classmethod
    def _distinct(cls, terms: int | None) -> int | None:
        return distinct_terms(terms)


class Psoft(LowRankMethod):
    """PSOFT: a small trained rotation between frozen principal vectors of each weight."""

    Config: ClassVar[type[MethodConfig]] = PsoftConfig
    config: PsoftConfig
    size: ClassVar[str | None] = "rank"
    limited_by_rank: ClassVar[bool] = True
    trains_vectors: ClassVar[bool] = True
    card: ClassVar[MethodCard] = MethodCard(
        name="psoft",
        title="PSOFT",
        family="orthogonal",
        paper="Wu et al., 2025, Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation",
        url="https://arxiv.org/abs/2505.11235",
        capabilities=WEIGHT_ADAPTER | {Capability.LORA_ADAPTER},
        parameters="sum over targets of (rank * (rank - 1) / 2 + rank * (in_scale + out_scale))",
        learning_rate=1e-4,
        micro_learning_rate=3e-3,
        random_init=False,
        deviations=(
            "exact SVD unless svd_iterations is given; then the seed draws the randomised one",
            "no weight decay: it would pull the scales from one to zero",
            "a checkpoint is a plain LoRA of the same rank, so reading it repeats no SVD; peft's own would",
            "its path is that of the LoRA, straight from W0 to W1: a checkpoint does not hold the rotation's generator",
            "left vectors times rotation is formed in each forward pass, where peft applies the two in turn",
        ),
        description="Rotates and scales each target weight inside its principal subspace; everything else is frozen.",
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        rank, scales = self.config.rank, self.config.in_scale + self.config.out_scale
        return len(self.linears(model)) * (rank * (rank - 1) // 2 + rank * scales)

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's PSOFT configuration; the seed of its randomised SVD is derived from the run's."""
        import peft

        terms, iterations = self.config.neumann_terms, self.config.svd_iterations
        optional: dict[str, Any] = {}
        if terms is not None:
            optional |= {"use_cayley_neumann": True, "num_cayley_neumann_terms": terms}
        if iterations is not None:
            optional |= {"psoft_svd": "lowrank", "psoft_svd_lowrank_niter": iterations}
        return peft.PsoftConfig(
            task_type=TASK,
            r=self.config.rank,
            psoft_alpha=self.config.rank,
            psoft_dropout=self.config.dropout,
            psoft_mag_a=self.config.in_scale,
            psoft_mag_b=self.config.out_scale,
            random_seed=seed_for(seed, "psoft", "svd"),
            target_modules=patterns,
            **optional,
        )

    def stored_config(self, patterns: list[str]) -> PeftConfig:
        """Return the configuration of a checkpoint: a LoRA of the same rank, not scaled."""
        import peft

        rank = self.config.rank
        return peft.LoraConfig(task_type=TASK, r=rank, lora_alpha=rank, target_modules=patterns, bias="none")

    def prepare(self, model: PeftModel) -> None:
        """Let the layers compute as LoRA layers do."""
        from peft_arena.methods.layers import LowRankPsoft

        for layer in tuner_layers(model).values():
            layer.__class__ = LowRankPsoft

    def frozen(self, layer: Any) -> dict[str, Tensor]:
        """Return the principal vectors of a layer."""
        return {"a": layer._psoft_A_cache[ADAPTER], "b": layer._psoft_B_cache[ADAPTER]}
