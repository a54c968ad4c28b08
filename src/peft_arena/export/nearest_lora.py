"""A tuned model as a plain LoRA adapter: exact where its change has the rank, else the nearest, within a limit."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from peft_arena.core.errors import UserError
from peft_arena.export.export_record import Exported, write_record
from peft_arena.export.plain_adapter import copy_adapter, refuse_start
from peft_arena.methods.files import SETTINGS, WEIGHTS

if TYPE_CHECKING:
    from peft_arena.export.lora_files import Written
    from peft_arena.weights.effective import EffectiveWeights
    from peft_arena.weights.merge import Progress
    from peft_arena.weights.probe import Distance, Probe
    from peft_arena.weights.tuned import Tuned

LIMIT = 0.1
"""Largest error of the weights, relative to their change, that is written without being asked for: by the squares,
99 % of the change are there."""
LOGITS = 0.25
"""The same of the logits: what rounding to 16 bits may make of a change in a merge."""


@dataclass(frozen=True)
class Approximation:
    """How far a LoRA is from the tuned model it stands for, by its changes D_lora and D of each parameter."""

    error: float | None
    """sqrt(sum ||D_lora - D||_F^2 / sum ||D||_F^2) over all parameters that are changed; None if none is."""
    errors: Mapping[str, float]
    """||D_lora - D||_F / ||D||_F of each parameter that is changed."""
    mean: float | None
    """Mean of the errors over the parameters."""
    worst: float | None
    worst_at: str | None
    """Parameter with the largest error."""
    ranks: tuple[int, int]
    """Smallest and largest rank."""
    whole: tuple[str, ...]
    """Modules that are there as a whole (``modules_to_save``), because no LoRA is there for them."""
    limit: float
    """Of ``error``."""
    limit_logits: float
    """Of the RMS difference of logits over the RMS change."""
    accepted: bool
    """Whether a limit is passed, which was asked for."""
    logits: Distance
    """Of the fixed batch: how far the LoRA's are from the tuned model's."""


class Before(NamedTuple):
    """What a LoRA is held against."""

    probe: Probe
    base: Tensor
    """Logits of the pretrained model, shape (tokens, vocabulary)."""
    tuned: Tensor
    """Logits of the tuned model."""


class Gap(NamedTuple):
    """Of one parameter, in Frobenius norms."""

    wanted: float
    """||D||."""
    left: float
    """||D_lora - D||."""


def read_rank(text: str | None) -> int | float:
    """Return a rank: a whole number, or the share of each layer's squared singular values that is to be kept.

    Raises:
        UserError: it is none, or out of range.
    """
    wanted = "a whole number such as 16, or a share of each layer's energy between 0 and 1 such as 0.95"
    if text is None:
        raise UserError(f"--to lora needs --rank: {wanted}")
    if text.isdigit() and int(text) > 0:
        return int(text)
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise UserError(f"--rank must be {wanted}, got '{text}'")
    return share


def to_lora(point: Tuned, out: Path, rank: int | float, progress: Progress, *, accept_error: bool = False) -> Exported:
    """Write a tuned point as a plain LoRA adapter; one that is a plain LoRA of that rank is copied as it is.

    Args:
        point: anything whose change is one of weights: an adapter of any kind, or a whole model.
        out: the directory to make.
        rank: of every layer, or the share of each layer's squared singular values that is to be kept.
        progress: called with the fraction that is done and what is being done.
        accept_error: write it whatever its error.

    Raises:
        UserError: it has no weights or no change, it changes what a LoRA cannot, no layer can have the rank, the error
            is above a limit, or the disk refuses. Nothing is left then.
    """
    from peft_arena.export.lora_files import write_lora
    from peft_arena.weights.writing import new_directory

    refuse_start(point)
    progress(0.0, "reading the weights")
    weights = point.weights()
    if _is_lora(point, weights, rank):
        return copy_adapter(point, out, to="lora")
    with new_directory(out, 0) as part:
        progress(0.1, "converting")
        written = write_lora(point, weights, part, rank)
        progress(0.6, "measuring the difference")
        found = _approximation(weights, part, _before(point, weights), written)
        beyond = _beyond(found, rank, written.enough(LIMIT))
        if beyond and not accept_error:
            raise UserError(f"{point.subject} as a LoRA of {_said(rank)} is another model: {beyond}")
        found = Approximation(**{**vars(found), "accepted": bool(beyond)})
        files = tuple(sorted(file.name for file in part.iterdir()))
        done = Exported(str(out), "lora", "peft", files, written.tensors, None, _table(found))
        write_record(part, done, point=point, rank=rank, errors=dict(found.errors))
    return done


def _is_lora(point: Tuned, weights: EffectiveWeights, rank: int | float) -> bool:
    """Say whether a point is an adapter directory that is a plain LoRA of a rank in every layer."""
    from peft_arena.weights.adapter_directory import open_adapter
    from peft_arena.weights.change import LowRank

    directory = point.directory
    if directory is None or not (directory / SETTINGS).is_file() or not (directory / WEIGHTS).is_file():
        return False
    if open_adapter(weights.base_weights, directory).kind != "LORA":
        return False
    made = [maker() for maker in weights.changes.makers.values()]
    return all(isinstance(change, LowRank) and change.a.shape[0] == rank for change in made)


def _said(rank: int | float) -> str:
    return f"rank {rank}" if isinstance(rank, int) else f"the ranks that keep {rank:g} of each layer's energy"


def _beyond(found: Approximation, rank: int | float, enough: int) -> str:
    """Return which limits an approximation passes, in words; empty if none."""
    said = []
    if found.error is not None and found.error > found.limit:
        said.append(
            f"{found.error:.3g} of the change of its weights is missing (||D_lora - D|| / ||D||, limit "
            f"{found.limit:g}; worst {found.worst:.3g} at {found.worst_at})"
        )
    if not found.logits.within(found.limit_logits):
        said.append(
            f"its logits are off by {found.logits.rms_difference:.3g}, where tuning changed them by "
            f"{found.logits.rms_change:.3g} (RMS, limit {found.limit_logits:g} of that)"
        )
    if not said:
        return ""
    cure = f"--rank {enough} brings the weights within the limit"
    if isinstance(rank, int) and rank >= enough:
        cure = "a larger --rank comes nearer"
    return f"{' and '.join(said)}; {cure}, --accept-error writes it as it is"


def _before(point: Tuned, weights: EffectiveWeights) -> Before:
    """Return the logits of the pretrained model and of the tuned one as its method restores it, in float32.

    Raises:
        UserError: the method cannot restore it.
    """
    from peft_arena.weights.merging import in_float32
    from peft_arena.weights.model_directory import vocabulary_of
    from peft_arena.weights.probe import probe_batch, probe_logits
    from peft_arena.weights.tuned import restored

    base = weights.base_weights
    model = base.load()
    in_float32(model)
    probe = probe_batch(_tokenizer(point), vocabulary_of(base.architecture))
    before = probe_logits(model, probe)
    tuned: Any = restored(point)(model)
    in_float32(tuned)
    after = probe_logits(tuned, probe)
    del tuned, model
    gc.collect()
    return Before(probe, before, after)


def _tokenizer(point: Tuned) -> Any:
    from peft_arena.models.load import weight_files
    from peft_arena.weights.model_directory import tokenizer_in

    return tokenizer_in(weight_files(point.base))


def _approximation(weights: EffectiveWeights, part: Path, held: Before, written: Written) -> Approximation:
    """Read what was written, as peft does, and hold it against the tuned model.

    Raises:
        UserError: it does not load, or changes other parameters.
    """
    from peft_arena.weights.effective import effective_weights
    from peft_arena.weights.merging import foreign_adapter, in_float32
    from peft_arena.weights.probe import distance, probe_logits

    pretrained = weights.base_weights
    lora = effective_weights(pretrained, part)
    names = sorted(set(weights.changes.makers) | set(lora.changes.makers))
    gaps = {name: _gap(weights, lora, name) for name in names}
    errors = {name: gap.left / gap.wanted for name, gap in gaps.items() if gap.wanted}
    total = sum(gap.wanted**2 for gap in gaps.values()) ** 0.5
    error = sum(gap.left**2 for gap in gaps.values()) ** 0.5 / total if total else None
    model = pretrained.load()
    in_float32(model)
    after = probe_logits(foreign_adapter(pretrained, model, part, by_peft_alone=True), held.probe)
    logits = distance(held.base, held.tuned, after)
    worst = max(errors, key=lambda name: errors[name]) if errors else None
    return Approximation(
        error=error,
        errors=errors,
        mean=sum(errors.values()) / len(errors) if errors else None,
        worst=errors[worst] if worst else None,
        worst_at=worst,
        ranks=written.ranks,
        whole=written.whole,
        limit=LIMIT,
        limit_logits=LOGITS,
        accepted=False,
        logits=logits,
    )


def _gap(weights: EffectiveWeights, lora: EffectiveWeights, name: str) -> Gap:
    """Return ||D|| and ||D_lora - D|| of one parameter.

    Raises:
        UserError: the LoRA changes it and the tuned model does not.
    """
    from peft_arena.weights.change import entry_norms

    base, change = weights.parameter(name)
    other = lora.parameter(name).change if name in lora.parameters() else None
    wanted = torch.zeros_like(base) if change is None else change.dense(base)
    given = torch.zeros_like(base) if other is None else other.dense(base)
    found = Gap(entry_norms(wanted).l2, entry_norms(given - wanted).l2)
    if found.wanted == 0 and found.left > 0:
        raise UserError(f"the LoRA changes {name}, which the tuned model does not")
    return found


def _table(found: Approximation) -> dict[str, Any]:
    table = {key: value for key, value in asdict(found).items() if key != "errors"}
    lists = {"ranks": list(found.ranks), "whole": list(found.whole)}
    return table | lists | {"logits": {**found.logits._asdict(), "ratio": found.logits.ratio}}
