"""Which arms are worth considering when both the gain and what is kept count.

An arm is *on the front* of the estimates if no other arm is at least as good on both axes and better on one. Estimates
have errors, so two more careful statements go with it:

- the *probability* of being on the front: the share of joint draws (same seeds and items for all arms) in which it is;
- *dominated by*: another arm is *better* on one axis and *no worse* on the other, both by corrected tests. An arm that
  is not on the front need not be dominated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from peft_arena.analyze.compare import Comparison, both_ways
from peft_arena.analyze.effects import ArmEffects
from peft_arena.analyze.resamples import Resamples


@dataclass(frozen=True)
class ParetoStatus:
    """Where one arm stands among the arms of its target."""

    on_front: bool
    """By the point estimates."""
    probability: float | None
    """Share of joint draws in which the arm is on the front; None where an arm has no interval."""
    dominated_by: tuple[str, ...]
    """Arms that are better on one axis and no worse on the other."""


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


def pareto(
    arms: Sequence[ArmEffects], comparisons: Sequence[Comparison], resamples: Resamples
) -> dict[str, ParetoStatus]:
    """Return the standing of every arm that has both a gain and a mean retention, by label."""
    points = [arm for arm in arms if arm.gain is not None and arm.gain.delta is not None and arm.mean is not None]
    if not points:
        return {}
    values = [[arm.gain.delta.value, arm.mean.value] for arm in points]  # type: ignore[union-attr]
    front = on_front(*np.round(np.array(values), 9).T)
    probability = _probability(points, resamples)
    labels, pairs = [arm.label for arm in points], both_ways(comparisons)
    return {
        arm.label: ParetoStatus(
            on_front=bool(front[place]),
            probability=None if probability is None else float(probability[place]),
            dominated_by=dominators(arm.label, labels, pairs),
        )
        for place, arm in enumerate(points)
    }


def dominators(label: str, others: Sequence[str], pairs: Mapping[tuple[str, str], Comparison]) -> tuple[str, ...]:
    """Return the arms that dominate one: better on one axis and no worse on the other, in the order given.

    Args:
        label: of the arm.
        others: arms that may dominate it.
        pairs: comparisons by left and right, in both directions.
    """
    found = []
    for other in others:
        pair = pairs.get((other, label))
        if pair is None:
            continue
        sides = (pair.gain, pair.retention)
        if any(side.has("better") for side in sides) and all(side.has("no worse") for side in sides):
            found.append(other)
    return tuple(found)


def _probability(points: Sequence[ArmEffects], resamples: Resamples) -> NDArray[np.float64] | None:
    pairs = [((arm.gain.contrast, arm.gain.delta), (arm.mean_contrast, arm.mean)) for arm in points if arm.gain]
    if not all(
        contrast is not None and found is not None and found.known for pair in pairs for contrast, found in pair
    ):
        return None
    drawn = [
        np.stack([resamples.of(pair[axis][0], pair[axis][1].stderr) for pair in pairs], axis=-1)  # type: ignore[arg-type, union-attr]
        for axis in (0, 1)
    ]
    total = np.zeros(len(points))
    for start in range(0, resamples.draws, 500):
        total += on_front(drawn[0][start : start + 500], drawn[1][start : start + 500]).sum(axis=0)
    return total / resamples.draws
