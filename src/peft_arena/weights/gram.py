"""Singular values and vectors of float32 matrices from a Gram matrix in float64.

A product of two float32 numbers is exact in float64, so the Gram matrix of a float32 matrix is known to about 1e-16 of
its largest entry and a singular value s to about 1e-16 s_max / s of the largest: at worst 1e-8 of it, where a float32
decomposition by LAPACK is off by 1e-7 of it everywhere. The eigenproblem has the size of the smaller side only.
Importing this module imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

AT_ONCE = 2**22
"""Most entries of a matrix that are held in float64 at the same time."""
BLOCKS = 4
"""Of columns; a Gram matrix is symmetric, and so many blocks save three eighths of its products."""
TAIL = 16
"""Of the smallest singular directions so many are checked: errors grow towards the small end."""
ORTHONORMAL = 2e-6
"""Largest error of a product of two singular vectors; that of LAPACK in float32 is as large."""


class Thin(NamedTuple):
    """Singular values and vectors of a matrix whose longer side comes first."""

    long: Tensor
    """Of the longer side, as columns, shape (long, k)."""
    values: Tensor
    """Shape (k,), descending."""
    short: Tensor
    """Of the shorter side, as columns, shape (k, k)."""


def suits(matrix: Tensor) -> bool:
    """Say whether the Gram matrix is the better way: a float32 matrix with entries, where float64 is there and fast."""
    return matrix.dtype == torch.float32 and matrix.device.type == "cpu" and min(matrix.shape) > 0


def values_by_gram(matrix: Tensor) -> Tensor:
    """Return the singular values of a float32 matrix, descending, each within about 1e-8 of the largest.

    Args:
        matrix: any shape (rows, columns) without a side of zero.

    Returns:
        float32, shape (min(rows, columns),).
    """
    squares: Tensor = torch.linalg.eigvalsh(_gram(_tall(matrix)), UPLO="U")
    return squares.flip(0).clamp_min(0).sqrt().to(matrix.dtype)


def svd_by_gram(matrix: Tensor) -> Thin | None:
    """Return the thin singular value decomposition of a float32 matrix, correct to float32 rounding.

    Args:
        matrix: shape (long, k), long >= k.

    Returns:
        float32 tensors; None if a singular value is so small beside the largest that the vectors of the longer side,
        W v / s, are not orthonormal to :data:`ORTHONORMAL`.
    """
    gram = _gram(matrix)
    squares, short = torch.linalg.eigh(gram, UPLO="U")
    del gram
    if not squares[0] > 0:
        return None
    short = short.flip(1)
    long = torch.empty_like(matrix, memory_format=torch.contiguous_format)
    lengths = torch.zeros_like(squares)
    for rows, part in _parts(matrix):
        moved = part @ short
        lengths += torch.linalg.vector_norm(moved, dim=0).square()
        long[rows] = moved.to(matrix.dtype)
        del moved
    values = lengths.sqrt()
    if not values.min() > 0:
        return None
    if not _orthonormal(matrix, short, values):
        return None
    found = values.to(matrix.dtype)
    return Thin(long.div_(found), found, short.to(matrix.dtype))


def _orthonormal(matrix: Tensor, short: Tensor, values: Tensor) -> bool:
    """Say whether the smallest directions of the longer side are at right angles to all of that side."""
    tail = min(TAIL, values.shape[0])
    products = values.new_zeros(tail, values.shape[0])
    for _, part in _parts(matrix):
        products += (part @ (short[:, -tail:] / values[-tail:])).T @ part @ (short / values)
    products[:, -tail:] -= torch.eye(tail, dtype=products.dtype)
    return bool(products.abs().max() < ORTHONORMAL)


def _gram(matrix: Tensor) -> Tensor:
    """Return the products of the columns in float64, shape (k, k): the upper triangle, in blocks, and no more."""
    size = matrix.shape[1]
    total = matrix.new_zeros(size, size, dtype=torch.float64)
    edges = [size * part // BLOCKS for part in range(BLOCKS + 1)]
    for _, part in _parts(matrix):
        for start, stop in pairwise(edges):
            total[start:stop, start:] += part[:, start:stop].T @ part[:, start:]
    return total


def _tall(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T


def _parts(matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of rows in float64."""
    size = max(1, AT_ONCE // matrix.shape[1])
    for start in range(0, matrix.shape[0], size):
        rows = slice(start, min(start + size, matrix.shape[0]))
        yield rows, matrix[rows].double()
