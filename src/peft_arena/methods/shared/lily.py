"""Lily: down-projections shared by neighbouring layers, up-projections shared by all, mixed by a router.

y = W0 x + s (sum_e p_e B_e) A x: A (rank, in) is shared by ``stride`` neighbouring layers of a kind, the ``experts``
matrices B_e (out, rank) by all layers of a kind, and each layer has a router (experts, rank) on A x. p is the router's
softmax: each token's own, or, as in peft, averaged over all tokens of the batch, later ones, padding and other rows
included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_arena.core.errors import UserError
from peft_arena.methods.adapter import ADAPTER, TASK, PeftAttached, PeftMethod, stored_tensors, tuner_layers
from peft_arena.methods.base import Capability, MethodCard, MethodConfig
from peft_arena.methods.targets import AdaptedConfig, linear_targets

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel


class LilyConfig(AdaptedConfig):
    """Settings of Lily."""

    rank: int = Field(default=32, ge=1)
    """Inner dimension of the update; it may exceed a layer's size."""
    stride: int = Field(default=4, ge=1)
    """Neighbouring layers of a kind (all q_proj, say) that share one A; 1: each has its own."""
    experts: int = Field(default=4, ge=2)
    """Matrices B of a kind of layer, shared by all its layers."""
    scaling: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """The update is multiplied by it."""
    routing: Literal["token", "batch"] = "token"
    """Mix by each token's own shares, or by their average over all tokens of a batch. The latter is peft's form; with
    it an output depends on later tokens, on padding and on the other rows, so a score depends on the batch size."""

    alternatives: ClassVar[Mapping[str, Any]] = {
        **AdaptedConfig.alternatives,
        "rank": 8,
        "stride": 1,
        "experts": 2,
        "scaling": 0.25,
        "routing": "batch",
    }


class LilyAttached(PeftAttached):
    """Lily in place on a model."""

    def save(self, directory: Path) -> None:
        """Write a plain adapter directory; a shared matrix is written once for each layer, as peft reads it."""
        tensors = {name: tensor.detach().clone() for name, tensor in stored_tensors(self.model).items()}
        self.write(directory, self.model.peft_config[ADAPTER], tensors)


class Lily(PeftMethod):
    """Lily: low-rank updates whose halves are shared across layers."""

    Config: ClassVar[type[MethodConfig]] = LilyConfig
    config: LilyConfig
    size: ClassVar[str | None] = "rank"
    card: ClassVar[MethodCard] = MethodCard(
        name="lily",
        title="Lily",
        family="mixture",
        paper="Zhong et al., 2024, Low-Rank Interconnected Adaptation across Layers",
        url="https://arxiv.org/abs/2407.09946",
        capabilities=frozenset({Capability.TRAINS, Capability.IDENTITY_AT_INIT, Capability.ONLINE_RL}),
        parameters=(
            "sum over kinds of layer of rank * (ceil(layers / stride) * in + experts * out + layers * experts)"
        ),
        learning_rate=1e-4,
        micro_learning_rate=1e-2,
        random_init=True,
        deviations=(
            "each token has its own mixture, where peft and the authors' code average it over a batch; that form, "
            "routing = 'batch', lets an output depend on later tokens and on other rows; it is refused with packing "
            "and in reinforcement learning",
            "a checkpoint is a plain peft adapter with routing 'batch' only; peft refuses that of 'token'",
            "layers are of a kind if they have the same last name and shape, whatever the settings name",
        ),
        description=(
            "Adds a low-rank update whose down-projection is shared by neighbouring layers and whose up-projection is "
            "a mixture, by a trained router, of matrices shared by all layers of a kind."
        ),
    )

    def linears(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        """Return the target layers, refusing names that peft would take for one another."""
        layers = super().linears(model)
        kinds = {name.rpartition(".")[2] for name in layers}
        for long in kinds:
            for short in kinds - {long}:
                if long.endswith(short):
                    raise UserError(
                        f"targets: lily shares weights by the end of a name, and {long} ends in {short}; "
                        "name only one of them"
                    )
        return layers

    def sizes(self, model: PreTrainedModel) -> range:
        """Return the ranks from 1 to the smaller side of the target for which it is largest."""
        layers = linear_targets(model, self.config.targets, self.config.layers).values()
        return range(1, max(min(layer.in_features, layer.out_features) for layer in layers) + 1)

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        total = 0
        for kind in kinds_of(self.linears(model)).values():
            first, layers = kind[0], len(kind)
            shared = math.ceil(layers / self.config.stride) * first.in_features
            total += shared + self.config.experts * (first.out_features + layers)
        return self.config.rank * total

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's Lily configuration, or that of our form of it."""
        import peft

        from peft_arena.methods.low_rank.own_tuner import token_lily

        config = peft.LilyConfig(
            task_type=TASK,
            r=self.config.rank,
            stride_A=self.config.stride,
            num_B=self.config.experts,
            scaling=self.config.scaling,
            target_modules=patterns,
        )
        return config if self.config.routing == "batch" else token_lily(config)

    def finish(self, model: PeftModel) -> None:
        """Share A and B by kind of layer: peft shares nothing where targets are given by their whole names."""
        for layers in kinds_of(tuner_layers(model)).values():
            for place, layer in enumerate(layers):
                layer.lily_B[ADAPTER] = layers[0].lily_B[ADAPTER]
                layer.lily_A[ADAPTER] = layers[place - place % self.config.stride].lily_A[ADAPTER]
        if self.config.routing == "batch":
            model.register_forward_pre_hook(_refuse_packing, with_kwargs=True)

    def hold(self, model: PeftModel, base: str) -> PeftAttached:
        """Return the attachment that saves shared tensors."""
        return LilyAttached(self, model, base)


def kinds_of(layers: Mapping[str, Any]) -> dict[tuple[str, int, int], list[Any]]:
    """Return the layers by last part of their name and by shape, in the model's order."""
    found: dict[tuple[str, int, int], list[Any]] = {}
    for name, layer in layers.items():
        found.setdefault((name.rpartition(".")[2], layer.in_features, layer.out_features), []).append(layer)
    return found


def _refuse_packing(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse labelled rows whose positions start again: examples packed together."""
    positions = kwargs.get("position_ids")
    if (
        positions is not None
        and kwargs.get("labels") is not None
        and bool((positions[..., 1:] < positions[..., :-1]).any())
    ):
        raise UserError(
            "packing cannot be used with lily and routing = batch: packed examples would mix; set packing = false"
        )
