"""AdaMSS: rank-1 updates inside subspaces found by clustering the rows of each weight; with ASA, subspaces are frozen.

A truncated SVD W0 ~ U S V^T gives V (rank, in) and the rows of U, which K-means puts into ``subspaces`` clusters. The
rows of cluster k are changed by b_k a_k V, with a_k (1, rank) and b_k (rows, 1) trained and b_k zero at the start. A
bias is treated as one more column of the weight. With adaptive subspace allocation (adamss_asa) the least important
subspaces over the whole model stop training, and keep what they learned.

A checkpoint is a LoRA of rank ``subspaces``, with A = a V and B = b at the rows of its cluster: reading it repeats
neither SVD nor clustering. The layers are ``peft``'s; the allocation is ours, as peft's leaves one subspace too few.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, model_validator

from peft_arena.core.errors import UserError
from peft_arena.core.ids import seed_for
from peft_arena.methods.adapter import ADAPTER, PREFIX, TASK, WEIGHT_ADAPTER, PeftAttached, PeftMethod, tuner_layers
from peft_arena.methods.base import MethodCard, MethodConfig
from peft_arena.methods.state import check_fits
from peft_arena.methods.targets import AdaptedConfig
from peft_arena.methods.whole import whole_tensors

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel

SMOOTHING = 0.85
"""Smoothing of importance and of its uncertainty over steps, peft's default."""


class AdamssConfig(AdaptedConfig):
    """Settings of AdaMSS."""

    rank: int = Field(default=32, ge=1)
    """Singular directions of each weight within which it is changed; at most the smaller side of every target."""
    subspaces: int = Field(default=8, ge=1)
    """Clusters of rows of each weight; at most the outputs of every target."""

    alternatives: ClassVar[Mapping[str, Any]] = {**AdaptedConfig.alternatives, "rank": 16, "subspaces": 3}


class AdamssAsaConfig(AdamssConfig):
    """Settings of AdaMSS with adaptive subspace allocation."""

    keep: float = Field(default=0.5, gt=0, lt=1)
    """Part of all subspaces of the model that trains to the end."""
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """Part of the training before subspaces are frozen, rounded down to steps."""
    until: float = Field(default=0.5, gt=0, le=1)
    """Part of the training after which no more are frozen, rounded down to a multiple of ``interval``."""
    interval: int = Field(default=10, ge=1)
    """Steps between two allocations; importance is measured anew in each interval."""
    exponent: float = Field(default=3.0, gt=0, allow_inf_nan=False)
    """How fast subspaces are frozen: 1 evenly, more means earlier."""

    alternatives: ClassVar[Mapping[str, Any]] = {
        **AdamssConfig.alternatives,
        "keep": 0.2,
        "warmup": 0.5,
        "until": 0.5,
        "interval": 2,
        "exponent": 1.0,
    }

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.warmup >= self.until:
            raise ValueError(f"warmup {self.warmup} must be below until {self.until}")
        return self


