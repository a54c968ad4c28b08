"""Cost records of a run: one for training, one for using the result."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from peft_arena.core.measure import Measure
from peft_arena.core.provenance import provenance
from peft_arena.cost.flops import REFERENCE_LENGTH, forward_measures, rollout_measure, training_measures
from peft_arena.cost.latency import NEW_TOKENS, PROMPT_TOKENS, latency_measures
from peft_arena.cost.parameters import checkpoint_measure, parameter_measures
from peft_arena.models.modes import context_length
from peft_arena.store.records import CostRecord, Rollouts

if TYPE_CHECKING:
    from torch import nn

    from peft_arena.methods.base import Attached


def training_cost(
    attached: Attached,
    *,
    run_id: str,
    tokens: int,
    mean_length: int,
    seconds: float | None = None,
    attach_seconds: float | None = None,
    real_tokens: int | None = None,
    memory: Iterable[Measure] = (),
    checkpoint: Path | None = None,
    rollouts: Rollouts | None = None,
) -> CostRecord:
    """Return what training a method has cost.

    Of reinforcement learning the training operations are those of the updates, and those of the rollouts stand beside
    them.

    Args:
        attached: the method in place, with ``requires_grad`` as in training; left as it was.
        run_id: the run.
        tokens: tokens the training processed, padding included.
        mean_length: their mean number per sequence, for counting operations.
        seconds: wall time of the training loop, if it was measured.
        attach_seconds: wall time of putting the method on the model, with calibration and decompositions.
        real_tokens: tokens without padding; with ``seconds`` they give the throughput.
        memory: what :class:`peft_arena.cost.memory.PeakMemory` measured around the training loop.
        checkpoint: directory of the saved state.
        rollouts: of reinforcement learning; None for supervised fine-tuning.
    """
    model = attached.model
    trained = attached.trained()
    found = list(parameter_measures(model, trained))
    limit = context_length(model)
    length = max(mean_length if limit is None else min(mean_length, limit), 2)
    if trained:
        found += training_measures(model, tokens, length=length)
    found += memory
    if attach_seconds is not None:
        how = "wall time of attaching the method, with what it calibrates or decomposes"
        found.append(Measure(metric="attach_time", value=attach_seconds, unit="seconds", better="lower", how=how, n=1))
    if seconds is not None:
        how = "wall time of the training loop"
        found.append(Measure(metric="training_time", value=seconds, unit="seconds", better="lower", how=how, n=1))
        if real_tokens is not None and seconds > 0:
            how = "real (not padded) tokens over the wall time of the training loop"
            speed = real_tokens / seconds
            found.append(
                Measure(metric="training_speed", value=speed, unit="tokens/second", better="higher", how=how, n=1)
            )
    if rollouts is not None:
        found += _rollout_measures(rollouts)
        generated = rollouts.prompt_tokens + rollouts.generated_tokens
        found.append(rollout_measure(model, rollouts.completions, generated, limit))
    if checkpoint is not None:
        found.append(checkpoint_measure(checkpoint))
    return CostRecord(run_id=run_id, stage="training", measures=tuple(found), provenance=provenance())


def _rollout_measures(rollouts: Rollouts) -> list[Measure]:
    """Return time and tokens of all rollouts of a training."""
    times = (
        ("rollout_time", rollouts.rollout_seconds, "wall time of the rollouts, scoring included"),
        ("scoring_time", rollouts.scoring_seconds, "wall time of scoring the completions"),
        ("update_time", rollouts.update_seconds, "wall time of the optimizer steps without their rollouts"),
    )
    found = [
        Measure(metric=metric, value=seconds, unit="seconds", better="lower", how=how, n=1)
        for metric, seconds, how in times
    ]
    tokens, generating = rollouts.generated_tokens, rollouts.rollout_seconds - rollouts.scoring_seconds
    how = "tokens of all completions, end tokens included"
    found.append(Measure(metric="generated_tokens", value=tokens, unit="tokens", better="neither", how=how, n=1))
    if generating > 0:
        how = "generated tokens over the wall time of the rollouts without scoring"
        speed = tokens / generating
        found.append(Measure(metric="rollout_speed", value=speed, unit="tokens/second", better="higher", how=how, n=1))
    return found


def inference_cost(
    attached: Attached,
    *,
    run_id: str,
    base: nn.Module | None = None,
    memory: Iterable[Measure] = (),
    repeats: int = 5,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
) -> CostRecord:
    """Return what using a tuned model costs, and how much of it is the method's.

    Args:
        attached: the method in place; left as it was.
        run_id: the run.
        base: the pretrained model, loaded on its own, to compare with; None leaves the comparison out.
        memory: what :class:`peft_arena.cost.memory.PeakMemory` measured around an evaluation.
        repeats: counted generations.
        prompt_tokens: tokens of the timed prompt.
        new_tokens: tokens generated after it.
    """
    model = attached.model
    limit = context_length(model)
    lengths = {str(REFERENCE_LENGTH): REFERENCE_LENGTH}
    room = None if limit is None else max(limit - new_tokens, 1)
    prompt = prompt_tokens if room is None else min(prompt_tokens, room)
    found = [
        *forward_measures(model, base, lengths),
        *latency_measures(model, base, repeats=repeats, prompt_tokens=prompt, new_tokens=new_tokens),
        *memory,
    ]
    return CostRecord(run_id=run_id, stage="inference", measures=tuple(found), provenance=provenance())
