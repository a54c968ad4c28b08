"""Greedy decoding in batches that shrink as rows finish.

The model's own ``generate`` keeps every row until the last one ends, and applies whatever the model's generation
settings say (repetition penalties, for example). Here a row leaves its batch when it ends, and each token is the
argmax of the logits and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from peft_arena.models.modes import accepts, base_of, device_of, virtual_tokens

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

COMPACT_BELOW = 0.75
"""A batch is shrunk when at most this share of its rows still runs; shrinking copies the cache."""


class Job(NamedTuple):
    """One prompt to continue."""

    ids: list[int]
    """The prompt's tokens; at least one."""
    max_new_tokens: int
    stop: tuple[str, ...]


class Continuation(NamedTuple):
    """What the model wrote."""

    text: str
    """Up to, and without, the first stop string or end token."""
    finite: bool = True
    """False if the logits of a step were not finite: then the text means nothing."""


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

    def ended(self, rows: Sequence[list[int]]) -> list[bool]:
        """Say of each row of new tokens, unfinished one token ago, whether it has ended."""
        by_token = [row[-1] in self.end_ids for row in rows]
        if not self.stop:
            return by_token
        tails = self.tokenizer.batch_decode([row[-self.window :] for row in rows], **_DECODE)
        return [ended or any(text in tail for text in self.stop) for ended, tail in zip(by_token, tails, strict=True)]

    def text(self, row: Sequence[int]) -> str:
        """Return what a row of new tokens says, up to its end."""
        end = next((place for place, token in enumerate(row) if token in self.end_ids), len(row))
        return cut(str(self.tokenizer.decode(list(row[:end]), **_DECODE)), self.stop)


_DECODE: Mapping[str, Any] = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}


def cut(text: str, stop: Sequence[str]) -> str:
    """Return the text up to the first of the stop strings."""
    ends = [place for place in (text.find(mark) for mark in stop if mark) if place >= 0]
    return text[: min(ends)] if ends else text


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return every token that ends an answer: the tokenizer's, and those of the model's generation settings."""
    given: Any = getattr(getattr(base_of(model), "generation_config", None), "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(given if isinstance(given, (list, tuple)) else [given])]
    return frozenset(int(token) for token in found if token is not None)


def decode(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    jobs: Sequence[Job],
    *,
    batch_size: int,
    done: Callable[[int], object],
    sampling: Mapping[str, Any] | None = None,
) -> list[Continuation]:
    """Continue each prompt, in the order of the jobs.

    Prompts are padded on the left with attention masks and explicit positions, so that a row's result does not depend
    on its batch; a model that takes no positions, or has virtual tokens before its input, gets only batches of prompts
    of the same length.

    Args:
        model: a causal language model, in evaluation mode.
        tokenizer: of the model.
        jobs: what to continue.
        batch_size: most prompts in a batch.
        done: called with the number of prompts finished since the last call.
        sampling: settings for the model's own ``generate``, for tasks that sample; None decodes greedily.
    """
    own = sampling is not None or virtual_tokens(model) > 0
    padded = accepts(model, "position_ids") and not own
    order = sorted(range(len(jobs)), key=lambda place: (-len(jobs[place].ids), jobs[place].ids))
    end_ids = end_tokens(model, tokenizer)
    found: dict[int, Continuation] = {}
    for places in _batches(jobs, order, batch_size, padded):
        batch = [jobs[place] for place in places]
        stopper = Stopper(tokenizer, batch[0].stop, end_ids)
        results = _own_generate(model, stopper, batch, sampling or {}) if own else _greedy(model, stopper, batch)
        found.update(zip(places, results, strict=True))
        done(len(places))
    return [found[place] for place in range(len(jobs))]


def _batches(jobs: Sequence[Job], order: Sequence[int], batch_size: int, padded: bool) -> Iterator[list[int]]:
    """Yield batches of jobs with the same stop strings and token limit and, without padding, the same length."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for place in order:
        job = jobs[place]
        groups.setdefault((job.stop, job.max_new_tokens, 0 if padded else len(job.ids)), []).append(place)
    for places in groups.values():
        for begin in range(0, len(places), batch_size):
            yield places[begin : begin + batch_size]


