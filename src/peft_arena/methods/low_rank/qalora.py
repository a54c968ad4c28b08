"""QA-LoRA: a low-rank update on sums over groups of inputs, for quantised base models.

y = W0 x + s B A p(x) with p(x) the sums over ``group_size`` neighbouring inputs, A (rank, in / group_size) and B
(out, rank). A change that is constant within a group can be added to the zero points of weights that are quantised
in the same groups, so the tuned model stays quantised. Checked on stand-in layers and on bitsandbytes layers on a CPU;
not verified on GPTQ layers, nor on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from peft_arena.core.errors import UserError, unknown
from peft_arena.methods.adapter import ADAPTER, PREFIX, PeftAttached, PeftMethod, tuner_layers
from peft_arena.methods.base import Capability, MethodCard, MethodConfig
from peft_arena.methods.files import write_adapter
from peft_arena.methods.low_rank.lora import BareRankConfig
from peft_arena.methods.targets import in_blocks, select

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel


class QaLoraConfig(BareRankConfig):
    """Settings of QA-LoRA."""

    group_size: int = Field(default=32, ge=2)
    """Neighbouring inputs that share their column of the change; divides every target's input size. That of the
    quantisation, if the change is to be put into its zero points."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability with which an input of the update is zeroed in training."""

    alternatives: ClassVar[Mapping[str, Any]] = {**BareRankConfig.alternatives, "group_size": 4, "dropout": 0.5}


class QaLoraAttached(PeftAttached):
    """QA-LoRA in place on a model."""

    def save(self, directory: Path) -> None:
        """Write an adapter directory, without asking the base for its tensors: bitsandbytes repacks them then."""
        layers = tuner_layers(self.model)
        parts = ("qalora_A", "qalora_B")
        tensors = {
            f"{PREFIX}{name}.{part}": getattr(layer, part)[ADAPTER] for name, layer in layers.items() for part in parts
        }
        write_adapter(directory, self.model.peft_config[ADAPTER], self.base, tensors)

    def delta(self, module: str) -> Tensor | None:
        """Return the change of one linear module's weight, which needs no pretrained one; None where there is none."""
        layers = tuner_layers(self.model)
        if module in layers:
            change: Tensor = layers[module].change().detach()
            return change
        whole = [name for name, found in self.model.get_base_model().named_modules() if has_sides(found)]
        others = {name for name in whole if not name.endswith(".base_layer")}
        if module not in others:
            raise unknown("linear module", module, {*layers, *others})
        return None


class QaLora(PeftMethod):
    """QA-LoRA: LoRA whose input is summed over groups, on a quantised base."""

    Config: ClassVar[type[MethodConfig]] = QaLoraConfig
    config: QaLoraConfig
    size: ClassVar[str | None] = "rank"
    card: ClassVar[MethodCard] = MethodCard(
        name="qalora",
        title="QA-LoRA",
        family="low-rank",
        paper="Xu et al., 2023, QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language Models",
        url="https://arxiv.org/abs/2309.14717",
        capabilities=frozenset(
            {
                Capability.TRAINS,
                Capability.LINEAR_DELTA,
                Capability.IDENTITY_AT_INIT,
                Capability.ONLINE_RL,
                Capability.QUANTIZED_BASE,
                Capability.NEEDS_QUANTIZED_BASE,
            }
        ),
        parameters="rank * sum over targets of (in / group_size + out)",
        learning_rate=2e-5,
        random_init=True,
        deviations=(
            "group_size is a setting; it is not read from the quantised layers",
            "the change is not put into the zero points of the quantised weights: the tuned model is not merged",
            "not verified on GPTQ layers, nor on a GPU",
            "peft's use_qalora, which only GPTQ layers heed, scales the mean of a group by the number of groups, where "
            "the paper and this take the sum",
        ),
        description=(
            "Adds a low-rank update of inputs summed over groups to each quantised linear layer. Refused on a model "
            "that is not quantised."
        ),
    )

    def layers(self, model: PreTrainedModel) -> dict[str, nn.Module]:
        """Return the quantised linear layers that the settings name.

        Raises:
            UserError: a layer is not quantised, or a setting does not fit it.
        """
        found = linear_like(model)
        inside = {name: layer for name, layer in found.items() if is_quantised(layer)}
        if not inside:
            raise UserError(
                f"qalora needs a quantised base model: {type(model).__name__} has no quantised linear layer; "
                "load it quantised, or use lora"
            )
        targets, blocks = self.config.targets, self.config.layers
        chosen = inside if targets == "all-linear" else select(found, targets, "linear layer")
        chosen = chosen if blocks is None else in_blocks(chosen, blocks)
        size = self.config.group_size
        for name, layer in chosen.items():
            if not is_quantised(layer):
                raise UserError(f"targets: {name} is not quantised, and qalora adapts quantised layers only")
            inputs, outputs = sides(layer)
            if inputs % size:
                raise UserError(f"group_size: {size} does not divide the input size {inputs} of {name}")
            limit = min(inputs // size, outputs)
            if self.config.rank > limit:
                raise UserError(
                    f"rank: {self.config.rank} is above the smaller side of {name} ({outputs} x {inputs // size} "
                    f"groups of {size}); allowed: 1 to {limit}"
                )
        return chosen

    def sizes(self, model: PreTrainedModel) -> range:
        """Return the ranks from 1 to the fewest groups, or outputs, of a quantised layer."""
        inside = [sides(layer) for layer in linear_like(model).values() if is_quantised(layer)]
        limits = [min(inputs // self.config.group_size, outputs) for inputs, outputs in inside]
        return range(1, min(limits, default=0) + 1)

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        shapes = [sides(layer) for layer in self.layers(model).values()]
        return sum(self.config.rank * (inputs // self.config.group_size + outputs) for inputs, outputs in shapes)

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return the configuration of our tuner."""
        from peft_arena.methods.low_rank.own_tuner import QaLoraLayer, own_config

        settings = {
            "rank": self.config.rank,
            "scaling": self.config.alpha / self.config.rank,
            "group_size": self.config.group_size,
            "dropout": self.config.dropout,
        }
        return own_config(QaLoraLayer, patterns, settings)

    def hold(self, model: PeftModel, base: str) -> PeftAttached:
        """Return the attachment that computes the change without the base weight."""
        return QaLoraAttached(self, model, base)


def linear_like(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return every module with input and output features, quantised or not, except the output layer."""
    output = model.get_output_embeddings()
    return {name: found for name, found in model.named_modules() if found is not output and has_sides(found)}


def has_sides(module: nn.Module) -> bool:
    """Say whether a module tells its input and output features, as linear layers of all libraries do."""
    return all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))


def sides(layer: nn.Module) -> tuple[int, int]:
    """Return input and output features of a linear layer, as it says itself."""
    known: Any = layer
    return int(known.in_features), int(known.out_features)


def is_quantised(layer: nn.Module) -> bool:
    """Say whether a linear layer holds its weight quantised: packed (``qweight``, ``W_q``), or in another type.

    Knows the layers of GPTQ and AWQ, HQQ, bitsandbytes and torchao by what they hold, not by their classes.
    """
    import torch

    if any(getattr(layer, name, None) is not None for name in ("qweight", "W_q")):
        return True
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return False
    packed = not weight.is_floating_point() or getattr(weight, "quant_state", None) is not None
    return packed or type(weight.data).__module__.partition(".")[0] == "torchao"
