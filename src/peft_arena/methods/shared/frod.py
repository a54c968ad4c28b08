"""FRoD: every weight is written in a basis shared by all layers of its kind, and few coefficients train.

W0 = U diag(l0) V^T, where V (in, in) is computed from the weights of all layers of one kind together (all q_proj, say)
and each layer's U follows from it. W = W0 + U (S + diag(l - l0)) V^T: l trains in full, the off-diagonal S (in, in) at
a share ``sparse_rate`` of its entries, drawn from the seed and shared by the kind. A checkpoint holds V and the places.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from peft_arena.core.ids import seed_for
from peft_arena.methods.adapter import ADAPTER, TASK, WEIGHT_ADAPTER, PeftAttached, PeftMethod, tuner_layers
from peft_arena.methods.base import Attached, Calibration, Capability, MethodCard, MethodConfig
from peft_arena.methods.targets import AdaptedConfig

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

STEPS = 10_000
"""A budget chooses the share in steps of 1 / STEPS."""


class FrodConfig(AdaptedConfig):
    """Settings of FRoD."""

    sparse_rate: float = Field(default=0.01, gt=0, le=1, allow_inf_nan=False)
    """Share of the entries of S that train; at least one trains."""
    regularization: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    """Ridge term of the joint decomposition, which keeps it stable where layers are alike."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability with which an input of the change is zeroed in training."""

    alternatives: ClassVar[Mapping[str, Any]] = {
        **AdaptedConfig.alternatives,
        "sparse_rate": 0.05,
        "regularization": 1.0,
        "dropout": 0.5,
    }


class FrodAttached(PeftAttached):
    """FRoD in place on a model."""

    def frozen(self) -> dict[str, Tensor]:
        """Return the shared bases and places, and each layer's U and l0."""
        tuner: Any = self.model.base_model
        named = {}
        for kind in tuner.frod_V:
            named[f"basis.{kind}"] = tuner.frod_V[kind][ADAPTER]
            named[f"places.{kind}"] = tuner.frod_s_indices[kind][ADAPTER]
        for name, layer in tuner_layers(self.model).items():
            named[f"u.{name}"], named[f"start.{name}"] = layer.frod_U[ADAPTER], layer.frod_start
        return named


class Frod(PeftMethod):
    """FRoD: trained coefficients of each weight in a basis that layers of its kind share."""

    Config: ClassVar[type[MethodConfig]] = FrodConfig
    config: FrodConfig
    size: ClassVar[str | None] = "sparse_rate"
    trains_vectors: ClassVar[bool] = True
    derived_settings: ClassVar[frozenset[str]] = frozenset({"projection_prng_key"})
    card: ClassVar[MethodCard] = MethodCard(
        name="frod",
        title="FRoD",
        family="weight-dependent",
        paper="Wan et al., 2025, FRoD: Full-Rank Efficient Fine-Tuning with Rotational Degrees for Fast Convergence",
        url="https://arxiv.org/abs/2512.23485",
        capabilities=WEIGHT_ADAPTER - {Capability.PEFT_ADAPTER},
        parameters="sum over targets of (in + min(max(1, floor(in^2 * sparse_rate)), in^2 - in))",
        learning_rate=1e-4,
        micro_learning_rate=1e-2,
        random_init=True,
        deviations=(
            "the change is added to the pretrained weight; peft puts the decomposition in its place, which differs "
            "from it by rounding before any training, in bfloat16 by a lot",
            "one learning rate for the diagonal and the sparse coefficients; the authors' examples have two",
            "no weight decay: it would pull the pretrained coefficients to zero",
            "directions that a kind of layer does not have (fewer outputs in all than inputs) stay out; peft fills "
            "them with rounding noise",
            "a checkpoint has peft's form, but peft computes each layer's U from its own decomposition before it reads "
            "the stored basis, so it reads it right only where LAPACK repeats that one",
            "the decomposition runs on the CPU and takes minutes on large models, also when a checkpoint is read",
            "each layer keeps U, as large as its weight, in float32; a checkpoint holds V of every kind, (in, in)",
        ),
        description=(
            "Writes each target weight in a basis shared between blocks, and trains its diagonal and a sparse set of "
            "other coefficients. The change has full rank."
        ),
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        return sum(layer.in_features + self._sparse(layer.in_features) for layer in self.linears(model).values())

    def sizes(self, model: PreTrainedModel) -> list[float]:
        """Return shares, ascending."""
        return [step / STEPS for step in range(1, STEPS + 1)]

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's FRoD configuration; its own seed is derived from the run's."""
        import peft

        return peft.FrodConfig(
            task_type=TASK,
            sparse_rate=self.config.sparse_rate,
            regularization_alpha=self.config.regularization,
            frod_dropout=self.config.dropout,
            projection_prng_key=seed_for(seed, "frod", "places"),
            save_projection=True,
            progressbar=False,
            target_modules=patterns,
            bias="none",
        )

    def attach(self, model: PreTrainedModel, *, seed: int, calibration: Calibration | None = None) -> Attached:
        """Wrap the model with a new adapter whose coefficients are those of the weights; see :meth:`Method.attach`."""
        attached: Any = super().attach(model, seed=seed, calibration=calibration)
        for layer in tuner_layers(attached.model).values():
            layer.frod_lambda_l[ADAPTER].data = layer.frod_start.clone()
        return attached

    def finish(self, model: PeftModel) -> None:
        """Keep the shared bases in float32 and where the layers are, and let the layers add a change."""
        import torch

        from peft_arena.methods.layers import FrodChange

        tuner: Any = model.base_model
        kinds: dict[str, list[Any]] = defaultdict(list)
        for layer in tuner_layers(model).values():
            layer.__class__ = FrodChange
            kinds[next(kind for kind, shared in tuner.frod_V.items() if shared is layer.frod_V)].append(layer)
        for kind, layers in kinds.items():
            weight = layers[0].get_base_layer().weight
            basis = tuner.frod_V[kind][ADAPTER]
            if weight.dtype != torch.float32:
                basis = self._basis(layers)
            tuner.frod_V[kind][ADAPTER] = basis.to(weight.device)
            tuner.frod_s_indices[kind][ADAPTER] = tuner.frod_s_indices[kind][ADAPTER].to(weight.device)

    def hold(self, model: PeftModel, base: str) -> PeftAttached:
        """Return the attachment, each layer's own vectors derived from the basis, new or read."""
        for layer in tuner_layers(model).values():
            layer.settle()
        return FrodAttached(self, model, base)

    def _basis(self, layers: list[Any]) -> Tensor:
        from peft.tuners.frod.model import _projection_from_weights

        weights = [layer.get_base_layer().weight.detach().float().cpu() for layer in layers]
        basis: Tensor = _projection_from_weights(weights, self.config.regularization)
        return basis

    def _sparse(self, inputs: int) -> int:
        return min(max(1, int(inputs * inputs * self.config.sparse_rate)), inputs * inputs - inputs)
