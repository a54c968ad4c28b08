"""TinyLoRA: a handful of trained numbers steer the largest singular directions of each weight.

W = W0 + B (sum_i v_i P_i) A with B A the ``rank`` largest singular components of W0, their values split evenly, P_i
random (rank, rank) matrices and v trained, zero at the start; ``weight_tying`` lets neighbouring layers share one v.
A, B and P are frozen and saved, so reading a checkpoint takes no SVD and no random numbers. Attaching takes an exact
SVD of every target.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from peft_arena.core.ids import seed_for
from peft_arena.methods.adapter import TASK, WEIGHT_ADAPTER
from peft_arena.methods.base import Attached, MethodCard, MethodConfig
from peft_arena.methods.frozen import FrozenMethod
from peft_arena.methods.targets import AdaptedConfig

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel


class TinyloraConfig(AdaptedConfig):
    """Settings of TinyLoRA."""

    rank: int = Field(default=2, ge=1)
    """Singular components that are recombined; at most the smaller side of every target."""
    vector_length: int = Field(default=64, ge=1)
    """Trained numbers per group of layers; beyond rank^2 per layer of a group they add no freedom."""
    weight_tying: float = Field(default=0.0, ge=0, le=1)
    """0: each layer has its own vector; 1: all share one; between: groups of neighbours."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability with which an input of the change is zeroed in training."""

    alternatives: ClassVar[Mapping[str, Any]] = {
        **AdaptedConfig.alternatives,
        "rank": 4,
        "vector_length": 4,
        "weight_tying": 1.0,
        "dropout": 0.5,
    }


class Tinylora(FrozenMethod):
    """TinyLoRA: a tiny trained vector through random matrices between singular vectors."""

    Config: ClassVar[type[MethodConfig]] = TinyloraConfig
    config: TinyloraConfig
    size: ClassVar[str | None] = "vector_length"
    limited_by_rank: ClassVar[bool] = True
    derived_settings: ClassVar[frozenset[str]] = frozenset({"projection_seed"})
    card: ClassVar[MethodCard] = MethodCard(
        name="tinylora",
        title="TinyLoRA",
        family="random projection",
        paper="Morris et al., 2026, Learning to Reason in 13 Parameters",
        url="https://arxiv.org/abs/2602.04118",
        capabilities=WEIGHT_ADAPTER,
        parameters="vector_length * groups, groups = layers * (1 - weight_tying), rounded, at least 1",
        learning_rate=1e-3,
        micro_learning_rate=1e-2,
        random_init=True,
        deviations=(
            "the random matrices are normal with variance 1 / rank: the paper leaves their distribution open",
            "singular values are split evenly between the left and the right vectors, as in peft, where the paper has "
            "them all on the left: the random mixture meets them differently",
            "attaching takes an exact SVD of every target, minutes on large models",
            "tied layers are neighbours in the model's order, the last group being longer where they do not divide",
            "singular vectors and random matrices are saved with the adapter, which makes its file larger than what "
            "is trained; on a bfloat16 base they are rounded to bfloat16",
        ),
        description=(
            "Adds a recombination of the largest singular components to each target weight, steered by a tiny trained "
            "vector. Made for reinforcement learning; with supervision it needs far more parameters."
        ),
    )

    def groups(self, model: PreTrainedModel) -> int:
        """Return how many vectors train."""
        return max(1, round(len(self.linears(model)) * (1.0 - self.config.weight_tying)))

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        return self.groups(model) * self.config.vector_length

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's TinyLoRA configuration; its own seed is derived from the run's."""
        import peft

        return peft.TinyLoraConfig(
            task_type=TASK,
            r=self.config.rank,
            u=self.config.vector_length,
            weight_tying=self.config.weight_tying,
            tinylora_dropout=self.config.dropout,
            projection_seed=seed_for(seed, "tinylora", "projection"),
            save_projection=True,
            target_modules=patterns,
            bias="none",
        )

    def restore(self, model: PreTrainedModel, directory: Path) -> Attached:
        """Put a saved adapter on a freshly loaded model without the SVD; see :meth:`Method.restore`."""
        with no_decomposition():
            return super().restore(model, directory)


@contextmanager
def no_decomposition() -> Iterator[None]:
    """Give new TinyLoRA layers zeros for singular vectors inside the block, to be filled from a checkpoint."""
    from peft.tuners.tinylora import layer as tinylora

    kind: Any = tinylora.TinyLoraLayer
    decompose = kind._init_svd

    def zeros(layer: Any, adapter: str, rank: int, _: bool) -> None:
        weight = layer.get_base_layer().weight
        layer.tinylora_A[adapter] = weight.new_zeros(rank, layer.in_features)
        layer.tinylora_B[adapter] = weight.new_zeros(layer.out_features, rank)
        layer.r[adapter] = rank

    kind._init_svd = zeros
    try:
        yield
    finally:
        kind._init_svd = decompose
