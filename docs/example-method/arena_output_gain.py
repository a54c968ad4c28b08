"""Output gain: every output of a linear layer is multiplied by 1 + g, and only g trains."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from peft_arena.core.errors import UserError, unknown
from peft_arena.methods.base import Attached, Calibration, Capability, Method, MethodCard
from peft_arena.methods.files import read_table, read_tensors
from peft_arena.methods.state import copy_into
from peft_arena.methods.targets import TargetConfig, linear_layers, linear_targets

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

SETTINGS, WEIGHTS = "output_gain.json", "output_gain.safetensors"


class OutputGainAttached(Attached):
    """A model whose target layers have a gain."""

    model: PreTrainedModel

    def __init__(self, model: PreTrainedModel, layers: dict[str, nn.Linear], settings: dict[str, Any]) -> None:
        """Give each layer a gain of zero, which changes nothing."""
        import torch
        from torch import nn

        self.model, self.layers, self.settings = model, layers, settings
        self.on = True
        model.requires_grad_(False)
        for layer in layers.values():
            layer.gain = nn.Parameter(torch.zeros(layer.out_features, device=layer.weight.device))
        self._hooks = [layer.register_forward_hook(self._multiply) for layer in layers.values()]

    def _multiply(self, layer: nn.Module, _: object, output: Tensor) -> Tensor:
        gain: Any = layer.gain
        return (output.float() * (1 + gain)).to(output.dtype) if self.on else output

    def gains(self) -> dict[str, Tensor]:
        """Return every gain, shape (out,), by the name of its parameter."""
        found: dict[str, Any] = {f"{name}.gain": layer.gain for name, layer in self.layers.items()}
        return found

    def save(self, directory: Path) -> None:
        """Write the gains, and the settings they belong to."""
        from safetensors.torch import save_file

        directory.mkdir(parents=True, exist_ok=True)
        (directory / SETTINGS).write_text(json.dumps(self.settings), encoding="utf-8")
        save_file({name: gain.detach().cpu() for name, gain in self.gains().items()}, directory / WEIGHTS)

    @contextmanager
    def disabled(self) -> Iterator[nn.Module]:
        """Give the pretrained model's outputs inside the block."""
        self.on = False
        try:
            yield self.model
        finally:
            self.on = True

    def delta(self, module: str) -> Tensor | None:
        """Return gain times weight, in float32."""
        if module in self.layers:
            layer: Any = self.layers[module]
            change: Tensor = layer.gain.detach()[:, None] * layer.weight.detach().float()
            return change
        output = self.model.get_output_embeddings()
        linears = {**linear_layers(self.model), **{n: m for n, m in self.model.named_modules() if m is output}}
        if module not in linears:
            raise unknown("linear module", module, linears)
        return None

    def merged(self) -> PreTrainedModel:
        """Multiply weights and biases by the gains, in float32, and take the gains away."""
        for hook in self._hooks:
            hook.remove()
        for layer in self.layers.values():
            factor: Any = 1 + layer.gain.detach()
            layer.weight.data = (layer.weight.data.float() * factor[:, None]).to(layer.weight.dtype)
            if layer.bias is not None:
                layer.bias.data = (layer.bias.data.float() * factor).to(layer.bias.dtype)
            del layer.gain
        return self.model


class OutputGain(Method):
    """Output gain: one trained number for each output of the target layers."""

    Config: ClassVar[type[TargetConfig]] = TargetConfig
    config: TargetConfig
    card: ClassVar[MethodCard] = MethodCard(
        name="output_gain",
        title="Output gain",
        family="scaling",
        paper="none",
        url="",
        capabilities=frozenset(
            {
                Capability.TRAINS,
                Capability.LINEAR_DELTA,
                Capability.MERGEABLE,
                Capability.IDENTITY_AT_INIT,
                Capability.ONLINE_RL,
            }
        ),
        parameters="sum over targets of out",
        equation="W + column(gain) * W",
        learning_rate=5e-3,
        micro_learning_rate=2e-2,
        description="Multiplies each output of a target layer by 1 + g; only g trains, and it starts at zero.",
    )

    def layers(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        """Return the layers that the settings name.

        Raises:
            UserError: they name none, or the model has been adapted before.
        """
        found = linear_targets(model, self.config.targets, self.config.layers)
        if any(hasattr(layer, "gain") for layer in found.values()):
            raise UserError("cannot attach output_gain: the model already has gains")
        return found

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of outputs of all targets."""
        return sum(layer.out_features for layer in self.layers(model).values())

    def attach(self, model: PreTrainedModel, *, seed: int, calibration: Calibration | None = None) -> Attached:
        """Put gains of zero on the model; nothing is random."""
        return OutputGainAttached(model, self.layers(model), self.config.model_dump(mode="json"))

    def restore(self, model: PreTrainedModel, directory: Path) -> Attached:
        """Put saved gains on the model, frozen.

        Raises:
            UserError: they are missing, damaged or of other settings.
        """
        settings, own = read_table(directory / SETTINGS, self.card.name), self.config.model_dump(mode="json")
        if settings != own:
            raise UserError(f"{directory} was made with the settings {settings}, not {own}")
        gains = read_tensors(directory / WEIGHTS, self.card.name)
        attached = OutputGainAttached(model, self.layers(model), own)
        copy_into(attached.gains(), gains, where=str(directory / WEIGHTS))
        model.requires_grad_(False)
        model.eval()
        return attached
