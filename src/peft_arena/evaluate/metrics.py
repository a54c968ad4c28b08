"""Statistics over scored items: weighted means with their standard errors. Pure: no torch, no files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from peft_arena.core.measure import Measure
from peft_arena.store.records import ItemRecord
from peft_arena.tasks.base import FRACTION, Kind, Metric, TaskCard


class Mean(NamedTuple):
    """A weighted mean and what is behind it."""

    value: float | None
    """None if nothing was scored."""
    stderr: float | None
    """None below two scored items: one item has no standard error."""
    n: int
    """Scored items."""
    unscored: int


def weighted_mean(values: Sequence[float | None], weights: Sequence[float] | None = None) -> Mean:
    """Return the weighted mean of the scored values and its standard error.

    The mean is a ratio of two sums, R = sum(w x) / sum(w), and items are the sampled units. Its variance is the
    linearised one, n / (n - 1) * sum(w^2 (x - R)^2) / sum(w)^2 (Cochran 1977, Sampling Techniques, section 6.4), which
    for equal weights is the usual s^2 / n.

    Args:
        values: one per item; None, and values that are not finite, count as unscored.
        weights: units behind each value, not negative; all 1 if not given.

    Raises:
        ValueError: the lengths differ.
    """
    if weights is None:
        weights = [1.0] * len(values)
    pairs = [(x, w) for x, w in zip(values, weights, strict=True) if x is not None and math.isfinite(x * w)]
    unscored = len(values) - len(pairs)
    total = math.fsum(w for _, w in pairs)
    if total <= 0:
        return Mean(None, None, 0, len(values))
    mean = math.fsum(w * x for x, w in pairs) / total
    n = len(pairs)
    if n < 2:
        return Mean(mean, None, n, unscored)
    spread = math.fsum((w * (x - mean)) ** 2 for x, w in pairs)
    return Mean(mean, math.sqrt(n / (n - 1) * spread) / total, n, unscored)


def sampling_refusal(card: TaskCard) -> str:
    """Say why several sampled answers cannot be asked of a task; empty if they can."""
    if card.kind is not Kind.GENERATE:
        return "it compares likelihoods, and no answer is written"
    if card.headline.unit != FRACTION or card.headline.better != "higher":
        return f"pass@k needs full marks, and its {card.headline.name} is no fraction of them"
    return ""


def measures(metrics: Iterable[Metric], items: Sequence[ItemRecord], how: str) -> tuple[Measure, ...]:
    """Return one measure per metric of a card, the headline first.

    An item without a value for a metric is counted as unscored for that metric.

    Args:
        metrics: the card's metrics; the first is the items' headline value.
        items: one record per item.
        how: how the items were obtained; put before the kind of mean.
    """
    return tuple(_measure(metric, place == 0, items, how) for place, metric in enumerate(metrics))


def _measure(metric: Metric, headline: bool, items: Sequence[ItemRecord], how: str) -> Measure:
    parts = [(item.value, item.weight) if headline else item.others.get(metric.name, (None, 1.0)) for item in items]
    mean = weighted_mean([value for value, _ in parts], [weight for _, weight in parts])
    kind = "mean over items" if all(weight == 1.0 for _, weight in parts) else "mean over items weighted by their units"
    if mean.value is None:
        kind = f"no value: none of {len(items)} items could be scored"
    return Measure(
        metric=metric.name,
        value=mean.value,
        unit=metric.unit,
        better=metric.better,
        how=f"{how}; {kind}",
        n=mean.n,
        stderr=mean.stderr,
        unscored=mean.unscored,
    )
