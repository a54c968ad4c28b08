"""KaSA: the smallest singular components of each weight are dropped, and an update with trained singular values added.

W = W0 - U_d S_d V_d^T + s B diag(d) A, where the dropped part has the ``rank`` smallest components of W0; B starts at
zero, A Kaiming-uniform and d standard normal. So the model changes before training. The loss gets beta ||d||^2 and
gamma (||B^T B - I|| + ||A A^T - I||) for each target, Frobenius norms.

The forward pass is ``peft``'s. The dropped part is kept as two factors, so the pretrained model can be had back, and a
checkpoint is a LoRA of twice the rank on it: s [B, -U_d S_d / s] [diag(d) A; V_d^T].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from peft_arena.core.errors import UserError
from peft_arena.methods.adapter import ADAPTER, tuner_layers
from peft_arena.methods.base import Capability, MethodCard, MethodConfig
from peft_arena.methods.low_rank.lora_inits import StartConfig
from peft_arena.methods.low_rank.split import (
    ROUNDED,
    SPLIT,
    STORED,
    SWITCHED_OFF,
    Factors,
    SplitAttached,
    SplitMethod,
    smallest,
    take_out,
)
from peft_arena.methods.state import local_random, swapped

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora.layer import LoraLayer
    from torch import Tensor, nn
    from transformers import PreTrainedModel


class KasaConfig(StartConfig):
    """Settings of KaSA."""

    beta: float = Field(default=1e-4, ge=0, allow_inf_nan=False)
    """Weight in the loss of the squared norm of each target's singular values d."""
    gamma: float = Field(default=1e-3, ge=0, allow_inf_nan=False)
    """Weight in the loss of each target's distance from orthonormal columns of B and rows of A."""

    alternatives: ClassVar[Mapping[str, Any]] = {**StartConfig.alternatives, "beta": 0.1, "gamma": 0.1}


class KasaAttached(SplitAttached):
    """KaSA in training: the base holds truncated weights; the starting factors are what was dropped."""

    method: Kasa

    def factors(self, layer: LoraLayer) -> Factors:
        """Return a layer's update as two factors: diag(d) A and B."""
        plain = super().factors(layer)
        return Factors(diagonal(layer).detach()[:, None] * plain.a, plain.b)

    @contextmanager
    def disabled(self) -> Iterator[nn.Module]:
        """Give the pretrained model's outputs inside the block: what was dropped is put back as the update."""
        import torch

        diagonals = {module: diagonal(layer) for module, layer in tuner_layers(self.model).items()}
        ones = {module: torch.ones_like(values) for module, values in diagonals.items()}
        drops = [layer.lora_dropout[ADAPTER] for layer in tuner_layers(self.model).values()]
        modes = [drop.training for drop in drops]
        try:
            for drop in drops:
                drop.eval()
            with swapped(diagonals, ones), super().disabled() as model:
                yield model
        finally:
            for drop, mode in zip(drops, modes, strict=True):
                drop.train(mode)

    def extra_loss(self) -> Tensor | None:
        """Return the two regularisers, summed over all targets."""
        import torch

        terms = []
        for layer in tuner_layers(self.model).values():
            a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            identity = torch.eye(len(a), dtype=a.dtype, device=a.device)
            skew = torch.linalg.norm(b.T @ b - identity) + torch.linalg.norm(a @ a.T - identity)
            terms.append(self.method.config.beta * diagonal(layer).square().sum() + self.method.config.gamma * skew)
        total: Tensor = torch.stack([term.to(terms[0].device) for term in terms]).sum()
        return total


class Kasa(SplitMethod):
    """KaSA: LoRA with trained singular values on weights without their smallest components."""

    Config: ClassVar[type[MethodConfig]] = KasaConfig
    config: KasaConfig
    card: ClassVar[MethodCard] = MethodCard(
        name="kasa",
        title="KaSA",
        family="low-rank",
        paper="Wang et al., 2024, KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models",
        url="https://arxiv.org/abs/2412.06071",
        capabilities=SPLIT - {Capability.IDENTITY_AT_INIT},
        parameters="sum over targets of rank * (in + out + 1)",
        learning_rate=1e-4,
        micro_learning_rate=3e-3,
        random_init=True,
        deviations=(
            "the update is scaled by alpha / rank, as in peft",
            "the regularisers are added up over the targets, as in peft",
            "dropout only reaches the update, never what was dropped from the weight",
            STORED,
            ROUNDED,
            SWITCHED_OFF,
        ),
        description=(
            "Drops the smallest singular components of each target weight, which changes the model before training, "
            "and adds s B diag(d) A with regularisers that keep B and A near orthonormal. Its change of weights, and "
            "the model with the method switched off, are relative to the pretrained weights, not the truncated ones."
        ),
    )

    def linears(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        """Return the target layers; see :meth:`PeftMethod.linears`.

        Raises:
            UserError: a setting does not fit the model.
        """
        found = super().linears(model)
        for name, layer in found.items():
            limit = min(layer.in_features, layer.out_features)
            if self.config.rank == limit:
                shape = f"{layer.out_features} x {layer.in_features}"
                raise UserError(
                    f"rank: {self.config.rank} would drop all of {name} ({shape}); allowed: 1 to {limit - 1}"
                )
        return found

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        return super().count(model) + self.config.rank * len(self.linears(model))

    def sizes(self, model: PreTrainedModel) -> Sequence[Any]:
        """Return the ranks that leave something of every weight."""
        return super().sizes(model)[:-1]

    def start(self, weight: Tensor) -> Factors:
        """Return the smallest components of a weight, the part that is dropped."""
        left, values, right = smallest(weight, self.config.rank)
        return Factors(right.clone(), left * (values / self.scale))

    def hold_split(self, model: PeftModel, base: str, start: dict[str, Factors]) -> SplitAttached:
        """Return the attachment with the regularisers."""
        return KasaAttached(self, model, base, start)

    def place(self, model: PeftModel, start: Mapping[str, Factors], seed: int) -> None:
        """Drop the components, and give every layer its singular values d; peft draws A and sets B to zero.

        This is what peft's own set-up of a layer does, but for the SVD, which it would repeat, and its rounding of d.
        """
        import torch
        from peft.tuners.lora.variants import KasaLinearVariant

        from peft_arena.core.ids import seed_for

        with local_random(seed_for(seed, "kasa", "diagonal")):
            for module, layer in tuner_layers(model).items():
                take_out(layer, start[module])
                values = torch.randn(self.config.rank).to(layer.get_base_layer().weight.device)
                layer.lora_diag = torch.nn.ParameterDict({ADAPTER: torch.nn.Parameter(values)}).train(layer.training)
                layer.adapter_layer_names = (*layer.adapter_layer_names, "lora_diag")
                layer._lora_kasa_truncation_deferred = set()
                layer.lora_variant[ADAPTER] = KasaLinearVariant()


def diagonal(layer: Any) -> Tensor:
    """Return a layer's trained singular values d, shape (rank,)."""
    values: Tensor = layer.lora_diag[ADAPTER]
    return values
