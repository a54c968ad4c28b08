"""Greedy or sampled decoding in batches that shrink as rows finish.

The model's own ``generate`` keeps every row until the last one ends, and applies whatever the model's generation
settings say (repetition penalties, for example). Here a row leaves its batch when it ends, and each token is the
argmax of the logits, or is drawn from them with the row's own random numbers, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from peft_arena.evaluate.draw import Sampler, draw, streams
from peft_arena.evaluate.thoughts import DECODE, Thoughts
from peft_arena.models.chat import turn_end
from peft_arena.models.modes import base_of, device_of
from peft_arena.models.rope import forget_lengths, hangs_on_length
from peft_arena.models.steps import CachedRows, FullRows, Rows
from peft_arena.models.ways import Way, alone, decoding_way, seen_wrong, without_cache

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

COMPACT_BELOW = 0.75
"""A batch with a cache is shrunk when at most this share of its rows still runs; shrinking copies the cache."""


class Job(NamedTuple):
    """One prompt to continue."""

    ids: list[int]
    """The prompt's tokens; at least one."""
    max_new_tokens: int
    stop: tuple[str, ...]
    seed: int | None = None
    """Of the row's own random numbers, not negative; only needed to sample."""


class Continuation(NamedTuple):
    """What the model wrote."""

    text: str
    """Up to, and without, the first stop string or end token; without a thought before it."""
    ids: list[int]
    """The new tokens, up to and with the one that ended the row."""
    ended: bool
    """Whether an end token or a stop string ended it; False: it met the limit, or its logits were not finite."""
    finite: bool = True
    """False if the logits of a step were not finite, where the row then stops: what it says means nothing."""


class Stopper:
    """Says when a row has ended, and what of it is the answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], end_ids: frozenset[int]) -> None:
        """Prepare for some stop strings; those that are special tokens end a row by their id."""
        self.tokenizer = tokenizer
        known: Any = tokenizer.get_vocab()
        special = {text: int(known[text]) for text in stop if text in tokenizer.all_special_tokens}
        self.end_ids = end_ids | frozenset(special.values())
        self.stop = tuple(text for text in stop if text and text not in special)
        self.window = max((len(text.encode()) for text in self.stop), default=0) + 4
        # each token adds at least one byte, so a stop string that has just been completed lies within the window
        self.thoughts = Thoughts.of(tokenizer)

    def opened(self, prompt: Sequence[int]) -> bool:
        """Say whether a prompt ends within a thought, so that the model goes on thinking."""
        return self.thoughts is not None and self.thoughts.opened(prompt)

    def ended(self, rows: Sequence[list[int]], opened: Sequence[bool] | None = None) -> list[bool]:
        """Say of each row of new tokens, unfinished one token ago, whether it has ended; no stop string ends a thought.

        Args:
            rows: the new tokens.
            opened: whether each row's prompt ends within a thought; None: none does.
        """
        by_token = [row[-1] in self.end_ids for row in rows]
        if not self.stop or not rows:
            return by_token
        if self.thoughts is None:
            tails = self.tokenizer.batch_decode([row[-self.window :] for row in rows], **DECODE)
        else:
            places = opened or [False] * len(rows)
            tails = [self.thoughts.tail(row, within, self.window) for row, within in zip(rows, places, strict=True)]
        return [ended or any(text in tail for text in self.stop) for ended, tail in zip(by_token, tails, strict=True)]

    def text(self, row: Sequence[int], opened: bool = False) -> str:
        """Return what a row of new tokens says, up to its end; a thought is no part of it."""
        end = next((place for place, token in enumerate(row) if token in self.end_ids), len(row))
        said = list(row[:end])
        if self.thoughts is not None:
            return cut(self.thoughts.answer(said, opened), self.stop)
        return cut(str(self.tokenizer.decode(said, **DECODE)), self.stop)


def cut(text: str, stop: Sequence[str]) -> str:
    """Return the text up to the first of the stop strings."""
    ends = [place for place in (text.find(mark) for mark in stop if mark) if place >= 0]
    return text[: min(ends)] if ends else text


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return every token that ends an answer.

    They are the tokenizer's, those of the model's generation settings, and the one that ends a turn in the chat
    template: some pretrained models state another end token than their template has, and would go on to write the
    next turns themselves.
    """
    given: Any = getattr(getattr(base_of(model), "generation_config", None), "eos_token_id", None)
    found = [tokenizer.eos_token_id, turn_end(tokenizer), *(given if isinstance(given, (list, tuple)) else [given])]
    return frozenset(int(token) for token in found if token is not None)


