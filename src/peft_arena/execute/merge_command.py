"""Merging a tuned point, named on a command line, into a plain model directory."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_arena.core.errors import UserError
from peft_arena.core.ids import content_id, file_hash
from peft_arena.execute.geometry_command import point_named

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from peft_arena.weights.merge import Merged, Progress
    from peft_arena.weights.tuned import Tuned

RUNS = Path("runs")
COMMIT = r"[0-9a-f]{40}"


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
        subject: ``RUN``, ``RUN@STEP``, or a directory with an adapter or a model.
        out: the directory to make.
        base: the pretrained model; needed for directories.
        runs: the runs directory.
        dtype: ``float32``, ``bfloat16`` or ``float16``; None: a run's own, or that of the pretrained model's files.
        shard_size: most bytes in one file, such as ``5GB``.
        factor: how far along the method's path, 1 the trained weights.
        verify: compare the logits of what was written with the tuned model's.
        progress: called with the fraction that is done and what is being done.

    Raises:
        UserError: no such point, another base model or revision, a method without weights, files that are missing or
            damaged, no room, or a result that is not the tuned model. Nothing is left then.
    """
    from peft_arena.weights.merge import merge_point
    from peft_arena.weights.writing import read_size, refuse_taken

    quiet()
    if not math.isfinite(factor):
        raise UserError(f"--factor must be a finite number, got {factor}")
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

    A directory's pretrained model is held in the type of its own files if none of the two is wider.

    Raises:
        UserError: no such point, another base model, or one at another revision.
    """
    from peft_arena.models.load import weight_files

    point = point_named(subject, runs, base, None)
    source = weight_files(point.base)
    if point.method is None and point.directory is not None:
        _refuse_other_revision(point.directory, point)
        types = {stored_dtype(source)}
        if not (point.directory / "adapter_config.json").exists():
            types.add(stored_dtype(point.directory))
        dtype = "bfloat16" if types == {"bfloat16"} else "float32"
        point = replace(point, base=point.base.model_copy(update={"dtype": dtype}))
    return point, source


def _refuse_other_revision(directory: Path, point: Tuned) -> None:
    """Refuse an adapter that says it was trained on another commit of a hub model than it is put on."""
    try:
        named = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8")).get("revision")
    except (OSError, ValueError, AttributeError):
        return  # a model directory; or damaged settings, which reading the weights will name
    given = point.base.revision or ""
    if isinstance(named, str) and re.fullmatch(COMMIT, named) and re.fullmatch(COMMIT, given) and named != given:
        model = point.base.name
        raise UserError(f"{directory} was trained on revision {named} of its model, and {model} is at {given}")


def stored_dtype(directory: Path) -> str:
    """Return the type of the weights in a model directory by its configuration; float32 if it does not say."""
    try:
        table: Any = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        return str(table.get("dtype") or table.get("torch_dtype") or "float32")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{directory / 'config.json'} is damaged: {error}") from error


def own_dtype(point: Tuned, source: Path) -> str:
    """Return the type a point is written in unless another is asked for: a run's own, or that of the base's files."""
    from peft_arena.weights.model_directory import DTYPES

    stored = stored_dtype(source)
    return point.base.dtype if point.method is not None or stored not in DTYPES else stored


def own_tokenizer(point: Tuned) -> Path | None:
    """Return the directory of a point if it has a tokenizer, which then is the tuned model's."""
    found = point.directory is not None and (point.directory / "tokenizer_config.json").is_file()
    return point.directory if found else None


def restored(point: Tuned) -> Callable[[PreTrainedModel], nn.Module]:
    """Return what makes the tuned model, as the method itself restores it, from the pretrained one."""

    def make(model: PreTrainedModel) -> nn.Module:
        from peft_arena.models.load import Loaded

        return point.model(Loaded(point.base, model, None, "path"))  # type: ignore[arg-type]

    return make


def facts_of(point: Tuned) -> dict[str, Any]:
    """Return what identifies a point, as JSON values."""
    found: dict[str, Any] = {
        "subject": point.subject,
        "step": point.step,
        "base": point.base.model_dump(mode="json"),
        "method": None if point.method is None else point.method.model_dump(mode="json"),
    }
    if point.directory is not None:
        kinds = {".safetensors", ".json"}
        files = sorted(file for file in point.directory.iterdir() if file.suffix in kinds)
        hashes = {file.name: file_hash(file) for file in files}
        found |= {"checkpoint": {"files": hashes, "id": content_id(hashes)}}
    return found
