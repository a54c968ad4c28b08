"""From checkpoints to what other programs read: plain adapters, full models, plain LoRA, and GGUF."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from peft_arena.commands.find_point import inside_run
from peft_arena.commands.merge_command import RUNS, quiet, subject_of
from peft_arena.core.bounded import user_path
from peft_arena.core.errors import UserError, unknown
from peft_arena.export.export_record import KINDS, Exported
from peft_arena.export.shards import Shards, refuse_binaries, shards_in
from peft_arena.methods.files import SETTINGS, WEIGHTS

if TYPE_CHECKING:
    from peft_arena.weights.merge import Progress


def export(
    checkpoint: str,
    out: Path,
    to: str,
    *,
    base: str | None = None,
    runs: Path = RUNS,
    rank: str | None = None,
    settings: Path | None = None,
    dtype: str | None = None,
    shard_size: str = "5GB",
    accept_error: bool = False,
    progress: Progress = lambda done, what: None,
) -> Exported:
    """Write a checkpoint in a form that other programs read.

    Args:
        checkpoint: ``RUN``, ``RUN@STEP``, or a directory: of an adapter or a model, of transformers' trainer, of
            sharded weights (FSDP, ZeRO); for ``gguf`` a model directory.
        out: the directory to make.
        to: ``adapter``, ``model``, ``lora`` or ``gguf``.
        base: the pretrained model; needed for directories.
        runs: the runs directory.
        rank: of the LoRA: a whole number, or the share of each layer's energy to keep, such as 0.95.
        settings: ``adapter_config.json``, or its directory, of shards that have none beside them.
        dtype: type of the weights of a model or a GGUF file; None: as they are.
        shard_size: most bytes in one file of a model.
        accept_error: write a LoRA whatever its error; else one above the limits is refused.
        progress: called with the fraction that is done and what is being done.

    Raises:
        UserError: no such checkpoint, tensors that are missing or have no place, a LoRA whose error is above the
            limits, a tool that is not installed, or a disk that refuses. Nothing is left then.
    """
    from peft_arena.weights.writing import read_size, refuse_taken

    _refuse_options(
        to,
        {
            "--rank": (rank is not None, ("lora",)),
            "--settings": (settings is not None, ("adapter",)),
            "--accept-error": (accept_error, ("lora",)),
            "--dtype": (dtype is not None, ("model", "gguf")),
        },
    )
    limit = read_size(shard_size)
    quiet()
    refuse_taken(out)
    if to == "gguf":
        from peft_arena.export.gguf import to_gguf

        return to_gguf(checkpoint, out, dtype)
    name, home = inside_run(checkpoint, runs)
    if to == "lora":
        from peft_arena.export.nearest_lora import read_rank, to_lora

        return to_lora(subject_of(name, base, home)[0], out, read_rank(rank), progress, accept_error=accept_error)
    directory = user_path(checkpoint)
    shards = _shards(directory) if directory.is_dir() else None
    if to == "adapter":
        from peft_arena.export.plain_adapter import copy_adapter, gathered_adapter, settings_of

        if shards is None:
            return copy_adapter(subject_of(name, base, home)[0], out)
        return gathered_adapter(shards, out, base, settings_of(shards.directory, settings))
    from peft_arena.export.full_model import gathered_model, whole_model

    if shards is None:
        _refuse_other_than_model(checkpoint, directory, name)
        shards = whole_model(directory)
    return gathered_model(shards, out, base, dtype, limit, progress)


def _refuse_other_than_model(checkpoint: str, directory: Path, name: str) -> None:
    """Refuse a directory that does not hold a whole model: that of a run under another name, or of an adapter."""
    if not (directory / "config.json").is_file() or (directory / SETTINGS).is_file() or name != checkpoint:
        raise UserError(f"{checkpoint} is a run or an adapter: its model is written by peft-arena merge {checkpoint}")


def _refuse_options(to: str, given: Mapping[str, tuple[bool, tuple[str, ...]]]) -> None:
    """Refuse an unknown form, and options that are for another one.

    Args:
        to: the form.
        given: by option, whether it was given and the forms it is for.
    """
    if to not in KINDS:
        raise unknown("form to export to", to, KINDS)
    for option, (present, kinds) in given.items():
        if present and to not in kinds:
            raise UserError(f"{option} is for --to {' and '.join(kinds)}, and this is --to {to}")


def _shards(directory: Path) -> Shards | None:
    """Return the shards of a checkpoint directory; None if it has whole files, which then go first."""
    if any((directory / name).is_file() for name in (WEIGHTS, "model.safetensors", "model.safetensors.index.json")):
        return None
    found = shards_in(directory)
    if found is None:
        refuse_binaries(directory)
    return found
