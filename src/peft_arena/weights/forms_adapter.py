"""Closed forms of PEFT adapters, by the type their configuration names.

Each function returns None where it does not understand a tensor or a setting of the adapter. What it returns also says
how files of the same type express the points of the path.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from peft_arena.methods.base import PathKind
from peft_arena.weights.adapter_directory import Adapter, Changes, Form, Maker, OwnFiles, Step, Writer, times
from peft_arena.weights.change import Change, Dense, LowRank
from peft_arena.weights.forms_lora import lora
from peft_arena.weights.forms_rotation import boft, oft, road
from peft_arena.weights.rescaled import Columns, Rows


def ia3(adapter: Adapter) -> Changes | None:
    """(IA)^3: factors on outputs, with the bias, or on inputs."""
    parts = adapter.parts("ia3_l")
    if parts is None or not adapter.plain(frozenset({"feedforward_modules", "init_ia3_weights"})):
        return None
    makers: dict[str, Maker] = {}
    writers: dict[str, Writer] = {}
    follows: dict[str, str] = {}
    for module, names in parts.items():
        place = adapter.weight(module)
        if place is None:
            return None
        name, (out, inner) = place
        stored = names["ia3_l"]
        inputs = adapter.files.places[stored].shape == (1, inner)
        adapter.expect(stored, *((1, inner) if inputs else (out, 1)))
        makers[name] = partial(_scaled, adapter, stored, (out, inner), inputs)
        writers[name] = partial(_write_scaled, adapter, stored)
        if not inputs and f"{module}.bias" in adapter.base.aliases:
            makers[f"{module}.bias"] = partial(_scaled_bias, adapter, stored, f"{module}.bias")
            follows[f"{module}.bias"] = name
    own = OwnFiles(adapter, writers, straight=True, follows=follows)
    return Changes(makers, kind=PathKind.MULTIPLICATIVE, own=own)


def _scaled(adapter: Adapter, stored: str, shape: tuple[int, int], inputs: bool) -> Change:
    beyond = adapter.files.read(stored).float().flatten() - 1
    return Columns(beyond, shape) if inputs else Rows(beyond, shape)


def _write_scaled(adapter: Adapter, stored: str, step: Step) -> dict[str, Tensor]:
    return {stored: 1 + step.factor * (adapter.files.read(stored).float() - 1)}


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
    writers: dict[str, Writer] = {}
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
        writers[name] = times(adapter, names["vera_lambda_b"])
    return Changes(makers, own=OwnFiles(adapter, writers, straight=True))


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
    writers: dict[str, Writer] = {}
    for module, names in parts.items():
        place = adapter.weight(module)
        if place is None:
            return None
        name, (out, inner) = place
        rank, stored = int(table["r"]), names["miss_block"]
        writers[name] = times(adapter, stored)
        if kind == "bat":
            adapter.expect(stored, out // rank, rank, rank)
            makers[name] = partial(_blocks, adapter, stored, name)
            continue
        width = int(table["mini_r"]) if kind == "mini" else out
        adapter.expect(stored, rank, width)
        makers[name] = partial(_repeated, adapter, stored, out, inner)
    return Changes(makers, own=OwnFiles(adapter, writers, straight=True))


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
    writers: dict[str, Writer] = {}
    for module, names in parts.items():
        for suffix, stored in names.items():
            name = f"{module}.{suffix.rpartition('.')[2]}"
            if name not in adapter.base.aliases:
                return None
            adapter.expect(stored, *adapter.base.shapes[adapter.base.canonical(name)])
            makers[name] = partial(_replaced, adapter, stored, name)
            writers[name] = partial(_write_replaced, adapter, stored, name)
    return Changes(makers, own=OwnFiles(adapter, writers, straight=True))


def _replaced(adapter: Adapter, stored: str, name: str) -> Change:
    return Dense(adapter.files.read(stored).float() - adapter.base.tensor(name))


def _write_replaced(adapter: Adapter, stored: str, name: str, step: Step) -> dict[str, Tensor]:
    before = adapter.base.tensor(name)
    return {stored: before + step.factor * (adapter.files.read(stored).float() - before)}


def biases(adapter: Adapter) -> Changes | None:
    """Trained biases, added to those a layer has."""
    parts = adapter.parts("beft_bias")
    if parts is None or not adapter.plain(frozenset({"init_weights"})):
        return None
    makers: dict[str, Maker] = {}
    writers: dict[str, Writer] = {}
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
        writers[name] = times(adapter, stored)
    return Changes(makers, added, own=OwnFiles(adapter, writers, straight=True))


def _bias(adapter: Adapter, stored: str) -> Change:
    return Dense(adapter.files.read(stored).float().flatten())


FORMS: Mapping[str, Form] = {
    "LORA": lora,
    "OFT": oft,
    "BOFT": boft,
    "ROAD": road,
    "IA3": ia3,
    "VERA": vera,
    "MISS": miss,
    "LN_TUNING": norms,
    "BEFT": biases,
}
"""By peft's name of the type of adapter."""
