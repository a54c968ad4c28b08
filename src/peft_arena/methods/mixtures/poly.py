"""Polytropon: an inventory of low-rank skills in every layer, mixed by trained weights.

W = W0 + (A B)^T / rank with A = sum_s w_s A_s (in, rank) and B = sum_s w_s B_s (rank, out); w are the normalised
sigmoids of trained logits, drawn from a relaxed Bernoulli distribution in training. The method is made for many tasks
that share skills; here there is one task, so a tuned model has one fixed mixture and is a plain change of weights. With
``splits`` above 1 inputs and outputs are cut into that many parts with a mixture each (multi-head routing).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from peft_arena.core.errors import UserError
from peft_arena.methods.adapter import ADAPTER, TASK, WEIGHT_ADAPTER, PeftAttached, PeftMethod, tuner_layers
from peft_arena.methods.base import Capability, MethodCard, MethodConfig
from peft_arena.methods.targets import AdaptedConfig
from peft_arena.methods.whole import settle_whole, whole_delta

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel


class PolyConfig(AdaptedConfig):
    """Settings of Polytropon."""

    rank: int = Field(default=8, ge=1)
    """Inner dimension of every skill; at most the smaller side of every target."""
    skills: int = Field(default=4, ge=2)
    """Pairs of matrices in every layer."""
    splits: int = Field(default=1, ge=1)
    """Parts of inputs and outputs with a mixture each; divides both sides of every target."""

    alternatives: ClassVar[Mapping[str, Any]] = {**AdaptedConfig.alternatives, "rank": 4, "skills": 2, "splits": 2}


class PolyAttached(PeftAttached):
    """Polytropon in place on a model."""

    def delta(self, module: str) -> Tensor | None:
        """Return the change of one linear module's weight, shape (out, in); None where there is none."""
        layer: Any = self.adapted(module)
        return whole_delta(self.model, module) if layer is None else mixed_change(layer)

    def merged(self) -> PreTrainedModel:
        """Return the plain model with the tuned weights: merged in float32, then in the type the base has."""
        settle_whole(self.model)
        for layer in tuner_layers(self.model).values():
            weight = layer.get_base_layer().weight
            weight.data = (weight.data.float() + mixed_change(layer)).to(weight.dtype)
        tuner: Any = self.model.base_model
        model: PreTrainedModel = tuner.unload()
        return model


class Poly(PeftMethod):
    """Polytropon: a trained mixture of low-rank skills in every layer."""

    Config: ClassVar[type[MethodConfig]] = PolyConfig
    config: PolyConfig
    size: ClassVar[str | None] = "rank"
    limited_by_rank: ClassVar[bool] = True
    card: ClassVar[MethodCard] = MethodCard(
        name="poly",
        title="Polytropon",
        family="mixture",
        paper="Ponti et al., 2022, Combining Modular Skills in Multitask Learning",
        url="https://arxiv.org/abs/2202.13914",
        capabilities=WEIGHT_ADAPTER - {Capability.PEFT_ADAPTER},
        parameters="sum over targets of skills * (rank * (in + out) + splits)",
        learning_rate=2e-4,
        micro_learning_rate=3e-2,
        random_init=True,
        deviations=(
            "one task: the task-skill allocation is one row, so there is nothing to share between tasks",
            "logits of skills and the skills have one learning rate; no Indian buffet process prior",
            "the change is scaled by 1 / rank, as peft does",
            "a checkpoint is a peft adapter directory, whose model must be given task_ids = 0 when called",
            "merging is ours: peft has none",
        ),
        description=(
            "Adds a trained mixture of low-rank skills to each target weight. In training the mixture is random; a "
            "tuned model has its mean."
        ),
    )

    def linears(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        """Return the target layers, refusing splits that do not divide a side."""
        layers = super().linears(model)
        splits = self.config.splits
        for name, layer in layers.items():
            if layer.in_features % splits or layer.out_features % splits:
                shape = f"{layer.out_features} x {layer.in_features}"
                raise UserError(f"splits: {splits} does not divide both sides of {name} ({shape})")
        return layers

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        sides = sum(layer.in_features + layer.out_features for layer in self.linears(model).values())
        logits = self.config.splits * len(self.linears(model))
        return self.config.skills * (self.config.rank * sides + logits)

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's Polytropon configuration, for one task."""
        import peft

        return peft.PolyConfig(
            task_type=TASK,
            r=self.config.rank,
            n_tasks=1,
            n_skills=self.config.skills,
            n_splits=self.config.splits,
            target_modules=patterns,
        )

    def finish(self, model: PeftModel) -> None:
        """Make every layer take each row for one of task 0: peft would need the task in every call."""
        for layer in tuner_layers(model).values():
            layer.register_forward_pre_hook(_first_task, with_kwargs=True)

    def hold(self, model: PeftModel, base: str) -> PeftAttached:
        """Return the attachment that can be merged."""
        return PolyAttached(self, model, base)


def mixed_change(layer: Any) -> Tensor:
    """Return the change of weight by the mean mixture, shape (out, in), float32.

    With w the sigmoids of the logits, normalised over skills: (A B)^T / rank, A = sum_s w_s A_s (in, rank), the splits
    under one another, and B = sum_s w_s B_s (rank, out), the splits beside one another.
    """
    import torch

    with torch.no_grad():
        first, second = layer.poly_lora_A[ADAPTER], layer.poly_lora_B[ADAPTER]  # (q, s, in/q, r), (q, s, r, out/q)
        splits, skills, _, rank = first.shape
        weights = torch.sigmoid(layer.poly_router[ADAPTER].module_logits[0]).view(splits, skills)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        down = torch.einsum("qs,qsir->qir", weights, first).reshape(-1, rank)
        up = torch.einsum("qs,qsro->rqo", weights, second).reshape(rank, -1)
        change: Tensor = (down @ up).T / rank
    return change


def _first_task(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    rows = args[0]
    return args, {"task_ids": rows.new_zeros(len(rows), dtype=int), **kwargs}
