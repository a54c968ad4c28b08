"""An adapter as a plain LoRA adapter, by peft's own conversion, and how far that is from it."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from peft_arena.core.errors import UserError, first_line
from peft_arena.execute.export_adapter import copy_adapter, refuse_start
from peft_arena.execute.export_record import SETTINGS, WEIGHTS, Exported, write_record

if TYPE_CHECKING:
    from peft_arena.weights.effective import EffectiveWeights
    from peft_arena.weights.merge import Progress
    from peft_arena.weights.probe import Distance, Probe
    from peft_arena.weights.tuned import Tuned


@dataclass(frozen=True)
class Approximation:
    """How far a LoRA is from the adapter it stands for, by its changes D_lora and D of each parameter."""

    errors: Mapping[str, float]
    """||D_lora - D||_F / ||D||_F of each parameter that the adapter changes."""
    mean: float | None
    """Mean of the errors over the parameters."""
    worst: float | None
    worst_at: str | None
    """Parameter with the largest error."""
    ranks: tuple[int, int]
    """Smallest and largest rank."""
    logits: Distance
    """Of the fixed batch: how far the LoRA's are from the adapter's."""


class Before(NamedTuple):
    """What a LoRA is held against."""

    probe: Probe
    base: Tensor
    """Logits of the pretrained model, shape (tokens, vocabulary)."""
    tuned: Tensor
    """Logits of the adapter."""


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


def to_lora(point: Tuned, out: Path, rank: int | float, progress: Progress) -> Exported:
    """Write an adapter as a plain LoRA adapter; one that is a plain LoRA of that rank is copied as it is.

    Raises:
        UserError: it is a plain LoRA of another rank, it is no adapter of peft's, peft cannot convert its layers, it
            changes what a LoRA cannot, or the disk refuses.
    """
    from peft_arena.weights.change import LowRank
    from peft_arena.weights.forms import open_adapter
    from peft_arena.weights.writing import new_directory

    refuse_start(point)
    directory = point.directory
    if directory is None or not (directory / SETTINGS).is_file() or not (directory / WEIGHTS).is_file():
        raise UserError(f"{point.subject} is no adapter of peft's ({SETTINGS}, {WEIGHTS}): only those become LoRA")
    progress(0.0, "reading the adapter")
    weights = point.weights()
    made = [maker() for maker in weights.changes.makers.values()]
    if open_adapter(weights.base_weights, directory).kind == "LORA" and all(isinstance(c, LowRank) for c in made):
        ranks = sorted({change.a.shape[0] for change in made if isinstance(change, LowRank)})
        if ranks != [rank]:
            said = f"rank {ranks[0]}" if len(ranks) == 1 else "ranks " + ", ".join(map(str, ranks))
            raise UserError(
                f"{point.subject} cannot be given --rank {rank}: it is a LoRA of {said} already; export --to adapter "
                "copies it"
            )
        return copy_adapter(point, out, to="lora")
    del made
    with new_directory(out, 10 * (directory / WEIGHTS).stat().st_size) as part:
        progress(0.1, "converting")
        held = _converted(point, weights, part, rank)
        progress(0.7, "measuring the difference")
        found = _approximation(weights, part, held)
        table = _table(found)
        files = tuple(sorted(file.name for file in part.iterdir()))
        done = Exported(str(out), "lora", "peft", files, 2 * len(found.errors), None, table)
        write_record(part, done, point=point, rank=rank, errors=dict(found.errors))
    return done


def _converted(point: Tuned, weights: EffectiveWeights, part: Path, rank: int | float) -> Before:
    """Let peft write the LoRA, and return the logits of the pretrained and of the tuned model.

    Raises:
        UserError: peft cannot convert it.
    """
    import peft

    from peft_arena.execute.merge_command import restored
    from peft_arena.weights.merging import FOREIGN, in_float32
    from peft_arena.weights.model_directory import vocabulary_of
    from peft_arena.weights.probe import probe_batch, probe_logits

    base = weights.base_weights
    model = base.load()
    in_float32(model)
    probe = probe_batch(_tokenizer(point), vocabulary_of(base.architecture))
    before = probe_logits(model, probe)
    wrapped: Any = restored(point)(model)
    in_float32(wrapped)
    tuned = probe_logits(wrapped, probe)
    if not isinstance(wrapped, peft.PeftModel):
        raise UserError(f"{point.subject} is no adapter of peft's in memory: only those become LoRA")
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft.save_as_lora(str(part), wrapped, rank)
    except FOREIGN as error:
        raise UserError(f"peft cannot convert {point.subject} to LoRA: {first_line(error)}") from error
    del wrapped, model
    gc.collect()
    return Before(probe, before, tuned)


def _tokenizer(point: Tuned) -> Any:
    from peft_arena.models.load import weight_files
    from peft_arena.weights.model_directory import tokenizer_in

    return tokenizer_in(weight_files(point.base))


def _approximation(weights: EffectiveWeights, part: Path, held: Before) -> Approximation:
    """Read what was written and hold it against the adapter.

    Raises:
        UserError: it does not load, or changes other parameters.
    """
    from peft_arena.weights.change import LowRank
    from peft_arena.weights.effective import effective_weights
    from peft_arena.weights.merging import foreign_adapter
    from peft_arena.weights.probe import distance, probe_logits

    pretrained = weights.base_weights
    lora = effective_weights(pretrained, part)
    names = set(weights.changes.makers) | set(lora.changes.makers)
    every = {name: _error(weights, lora, name) for name in sorted(names)}
    errors = {name: error for name, error in every.items() if error is not None}
    lost = sorted(set(errors) - set(lora.changes.makers))
    if lost:
        raise UserError(f"the adapter changes {lost[0]}, and {len(lost)} such parameters, which the LoRA does not")
    changes = (maker() for maker in lora.changes.makers.values())
    ranks = [change.a.shape[0] for change in changes if isinstance(change, LowRank)]
    model = pretrained.load()
    after = probe_logits(foreign_adapter(pretrained, model, part), held.probe)
    worst = max(errors, key=lambda name: errors[name]) if errors else None
    mean = sum(errors.values()) / len(errors) if errors else None
    reach = (min(ranks, default=0), max(ranks, default=0))
    logits = distance(held.base, held.tuned, after)
    return Approximation(errors, mean, errors[worst] if worst else None, worst, reach, logits)


def _error(weights: EffectiveWeights, lora: EffectiveWeights, name: str) -> float | None:
    """Return ||D_lora - D||_F / ||D||_F of one parameter; None where neither changes it."""
    from peft_arena.weights.change import entry_norms

    base, change = weights.parameter(name)
    other = lora.parameter(name).change if name in lora.parameters() else None
    wanted = torch.zeros_like(base) if change is None else change.dense(base)
    given = torch.zeros_like(base) if other is None else other.dense(base)
    size, gap = entry_norms(wanted).l2, entry_norms(given - wanted).l2
    if size == 0 and gap > 0:
        raise UserError(f"the LoRA changes {name}, which the adapter does not")
    return gap / size if size else None


def _table(found: Approximation) -> dict[str, Any]:
    table = {key: value for key, value in asdict(found).items() if key != "errors"}
    return table | {"ranks": list(found.ranks), "logits": {**found.logits._asdict(), "ratio": found.logits.ratio}}
