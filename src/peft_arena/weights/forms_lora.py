"""LoRA adapters, with DoRA, as changes of weights, and points of their paths as such adapters."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_arena.methods.base import PathKind
from peft_arena.weights.adapter_directory import Adapter, Changes, Maker, OwnFiles, Step, Writer, times
from peft_arena.weights.change import Change, LowRank
from peft_arena.weights.rescaled import Decomposed, row_lengths

LORA_SETTINGS = frozenset(
    {
        *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"),
        *("init_lora_weights", "eva_config", "loftq_config", "corda_config", "lora_ga_config"),
        *("megatron_core", "runtime_config", "qalora_group_size", "ensure_weight_tying"),
    }
)
UNMOVED_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` under which peft leaves the pretrained weights as they are when it loads."""


def lora(adapter: Adapter) -> Changes | None:
    """LoRA, also rank-stabilised, with patterns of rank and alpha, and DoRA."""
    table = adapter.table
    if not adapter.plain(LORA_SETTINGS) or table.get("init_lora_weights", True) not in UNMOVED_STARTS:
        return None
    lengths = ("lora_magnitude_vector", "lora_magnitude_vector.weight") if table.get("use_dora") else ()
    parts = adapter.parts("lora_A.weight", "lora_B.weight", *lengths)
    if parts is None:
        return None
    makers: dict[str, Maker] = {}
    writers: dict[str, Writer] = {}
    placed: dict[str, Factors] = {}
    for module, names in parts.items():
        place = adapter.weight(module)
        wanted = 3 if table.get("use_dora") else 2
        if place is None or len(names) != wanted:
            return None
        rank = int(by_pattern(table.get("rank_pattern") or {}, module, table["r"]))
        alpha = by_pattern(table.get("alpha_pattern") or {}, module, table["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if table.get("use_rslora") else rank)
        name, (out, inner) = place
        adapter.expect(names["lora_A.weight"], rank, inner)
        adapter.expect(names["lora_B.weight"], out, rank)
        length = next((names[key] for key in lengths if key in names), None)
        makers[name] = partial(_low_rank, adapter, names["lora_B.weight"], names["lora_A.weight"], scale, length)
        if length is None:
            writers[name] = times(adapter, names["lora_B.weight"])
            placed[name] = Factors(module, names["lora_A.weight"], names["lora_B.weight"], rank, alpha, scale)
        else:
            writers[name] = partial(_write_dora, adapter, names["lora_B.weight"], length, name)
    if table.get("use_dora"):
        return Changes(makers, kind=PathKind.MULTIPLICATIVE, own=OwnFiles(adapter, writers, straight=False))
    extend = partial(_extend, placed, bool(table.get("use_rslora")))
    return Changes(makers, own=OwnFiles(adapter, writers, straight=True, extend=extend))


def _low_rank(adapter: Adapter, b: str, a: str, scale: float, length: str | None) -> Change:
    first, second = scale * adapter.files.read(b).float(), adapter.files.read(a).float()
    if length is None:
        return LowRank(first, second)
    return Decomposed(first, second, adapter.files.read(length).float().flatten())


def _write_dora(adapter: Adapter, b: str, length: str, name: str, step: Step) -> dict[str, Tensor]:
    """Return B and the lengths of a point: B scaled, lengths between those of W0 and the tuned ones."""
    weight, tuned = adapter.base.tensor(name), adapter.files.read(length).double()
    start = row_lengths(weight).reshape(tuned.shape)
    return {
        b: step.factor * adapter.files.read(b).float(),
        length: (start + step.factor * (tuned - start)).float(),
    }


class Factors(NamedTuple):
    """The factors of one weight's change."""

    module: str
    a: str
    """Name of the tensor."""
    b: str
    rank: int
    alpha: float
    scale: float
    """Of the product."""


def _extend(
    placed: Mapping[str, Factors],
    rank_stabilised: bool,
    tensors: dict[str, Tensor],
    settings: dict[str, Any],
    extra: Mapping[str, LowRank],
) -> bool:
    """Put low-rank changes beside those of a LoRA, whose ranks grow and whose scales stay."""
    ranks = {name: held.rank for name, held in placed.items()}
    alphas = {name: held.alpha for name, held in placed.items()}
    for name, change in extra.items():
        held = placed.get(name)
        if held is None or held.scale == 0:
            return False
        tensors[held.a] = torch.cat([tensors[held.a].float(), change.a])
        tensors[held.b] = torch.cat([tensors[held.b].float(), change.b / held.scale], dim=1)
        ranks[name] = tensors[held.a].shape[0]
        alpha = held.scale * (math.sqrt(ranks[name]) if rank_stabilised else ranks[name])
        alphas[name] = round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha
    rank, alpha = (max(set(table.values()), key=list(table.values()).count) for table in (ranks, alphas))
    settings |= {"r": rank, "lora_alpha": alpha}
    settings["rank_pattern"] = {placed[name].module: own for name, own in ranks.items() if own != rank}
    settings["alpha_pattern"] = {placed[name].module: own for name, own in alphas.items() if own != alpha}
    return True


def by_pattern(patterns: Mapping[str, Any], module: str, otherwise: float) -> float:
    """Return the value of the first pattern that names a module, as peft reads it, else another."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)
