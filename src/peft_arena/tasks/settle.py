"""Quantities of a whole evaluation (means over parts, F1, correlations) as values of its items.

A quantity that is a smooth function of means over items has a linearisation: a value for each item, whose mean is the
quantity itself and whose standard error is that of the delta method. With it means, standard errors and paired
differences over items are computed for such a quantity as for an accuracy. Deville 1999, Variance estimation for
complex statistics and estimators: linearization and residual techniques. A single linearised value may be below 0 or
above 1; what the item itself was worth is another metric of the task (``item_accuracy``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import sqrt
from statistics import fmean

from peft_arena.tasks.base import Score

FEWEST = 2
"""Scored items that every part of a mean over parts needs."""


def settle_strata(scores: Sequence[Score], strata: Sequence[str], expected: Sequence[str]) -> list[Score]:
    """Return scores whose mean is the unweighted mean over the parts of a benchmark.

    With K parts, N scored items, n_k of them in part k with mean m_k, and m the mean of the m_k, an item's value x
    becomes m + N / (K n_k) sqrt(n_k / (n_k - 1)) (x - m_k). The standard error of these is that of a stratified sample,
    unbiased in each part (Cochran 1977, Sampling Techniques, equation 5.13). Items keep the weights they have within
    their part.

    Args:
        scores: one for each item.
        strata: the part of each item.
        expected: all parts there are. Without two scored items in each of them no item has a value: one item says
            nothing of how items of its part differ, and the mean would have no error.
    """
    known = [index for index, score in enumerate(scores) if score.value is not None and score.weight > 0]
    members: dict[str, list[int]] = {}
    for index in known:
        members.setdefault(strata[index], []).append(index)
    few = [name for name in expected if len(members.get(name, ())) < FEWEST]
    if few:
        named = f"{', '.join(few[:5])}{', ...' if len(few) > 5 else ''}"
        why = f"no mean over parts: fewer than {FEWEST} scored items in {named}"
        return [replace(score, value=None, reason=score.reason or why) for score in scores]
    weights = {name: sum(scores[i].weight for i in found) for name, found in members.items()}
    means = {
        name: sum(scores[i].weight * (scores[i].value or 0.0) for i in found) / weights[name]
        for name, found in members.items()
    }
    overall = fmean(means.values())
    settled = list(scores)
    for name, found in members.items():
        for index in found:
            score = scores[index]
            reach = len(known) * score.weight / (len(members) * weights[name]) * sqrt(len(found) / (len(found) - 1))
            value = overall + reach * ((score.value or 0.0) - means[name])
            settled[index] = replace(score, value=value, weight=1.0)
    return settled


def settle_rates(rates: Sequence[float | None], strata: Sequence[str], expected: Sequence[str]) -> list[float | None]:
    """Return what :func:`settle_strata` does, for plain values.

    Args:
        rates: one for each item; None where there is none.
        strata: the part of each item.
        expected: all parts there are.
    """
    scores = [Score(rate, reason="" if rate is not None else "no rate") for rate in rates]
    return [score.value for score in settle_strata(scores, strata, expected)]
