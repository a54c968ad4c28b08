"""The change of one weight in the form its method gives it, never multiplied out unless that is asked for.

Everywhere W0 is the pretrained weight of shape (out, in), W1 the tuned one, D = W1 - W0, and W0 = U diag(s) V^T its
thin singular value decomposition, k = min(out, in). Each form answers the same few questions about D as cheaply as its
structure allows. All tensors have one type, float32 or float64; importing this module imports torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from peft_arena.core.errors import UserError
from peft_arena.methods.base import PathKind
from peft_arena.weights.gram import suits, values_by_gram

AT_ONCE = 2**17
"""Entries that are multiplied out, or added up, at the same time: they stay in a processor's cache."""


class Svd(NamedTuple):
    """Thin singular value decomposition of a weight of shape (out, in)."""

    left: Tensor
    """U, shape (out, k)."""
    values: Tensor
    """s, shape (k,), descending."""
    right: Tensor
    """V^T, shape (k, in)."""


class Projected(NamedTuple):
    """A change seen in the singular basis of the pretrained weight."""

    diagonal: Tensor
    """u_i^T D v_i, shape (k,)."""
    lengths: Tensor
    """||D v_i||_2, shape (k,)."""


class Norms(NamedTuple):
    """Entrywise norms of a change."""

    l1: float
    l2: float


class Change(ABC):
    """Tuned minus pretrained weight, D."""

    path: ClassVar[PathKind]
    """Along what :meth:`scaled` goes."""
    straight: ClassVar[bool] = False
    """Whether :meth:`scaled` is a factor times D."""
    shape: tuple[int, ...]
    """Of the weight: (out, in) for linear layers."""

    @abstractmethod
    def dense(self, base: Tensor) -> Tensor:
        """Return D multiplied out.

        Args:
            base: W0, of :attr:`shape`.
        """

    @abstractmethod
    def apply(self, inputs: Tensor, base: Tensor) -> Tensor:
        """Return D h for each row h.

        Args:
            inputs: shape (n, in).
            base: W0.

        Returns:
            Shape (n, out).
        """

    @abstractmethod
    def scaled(self, factor: float) -> Change:
        """Return the change at a factor along the method's own path: 0 the pretrained weight, 1 this change."""

    def by_root(self, factor: float) -> Change:
        """Return the same with a rotation's generator scaled by the square root of the factor, all else by the factor.

        Args:
            factor: at least 0.
        """
        return self.scaled(factor)

    def orthogonality(self, share: float = 1.0) -> float | None:
        """Return the largest ||R^T R - I||_F of the blocks of a rotation R, summed in float64; None if it has none.

        Args:
            share: measure I + share (R - I) instead: R on the straight way to it.
        """
        return None

    @abstractmethod
    def to(self, dtype: torch.dtype) -> Change:
        """Return the change in another type."""

    def projected(self, base: Tensor, svd: Svd) -> Projected:
        """Return D in the singular basis of W0; only the products the diagonal needs."""
        moved = self.dense(base) @ svd.right.T  # (out, k)
        return Projected((svd.left * moved).sum(0), lengths(moved))

    def singular_values(self, base: Tensor, svd: Svd) -> Tensor:
        """Return the singular values of D, descending: as many as D can have that are not zero, at most k."""
        return singular_values(self.dense(base))

    def norms(self, base: Tensor) -> Norms:
        """Return the entrywise L1 and L2 norms of D."""
        return entry_norms(self.dense(base))

    def rotated(self, svd: Svd) -> Tensor | None:
        """Return the right singular vectors of W1 as rows, in the order of W0's, where the form gives them for nothing.

        None for all forms but exact rotations.
        """
        return None


class Dense(Change):
    """A change without a structure that is known, or a vector's."""

    path: ClassVar[PathKind] = PathKind.LINEAR
    straight: ClassVar[bool] = True

    def __init__(self, delta: Tensor) -> None:
        """Hold D, of any shape."""
        self.delta = delta
        self.shape = tuple(delta.shape)

    def dense(self, base: Tensor) -> Tensor:
        """Return D."""
        return self.delta

    def apply(self, inputs: Tensor, base: Tensor) -> Tensor:
        """Return D h for each row; see :meth:`Change.apply`."""
        return inputs @ self.delta.T

    def scaled(self, factor: float) -> Change:
        """Return factor D."""
        return Dense(factor * self.delta)

    def to(self, dtype: torch.dtype) -> Change:
        """Return the change in another type."""
        return Dense(self.delta.to(dtype))


