"""Adapters that rotate inputs or outputs (OFT, COFT, BOFT, RoAd) as changes of weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from peft_arena.methods.base import PathKind
from peft_arena.weights.adapter_directory import Adapter, Changes, Maker, OwnFiles, Step, Writer
from peft_arena.weights.change import Change
from peft_arena.weights.planar import Planar
from peft_arena.weights.rotation import Rotation, StretchedRotation, projected_generator

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
    writers: dict[str, Writer] = {}
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
        writers[name] = partial(_write_rotation, adapter, names["oft_R.weight"])
    return Changes(makers, kind=PathKind.CAYLEY, own=OwnFiles(adapter, writers, straight=False))


def _entries(adapter: Adapter, name: str) -> Tensor:
    """Return what counts of the generators' entries: COFT shrinks them."""
    entries = adapter.files.read(name).float()
    return projected_generator(entries, adapter.table["eps"]) if adapter.table["coft"] else entries


def _write_rotation(adapter: Adapter, name: str, step: Step) -> dict[str, Tensor] | None:
    """Return the generators of a point; None where COFT would shrink them again."""
    entries = step.turn * _entries(adapter, name)
    if adapter.table["coft"] and not torch.equal(projected_generator(entries, adapter.table["eps"]), entries):
        return None
    return {name: entries}


def _rotation(adapter: Adapter, name: str, side: int, shape: tuple[int, int]) -> Change:
    table = adapter.table
    entries = _entries(adapter, name)
    skew = entries.new_zeros(entries.shape[0], side, side)
    rows, columns = torch.triu_indices(side, side, 1)
    skew[:, rows, columns] = entries
    terms = table["num_cayley_neumann_terms"] if table["use_cayley_neumann"] else None
    return Rotation(skew - skew.transpose(1, 2), terms, shape)


BOFT_SETTINGS = frozenset(
    {"boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout", "init_weights"}
)


def boft(adapter: Adapter) -> Changes | None:
    """BOFT of one butterfly factor: rotated inputs, and a factor for each output."""
    parts = adapter.parts("boft_R", "boft_s")
    if parts is None or not adapter.plain(BOFT_SETTINGS):
        return None
    makers: dict[str, Maker] = {}
    writers: dict[str, Writer] = {}
    for module, names in parts.items():
        place = adapter.weight(module)
        if place is None or len(names) != 2:
            return None
        name, (out, inner) = place
        shape = adapter.files.places[names["boft_R"]].shape
        if len(shape) != 4 or shape[0] != 1:  # more factors are permuted
            return None
        side = shape[-1]
        adapter.expect(names["boft_R"], 1, inner // side, side, side)
        adapter.expect(names["boft_s"], out, 1)
        if inner % side:
            return None
        makers[name] = partial(_stretched, adapter, names["boft_R"], names["boft_s"], (out, inner))
        writers[name] = partial(_write_stretched, adapter, names["boft_R"], names["boft_s"])
    return Changes(makers, kind=PathKind.CAYLEY, own=OwnFiles(adapter, writers, straight=False))


def _stretched(adapter: Adapter, turned: str, factors: str, shape: tuple[int, int]) -> Change:
    blocks = adapter.files.read(turned).float()[0]
    beyond = adapter.files.read(factors).float().flatten() - 1
    return StretchedRotation(Rotation((blocks - blocks.transpose(1, 2)) / 2, None, shape), beyond)


def _write_stretched(adapter: Adapter, turned: str, factors: str, step: Step) -> dict[str, Tensor]:
    return {
        turned: step.turn * adapter.files.read(turned).float(),
        factors: 1 + step.factor * (adapter.files.read(factors).float() - 1),
    }


ROAD_SETTINGS = frozenset({"variant", "group_size", "init_weights"})


def road(adapter: Adapter) -> Changes | None:
    """RoAd: pairs of outputs, with the bias, rotated in their plane and scaled."""
    table = adapter.table
    parts = adapter.parts("road_theta", "road_alpha")
    per_output = {"road_1": 0.5, "road_2": 1, "road_4": 2}.get(str(table.get("variant")))
    if parts is None or per_output is None or not adapter.plain(ROAD_SETTINGS):
        return None
    makers: dict[str, Maker] = {}
    writers: dict[str, Writer] = {}
    follows: dict[str, str] = {}
    for module, names in parts.items():
        place = adapter.weight(module)
        if place is None or len(names) != 2:
            return None
        name, (out, inner) = place
        for stored in names.values():
            adapter.expect(stored, int(per_output * out))
        makers[name] = partial(_planar, adapter, names, (out, inner))
        writers[name] = partial(_write_planar, adapter, names)
        bias = f"{module}.bias"
        if bias in adapter.base.aliases:
            makers[bias] = partial(_planar, adapter, names, (out,))
            follows[bias] = name
    own = OwnFiles(adapter, writers, straight=False, follows=follows)
    return Changes(makers, kind=PathKind.MULTIPLICATIVE, own=own)


def _planar(adapter: Adapter, names: Mapping[str, str], shape: tuple[int, ...]) -> Change:
    half = int(adapter.table["group_size"]) // 2
    angles, scales = (_per_output(adapter, names[part], half, shape[0]) for part in ("road_theta", "road_alpha"))
    return Planar(angles, scales - 1, half, shape)


def _per_output(adapter: Adapter, stored: str, half: int, out: int) -> Tensor:
    """Return the numbers of each output for itself and for its partner, shape (2, out)."""
    numbers = adapter.files.read(stored).float()
    match adapter.table["variant"]:
        case "road_1":  # one for each pair
            return numbers.reshape(-1, 1, half).expand(-1, 2, -1).reshape(1, out).expand(2, -1)
        case "road_2":
            return numbers.expand(2, -1)
    return numbers.reshape(-1, 2, 2 * half).transpose(0, 1).reshape(2, out)


def _write_planar(adapter: Adapter, names: Mapping[str, str], step: Step) -> dict[str, Tensor]:
    angles, scales = names["road_theta"], names["road_alpha"]
    return {
        angles: step.factor * adapter.files.read(angles).float(),
        scales: 1 + step.factor * (adapter.files.read(scales).float() - 1),
    }
