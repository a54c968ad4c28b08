"""A benchmark of text generation: time by length of the prompt, of a method as it runs, merged, and of its base model.

Every round generates once with each variant at each length, in an order that rotates, so that a drift of the machine
falls on all alike; the first rounds are not counted. Ratios to the base model are taken round by round. Prompts are
random tokens and every generation has the same length, whatever the model would like to say.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from peft_arena.core.errors import UserError
from peft_arena.core.measure import Measure
from peft_arena.core.specs import Spec
from peft_arena.cost.flops import sample_ids
from peft_arena.cost.latency import Timing, median_measure, said_slow, time_as_it_works
from peft_arena.cost.memory import PeakMemory
from peft_arena.models.modes import context_length, evaluation_mode
from peft_arena.models.ways import decoding_way

if TYPE_CHECKING:
    from torch import nn

OWN, MERGED, BASE = "", "merged", "base"
"""Variants: the method as it runs, its weights merged into the pretrained architecture, the pretrained model."""
WARM_UPS = 1
"""Rounds that are not counted."""
FIRST, NEXT = "time_to_first_token", "time_per_token"
COMMON = "tokens_in_common"
RATIO = "_ratio"
SPREAD = "_spread"
"""Ends the metric of the largest minus the smallest of the values whose median the metric before it is."""
_SAID = {OWN: "the method as it runs", MERGED: "the method merged", BASE: "the pretrained model"}


class GenerationSpec(Spec):
    """What is measured, and on what: the same settings are never measured twice."""

    prompt_lengths: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (16, 128, 512)
    """Tokens of the prompts."""
    new_tokens: int = Field(default=32, ge=2)
    repeats: int = Field(default=5, ge=2)
    """Counted rounds."""
    batch_size: int = Field(default=1, ge=1)
    device: str
    """Name of the accelerator or the processor."""
    threads: int | None = None
    """Of the processor; None on an accelerator."""

    @property
    def key(self) -> str:
        """File-name-safe key of the record."""
        return f"generation-{self.id}"


def metric_name(metric: str, length: int, variant: str = OWN, kind: str = "") -> str:
    """Return the name of a measure, for example ``time_per_token_p128_merged_ratio``."""
    return f"{metric}_p{length}{'_' if variant else ''}{variant}{kind}"


def lengths_that_fit(models: Sequence[nn.Module], spec: GenerationSpec) -> tuple[list[int], int | None]:
    """Return the prompt lengths that leave room for the new tokens in every model, and the shortest context.

    Raises:
        UserError: none does.
    """
    limits = [limit for model in models if (limit := context_length(model)) is not None]
    limit = min(limits, default=None)
    lengths = list(dict.fromkeys(spec.prompt_lengths))
    found = [length for length in lengths if limit is None or length + spec.new_tokens <= limit]
    if not found:
        raise UserError(
            f"no prompt length of {', '.join(map(str, lengths))} leaves room for {spec.new_tokens} new tokens: the "
            f"model takes {limit} tokens (--prompt-lengths, --new-tokens)"
        )
    return found, limit


def memory_measures(model: nn.Module, spec: GenerationSpec) -> tuple[Measure, ...]:
    """Return the peak memory of one generation at the longest prompt that fits; also warms the model up.

    Args:
        model: the only model that is loaded, since on CUDA all that is allocated counts.
        spec: settings.
    """
    length = max(lengths_that_fit([model], spec)[0])
    with evaluation_mode(model):
        slow = decoding_way(model, own=True).notice  # tried before, so that its memory is not in the peak
    with PeakMemory("generation") as memory:
        _generate(model, length, spec, time.perf_counter)
    told = f"one generation of {spec.batch_size} x {length} + {spec.new_tokens} tokens{f'; {slow}' if slow else ''}"
    return tuple(found.model_copy(update={"how": f"{found.how}; {told}"}) for found in memory.measures)


def generation_measures(
    variants: Mapping[str, nn.Module],
    spec: GenerationSpec,
    *,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[float, str], None] = lambda done, what: None,
) -> tuple[Measure, ...]:
    """Return time to the first token and time per further token of every variant at every prompt length.

    Medians over the counted rounds, each with its spread; ratios to the base model where it is among the variants; and
    how many tokens the merged model has in common with the method as it runs before the first that differs.

    Args:
        variants: :data:`OWN`, and :data:`MERGED` and :data:`BASE` where there are such; left as they were.
        spec: settings.
        clock: seconds.
        progress: called with the fraction that is done and what is being done.

    Raises:
        UserError: no prompt length fits.
    """
    lengths, limit = lengths_that_fit(list(variants.values()), spec)
    names = list(variants)
    found: dict[tuple[int, str], list[Timing]] = {(length, name): [] for length in lengths for name in names}
    rounds = WARM_UPS + spec.repeats
    for number in range(rounds):
        turn = number % len(names)
        for length in lengths:
            for name in (*names[turn:], *names[:turn]):
                timing = _generate(variants[name], length, spec, clock)
                if number >= WARM_UPS:
                    found[length, name].append(timing)
        progress((number + 1) / rounds, f"round {number + 1} of {rounds}")
    made = [
        measure for length in lengths for name in names for measure in _timed(found[length, name], length, name, spec)
    ]
    for length in lengths:
        for name in names:
            if BASE in variants and name != BASE:
                made += _ratios(found[length, name], found[length, BASE], length, name, spec)
        if MERGED in variants:
            made.append(_in_common(found[length, OWN], found[length, MERGED], length))
    for length in dict.fromkeys(spec.prompt_lengths):
        if length not in lengths:
            how = f"not measured: {length} + {spec.new_tokens} tokens are more than the context of {limit}"
            made += [
                Measure(metric=metric_name(metric, length), value=None, unit=unit, better="lower", how=how, n=0)
                for metric, unit in ((FIRST, "seconds"), (NEXT, "seconds/token"))
            ]
    return tuple(made)


def _generate(model: nn.Module, length: int, spec: GenerationSpec, clock: Callable[[], float]) -> Timing:
    ids = sample_ids(model, spec.batch_size, length)
    with evaluation_mode(model):
        return time_as_it_works(model, ids, spec.new_tokens, clock)


def _timed(timings: Sequence[Timing], length: int, name: str, spec: GenerationSpec) -> list[Measure]:
    how = (
        f"model.generate, greedy, batch {spec.batch_size}, prompt of {length} random tokens, {spec.new_tokens} new, "
        f"{_SAID[name]}; median of {len(timings)} rounds in turn with the other variants after {WARM_UPS} warm-up"
        f"{said_slow(timings)}"
    )
    return [
        *_with_spread(metric_name(FIRST, length, name), [one.first_s for one in timings], "seconds", how),
        *_with_spread(metric_name(NEXT, length, name), [one.token_s for one in timings], "seconds/token", how),
    ]


def _ratios(
    timings: Sequence[Timing], base: Sequence[Timing], length: int, name: str, spec: GenerationSpec
) -> list[Measure]:
    how = (
        f"{_SAID[name]} over {_SAID[BASE]}, round by round, batch {spec.batch_size}, prompt of {length} tokens; "
        f"median of {len(timings)} rounds{said_slow([*timings, *base])}"
    )
    made: list[Measure] = []
    for metric, values in (
        (FIRST, [(one.first_s, other.first_s) for one, other in zip(timings, base, strict=True)]),
        (NEXT, [(one.token_s, other.token_s) for one, other in zip(timings, base, strict=True)]),
    ):
        ratios = [mine / other for mine, other in values if other > 0]
        if ratios:
            made += _with_spread(metric_name(metric, length, name, RATIO), ratios, "ratio", how)
    return made


def _with_spread(metric: str, values: Sequence[float], unit: str, how: str) -> list[Measure]:
    width = max(values) - min(values)
    told = f"largest minus smallest of what {metric} is the median of"
    spread = Measure(metric=f"{metric}{SPREAD}", value=width, unit=unit, better="lower", how=told, n=len(values))
    return [median_measure(metric, values, unit, how), spread]


def _in_common(own: Sequence[Timing], merged: Sequence[Timing], length: int) -> Measure:
    """Return the tokens in common; greedy decoding gives the same ones in every round, so the first is enough."""
    counts = [
        next((place for place, (mine, other) in enumerate(zip(one, two, strict=True)) if mine != other), len(one))
        for one, two in zip(own[0].tokens, merged[0].tokens, strict=True)
    ]
    how = (
        f"greedy tokens, of {len(own[0].tokens[0])}, before the first that differs from the unmerged method's, mean "
        "over rows; in bfloat16 merging rounds"
    )
    metric = metric_name(COMMON, length, MERGED)
    value = statistics.fmean(counts)
    return Measure(metric=metric, value=value, unit="tokens", better="higher", how=how, n=len(counts))