class _Batch:
    """The rows of a batch that still run, with their cache."""

    def __init__(self, model: nn.Module, batch: Sequence[Job]) -> None:
        from transformers import DynamicCache

        self.model = model
        self.keep = {"logits_to_keep": 1} if accepts(model, "logits_to_keep") else {}
        self.positioned = accepts(model, "position_ids")
        longest = max(len(job.ids) for job in batch)
        rows = [[0] * (longest - len(job.ids)) + job.ids for job in batch]
        mask = [[0] * (longest - len(job.ids)) + [1] * len(job.ids) for job in batch]
        device = device_of(model)
        self.ids = torch.tensor(rows, device=device)
        self.mask = torch.tensor(mask, device=device)
        self.positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        self.padded = any(len(job.ids) < longest for job in batch)
        self.cache = DynamicCache(config=base_of(model).config)

    def step(self) -> tuple[Tensor, Tensor]:
        """Run the model on the newest tokens; return the largest logit and its token, each of shape (rows,)."""
        inputs: dict[str, Any] = {"input_ids": self.ids, "past_key_values": self.cache, "use_cache": True}
        if self.padded:
            inputs["attention_mask"] = self.mask
        if self.positioned:
            inputs["position_ids"] = self.positions
        logits = self.model(**inputs, **self.keep).logits[:, -1]
        best = logits.max(-1)
        return best.values, best.indices

    def extend(self, tokens: Tensor, keep: list[int] | None) -> None:
        """Append a token to each row, and go on with only the rows of ``keep`` where it is given."""
        self.ids = tokens[:, None]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        self.positions = self.positions[:, -1:] + 1
        if keep is not None:
            index = torch.tensor(keep, device=tokens.device)
            self.ids, self.mask, self.positions = self.ids[index], self.mask[index], self.positions[index]
            self.cache.batch_select_indices(index)


def _greedy(model: nn.Module, stopper: Stopper, batch: Sequence[Job]) -> list[Continuation]:
    state = _Batch(model, batch)
    written: list[list[int]] = [[] for _ in batch]
    finite = [True] * len(batch)
    running = list(range(len(batch)))  # row of the state → row of the batch
    ended: set[int] = set()
    for step in range(batch[0].max_new_tokens):
        values, tokens = state.step()
        fine = torch.isfinite(values).tolist()
        chosen = tokens.tolist()
        live = [place for place, row in enumerate(running) if row not in ended]
        for place in live:
            written[running[place]].append(chosen[place])
            finite[running[place]] = fine[place]
        stops = stopper.ended([written[running[place]] for place in live])
        ended.update(running[place] for place, stop in zip(live, stops, strict=True) if stop or not fine[place])
        left = [place for place, row in enumerate(running) if row not in ended]
        if not left or step == batch[0].max_new_tokens - 1:
            break
        compact = len(left) <= COMPACT_BELOW * len(running)
        state.extend(tokens, left if compact else None)
        running = [running[place] for place in left] if compact else running
    return [Continuation(stopper.text(row), good) for row, good in zip(written, finite, strict=True)]


def _own_generate(
    model: nn.Module, stopper: Stopper, batch: Sequence[Job], sampling: Mapping[str, Any]
) -> list[Continuation]:
    """Use the model's own ``generate``, on prompts of one length."""
    from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

    length = len(batch[0].ids)

    class Ended(StoppingCriteria):
        """Ends each row on its own."""

        def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
            return torch.tensor(stopper.ended(input_ids[:, length:].tolist()), device=input_ids.device)

    settings: dict[str, Any] = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, **sampling}
    config = GenerationConfig(
        max_new_tokens=batch[0].max_new_tokens,
        eos_token_id=sorted(stopper.end_ids),
        pad_token_id=min(stopper.end_ids, default=0),
        **settings,
    )
    ids = torch.tensor([job.ids for job in batch], device=device_of(model))
    generate: Any = model.generate
    out: Tensor = generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=config,
        stopping_criteria=StoppingCriteriaList([Ended()]),
    )
    return [Continuation(stopper.text(row)) for row in out[:, length:].tolist()]
