"""Closed forms of PEFT adapters, by the type their configuration names.

Each function returns None where it does not understand a tensor or a setting of the adapter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peft_arena.weights.change import Change, Dense, LowRank
from peft_arena.weights.forms import Adapter, Changes, Form, Maker
from peft_arena.weights.rescaled import Columns, Decomposed, Rows
from peft_arena.weights.rotation import Rotation, projected_generator

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
    return Changes(makers)


def _low_rank(adapter: Adapter, b: str, a: str, scale: float, length: str | None) -> Change:
    first, second = scale * adapter.files.read(b).float(), adapter.files.read(a).float()
    if length is None:
        return LowRank(first, second)
    return Decomposed(first, second, adapter.files.read(length).float().flatten())


def by_pattern(patterns: Mapping[str, Any], module: str, otherwise: float) -> float:
    """Return the value of the first pattern that names a module, as peft reads it, else another."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)


OFT_SETTINGS = frozenset({"r", "oft_block_size", "module_dropout", "init_weights", "coft", "eps", "block_share"}) | {
    *("use_cayley_neumann", "num_cayley_neumann_terms")
}


def oft(adapter: Adapter) -> Changes | None:
    """OFT and COFT, the Cayley transform exact or a series, blocks shared or not."""
    table = adapter.table
    needed = ("coft", "eps", "use_cayley_neumann", "num_cayley_neumann_terms")
    parts = adapter.parts("oft_R.weight")
    if parts is None or not adapter.plain(OFT_SETTINGS) or any(name not in table for name in needed):
        return None
    makers: dict[str, Maker] = {}
    for module, names in parts.items():
        place = adapter.weight(module)
        shape = adapter.files.places[names["oft_R.weight"]].shape
        if place is None or len(shape) != 2:
            return None
        name, (out, inner) = place
        side = round((1 + math.sqrt(1 + 8 * shape[1])) / 2)
        blocks = 1 if table.get("block_share") else inner // side
        adapter.expect(names["oft_R.weight"], blocks, side * (side - 1) // 2)
        if inner % side:
            return None
        makers[name] = partial(_rotation, adapter, names["oft_R.weight"], side, (out, inner))
    return Changes(makers)


def _rotation(adapter: Adapter, name: str, side: int, shape: tuple[int, int]) -> Change:
    table = adapter.table
    entries = adapter.files.read(name).float()
    if table["coft"]:
        entries = projected_generator(entries, table["eps"])
    skew = entries.new_zeros(entries.shape[0], side, side)
    rows, columns = torch.triu_indices(side, side, 1)
    skew[:, rows, columns] = entries
    terms = table["num_cayley_neumann_terms"] if table["use_cayley_neumann"] else None
    return Rotation(skew - skew.transpose(1, 2), terms, shape)


def ia3(adapter: Adapter) -> Changes | None:
    """(IA)^3: factors on outputs, with the bias, or on inputs."""
    parts = adapter.parts("ia3_l")
    if parts is None or not adapter.plain(frozenset({"feedforward_modules", "init_ia3_weights"})):
        return None
    makers: dict[str, Maker] = {}
    for module, names in parts.items():
        place = adapter.weight(module)
        if place is None:
            return None
        name, (out, inner) = place
        stored = names["ia3_l"]
        inputs = adapter.files.places[stored].shape == (1, inner)
        adapter.expect(stored, *((1, inner) if inputs else (out, 1)))
        makers[name] = partial(_scaled, adapter, stored, (out, inner), inputs)
        if not inputs and f"{module}.bias" in adapter.base.aliases:
            makers[f"{module}.bias"] = partial(_scaled_bias, adapter, stored, f"{module}.bias")
    return Changes(makers)


def _scaled(adapter: Adapter, stored: str, shape: tuple[int, int], inputs: bool) -> Change:
    beyond = adapter.files.read(stored).float().flatten() - 1
    return Columns(beyond, shape) if inputs else Rows(beyond, shape)


def _scaled_bias(adapter: Adapter, stored: str, bias: str) -> Change:
    return Dense((adapter.files.read(stored).float().flatten() - 1) * adapter.base.tensor(bias))


VERA_SETTINGS = frozenset({"r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial", "init_weights"})
PROJECTIONS = ("base_model.vera_A", "base_model.vera_B")


def vera(adapter: Adapter) -> Changes | None:
    """VeRA with its random matrices in the file."""
    parts = adapter.parts("vera_lambda_b", "vera_lambda_d", beside=frozenset(PROJECTIONS))
    if parts is None or not adapter.plain(VERA_SETTINGS) or any(name not in adapter.files for name in PROJECTIONS):
        return None
    first, second = (adapter.files.places[name].shape for name in PROJECTIONS)
    makers: dict[str, Maker] = {}
    for module, names in parts.items():
        place = adapter.weight(module)
        if place is None or len(names) != 2:
            return None
        name, (out, inner) = place
        if inner > first[1] or out > second[0] or first[0] != second[1]:
            return None
        adapter.expect(names["vera_lambda_d"], first[0])
        adapter.expect(names["vera_lambda_b"], out)
        makers[name] = partial(_projected, adapter, names, out, inner)
    return Changes(makers)


def _projected(adapter: Adapter, names: Mapping[str, str], out: int, inner: int) -> Change:
    first, second = (adapter.files.read(name).float() for name in PROJECTIONS)
    outer = adapter.files.read(names["vera_lambda_b"]).float()
    middle = adapter.files.read(names["vera_lambda_d"]).float()
    return LowRank(outer[:, None] * second[:out] * middle, first[:, :inner].contiguous())


def miss(adapter: Adapter) -> Changes | None:
    """MiSS: a matrix repeated over shards of the input, of input and output, or blocks beside the weight's own."""
    table = adapter.table
    parts = adapter.parts("miss_block")
    known = frozenset({"r", "miss_dropout", "mini_r", "init_weights"})
    kind = table.get("init_weights", True)
    if parts is None or not adapter.plain(known) or kind not in (True, False, "bat", "mini"):
        return None
    makers: dict[str, Maker] = {}
    for module, names in parts.items():
        place = adapter.weight(module)
        if place is None:
            return None
        name, (out, inner) = place
        rank, stored = int(table["r"]), names["miss_block"]
        if kind == "bat":
            adapter.expect(stored, out // rank, rank, rank)
            makers[name] = partial(_blocks, adapter, stored, name)
            continue
        width = int(table["mini_r"]) if kind == "mini" else out
        adapter.expect(stored, rank, width)
        makers[name] = partial(_repeated, adapter, stored, out, inner)
    return Changes(makers)


def _repeated(adapter: Adapter, stored: str, out: int, inner: int) -> Change:
    shard = adapter.files.read(stored).float()
    rank, width = shard.shape
    places: Tensor = torch.arange(inner) % rank == torch.arange(rank)[:, None]
    return LowRank(shard.T.repeat(out // width, 1), places.float())


def _blocks(adapter: Adapter, stored: str, name: str) -> Change:
    blocks = adapter.files.read(stored).float()
    weight, side = adapter.base.tensor(name), blocks.shape[-1]
    cut = weight.reshape(blocks.shape[0], side, weight.shape[1] // side, side).transpose(1, 2)
    moved = cut @ blocks[:, None] + blocks[:, None]
    return Dense(moved.transpose(1, 2).reshape(weight.shape))


def norms(adapter: Adapter) -> Changes | None:
    """Tuned normalisation layers, stored whole."""
    parts = adapter.parts("ln_tuning_layers.weight", "ln_tuning_layers.bias")
    if parts is None or not adapter.plain(frozenset()):
        return None
    makers: dict[str, Maker] = {}
    for module, names in parts.items():
        for suffix, stored in names.items():
            name = f"{module}.{suffix.rpartition('.')[2]}"
            if name not in adapter.base.aliases:
                return None
            adapter.expect(stored, *adapter.base.shapes[adapter.base.canonical(name)])
            makers[name] = partial(_replaced, adapter, stored, name)
    return Changes(makers)


def _replaced(adapter: Adapter, stored: str, name: str) -> Change:
    return Dense(adapter.files.read(stored).float() - adapter.base.tensor(name))


def biases(adapter: Adapter) -> Changes | None:
    """Trained biases, added to those a layer has."""
    parts = adapter.parts("beft_bias")
    if parts is None or not adapter.plain(frozenset({"init_weights"})):
        return None
    makers: dict[str, Maker] = {}
    added: dict[str, tuple[int, ...]] = {}
    for module, names in parts.items():
        layer = adapter.base.architecture.get_submodule(module)
        if not isinstance(layer, torch.nn.Linear):
            return None
        name, stored = f"{module}.bias", names["beft_bias"]
        adapter.expect(stored, 1, layer.out_features)
        if name not in adapter.base.aliases:
            added[name] = (layer.out_features,)
        makers[name] = partial(_bias, adapter, stored)
    return Changes(makers, added)


def _bias(adapter: Adapter, stored: str) -> Change:
    return Dense(adapter.files.read(stored).float().flatten())


FORMS: Mapping[str, Form] = {
    "LORA": lora,
    "OFT": oft,
    "IA3": ia3,
    "VERA": vera,
    "MISS": miss,
    "LN_TUNING": norms,
    "BEFT": biases,
}
"""By peft's name of the type of adapter."""
