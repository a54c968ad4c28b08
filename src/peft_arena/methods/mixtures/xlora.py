"""X-LoRA: several LoRA experts in every layer, weighted token by token by a trained gate on the last hidden state.

A first pass of the pretrained model gives the hidden state h of each token; the gate's softmax over experts, g(h), then
weighs the experts in a second pass: y = W0 x + alpha / rank sum_e g_e(h) B_e A_e x. In the paper the experts were
trained before, each on a task of its own; here they start new and train together with the gate. Layers and gate are
peft's; the two passes are ours, because peft's fill a given cache twice.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, model_validator

from peft_arena.core.errors import UserError
from peft_arena.core.parts import scratch
from peft_arena.methods.adapter import TASK, PeftAttached, PeftMethod
from peft_arena.methods.adapters.bottleneck import hidden_size
from peft_arena.methods.base import Attached, Calibration, Capability, MethodCard, MethodConfig
from peft_arena.methods.files import WEIGHTS, check_settings, read_settings, read_tensors, settings_table, write_adapter
from peft_arena.methods.low_rank.lora import BareRankConfig
from peft_arena.methods.state import copy_into, local_random
from peft_arena.methods.targets import patterns_for
from peft_arena.methods.wrapping import wrap

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel

GATE = "internal_xlora_classifier"
INPUTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
"""What the first pass is given of a call."""


class XLoraConfig(BareRankConfig):
    """Settings of X-LoRA."""

    experts: int = Field(default=4, ge=2)
    """LoRA adapters in every layer."""
    gate_size: int | None = Field(default=None, ge=1)
    """Inner size of the gate, a network of two layers; None: one linear layer."""
    layerwise: bool = True
    """Whether every layer has a mixture of its own; if not, all have the same."""
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """The gate's logits are divided by it before the softmax."""
    top_k: int | None = Field(default=None, ge=1)
    """Experts that act on a token, those with the largest weights, which are not made to add up to one; None: all."""

    alternatives: ClassVar[Mapping[str, Any]] = {
        **BareRankConfig.alternatives,
        "experts": 3,
        "gate_size": 8,
        "layerwise": False,
        "temperature": 0.1,
        "top_k": 1,
    }

    @model_validator(mode="after")
    def _fewer_than_all(self) -> Self:
        if self.top_k is not None and self.top_k >= self.experts:
            raise ValueError(f"top_k must be below experts ({self.experts}), not {self.top_k}; null for all")
        return self


class XLoraAttached(PeftAttached):
    """X-LoRA in place on a model."""

    method: XLora

    def save(self, directory: Path) -> None:
        """Write gate and experts; peft's own checkpoint would lack layers of the gate."""
        layers = [name for name, _ in experts_of(self.model)]
        write_adapter(directory, self.method.stored_config(layers), self.base, tensors_of(self.model))