def decode(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    jobs: Sequence[Job],
    *,
    batch_size: int,
    done: Callable[[int], object],
    sampler: Sampler | None = None,
    settings: Mapping[str, Any] | None = None,
    used: Callable[[Way], object] = lambda way: None,
) -> list[Continuation]:
    """Continue each prompt, in the order of the jobs.

    Prompts are padded on the left with attention masks and explicit positions, so that a row's result does not depend
    on its batch, up to the rounding of the logits; a model that takes no positions, or has virtual tokens before its
    input, gets only batches of prompts of the same length. A prompt that several rows of a batch share is read once.
    All this is used where it is proved that the logits are those of full forward passes
    (:mod:`peft_arena.models.ways`); else every step is a full forward pass. So it is, one row at a time, for rows
    that may become so long that their length changes what they say (:mod:`peft_arena.models.rope`).

    Args:
        model: a causal language model, in evaluation mode.
        tokenizer: of the model.
        jobs: what to continue.
        batch_size: most prompts in a batch.
        done: called with the number of prompts finished since the last call.
        sampler: how to draw tokens, with the stream of each job's seed; None decodes greedily.
        settings: for the model's own ``generate``, where a task asks for what a sampler has not; instead of a sampler.
        used: called with each way in which prompts were continued.

    Raises:
        UserError: the model cannot be decoded; see :func:`peft_arena.models.ways.decoding_way`.
        ValueError: a sampler and settings are both given, or a job to sample has no seed.
    """
    if sampler is not None and (settings is not None or any(job.seed is None for job in jobs)):
        raise ValueError("sampling takes a seed for each job, and no settings of the model's own generate")
    if not jobs:
        return []
    way = decoding_way(model, own=settings is not None)
    order = sorted(range(len(jobs)), key=lambda place: (-len(jobs[place].ids), jobs[place].ids))
    far = {place for place in order if hangs_on_length(model, len(jobs[place].ids) + jobs[place].max_new_tokens - 1)}
    near = [place for place in order if place not in far]
    found: dict[int, Continuation] = {}
    maker = _Maker(model, tokenizer, jobs, batch_size, sampler, settings)
    if near:
        used(maker.make(near, way, found, done))
    if far:
        slow = alone(model, replace(way, own=settings is not None))
        used(maker.make([place for place in order if place in far], slow, found, done))
        forget_lengths(model)
    return [found[place] for place in range(len(jobs))]


class _Maker:
    """Continues some of the jobs in one way."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        jobs: Sequence[Job],
        batch_size: int,
        sampler: Sampler | None,
        settings: Mapping[str, Any] | None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.jobs = jobs
        self.batch_size = batch_size
        self.sampler = sampler
        self.settings = settings or {}
        self.end_ids = end_tokens(model, tokenizer)

    def make(
        self, order: Sequence[int], way: Way, found: dict[int, Continuation], done: Callable[[int], object]
    ) -> Way:
        """Continue the jobs at some places, put what is written into ``found``, and return the way used at last."""
        for places in _batches(self.jobs, order, self.batch_size, way.together):
            batch = [self.jobs[place] for place in places]
            stopper = Stopper(self.tokenizer, batch[0].stop, self.end_ids)
            choose = _Choice(self.model, batch, self.sampler)
            if way.own:
                given = dict(self.settings) if way.cached else {**self.settings, "use_cache": False}
                results = _own_generate(self.model, stopper, batch, choose, given)
            else:
                results, way = _continue(self.model, stopper, batch, choose, way)
            found.update(zip(places, results, strict=True))
            done(len(places))
        return way


def _batches(jobs: Sequence[Job], order: Sequence[int], batch_size: int, padded: bool) -> Iterator[list[int]]:
    """Yield batches of jobs with the same stop strings and token limit and, without padding, the same length."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for place in order:
        job = jobs[place]
        groups.setdefault((job.stop, job.max_new_tokens, 0 if padded else len(job.ids)), []).append(place)
    for places in groups.values():
        for begin in range(0, len(places), batch_size):
            yield places[begin : begin + batch_size]


class _Choice:
    """Chooses the next token of each row: the most likely one, or one drawn with the row's own numbers."""

    def __init__(self, model: nn.Module, batch: Sequence[Job], sampler: Sampler | None) -> None:
        self.sampler = sampler
        if sampler is not None:
            seeds = [job.seed for job in batch if job.seed is not None]
            self.uniforms = streams(seeds, batch[0].max_new_tokens).to(device_of(model))

    def __call__(self, logits: Tensor, rows: Sequence[int], step: int) -> tuple[Tensor, Tensor]:
        """Return whether the logits are finite, and the tokens; each of shape (rows,).

        Args:
            logits: shape (rows, vocabulary).
            rows: the place in the batch of each row.
            step: how many tokens the rows have so far.
        """
        best = logits.max(-1)
        finite = torch.isfinite(best.values)
        if self.sampler is None:
            return finite, best.indices
        uniforms = self.uniforms[:, step]
        if len(rows) < len(uniforms):
            uniforms = uniforms[torch.tensor(rows, device=uniforms.device)]
        return finite, draw(logits, self.sampler, uniforms)


