"""Points of a path as files of the adapter's own type, written only if they read back as the same weights."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from peft_arena.core.errors import UserError
from peft_arena.methods.files import SETTINGS, WEIGHTS
from peft_arena.weights.adapter_directory import Step, Tensors
from peft_arena.weights.effective import EffectiveWeights, effective_weights
from peft_arena.weights.writing import new_directory

OF_CHANGE, OF_WEIGHT = 1e-6, 2e-7
"""Most that a point read back may differ, in Frobenius norms: of its change and, for rounding, of the weight."""
FACTS = "rewind.json"


@dataclass(frozen=True, eq=False)
class AdapterFiles:
    """A point as an adapter of its own type."""

    tensors: Tensors
    """By the names they have in the file; float32 where the point moved them, else as in the checkpoint."""
    settings: Mapping[str, Any]
    """The table of ``adapter_config.json``."""
    directory: Path
    """The checkpoint it was made from."""
    point: EffectiveWeights = field(repr=False)
    """The weights that it is."""


def express(weights: EffectiveWeights) -> AdapterFiles | None:
    """Return a point as files of the adapter's own type; None where its own parameters do not express it.

    So for checkpoints that are no adapters or of types without a closed form, for the ``linear`` way of a method
    whose own way is another, for what :meth:`EffectiveWeights.plus` adds to all but a LoRA, for COFT beyond its
    constraint, and where a bias has another factor than the weight whose parameters move it. At factor 1 the tensors
    are those of the checkpoint.

    Raises:
        UserError: a file has become unreadable.
    """
    own = weights.changes.own
    if own is None or (weights.where.extra and own.extend is None):
        return None
    if any(weights.factor_of(name) != weights.factor_of(other) for name, other in own.follows.items()):
        return None
    tensors = {name: own.adapter.files.read(name) for name in own.adapter.files.places}
    for name, writer in own.writers.items():
        factor = weights.factor_of(name)
        if factor == 1.0:
            continue
        if weights.way == "linear" and not own.straight and factor != 0.0:
            return None
        written = writer(Step(factor, math.sqrt(factor) if weights.way == "sqrt" else factor))
        if written is None:
            return None
        tensors |= written
    settings = dict(own.adapter.table)
    if weights.where.extra and own.extend is not None and not own.extend(tensors, settings, weights.where.extra):
        return None
    return AdapterFiles(tensors, settings, own.adapter.directory, weights)


def write_adapter(files: AdapterFiles, out: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Write a point as an adapter directory, which appears whole or not at all.

    It is read back from the disk before it appears, and compared with the point parameter by parameter.

    Args:
        files: of :func:`express`.
        out: the directory, which must not exist or be empty; the ones above it are made.
        facts: written beside the adapter as ``rewind.json``: where it is from.

    Raises:
        UserError: there is something at the path, it is inside a run, it cannot be written, or what was written is not
            the point.
    """
    needed = sum(tensor.numel() * tensor.element_size() for tensor in files.tensors.values())
    with new_directory(out, needed) as part:
        save_files(files, part)
        if facts is not None:
            (part / FACTS).write_text(json.dumps(facts, indent=1, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")
        _compare(files.point, part)


def save_files(files: AdapterFiles, directory: Path) -> None:
    """Write the two files of an adapter into a directory, which is made if need be, without reading them back.

    Raises:
        OSError: the disk is full, or the place is not writable.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(files.settings, indent=2, sort_keys=True, allow_nan=False) + "\n"
    (directory / SETTINGS).write_text(text, encoding="utf-8")
    plain = {name: tensor.contiguous() for name, tensor in files.tensors.items()}
    try:
        save_file(plain, directory / WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    for file in (directory / SETTINGS, directory / WEIGHTS):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def _compare(point: EffectiveWeights, directory: Path) -> None:
    """Check that an adapter is a point.

    Raises:
        UserError: a parameter of it is another.
    """
    found = effective_weights(point.base_weights, directory)
    for name in sorted(set(point.changes.makers) | set(found.changes.makers)):
        base, wanted = point.parameter(name)
        given = found.parameter(name).change
        first = torch.zeros_like(base) if wanted is None else wanted.dense(base)
        second = torch.zeros_like(base) if given is None else given.dense(base)
        limit = OF_CHANGE * float(first.norm()) + OF_WEIGHT * float(base.norm())
        gap = float((first - second).norm())
        if not gap <= limit:
            raise UserError(
                f"the adapter is not the point it was made from: {name} read back is {gap:.2g} away from it, at most "
                f"{limit:.2g} is rounding; nothing was written"
            )
