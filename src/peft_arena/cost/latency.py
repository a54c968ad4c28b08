"""How long generating takes, with the method and without it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from peft_arena.core.measure import Measure
from peft_arena.cost.flops import sample_ids
from peft_arena.models.modes import evaluation_mode
from peft_arena.models.ways import Way, decoding_way

if TYPE_CHECKING:
    from torch import Tensor, nn

PROMPT_TOKENS = 64
NEW_TOKENS = 8
MEDIAN_ERROR = 1.2533
"""Standard error of a median over that of a mean, for normal errors: sqrt(pi / 2)."""


class Timing(NamedTuple):
    """Two durations of one generation, and what was generated."""

    first_s: float
    """From the prompt to the first token."""
    token_s: float
    """From one token to the next, averaged over the generation."""
    tokens: tuple[tuple[int, ...], ...] = ()
    """New tokens of each row."""
    slow: str = ""
    """How it was generated where not with a cache; see :attr:`peft_arena.models.ways.Way.notice`."""


def latency_measures(
    model: nn.Module,
    base: nn.Module | None = None,
    *,
    repeats: int = 5,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
) -> tuple[Measure, ...]:
    """Return time to the first token and time per further token at batch size 1, as medians over the repeats.

    The attached model and the base are measured in turn, after one generation of each that is not counted, so that a
    change of the machine's load falls on both.

    Args:
        model: the attached model; left as it was.
        base: the pretrained model, loaded on its own; None: only the attached model is timed. A method that is
            switched off would not do: some still compute their adapter then.
        repeats: counted generations of each, at least 1.
        prompt_tokens: random tokens of the prompt.
        new_tokens: tokens generated, at least 2.

    Raises:
        UserError: the model's ``generate`` does not give what full forward passes give, with and without a cache.
    """
    ids = sample_ids(model, 1, prompt_tokens)
    variants = {"": model} if base is None else {"": model, "_base": base}
    found: dict[str, list[Timing]] = {name: [] for name in variants}
    ways: dict[str, Way] = {}
    for repeat in range(repeats + 1):
        for name, chosen in variants.items():
            with evaluation_mode(chosen):
                if name not in ways:  # once: nothing of the model changes here
                    ways[name] = decoding_way(chosen, own=True)
                timing = time_as_it_works(chosen, ids, new_tokens, way=ways[name])
            if repeat > 0:
                found[name].append(timing)
    return _measures(found, prompt_tokens, new_tokens)


def time_as_it_works(
    model: nn.Module,
    ids: Tensor,
    new_tokens: int,
    clock: Callable[[], float] = time.perf_counter,
    *,
    way: Way | None = None,
) -> Timing:
    """Time one generation as :func:`time_generation` does, without a cache where the model's would be wrong.

    Args:
        model: in evaluation mode.
        ids: prompts, shape (rows, tokens).
        new_tokens: at least 2.
        clock: seconds.
        way: how the model can be decoded by its own ``generate``; None: it is found now.

    Raises:
        UserError: the model's ``generate`` does not give what full forward passes give, with and without a cache.
    """
    way = decoding_way(model, own=True) if way is None else way
    return time_generation(model, ids, new_tokens, clock, use_cache=way.cached)._replace(slow=way.notice)


def time_generation(
    model: nn.Module,
    ids: Tensor,
    new_tokens: int,
    clock: Callable[[], float] = time.perf_counter,
    *,
    use_cache: bool = True,
) -> Timing:
    """Time one greedy generation of exactly ``new_tokens`` tokens by the model's own ``generate``.

    The clock is read whenever a token reaches the stopping criteria, CUDA's queue emptied before.

    Args:
        model: in evaluation mode.
        ids: prompts, shape (rows, tokens); all rows get their next token at the same time.
        new_tokens: at least 2.
        clock: seconds.
        use_cache: False: every token is a full forward pass.
    """
    import torch
    from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

    times: list[float] = []

    class Clock(StoppingCriteria):
        """Notes when each token is there and never stops."""

        def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
            times.append(_now(ids, clock))
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    config = GenerationConfig(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, num_beams=1, pad_token_id=0
    )
    start = _now(ids, clock)
    generate: Any = model.generate
    output = generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=config,
        stopping_criteria=StoppingCriteriaList([Clock()]),
        **({} if use_cache else {"use_cache": False}),
    )
    tokens = tuple(tuple(row) for row in output[:, -new_tokens:].tolist())
    return Timing(times[0] - start, (times[-1] - times[0]) / (len(times) - 1), tokens)


def _now(ids: Tensor, clock: Callable[[], float]) -> float:
    if ids.is_cuda:
        import torch

        torch.cuda.synchronize()
    return clock()


def _measures(found: Mapping[str, Sequence[Timing]], prompt_tokens: int, new_tokens: int) -> tuple[Measure, ...]:
    made: list[Measure] = []
    for name, timings in found.items():
        which = "pretrained model without the method" if name else "with the method attached"
        how = (
            f"model.generate, batch 1, prompt of {prompt_tokens} tokens, {new_tokens} new, {which}; "
            f"inference mode, median after one warm-up{said_slow(timings)}"
        )
        made.append(median_measure(f"time_to_first_token{name}", [t.first_s for t in timings], "seconds", how))
        made.append(median_measure(f"time_per_token{name}", [t.token_s for t in timings], "seconds/token", how))
    return tuple(made)


def said_slow(timings: Sequence[Timing]) -> str:
    """Return the end of a sentence that says how some texts were generated where not with a cache; else nothing."""
    return next((f"; {timing.slow}" for timing in timings if timing.slow), "")


def median_measure(metric: str, values: Sequence[float], unit: str, how: str) -> Measure:
    """Return the median of some timings; its standard error is that of the mean times 1.2533 (normal errors)."""
    error = MEDIAN_ERROR * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return Measure(
        metric=metric, value=statistics.median(values), unit=unit, better="lower", how=how, n=len(values), stderr=error
    )
