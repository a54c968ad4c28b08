"""Super-Tuning and Supra: the largest entries of every weight train, with Supra beside a LoRA.

W = W0 + S (+ alpha / rank B A): S is zero but for the share 1 - ``sparsity`` of the entries whose W0 is largest (or
smallest) in size. Which entries these are is stored with the adapter.

In training the change of every target is kept as a dense matrix for the backward pass, in float32 about as large
as the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from peft_arena.core.errors import UserError
from peft_arena.methods.adapter import ADAPTER, TASK, WEIGHT_ADAPTER, PeftAttached, PeftMethod, tuner_layers
from peft_arena.methods.base import MethodCard, MethodConfig
from peft_arena.methods.targets import AdaptedConfig, check_rank

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft import PeftConfig, PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel

STEPS = 10_000
"""A budget chooses the sparsity in steps of 1 / STEPS."""


class SupertuningConfig(AdaptedConfig):
    """Settings of Super-Tuning."""

    sparsity: float = Field(default=0.99, ge=0, lt=1, allow_inf_nan=False)
    """Share of the entries of each weight that stays frozen; must leave at least one entry of every target."""
    largest: bool = True
    """Train the entries of the largest size; false: of the smallest."""

    alternatives: ClassVar[Mapping[str, Any]] = {**AdaptedConfig.alternatives, "sparsity": 0.9, "largest": False}


class SupraConfig(SupertuningConfig):
    """Settings of Supra."""

    rank: int = Field(default=8, ge=1)
    """Inner dimension of the low-rank update; at most the smaller side of every target."""
    alpha: float = Field(default=16.0, gt=0, allow_inf_nan=False)
    """The low-rank update is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability with which an input of the low-rank update is zeroed in training."""

    alternatives: ClassVar[Mapping[str, Any]] = {
        **SupertuningConfig.alternatives,
        "rank": 4,
        "alpha": 4.0,
        "dropout": 0.5,
    }


class SupertuningAttached(PeftAttached):
    """Super-Tuning in place on a model."""

    def frozen(self) -> dict[str, Tensor]:
        """Return the positions of the trained entries."""
        layers = tuner_layers(self.model)
        return {f"positions.{name}": layer.supertuning_indices[ADAPTER] for name, layer in layers.items()}


class Supertuning(PeftMethod):
    """Super-Tuning: the entries of largest size of each weight train."""

    Config: ClassVar[type[MethodConfig]] = SupertuningConfig
    config: SupertuningConfig
    size: ClassVar[str | None] = "sparsity"
    card: ClassVar[MethodCard] = MethodCard(
        name="supertuning",
        title="Super-Tuning",
        family="selective",
        paper="Ilin et al., 2026, Super-Tuning: From Activation-Aware Pruning to Sparse Fine-Tuning",
        url="https://arxiv.org/abs/2607.09287",
        capabilities=WEIGHT_ADAPTER,
        parameters="sum over targets of floor(in * out * (1 - sparsity))",
        learning_rate=1e-4,
        micro_learning_rate=1e-2,
        random_init=False,
        deviations=(
            "entries are chosen by their size alone, as in peft; the paper also goes by the activations they meet",
            "on a bfloat16 base the change is added to the layer's output, where peft rounds the changed weight, so "
            "that small changes would vanish",
        ),
        description="Trains a small share of the entries of each target weight, those of the largest size.",
    )

    def linears(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        """Return the target layers, refusing a sparsity that leaves no entry of one."""
        layers = super().linears(model)
        for name, layer in layers.items():
            if self._entries(layer) == 0:
                number = layer.in_features * layer.out_features
                raise UserError(
                    f"sparsity: {self.config.sparsity} leaves none of the {number} entries of {name}; "
                    f"allowed: from 0, below {1 - 1 / number:g}"
                )
        return layers

    def sizes(self, model: PreTrainedModel) -> Sequence[Any]:
        """Return the sparsities that leave entries of every target, from the largest."""
        layers = super().linears(model).values()
        smallest = min(layer.in_features * layer.out_features for layer in layers)
        values = [step / STEPS for step in range(STEPS - 1, -1, -1)]
        return [value for value in values if entries(smallest, value) > 0]

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        return sum(self._entries(layer) for layer in self.linears(model).values())

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's Super-Tuning configuration."""
        import peft

        return peft.SupertuningConfig(
            task_type=TASK,
            sparsity=self.config.sparsity,
            select_top=self.config.largest,
            save_precomputed_indices=True,
            target_modules=patterns,
        )

    def finish(self, model: PeftModel) -> None:
        """Let layers with a rounded weight add the change to their own output."""
        from peft_arena.methods.layers import use_changes

        use_changes(model)

    def hold(self, model: PeftModel, base: str) -> PeftAttached:
        """Return the attachment whose state holds the positions too."""
        return SupertuningAttached(self, model, base)

    def _entries(self, layer: nn.Linear) -> int:
        return entries(layer.in_features * layer.out_features, self.config.sparsity)


class Supra(Supertuning):
    """Supra: Super-Tuning beside a LoRA."""

    Config: ClassVar[type[MethodConfig]] = SupraConfig
    config: SupraConfig
    size: ClassVar[str | None] = "rank"
    card: ClassVar[MethodCard] = MethodCard(
        name="supra",
        title="Supra",
        family="selective",
        paper="Ilin et al., 2026, Super-Tuning: From Activation-Aware Pruning to Sparse Fine-Tuning",
        url="https://arxiv.org/abs/2607.09287",
        capabilities=WEIGHT_ADAPTER,
        parameters="sum over targets of (floor(in * out * (1 - sparsity)) + rank * (in + out))",
        learning_rate=1e-4,
        micro_learning_rate=3e-3,
        random_init=True,
        deviations=(
            "entries are chosen by their size alone, as in peft; the paper also goes by the activations they meet",
            "on a bfloat16 base the change is added to the layer's output, where peft rounds the changed weight, so "
            "that small changes would vanish",
            "A starts Kaiming-uniform (a = sqrt 5)",
            "a budget sets the rank and leaves the sparsity as it is",
        ),
        description="Trains the largest entries of each target weight and a low-rank matrix beside them.",
    )

    def linears(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        """Return the target layers, refusing also a rank above the smaller side of one."""
        layers = super().linears(model)
        check_rank(self.config.rank, layers)
        return layers

    def sizes(self, model: PreTrainedModel) -> Sequence[Any]:
        """Return the ranks up to the smaller side of every target."""
        layers = PeftMethod.linears(self, model).values()
        return range(1, min(min(layer.in_features, layer.out_features) for layer in layers) + 1)

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        layers = self.linears(model).values()
        return super().count(model) + self.config.rank * sum(x.in_features + x.out_features for x in layers)

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's Super-Tuning configuration with a rank."""
        config: Any = super().peft_config(patterns, seed)
        config.r, config.lora_alpha, config.lora_dropout = self.config.rank, self.config.alpha, self.config.dropout
        return config


def entries(number: int, sparsity: float) -> int:
    """Return how many of a weight's entries train: rounded down, in the arithmetic of peft."""
    return int(number * (1 - sparsity))
