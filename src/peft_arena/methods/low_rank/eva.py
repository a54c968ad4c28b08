"""EVA: low-rank adaptation whose A starts from the principal directions of each layer's inputs.

The rows of A are the principal components of what the layer takes in on training examples, B starts at zero. Layers
whose components explain more variance get a higher rank: one budget of ranks is shared by all layers with the same
in + out, so that the number of parameters depends on the model's shapes only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from peft_arena.core.errors import UserError
from peft_arena.methods.adapter import ADAPTER, WEIGHT_ADAPTER, tuner_layers
from peft_arena.methods.base import Attached, Calibration, CalibrationError, Capability, MethodCard, MethodConfig
from peft_arena.methods.calibrate import Moments, batches_of, input_moments
from peft_arena.methods.low_rank.lora_inits import StartConfig, StartedLora
from peft_arena.methods.targets import patterns_for

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


class EvaConfig(StartConfig):
    """Settings of EVA."""

    rank: int = Field(default=8, ge=1)
    """Mean inner dimension of the updates."""
    rho: float = Field(default=2.0, ge=1, allow_inf_nan=False)
    """The highest rank of a layer is rho * rank, rounded, at most its smaller side; 1: all layers have the same."""
    calibration_examples: int = Field(default=64, ge=1)
    """Training examples whose tokens the principal components are of."""

    alternatives: ClassVar[Mapping[str, Any]] = {**StartConfig.alternatives, "rho": 1.0, "calibration_examples": 8}


class Eva(StartedLora):
    """EVA: LoRA that starts from the variance of the inputs, with ranks to match."""

    Config: ClassVar[type[MethodConfig]] = EvaConfig
    config: EvaConfig
    limited_by_rank: ClassVar[bool] = False
    derived_settings: ClassVar[frozenset[str]] = frozenset({"rank_pattern", "alpha_pattern"})
    card: ClassVar[MethodCard] = MethodCard(
        name="eva",
        title="EVA",
        family="low-rank",
        paper=(
            "Paischer et al., 2024, One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation"
        ),
        url="https://arxiv.org/abs/2410.07170",
        capabilities=WEIGHT_ADAPTER | {Capability.NEEDS_CALIBRATION},
        parameters="rank * sum over targets of (in + out)",
        equation="W + alpha / rank * lora_B @ lora_A",
        learning_rate=2e-4,
        micro_learning_rate=1e-3,
        deviations=(
            "ranks move only between layers with the same in + out, which keeps the number of parameters; in the paper "
            "between all",
            "every layer keeps at least rank 1; in the paper one may lose its adapter",
            "the exact components of all inputs, where the paper updates them batch by batch until they settle",
            "inputs at all tokens of the examples count; peft by default only those with a label",
            "alpha is adjusted with a layer's rank so that all updates have the scale alpha / rank, as in peft",
        ),
        description=(
            "LoRA whose A starts from the principal components of each layer's inputs on training examples; layers "
            "whose components explain more get a higher rank."
        ),
    )

    @property
    def highest(self) -> int:
        """The highest rank a layer can get."""
        return round(self.config.rank * self.config.rho)

    def linears(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        """Return the target layers; see :meth:`PeftMethod.linears`.

        Raises:
            UserError: a setting does not fit the model.
        """
        found = super().linears(model)
        for name, layer in found.items():
            limit = min(layer.in_features, layer.out_features)
            if self.highest > limit:
                shape = f"{layer.out_features} x {layer.in_features}"
                raise UserError(
                    f"rank: {self.config.rank} with rho {self.config.rho:g} can become {self.highest}, above the "
                    f"smaller side of {name} ({shape}); allowed: rho * rank up to {limit}"
                )
        return found

    def sizes(self, model: PreTrainedModel) -> Sequence[Any]:
        """Return the mean ranks with which the highest fits every layer."""
        given = super().sizes(model)
        return [rank for rank in given if round(rank * self.config.rho) <= given[-1]]

    def attach(self, model: PreTrainedModel, *, seed: int, calibration: Calibration | None = None) -> Attached:
        """Measure the inputs, then wrap the model with the ranks they call for; see :meth:`Method.attach`."""
        import torch

        layers: Any = self._targets(model)
        base = str(model.name_or_path or "")
        rows, shares = {}, {}
        for name, moments in input_moments(model, layers, batches_of(calibration, self.card.name)):
            rows[name], shares[name] = components(name, moments, self.highest)
        sizes = {name: layer.in_features + layer.out_features for name, layer in layers.items()}
        ranks = redistributed({name: share.tolist() for name, share in shares.items()}, sizes, self.config.rank)
        config: Any = self.peft_config(patterns_for(model, layers), seed)
        other = {name: rank for name, rank in ranks.items() if rank != self.config.rank}
        config.rank_pattern = other
        config.alpha_pattern = {name: self.config.alpha * rank / self.config.rank for name, rank in other.items()}
        wrapped = self._wrap(model, config, seed, set(layers))
        with torch.no_grad():
            for module, layer in tuner_layers(wrapped).items():
                layer.lora_A[ADAPTER].weight.copy_(rows[module][: ranks[module]])
        return self.hold(wrapped, base)


ROUNDING = 1e-12
"""Variances below this share of the largest are rounding, in float64."""


def components(name: str, moments: Moments, count: int) -> tuple[Tensor, Tensor]:
    """Return the principal components of a layer's inputs.

    Args:
        name: of the layer, for messages.
        moments: sums over its inputs.
        count: how many components.

    Returns:
        Components (count, in), orthonormal, and the share of the variance each explains (count,), descending.

    Raises:
        CalibrationError: there are too few tokens, or they are too alike.
    """
    import torch

    if moments.tokens <= count:
        raise CalibrationError(
            f"calibration_examples: {moments.tokens} tokens are too few for {count} components of the inputs of "
            f"{name}; take more examples, a lower rank or a lower rho"
        )
    mean = moments.total / moments.tokens
    covariance = moments.square / moments.tokens - torch.outer(mean, mean)
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0), vectors.flip(1)
    found = int((values[:count] > ROUNDING * values[0]).sum())
    if found < count:
        raise CalibrationError(
            f"calibration_examples: the inputs of {name} on them vary in only {found} of the {count} directions "
            "needed; take more examples, a lower rank or a lower rho"
        )
    return vectors[:, :count].T.float().contiguous(), (values[:count] / values.clamp(min=0).sum()).float()


def redistributed(shares: Mapping[str, Sequence[float]], sizes: Mapping[str, int], rank: int) -> dict[str, int]:
    """Return the rank of every layer.

    Layers of equal size share ``rank`` times their number: each gets one, and the rest go to the components that
    explain most. The sum of rank times size does not depend on the shares.

    Args:
        shares: by layer, the share of variance each component explains, descending; as many as the highest rank.
        sizes: parameters per rank, by layer.
        rank: the mean.
    """
    ranks = dict.fromkeys(shares, 1)
    for size in sorted(set(sizes.values())):
        names = [name for name in shares if sizes[name] == size]
        left = [(-share, place, name) for name in names for place, share in enumerate(shares[name]) if place]
        for _, _, name in sorted(left)[: (rank - 1) * len(names)]:
            ranks[name] += 1
    return ranks
