"""Which arms are worth considering when both the gain and what is kept count.

An arm is *on the front* of the estimates if no other arm is at least as good on both axes and better on one. Estimates
have errors, so two more careful statements go with it:

- the *probability* of being on the front: the share of joint bootstrap draws (same seeds and items for all arms) in
  which it is;
- *dominated by*: another arm is significantly better on one axis (Holm-corrected) and its estimate on the other is at
  least as high. "Not significantly worse" would not do: an arm with ten points less gain and a large error would pass.
  A dominated arm is therefore never on the front, and an arm that is not on the front need not be dominated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from peft_arena.analyze.compare import Comparison, both_ways
from peft_arena.analyze.effects import ArmEffects


@dataclass(frozen=True)
class ParetoStatus:
    """Where one arm stands among the arms of its target."""

    on_front: bool
    """By the point estimates."""
    probability: float | None
    """Share of joint draws in which the arm is on the front; None without draws."""
    dominated_by: tuple[str, ...]
    """Arms that are significantly better on one axis and whose estimate on the other is at least as high."""


def on_front(gain: NDArray[np.float64], retention: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Say for each arm whether no other is at least as good on both axes and better on one.

    Args:
        gain: shape (..., arms).
        retention: shape (..., arms).

    Returns:
        Shape (..., arms); two arms at the same place are both on the front.
    """
    no_worse = (gain[..., None, :] >= gain[..., :, None]) & (retention[..., None, :] >= retention[..., :, None])
    better = (gain[..., None, :] > gain[..., :, None]) | (retention[..., None, :] > retention[..., :, None])
    return np.asarray(~np.any(no_worse & better, axis=-1))


def pareto(arms: Sequence[ArmEffects], comparisons: Sequence[Comparison]) -> dict[str, ParetoStatus]:
    """Return the standing of every arm that has both a gain and a mean retention, by label."""
    points = [(arm.label, arm.gain.delta, arm.mean) for arm in arms if arm.gain and arm.gain.delta and arm.mean]
    if not points:
        return {}
    front = on_front(np.array([gain.value for _, gain, _ in points]), np.array([kept.value for _, _, kept in points]))
    probability = _probability([gain.draws for _, gain, _ in points], [kept.draws for _, _, kept in points])
    table = both_ways(comparisons)
    return {
        label: ParetoStatus(
            on_front=bool(front[place]),
            probability=None if probability is None else float(probability[place]),
            dominated_by=tuple(
                other
                for other, more_gain, more_kept in points
                if other != label
                and more_gain.value >= gain.value
                and more_kept.value >= kept.value
                and _better_somewhere(table.get((other, label)))
            ),
        )
        for place, (label, gain, kept) in enumerate(points)
    }


def _probability(gains: list[NDArray[np.float64]], kept: list[NDArray[np.float64]]) -> NDArray[np.float64] | None:
    if any(draws.size == 0 for draws in (*gains, *kept)):
        return None
    gain, retention = np.stack(gains, axis=-1), np.stack(kept, axis=-1)
    whole = np.isfinite(gain).all(axis=-1) & np.isfinite(retention).all(axis=-1)
    gain, retention = gain[whole], retention[whole]
    if not len(gain):
        return None
    total = np.zeros(gain.shape[1])
    for start in range(0, len(gain), 500):
        total += on_front(gain[start : start + 500], retention[start : start + 500]).sum(axis=0)
    return total / len(gain)


def _better_somewhere(comparison: Comparison | None) -> bool:
    return comparison is not None and "better" in (comparison.gain.verdict, comparison.retention.verdict)
