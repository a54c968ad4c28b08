"""VeLoRA: LoRA that keeps only a rank-1 projection of its input for the backward pass.

The forward pass is LoRA's. For the gradient of A the input, cut into ``groups`` sub-tokens, is replaced by
scale * v v^T x with one unit vector v per layer, so the gradient is approximate and the kept activation smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_arena.core.errors import UserError
from peft_arena.methods.adapter import ADAPTER, WEIGHT_ADAPTER, PeftAttached, tuner_layers
from peft_arena.methods.base import Capability, MethodCard, MethodConfig
from peft_arena.methods.low_rank.lora import Lora, LoraConfig

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel


class VeloraConfig(LoraConfig):
    """Settings of VeLoRA."""

    groups: int = Field(default=32, ge=1)
    """Sub-tokens an input is cut into, each kept as one number; below every target's input size, where it is LoRA."""
    scale: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Factor on the reconstructed input, and so on the gradient of A."""
    projection: Literal["first_batch", "each_batch", "random"] = "first_batch"
    """The vector v: mean sub-token of the first forward pass, of each forward pass, or drawn from the seed."""

    alternatives: ClassVar[Mapping[str, Any]] = {
        **LoraConfig.alternatives,
        "groups": 4,
        "scale": 0.25,
        "projection": "random",
    }


class VeloraAttached(PeftAttached):
    """VeLoRA in place on a model; its checkpoint is a plain LoRA, which gives the same outputs."""

    method: Velora

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put a state back; see :meth:`Attached.load_state`."""
        super().load_state(state)
        for layer in self._layers().values():
            layer.lora_velora_initialized[ADAPTER] = bool(layer.lora_velora_embed[ADAPTER].any())

    def save(self, directory: Path) -> None:
        """Write the factors as a plain LoRA adapter."""
        save_plain_lora(self, directory)

    def _layers(self) -> dict[str, Any]:
        return {name: layer for name, layer in tuner_layers(self.model).items() if hasattr(layer, "lora_velora_embed")}

    def frozen(self) -> dict[str, Tensor]:
        """Return the projection vectors; one not yet known is zero."""
        return {f"projection.{name}": layer.lora_velora_embed[ADAPTER] for name, layer in self._layers().items()}


class Velora(Lora):
    """VeLoRA: LoRA with a compressed input for the gradient of A."""

    Config: ClassVar[type[MethodConfig]] = VeloraConfig
    config: VeloraConfig
    card: ClassVar[MethodCard] = MethodCard(
        name="velora",
        title="VeLoRA",
        family="low-rank",
        paper="Miles et al., 2024, VeLoRA: Memory Efficient Training using Rank-1 Sub-Token Projections",
        url="https://arxiv.org/abs/2405.17991",
        capabilities=WEIGHT_ADAPTER | {Capability.LORA_ADAPTER},
        parameters="rank * sum over targets of (in + out)",
        equation="W + alpha / rank * lora_B @ lora_A",
        learning_rate=2e-4,
        micro_learning_rate=1e-2,
        random_init=True,
        deviations=(
            "only the input of A is compressed; the rest of the model keeps its activations",
            "an input size that groups does not divide is padded with zeros",
            "the vector v is float32 on every base type, where peft rounds it to the base's",
            "A starts Kaiming-uniform (a = sqrt 5) unless init is 'gaussian'",
        ),
        description=(
            "LoRA whose A is trained with an approximate gradient: of each sub-token of the input only its product "
            "with one vector is kept. The adapter itself is a plain LoRA."
        ),
    )

    def linears(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        """Return the target layers, refusing a number of groups that leaves nothing to compress."""
        layers = super().linears(model)
        for name, layer in layers.items():
            if self.config.groups >= layer.in_features:
                raise UserError(
                    f"groups: {self.config.groups} sub-tokens of the {layer.in_features} inputs of {name} hold one "
                    f"number each, which is plain LoRA; allowed: 1 to {layer.in_features - 1}"
                )
        return layers

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's LoRA configuration with VeLoRA switched on."""
        import peft

        names = {"first_batch": "batch_average_once", "each_batch": "batch_average", "random": "random"}
        config: Any = super().peft_config(patterns, seed)
        config.velora_config = peft.VeloraConfig(
            num_groups=self.config.groups,
            scale=self.config.scale,
            init_type=names[self.config.projection],  # type: ignore[arg-type]
        )
        return config

    def stored_config(self, patterns: list[str]) -> PeftConfig:
        """Return the configuration of the plain LoRA that a checkpoint is."""
        return super().peft_config(patterns, seed=0)

    def finish(self, model: PeftModel) -> None:
        """Keep the projection vectors in float32."""
        import torch

        for layer in tuner_layers(model).values():
            if hasattr(layer, "lora_velora_embed"):
                vector = layer.lora_velora_embed[ADAPTER].float()
                norm = torch.linalg.vector_norm(vector)
                layer.lora_velora_embed[ADAPTER] = vector / norm if norm > 0 else vector

    def hold(self, model: PeftModel, base: str) -> PeftAttached:
        """Return the attachment whose state holds the projection vectors."""
        return VeloraAttached(self, model, base)


def save_plain_lora(attached: PeftAttached, directory: Path) -> None:
    """Write only the factors A and B, with the method's stored configuration."""
    from peft_arena.methods.adapter import stored_tensors

    found = stored_tensors(attached.model)
    tensors = {name: value for name, value in found.items() if ".lora_A." in name or ".lora_B." in name}
    config: Any = attached.model.peft_config[ADAPTER]
    attached.write(directory, attached.method.stored_config(sorted(config.target_modules)), tensors)
