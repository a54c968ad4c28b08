"""What using a point costs: operations, parameters, bytes, and a benchmark of generation, kept as a record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_arena.commands.find_point import find_point
from peft_arena.core.build import build
from peft_arena.core.errors import UserError
from peft_arena.core.measure import Measure
from peft_arena.core.provenance import provenance
from peft_arena.cost.flops import REFERENCE_LENGTH, forward_measures
from peft_arena.cost.generation import (
    BASE,
    FIRST,
    MERGED,
    NEXT,
    OWN,
    RATIO,
    SPREAD,
    GenerationSpec,
    generation_measures,
    memory_measures,
    metric_name,
)
from peft_arena.cost.parameters import checkpoint_measure, parameter_measures
from peft_arena.methods.base import Capability
from peft_arena.methods.registry import method_of
from peft_arena.models.load import load, weight_files
from peft_arena.store.records import CostRecord
from peft_arena.store.store import RunDirectory
from peft_arena.work.order import hush, weights_at

if TYPE_CHECKING:
    from torch import nn

FLOPS = f"forward_flops_{REFERENCE_LENGTH}"


def measure_cost(
    point: str,
    runs: Path,
    settings: Mapping[str, Any],
    *,
    dtype: str = "float32",
    progress: Callable[[float, str], None] = lambda done, what: None,
) -> CostRecord:
    """Return what using a point costs; what is on disk with the same settings is read, not measured again.

    Args:
        point: ``RUN``, ``RUN@STEP`` or the name of a model.
        runs: the runs directory.
        settings: ``prompt_lengths``, ``new_tokens``, ``repeats`` and ``batch_size`` of a GenerationSpec.
        dtype: type of a base model's weights.
        progress: called with the fraction that is done and what is being done.

    Raises:
        UserError: no such run, step or model; a setting that is out of range; or another process holds the run.
    """
    spec = build(GenerationSpec, {**settings, **_machine()}, where="cost")
    run, step = find_point(point, runs, dtype)
    hush()
    with run.waited_for():
        run.create()
        at = run.point(step)
        known = run.generation_cost(at, spec.key)
        if known is not None:
            return known
        record = CostRecord(
            run_id=run.run_id,
            stage="generation",
            step=step,
            settings=spec.model_dump(mode="json"),
            measures=tuple(_measures(run, step, spec, progress)),
            provenance=provenance(),
        )
        run.write_generation_cost(at, spec.key, record)
        return record


def _machine() -> dict[str, Any]:
    """Return on what the benchmark runs; models are loaded on the first CUDA device if there is one."""
    import torch

    if torch.cuda.is_available():
        return {"device": torch.cuda.get_device_name(0), "threads": None}
    seen = provenance()
    return {"device": str(seen["processor"] or "cpu"), "threads": int(seen["threads"])}


def _measures(
    run: RunDirectory, step: int, spec: GenerationSpec, progress: Callable[[float, str], None]
) -> list[Measure]:
    progress(0.0, "loading")
    _, attached = weights_at(run, step)
    found = [*_parameters(run, attached.model), _stored(run, step)]
    found += memory_measures(attached.model, spec)  # before anything else is loaded
    variants: dict[str, nn.Module] = {OWN: attached.model}
    if run.spec.is_base:
        found += forward_measures(attached.model, attached.model, {str(REFERENCE_LENGTH): REFERENCE_LENGTH})
        return [*found, *generation_measures(variants, spec, progress=progress)]
    base = load(run.spec.model).model
    found += forward_measures(attached.model, base, {str(REFERENCE_LENGTH): REFERENCE_LENGTH})
    merged = _merged(run, step)
    if isinstance(merged, Measure):
        found.append(merged)
    else:
        variants[MERGED] = merged
        flops = forward_measures(merged, base, {str(REFERENCE_LENGTH): REFERENCE_LENGTH})
        found += [one.model_copy(update={"metric": f"{one.metric}_{MERGED}"}) for one in flops]
    variants[BASE] = base
    return [*found, *generation_measures(variants, spec, progress=progress)]


def _parameters(run: RunDirectory, model: nn.Module) -> list[Measure]:
    """Return trained and total parameters; what was trained is in the training's record, no longer in the model."""
    counted = {one.metric: one for one in parameter_measures(model, {} if run.spec.is_base else None)}
    if run.spec.is_base:
        return list(counted.values())
    training = run.cost("training")
    known = {} if training is None else {one.metric: one for one in training.measures}
    how = "not known: the run has no cost record of its training"
    none = {"value": None, "n": 0, "how": how}
    return [known.get(name) or one.model_copy(update=none) for name, one in counted.items()]


