"""Weight-space spectra: one weight change seen in the singular basis of the pretrained weight, and by itself.

Everywhere W0 is the pretrained weight of shape (out, in), W1 the tuned one, D = W1 - W0, W0 = U diag(s) V^T, and
k = min(out, in). The formulas are those of section 2 of the project's reference. Importing this module imports torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from peft_arena.weights.change import Change, Norms, Svd, entry_norms
from peft_arena.weights.svd import svd as decompose

WINDOW = 5
"""Directions that a moving average is taken over, the one it stands at in the middle."""
NO_CHANGE = "the weight change is zero"
NO_BASE = "the pretrained parameter is zero"
FEW = f"a moving average over {WINDOW} directions needs at least {WINDOW // 2 + 1}"


@dataclass(frozen=True)
class Spectrum:
    """Profiles and scalars of one weight change. Profiles are ordered by the singular values of W0, descending."""

    singular_value: Tensor
    """s, shape (k,)."""
    retention: Tensor
    """P_i = u_i^T W1 v_i, shape (k,)."""
    deviation: Tensor
    """|P_i - s_i|, shape (k,)."""
    adaptation: Tensor
    """E_i = ||D v_i||_2, shape (k,)."""
    alignment: Tensor | None
    """|cos(v_i, i-th right singular vector of W1)|, shape (k,); None where it was not asked for."""
    change_singular_value: Tensor
    """The i-th singular value of D, shape (k,); zero beyond its rank."""
    scalars: dict[str, float | None]
    """By the names of :mod:`peft_arena.core.quantities`; ``alignment_mean`` only if there is an alignment."""
    reasons: dict[str, str]
    """Why a scalar is None, for each that is."""


def spectrum(
    base: Tensor,
    svd: Svd,
    change: Change,
    *,
    norms: Norms | None = None,
    change_norms: Norms | None = None,
    alignment: Literal["free", "all"] = "free",
) -> Spectrum:
    """Return the spectra of one weight change.

    Args:
        base: W0, shape (out, in).
        svd: its thin singular value decomposition.
        change: D; all three of one type, float32 or float64, which the arithmetic is done in.
        norms: those of W0, if they are known already.
        change_norms: those of D, if they are.
        alignment: ``free``: only where the change is a rotation, whose singular vectors are the turned ones of W0;
            ``all``: by a second decomposition, of W1, for every other change.
    """
    norms = norms or entry_norms(base)
    projected = change.projected(base, svd)
    values = change.singular_values(base, svd)
    padded = functional.pad(values, (0, svd.values.shape[0] - values.shape[0]))
    retention = svd.values + projected.diagonal
    aligned = _alignment(base, svd, change, alignment)
    scalars: dict[str, float | None] = {
        "stable_rank": stable_rank(values),
        "entropy_rank": entropy_rank(values),
        "spectral_norm": _largest(values),
        "spectral_norm_relative": _ratio(_largest(values), _largest(svd.values)),
        "deviation_mean": _mean(projected.diagonal.abs()),
        "retention_fluctuation": fluctuation(retention),
        "adaptation_mean": _mean(projected.lengths),
        "adaptation_fluctuation": fluctuation(projected.lengths),
    }
    if aligned is not None:
        scalars["alignment_mean"] = _mean(aligned)
    scalars |= norm_scalars(change_norms or change.norms(base), norms)
    return Spectrum(
        singular_value=svd.values,
        retention=retention,
        deviation=projected.diagonal.abs(),
        adaptation=projected.lengths,
        alignment=aligned,
        change_singular_value=padded,
        scalars=scalars,
        reasons={name: REASONS[name] for name, value in scalars.items() if value is None},
    )


def norm_scalars(change: Norms, base: Norms) -> dict[str, float | None]:
    """Return the norms of a change, absolute and relative to those of the pretrained parameter."""
    relative = {"l1_relative": _ratio(change.l1, base.l1), "l2_relative": _ratio(change.l2, base.l2)}
    return {"l1": change.l1, "l2": change.l2, **relative}


REASONS = {
    "stable_rank": NO_CHANGE,
    "entropy_rank": NO_CHANGE,
    "spectral_norm_relative": NO_BASE,
    "l1_relative": NO_BASE,
    "l2_relative": NO_BASE,
    "retention_fluctuation": FEW,
    "adaptation_fluctuation": FEW,
}
"""Why each scalar that can be undefined is."""


def stable_rank(values: Tensor) -> float | None:
    """Return the stable rank of a matrix: squared Frobenius norm over squared spectral norm.

    In [1, rank]; None for a zero matrix. PEFT-Arena calls it effective rank.

    Args:
        values: the matrix's singular values in any order, those that are zero may be left out; shape (n,).
    """
    largest = _largest(values)
    if largest == 0:
        return None
    return float((_exact(values) / largest).square().sum())


def entropy_rank(values: Tensor) -> float | None:
    """Return exp(-sum p log p), p the singular values over their sum: Roy and Vetterli, 2007, The effective rank.

    In [1, rank]; None for a zero matrix.

    Args:
        values: see :func:`stable_rank`.
    """
    if _largest(values) == 0:
        return None
    exact = _exact(values)
    shares = exact / exact.sum()
    return math.exp(float(torch.special.entr(shares).sum()))


def moving_average(profile: Tensor) -> Tensor | None:
    """Return the mean of each entry and the two before and after it; beyond the ends the profile is mirrored.

    The entries at the ends are not repeated: before the first comes the second, before that the third. With fewer than
    three entries there is nothing to mirror, and no moving average.

    Args:
        profile: shape (k,).

    Returns:
        Shape (k,); None below three entries.
    """
    side = WINDOW // 2
    if profile.shape[0] <= side:
        return None
    mirrored = functional.pad(profile[None], (side, side), mode="reflect")[0]
    return mirrored.unfold(0, WINDOW, 1).mean(1)


def fluctuation(profile: Tensor) -> float | None:
    """Return the mean absolute deviation of a profile from its :func:`moving_average`; None where there is none.

    Args:
        profile: shape (k,); computed in float64.
    """
    exact = _exact(profile)
    average = moving_average(exact)
    return None if average is None else _mean((exact - average).abs())


def alignment(first: Tensor, second: Tensor) -> Tensor:
    """Return the absolute cosines of rows of the same index.

    Args:
        first: rows of unit length, shape (k, in).
        second: the same.

    Returns:
        Shape (k,), in [0, 1].
    """
    return (first * second).sum(1).abs().clamp_max(1)


def _alignment(base: Tensor, svd: Svd, change: Change, which: Literal["free", "all"]) -> Tensor | None:
    turned = change.rotated(svd)
    if turned is None and which == "all":
        turned = decompose(base + change.dense(base), base.dtype).right
    return None if turned is None else alignment(svd.right, turned)


def _exact(values: Tensor) -> Tensor:
    """Return a short vector in float64; on the CPU, which every device can hand it to."""
    return values.detach().cpu().double()


def _largest(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0


def _mean(values: Tensor) -> float:
    return float(_exact(values).mean())


def _ratio(value: float, base: float) -> float | None:
    return value / base if base > 0 else None
