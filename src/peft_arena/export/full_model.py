"""From checkpoints of full fine-tuning to model directories that transformers loads."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from peft_arena.core.errors import UserError
from peft_arena.export.export_record import Exported, finite, on_base, same_shape, same_values, write_record
from peft_arena.export.shards import Shards, Stored, places

if TYPE_CHECKING:
    from torch import Tensor

    from peft_arena.weights.base import BaseWeights
    from peft_arena.weights.merge import Progress
    from peft_arena.weights.writing import Entry


def whole_model(directory: Path) -> Shards:
    """Return the tensors of a model directory, such as one of transformers' trainer."""
    import torch

    from peft_arena.weights.files import model_files
    from peft_arena.weights.writing import CODES

    files = model_files(directory)
    types = {code: kind for kind, code in CODES.items()}
    stored = {name: Stored(place.shape, types.get(place.kind, torch.float32)) for name, place in files.places.items()}
    return Shards(directory, "safetensors", stored, files.read)


def gathered_model(
    shards: Shards, out: Path, base: str | None, dtype: str | None, limit: int, progress: Progress
) -> Exported:
    """Write tuned weights that shards hold as a model directory, with all else from the base, and load it.

    Raises:
        UserError: a tensor is missing, has no place or another shape than the base's, weights that are one in the
            model are two, or the disk refuses.
    """
    import torch

    from peft_arena.models.folder import refuse_lost_tokens, tokens_in
    from peft_arena.models.load import weight_files
    from peft_arena.weights.base import base_weights
    from peft_arena.weights.files import model_files
    from peft_arena.weights.model_directory import (
        DTYPES,
        copy_companions,
        dtype_named,
        load_back,
        persistent_buffers,
        write_config,
    )
    from peft_arena.weights.vocabulary import rows_of
    from peft_arena.weights.writing import Entry, new_directory, write_model

    asked = None if dtype is None else dtype_named(dtype)
    point = on_base(shards.directory, base)
    pretrained, source = base_weights(point.base), weight_files(point.base)
    _check_settings(shards.directory, pretrained)
    buffers = persistent_buffers(pretrained, source)
    seen = {name for name, _ in pretrained.architecture.named_buffers()}
    found = _model_places(shards, pretrained, seen)
    for name, shape in pretrained.shapes.items():
        same_shape(shards, found[name], shape, name)
    held = {shards.stored[name].dtype for name in found.values()}
    target = asked or (held.pop() if len(held) == 1 else torch.float32)
    if target not in DTYPES.values():
        raise UserError(f"{shards.directory} holds weights as {target}; --dtype must name one of {', '.join(DTYPES)}")
    entries = [Entry(name, target, shape) for name, shape in pretrained.shapes.items()]
    entries += [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in buffers.items()]
    total = sum(entry.size for entry in entries)
    tokenizer = _own_tokenizer(shards.directory)
    mine = tokenizer or source
    refuse_lost_tokens(tokens_in(mine), rows_of(pretrained), str(mine), "what would be written")
    done = 0

    def value(entry: Entry) -> Tensor:
        return buffers[entry.name] if entry.name in buffers else finite(shards, found[entry.name], target)

    def parts(entry: Entry) -> Iterator[Tensor]:
        nonlocal done
        progress(0.5 * done / total, entry.name)
        done += entry.size
        yield value(entry)

    with new_directory(out, total) as part:
        copy_companions(source, tokenizer, part)
        write_config(
            source / "config.json", part / "config.json", target, None, tokenizer, own_head=pretrained.own_head
        )
        files = tuple(file.name for file in write_model(part, entries, parts, limit))
        progress(0.5, "comparing")
        same_values(model_files(part), {entry.name: partial(value, entry) for entry in entries})
        load_back(part, pretrained, target)
        name = str(target).removeprefix("torch.")
        exported = Exported(str(out), "model", shards.layout, files, len(entries), name)
        write_record(part, exported, point=point, source=shards.directory)
    return exported


def _model_places(shards: Shards, base: BaseWeights, buffers: set[str]) -> dict[str, str]:
    """Return the place of every parameter in the shards, tied ones once.

    Raises:
        UserError: one is missing, a tensor has no place, or tied weights differ.
    """
    import torch

    others = (set(base.aliases) - set(base.shapes)) | buffers
    present = {name.removeprefix(outer) for name in shards.stored for outer in ("", "model.", "module.")}
    first = {name for name in base.shapes if name in present or not base.tied(name)}
    found, more = places(shards, first, others | (set(base.shapes) - first), adapter=False)
    for name, place in more.items():
        parameter = base.aliases.get(name)
        if parameter is None:
            continue  # a buffer, which the base has too
        held = found.setdefault(parameter, place)
        if held != place and not torch.equal(shards.read(held), shards.read(place)):
            raise UserError(
                f"{shards.directory} has its own weights for {parameter} and {name}, which are one in the model"
            )
    lacking = sorted(set(base.shapes) - set(found))
    if lacking:
        raise UserError(f"{shards.directory} lacks {len(lacking)} tensors, the first: {lacking[0]}")
    return found


def _check_settings(directory: Path, base: BaseWeights) -> None:
    """Check that the configuration beside weights, or one directory up, computes as the base's, which is written.

    Raises:
        UserError: it does not, or is damaged.
    """
    from peft_arena.weights.tuned import check_settings

    for folder in (directory, directory.parent):
        if (folder / "config.json").is_file():
            check_settings(folder, base.architecture.config)
            return


def _own_tokenizer(directory: Path) -> Path | None:
    """Return where a trainer left the tokenizer: beside the weights, or above shards of accelerate; None: nowhere."""
    folders = [directory, *([directory.parent] if directory.name.startswith("pytorch_model_fsdp") else [])]
    return next((folder for folder in folders if (folder / "tokenizer_config.json").is_file()), None)
