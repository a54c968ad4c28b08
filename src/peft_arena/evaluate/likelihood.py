"""Log-likelihoods of continuations, in batches of similar length."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import torch

from peft_arena.models.rope import forget_lengths, hangs_on_length, why_alone
from peft_arena.models.steps import LOGITS_AT_ONCE, full_logits, vocabulary_of
from peft_arena.models.ways import reading_way

if TYPE_CHECKING:
    from torch import Tensor, nn

POSITIONS_AT_ONCE = 1024
"""Most positions whose logits are brought to float32 at the same time."""


class Pair(NamedTuple):
    """A context and the continuation whose likelihood is asked for; both have at least one token."""

    context: list[int]
    continuation: list[int]

    @property
    def fed(self) -> tuple[int, ...]:
        """What the model reads: everything but the last token."""
        return (*self.context, *self.continuation[:-1])


class Likelihood(NamedTuple):
    """Result for one pair."""

    total: float
    """Sum of the log-probabilities of the continuation's tokens, nats."""
    greedy: bool
    """Whether each token of the continuation is the most probable one."""


class Row(NamedTuple):
    """One row of a batch, shared by all pairs that feed the model the same tokens."""

    ids: tuple[int, ...]
    start: int
    """First position whose logits are needed."""
    pairs: list[int]
    """Places of the pairs in the request."""


def log_likelihoods(
    model: nn.Module,
    pairs: Sequence[Pair],
    *,
    batch_size: int,
    done: Callable[[int], object],
    noticed: Callable[[str], object] = lambda notice: None,
) -> list[Likelihood]:
    """Return the log-likelihood of each pair's continuation, in the order of the pairs.

    Rows are padded on the right: in a causal model nothing before a token depends on what follows it, so a row's
    result does not depend on its batch. A model of which this is not so reads one row at a time
    (:func:`peft_arena.models.ways.reading_way`), and so are rows whose length changes what they say
    (:mod:`peft_arena.models.rope`). Pairs that differ only in their last token share a row.

    Args:
        model: a causal language model, in evaluation mode.
        pairs: what to score.
        batch_size: most rows in one forward pass.
        done: called with the number of pairs finished since the last call.
        noticed: called with why rows were read one at a time, where they were.

    Raises:
        UserError: the model is not causal.
    """
    if not pairs:
        return []
    way = reading_way(model)
    if not way.together:
        noticed(f"one row at a time: {way.why}")
        batch_size = 1
    shared: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for place, pair in enumerate(pairs):
        shared[pair.fed].append(place)
    rows = [Row(ids, min(len(pairs[p].context) for p in places) - 1, places) for ids, places in shared.items()]
    rows.sort(key=lambda row: (-len(row.ids), row.ids))
    found: dict[int, Likelihood] = {}
    far = [row for row in rows if hangs_on_length(model, len(row.ids))]
    if far and way.together:
        noticed(f"one row at a time: {why_alone(model)}")
    batches = [[row] for row in far], _batches(rows[len(far) :], batch_size, vocabulary_of(model))
    for batch in chain(*batches):  # rows come in the order of their lengths
        found.update(_score(model, batch, pairs))
        done(sum(len(row.pairs) for row in batch))
    forget_lengths(model)
    return [found[place] for place in range(len(pairs))]


def _batches(rows: Sequence[Row], batch_size: int, vocabulary: int) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for row in rows:
        longest = len(batch[0].ids) if batch else len(row.ids)
        kept = longest - min([row.start, *(other.start for other in batch)])
        if batch and (len(batch) == batch_size or (len(batch) + 1) * kept * vocabulary > LOGITS_AT_ONCE):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _score(model: nn.Module, batch: Sequence[Row], pairs: Sequence[Pair]) -> dict[int, Likelihood]:
    longest = max(len(row.ids) for row in batch)
    first = min(row.start for row in batch)
    logits = full_logits(model, [row.ids for row in batch], longest - first)

    where: list[tuple[int, int, int]] = []
    lengths: list[tuple[int, int]] = []
    for number, row in enumerate(batch):
        for place in row.pairs:
            continuation = pairs[place].continuation
            begin = len(row.ids) - len(continuation) - first
            where += [(number, begin + offset, token) for offset, token in enumerate(continuation)]
            lengths.append((place, len(continuation)))
    values, greedy = _pick(logits, torch.tensor(where, device=logits.device))
    results: dict[int, Likelihood] = {}
    position = 0
    for place, length in lengths:
        end = position + length
        results[place] = Likelihood(sum(values[position:end]), all(greedy[position:end]))
        position = end
    return results


def _pick(logits: Tensor, where: Tensor) -> tuple[list[float], list[bool]]:
    """Return log-probability at each (row, position, token) of ``where``, shape (n, 3), and if it is the largest."""
    values: list[float] = []
    greedy: list[bool] = []
    for part in where.split(POSITIONS_AT_ONCE):
        row, position, token = part.unbind(1)
        chosen = logits[row, position].float()  # (n, vocabulary)
        picked = chosen.gather(1, token[:, None])[:, 0] - chosen.logsumexp(1)
        values += picked.tolist()
        greedy += (chosen.argmax(1) == token).tolist()
    return values, greedy