class AdamssAttached(PeftAttached):
    """AdaMSS in place on a model."""

    method: Adamss

    def __init__(self, method: PeftMethod, model: PeftModel, base: str) -> None:
        """Hold a wrapped model; see :class:`PeftAttached`."""
        super().__init__(method, model, base)
        self._rows = {name: layer for name, layer in tuner_layers(model).items() if hasattr(layer, "adamss_A")}

    def state(self) -> dict[str, Tensor]:
        """Return a and b of each layer's subspaces, the frozen directions, and which rows are in which subspace.

        With them are the modules that train as a whole.
        """
        import torch

        found: dict[str, Tensor] = dict(whole_tensors(self.model))
        for name, layer in self._rows.items():
            found[f"a.{name}"] = torch.cat([p.detach() for p in layer.adamss_A[ADAPTER]])
            found[f"b.{name}"] = torch.cat([p.detach() for p in layer.adamss_B[ADAPTER]])
            found[f"directions.{name}"] = layer.adamss_newB[ADAPTER]
            found[f"rows.{name}"] = layer.scatter_index[ADAPTER]
            found[f"sizes.{name}"] = torch.tensor([len(p) for p in layer.adamss_B[ADAPTER]])
        return found

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put a state back, with its subspaces, which may be other ones than here; see :meth:`Attached.load_state`."""
        import torch

        check_fits(self.state(), state, "the state")
        for name in self._rows:
            rows, sizes = state[f"rows.{name}"].tolist(), state[f"sizes.{name}"].tolist()
            if sorted(rows) != list(range(len(rows))) or sum(sizes) != len(rows) or min(sizes) < 1:
                raise UserError(f"the state's subspaces of {name} do not hold each of its {len(rows)} rows once")
        with torch.no_grad():
            for name, tensor in whole_tensors(self.model).items():
                tensor.copy_(state[name])
        for name, layer in self._rows.items():
            device = layer.adamss_newB[ADAPTER].device
            for kind, parameters in (("a", layer.adamss_A[ADAPTER]), ("b", layer.adamss_B[ADAPTER])):
                for parameter, value in zip(parameters, self._split(state, f"{kind}.{name}", name), strict=True):
                    parameter.data = value.to(device, copy=True)
            layer.adamss_newB[ADAPTER].copy_(state[f"directions.{name}"])
            layer.scatter_index[ADAPTER] = state[f"rows.{name}"].to(device, copy=True)

    def _split(self, state: Mapping[str, Tensor], key: str, name: str) -> list[Tensor]:
        """Return a tensor of a layer cut into its subspaces: a row each, or as many rows as they have."""
        kind = key.split(".", 1)[0]
        return list(state[key].split(1 if kind.endswith("a") else state[f"sizes.{name}"].tolist()))

    def save(self, directory: Path) -> None:
        """Write the change from the pretrained weights as a LoRA adapter, with biases if a target has one."""
        import torch

        if not self._rows:
            super().save(directory)
            return
        biased = any(layer.get_base_layer().bias is not None for layer in self._rows.values())
        tensors = {}
        for name, layer in self._rows.items():
            with torch.no_grad():
                first, second, bias = _factors(layer)
            tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"] = first, second
            if biased:
                tensors[f"{PREFIX}{name}.lora_B.bias"] = second.new_zeros(len(second)) if bias is None else bias
        adapter: Any = self.model.peft_config[ADAPTER]
        config: Any = self.method.stored_config(sorted(adapter.target_modules))
        config.lora_bias = biased
        self.write(directory, config, tensors)


class AdamssAsaAttached(AdamssAttached):
    """AdaMSS with adaptive subspace allocation in place on a model; a frozen subspace's gradients are dropped."""

    method: AdamssAsa

    def __init__(self, method: PeftMethod, model: PeftModel, base: str) -> None:
        """Hold a wrapped model in which every subspace trains; see :class:`PeftAttached`."""
        super().__init__(method, model, base)
        self._training = {name: [True] * layer.num_subspaces[ADAPTER] for name, layer in self._rows.items()}
        for name, k in self._subspaces():
            for parameter in self._parameters(name, k):
                parameter.register_post_accumulate_grad_hook(partial(self._drop, name, k))

    def begin(self, total: int) -> None:
        """Fix the schedule.

        Raises:
            UserError: the training is too short for it.
        """
        settings = self.method.config
        self._first = int(settings.warmup * total)
        self._last = int(settings.until * total) // settings.interval * settings.interval
        if self._last <= self._first:
            raise UserError(
                f"interval: adamss_asa has no step to allocate in between step {self._first} and "
                f"{int(settings.until * total)} of {total}; use a smaller interval or a later until"
            )

    def after_step(self, step: int, total: int) -> None:
        """Update the importance of the subspaces, and freeze some where the schedule says so."""
        if not self._first <= step <= self._last:
            return
        for layer in self._rows.values():
            layer.update_importance(ADAPTER, SMOOTHING, SMOOTHING)
        if step % self.method.config.interval:
            return
        count = len(self._subspaces())
        left = 1.0 - (step - self._first) / (self._last - self._first)
        target = max(1, round(self.method.config.keep * count))
        self._freeze(target + int((count - target) * left**self.method.config.exponent))
        for layer in self._rows.values():
            layer.reset_importance(ADAPTER)

    def active(self) -> int:
        """Return the number of subspaces that still train."""
        return sum(map(sum, self._training.values()))

    def state(self) -> dict[str, Tensor]:
        """Return what plain AdaMSS does, the smoothed importance, and which subspaces train (1) or not (0)."""
        return {**super().state(), **self._importance(), **self._masks()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put a state back; see :meth:`AdamssAttached.load_state`."""
        super().load_state(state)
        for name, layer in self._rows.items():
            self._training[name] = [bool(flag) for flag in (state[f"training.{name}"] > 0).tolist()]
            for kind, _, table in _tables(layer):
                values = self._split(state, f"{kind}.{name}", name)
                for k, training in enumerate(self._training[name]):
                    table[k] = values[k].to(layer.adamss_newB[ADAPTER].device, copy=True) if training else None

    def _freeze(self, keep: int) -> None:
        """Stop training all but the most important of the subspaces that still train."""
        active = [(name, k) for name, k in self._subspaces() if self._training[name][k]]
        scores = {(name, k): _score(self._rows[name], k) for name, k in active}
        for name, k in sorted(active, key=lambda place: -scores[place])[keep:]:
            self._training[name][k] = False

    def _drop(self, name: str, k: int, parameter: nn.Parameter) -> None:
        if not self._training[name][k]:
            parameter.grad = None

    def _subspaces(self) -> list[tuple[str, int]]:
        return [(name, k) for name, layer in self._rows.items() for k in range(layer.num_subspaces[ADAPTER])]

    def _parameters(self, name: str, k: int) -> list[nn.Parameter]:
        layer = self._rows[name]
        return [layer.adamss_A[ADAPTER][k], layer.adamss_B[ADAPTER][k]]

    def _importance(self) -> dict[str, Tensor]:
        import torch

        found = {}
        for name, layer in self._rows.items():
            for kind, parameters, table in _tables(layer):
                held = [
                    torch.zeros_like(p) if value is None else value for p, value in zip(parameters, table, strict=True)
                ]
                found[f"{kind}.{name}"] = torch.cat(held).detach()
        return found

    def _masks(self) -> dict[str, Tensor]:
        import torch

        return {f"training.{name}": torch.tensor([float(x) for x in flags]) for name, flags in self._training.items()}


class Adamss(PeftMethod):
    """AdaMSS: rank-1 updates in clustered subspaces of each weight."""

    Config: ClassVar[type[MethodConfig]] = AdamssConfig
    config: AdamssConfig
    size: ClassVar[str | None] = "rank"
    limited_by_rank: ClassVar[bool] = True
    allocates: ClassVar[bool] = False
    derived_settings: ClassVar[frozenset[str]] = frozenset({"lora_bias"})
    card: ClassVar[MethodCard] = MethodCard(
        name="adamss",
        title="AdaMSS",
        family="low-rank",
        paper="Zheng et al., 2025, AdaMSS: Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning",
        url="https://openreview.net/forum?id=8ZdWmpYxT0",
        capabilities=WEIGHT_ADAPTER,
        parameters="sum over targets of (subspaces * rank + out)",
        learning_rate=1e-3,
        micro_learning_rate=3e-2,
        random_init=True,
        deviations=(
            "every subspace has rank 1",
            "a fast randomised SVD, drawn from the seed; K-means of 10 iterations with peft's own fixed start",
            "a checkpoint is a LoRA of rank subspaces",
        ),
        description=(
            "Clusters the rows of each weight by their singular coordinates and gives each cluster a rank-1 update "
            "within the weight's leading singular directions."
        ),
    )

    def linears(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        """Return the target layers, refusing more subspaces than a layer has rows."""
        layers = super().linears(model)
        for name, layer in layers.items():
            if self.config.subspaces > layer.out_features:
                raise UserError(
                    f"subspaces: {self.config.subspaces} is above the output size of {name} "
                    f"({layer.out_features} x {layer.in_features}); allowed: 1 to {layer.out_features}"
                )
        return layers

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        layers = self.linears(model).values()
        return sum(self.config.subspaces * self.config.rank + layer.out_features for layer in layers)

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return peft's AdaMSS configuration."""
        import peft

        _import_clustering()
        return peft.AdamssConfig(
            task_type=TASK,
            r=self.config.rank,
            num_subspaces=self.config.subspaces,
            subspace_rank=1,
            target_modules=patterns,
            use_asa=self.allocates,
            random_seed=seed_for(seed, "adamss", "svd"),
        )

    def stored_config(self, patterns: list[str]) -> PeftConfig:
        """Return the configuration of the LoRA that a checkpoint is."""
        import peft

        rank = self.config.subspaces
        return peft.LoraConfig(task_type=TASK, r=rank, lora_alpha=rank, target_modules=patterns, bias="none")

    def finish(self, model: PeftModel) -> None:
        """Compute as the checkpoint will; let a LoRA be merged where peft gave a bias, which is zero, to no bias."""
        for layer in tuner_layers(model).values():
            if hasattr(layer, "adamss_A"):
                layer.forward = partial(_forward, layer)
            elif layer.get_base_layer().bias is None:
                layer.lora_bias[ADAPTER] = False

    def hold(self, model: PeftModel, base: str) -> PeftAttached:
        """Return the attachment that saves a LoRA."""
        return AdamssAttached(self, model, base)


class AdamssAsa(Adamss):
    """AdaMSS with adaptive subspace allocation."""

    Config: ClassVar[type[MethodConfig]] = AdamssAsaConfig
    config: AdamssAsaConfig
    allocates: ClassVar[bool] = True
    card: ClassVar[MethodCard] = Adamss.card.model_copy(
        update={
            "name": "adamss_asa",
            "title": "AdaMSS with ASA",
            "parameters": "sum over targets of (subspaces * rank + out), before subspaces are frozen",
            "deviations": (
                *Adamss.card.deviations,
                "the parameters counted are those at the start; a frozen subspace keeps what it learned, as in peft",
                "the schedule is given as parts of the training, the target as a part of all subspaces",
                "exactly the target stays active, where peft leaves one less",
                "gradients of frozen subspaces are computed and dropped",
                "importance is taken from clipped gradients after the step, as peft does",
            ),
            "description": (
                "AdaMSS in which the least important subspaces of the whole model stop training one after the other."
            ),
        }
    )

    def hold(self, model: PeftModel, base: str) -> PeftAttached:
        """Return the attachment that freezes subspaces."""
        return AdamssAsaAttached(self, model, base)


def _import_clustering() -> None:
    """Import what peft clusters with, which on its first import draws from Python's random numbers."""
    state = random.getstate()
    import sklearn.cluster  # noqa: F401

    random.setstate(state)


def _forward(layer: Any, x: Tensor, *arguments: Any, **settings: Any) -> Tensor:
    """Stand in for the forward of peft's layer: the same update, computed in float32 as a LoRA of rank subspaces."""
    from torch.nn import functional

    if layer.disable_adapters and layer.merged:
        layer.unmerge()
    result: Tensor = layer.base_layer(x, *arguments, **settings)
    if layer.disable_adapters or layer.merged:
        return result
    first, second, bias = _factors(layer)
    return (result + functional.linear(functional.linear(x.float(), first), second, bias)).to(result.dtype)


def _factors(layer: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return an AdaMSS layer's change as factors A (rank, in) and B (out, rank) and a change of bias (out,) or None."""
    import torch

    columns = layer.adamss_B[ADAPTER]
    first = torch.cat(list(layer.adamss_A[ADAPTER])) @ layer.adamss_newB[ADAPTER].float()
    place = torch.arange(len(columns), device=first.device).repeat_interleave(
        torch.tensor([len(column) for column in columns], device=first.device)
    )
    second = columns[0].new_zeros(layer.out_features, len(columns))  # float32, also under autocast
    second = second.index_put((layer.scatter_index[ADAPTER], place), torch.cat(list(columns))[:, 0])
    if layer.get_base_layer().bias is None:
        return first, second, None
    return first[:, :-1], second, second @ first[:, -1]


def _tables(layer: Any) -> list[tuple[str, Any, list[Tensor | None]]]:
    return [
        ("importance_a", layer.adamss_A[ADAPTER], layer.exp_avg_ipt_A[ADAPTER]),
        ("importance_b", layer.adamss_B[ADAPTER], layer.exp_avg_ipt_B[ADAPTER]),
        ("uncertainty_a", layer.adamss_A[ADAPTER], layer.exp_avg_unc_A[ADAPTER]),
        ("uncertainty_b", layer.adamss_B[ADAPTER], layer.exp_avg_unc_B[ADAPTER]),
    ]


def _score(layer: Any, k: int) -> float:
    """Return the importance of a subspace: the mean of importance times uncertainty over a, plus that over b."""
    parts = [
        (ipt[ADAPTER][k] * unc[ADAPTER][k]).mean()
        for ipt, unc in ((layer.exp_avg_ipt_A, layer.exp_avg_unc_A), (layer.exp_avg_ipt_B, layer.exp_avg_unc_B))
    ]
    return float(sum(parts))
