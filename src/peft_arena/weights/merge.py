"""Writing the weights of a tuned point as a plain model directory, one parameter at a time.

Each parameter is read from the pretrained files, changed in float32, rounded to the type asked for, and written before
the next one is read. What was written is read back and compared, number by number and by logits (see
:mod:`peft_arena.weights.verify`); a directory appears under its name only if that holds.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_arena.core.errors import UserError
from peft_arena.core.provenance import provenance
from peft_arena.models.folder import refuse_lost_tokens, tokens_in
from peft_arena.weights.adapter_directory import CONFIG
from peft_arena.weights.adapter_files import express, save_files
from peft_arena.weights.base import names_in
from peft_arena.weights.effective import EffectiveWeights
from peft_arena.weights.files import model_files
from peft_arena.weights.model_directory import (
    MERGED,
    copy_companions,
    dtype_named,
    load_back,
    persistent_buffers,
    write_config,
)
from peft_arena.weights.verify import Make, Progress, Tuner, Verified
from peft_arena.weights.verify import verify as verified
from peft_arena.weights.vocabulary import rows_of
from peft_arena.weights.writing import Entry, new_directory, refuse_taken, write_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Restore = Callable[["PreTrainedModel", Path], nn.Module]
"""Puts the adapter in a directory on the pretrained model, freshly loaded."""
POINT = "point"
PART = 2**20
"""Entries of a tensor that are added up, rounded and written at the same time."""


@dataclass(frozen=True)
class Merged:
    """What was written."""

    directory: str
    dtype: str
    factor: float
    parameters: int
    """Numbers written, tied ones once."""
    bytes: int
    """Of the safetensors files."""
    files: tuple[str, ...]
    """The safetensors files."""
    verified: Verified | None
    """None if that was not asked for."""

    def summary(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        found = None if self.verified is None else self.verified.summary()
        return {**asdict(self), "verified": found}


def merge_point(
    weights: EffectiveWeights,
    source: Path,
    out: Path,
    *,
    dtype: str | None = None,
    shard_size: int = 5 * 10**9,
    verify: bool = True,
    tuned: Make | None = None,
    restore: Restore | None = None,
    rounded: bool = False,
    tokenizer: Path | None = None,
    facts: Mapping[str, Any] | None = None,
    progress: Progress = lambda done, what: None,
) -> Merged:
    """Write the weights of a point as a model directory that transformers loads without this package.

    Args:
        weights: the point, anywhere on a path.
        source: directory of the pretrained model's files; all that are not weights are copied.
        out: must not exist, or be empty.
        dtype: ``float32``, ``bfloat16`` or ``float16``; None for the type the model computes in.
        shard_size: most bytes of values in one file.
        verify: read back what was written and compare it with the tuned model; two models are in memory in turn, where
            writing alone needs a few times the largest parameter in float32.
        tuned: makes the tuned model at this point from the pretrained one, freshly loaded.
        restore: the same for points that the checkpoint is not: it is given the point's own adapter files where there
            are any. Without both, what was written is held against the point alone.
        rounded: whether what rounding to the type makes of the point is what is asked for, because it has been
            evaluated like that; else a change that rounding drowns is refused.
        tokenizer: directory whose tokenizer belongs to the tuned model; None: the pretrained model's.
        facts: go into ``merge.json``: what was merged and where it is from.
        progress: called with the fraction that is done and what is being done.

    Raises:
        UserError: the point cannot be said in this architecture (added biases it has no place for), a file of the
            pretrained or the tuned model is missing or damaged, the tokenizer has tokens without embeddings, the disk
            refuses, or what was written is not the tuned model. Nothing is left then.
    """
    base = weights.base_weights
    wanted = base.dtype if dtype is None else dtype_named(dtype)
    refuse_taken(out)
    refuse_lost_tokens(tokens_in(tokenizer or source), rows_of(base), str(tokenizer or source), "what would be written")
    added, config = _with_biases(weights)
    entries, read, buffers = _plan(weights, source, wanted, added)
    size = sum(entry.size for entry in entries)
    with new_directory(out, needed=size) as part:
        copy_companions(source, tokenizer, part)
        write_config(source / CONFIG, part / CONFIG, wanted, config, tokenizer, own_head=base.own_head)
        share = 0.5 if verify else 1.0
        files = write_model(part, entries, _counted(read, size, share, progress), shard_size)
        found: Verified | None = None
        if verify:
            tuner = _tuner(weights, part / POINT, tuned, restore)
            found = verified(weights, part, wanted, buffers, tuner, rounded, progress)
            shutil.rmtree(part / POINT, ignore_errors=True)
        elif added or names_in(model_files(source), base.architecture) is None:
            load_back(part, base, wanted)  # shows that every tensor has a place
        name = str(wanted).removeprefix("torch.")
        numbers = sum(math.prod(entry.shape) for entry in entries)
        names = tuple(file.name for file in files)
        written = sum(file.stat().st_size for file in files)
        merged = Merged(str(out), name, weights.factor, numbers, written, names, found)
        _write_record(part / MERGED, merged, tokenizer, facts or {})
    return merged


class _Plan(NamedTuple):
    """What is to be written."""

    entries: list[Entry]
    """In the order of the pretrained files."""
    read: Callable[[Entry], Iterator[Tensor]]
    """Gives the values."""
    buffers: Mapping[str, Tensor]
    """Those of the entries that are no parameters."""


def _tuner(weights: EffectiveWeights, place: Path, tuned: Make | None, restore: Restore | None) -> Tuner | None:
    """Return what the point is to be held against; adapter files of the point are written to a directory for it.

    Raises:
        OSError: the disk refused them.
    """
    if tuned is not None:
        return Tuner(tuned, "the tuned model, as its method restores it")
    files = None if restore is None else express(weights)
    if restore is None or files is None:
        return None
    save_files(files, place)
    return Tuner(lambda model: restore(model, place), "the point's own adapter, as its method restores it")


def _plan(weights: EffectiveWeights, source: Path, dtype: torch.dtype, added: Mapping[str, tuple[int, ...]]) -> _Plan:
    """Return what is to be written.

    Raises:
        UserError: a shard of the pretrained model is missing or damaged.
    """
    base = weights.base_weights
    files = model_files(source)
    places = names_in(files, base.architecture)
    order = {name: number for number, name in enumerate(files.places)}
    names = list(base.shapes)
    if places is not None:
        names.sort(key=lambda name: order[places[name]])
    entries = [Entry(name, dtype, base.shapes[name]) for name in names]
    entries += [Entry(name, dtype, shape) for name, shape in added.items()]
    buffers = persistent_buffers(base, source)
    entries += [Entry(name, buffer.dtype, tuple(buffer.shape)) for name, buffer in buffers.items()]

    def read(entry: Entry) -> Iterator[Tensor]:
        if entry.name in buffers:
            yield buffers[entry.name]
        elif entry.name in base.shapes or entry.name in weights.changes.added:
            yield from _parameter(weights, entry)
        else:
            yield torch.zeros(entry.shape, dtype=dtype)

    return _Plan(entries, read, buffers)


def _parameter(weights: EffectiveWeights, entry: Entry) -> Iterator[Tensor]:
    """Yield a tuned parameter in the type to be written, some of its rows at a time.

    Raises:
        UserError: an entry is larger than the type can hold.
    """
    before, change = weights.parameter(entry.name)
    delta = None if change is None else change.dense(before)
    del change
    largest = torch.finfo(entry.dtype).max
    kept = delta is None and entry.dtype == weights.base_weights.dtype  # as the file has it, which was checked
    rows = max(1, PART // max(1, before[:1].numel())) if before.dim() else 1
    for start in range(0, before.shape[0] if before.dim() else 1, rows):
        chosen = slice(start, start + rows) if before.dim() else ...
        part = before[chosen] if delta is None else before[chosen] + delta[chosen]
        if not kept and not _within(part, largest):
            name = str(entry.dtype).removeprefix("torch.")
            raise UserError(f"{entry.name} has entries that are too large for {name}; write float32 (--dtype float32)")
        yield part.to(entry.dtype)


def _within(values: Tensor, largest: float) -> bool:
    """Say whether all values are numbers of at most a size."""
    low, high = (float(end) for end in torch.aminmax(values))
    return -largest <= low and high <= largest


def _with_biases(weights: EffectiveWeights) -> tuple[dict[str, tuple[int, ...]], PreTrainedConfig | None]:
    """Return every bias that is to be written although the pretrained model has none, and the settings that ask for it.

    An architecture has biases where a setting says so, often for more layers than the tuned model changes: the others
    are zero.

    Raises:
        UserError: the architecture has no such setting, and would drop the biases when it loads them.
    """
    wanted = weights.changes.added
    base = weights.base_weights
    if not wanted:
        return {}, None
    config = copy.deepcopy(base.architecture.config)
    found = _parameters_of(config)
    for name, value in config.to_dict().items():
        if value is not False or "bias" not in name:
            continue
        setattr(config, name, True)
        more = _parameters_of(config)
        if (set(more) - set(found)) & set(wanted):
            found = more
        else:
            setattr(config, name, False)
    extra = {name: shape for name, shape in found.items() if name not in base.aliases}
    if not set(wanted) <= set(extra) or set(found) - set(extra) != set(base.aliases):
        lost = sorted(set(wanted) - set(extra)) or sorted(wanted)
        raise UserError(
            f"cannot merge: the tuned model adds {len(wanted)} biases, e.g. {lost[0]}, and "
            f"{type(base.architecture).__name__} has no place for {'it' if len(lost) == 1 else 'them'}: a model loaded "
            "from the merged weights would be another one"
        )
    return extra, config


def _parameters_of(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}


def _counted(
    read: Callable[[Entry], Iterator[Tensor]], size: int, share: float, progress: Progress
) -> Callable[[Entry], Iterator[Tensor]]:
    done = 0

    def counted(entry: Entry) -> Iterator[Tensor]:
        nonlocal done
        progress(share * done / max(1, size), entry.name)
        yield from read(entry)
        done += entry.size

    return counted


def _write_record(file: Path, merged: Merged, tokenizer: Path | None, facts: Mapping[str, Any]) -> None:
    table = merged.summary()
    del table["directory"]
    table |= {"schema": 1, "tokenizer": "checkpoint" if tokenizer is not None else "base"}
    table |= {**facts, "provenance": provenance()}
    file.write_text(json.dumps(table, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
