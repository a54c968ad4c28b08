"""A block-diagonal rotation of the input side: W1 = W0 R^T, R a Cayley transform of skew-symmetric blocks.

Everything is written in E = R - I, which is computed without subtracting the identity, so that small rotations keep
their digits: D = W0 E^T. The path scales the skew-symmetric generator, on which an exact transform stays orthogonal.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from peft_arena.methods.base import PathKind
from peft_arena.weights.change import AT_ONCE, Change, Norms, Projected, Svd, entry_norms, lengths, singular_values
from peft_arena.weights.rescaled import together

ORTHOGONAL = 1e-5
"""Largest Frobenius norm of R^T R - I of a block that is taken for a rotation."""


class Rotation(Change):
    """D = W0 (R^T - I), R block-diagonal."""

    path: ClassVar[PathKind] = PathKind.CAYLEY

    def __init__(self, skew: Tensor, terms: int | None, shape: tuple[int, ...]) -> None:
        """Hold the generator.

        Args:
            skew: Q, skew-symmetric blocks, shape (blocks, side, side); one block stands for all.
            terms: of the truncated Neumann series of (I + Q) (I - Q)^-1 that peft computes; None for the exact
                (I - Q) (I + Q)^-1, which turns the other way.
            shape: of the weight.
        """
        self.skew, self.terms, self.shape = skew, terms, shape

    @cached_property
    def own_parts(self) -> tuple[Tensor, Tensor]:
        """The symmetric and the skew-symmetric part of E = R - I, each of the generator's shape."""
        return exact_cayley(self.skew) if self.terms is None else cayley_series(self.skew, self.terms)

    @property
    def parts(self) -> tuple[Tensor, Tensor]:
        """The same for every block of the input, each of shape (in / side, side, side)."""
        even, odd = self.own_parts
        count = self.shape[1] // self.skew.shape[-1]
        return even.expand(count, -1, -1), odd.expand(count, -1, -1)

    @cached_property
    def beyond(self) -> Tensor:
        """E = R - I, shape (in / side, side, side)."""
        even, odd = self.parts
        return even + odd

    def turned(self, rows: Tensor) -> Tensor:
        """Return h^T E for each row h, shape (n, in)."""
        return block_product(rows, self.beyond)

    def dense(self, base: Tensor) -> Tensor:
        """Return W0 E^T."""
        return block_product(base, self.beyond.transpose(1, 2))

    def apply(self, inputs: Tensor, base: Tensor) -> Tensor:
        """Return W0 (E^T h) for each row h; see :meth:`Change.apply`."""
        return self.turned(inputs) @ base.T

    def scaled(self, factor: float) -> Change:
        """Return the rotation of the scaled generator."""
        return self.times(factor)

    def times(self, factor: float) -> Rotation:
        """Return the rotation of the scaled generator."""
        return Rotation(factor * self.skew, self.terms, self.shape)

    def by_root(self, factor: float) -> Change:
        """Return the rotation of the generator times the square root of the factor."""
        return self.times(math.sqrt(factor))

    def orthogonality(self, share: float = 1.0) -> float | None:
        """Return the largest ||R^T R - I||_F of a block; see :meth:`Change.orthogonality`."""
        even, odd = self.own_parts
        return float(deviations(share * (even + odd).double()).max())

    def to(self, dtype: torch.dtype) -> Rotation:
        """Return the change in another type, the transform computed in it."""
        return Rotation(self.skew.to(dtype), self.terms, self.shape)

    def projected(self, base: Tensor, svd: Svd) -> Projected:
        """Return D in the singular basis of W0: U diag(s) (V^T E^T V), without a product of the size of W0.

        Only the symmetric part of E reaches the diagonal, and is of second order in a small rotation: it is taken
        alone, so that the larger skew-symmetric part leaves no rounding there.
        """
        symmetric = (block_product(svd.right, self.parts[0]) * svd.right).sum(1)  # v_i^T E v_i
        inner = svd.right @ self.turned(svd.right).T  # (k, k)
        return Projected(svd.values * symmetric, lengths(svd.values[:, None] * inner))

    def singular_values(self, base: Tensor, svd: Svd) -> Tensor:
        """Return the singular values of D, of a matrix that has the same and no more rows than columns."""
        if self.shape[0] <= self.shape[1]:
            return singular_values(self.dense(base))
        return singular_values(svd.values[:, None] * self.dense(svd.right))  # D = U (diag(s) V^T E^T)

    def norms(self, base: Tensor) -> Norms:
        """Return the norms of D, a block of rows at a time."""
        return together(entry_norms(self.dense(part)) for part in base.split(max(1, AT_ONCE // self.shape[1])))

    @cached_property
    def orthogonal(self) -> bool:
        """Whether every block of R is orthogonal to :data:`ORTHOGONAL`; a truncated series only nearly is.

        The exact transform is, whatever rounding in float32 leaves of a large block.
        """
        if self.terms is None:
            return True
        even, odd = self.own_parts
        return float(deviations(even + odd).max()) <= ORTHOGONAL

    def rotated(self, svd: Svd) -> Tensor | None:
        """Return the right singular vectors of W1, R v_i, as rows; None where R is not orthogonal."""
        if not self.orthogonal:
            return None
        return svd.right + block_product(svd.right, self.beyond.transpose(1, 2))


class StretchedRotation(Change):
    """BOFT: W1 = diag(1 + c) W0 R^T, so D = W0 E^T + diag(c) W0 (I + E^T).

    The path scales the generator of R, and goes by 1 + f c; the latter by the factor itself on every way.
    """

    path: ClassVar[PathKind] = PathKind.CAYLEY

    def __init__(self, rotation: Rotation, beyond: Tensor) -> None:
        """Hold both.

        Args:
            rotation: R, of the weight's shape.
            beyond: c, shape (out,).
        """
        self.rotation, self.beyond, self.shape = rotation, beyond, rotation.shape

    def dense(self, base: Tensor) -> Tensor:
        """Return D multiplied out."""
        turned = self.rotation.dense(base)
        return turned + self.beyond[:, None] * (base + turned)

    def apply(self, inputs: Tensor, base: Tensor) -> Tensor:
        """Return D h for each row h; see :meth:`Change.apply`."""
        turned = self.rotation.apply(inputs, base)
        return turned + self.beyond * (inputs @ base.T + turned)

    def scaled(self, factor: float) -> Change:
        """Return the change of the scaled generator and factors c."""
        return StretchedRotation(self.rotation.times(factor), factor * self.beyond)

    def by_root(self, factor: float) -> Change:
        """Return the change of the generator times the square root of the factor, and of c times the factor."""
        return StretchedRotation(self.rotation.times(math.sqrt(factor)), factor * self.beyond)

    def orthogonality(self, share: float = 1.0) -> float | None:
        """Return the largest ||R^T R - I||_F of a block; None on the straight way, where W1 is no product."""
        return self.rotation.orthogonality() if share == 1.0 else None

    def to(self, dtype: torch.dtype) -> Change:
        """Return the change in another type."""
        return StretchedRotation(self.rotation.to(dtype), self.beyond.to(dtype))


def block_product(rows: Tensor, blocks: Tensor) -> Tensor:
    """Return rows times a block-diagonal matrix.

    Args:
        rows: shape (n, blocks * side).
        blocks: shape (blocks, side, side).
    """
    cut = rows.reshape(rows.shape[0], blocks.shape[0], blocks.shape[1]).transpose(0, 1)  # (blocks, n, side)
    return torch.bmm(cut, blocks).transpose(0, 1).reshape(rows.shape)


def deviations(beyond: Tensor) -> Tensor:
    """Return ||R^T R - I||_F of each block.

    Args:
        beyond: R - I, shape (blocks, side, side).

    Returns:
        Shape (blocks,).
    """
    wrong = beyond + beyond.transpose(1, 2) + beyond.transpose(1, 2) @ beyond
    found: Tensor = wrong.norm(dim=(1, 2))
    return found


def exact_cayley(skew: Tensor) -> tuple[Tensor, Tensor]:
    """Return (I - Q) (I + Q)^-1 - I for each block Q, in two parts, computed in float64 and rounded once.

    Returns:
        The symmetric part 2 Q^2 (I - Q^2)^-1 and the skew-symmetric part -2 Q (I - Q^2)^-1.
    """
    exact = skew.double()
    square = exact @ exact
    metric = torch.eye(exact.shape[-1], dtype=exact.dtype, device=exact.device) - square
    both: Tensor = torch.linalg.solve(metric, torch.cat([2 * square, -2 * exact], dim=-2), left=False)
    even, odd = both.chunk(2, dim=-2)
    return even.to(skew.dtype), odd.to(skew.dtype)


def cayley_series(skew: Tensor, terms: int) -> tuple[Tensor, Tensor]:
    """Return peft's truncated series without the identity: 2 Q + ... + 2 Q^(n-2) + Q^(n-1), n terms, in two parts.

    Two terms are 2 Q alone, and three are computed as four (peft 0.21.2).

    Args:
        skew: Q, shape (blocks, side, side).
        terms: n.

    Returns:
        The even powers, which are symmetric, and the odd ones, which are skew-symmetric.
    """
    parts = [torch.zeros_like(skew), torch.zeros_like(skew)]
    last = 1 if terms == 2 else max(terms, 4) - 1 if terms > 2 else 0
    power = skew
    for degree in range(1, last + 1):
        if degree > 1:
            power = power @ skew
        parts[degree % 2] = parts[degree % 2] + (power if degree == last > 1 else 2 * power)
    return parts[0], parts[1]


def projected_generator(entries: Tensor, eps: float) -> Tensor:
    """Return the generator of COFT: blocks whose Frobenius norm is above eps / sqrt(blocks) shrunk to it.

    Args:
        entries: above the diagonal of each block, shape (blocks, side (side - 1) / 2).
        eps: the constraint on the whole.
    """
    limit = eps / math.sqrt(entries.shape[0])
    norm = math.sqrt(2) * entries.norm(dim=1, keepdim=True)
    return torch.where(norm <= limit * (1 + 1e-5), entries, entries * (limit / norm))
