"""LoRA-FA and Riemannian LoRA: plain LoRA adapters whose gradients are corrected before AdamW sees them.

LoRA-FA freezes A and turns the gradient G of B into G (A A^T)^-1 / s^2, the B-gradient whose weight change is nearest
the full gradient. Riemannian LoRA trains both: G_A becomes (B^T B + d I)^-1 G_A and G_B becomes G_B (A A^T + d I)^-1.

The optimizer is torch's AdamW with a step hook, so its state is AdamW's. peft's own LoRA-FA optimizer computes the
correction in bfloat16, takes frozen parameters and keeps its state by name; its Riemannian one uses a pseudo-inverse.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from peft_arena.methods.adapter import ADAPTER, WEIGHT_ADAPTER, PeftAttached, tuner_layers
from peft_arena.methods.base import Capability, MethodCard, MethodConfig
from peft_arena.methods.low_rank.lora import Lora, LoraConfig

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from torch.optim import Optimizer
    from transformers import PreTrainedModel

NUGGET = 1e-8
"""Added to the diagonal of A A^T in LoRA-FA, as peft does."""


class LoraFaAttached(PeftAttached):
    """LoRA-FA in place on a model."""

    def optimizer(self, learning_rate: float, weight_decay: float) -> Optimizer:
        """Return AdamW on the corrected gradients of B."""
        optimizer = super().optimizer(learning_rate, weight_decay)
        optimizer.register_step_pre_hook(lambda *_: self._correct())
        return optimizer

    def frozen(self) -> dict[str, Tensor]:
        """Return A."""
        return {f"a.{name}": layer.lora_A[ADAPTER].weight.detach() for name, layer in tuner_layers(self.model).items()}

    def _correct(self) -> None:
        for layer in tuner_layers(self.model).values():
            first, second = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            if second.grad is not None:
                second.grad = divided(second.grad, first @ first.T, NUGGET) / layer.scaling[ADAPTER] ** 2


class LoraFa(Lora):
    """LoRA-FA: LoRA with A frozen at its random start."""

    card: ClassVar[MethodCard] = MethodCard(
        name="lora_fa",
        title="LoRA-FA",
        family="low-rank",
        paper="Zhang et al., 2023, LoRA-FA: Efficient and Effective Low Rank Representation Fine-tuning",
        url="https://arxiv.org/abs/2308.03303",
        capabilities=WEIGHT_ADAPTER | {Capability.LORA_ADAPTER},
        parameters="rank * sum over targets of out",
        equation="W + alpha / rank * lora_B @ lora_A",
        learning_rate=1e-4,
        micro_learning_rate=3e-2,
        random_init=True,
        deviations=(
            "the corrected gradient goes through AdamW, which rescales it entry by entry",
            "gradients are clipped before they are corrected",
            "the input of B is not stored more cheaply here: the memory saved is only that of A's optimizer state",
        ),
        description=(
            "LoRA that trains only B; the gradient of B is projected so that the weight change comes nearest the "
            "full gradient."
        ),
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        return sum(self.config.rank * layer.out_features for layer in self.linears(model).values())

    def finish(self, model: PeftModel) -> None:
        """Freeze A."""
        for layer in tuner_layers(model).values():
            layer.lora_A[ADAPTER].requires_grad_(False)

    def hold(self, model: PeftModel, base: str) -> PeftAttached:
        """Return the attachment with the correcting optimizer."""
        return LoraFaAttached(self, model, base)


class RiemannianConfig(LoraConfig):
    """Settings of Riemannian LoRA."""

    damping: float = Field(default=1e-2, gt=0, allow_inf_nan=False)
    """Added to the diagonals of B^T B and A A^T before they are inverted."""

    alternatives: ClassVar[Mapping[str, Any]] = {**LoraConfig.alternatives, "damping": 1.0}


class RiemannianAttached(PeftAttached):
    """Riemannian LoRA in place on a model."""

    method: RiemannianLora

    def optimizer(self, learning_rate: float, weight_decay: float) -> Optimizer:
        """Return AdamW on the preconditioned gradients of A and B."""
        optimizer = super().optimizer(learning_rate, weight_decay)
        optimizer.register_step_pre_hook(lambda *_: self._precondition())
        return optimizer

    def _precondition(self) -> None:
        damping = self.method.config.damping
        for layer in tuner_layers(self.model).values():
            first, second = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            if first.grad is not None:
                first.grad = divided(first.grad.T, second.T @ second, damping).T.contiguous()
            if second.grad is not None:
                second.grad = divided(second.grad, first @ first.T, damping)


class RiemannianLora(Lora):
    """Riemannian LoRA: each factor's gradient is preconditioned by the other factor."""

    Config: ClassVar[type[MethodConfig]] = RiemannianConfig
    config: RiemannianConfig
    card: ClassVar[MethodCard] = MethodCard(
        name="lora_riemannian",
        title="Riemannian preconditioned LoRA",
        family="low-rank",
        paper="Zhang and Pilanci, 2024, Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models",
        url="https://arxiv.org/abs/2402.02347",
        capabilities=WEIGHT_ADAPTER | {Capability.LORA_ADAPTER},
        parameters="rank * sum over targets of (in + out)",
        equation="W + alpha / rank * lora_B @ lora_A",
        learning_rate=1e-4,
        micro_learning_rate=3e-3,
        random_init=True,
        deviations=(
            "gradients are clipped before they are preconditioned",
            "A starts Kaiming-uniform (a = sqrt 5) unless init is 'gaussian'",
        ),
        description="LoRA whose gradients are multiplied by an inverse rank x rank matrix of the other factor.",
    )

    def hold(self, model: PeftModel, base: str) -> PeftAttached:
        """Return the attachment with the preconditioning optimizer."""
        return RiemannianAttached(self, model, base)


def divided(gradient: Tensor, gram: Tensor, damping: float) -> Tensor:
    """Return gradient (gram + damping I)^-1.

    Args:
        gradient: shape (any, rank).
        gram: symmetric and positive semidefinite, shape (rank, rank), float32.
        damping: above 0.
    """
    import torch

    with torch.no_grad():
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        return torch.linalg.solve(gram + damping * eye, gradient, left=False)
