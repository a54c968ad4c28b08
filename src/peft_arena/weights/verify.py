"""Whether a written model directory is the point it was made from: by every number, and by logits.

Three steps. The point W0 + D, in float32 and before anything is rounded, gives the logits of the tuned model as its
method restores it. Every tensor in the files is the point rounded once. The directory, loaded by transformers, gives
the tuned logits but for that rounding. At most one model is in memory at a time, in its own type unless that rounds
what an adapter holds.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_arena.core.errors import UserError
from peft_arena.models.folder import count_tokens, refuse_lost_tokens
from peft_arena.weights.effective import EffectiveWeights
from peft_arena.weights.files import model_files
from peft_arena.weights.merging import in_float32
from peft_arena.weights.model_directory import load_back, tokenizer_in, vocabulary_of
from peft_arena.weights.probe import EXACT, NEGLIGIBLE, Distance, distance, limit_of, probe_batch, probe_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[float, str], None]
Make = Callable[["PreTrainedModel"], nn.Module]
"""Makes the tuned model from the pretrained one, freshly loaded."""
SAME = "the written weights themselves: that they are the tuned model's is not shown"
ROUNDED = 1.0
"""Limit where the rounded point itself is asked for: rounding may not move logits further than tuning did."""


@dataclass(frozen=True)
class Tuner:
    """What a point is held against."""

    make: Make
    how: str
    """What the model is, in a few words."""


@dataclass(frozen=True)
class Verified:
    """How far a point and what was written of it are from the tuned model, in logits."""

    point: Distance | None
    """Of W0 + D in float32; None where there is no other way to the tuned model."""
    written: Distance
    """Of the directory as transformers loads it, in the type of its weights."""
    tensors: int
    """Tensors that were read back and are the point, rounded once, in every entry."""
    against: str
    """What they were held against."""
    limit: float
    """Largest RMS difference of ``written`` relative to the RMS change that was let pass."""

    def summary(self) -> dict[str, Any]:
        """Return the numbers as JSON values, with what they were held against."""
        point = None if self.point is None else {**self.point._asdict(), "ratio": self.point.ratio, "limit": EXACT}
        written = {**self.written._asdict(), "ratio": self.written.ratio, "limit": self.limit}
        how = (
            "logits of a fixed batch, float32 arithmetic: RMS difference at most limit times the RMS change, or no "
            f"logit off by more than {NEGLIGIBLE:g}; tensors: read back, every entry the same"
        )
        return {"point": point, "written": written, "tensors": self.tensors, "against": self.against, "how": how}


class _ReadBack:
    """The tensors of a written directory, held against the point one at a time."""

    def __init__(
        self, weights: EffectiveWeights, directory: Path, dtype: torch.dtype, others: Mapping[str, Tensor]
    ) -> None:
        self.weights = weights
        self.files = model_files(directory)
        self.dtype = dtype
        self.others = others
        self.seen: set[str] = set()

    def values(self, name: str) -> Tensor | None:
        """Return the tuned values of a parameter, float32, after comparing; None where it is the pretrained one.

        Raises:
            UserError: the file has other values.
        """
        before, change = self.weights.parameter(name)
        tuned = before if change is None else before + change.dense(before)
        if name not in self.seen:
            self._compare(name, tuned.to(self.dtype))
        return None if change is None else tuned

    def rest(self) -> int:
        """Compare what has not been asked for, and return the number of all tensors.

        Raises:
            UserError: the files have other values.
        """
        for name in sorted(set(self.files.places) - self.seen):
            if name in self.others:
                self._compare(name, self.others[name])
            elif name in self.weights.parameters():
                self.values(name)
            else:
                self._compare(name, torch.zeros(self.files.shapes[name], dtype=self.dtype))
        return len(self.seen)

    def _compare(self, name: str, wanted: Tensor) -> None:
        self.seen.add(name)
        if name not in self.files:
            raise UserError(f"what was written lacks {name}; nothing was kept")
        found = self.files.read(name)
        if found.dtype != wanted.dtype or not torch.equal(found, wanted):
            raise UserError(f"what was written is not what was to be: {name} read back is another; nothing was kept")


def verify(
    weights: EffectiveWeights,
    directory: Path,
    dtype: torch.dtype,
    others: Mapping[str, Tensor],
    tuner: Tuner | None,
    rounded: bool,
    progress: Progress,
) -> Verified:
    """Hold what was written, and the point it was written from, against the tuned model.

    Args:
        weights: the point.
        directory: what was written.
        dtype: the type of its weights.
        others: buffers that were written, by name.
        tuner: makes the tuned model at this point; None if nothing but the point says what it is.
        rounded: whether what rounding makes of the point is what is asked for, however far it is from the point.
        progress: called with the fraction that is done, from 0.5, and what is being done.

    Raises:
        UserError: they are not the same but for rounding.
    """
    base = weights.base_weights
    progress(0.5, "verifying: the weights, before rounding")
    tokenizer, rows = tokenizer_in(directory), vocabulary_of(base.architecture)
    if tokenizer is not None:
        refuse_lost_tokens(count_tokens(tokenizer), rows, "what was written", "it")
    probe = probe_batch(tokenizer, rows)
    model = base.load()
    before = probe_logits(model, probe)
    back = _ReadBack(weights, directory, dtype, others)
    biased: list[Any] = [model.get_submodule(name.removesuffix(".bias")) for name in weights.changes.added]
    for layer, shape in zip(biased, weights.changes.added.values(), strict=True):
        zeros = torch.zeros(shape, dtype=base.dtype, device=model.device)
        layer.bias = nn.Parameter(zeros, requires_grad=False)
    wanted = reached = probe_logits(model, probe, back.values)
    for layer in biased:
        layer.bias = None
    tensors = back.rest()
    point = None
    if tuner is not None:
        progress(0.7, "verifying: the tuned model")
        wanted = probe_logits(tuner.make(model), probe)
        point = distance(before, wanted, reached)
        if not point.within(EXACT) and base.dtype != torch.float32:
            del model
            model = base.load()  # what an adapter holds in float32 was rounded as it was put on
            in_float32(model)
            wanted = probe_logits(tuner.make(model), probe)
            point = distance(before, wanted, reached)
        if not point.within(EXACT):
            raise UserError(f"the weights are not those of the tuned model: before rounding, {_said(point)}")
    del model, reached
    gc.collect()
    progress(0.85, "verifying: the merged model")
    written = distance(before, wanted, probe_logits(load_back(directory, base, dtype), probe))
    limit = ROUNDED if rounded else limit_of(dtype)
    if not written.within(limit):
        name = str(dtype).removeprefix("torch.")
        cure = "" if dtype == torch.float32 else "; rounding can be the reason: try --dtype float32"
        raise UserError(f"the merged model in {name} is not the tuned one: {_said(written)}{cure}")
    return Verified(point, written, tensors, SAME if tuner is None else tuner.how, limit)


def _said(found: Distance) -> str:
    return (
        f"its logits differ by {found.rms_difference:.3g} (RMS), at most {found.max_difference:.3g}, where tuning "
        f"changed them by {found.rms_change:.3g}; nothing was written"
    )
