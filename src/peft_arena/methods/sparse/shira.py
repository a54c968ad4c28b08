"""SHiRA: a random scattering of each weight's entries trains, as many as a LoRA of the rank would.

The entries are drawn for each layer from the run's seed and saved with the adapter. Of the paper's masks this is the
random one, the only one in ``peft``.

In training the change of every target is kept as a dense matrix for the backward pass, in float32 about as large
as the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from peft_arena.core.errors import UserError
from peft_arena.methods.adapter import ADAPTER, TASK, WEIGHT_ADAPTER, tuner_layers
from peft_arena.methods.base import MethodCard, MethodConfig
from peft_arena.methods.frozen import FrozenMethod
from peft_arena.methods.targets import AdaptedConfig

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel


class ShiraConfig(AdaptedConfig):
    """Settings of SHiRA."""

    rank: int = Field(default=32, ge=1)
    """Trains rank * (in + out) entries of a weight, like a LoRA; the change itself has no bound on its rank."""

    alternatives: ClassVar[Mapping[str, Any]] = {**AdaptedConfig.alternatives, "rank": 2}


class Shira(FrozenMethod):
    """SHiRA: scattered entries of every target weight train."""

    Config: ClassVar[type[MethodConfig]] = ShiraConfig
    config: ShiraConfig
    size: ClassVar[str | None] = "rank"
    card: ClassVar[MethodCard] = MethodCard(
        name="shira",
        title="SHiRA",
        family="sparse",
        paper="Bhardwaj et al., 2024, Sparse High Rank Adapters",
        url="https://arxiv.org/abs/2406.13175",
        capabilities=WEIGHT_ADAPTER,
        parameters="rank * sum over targets of (in + out)",
        learning_rate=3e-4,
        micro_learning_rate=1e-2,
        random_init=True,
        deviations=(
            "only the paper's random mask; those by magnitude or gradient are not in peft",
            "each layer draws its own mask, where peft gives all layers of one shape the same",
            "the change is kept and saved beside the weight, with its places: three times what is trained",
            "on a bfloat16 base the change is multiplied apart and added to the output, where peft rounds it into the "
            "weight in every forward pass, and small changes are lost",
        ),
        description="Trains rank * (in + out) random entries of each target weight and leaves the others as they are.",
    )

    def linears(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        """Return the target layers, refusing a rank that asks for more entries than a weight has."""
        layers = super().linears(model)
        for name, layer in layers.items():
            limit = largest_rank(layer)
            if self.config.rank > limit:
                shape = f"{layer.out_features} x {layer.in_features}"
                given = f"rank: {self.config.rank} asks for more entries than {name} has ({shape})"
                raise UserError(f"{given}; allowed: {f'1 to {limit}' if limit else 'none'}")
        return layers

    def sizes(self, model: PreTrainedModel) -> range:
        """Return the ranks for which every target has enough entries."""
        return range(1, min(map(largest_rank, super().linears(model).values())) + 1)

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        layers = self.linears(model).values()
        return sum(self.config.rank * (layer.in_features + layer.out_features) for layer in layers)

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's SHiRA configuration, whose masks come from the random state around it."""
        import peft

        config: Any = peft.ShiraConfig(task_type=TASK, r=self.config.rank, target_modules=patterns)
        config.mask_fn = random_mask  # peft's type names a function
        return config

    def finish(self, model: PeftModel) -> None:
        """Build the change without sparse tensors; on a base of lower precision keep it out of the weight."""
        import torch

        for layer in tuner_layers(model).values():
            layer.get_delta_weight = MethodType(dense_change, layer)
            if layer.get_base_layer().weight.dtype != torch.float32:
                layer.forward = MethodType(forward_apart, layer)


def largest_rank(layer: nn.Linear) -> int:
    """Return the largest rank whose entries a layer has."""
    return layer.in_features * layer.out_features // (layer.in_features + layer.out_features)


def random_mask(layer: nn.Linear, rank: int, **_: object) -> Tensor:
    """Return a mask of a layer's weight, rank * (in + out) of its entries true, by torch's random state."""
    import torch

    entries = layer.in_features * layer.out_features
    mask = torch.zeros(entries, dtype=torch.bool)
    mask[torch.randperm(entries)[: rank * (layer.in_features + layer.out_features)]] = True
    return mask.view(layer.out_features, layer.in_features).to(layer.weight.device)


def dense_change(layer: Any, adapter: str) -> Tensor:
    """Return the change of a SHiRA layer's weight, shape (out, in): zero but at the places that train."""
    import torch

    weight = layer.shira_weight[adapter]
    rows, columns = layer.shira_indices[adapter].to(weight.device).long()
    change = torch.zeros(layer.out_features, layer.in_features, dtype=weight.dtype, device=weight.device)
    return change.index_put((rows, columns), weight * layer.scaling[adapter])


def forward_apart(layer: Any, x: Tensor) -> Tensor:
    """Return the output of a SHiRA layer, the change's part computed by itself, shape (..., out)."""
    from torch.nn.functional import linear

    result: Tensor = layer.base_layer(x)
    if layer.disable_adapters or layer.merged:
        return result
    return result + linear(x, dense_change(layer, ADAPTER).to(x.dtype)).to(result.dtype)
