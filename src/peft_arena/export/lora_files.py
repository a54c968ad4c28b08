"""The two files of a plain LoRA adapter that stands for a tuned model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from peft_arena.core.errors import UserError
from peft_arena.methods.files import SETTINGS, WEIGHTS

if TYPE_CHECKING:
    from peft_arena.weights.effective import EffectiveWeights
    from peft_arena.weights.tuned import Tuned


@dataclass(frozen=True)
class Written:
    """What was written."""

    tensors: int
    ranks: tuple[int, int]
    """Smallest and largest rank."""
    whole: tuple[str, ...]
    """Modules that are there as a whole."""
    spectra: Mapping[str, Tensor]
    """All singular values of each change that a LoRA stands for, by parameter."""
    exact: float
    """Sum ||D||_F^2 of the changes of the modules that are there as a whole."""

    def enough(self, limit: float) -> int:
        """Return the smallest rank whose error over all layers together is within a limit."""
        from peft_arena.weights.low_rank import rank_within

        return rank_within(list(self.spectra.values()), self.exact, limit)


def write_lora(point: Tuned, weights: EffectiveWeights, part: Path, rank: int | float) -> Written:
    """Write a LoRA of the best approximations of a rank, whose scale is 1, into a directory.

    A layer narrower than the rank has its own, the smaller side, at which nothing is left out. Modules that are no
    linear layers (norms, embeddings), and those that the adapter itself brings as a whole, are written as a whole.

    Raises:
        UserError: nothing is changed, a change that a LoRA cannot have, or no layer that can have the rank.
    """
    from safetensors.torch import save_file

    from peft_arena.weights.adapter_directory import PREFIX
    from peft_arena.weights.low_rank import truncated

    modules = dict(weights.base_weights.architecture.named_modules())
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    spectra: dict[str, Tensor] = {}
    whole = _whole(point, weights, modules)
    for name in weights.changes.makers:
        module = name.rpartition(".")[0]
        base, change = weights.parameter(name)
        if change is None or module in whole:
            continue
        turned = not isinstance(modules[module], nn.Linear)  # the weight of a Conv1D is (in, out), and peft's B A too
        best = truncated(change, base, rank)
        b, a = best.change.b, best.change.a
        spectra[name] = best.values
        ranks[module] = a.shape[0]
        down, up = (b.T, a.T) if turned else (a, b)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = down.contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = up.contiguous()
    if not ranks:
        what = f"only {whole[0]} and no linear layer" if whole else "no weight of its pretrained model"
        raise UserError(f"{point.subject} changes {what}: there is nothing for a LoRA")
    widest = max(min(weights.base_weights.shapes[name]) for name in spectra)
    if rank > widest:
        raise UserError(f"--rank {rank} is more than any layer of {point.subject} can have: at most {widest}")
    exact = 0.0
    for module in whole:
        for leaf, _ in modules[module].named_parameters(recurse=False):
            base, change = weights.parameter(f"{module}.{leaf}")
            values = base if change is None else base + change.dense(base)
            exact += 0.0 if change is None else change.norms(base).l2 ** 2
            first = weights.base_weights.canonical(f"{module}.{leaf}")
            for name, other in weights.base_weights.aliases.items():
                if other == first:  # peft looks for a tied weight under each of its names
                    tensors[f"{PREFIX}{name}"] = values.clone().contiguous()
    _write_settings(point, part, rank, ranks, whole, modules)
    save_file(tensors, part / WEIGHTS, metadata={"format": "pt"})
    return Written(len(tensors), (min(ranks.values()), max(ranks.values())), whole, spectra, exact)


def _whole(point: Tuned, weights: EffectiveWeights, modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Return the changed modules that are written as a whole, in the model's order.

    Raises:
        UserError: a change that neither a LoRA nor a whole module can hold: of biases of linear layers, or of
            parameters that stand alone.
    """
    from transformers.pytorch_utils import Conv1D

    from peft_arena.methods.files import read_settings

    directory = point.directory
    table: Mapping[str, Any] = {}
    if directory is not None and (directory / SETTINGS).is_file():
        table = read_settings(directory, "peft")
    brought = tuple(str(end) for end in table.get("modules_to_save") or ())
    found: dict[str, None] = {}
    lost: list[str] = []
    for name in weights.changes.makers:
        if weights.parameter(name).change is None:
            continue
        module, _, leaf = name.rpartition(".")
        place = modules.get(module)
        linear = isinstance(place, nn.Linear | Conv1D)
        if linear and brought and module.endswith(brought):
            found[module] = None
        elif linear and leaf == "weight":
            continue
        elif linear or place is None or any(True for _ in place.children()):
            lost.append(name)
        else:
            found[module] = None
    if lost:
        more = f" and {len(lost) - 1} more such parameters" if len(lost) > 1 else ""
        raise UserError(
            f"{point.subject} changes {lost[0]}{more}, which a LoRA cannot: peft-arena merge {point.subject} writes "
            "the whole model"
        )
    return tuple(name for name in modules if name in found)


def _write_settings(
    point: Tuned,
    part: Path,
    rank: int | float,
    ranks: Mapping[str, int],
    whole: tuple[str, ...],
    modules: Mapping[str, nn.Module],
) -> None:
    """Write the settings under which peft applies exactly the product of the factors."""
    import peft

    common = rank if isinstance(rank, int) else max(set(ranks.values()), key=list(ranks.values()).count)
    own: dict[str, Any] = {module: count for module, count in ranks.items() if count != common}
    turned = any(not isinstance(modules[module], nn.Linear) for module in ranks)
    tied = any(isinstance(modules[module], nn.Embedding) for module in whole)
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=int(common),
        lora_alpha=int(common),
        lora_dropout=0.0,
        target_modules=_short(ranks, modules),
        rank_pattern=own,
        alpha_pattern=dict(own),
        modules_to_save=list(whole) or None,
        fan_in_fan_out=turned,
        ensure_weight_tying=tied,
        base_model_name_or_path=point.base.name,
        revision=point.base.revision if re.fullmatch(r"[0-9a-f]{40}", point.base.revision or "") else None,
        inference_mode=True,
    )
    settings.save_pretrained(str(part))


def _short(chosen: Iterable[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Return names of modules by their last parts where these name exactly them, as other programs expect; else whole.

    Args:
        chosen: the modules.
        modules: all modules of the model.
    """
    wanted = set(chosen)
    ends = {name.rpartition(".")[2] for name in wanted}
    named = {name for name in modules if name.rpartition(".")[2] in ends}
    return sorted(ends if named == wanted else wanted)