class XLora(PeftMethod):
    """X-LoRA: LoRA experts weighted for every token."""

    Config: ClassVar[type[MethodConfig]] = XLoraConfig
    config: XLoraConfig
    size: ClassVar[str | None] = "rank"
    limited_by_rank: ClassVar[bool] = True
    card: ClassVar[MethodCard] = MethodCard(
        name="xlora",
        title="X-LoRA",
        family="mixture",
        paper="Buehler and Buehler, 2024, X-LoRA: Mixture of Low-Rank Adapter Experts, a Flexible Framework for Large "
        "Language Models with Applications in Protein Mechanics and Molecular Design",
        url="https://arxiv.org/abs/2402.07148",
        capabilities=frozenset({Capability.TRAINS, Capability.IDENTITY_AT_INIT, Capability.ONLINE_RL}),
        parameters=(
            "experts * rank * sum over targets of (in + out), and the gate: h * n + n with h the hidden size and "
            "n = experts * targets (experts if not layerwise); with gate_size g: h * g + g + g * n + n"
        ),
        learning_rate=1e-4,
        micro_learning_rate=3e-3,
        random_init=True,
        deviations=(
            "the experts start new and train with the gate, where the paper trains a gate over finished, frozen ones",
            "a checkpoint is our own: peft's drops layers of the gate, and its merging ignores the gate",
            "no dropout; the gate sees the pretrained model's hidden states, never those with the experts on",
            "the two passes are ours, each with its cache: peft's both fill the one that is given",
        ),
        description=(
            "Adds several LoRA experts to each target weight; a gate on the pretrained model's last hidden state "
            "weighs them for every token. Costs two forward passes."
        ),
    )

    def linears(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        """Return the target layers, refusing a model whose names peft cannot follow."""
        layers = super().linears(model)
        for name in layers:
            if not name.startswith("model.") or name.startswith("model.model."):
                raise UserError(f"xlora needs target layers inside a module named model, {name} is not")
        return layers

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        layers, config = self.linears(model).values(), self.config
        experts = config.experts * config.rank * sum(layer.in_features + layer.out_features for layer in layers)
        outputs = config.experts * (len(layers) if config.layerwise else 1)
        hidden, inner = hidden_size(model), config.gate_size
        if inner is None:
            return experts + (hidden + 1) * outputs
        return experts + (hidden + 1) * inner + (inner + 1) * outputs

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return the configuration of one expert."""
        import peft

        return peft.LoraConfig(
            task_type=TASK,
            r=self.config.rank,
            lora_alpha=self.config.alpha,  # type: ignore[arg-type]  # peft computes with floats
            target_modules=patterns,
            bias="none",
        )

    def stored_config(self, patterns: list[str]) -> PeftConfig:
        """Return what a checkpoint says of itself."""
        from peft_arena.methods.low_rank.own_tuner import OwnConfig

        kind: Any = "PEFT_ARENA_XLORA"
        settings = self.config.model_dump(mode="json", exclude={"targets", "layers"})
        return OwnConfig(peft_type=kind, task_type=TASK, target_modules=sorted(patterns), settings=settings)

    def attach(self, model: PreTrainedModel, *, seed: int, calibration: Calibration | None = None) -> Attached:
        """Put new experts and a new gate on the model; see :meth:`Method.attach`."""
        layers = self.linears_of_new(model)
        base = str(model.name_or_path or "")
        return XLoraAttached(self, self._mix(model, layers, seed, trains=True), base)

    def restore(self, model: PreTrainedModel, directory: Path) -> Attached:
        """Put a saved gate and its experts on a freshly loaded model; see :meth:`Method.restore`."""
        name = self.card.name
        saved = read_settings(directory, name)
        tensors = read_tensors(directory / WEIGHTS, name)
        layers = self.linears_of_new(model)
        check_settings(saved, settings_table(self.stored_config(list(layers))), (), name, directory)
        base = str(model.name_or_path or "")
        wrapped = self._mix(model, layers, 0, trains=False)
        copy_into(tensors_of(wrapped), tensors, where=str(directory / WEIGHTS))
        wrapped.requires_grad_(False)
        wrapped.eval()
        return XLoraAttached(self, wrapped, base)

    def linears_of_new(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        """Return the target layers, refusing a model that has been adapted before."""
        self._targets(model)
        return self.linears(model)

    def _mix(self, model: PreTrainedModel, layers: Mapping[str, nn.Linear], seed: int, trains: bool) -> PeftModel:
        """Wrap a model; peft reads the new experts from a temporary directory."""
        import peft

        settings, training = self.config, model.training
        config: Any = model.config
        config.use_cache = False  # peft's condition; a cache can still be given
        with (
            scratch("experts") as folder,
            local_random(seed),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", message="The PEFT config's `base_model_name_or_path` was renamed")
            adapters = {str(number): str(folder / str(number)) for number in range(settings.experts)}
            for path in adapters.values():
                write_adapter(Path(path), self.peft_config(patterns_for(model, layers), seed), "", self._expert(layers))
            wrapped: Any = wrap(
                model,
                peft.XLoraConfig(
                    task_type=TASK,
                    hidden_size=hidden_size(model),
                    adapters=adapters,
                    layerwise_scalings=settings.layerwise,
                    xlora_depth=1 if settings.gate_size is None else 2,
                    xlora_size=settings.gate_size or 1,
                    xlora_dropout_p=0.0,
                    use_trainable_adapters=trains,
                    softmax_temperature=settings.temperature,
                    top_k_lora=settings.top_k,
                ),
            )
        found = {name for name, _ in experts_of(wrapped)}
        if found != set(layers):
            raise UserError(f"method xlora would adapt {len(found)} layers instead of {len(layers)}")
        TwoPasses(wrapped.base_model)
        wrapped.train(training)
        mixed: PeftModel = wrapped
        return mixed

    def _expert(self, layers: Mapping[str, nn.Linear]) -> dict[str, Tensor]:
        """Return a new LoRA, by the names of a peft checkpoint."""
        import torch

        tensors = {}
        for name, layer in layers.items():
            first = torch.empty(self.config.rank, layer.in_features)
            torch.nn.init.kaiming_uniform_(first, a=5**0.5)
            tensors[f"base_model.model.{name}.lora_A.weight"] = first
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.zeros(layer.out_features, self.config.rank)
        return tensors


def experts_of(model: PeftModel) -> list[tuple[str, Any]]:
    """Return the layers with experts by the name of the base module each stands for."""
    tuner: Any = model.base_model
    return _layers_with_experts(tuner.lora_model.model)


def tensors_of(model: PeftModel) -> dict[str, Tensor]:
    """Return every tensor of gate and experts, by name."""
    named = {name: p.detach() for name, p in model.named_parameters()}
    return {name: p for name, p in named.items() if f".{GATE}." in name or ".lora_A." in name or ".lora_B." in name}


def _layers_with_experts(base: nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, module) for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)]


class TwoPasses:
    """Runs the pretrained model before every call of the mixed one, and hands the gate's weights to the layers."""

    def __init__(self, tuner: Any) -> None:
        """Put hooks on the base model and the layers with experts, in the place of peft's own."""
        self.tuner = tuner
        self.weights: Tensor | None = None
        """Of the call in progress, shape (rows, tokens, layers, experts)."""
        self.gate = tuner.internal_xlora_classifier.float()
        base = tuner.lora_model.model
        base.register_forward_pre_hook(self._first_pass, with_kwargs=True)
        for _, layer in _layers_with_experts(base):
            layer.register_forward_pre_hook(self._hand_over, with_kwargs=True)
        tuner._enable_peft_forward_hooks = lambda *_, **__: nullcontext()

    def _first_pass(self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compute the weights from the pretrained model's last hidden state, unless the method is switched off."""
        if self.tuner.disabled:
            return
        import torch

        given = {name: kwargs[name] for name in INPUTS if kwargs.get(name) is not None}
        if args:
            given["input_ids"] = args[0]
        cache = kwargs.get("past_key_values")
        given |= (
            {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": _gate_cache(cache, base)}
        )
        self.tuner.disabled = True
        try:
            with torch.no_grad():
                hidden = base.base_model(**given).last_hidden_state
        finally:
            self.tuner.disabled = False
        seen = {name: given[name] for name in ("input_ids", "inputs_embeds") if name in given}
        self.weights = self.gate(result=SimpleNamespace(hidden_states=[hidden.float()]), **seen)

    def _hand_over(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "scalings": self.weights}


def _gate_cache(cache: Any, base: Any) -> Any:
    """Return the cache of the first pass that belongs to one of the second; selecting rows of one selects both's.

    Raises:
        UserError: the cache was filled by another model.
    """
    from transformers import DynamicCache

    found = getattr(cache, "xlora_gate", None)
    if found is None:
        found = DynamicCache(config=base.config)
        if cache.get_seq_length() or len(getattr(cache, "layers", ())) != len(found.layers):
            raise UserError("xlora cannot use this cache: give DynamicCache(config=model.config), empty at first")
        cache.layers.extend(found.layers)
        cache.xlora_gate = found
    return found
