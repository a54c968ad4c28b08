"""Activation geometry: how a module's outputs at the same tokens differ between the pretrained and the tuned model.

X0 and X1 are matrices of the same shape (n, width), a row for each token: outputs of the pretrained and of the tuned
model. All sums are in float64. Definitions, and where they come from:

- Angles and norms of rows as they are, not centred, over the rows that are zero in neither matrix. An angle is
  2 atan2(||u - v||, ||u + v||) of unit vectors u, v (Kahan, 2006, How Futile are Mindless Assessments of Roundoff),
  which keeps its digits where arccos loses half of them; the spread of norm ratios is the population's.
- Gram distortion on rows of length one, not centred, evenly spaced rows where there are more than asked for. By
  Z1 Z1^T - Z0 Z0^T = M + M^T with M = (Z1 - Z0)(Z1 + Z0)^T / 2 one product is enough. A row of zeros stays one.
- Residuals, CKA and subspaces on matrices whose columns were centred, each by its own means.
- Procrustes residual: the least ||X1 R - X0||_F over orthogonal R squared is ||X1||_F^2 + ||X0||_F^2 - 2 ||X1^T X0||_*,
  with the sum of singular values last (Schoenemann, 1966, A Generalized Solution of the Orthogonal Procrustes Problem).
- Linear CKA: Kornblith et al., 2019, Similarity of Neural Network Representations Revisited.
- PCA distance of the spans of the first k principal directions: ||sin theta||_2 / sqrt(k) over their principal angles,
  computed as the part of one basis outside of the other's span. None if either matrix has fewer than k directions with
  a singular value above 1e-6 of the largest, which is what rounding to float32 leaves of nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peft_arena.core.quantities import PCA
from peft_arena.geometry.values import Values

RANK_TOLERANCE = 1e-6
"""Singular values below this share of the largest count as zero: the rows were rounded to float32."""
ANGULAR = (
    *("cosine", "cosine_drift", "angle_mean", "angle_median"),
    *("log_norm_ratio", "norm_ratio_mean", "norm_ratio_std"),
)
CENTRED = ("raw_residual", "procrustes_residual", "procrustes_improvement", "cka")


class Spread(NamedTuple):
    """A centred matrix X of outputs, as far as it is needed again."""

    energy: float
    """||X||_F^2; exactly 0 if all rows are the same."""
    similarity: float
    """||X^T X||_F."""
    rank: int
    """Singular values above :data:`RANK_TOLERANCE` of the largest; 0 where no subspace was asked for."""
    basis: Tensor
    """Principal directions in columns, the first ones first, as many as were asked for and are there."""


def centred(rows: Tensor) -> Tensor:
    """Return the rows minus their mean, float64; exact zeros if all rows are the same.

    Args:
        rows: shape (n, width).
    """
    wide = rows.double()
    if bool((rows == rows[:1]).all()):
        return torch.zeros_like(wide)
    return wide - wide.mean(0)


def spread(rows: Tensor, pca: Sequence[int]) -> Spread:
    """Return energy, similarity and principal directions of centred rows.

    Args:
        rows: centred, shape (n, width), float64.
        pca: dimensions of the subspaces that will be asked for; those the shape cannot have are ignored.
    """
    n, width = rows.shape
    tall = n >= width
    gram = rows.T @ rows if tall else rows @ rows.T  # (width, width) or (n, n)
    energy = float(gram.diagonal().sum())
    nothing = rows.new_zeros(width, 0)
    largest = max((k for k in pca if k <= min(n - 1, width)), default=0)
    if energy == 0 or largest == 0:
        return Spread(energy, float(gram.norm()), 0, nothing)
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0), vectors.flip(1)
    rank = int((values > RANK_TOLERANCE**2 * values[0]).sum())
    kept = min(largest, rank)
    basis = vectors[:, :kept]
    if not tall:
        basis = torch.linalg.qr(rows.T @ basis).Q
    return Spread(energy, float(gram.norm()), rank, basis.contiguous())


def subspace_distance(first: Tensor, second: Tensor) -> float:
    """Return ||sin theta||_2 / sqrt(k) of two subspaces: 0 if they are the same, 1 if orthogonal.

    Args:
        first: orthonormal columns, shape (width, k).
        second: the same.
    """
    outside = second - first @ (first.T @ second)
    return min(1.0, float(outside.norm()) / math.sqrt(first.shape[1]))


class Cross(NamedTuple):
    """What two centred matrices have in common."""

    squared: float
    """||X0^T X1||_F^2."""
    nuclear: float
    """Sum of the singular values of X0^T X1."""


def cross(base: Tensor, tuned: Tensor) -> Cross:
    """Return norms of X0^T X1, through matrices of the smaller of its sides and the number of rows.

    Args:
        base: X0, shape (n, width), float64.
        tuned: X1, the same shape.
    """
    n, width = base.shape
    if n >= width:
        product = base.T @ tuned
    else:  # X^T = Q T: the singular values are those of T0 T1^T
        product = torch.linalg.qr(base.T, mode="r").R @ torch.linalg.qr(tuned.T, mode="r").R.T
    return Cross(float(product.norm()) ** 2, float(torch.linalg.svdvals(product).sum()))


def angular(base: Tensor, tuned: Tensor) -> Values:
    """Return angles and ratios of lengths of rows.

    Args:
        base: X0, shape (n, width).
        tuned: X1, the same shape.
    """
    found = Values()
    first, second = base.double(), tuned.double()
    lengths, others = first.norm(dim=1), second.norm(dim=1)
    kept = (lengths > 0) & (others > 0)
    if not bool(kept.any()):
        found.absent(*ANGULAR, reason="no token has outputs that are not zero in both models")
        return found
    lengths, others = lengths[kept], others[kept]
    u, v = first[kept] / lengths[:, None], second[kept] / others[:, None]
    apart = (u - v).norm(dim=1)
    angles = 2 * torch.atan2(apart, (u + v).norm(dim=1))
    drift = float(apart.square().mean()) / 2
    ratio = others / lengths
    found.put("cosine", 1 - drift)
    found.put("cosine_drift", drift)
    found.put("angle_mean", float(angles.mean()))
    found.put("angle_median", float(angles.quantile(0.5)))
    found.put("log_norm_ratio", float(ratio.log().abs().mean()))
    found.put("norm_ratio_mean", float(ratio.mean()))
    found.put("norm_ratio_std", float(ratio.std(correction=0)))
    return found


def gram_distortion(base: Tensor, tuned: Tensor, tokens: int) -> float | None:
    """Return ||Z1 Z1^T - Z0 Z0^T||_F / ||Z0 Z0^T||_F of rows of length one; None if all of X0's rows are zero.

    Args:
        base: X0, shape (n, width).
        tuned: X1, the same shape.
        tokens: most rows to use; evenly spaced ones if there are more.
    """
    n = base.shape[0]
    kept = torch.arange(min(n, tokens)) * n // min(n, tokens)
    first, second = (unit_rows(rows[kept].double()) for rows in (base, tuned))
    whole = float((first.T @ first if first.shape[0] >= first.shape[1] else first @ first.T).norm())
    if whole == 0:
        return None
    half = (second - first).float() @ (second + first).float().T  # (m, m); what cancels was subtracted before
    return float(torch.linalg.vector_norm(half + half.T, dtype=torch.float64)) / 2 / whole


def unit_rows(rows: Tensor) -> Tensor:
    """Return the rows at length one; rows of zeros stay zero."""
    lengths = rows.norm(dim=1, keepdim=True)
    return torch.where(lengths > 0, rows / lengths.clamp_min(torch.finfo(rows.dtype).tiny), 0.0)


def activation_values(
    base: Tensor, tuned: Tensor, *, gram_tokens: int, pca: Sequence[int], known: Spread | None = None
) -> tuple[Values, Spread | None]:
    """Return every quantity of activation geometry of one module on one prompt set.

    Args:
        base: X0, shape (n, width), float32, on the CPU.
        tuned: X1, the same shape.
        gram_tokens: most rows of Gram matrices.
        pca: dimensions of principal subspaces.
        known: the spread of X0, if it was computed for another tuned model; with the same ``pca``.

    Returns:
        The values, and the spread of X0 for the next tuned model, None if there is none.
    """
    names = [*ANGULAR, "gram_distortion", *CENTRED, *(f"{PCA}{k}" for k in pca)]
    found = Values()
    for rows, which in ((base, "pretrained"), (tuned, "tuned")):
        if not bool(torch.isfinite(rows).all()):
            found.absent(*names, reason=f"outputs of the {which} model are not finite")
            return found, None
    found = angular(base, tuned)
    distortion = gram_distortion(base, tuned, gram_tokens)
    if distortion is None:
        found.absent("gram_distortion", reason="all outputs of the pretrained model are zero")
    else:
        found.put("gram_distortion", distortion)
    if base.shape[0] == 1:
        found.absent(*CENTRED, *(f"{PCA}{k}" for k in pca), reason="one token: nothing is left of it when centred")
        return found, None
    first, second = centred(base), centred(tuned)
    before = spread(first, pca) if known is None else known
    after = spread(second, pca)
    _residuals(found, first, second, before, after)
    for k in pca:
        _distance(found, k, (base.shape[0], base.shape[1]), before, after)
    return found, before


def _residuals(found: Values, base: Tensor, tuned: Tensor, before: Spread, after: Spread) -> None:
    """Enter the residuals and CKA of centred rows."""
    same = "all tokens have the same output in the {} model: nothing is left of it when centred"
    if before.energy == 0:
        found.absent(*CENTRED, reason=same.format("pretrained"))
        return
    shared = cross(base, tuned)
    raw = float((tuned - base).norm()) / math.sqrt(before.energy)
    left = max(0.0, before.energy + after.energy - 2 * shared.nuclear)
    residual = min(raw, math.sqrt(left / before.energy))  # R = I is one of the orthogonal matrices
    found.put("raw_residual", raw)
    found.put("procrustes_residual", residual)
    found.put("procrustes_improvement", raw - residual)
    if after.energy == 0:
        found.absent("cka", reason=same.format("tuned"))
    else:
        found.put("cka", min(1.0, shared.squared / (before.similarity * after.similarity)))


def _distance(found: Values, k: int, shape: tuple[int, int], before: Spread, after: Spread) -> None:
    """Enter the distance of the spans of the first k principal directions."""
    n, width = shape
    name = f"{PCA}{k}"
    if k > min(n - 1, width):
        found.absent(name, reason=f"{n} tokens of width {width} have at most {min(n - 1, width)} principal directions")
        return
    for side, which in ((before, "pretrained"), (after, "tuned")):
        if side.rank < k:
            found.absent(name, reason=f"outputs of the {which} model vary in {side.rank} directions only")
            return
    found.put(name, subspace_distance(before.basis[:, :k], after.basis[:, :k]))


class Divergence(NamedTuple):
    """Mean of a quantity over tokens, with the standard error over prompts."""

    mean: float
    stderr: float | None
    """None below two prompts."""


def forward_kl(base: Tensor, tuned: Tensor) -> Tensor:
    """Return KL(base || tuned) of the next token for each row, in nats, float64.

    Exponentials are float32, sums float64. With l the logits and p the base's probabilities it is
    sum p (l0 - l1) - logsumexp l0 + logsumexp l1, so that rounding of large logits cancels before anything is added.

    Args:
        base: logits of the pretrained model, shape (n, vocabulary), float32.
        tuned: logits of the tuned model, the same shape.
    """
    tops = [logits.max(dim=1, keepdim=True).values for logits in (base, tuned)]
    weights, others = ((logits - top).exp() for logits, top in zip((base, tuned), tops, strict=True))
    mass, other = (part.sum(1, dtype=torch.float64) for part in (weights, others))
    apart = (base - tuned).masked_fill_(weights == 0, 0.0)  # 0 log 0 is 0, also for what both models mask by -inf
    gap = (weights * apart).sum(1, dtype=torch.float64) / mass
    shift = (tops[1] - tops[0])[:, 0].double() + other.log() - mass.log()
    return (gap + shift).clamp_min(0)


def clustered(values: Tensor, owners: Tensor) -> Divergence:
    """Return the mean over tokens and its standard error, with the tokens of a prompt taken as one observation.

    The error is that of a mean of clusters: sqrt(G / (G - 1) sum_g (sum over t in g of (x_t - mean))^2) / n.

    Args:
        values: shape (n,), float64.
        owners: prompt of each token, shape (n,), integers.
    """
    mean = values.mean()
    _, which = owners.unique(return_inverse=True)
    count = int(which.max()) + 1
    if count < 2:
        return Divergence(float(mean), None)
    sums = values.new_zeros(count).index_add(0, which, values - mean)
    return Divergence(float(mean), math.sqrt(count / (count - 1) * float(sums.square().sum())) / values.numel())
