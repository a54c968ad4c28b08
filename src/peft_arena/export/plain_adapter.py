"""From training checkpoints to plain PEFT adapter directories."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_arena.core.errors import UserError, first_line
from peft_arena.core.ids import file_hash
from peft_arena.export.export_record import Exported, To, finite, on_base, same_shape, same_values, write_record
from peft_arena.export.shards import Shards, places, refuse_binaries
from peft_arena.methods.files import SETTINGS, WEIGHTS

if TYPE_CHECKING:
    from peft_arena.weights.base import BaseWeights
    from peft_arena.weights.tuned import Tuned


def copy_adapter(point: Tuned, out: Path, to: To = "adapter") -> Exported:
    """Copy the files of an adapter without anything of a training, and show that it loads.

    Raises:
        UserError: the checkpoint is not an adapter of peft, is damaged, or does not fit its base.
    """
    from peft_arena.weights.model_directory import TOKENIZER
    from peft_arena.weights.writing import new_directory

    directory = point.directory
    assert directory is not None
    refuse_start(point)
    refuse_binaries(directory)
    lacking = [name for name in (SETTINGS, WEIGHTS) if not (directory / name).is_file()]
    if lacking:
        kind = "is a model" if (directory / "config.json").exists() else "is not an adapter of peft's"
        raise UserError(f"{directory} has no {lacking[0]}: it {kind}; peft-arena merge writes models")
    needed = sum((directory / name).stat().st_size for name in (SETTINGS, WEIGHTS))
    with new_directory(out, needed, directory) as part:
        for name in (SETTINGS, WEIGHTS, *sorted(TOKENIZER)):
            if (directory / name).is_file():
                shutil.copyfile(directory / name, part / name)
                if file_hash(directory / name) != file_hash(part / name):
                    raise UserError(f"{name} changed while it was copied; nothing was written")
        tensors = prove_adapter(point, part)
        files = tuple(sorted(file.name for file in part.iterdir()))
        done = Exported(str(out), to, "peft", files, tensors)
        write_record(part, done, point=point)
    return done


def refuse_start(point: Tuned) -> None:
    """Refuse the adapter of a run that began at another one or has new tokens: on the pretrained model it is another.

    Raises:
        UserError: it is one.
    """
    if point.base.new_tokens:
        raise UserError(
            f"{point.subject} was trained with {len(point.base.new_tokens)} new tokens, for which {point.base.name} "
            f"has no embeddings: peft-arena merge {point.subject} writes the whole, with its tokenizer"
        )
    if point.start is not None:
        raise UserError(
            f"run {point.subject} began at {point.start.subject}@{point.start.step}, and its adapter belongs to that "
            f"model, not to {point.base.name}: peft-arena merge {point.subject} writes the whole"
        )


def prove_adapter(point: Tuned, directory: Path) -> int:
    """Load an adapter with peft and return the number of its tensors.

    Raises:
        UserError: it does not load, a tensor is missing or has no place, or an entry is no finite number.
    """
    from peft_arena.weights.adapter_directory import open_adapter
    from peft_arena.weights.base import base_weights
    from peft_arena.weights.merging import foreign_adapter

    base = base_weights(point.base)
    files = open_adapter(base, directory).files
    foreign_adapter(base, base.load(), directory, by_peft_alone=True)
    return len(files.places)


def settings_of(directory: Path, given: Path | None) -> Path:
    """Return the adapter's settings: those named, or those beside the shards or one directory up."""
    if given is not None:
        found = given / SETTINGS if given.is_dir() else given
        if not found.is_file() or found.name != SETTINGS:
            raise UserError(f"--settings {given}: it must be an {SETTINGS} or a directory with one")
        return found
    for folder in (directory, directory.parent):
        if (folder / SETTINGS).is_file():
            return folder / SETTINGS
    raise UserError(
        f"neither {directory} nor the directory above it has an {SETTINGS}: --settings must name the adapter's own"
    )


def gathered_adapter(shards: Shards, out: Path, base: str | None, settings: Path) -> Exported:
    """Write the adapter that shards hold as a plain adapter directory, and show that it loads.

    Weights of the pretrained model that are in the shards too are left out, if they are what the base has.

    Raises:
        UserError: a tensor is missing, has no place or another shape, or the shards' pretrained weights are not the
            base's.
    """
    from peft_arena.weights.adapter_directory import PREFIX
    from peft_arena.weights.base import base_weights
    from peft_arena.weights.files import TensorFiles
    from peft_arena.weights.writing import Entry, new_directory, write_tensors

    point = on_base(settings.parent, base)
    pretrained = base_weights(point.base)
    wanted = _adapter_tensors(pretrained, settings)
    frozen: dict[str, str] = {}
    for name in pretrained.aliases:
        module, _, leaf = name.rpartition(".")
        inner = (f"{module}.base_layer.{leaf}", f"{module}.original_module.{leaf}")
        frozen |= {f"{PREFIX}{place}": name for place in (name, *inner)}
    found, others = places(shards, wanted, frozen, adapter=True)
    for name, shape in wanted.items():
        same_shape(shards, found[name], shape, name)
    for place, name in others.items():
        _same_as_base(shards, name, pretrained, frozen[place])
    entries = [Entry(name, shards.stored[found[name]].dtype, wanted[name]) for name in found]
    with new_directory(out, sum(entry.size for entry in entries)) as part:
        write_tensors(part / WEIGHTS, entries, lambda entry: [finite(shards, found[entry.name])])
        shutil.copyfile(settings, part / SETTINGS)
        same_values(TensorFiles((part / WEIGHTS,)), {name: partial(shards.read, found[name]) for name in wanted})
        tensors = prove_adapter(point, part)
        done = Exported(str(out), "adapter", shards.layout, (SETTINGS, WEIGHTS), tensors)
        write_record(part, done, point=point, source=shards.directory)
    return done


def _adapter_tensors(base: BaseWeights, settings: Path) -> dict[str, tuple[int, ...]]:
    """Return the tensors that peft writes for an adapter of these settings, by name with their shapes.

    Raises:
        UserError: peft cannot put such an adapter on the model.
    """
    import warnings

    import peft
    from peft.utils.save_and_load import get_peft_model_state_dict

    from peft_arena.methods.files import read_settings, refuse_unknown_fields
    from peft_arena.weights.merging import FOREIGN

    refuse_unknown_fields(read_settings(settings.parent, "peft"), str(settings))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = peft.PeftConfig.from_pretrained(str(settings.parent))
            wrapped: Any = peft.get_peft_model(base.load(), config)
            state = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    except FOREIGN as error:
        raise UserError(f"peft cannot make an adapter of {settings}: {first_line(error)}") from error
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _same_as_base(shards: Shards, name: str, base: BaseWeights, parameter: str) -> None:
    """Check that a pretrained weight in the shards is the base's, but for rounding to the type of the shards."""
    import torch

    held = shards.read(name)
    wanted = base.tensor(parameter)
    if tuple(held.shape) != tuple(wanted.shape) or not torch.equal(held, wanted.to(held.dtype)):
        raise UserError(
            f"{shards.directory} holds {name} with other values than {parameter} of the base: it was trained from "
            "another model, or trains this weight too, which the adapter's settings do not say"
        )
