"""BitFit and BEFT: only biases train, with BEFT those of the value projections.

Every target linear gets a trained bias, zero at the start (``peft``'s BEFT layer). Where the layer has a bias of its
own (q, k and v of Qwen2) the two add up, so training the second from zero is training the first from where it is;
without weight decay, as here, gradients and updates are the same. Models without biases, such as Llama, get them on
all targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from peft_arena.core.errors import UserError
from peft_arena.methods.adapter import TASK, WEIGHT_ADAPTER, PeftAttached, PeftMethod, tuner_layers
from peft_arena.methods.base import Capability, MethodCard, MethodConfig
from peft_arena.methods.targets import AdaptedConfig, LinearTargets

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

BIAS_SWITCHES = ("attention_bias", "mlp_bias")
"""Entries of a model's configuration that give its linear layers biases."""


class BitFitConfig(AdaptedConfig):
    """Settings of BitFit: the layers whose bias trains."""


class BitFitAttached(PeftAttached):
    """BitFit in place on a model."""

    def merged(self) -> PreTrainedModel:
        """Return the plain model with the tuned biases, its configuration asking for biases where it had none.

        Raises:
            UserError: the architecture has no place for a bias on one of the targets.
        """
        base: Any = self.model.get_base_model()
        layers = tuner_layers(self.model)
        bare = [name for name, layer in layers.items() if layer.get_base_layer().bias is None]
        if bare:
            config, biased = with_biases(base, bare, self.method.card.name)
            base.config = config
            plain = {name: layer.get_base_layer() for name, layer in layers.items()}
            plain |= {name: module for name, module in base.named_modules() if name not in plain}
            for name in biased:
                add_zero_bias(plain[name])
        return super().merged()


class BitFit(PeftMethod):
    """BitFit: a trained bias on every target."""

    Config: ClassVar[type[MethodConfig]] = BitFitConfig
    config: BitFitConfig
    trains_vectors: ClassVar[bool] = True
    card: ClassVar[MethodCard] = MethodCard(
        name="bitfit",
        title="BitFit",
        family="selective",
        paper="Ben Zaken et al., 2021, BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Models",
        url="https://arxiv.org/abs/2106.10199",
        capabilities=WEIGHT_ADAPTER - {Capability.LINEAR_DELTA},
        parameters="sum over targets of out",
        learning_rate=1e-3,
        micro_learning_rate=0.1,
        random_init=False,
        deviations=(
            "a layer without a bias gets one, zero at the start; a layer with one gets a second that adds to it",
            "biases of normalisation layers and of the output layer are not trained",
            "merging writes a model whose configuration asks for biases; it is refused where the architecture has no "
            "place for one (the feed-forward layers of Qwen2)",
        ),
        description="Trains one bias per output of the targets and nothing else; no weight matrix changes.",
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        return sum(layer.out_features for layer in self.linears(model).values())

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's BEFT configuration."""
        import peft

        return peft.BeftConfig(task_type=TASK, target_modules=patterns, init_weights=True)

    def hold(self, model: PeftModel, base: str) -> PeftAttached:
        """Return the attachment that can merge into a model without biases."""
        return BitFitAttached(self, model, base)


class BeftConfig(AdaptedConfig):
    """Settings of BEFT: the layers whose bias trains."""

    targets: LinearTargets = ("v_proj",)
    """The value projections: module names or last parts of them. Models name them differently, hence a setting."""

    alternatives: ClassVar[Mapping[str, Any]] = {**AdaptedConfig.alternatives, "targets": ("k_proj", "v_proj")}


class Beft(BitFit):
    """BEFT: a trained bias on the value projections."""

    Config: ClassVar[type[MethodConfig]] = BeftConfig
    config: BeftConfig  # type: ignore[assignment]
    card: ClassVar[MethodCard] = MethodCard(
        name="beft",
        title="BEFT",
        family="selective",
        paper="Huang et al., 2025, BEFT: Bias-Efficient Fine-Tuning of Language Models",
        url="https://arxiv.org/abs/2509.15974",
        capabilities=WEIGHT_ADAPTER - {Capability.LINEAR_DELTA},
        parameters="sum over targets of out",
        learning_rate=1e-3,
        micro_learning_rate=0.1,
        random_init=False,
        deviations=(
            "a layer without a bias gets one, zero at the start; a layer with one gets a second that adds to it",
            "the value projections are what the paper's score chooses as a rule; the score itself is not computed",
            "merging writes a model whose configuration asks for biases; it is refused where the architecture has no "
            "place for one",
        ),
        description="Trains one bias per output of the value projections and nothing else; no weight matrix changes.",
    )


def with_biases(model: PreTrainedModel, wanted: list[str], method: str) -> tuple[PretrainedConfig, list[str]]:
    """Find the configuration that gives a model's architecture biases on some linear layers.

    Args:
        model: the model; it is not changed.
        wanted: names of linear layers that need a bias.
        method: named in the refusal.

    Returns:
        The configuration, and every linear layer that has a bias under it but has none now.

    Raises:
        UserError: the architecture has no such configuration.
    """
    import copy

    import torch
    from torch import nn

    config = copy.deepcopy(model.config)
    for switch in BIAS_SWITCHES:
        if hasattr(config, switch):
            setattr(config, switch, True)
    with torch.device("meta"):
        sketch = type(model)(config)
    linears = {name: module for name, module in sketch.named_modules() if isinstance(module, nn.Linear)}
    biased = {name for name, linear in linears.items() if linear.bias is not None}
    lacking = [name for name in wanted if name not in biased]
    if lacking:
        raise UserError(
            f"cannot merge {method}: {type(model).__name__} has no place for a bias on {lacking[0]} "
            f"and {len(lacking) - 1} other layers; evaluate the adapter instead"
        )
    has = {name.replace(".base_layer", "") for name, _ in model.named_parameters() if name.endswith(".bias")}
    return config, sorted(name for name in biased if f"{name}.bias" not in has)


def add_zero_bias(layer: nn.Linear) -> None:
    """Give a linear layer without a bias one of zeros, in its weight's type."""
    import torch

    zeros = torch.zeros(layer.out_features, dtype=layer.weight.dtype, device=layer.weight.device)
    layer.bias = torch.nn.Parameter(zeros, requires_grad=False)
