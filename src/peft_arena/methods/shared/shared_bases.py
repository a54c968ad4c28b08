"""Random matrices shared by all layers and a few trained vectors in each: PVeRA and RandLoRA (VeRA has its own file).

PVeRA: W0 x + diag(b) B (m + e * exp(v / 2)) with m = diag(d1) A1 x, v = diag(d2) A2 x and e normal noise, drawn anew
for every token in training; outside training e is zero, which makes it W0 + diag(b) B diag(d1) A1.
RandLoRA: W0 + s sum_j B_j diag(lambda_j) A diag(gamma_j) over enough j for full rank, the vectors trained.

In training RandLoRA keeps the change of every target as a dense matrix for the backward pass, in float32 about as large
as the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_arena.core.ids import seed_for
from peft_arena.methods.adapter import TASK, WEIGHT_ADAPTER, tuner_layers
from peft_arena.methods.base import MethodCard, MethodConfig
from peft_arena.methods.frozen import FrozenMethod
from peft_arena.methods.shared.vera import VeraConfig
from peft_arena.methods.targets import AdaptedConfig

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel


class PveraConfig(VeraConfig):
    """Settings of PVeRA."""

    rank: int = Field(default=256, ge=1)
    """Size of the sampled vector. It may exceed a layer's size: each entry adds two trained entries of d."""


class RandloraConfig(AdaptedConfig):
    """Settings of RandLoRA."""

    rank: int = Field(default=32, ge=1)
    """Rank of each random basis. A smaller one trains MORE: it takes smaller side / rank bases to reach full rank."""
    alpha: float = Field(default=640.0, gt=0, allow_inf_nan=False)
    """The change is scaled by alpha / rank, usually 20."""
    bases: Literal["uniform", "sparse", "very_sparse"] = "uniform"
    """Entries of the random matrices: uniform; or -1, 0 and 1, of which a third, or one in sqrt(side) / 2, not zero."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability with which an input of the change is zeroed in training."""

    alternatives: ClassVar[Mapping[str, Any]] = {
        **AdaptedConfig.alternatives,
        "rank": 16,
        "alpha": 40.0,
        "bases": "sparse",
        "dropout": 0.5,
    }


class Pvera(FrozenMethod):
    """PVeRA: VeRA whose inner vector is sampled in training."""

    Config: ClassVar[type[MethodConfig]] = PveraConfig
    config: PveraConfig
    size: ClassVar[str | None] = "rank"
    derived_settings: ClassVar[frozenset[str]] = frozenset({"projection_prng_key"})
    card: ClassVar[MethodCard] = MethodCard(
        name="pvera",
        title="PVeRA",
        family="random projection",
        paper="Fillioux et al., 2025, PVeRA: Probabilistic Vector-Based Random Matrix Adaptation",
        url="https://arxiv.org/abs/2512.07703",
        capabilities=WEIGHT_ADAPTER,
        parameters="sum over targets of (out + 2 * rank)",
        learning_rate=3e-3,
        micro_learning_rate=0.1,
        random_init=True,
        deviations=(
            "no Kullback-Leibler term holds the sampled distribution, which peft's form has no place for",
            "samples in training only: evaluation, merging and the weight change use the mean",
            "layers of different shapes share one pair of matrices, as large as the largest; each takes a corner",
            "the random matrices are saved with the adapter, which makes its file larger than what is trained",
        ),
        description=(
            "Adds diag(b) B z to each target's output, z drawn around diag(d) A x in training and equal to it "
            "otherwise: A and B are random and frozen."
        ),
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        return sum(layer.out_features + 2 * self.config.rank for layer in self.linears(model).values())

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's PVeRA configuration; its own seed is derived from the run's."""
        import peft

        return peft.PveraConfig(
            task_type=TASK,
            r=self.config.rank,
            d_initial=self.config.d_initial,
            pvera_dropout=self.config.dropout,
            target_modules=patterns,
            projection_prng_key=seed_for(seed, "pvera", "projection"),
            save_projection=True,
            sample_at_inference=False,
            bias="none",
        )


class Randlora(FrozenMethod):
    """RandLoRA: a full-rank sum of random low-rank products, each weighted by trained vectors."""

    Config: ClassVar[type[MethodConfig]] = RandloraConfig
    config: RandloraConfig
    size: ClassVar[str | None] = "rank"
    limited_by_rank: ClassVar[bool] = True
    derived_settings: ClassVar[frozenset[str]] = frozenset({"projection_prng_key"})
    card: ClassVar[MethodCard] = MethodCard(
        name="randlora",
        title="RandLoRA",
        family="random projection",
        paper="Albert et al., 2025, RandLoRA: Full-rank parameter-efficient fine-tuning of large models",
        url="https://arxiv.org/abs/2502.00987",
        capabilities=WEIGHT_ADAPTER,
        parameters="sum over targets of n * (rank + min(in, out)), n = min(in, out) / rank rounded up",
        learning_rate=1e-4,
        micro_learning_rate=3e-4,
        random_init=True,
        deviations=(
            "layers of different shapes share one set of matrices, as large as the largest; each takes a corner",
            "the random matrices are drawn in bfloat16 or float16, whichever the machine has, so they are saved with "
            "the adapter, once: about longest output * longest input * 4 bytes beside what is trained; peft then warns "
            "of missing keys when it loads them, though it reads them",
        ),
        description=(
            "Adds alpha / rank times a full-rank sum of random products B_j A, each with a trained diagonal between "
            "its factors and one behind. A smaller rank trains more parameters."
        ),
    )

    def sizes(self, model: PreTrainedModel) -> list[int]:
        """Return the ranks, falling, that train fewer parameters than every smaller rank."""
        sides = [min(layer.in_features, layer.out_features) for layer in super().linears(model).values()]
        found: list[int] = []
        least: int | None = None
        for rank in range(1, min(sides) + 1):
            total = sum(trained_entries(side, rank) for side in sides)
            if least is None or total < least:
                found.append(rank)
                least = total
        return found[::-1]

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        layers = self.linears(model).values()
        return sum(trained_entries(min(layer.in_features, layer.out_features), self.config.rank) for layer in layers)

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's RandLoRA configuration; its own seed is derived from the run's."""
        import peft

        return peft.RandLoraConfig(
            task_type=TASK,
            r=self.config.rank,
            randlora_alpha=self.config.alpha,  # type: ignore[arg-type]  # peft computes with floats
            randlora_dropout=self.config.dropout,
            sparse=self.config.bases == "sparse",
            very_sparse=self.config.bases == "very_sparse",
            target_modules=patterns,
            projection_prng_key=seed_for(seed, "randlora", "projection"),
            save_projection=True,
            bias="none",
        )

    def finish(self, model: PeftModel) -> None:
        """Keep the layers' references to the shared matrices out of checkpoints, which would hold a copy for each."""
        for layer in tuner_layers(model).values():
            for name in ("randlora_A", "randlora_B"):
                object.__setattr__(layer, name, layer._modules.pop(name))


def trained_entries(side: int, rank: int) -> int:
    """Return the trained parameters of RandLoRA on a layer with the given smaller side."""
    bases = -(-side // rank)
    return bases * (rank + side)
