"""What an export has written, and what all exports share."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peft_arena.core.errors import UserError
from peft_arena.core.ids import file_hash
from peft_arena.core.provenance import provenance

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from peft_arena.export.shards import Shards
    from peft_arena.weights.files import TensorFiles
    from peft_arena.weights.tuned import Tuned

To = Literal["adapter", "model", "lora", "gguf"]
KINDS: tuple[To, ...] = ("adapter", "model", "lora", "gguf")


@dataclass(frozen=True)
class Exported:
    """What was written."""

    directory: str
    to: To
    layout: str
    """What the checkpoint was: ``peft``, ``safetensors``, or the library that wrote its shards."""
    files: tuple[str, ...]
    tensors: int | None = None
    dtype: str | None = None
    approximation: Mapping[str, Any] | None = None
    """Of a conversion to LoRA: how far it is from the adapter; None where nothing was converted."""


def write_record(
    part: Path, done: Exported, *, point: Tuned | None = None, source: Path | None = None, **facts: Any
) -> None:
    """Write ``export.json``: what was exported, from where, and with which versions."""
    from peft_arena.weights.model_directory import EXPORTED

    table = {key: value for key, value in asdict(done).items() if key != "directory"}
    if point is not None:
        table["base"] = point.base.model_dump(mode="json")
        table |= {"subject": point.subject, "step": point.step, "factor": point.factor}
        table["method"] = None if point.method is None else point.method.model_dump(mode="json")
    if source is not None:
        table["subject"] = str(source)
    table["hashes"] = {name: file_hash(part / name) for name in done.files if (part / name).is_file()}
    table |= {**facts, "schema": 1, "provenance": provenance()}
    text = json.dumps(table, indent=1, sort_keys=True, allow_nan=False)
    (part / EXPORTED).write_text(text + "\n", encoding="utf-8")


def on_base(directory: Path, base: str | None) -> Tuned:
    """Return a point for a directory on a base, whose files need not be there."""
    from peft_arena.core.build import build
    from peft_arena.core.specs import ModelSpec
    from peft_arena.models.load import pin
    from peft_arena.weights.tuned import Tuned

    if base is None:
        raise UserError(f"{directory} is a directory: --base must name the pretrained model it belongs to")
    spec = pin(build(ModelSpec, {"name": base}, where="--base"))
    return Tuned(base=spec, directory=directory, method=None, subject=str(directory), step=None)


def same_shape(shards: Shards, name: str, wanted: tuple[int, ...], place: str) -> None:
    """Check the shape of a tensor of a checkpoint.

    Raises:
        UserError: it is another one.
    """
    given = shards.stored[name].shape
    if given != wanted:
        raise UserError(f"{shards.directory} holds {place} as {given}, the model and its settings ask for {wanted}")


def finite(shards: Shards, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor of a checkpoint, in a type if one is given.

    Raises:
        UserError: an entry of it is no finite number.
    """
    found = shards.read(name)
    tensor = found if dtype is None else found.to(dtype)
    if not math.isfinite(float(tensor.float().sum())) and not bool(tensor.isfinite().all()):
        raise UserError(f"{shards.directory} holds {name} with entries that are no finite numbers in {tensor.dtype}")
    return tensor


def same_values(files: TensorFiles, wanted: Mapping[str, Callable[[], Tensor]]) -> None:
    """Compare every tensor that was written with what it was to be, one at a time.

    Raises:
        UserError: one is missing, too many, of another type, or has another entry.
    """
    import torch

    stray = sorted(set(files.places) ^ set(wanted))
    if stray:
        raise UserError(f"what was written has other tensors than it was to have, e.g. {stray[0]}; nothing was kept")
    for name, value in wanted.items():
        found, right = files.read(name), value()
        if found.dtype != right.dtype or not torch.equal(found, right):
            raise UserError(f"what was written is not what was to be: {name} read back is another; nothing was kept")
