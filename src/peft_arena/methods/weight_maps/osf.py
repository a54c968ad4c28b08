"""OSF: full fine-tuning of the small singular components of every weight; the large ones are preserved.

W0 = U S V^T. The components behind the ``preserved`` largest train: their left and right vectors and values. Gradients
of the vectors are projected off the preserved directions. The pretrained weight itself stays in memory as it is; what
is added is the trained components minus where they started.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from peft_arena.core.errors import UserError
from peft_arena.methods.adapter import ADAPTER, TASK, WEIGHT_ADAPTER, tuner_layers
from peft_arena.methods.base import Attached, MethodCard, MethodConfig
from peft_arena.methods.files import read_settings
from peft_arena.methods.low_rank.lowrank import LowRankMethod
from peft_arena.methods.targets import AdaptedConfig

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel


class OsfConfig(AdaptedConfig):
    """Settings of OSF."""

    preserved: float = Field(default=0.5, gt=0, lt=1, allow_inf_nan=False)
    """Share of a weight's singular components that is frozen, rounded down; at least one component of every target."""

    alternatives: ClassVar[Mapping[str, Any]] = {**AdaptedConfig.alternatives, "preserved": 0.75}


class Osf(LowRankMethod):
    """OSF: the small singular components of each weight train, off the directions of the large ones."""

    Config: ClassVar[type[MethodConfig]] = OsfConfig
    config: OsfConfig
    size: ClassVar[str | None] = "preserved"
    derived_settings: ClassVar[frozenset[str]] = frozenset({"rank_pattern", "alpha_pattern"})
    card: ClassVar[MethodCard] = MethodCard(
        name="osf",
        title="OSF",
        family="orthogonal",
        paper=("Nayak et al., 2025, Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning"),
        url="https://arxiv.org/abs/2504.07097",
        capabilities=WEIGHT_ADAPTER,
        parameters="sum over targets of (n - floor(preserved * n)) * (in + out + 1), n the smaller of in and out",
        learning_rate=5e-5,
        micro_learning_rate=3e-2,
        random_init=False,
        deviations=(
            "one share for all layers, where the paper finds each layer's by how much it changes its input",
            "gradients are projected off the preserved directions, the steps of AdamW made of them are not",
            "weight decay pulls the trained components, which are a part of the pretrained weight, to zero",
            "a checkpoint is a LoRA of twice the number of trained components, so reading it repeats no SVD; with half "
            "of the components preserved it is larger than the target weights in float32",
            "attaching takes an exact SVD of every target, minutes on large models, and training keeps the starting "
            "components beside the trained ones, in float32",
            "the change is computed from differences to the start, so that small ones survive bfloat16 arithmetic; "
            "peft subtracts two large products",
            "on a bfloat16 base the components are float32 and gradients are projected; peft rounds the components "
            "and loses the projection when it casts what trains to float32",
        ),
        description="Freezes the largest singular components of each target weight and trains the rest.",
    )

    def linears(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        """Return the target layers, refusing a share that preserves no component of one."""
        layers = super().linears(model)
        for name, layer in layers.items():
            smaller = min(layer.in_features, layer.out_features)
            if self._kept(layer) == 0:
                raise UserError(
                    f"preserved: {self.config.preserved} of the {smaller} singular components of {name} is less than "
                    f"one; allowed: from {1 / smaller:g}, below 1"
                )
        return layers

    def sizes(self, model: PreTrainedModel) -> list[float]:
        """Return the shares that preserve whole components of the smallest target, from the largest share."""
        layers = super().linears(model).values()
        smallest = min(min(layer.in_features, layer.out_features) for layer in layers)
        shares = [kept / smallest for kept in range(smallest - 1, 0, -1)]
        return [share for share in shares if int(smallest * share) > 0]

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        layers = self.linears(model).values()
        return sum(self._trained(layer) * (layer.in_features + layer.out_features + 1) for layer in layers)

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's OSF configuration."""
        import peft

        return peft.OSFConfig(task_type=TASK, effective_rank=self.config.preserved, target_modules=patterns)

    def stored_config(self, patterns: list[str]) -> PeftConfig:
        """Return the configuration of a checkpoint, but for the ranks, which follow from the model."""
        import peft

        return peft.LoraConfig(task_type=TASK, target_modules=patterns, bias="none")

    def stored_lora(self, patterns: list[str], ranks: Mapping[str, int]) -> PeftConfig:
        """Return the configuration of a checkpoint, not scaled: each layer's rank is also its alpha."""
        config: Any = self.stored_config(patterns)
        config.rank_pattern = config.alpha_pattern = dict(ranks)
        return config

    def restore(self, model: PreTrainedModel, directory: Path) -> Attached:
        """Put a saved adapter on a freshly loaded model; see :meth:`Method.restore`.

        Raises:
            UserError: the directory is missing, damaged, of another method or of another share.
        """
        saved = read_settings(directory, self.card.name)
        ranks = {name: 2 * self._trained(layer) for name, layer in self.linears(model).items()}
        if saved.get("rank_pattern") != ranks or saved.get("alpha_pattern") != ranks:
            raise UserError(f"{directory} was not made by method osf with preserved = {self.config.preserved} here")
        return super().restore(model, directory)

    def prepare(self, model: PeftModel) -> None:
        """Let the layers compute as LoRA layers do, with components in float32."""
        import torch

        from peft_arena.methods.layers import LowRankOsf

        for layer in tuner_layers(model).values():
            layer.__class__ = LowRankOsf
            if layer.get_base_layer().weight.dtype != torch.float32:
                layer.split()

    def frozen(self, layer: Any) -> dict[str, Tensor]:
        """Return the starting components of a layer, and the preserved vectors where these do not follow from them."""
        named = dict(zip(("left", "values", "right"), layer.start(), strict=True))
        named |= {"high_left": layer._osf_U_high[ADAPTER]} if ADAPTER in layer._osf_U_high else {}
        return named | ({"high_right": layer._osf_V_high[ADAPTER]} if ADAPTER in layer._osf_V_high else {})

    def _kept(self, layer: nn.Linear) -> int:
        return int(min(layer.in_features, layer.out_features) * self.config.preserved)

    def _trained(self, layer: nn.Linear) -> int:
        return min(layer.in_features, layer.out_features) - self._kept(layer)