class _Row:
    """What a row has written so far."""

    def __init__(self, opened: bool) -> None:
        self.opened = opened
        self.ids: list[int] = []
        self.ended = False
        self.finite = True

    @property
    def running(self) -> bool:
        """Whether it goes on."""
        return self.finite and not self.ended


def _append(rows: Sequence[_Row], stopper: Stopper, finite: Sequence[bool], tokens: Sequence[int]) -> None:
    """Append a token to each row that still runs, and see which of them have ended."""
    for row, fine, token in zip(rows, finite, tokens, strict=True):
        if row.running:
            row.finite = fine
            if fine:
                row.ids.append(token)
    live = [row for row in rows if row.running]
    for row, stop in zip(live, stopper.ended([row.ids for row in live], [row.opened for row in live]), strict=True):
        row.ended = stop


def _results(rows: Sequence[_Row], stopper: Stopper) -> list[Continuation]:
    return [Continuation(stopper.text(row.ids, row.opened), row.ids, row.ended, row.finite) for row in rows]


def _continue(
    model: nn.Module, stopper: Stopper, batch: Sequence[Job], choose: _Choice, way: Way
) -> tuple[list[Continuation], Way]:
    """Continue a batch token by token; return also the way in which it was done at last."""
    prompts = [job.ids for job in batch]
    state: Rows = CachedRows(model, prompts) if way.cached else FullRows(model, prompts, together=way.together)
    written = [_Row(stopper.opened(job.ids)) for job in batch]
    running = list(range(len(batch)))  # row of the state → row of the batch
    limit = batch[0].max_new_tokens
    logits = state.read()
    step, live = 0, running
    for step in range(limit):
        live = [place for place, row in enumerate(running) if written[row].running]
        finite, tokens = choose(logits, running, step)
        _append([written[row] for row in running], stopper, finite.tolist(), tokens.tolist())
        left = [place for place, row in enumerate(running) if written[row].running]
        if not left or step == limit - 1:
            break
        compact = not way.cached or len(left) <= COMPACT_BELOW * len(running)
        state.extend(tokens, left if compact else None)
        running = [running[place] for place in left] if compact else running
        logits = state.step()
    if way.cached and step > 0:
        read = [[*prompts[row], *written[row].ids[:step]] for row in (running[place] for place in live)]
        if why := seen_wrong(model, read, logits[torch.tensor(live, device=logits.device)]):
            return _continue(model, stopper, batch, choose, without_cache(model, why))
    return _results(written, stopper), way


def _own_generate(
    model: nn.Module, stopper: Stopper, batch: Sequence[Job], choose: _Choice, settings: Mapping[str, Any]
) -> list[Continuation]:
    """Use the model's own ``generate``, on prompts of one length."""
    from transformers import (
        GenerationConfig,
        LogitsProcessor,
        LogitsProcessorList,
        StoppingCriteria,
        StoppingCriteriaList,
    )

    length = len(batch[0].ids)
    written = [_Row(stopper.opened(job.ids)) for job in batch]
    latest: list[Tensor] = []

    class Chosen(LogitsProcessor):
        """Leaves only the chosen token of each row, where this module chooses."""

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            finite, tokens = choose(scores, range(len(batch)), input_ids.shape[1] - length)
            latest[:] = [finite]
            if choose.sampler is None:
                return scores
            return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)

    class Ended(StoppingCriteria):
        """Ends each row on its own."""

        def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
            _append(written, stopper, latest[0].tolist(), input_ids[:, -1].tolist())
            return torch.tensor([not row.running for row in written], device=input_ids.device)

    given: dict[str, Any] = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, **settings}
    config = GenerationConfig(
        max_new_tokens=batch[0].max_new_tokens,
        eos_token_id=sorted(stopper.end_ids),
        pad_token_id=min(stopper.end_ids, default=0),
        **given,
    )
    ids = torch.tensor([job.ids for job in batch], device=device_of(model))
    forget_lengths(model)
    generate: Any = model.generate
    generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=config,
        logits_processor=LogitsProcessorList([Chosen()]),
        stopping_criteria=StoppingCriteriaList([Ended()]),
    )
    return _results(written, stopper)
