"""Changes that scale rows or columns of the weight, alone or after a low-rank change."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor

from peft_arena.methods.base import PathKind
from peft_arena.weights.change import AT_ONCE, Change, Norms, Projected, Svd, entry_norms, lengths, singular_values


class Rows(Change):
    """D = diag(c) W0: the factor of each output is 1 + c, which is also the path: 1 + f c."""

    path: ClassVar[PathKind] = PathKind.MULTIPLICATIVE
    straight: ClassVar[bool] = True

    def __init__(self, beyond: Tensor, shape: tuple[int, ...]) -> None:
        """Hold c.

        Args:
            beyond: c, shape (out,).
            shape: of the weight.
        """
        self.beyond, self.shape = beyond, shape

    def dense(self, base: Tensor) -> Tensor:
        """Return diag(c) W0."""
        return self.beyond[:, None] * base

    def apply(self, inputs: Tensor, base: Tensor) -> Tensor:
        """Return c times W0 h for each row; see :meth:`Change.apply`."""
        return (inputs @ base.T) * self.beyond

    def scaled(self, factor: float) -> Change:
        """Return the change with factor c."""
        return Rows(factor * self.beyond, self.shape)

    def to(self, dtype: torch.dtype) -> Change:
        """Return the change in another type."""
        return Rows(self.beyond.to(dtype), self.shape)

    def projected(self, base: Tensor, svd: Svd) -> Projected:
        """Return D in the singular basis of W0 in O(out k): D v_i = s_i (c u_i)."""
        moved = self.beyond[:, None] * svd.left
        return Projected(svd.values * (svd.left * moved).sum(0), svd.values * lengths(moved))

    def singular_values(self, base: Tensor, svd: Svd) -> Tensor:
        """Return the singular values of D, those of diag(c) U diag(s)."""
        return singular_values(self.beyond[:, None] * svd.left * svd.values)

    def norms(self, base: Tensor) -> Norms:
        """Return the norms of D from those of the rows of W0."""
        l1 = self.beyond.abs() @ base.abs().sum(1)
        return Norms(float(l1), float((self.beyond * lengths(base.T)).square().sum().sqrt()))


class Columns(Change):
    """D = W0 diag(c): the factor of each input is 1 + c, which is also the path: 1 + f c."""

    path: ClassVar[PathKind] = PathKind.MULTIPLICATIVE
    straight: ClassVar[bool] = True

    def __init__(self, beyond: Tensor, shape: tuple[int, ...]) -> None:
        """Hold c.

        Args:
            beyond: c, shape (in,).
            shape: of the weight.
        """
        self.beyond, self.shape = beyond, shape

    def dense(self, base: Tensor) -> Tensor:
        """Return W0 diag(c)."""
        return base * self.beyond

    def apply(self, inputs: Tensor, base: Tensor) -> Tensor:
        """Return W0 (c h) for each row h; see :meth:`Change.apply`."""
        return (inputs * self.beyond) @ base.T

    def scaled(self, factor: float) -> Change:
        """Return the change with factor c."""
        return Columns(factor * self.beyond, self.shape)

    def to(self, dtype: torch.dtype) -> Change:
        """Return the change in another type."""
        return Columns(self.beyond.to(dtype), self.shape)

    def projected(self, base: Tensor, svd: Svd) -> Projected:
        """Return D in the singular basis of W0: U diag(s) (V^T diag(c) V), without a product of the size of W0."""
        inner = svd.values[:, None] * ((svd.right * self.beyond) @ svd.right.T)  # (k, k)
        return Projected(inner.diagonal().clone(), lengths(inner))

    def singular_values(self, base: Tensor, svd: Svd) -> Tensor:
        """Return the singular values of D, those of diag(s) V^T diag(c)."""
        return singular_values(svd.values[:, None] * svd.right * self.beyond)

    def norms(self, base: Tensor) -> Norms:
        """Return the norms of D from those of the columns of W0."""
        l1 = self.beyond.abs() @ base.abs().sum(0)
        return Norms(float(l1), float((self.beyond * lengths(base)).square().sum().sqrt()))


class Decomposed(Change):
    """DoRA: W1 = diag(m / ||W0 + B A||) (W0 + B A), norms of rows.

    So D = diag(c) W0 + diag(1 + c) B A with 1 + c = m / ||W0 + B A||. The path goes by the method's own parameters:
    f B A, and lengths from those of W0 to m. A change is of one weight: c is kept once it has been computed.
    """

    path: ClassVar[PathKind] = PathKind.MULTIPLICATIVE

    def __init__(self, b: Tensor, a: Tensor, magnitude: Tensor, factor: float = 1.0) -> None:
        """Hold the parameters.

        Args:
            b: shape (out, rank), every scale multiplied in.
            a: shape (rank, in).
            magnitude: m, shape (out,).
            factor: where on the path.
        """
        self.b, self.a, self.magnitude, self.factor = b, a, magnitude, factor
        self.shape = (b.shape[0], a.shape[1])
        self._beyond: Tensor | None = None

    def beyond(self, base: Tensor) -> Tensor:
        """Return c, shape (out,); the norms are summed in float64, as c is a small difference of large numbers."""
        if self._beyond is None:
            after = []
            rows = max(1, AT_ONCE // self.shape[1])
            for weight, part in zip(base.split(rows), self.b.split(rows), strict=True):
                tuned = weight + (self.factor * part) @ self.a
                after.append(torch.linalg.vector_norm(tuned, dim=1, dtype=torch.float64))
            start, norm = row_lengths(base), torch.cat(after)
            wanted = start + self.factor * (self.magnitude.double() - start)
            self._beyond = ((wanted - norm) / norm).to(base.dtype)
        return self._beyond

    def _outer(self, base: Tensor) -> Tensor:
        """Return diag(1 + c) B, the factor included, shape (out, rank)."""
        return (1 + self.beyond(base))[:, None] * (self.factor * self.b)

    def dense(self, base: Tensor) -> Tensor:
        """Return D multiplied out."""
        return self.beyond(base)[:, None] * base + self._outer(base) @ self.a

    def apply(self, inputs: Tensor, base: Tensor) -> Tensor:
        """Return D h for each row; see :meth:`Change.apply`."""
        return (inputs @ base.T) * self.beyond(base) + (inputs @ self.a.T) @ self._outer(base).T

    def scaled(self, factor: float) -> Change:
        """Return the change further along, or back on, the method's own path."""
        return Decomposed(self.b, self.a, self.magnitude, factor * self.factor)

    def to(self, dtype: torch.dtype) -> Change:
        """Return the change in another type."""
        return Decomposed(self.b.to(dtype), self.a.to(dtype), self.magnitude.to(dtype), self.factor)

    def projected(self, base: Tensor, svd: Svd) -> Projected:
        """Return D in the singular basis of W0 in O((out + in) k rank): D v_i = s_i (c u_i) + B' (A v_i)."""
        moved = self.beyond(base)[:, None] * svd.left * svd.values
        moved = moved.addmm_(self._outer(base), self.a @ svd.right.T)  # (out, k)
        return Projected((svd.left * moved).sum(0), lengths(moved))

    def norms(self, base: Tensor) -> Norms:
        """Return the norms of D, a block of rows at a time."""
        rows = max(1, AT_ONCE // self.shape[1])
        beyond, outer = self.beyond(base), self._outer(base)
        cut = zip(base.split(rows), beyond.split(rows), outer.split(rows), strict=True)
        return together(entry_norms((factor[:, None] * weight).addmm_(part, self.a)) for weight, factor, part in cut)


def row_lengths(weight: Tensor) -> Tensor:
    """Return the length of each row, shape (out,), float64 and summed in it."""
    parts = weight.split(max(1, AT_ONCE // weight.shape[1]))
    return torch.cat([torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in parts])


def together(parts: Iterable[Norms]) -> Norms:
    """Return the norms of a whole from those of its parts."""
    found = list(parts)
    return Norms(sum(part.l1 for part in found), math.sqrt(sum(part.l2**2 for part in found)))
