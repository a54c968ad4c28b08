"""pass@k: how likely one of k sampled answers is right."""

from __future__ import annotations

import math

FULL_MARKS = 1.0
"""An answer passes if its value is at least this: partial marks do not pass."""


def metric_name(k: int) -> str:
    """Return the name of the metric."""
    return f"pass@{k}"


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Return the unbiased estimate of the probability that at least one of k answers to an item is right.

    1 - C(n - c, k) / C(n, k) for n samples, c of them right: the share of sets of k samples that hold a right one
    (Chen et al. 2021, Evaluating Large Language Models Trained on Code, equation 1). Unlike 1 - (1 - c/n)^k it is not
    too small on average.

    Args:
        samples: n, how many answers were drawn.
        right: c, how many of them are right; from 0 to n.
        k: from 1 to n.

    Raises:
        ValueError: k or the right ones are out of bounds.
    """
    if not 1 <= k <= samples or not 0 <= right <= samples:
        raise ValueError(f"pass@{k} cannot be estimated from {samples} samples, {right} of them right")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)
