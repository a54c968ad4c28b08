"""AdaLoRA: low-rank updates in the form of an SVD, whose ranks are pruned during training by importance.

W = W0 + (alpha / initial_rank) P diag(e) Q with P, Q kept near orthogonal by a term in the loss. All layers start at
``initial_rank``; from ``warmup`` of the training on, the entries of e with the lowest importance over the whole model
are set to zero, until they are ``target_rank`` per layer on average; the last ``final`` part trains with fixed ranks.

The layers, the allocator and the term in the loss are ``peft``'s. Its pruned checkpoints are not used: it drops entries
by the last mask even where they have grown again since; ours hold every entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, model_validator

from peft_arena.core.errors import UserError
from peft_arena.methods.adapter import ADAPTER, TASK, WEIGHT_ADAPTER, PeftAttached, PeftMethod, tuner_layers
from peft_arena.methods.base import MethodCard, MethodConfig
from peft_arena.methods.sizes import whole_numbers
from peft_arena.methods.state import check_fits, copy_into
from peft_arena.methods.targets import AdaptedConfig

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel


class AdaLoraConfig(AdaptedConfig):
    """Settings of AdaLoRA."""

    initial_rank: int = Field(default=12, ge=2)
    """Rank of every layer at the start; at most the smaller side of every target."""
    target_rank: int = Field(default=8, ge=1)
    """Mean rank of the layers at the end; below ``initial_rank``."""
    alpha: float = Field(default=16.0, gt=0, allow_inf_nan=False)
    """The update is scaled by alpha / initial_rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability with which an input of the update is zeroed in training."""
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """Part of the training before ranks are pruned, rounded down to steps."""
    final: float = Field(default=0.2, ge=0, lt=1)
    """Part of the training, at its end, in which the ranks are fixed, rounded down to steps."""
    interval: int = Field(default=1, ge=1)
    """Steps between two prunings."""
    beta1: float = Field(default=0.85, gt=0, lt=1)
    """Smoothing of the importance of a parameter over steps."""
    beta2: float = Field(default=0.85, gt=0, lt=1)
    """Smoothing of how uncertain the importance is."""
    orthogonality: float = Field(default=0.5, ge=0, allow_inf_nan=False)
    """Weight of the loss term that keeps P and Q orthogonal."""

    alternatives: ClassVar[Mapping[str, Any]] = {
        **AdaptedConfig.alternatives,
        "initial_rank": 16,
        "target_rank": 2,
        "alpha": 4.0,
        "dropout": 0.5,
        "warmup": 0.5,
        "final": 0.5,
        "interval": 2,
        "beta1": 0.05,
        "beta2": 0.05,
        "orthogonality": 0.1,
    }

    @model_validator(mode="after")
    def _prunes(self) -> Self:
        if self.target_rank >= self.initial_rank:
            raise ValueError(f"target_rank {self.target_rank} must be below initial_rank {self.initial_rank}")
        if self.warmup + self.final >= 1:
            raise ValueError(f"warmup {self.warmup} and final {self.final} leave no time to prune")
        return self


class AdaLoraAttached(PeftAttached):
    """AdaLoRA in place on a model."""

    method: AdaLora

    def begin(self, total: int) -> None:
        """Fix the schedule; warmup and final part together always leave a step to prune in."""
        settings, config = self.method.config, self._config
        config.tinit, config.tfinal = int(settings.warmup * total), int(settings.final * total)
        config.total_step = total

    def after_step(self, step: int, total: int) -> None:
        """Update the importance of the parameters, and prune where the schedule says so."""
        tuner: Any = self.model.base_model
        if step == total - self._config.tfinal:
            tuner.rankallocator.update_ipt(tuner.model)
        tuner.update_and_allocate(step)

    def state(self) -> dict[str, Tensor]:
        """Return the parameters, what is kept (1) or pruned (0) of them, and their smoothed importance."""
        return {**super().state(), **self._masks(), **self._importance()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put a state back; see :meth:`Attached.load_state`."""
        trained, masks, importance = self.trained(), self._masks(), self._importance()
        check_fits({**trained, **masks, **importance}, state, "the state")
        copy_into(trained, {name: state[name] for name in trained})
        allocator = self._allocator
        for name in self._entries():
            allocator.exp_avg_ipt[name] = state[f"importance.{name}"].to(self.model.device).clone()
            allocator.exp_avg_unc[name] = state[f"uncertainty.{name}"].to(self.model.device).clone()
            allocator.ipt[name] = allocator.exp_avg_ipt[name].new_zeros(allocator.exp_avg_ipt[name].shape)
        kept = {name.removeprefix("kept."): (state[name].view(-1) > 0).tolist() for name in masks}
        self._config.rank_pattern = kept if not all(all(rows) for rows in kept.values()) else None

    def save(self, directory: Path) -> None:
        """Write a plain AdaLoRA adapter of full size, with zeros for what is pruned."""
        pattern, self._config.rank_pattern = self._config.rank_pattern, None
        try:
            super().save(directory)
        finally:
            self._config.rank_pattern = pattern

    def ranks(self) -> dict[str, int]:
        """Return the current rank of each target: its entries of e that are not zero."""
        return {
            name.removesuffix(f".lora_E.{ADAPTER}"): int((p != 0).sum())
            for name, p in self._entries().items()
            if "lora_E" in name
        }

    @property
    def _config(self) -> Any:
        return self.model.peft_config[ADAPTER]

    @property
    def _allocator(self) -> Any:
        tuner: Any = self.model.base_model
        return tuner.rankallocator

    def _entries(self) -> dict[str, nn.Parameter]:
        tuner: Any = self.model.base_model
        return {name: p for name, p in tuner.model.named_parameters() if "lora_" in name}

    def _masks(self) -> dict[str, Tensor]:
        import torch

        pattern = self._config.rank_pattern or {}
        masks = {}
        for name, p in self._entries().items():
            if "lora_E" in name:
                rows = pattern.get(name, [True] * len(p))
                masks[f"kept.{name}"] = torch.tensor(rows, dtype=torch.float32, device=p.device).view(-1, 1)
        return masks

    def _importance(self) -> dict[str, Tensor]:
        import torch

        allocator, found = self._allocator, {}
        for name, p in self._entries().items():
            for kind, table in (("importance", allocator.exp_avg_ipt), ("uncertainty", allocator.exp_avg_unc)):
                found[f"{kind}.{name}"] = table.get(name, torch.zeros_like(p)).detach()
        return found


