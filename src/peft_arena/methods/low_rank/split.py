"""LoRA that starts inside the pretrained weight: W0 = residual + s B0 A0.

The residual replaces W0 in memory and is frozen; A and B train from the starting factors A0 and B0, which are kept to
find the pretrained weight again. The layer is ``peft``'s LoRA. The starting factors are computed in float32 from the
pretrained model by each method, see :meth:`SplitMethod.starts`.

A checkpoint is a LoRA of twice the rank on the *pretrained* model, s [B, -B0] [A; A0], so reading it repeats nothing.
Where A stays what it was, B - B0 and A are enough, and the rank is the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from peft_arena.methods.adapter import ADAPTER, PREFIX, TASK, WEIGHT_ADAPTER, PeftAttached, PeftMethod, tuner_layers
from peft_arena.methods.base import Attached, Calibration, Capability, MethodConfig
from peft_arena.methods.low_rank.lora import RankConfig
from peft_arena.methods.state import copy_into, local_random, swapped
from peft_arena.methods.targets import patterns_for
from peft_arena.methods.whole import whole_delta, whole_off

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from peft.tuners.lora.layer import LoraLayer
    from torch import Tensor, nn
    from transformers import PreTrainedModel

SPLIT = WEIGHT_ADAPTER | {Capability.CHANGES_BASE, Capability.LORA_ADAPTER}
"""What every split method can."""
SWITCHED_OFF = "switching off swaps the starting factors in; peft's disable_adapter would give the residual alone"
ROUNDED = (
    "on a bfloat16 base the residual is rounded to bfloat16 in training, a change that no checkpoint contains and that "
    "stays while the method is switched off"
)
STORED = "a checkpoint is a LoRA of rank 2 * rank on the pretrained model, equal up to float32 rounding"
DECAYED = "weight decay draws A and B to zero, not to their start, and so shrinks what was taken out of the weight"
SPLIT_DEVIATIONS = (STORED, ROUNDED, SWITCHED_OFF, DECAYED)


class Factors(NamedTuple):
    """The two matrices of a low-rank product B A."""

    a: Tensor
    """Shape (rank, in)."""
    b: Tensor
    """Shape (out, rank)."""


class SplitAttached(PeftAttached):
    """A split method in training: the base holds residuals."""

    method: SplitMethod

    def __init__(self, method: SplitMethod, model: PeftModel, base: str, start: dict[str, Factors]) -> None:
        """Hold a wrapped model whose target weights are residuals.

        Args:
            method: what was attached.
            model: the wrapped model.
            base: name or path of the pretrained model.
            start: the starting factors by target module, float32.
        """
        super().__init__(method, model, base)
        self.start = start

    def factors(self, layer: LoraLayer) -> Factors:
        """Return a layer's current factors, whose product times the scale is what is added to the residual."""
        first: Any = layer.lora_A[ADAPTER]
        second: Any = layer.lora_B[ADAPTER]
        return Factors(first.weight.detach(), second.weight.detach())

    def state(self) -> dict[str, Tensor]:
        """Return what trains and the starting factors, which fix what the residual is."""
        return {**super().state(), **self._start_tensors()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put a state back; a residual that another linear algebra split differently is brought to the state's split.

        Raises:
            UserError: names or shapes differ from the model's.
        """
        import torch

        before = {module: Factors(start.a.clone(), start.b.clone()) for module, start in self.start.items()}
        copy_into({**self.trained(), **self._start_tensors()}, state)
        layers = tuner_layers(self.model)
        with torch.no_grad():
            for module, start in self.start.items():
                old, layer = before[module], layers[module]
                if self.method.freezes_a:
                    layer.lora_A[ADAPTER].weight.copy_(start.a)
                if torch.equal(old.a, start.a) and torch.equal(old.b, start.b):
                    continue
                weight = layer.get_base_layer().weight
                change = layer.scaling[ADAPTER] * (old.b @ old.a - start.b @ start.a)
                weight.copy_(weight.float() + change)

    def save(self, directory: Path) -> None:
        """Write the change from the pretrained weights as a plain LoRA adapter."""
        import torch

        tensors = {}
        for module, layer in tuner_layers(self.model).items():
            tuned, start = self.factors(layer), self.start[module]
            if self.method.freezes_a:
                a, b = start.a, tuned.b - start.b
            else:
                a, b = torch.cat([tuned.a, start.a], dim=0), torch.cat([tuned.b, -start.b], dim=1)
            tensors[f"{PREFIX}{module}.lora_A.weight"] = a
            tensors[f"{PREFIX}{module}.lora_B.weight"] = b
        config: Any = self.model.peft_config[ADAPTER]
        patterns = sorted(config.target_modules)
        self.write(directory, self.method.stored_config(patterns), tensors)

    @contextmanager
    def disabled(self) -> Iterator[nn.Module]:
        """Give the pretrained model's outputs inside the block: the residual with the starting factors.

        peft's own ``disable_adapter`` would give the residual alone, which is not the pretrained model.
        """
        targets, values = {}, {}
        for module, layer in tuner_layers(self.model).items():
            targets[f"{module}.a"], targets[f"{module}.b"] = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            values[f"{module}.a"], values[f"{module}.b"] = self.start[module]
        with swapped(targets, values), whole_off(self.model):
            yield self.model

    def delta(self, module: str) -> Tensor | None:
        """Return tuned minus pretrained weight of one linear module, s (B A - B0 A0); None where it is unchanged."""
        import torch

        if self.adapted(module) is None:
            return whole_delta(self.model, module)
        layer = tuner_layers(self.model)[module]
        tuned, start = self.factors(layer), self.start[module]
        with torch.no_grad():
            change: Tensor = layer.scaling[ADAPTER] * (tuned.b @ tuned.a - start.b @ start.a)
        return change

    def _start_tensors(self) -> dict[str, Tensor]:
        named = {}
        for module, start in self.start.items():
            named[f"start.{module}.a"], named[f"start.{module}.b"] = start
        return named


class SplitMethod(PeftMethod):
    """A LoRA that starts from factors of the pretrained weights, see the module; subclasses give the factors."""

    Config: ClassVar[type[MethodConfig]] = RankConfig
    config: RankConfig
    size: ClassVar[str | None] = "rank"
    limited_by_rank: ClassVar[bool] = True
    freezes_a: ClassVar[bool] = False
    """Whether A keeps its start and only B trains."""

    def starts(
        self, model: PreTrainedModel, layers: Mapping[str, nn.Linear], calibration: Calibration | None
    ) -> Iterable[tuple[str, Factors]]:
        """Give the starting factors of every layer, float32; random numbers may be drawn, the seed is set.

        Args:
            model: the pretrained model, to be left as it is.
            layers: its target layers, by name.
            calibration: training examples, for methods that ask for them.

        Raises:
            UserError: the method needs calibration and there is none.
        """
        import torch

        with torch.no_grad():
            for name, layer in layers.items():
                yield name, self.start(layer.weight.detach().float())

    def start(self, weight: Tensor) -> Factors:
        """Return the starting factors of one weight of shape (out, in), float32."""
        raise NotImplementedError

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied with."""
        return self.config.alpha / self.config.rank

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of trained parameters by the card's formula."""
        layers = self.linears(model).values()
        sides = [layer.out_features + (0 if self.freezes_a else layer.in_features) for layer in layers]
        return self.config.rank * sum(sides)

    def peft_config(self, patterns: list[str], seed: int) -> PeftConfig:
        """Return the configuration of the LoRA layers that train."""
        return self._lora(patterns, 1, float(getattr(self.config, "dropout", 0.0)))

    def stored_config(self, patterns: list[str]) -> PeftConfig:
        """Return the configuration of a checkpoint: with twice the rank goes twice alpha, so the scale is the same."""
        return self._lora(patterns, 1 if self.freezes_a else 2, 0.0)

    def attach(self, model: PreTrainedModel, *, seed: int, calibration: Calibration | None = None) -> Attached:
        """Wrap the model, with its target weights split; see :meth:`Method.attach`."""
        layers = self._targets(model)
        linears: Any = layers
        base = str(model.name_or_path or "")
        with local_random(seed):
            start = dict(self.starts(model, linears, calibration))
        wrapped = self._wrap(model, self.peft_config(patterns_for(model, layers), seed), seed, set(layers))
        self.place(wrapped, start, seed)
        return self.hold_split(wrapped, base, start)

    def hold_split(self, model: PeftModel, base: str, start: dict[str, Factors]) -> SplitAttached:
        """Return the attachment around a wrapped and split model."""
        return SplitAttached(self, model, base, start)

    def place(self, model: PeftModel, start: Mapping[str, Factors], seed: int) -> None:
        """Take the product of the starting factors out of the weights and let the trained factors start from them."""
        import torch

        with torch.no_grad():
            for module, layer in tuner_layers(model).items():
                layer.lora_A[ADAPTER].weight.copy_(start[module].a)
                layer.lora_B[ADAPTER].weight.copy_(start[module].b)
                take_out(layer, start[module])
                layer.lora_A[ADAPTER].weight.requires_grad_(not self.freezes_a)

    def _lora(self, patterns: list[str], times: int, dropout: float) -> PeftConfig:
        import peft

        return peft.LoraConfig(
            task_type=TASK,
            r=self.config.rank * times,
            lora_alpha=self.config.alpha * times,  # type: ignore[arg-type]  # peft computes with floats
            lora_dropout=dropout,
            target_modules=patterns,
            bias="none",
        )


def take_out(layer: LoraLayer, start: Factors) -> None:
    """Subtract the scaled product of the factors from a layer's frozen weight, in float32."""
    import torch

    weight: Any = layer.get_base_layer().weight
    with torch.no_grad():
        weight.copy_(weight.float() - layer.scaling[ADAPTER] * (start.b @ start.a))


def principal(matrix: Tensor, rank: int, iterations: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest singular components of a matrix.

    Args:
        matrix: shape (out, in), float32.
        rank: how many components.
        iterations: power iterations of a randomised SVD (Halko et al., 2011); None for the exact one.

    Returns:
        Left vectors (out, rank), values (rank,) descending, right vectors (rank, in).
    """
    import torch

    if iterations is None:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    left, values, right = torch.svd_lowrank(matrix, q=rank, niter=iterations)
    return left, values, right.T


def smallest(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the smallest singular components of a matrix, like :func:`principal`; always by the exact SVD."""
    import torch

    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, -rank:], values[-rank:], right[-rank:]


def balanced(left: Tensor, values: Tensor, right: Tensor, scale: float) -> Factors:
    """Return factors with equal norms whose scaled product is ``left diag(values) right``."""
    root = (values / scale).sqrt()
    return Factors(root[:, None] * right, left * root)
