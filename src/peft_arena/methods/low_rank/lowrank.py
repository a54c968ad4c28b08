"""Methods that train few components of each weight's singular decomposition, and whose checkpoints are LoRAs.

Their change of a weight is a product of two matrices. ``peft``'s own checkpoints of these methods hold the trained part
only and repeat the decomposition when they are read, which is the same one only with the same LAPACK. Here a checkpoint
is the product, a plain LoRA adapter on the pretrained model, and a state for resuming holds the frozen components too.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_arena.methods.adapter import ADAPTER, PREFIX, PeftAttached, PeftMethod, tuner_layers
from peft_arena.methods.base import Attached, Calibration
from peft_arena.methods.targets import patterns_for
from peft_arena.methods.whole import whole_delta

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel


class LowRankAttached(PeftAttached):
    """A method in training whose layers have the ``factors()`` of :class:`peft_arena.methods.layers.LowRank`."""

    method: LowRankMethod

    def save(self, directory: Path) -> None:
        """Write the change from the pretrained weights as a plain LoRA adapter."""
        tensors, ranks = {}, {}
        for module, layer in tuner_layers(self.model).items():
            a, b = layer.factors()
            tensors[f"{PREFIX}{module}.lora_A.weight"], tensors[f"{PREFIX}{module}.lora_B.weight"] = a, b
            ranks[module] = a.shape[0]
        config: Any = self.model.peft_config[ADAPTER]
        stored = self.method.stored_lora(sorted(config.target_modules), ranks)
        self.write(directory, stored, tensors)

    def delta(self, module: str) -> Tensor | None:
        """Return tuned minus pretrained weight of one linear module in float32; None where it is unchanged."""
        import torch

        layer: Any = self.adapted(module)
        if layer is None:
            return whole_delta(self.model, module)
        with torch.no_grad():
            a, b = layer.factors()
            change: Tensor = b @ a
        return change

    def frozen(self) -> dict[str, Tensor]:
        """Return the components that the trained tensors belong to."""
        layers = tuner_layers(self.model)
        return {
            f"frozen.{module}.{name}": tensor
            for module, layer in layers.items()
            for name, tensor in self.method.frozen(layer).items()
        }


class LowRankMethod(PeftMethod):
    """A method of the peft library whose checkpoints are LoRAs: subclasses name the mended layers and their buffers."""

    @abstractmethod
    def prepare(self, model: PeftModel) -> None:
        """Mend the layers of a freshly wrapped model: each must have ``factors()`` afterwards."""

    def stored_lora(self, patterns: list[str], ranks: Mapping[str, int]) -> PeftConfig:
        """Return the configuration of a checkpoint with the given ranks of the product by module."""
        return self.stored_config(patterns)

    @abstractmethod
    def frozen(self, layer: Any) -> dict[str, Tensor]:
        """Return the untrained tensors of one layer that training depends on, by name."""

    def attach(self, model: PreTrainedModel, *, seed: int, calibration: Calibration | None = None) -> Attached:
        """Wrap the model with a new adapter; see :meth:`Method.attach`."""
        layers = self._targets(model)
        base = str(model.name_or_path or "")
        wrapped = self._wrap(model, self.peft_config(patterns_for(model, layers), seed), seed, set(layers))
        self.prepare(wrapped)
        return LowRankAttached(self, wrapped, base)
