"""PiSSA: low-rank adaptation that starts from the principal singular components of each weight.

W0 = U S V^T is split into s B0 A0 (the largest ``rank`` components) and a residual, which replaces W0 in memory and is
frozen; A and B train from A0 and B0. The layer is ``peft``'s LoRA; the split is ours, because peft's rounds the factors
to the base's type and draws its fast SVD without a seed.

A checkpoint is a LoRA of twice the rank on the *pretrained* model, s [B, -B0] [A; A0], so reading it repeats no SVD.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pydantic import Field

from peft_arena.methods.adapter import ADAPTER, PREFIX, TASK, WEIGHT_ADAPTER, PeftAttached, PeftMethod, tuner_layers
from peft_arena.methods.base import Attached, Calibration, Capability, MethodCard, MethodConfig
from peft_arena.methods.files import write_adapter
from peft_arena.methods.lora import RankConfig
from peft_arena.methods.state import copy_into, local_random, swapped
from peft_arena.methods.targets import patterns_for

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from peft.tuners.lora.layer import LoraLayer
    from torch import Tensor, nn
    from transformers import PreTrainedModel


class PissaConfig(RankConfig):
    """Settings of PiSSA. There is no dropout: it would drop principal components of the pretrained weight."""

    svd_iterations: int | None = Field(default=None, ge=1)
    """Power iterations of a fast randomised SVD; None computes the exact one, which takes minutes on large models."""

    alternatives: ClassVar[Mapping[str, Any]] = {**RankConfig.alternatives, "svd_iterations": 2}


class Factors(NamedTuple):
    """The two matrices of a low-rank product B A."""

    a: Tensor
    """Shape (rank, in)."""
    b: Tensor
    """Shape (out, rank)."""


class PissaAttached(PeftAttached):
    """PiSSA in training: the base holds the residual, so the starting factors are kept to find the pretrained one."""

    method: Pissa

    def __init__(self, method: PeftMethod, model: PeftModel, base: str, start: dict[str, Factors]) -> None:
        """Hold a wrapped model whose target weights are residuals.

        Args:
            method: what was attached.
            model: the wrapped model.
            base: name or path of the pretrained model.
            start: the starting factors by target module, float32.
        """
        super().__init__(method, model, base)
        self.start = start

    def state(self) -> dict[str, Tensor]:
        """Return the trained factors and the starting ones, which fix what the residual is."""
        return {**super().state(), **self._start_tensors()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put a state back; a residual that another SVD library split differently is brought to the state's split.

        Raises:
            UserError: names or shapes differ from the model's.
        """
        import torch

        before = {module: Factors(start.a.clone(), start.b.clone()) for module, start in self.start.items()}
        copy_into({**self.trained(), **self._start_tensors()}, state)
        layers = tuner_layers(self.model)
        with torch.no_grad():
            for module, start in self.start.items():
                old = before[module]
                if torch.equal(old.a, start.a) and torch.equal(old.b, start.b):
                    continue
                layer = layers[module]
                weight = layer.get_base_layer().weight
                change = layer.scaling[ADAPTER] * (old.b @ old.a - start.b @ start.a)
                weight.copy_(weight.float() + change)

    def save(self, directory: Path) -> None:
        """Write the change from the pretrained weights as a plain LoRA adapter of twice the rank."""
        import torch

        tensors = {}
        for module, layer in tuner_layers(self.model).items():
            tuned, start = factors(layer), self.start[module]
            tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.cat([tuned.a, start.a], dim=0)
            tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.cat([tuned.b, -start.b], dim=1)
        config: Any = self.model.peft_config[ADAPTER]
        patterns = sorted(config.target_modules)
        write_adapter(directory, self.method.stored_config(patterns), self.base, tensors)

    @contextmanager
    def disabled(self) -> Iterator[nn.Module]:
        """Give the pretrained model's outputs inside the block: the residual with the starting factors.

        peft's own ``disable_adapter`` would give the residual alone, which is not the pretrained model.
        """
        targets, values = {}, {}
        for module, layer in tuner_layers(self.model).items():
            targets[f"{module}.a"], targets[f"{module}.b"] = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            values[f"{module}.a"], values[f"{module}.b"] = self.start[module]
        with swapped(targets, values):
            yield self.model

    def delta(self, module: str) -> Tensor | None:
        """Return tuned minus pretrained weight of one linear module, s (B A - B0 A0); None where it is unchanged."""
        import torch

        if self.adapted(module) is None:
            return None
        layer = tuner_layers(self.model)[module]
        tuned, start = factors(layer), self.start[module]
        with torch.no_grad():
            change: Tensor = layer.scaling[ADAPTER] * (tuned.b @ tuned.a - start.b @ start.a)
        return change

    def _start_tensors(self) -> dict[str, Tensor]:
        named = {}
        for module, start in self.start.items():
            named[f"start.{module}.a"], named[f"start.{module}.b"] = start
        return named