class AdaLora(PeftMethod):
    """AdaLoRA: low-rank updates whose ranks are allocated over the layers during training."""

    Config: ClassVar[type[MethodConfig]] = AdaLoraConfig
    config: AdaLoraConfig
    size: ClassVar[str | None] = "initial_rank"
    derived_settings: ClassVar[frozenset[str]] = frozenset({"total_step", "tinit", "tfinal"})
    card: ClassVar[MethodCard] = MethodCard(
        name="adalora",
        title="AdaLoRA",
        family="low-rank",
        paper="Zhang et al., 2023, Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
        url="https://arxiv.org/abs/2303.10512",
        capabilities=WEIGHT_ADAPTER,
        parameters="initial_rank * sum over targets of (in + out + 1), before pruning",
        learning_rate=1e-3,
        micro_learning_rate=1e-2,
        random_init=True,
        deviations=(
            "the parameters counted are those at the start; pruned entries stay in memory as zeros",
            "importance is taken from clipped gradients after the step, as peft does, and once more before the last "
            "pruning",
            "the scale stays alpha / initial_rank when ranks shrink",
            "the loss term is the mean over matrices of the Frobenius norm of P^T P - I, not of its square, and is "
            "computed in bfloat16 where training is in mixed precision",
        ),
        description=(
            "Adds P diag(e) Q to each target weight; entries of e with low importance are pruned over the whole "
            "model until target_rank per layer are left on average."
        ),
    )

    def linears(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        """Return the target layers, refusing an initial rank above a smaller side."""
        layers = super().linears(model)
        for name, layer in layers.items():
            limit = min(layer.in_features, layer.out_features)
            if self.config.initial_rank > limit:
                raise UserError(
                    f"initial_rank: {self.config.initial_rank} is above the smaller side of {name} "
                    f"({layer.out_features} x {layer.in_features}); allowed: 2 to {limit}"
                )
        return layers

    def sizes(self, model: PreTrainedModel) -> list[int]:
        """Return the initial ranks above the target rank that fit every linear layer."""
        return [rank for rank in whole_numbers(self.config, "initial_rank", model) if rank > self.config.target_rank]

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of parameters trained at the start, by the card's formula."""
        layers = self.linears(model).values()
        return sum(self.config.initial_rank * (layer.in_features + layer.out_features + 1) for layer in layers)

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's AdaLoRA configuration; its schedule is set when the training begins."""
        import peft

        return peft.AdaLoraConfig(
            task_type=TASK,
            init_r=self.config.initial_rank,
            target_r=self.config.target_rank,
            lora_alpha=self.config.alpha,  # type: ignore[arg-type]  # peft computes with floats
            lora_dropout=self.config.dropout,
            deltaT=self.config.interval,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            orth_reg_weight=self.config.orthogonality,
            target_modules=patterns,
            total_step=1,
        )

    def finish(self, model: PeftModel) -> None:
        """Keep the divisor of the scale, which peft stores as a parameter, out of training and in float32."""
        for layer in tuner_layers(model).values():
            divisor = layer.ranknum[ADAPTER]
            divisor.data = divisor.data.float()
            divisor.requires_grad_(False)

    def hold(self, model: PeftModel, base: str) -> PeftAttached:
        """Return the attachment that prunes."""
        return AdaLoraAttached(self, model, base)