def _stored(run: RunDirectory, step: int) -> Measure:
    """Return the bytes of the point's weight files; for a base model those of the pretrained model."""
    if not run.spec.is_base:
        return checkpoint_measure(run.checkpoint(step))
    found = checkpoint_measure(weight_files(run.spec.model))
    return found.model_copy(update={"how": found.how.replace("the checkpoint", "the pretrained model")})


def _merged(run: RunDirectory, step: int) -> nn.Module | Measure:
    """Return the merged model, loaded on its own, or a measure without value that says why there is none."""
    card = method_of(run.spec.method).card
    why = f"{card.name} does not merge: its card does not declare it"
    if Capability.MERGEABLE in card.capabilities:
        try:
            return weights_at(run, step)[1].merged().eval()
        except UserError as error:
            why = str(error)
    how = f"not measured: {why}"
    return Measure(metric=f"{FLOPS}_{MERGED}", value=None, unit="FLOPs", better="lower", how=how, n=0)


def cost_summary(record: CostRecord) -> dict[str, Any]:
    """Return a record as JSON values."""
    return {
        "run": record.run_id,
        "step": record.step,
        "settings": record.settings,
        "measures": [measure.model_dump(mode="json") for measure in record.measures],
    }


def size_rows(record: CostRecord) -> list[dict[str, Any]]:
    """Return a row for each measure that is no time, for people: quantity, value, how."""
    timed = (FIRST, NEXT)
    return [
        {"quantity": one.metric.replace("_", " "), "value": _amount(one), "how": one.how}
        for one in record.measures
        if not one.metric.startswith(timed)
    ]


def time_rows(record: CostRecord) -> list[dict[str, Any]]:
    """Return a row for each prompt length and variant, for people: medians with smallest and largest, and ratios."""
    found = {one.metric: one for one in record.measures}
    said = {OWN: "as it runs", MERGED: "merged", BASE: "base"}
    batch = int(record.settings["batch_size"])
    rows: list[dict[str, Any]] = []
    for length in dict.fromkeys(record.settings["prompt_lengths"]):
        for name in said:
            step = found.get(metric_name(NEXT, length, name))
            if step is None:
                continue
            each = partial(_time, found, length=length, variant=name)
            rows.append(
                {
                    "prompt": f"{length} tokens",
                    "model": said[name],
                    "first token": each(metric=FIRST),
                    "first ÷ base": each(metric=FIRST, kind=RATIO),
                    "per token": each(metric=NEXT),
                    "token ÷ base": each(metric=NEXT, kind=RATIO),
                    "tokens/s": None if not step.value else f"{batch / step.value:.1f}",
                    "note": step.how if step.value is None else "",
                }
            )
    if not any(row["note"] for row in rows):
        rows = [{key: row[key] for key in row if key != "note"} for row in rows]
    return rows


def _time(found: Mapping[str, Measure], metric: str, length: int, variant: str, kind: str = "") -> str | None:
    """Render a median and its spread."""
    name = metric_name(metric, length, variant, kind)
    one, spread = found.get(name), found.get(f"{name}{SPREAD}")
    if one is None or one.value is None:
        return None
    factor, unit = (1.0, "") if kind else (1000.0, " ms")
    wide = f" (spread {factor * spread.value:.2g})" if spread is not None and spread.value is not None else ""
    return f"{factor * one.value:.3g}{unit}{wide}"


def _amount(one: Measure) -> str | None:
    from peft_arena.report.numbers import quantity

    return None if one.value is None else quantity(one.value, one.unit)


def lengths_of(text: str) -> Sequence[int]:
    """Read prompt lengths such as ``16,128,512``.

    Raises:
        UserError: anything else.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(
            f"--prompt-lengths takes numbers of tokens separated by commas, such as 16,128,512; got '{text}'"
        )
    return [int(part) for part in parts]