class LowRank(Change):
    """D = B A."""

    path: ClassVar[PathKind] = PathKind.LINEAR
    straight: ClassVar[bool] = True

    def __init__(self, b: Tensor, a: Tensor) -> None:
        """Hold the factors, every scale multiplied in.

        Args:
            b: shape (out, rank).
            a: shape (rank, in).
        """
        if b.shape[1] != a.shape[0]:
            raise UserError(f"factors of shapes {tuple(b.shape)} and {tuple(a.shape)} have no product")
        self.b, self.a = b, a
        self.shape = (b.shape[0], a.shape[1])

    def dense(self, base: Tensor) -> Tensor:
        """Return B A."""
        return self.b @ self.a

    def apply(self, inputs: Tensor, base: Tensor) -> Tensor:
        """Return B (A h) for each row; see :meth:`Change.apply`."""
        return (inputs @ self.a.T) @ self.b.T

    def scaled(self, factor: float) -> Change:
        """Return (factor B) A."""
        return LowRank(factor * self.b, self.a)

    def joined(self, other: LowRank) -> LowRank:
        """Return the sum of two changes by their factors side by side, of the sum of their ranks."""
        return LowRank(torch.cat([self.b, other.b], dim=1), torch.cat([self.a, other.a], dim=0))

    def to(self, dtype: torch.dtype) -> Change:
        """Return the change in another type."""
        return LowRank(self.b.to(dtype), self.a.to(dtype))

    @cached_property
    def triangle(self) -> Tensor:
        """R of B = Q R, shape (min(out, rank), rank): lengths of B x are those of R x."""
        found: Tensor = torch.linalg.qr(self.b, mode="r").R
        return found

    def projected(self, base: Tensor, svd: Svd) -> Projected:
        """Return D in the singular basis of W0 in O((out + in) k rank)."""
        inner = self.a @ svd.right.T  # (rank, k)
        diagonal = ((self.b.T @ svd.left) * inner).sum(0)
        return Projected(diagonal, lengths(self.triangle @ inner))

    def singular_values(self, base: Tensor, svd: Svd) -> Tensor:
        """Return the singular values of B A, as many as its rank at most: those of the factors' triangles' product."""
        second = torch.linalg.qr(self.a.T, mode="r").R
        values: Tensor = torch.linalg.svdvals(self.triangle @ second.T)
        return values

    def norms(self, base: Tensor) -> Norms:
        """Return the norms of D, a block of rows at a time."""
        rows = max(1, AT_ONCE // self.shape[1])
        parts = [entry_norms(part @ self.a, spent=True) for part in self.b.split(rows)]
        return Norms(sum(part.l1 for part in parts), sum(part.l2**2 for part in parts) ** 0.5)


def together(change: Change, extra: LowRank, base: Tensor) -> Change:
    """Return the sum of a change and a low-rank one: low-rank again if both are, else multiplied out.

    Args:
        change: of any form.
        extra: of the same shape.
        base: W0.
    """
    return change.joined(extra) if isinstance(change, LowRank) else Dense(change.dense(base) + extra.dense(base))


def entry_norms(tensor: Tensor, *, spent: bool = False) -> Norms:
    """Return the entrywise L1 and L2 norms of a tensor of any shape.

    A block at a time: torch's own norm of a float32 matrix of 28 million entries is wrong by one part in a thousand,
    because it adds them up one after the other in float32.

    Args:
        tensor: finite or not.
        spent: it is not needed any more, and may be written over.
    """
    l1 = squares = 0.0
    for part in tensor.reshape(-1).split(AT_ONCE):
        squares += float(part.dot(part))
        l1 += float((part.abs_() if spent else part.abs()).sum())
    return Norms(l1, squares**0.5)


def lengths(columns: Tensor) -> Tensor:
    """Return the length of each column, shape (k,); torch's sum adds in a tree, its norm one after the other."""
    return columns.square().sum(0).sqrt()


def singular_values(matrix: Tensor) -> Tensor:
    """Return the singular values of a dense matrix, descending, without its singular vectors.

    In float32 each is within about 1e-7 of the largest: by the Gram matrix in float64 where that is to be had, which
    is faster than LAPACK and no less exact. In float64 by LAPACK.
    """
    values: Tensor = values_by_gram(matrix) if suits(matrix) else torch.linalg.svdvals(matrix)
    return values
