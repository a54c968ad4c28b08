"""The best approximation of a change by factors of a stated rank, and what rank an error asks for.

Of all matrices of rank r the truncated singular value decomposition is nearest to D in Frobenius norm, at the distance
of the singular values left out (Eckart and Young 1936, "The approximation of one matrix by another of lower rank").
Importing this module imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peft_arena.weights.change import Change, LowRank, Svd
from peft_arena.weights.svd import svd


class Truncated(NamedTuple):
    """The best approximation of one change."""

    change: LowRank
    """B A of the rank; B = U diag(s), A = V^T, float32."""
    values: Tensor
    """All singular values of D, float64, descending; those that are zero by D's form are left out."""


def truncated(change: Change, base: Tensor, rank: int | float) -> Truncated:
    """Return the best approximation of a change.

    Args:
        change: D, of a matrix of shape (out, in).
        base: W0.
        rank: a whole number, which is cut to min(out, in) and reached by zeros where D has fewer directions; or the
            share of the squared singular values of D that is to be kept by as few of them as possible.
    """
    found = _decomposed(change, base)
    values = found.values.double()
    count = min(rank, *change.shape) if isinstance(rank, int) else _directions(values, rank)
    missing = max(0, count - len(values))
    b = (found.left * found.values)[:, :count].float()
    a = found.right[:count].float()
    b, a = torch.nn.functional.pad(b, (0, missing)), torch.nn.functional.pad(a, (0, 0, 0, missing))
    return Truncated(LowRank(b.contiguous(), a.contiguous()), values)


def _decomposed(change: Change, base: Tensor) -> Svd:
    """Return the singular value decomposition of D, of the triangles of its factors where it has some."""
    if not isinstance(change, LowRank) or change.a.shape[0] >= min(change.shape):
        return svd(change.dense(base), torch.float32)
    first, second = torch.linalg.qr(change.b.double()), torch.linalg.qr(change.a.double().T)
    left, values, right = torch.linalg.svd(first.R @ second.R.T, full_matrices=False)
    return Svd(first.Q @ left, values, right @ second.Q.T)


def _directions(values: Tensor, share: float) -> int:
    """Return how many singular values hold a share of the sum of all squares; at least 1."""
    sums = values.square().cumsum(0)
    return min(len(values), int((sums < share * sums[-1]).sum()) + 1) if len(values) else 1


def rank_within(spectra: Sequence[Tensor], exact: float, limit: float) -> int:
    """Return the smallest rank, the same for all changes, whose error over all of them together is within a limit.

    Args:
        spectra: all singular values of each change, descending.
        exact: sum ||D||_F^2 of further changes, of which nothing is left out.
        limit: of sqrt(sum ||D_r - D||_F^2 / sum ||D||_F^2), the sums over the changes.
    """
    longest = max((len(values) for values in spectra), default=0)
    squares = torch.zeros(longest, dtype=torch.float64)
    for values in spectra:
        squares[: len(values)] += values.square()
    left = squares.flip(0).cumsum(0).flip(0)  # left out by a rank of 0, 1, ...
    return int((left > limit**2 * (squares.sum() + exact)).sum())