class Pissa(PeftMethod):
    """PiSSA: LoRA that trains the principal part of each weight and freezes the rest."""

    Config: ClassVar[type[MethodConfig]] = PissaConfig
    config: PissaConfig
    size: ClassVar[str | None] = "rank"
    limited_by_rank: ClassVar[bool] = True
    card: ClassVar[MethodCard] = MethodCard(
        name="pissa",
        title="PiSSA",
        family="low-rank",
        paper="Meng et al., 2024, PiSSA: Principal Singular Values and Singular Vectors Adaptation",
        url="https://arxiv.org/abs/2404.02948",
        capabilities=WEIGHT_ADAPTER | {Capability.CHANGES_BASE},
        parameters="rank * sum over targets of (in + out)",
        learning_rate=5e-5,
        random_init=False,
        deviations=(
            "no dropout: it would drop principal components of the pretrained weight",
            "exact SVD unless svd_iterations is given; then the seed draws the randomised one",
            "a checkpoint is a LoRA of rank 2 * rank on the pretrained model, equal up to float32 rounding",
            "on a bfloat16 base the residual is rounded to bfloat16 in training, a change no checkpoint contains",
            "switching off swaps the starting factors in; peft's disable_adapter would give the residual alone",
        ),
        description=(
            "Splits each target weight into its largest singular components, which train as B A, and a frozen residual."
        ),
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        layers = self.linears(model).values()
        return sum(self.config.rank * (layer.in_features + layer.out_features) for layer in layers)

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return the configuration of the LoRA layers that train."""
        return self._lora(patterns, 1)

    def stored_config(self, patterns: list[str]) -> PeftConfig:
        """Return the configuration of a checkpoint: twice the rank and alpha, so that the scale is the same."""
        return self._lora(patterns, 2)

    def attach(self, model: PreTrainedModel, *, seed: int, calibration: Calibration | None = None) -> Attached:
        """Wrap the model, then split every target weight; see :meth:`Method.attach`."""
        layers = self._targets(model)
        base = str(model.name_or_path or "")
        wrapped = self._wrap(model, self.peft_config(patterns_for(model, layers), seed), seed, set(layers))
        with local_random(seed):
            start = {module: self._split(layer) for module, layer in tuner_layers(wrapped).items()}
        return PissaAttached(self, wrapped, base, start)

    def _lora(self, patterns: list[str], times: int) -> PeftConfig:
        import peft

        return peft.LoraConfig(
            task_type=TASK,
            r=self.config.rank * times,
            lora_alpha=self.config.alpha * times,  # type: ignore[arg-type]  # peft computes with floats
            target_modules=patterns,
            bias="none",
        )

    def _split(self, layer: LoraLayer) -> Factors:
        """Move the principal part of a layer's weight into its factors; return copies of these."""
        import torch

        weight: Any = layer.get_base_layer().weight
        first: Any = layer.lora_A[ADAPTER]
        second: Any = layer.lora_B[ADAPTER]
        scale = layer.scaling[ADAPTER]
        with torch.no_grad():
            left, values, right = principal(weight.float(), self.config.rank, self.config.svd_iterations)
            root = (values / scale).sqrt()
            start = Factors(root[:, None] * right, left * root)
            first.weight.copy_(start.a)
            second.weight.copy_(start.b)
            weight.copy_(weight.float() - scale * (start.b @ start.a))
        return start


def principal(weight: Tensor, rank: int, iterations: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest singular components of a matrix.

    Args:
        weight: shape (out, in), float32.
        rank: how many components.
        iterations: power iterations of a randomised SVD (Halko et al., 2011); None for the exact one.

    Returns:
        Left vectors (out, rank), values (rank,) descending, right vectors (rank, in).
    """
    import torch

    if iterations is None:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    left, values, right = torch.svd_lowrank(weight, q=rank, niter=iterations)
    return left, values, right.T


def factors(layer: LoraLayer) -> Factors:
    """Return the current factors of a peft LoRA layer."""
    first: Any = layer.lora_A[ADAPTER]
    second: Any = layer.lora_B[ADAPTER]
    return Factors(first.weight.detach(), second.weight.detach())
