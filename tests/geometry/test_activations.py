"""Activation geometry against plain formulas in float64, and where nothing can be said."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from peft_arena.core.quantities import quantity_of
from peft_arena.geometry.activations import activation_values, clustered, cross, forward_kl, subspace_distance

PCA = (2, 5)


def rows(seed: int, n: int = 60, width: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(n, width, generator=generator) @ torch.randn(width, width, generator=generator)
    return mixed + torch.randn(width, generator=generator)


def rotation(width: int, seed: int = 5) -> Tensor:
    return torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(seed)).double()).Q


def plain(base: Tensor, tuned: Tensor, gram_tokens: int, pca: tuple[int, ...]) -> dict[str, float]:
    """Every quantity by its textbook formula: full SVDs, dense Gram matrices, arccos."""
    x0, x1 = base.double(), tuned.double()
    cosine = torch.nn.functional.cosine_similarity(x0, x1, dim=1)
    angle = cosine.clamp(-1, 1).arccos()
    ratio = x1.norm(dim=1) / x0.norm(dim=1)
    found = {
        "cosine": cosine.mean(),
        "cosine_drift": 1 - cosine.mean(),
        "angle_mean": angle.mean(),
        "angle_median": angle.quantile(0.5),
        "log_norm_ratio": ratio.log().abs().mean(),
        "norm_ratio_mean": ratio.mean(),
        "norm_ratio_std": (ratio - ratio.mean()).square().mean().sqrt(),
    }
    n = len(x0)
    kept = [place * n // min(n, gram_tokens) for place in range(min(n, gram_tokens))]
    z0, z1 = (x[kept] / x[kept].norm(dim=1, keepdim=True) for x in (x0, x1))
    found["gram_distortion"] = (z1 @ z1.T - z0 @ z0.T).norm() / (z0 @ z0.T).norm()
    c0, c1 = x0 - x0.mean(0), x1 - x1.mean(0)
    found["raw_residual"] = (c1 - c0).norm() / c0.norm()
    left, _, right = torch.linalg.svd(c1.T @ c0)
    found["procrustes_residual"] = (c1 @ (left @ right) - c0).norm() / c0.norm()
    found["procrustes_improvement"] = found["raw_residual"] - found["procrustes_residual"]
    found["cka"] = (c0.T @ c1).norm() ** 2 / ((c0.T @ c0).norm() * (c1.T @ c1).norm())
    v0, v1 = (torch.linalg.svd(c, full_matrices=False).Vh for c in (c0, c1))
    for k in pca:
        cosines = torch.linalg.svdvals(v0[:k] @ v1[:k].T).clamp(max=1)
        found[f"pca_distance_{k}"] = (1 - cosines.square()).sum().sqrt() / math.sqrt(k)
    return {name: float(value) for name, value in found.items()}


@pytest.mark.parametrize(("n", "width"), [(60, 12), (9, 40), (12, 12)])
@pytest.mark.parametrize("size", [1.0, 1e-2])
def test_every_quantity_is_that_of_its_formula(n, width, size):
    base = rows(1, n, width)
    tuned = base + size * rows(2, n, width)
    found, spread = activation_values(base, tuned, gram_tokens=7, pca=PCA)
    wanted = plain(base, tuned, 7, PCA)
    assert found.values == pytest.approx(wanted, rel=1e-5, abs=1e-9)
    assert found.reasons == {}
    assert all(quantity_of(name).part == "activations" for name in wanted)
    again, _ = activation_values(base, tuned, gram_tokens=7, pca=PCA, known=spread)
    assert again.values == found.values


def test_a_matrix_against_itself_is_exactly_the_same():
    found, _ = activation_values(rows(1), rows(1), gram_tokens=1024, pca=PCA)
    exact = {"cosine": 1, "cka": 1, "norm_ratio_mean": 1}
    for name, value in found.values.items():
        assert value == pytest.approx(exact.get(name, 0), abs=1e-12), name


@pytest.mark.parametrize(("n", "width"), [(60, 12), (9, 40)])
def test_an_exact_rotation_leaves_no_procrustes_residual(n, width):
    base = rows(1, n, width)
    tuned = (base.double() @ rotation(width)).float()
    found, _ = activation_values(base, tuned, gram_tokens=1024, pca=PCA)
    assert found.values["raw_residual"] > 0.5
    assert found.values["procrustes_residual"] < 1e-6
    assert found.values["cka"] == pytest.approx(1, abs=1e-6)
    assert found.values["gram_distortion"] < 1e-6


def test_small_angles_keep_their_digits():
    base, tuned = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 3e-6]])
    found, _ = activation_values(base, tuned, gram_tokens=2, pca=())
    assert found.values["angle_mean"] == pytest.approx(3e-6, rel=1e-6)
    assert found.values["cosine_drift"] == pytest.approx(4.5e-12, rel=1e-6)


def test_one_token_has_angles_but_nothing_that_is_centred():
    found, spread = activation_values(rows(1, 1), rows(2, 1), gram_tokens=1024, pca=PCA)
    assert found.values["angle_mean"] > 0
    assert {"raw_residual", "procrustes_residual", "cka", "pca_distance_2"} <= set(found.reasons)
    assert "one token" in found.reasons["cka"]
    assert spread is None


def test_rows_that_are_all_the_same():
    constant = rows(1, 1).expand(20, 12) * 0.1
    found, _ = activation_values(constant, rows(2, 20), gram_tokens=8, pca=PCA)
    assert {name for name, value in found.values.items() if value is None} == {
        *("raw_residual", "procrustes_residual", "procrustes_improvement", "cka", "pca_distance_2", "pca_distance_5")
    }
    assert "pretrained" in found.reasons["cka"]
    other, _ = activation_values(rows(2, 20), constant, gram_tokens=8, pca=PCA)
    assert other.values["procrustes_residual"] == pytest.approx(1)  # nothing can be turned into what there is
    assert other.values["cka"] is None
    assert "tuned" in other.reasons["cka"]


def test_rows_of_zeros_have_no_angle_and_are_left_out():
    base, tuned = rows(1), rows(2)
    base[3] = 0
    tuned[5] = 0
    found, _ = activation_values(base, tuned, gram_tokens=1024, pca=PCA)
    kept = [place for place in range(60) if place not in (3, 5)]
    assert found.values["angle_mean"] == pytest.approx(plain(base[kept], tuned[kept], 99, ())["angle_mean"])
    assert all(value is not None for value in found.values.values())
    nothing, _ = activation_values(torch.zeros(4, 3), torch.ones(4, 3), gram_tokens=4, pca=(1,))
    assert all(value is None for value in nothing.values.values())
    assert set(nothing.reasons) == set(nothing.values)


def test_input_of_low_rank_has_no_more_principal_directions_than_that():
    thin = rows(1, 60, 3) @ rows(3, 3, 12)
    found, _ = activation_values(thin, rows(2), gram_tokens=64, pca=(2, 3, 5, 60))
    assert found.values["pca_distance_2"] is not None and found.values["pca_distance_3"] is not None
    assert "3 directions" in found.reasons["pca_distance_5"]
    assert "at most 12" in found.reasons["pca_distance_60"]
    assert found.values["procrustes_residual"] == pytest.approx(plain(thin, rows(2), 64, ())["procrustes_residual"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_outputs_that_are_not_finite_give_no_values(bad):
    broken = rows(2)
    broken[0, 0] = bad
    found, _ = activation_values(rows(1), broken, gram_tokens=64, pca=PCA)
    assert set(found.values.values()) == {None}
    assert "tuned model are not finite" in found.reasons["cka"]


def test_the_sides_of_the_cross_product_are_interchangeable():
    base, tuned = rows(1, 12, 12).double(), rows(2, 12, 12).double()
    square, wide = cross(base, tuned), cross(*(torch.cat([x, torch.zeros(12, 5).double()], 1) for x in (base, tuned)))
    assert wide == pytest.approx(square)


def test_distances_of_known_subspaces():
    eye = torch.eye(4, dtype=torch.float64)
    assert subspace_distance(eye[:, :2], eye[:, :2]) == 0
    assert subspace_distance(eye[:, :2], eye[:, 2:]) == 1
    assert subspace_distance(eye[:, :2], eye[:, [0, 2]]) == pytest.approx(math.sqrt(0.5))


def test_divergence_is_that_of_the_distributions():
    base, tuned = 5 * rows(1, 6, 40), 5 * rows(2, 6, 40)
    p, q = (logits.double().log_softmax(1) for logits in (base, tuned))
    torch.testing.assert_close(forward_kl(base, tuned), (p.exp() * (p - q)).sum(1), rtol=1e-6, atol=1e-9)
    assert forward_kl(base, base).tolist() == [0.0] * 6
    shifted = forward_kl(base, base + 100)
    assert shifted.max() < 1e-5  # a constant changes no distribution; float32 rounds the sum
    small = base + 1e-3 * rows(3, 6, 40)
    p, q = (logits.double().log_softmax(1) for logits in (base, small))
    torch.testing.assert_close(forward_kl(base, small), (p.exp() * (p - q)).sum(1), rtol=1e-4, atol=1e-9)


def test_masked_entries_of_a_vocabulary_do_not_diverge():
    base, tuned = 5 * rows(1, 6, 40), 5 * rows(2, 6, 40)
    wanted = forward_kl(base, tuned)
    masked = torch.full((6, 3), -math.inf)
    both = forward_kl(torch.cat([base, masked], 1), torch.cat([tuned, masked], 1))
    torch.testing.assert_close(both, wanted)
    open_again = forward_kl(torch.cat([base, masked], 1), torch.cat([tuned, masked.clamp_min(-1e4)], 1))
    torch.testing.assert_close(open_again, wanted)
    closed = forward_kl(torch.cat([base, masked.clamp_min(0)], 1), torch.cat([tuned, masked], 1))
    assert closed.isinf().all()


def test_the_error_of_a_mean_takes_a_prompt_as_one_observation():
    values = torch.tensor([1.0, 3.0, 2.0, 6.0, 5.0], dtype=torch.float64)
    owners = torch.tensor([0, 0, 4, 7, 7])
    found = clustered(values, owners)
    mean = 17 / 5
    sums = [(1 - mean) + (3 - mean), 2 - mean, (6 - mean) + (5 - mean)]
    assert found.mean == pytest.approx(mean)
    assert found.stderr == pytest.approx(math.sqrt(3 / 2 * sum(s * s for s in sums)) / 5)
    each = clustered(values, torch.arange(5))
    assert each.stderr == pytest.approx(float(values.std()) / math.sqrt(5))
    assert clustered(values, torch.zeros(5, dtype=torch.long)).stderr is None
