"""Merging a tuned point, named on a command line, into a plain model directory."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_arena.commands.find_point import inside_run
from peft_arena.commands.geometry_command import point_named
from peft_arena.core.bounded import read_table
from peft_arena.core.errors import UserError
from peft_arena.core.foreign import reading
from peft_arena.core.ids import content_id, file_hash
from peft_arena.methods.files import SETTINGS, WEIGHTS
from peft_arena.weights.tuned import Tuned, restored

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

    from peft_arena.weights.files import TensorFiles
    from peft_arena.weights.merge import Merged, Progress

RUNS = Path("runs")
COMMIT = r"[0-9a-f]{40}"
FARTHEST = 1000.0
"""Largest factor either way; beyond, nothing is left of the pretrained model in float32 sums."""


def merge(
    subject: str,
    out: Path,
    *,
    base: str | None = None,
    runs: Path = RUNS,
    dtype: str | None = None,
    shard_size: str = "5GB",
    factor: float = 1.0,
    verify: bool = True,
    progress: Progress = lambda done, what: None,
) -> Merged:
    """Write a tuned point as a model directory that transformers, vLLM and others load without this package.

    Args:
        subject: ``RUN``, ``RUN@STEP``, a directory with an adapter or a model, or the directory of a run or of one of
            its checkpoints.
        out: the directory to make.
        base: the pretrained model; needed for directories.
        runs: the runs directory.
        dtype: ``float32``, ``bfloat16`` or ``float16``; None: a run's own, or that of the pretrained model's files.
        shard_size: most bytes in one file, such as ``5GB``.
        factor: how far along the method's path, 1 the trained weights, at most 1000 either way.
        verify: compare the logits of what was written with the tuned model's.
        progress: called with the fraction that is done and what is being done.

    Raises:
        UserError: no such point, another base model or revision, a method without weights, files that are missing or
            damaged, no room, or a result that is not the tuned model. Nothing is left then.
    """
    from peft_arena.weights.merge import merge_point
    from peft_arena.weights.writing import read_size, refuse_taken

    quiet()
    if not abs(factor) <= FARTHEST:
        raise UserError(f"--factor must be a finite number from -{FARTHEST:g} to {FARTHEST:g}, got {factor:g}")
    limit = read_size(shard_size)
    refuse_taken(out)
    point, source = subject_of(subject, base, runs)
    point = replace(point, factor=factor)
    weights = point.weights()
    return merge_point(
        weights,
        source,
        out,
        dtype=dtype or own_dtype(point, source),
        shard_size=limit,
        verify=verify,
        tuned=restored(point) if factor == 1.0 else None,
        restore=None if factor == 1.0 else restored_from(point),
        tokenizer=own_tokenizer(point),
        facts=facts_of(point),
        progress=progress,
    )


def quiet() -> None:
    """Keep transformers' own bars and notes off a terminal that shows ours."""
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)


def subject_of(subject: str, base: str | None, runs: Path) -> tuple[Tuned, Path]:
    """Return the point that a name stands for, and the directory of its pretrained model's files.

    A directory's pretrained model is held in bfloat16 if no tensor of it, nor of a tuned model or of whole modules an
    adapter brings, has another type; else in float32. Nothing is rounded before it is written.

    Raises:
        UserError: no such point, another base model, or one at another revision.
    """
    from peft_arena.models.load import weight_files
    from peft_arena.weights.files import TensorFiles, model_files
    from peft_arena.weights.tuned import check_settings

    name, home = inside_run(subject, runs)
    point = point_named(name, home, base, None)
    source = weight_files(point.base)
    if point.method is None and point.directory is not None:
        _refuse_other_revision(point.directory, point)
        types = stored_types(model_files(source))
        if _whole_modules(point.directory):
            types |= stored_types(TensorFiles((point.directory / WEIGHTS,)))
        if not (point.directory / SETTINGS).exists():
            types |= stored_types(model_files(point.directory))
            check_settings(point.directory, settings_at(source))
        dtype = "bfloat16" if types == {"bfloat16"} else "float32"
        point = replace(point, base=point.base.model_copy(update={"dtype": dtype}))
    return point, source


def settings_at(directory: Path) -> PreTrainedConfig:
    """Return the configuration of a model directory.

    Raises:
        UserError: it is damaged.
    """
    from transformers import AutoConfig

    with reading(f"{directory / 'config.json'} is damaged"):
        found: PreTrainedConfig = AutoConfig.from_pretrained(str(directory), local_files_only=True)
    return found


def _refuse_other_revision(directory: Path, point: Tuned) -> None:
    """Refuse an adapter that says it was trained on another commit of a hub model than it is put on."""
    try:
        named = read_table(directory / SETTINGS).get("revision")
    except UserError:
        return  # a model directory; or damaged settings, which reading the weights will name
    given = point.base.revision or ""
    if isinstance(named, str) and re.fullmatch(COMMIT, named) and re.fullmatch(COMMIT, given) and named != given:
        model = point.base.name
        raise UserError(f"{directory} was trained on revision {named} of its model, and {model} is at {given}")


def _whole_modules(directory: Path) -> bool:
    """Say whether an adapter's settings name modules that it brings as a whole."""
    try:
        return bool(read_table(directory / SETTINGS).get("modules_to_save"))
    except UserError:
        return False  # as above


def stored_types(files: TensorFiles) -> set[str]:
    """Return the types of the floating-point tensors in files, by their headers."""
    from peft_arena.weights.writing import CODES

    names = {code: str(kind).removeprefix("torch.") for kind, code in CODES.items()}
    found = {place.kind for place in files.places.values()}
    return {names.get(code, code) for code in found if code.startswith(("F", "BF"))}


def own_dtype(point: Tuned, source: Path) -> str:
    """Return the type a point is written in unless another is asked for: a run's own, or what its base's settings say.

    Raises:
        UserError: the settings are damaged.
    """
    from peft_arena.weights.model_directory import DTYPES

    if point.method is not None:
        return point.base.dtype
    table = read_table(source / "config.json")
    said = str(table.get("dtype") or table.get("torch_dtype") or "float32")
    return said if said in DTYPES else point.base.dtype


def own_tokenizer(point: Tuned) -> Path | None:
    """Return the directory of a point if it has a tokenizer, which then is the tuned model's."""
    found = point.directory is not None and (point.directory / "tokenizer_config.json").is_file()
    return point.directory if found else None


def restored_from(point: Tuned) -> Callable[[PreTrainedModel, Path], nn.Module] | None:
    """Return what puts adapter files of the same kind on the pretrained model; None: the point is not an adapter."""
    if point.directory is None or not (point.directory / SETTINGS).exists():
        return None

    def make(model: PreTrainedModel, directory: Path) -> nn.Module:
        return restored(replace(point, directory=directory, factor=1.0))(model)

    return make


def facts_of(point: Tuned) -> dict[str, Any]:
    """Return what identifies a point, as JSON values."""
    found: dict[str, Any] = {
        "subject": point.subject,
        "step": point.step,
        "base": point.base.model_dump(mode="json"),
        "method": None if point.method is None else point.method.model_dump(mode="json"),
    }
    if point.start is not None:
        found |= {"start": {"run": point.start.subject, "step": point.start.step, "sha256": point.start_sha256}}
    if point.directory is not None:
        kinds = {".safetensors", ".json"}
        files = sorted(file for file in point.directory.iterdir() if file.suffix in kinds and file.is_file())
        hashes = {file.name: file_hash(file) for file in files}
        found |= {"checkpoint": {"files": hashes, "id": content_id(hashes)}}
    return found
