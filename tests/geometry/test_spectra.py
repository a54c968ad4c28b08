"""Every spectral quantity against its formula, computed densely in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from peft_arena.core.quantities import QUANTITIES
from peft_arena.geometry.spectra import entropy_rank, fluctuation, moving_average, spectrum, stable_rank
from peft_arena.weights.change import Change, Dense, LowRank, entry_norms, singular_values
from peft_arena.weights.rotation import Rotation
from peft_arena.weights.svd import svd

SHAPES = [(40, 24), (24, 40), (24, 24)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def low_rank(shape: tuple[int, int], rank: int = 3) -> Change:
    return LowRank(0.1 * normal(shape[0], rank, seed=1), normal(rank, shape[1], seed=2))


def dense(shape: tuple[int, int]) -> Change:
    return Dense(0.1 * normal(*shape, seed=3))


def rotation(shape: tuple[int, int]) -> Change:
    skew = 0.1 * normal(shape[1] // 8, 8, 8, seed=4)
    return Rotation(skew - skew.transpose(1, 2), None, shape)


def truth(base: Tensor, delta: Tensor) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """The definitions, in numpy on whole matrices."""
    w0, d = base.numpy(), delta.numpy()
    u, s, vt = np.linalg.svd(w0, full_matrices=False)
    _, _, turned = np.linalg.svd(w0 + d, full_matrices=False)
    kept = np.diag(u.T @ (w0 + d) @ vt.T)
    moved = np.linalg.norm(d @ vt.T, axis=0)
    values = np.linalg.svd(d, compute_uv=False)
    shares = values[values > 1e-12 * values[0]] / values.sum()
    profiles = {
        "singular_value": s,
        "retention": kept,
        "deviation": np.abs(kept - s),
        "adaptation": moved,
        "alignment": np.abs((vt * turned).sum(1)),
        "change_singular_value": values,
    }
    scalars = {
        "stable_rank": (d**2).sum() / np.linalg.norm(d, 2) ** 2,
        "entropy_rank": math.exp(-(shares * np.log(shares)).sum()),
        "spectral_norm": np.linalg.norm(d, 2),
        "spectral_norm_relative": np.linalg.norm(d, 2) / np.linalg.norm(w0, 2),
        "deviation_mean": np.abs(kept - s).mean(),
        "retention_fluctuation": plain_fluctuation(kept),
        "adaptation_mean": moved.mean(),
        "adaptation_fluctuation": plain_fluctuation(moved),
        "alignment_mean": profiles["alignment"].mean(),
        "l1": np.abs(d).sum(),
        "l2": np.linalg.norm(d),
        "l1_relative": np.abs(d).sum() / np.abs(w0).sum(),
        "l2_relative": np.linalg.norm(d) / np.linalg.norm(w0),
    }
    return scalars, profiles


def plain_fluctuation(profile: np.ndarray) -> float:
    mirrored = np.pad(profile, 2, mode="reflect")
    average = np.array([mirrored[place : place + 5].mean() for place in range(len(profile))])
    return float(np.abs(profile - average).mean())


@pytest.mark.parametrize("form", [low_rank, dense, rotation])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_every_quantity_is_its_formula(form, shape, dtype, tolerance):
    base, change = normal(*shape), form(shape)
    scalars, profiles = truth(base, change.dense(base))
    held = base.to(dtype)
    found = spectrum(held, svd(held, dtype), change.to(dtype), alignment="all")
    assert set(found.scalars) == {name for name, known in QUANTITIES.items() if known.part in ("spectra", "norms")}
    assert not found.reasons
    assert found.scalars == pytest.approx(scalars, rel=tolerance)
    for name, expected in profiles.items():
        given = getattr(found, name)
        assert given.dtype == dtype and given.shape == (min(shape),)
        np.testing.assert_allclose(given.double().numpy(), expected, atol=tolerance * expected.max(), err_msg=name)


def test_alignment_is_free_only_for_rotations_and_the_same_as_by_a_second_decomposition():
    base = normal(24, 24)
    known = svd(base, torch.float64)
    assert spectrum(base, known, dense((24, 24))).alignment is None
    assert "alignment_mean" not in spectrum(base, known, low_rank((24, 24))).scalars
    change = rotation((24, 24))
    free = spectrum(base, known, change).alignment
    second = spectrum(base, known, Dense(change.dense(base)), alignment="all").alignment
    assert free is not None and second is not None
    torch.testing.assert_close(free, second)
    assert float(free.min()) < 0.99, "the rotation is too small to see"


@pytest.mark.parametrize("change", [Dense(torch.zeros(9, 6)), LowRank(torch.zeros(9, 2), torch.ones(2, 6))])
def test_a_zero_change_has_no_rank_and_says_why(change):
    base = normal(9, 6).float()
    found = spectrum(base, svd(base, torch.float32), change, alignment="all")
    assert found.scalars["stable_rank"] is None and found.scalars["entropy_rank"] is None
    assert found.reasons == dict.fromkeys(["stable_rank", "entropy_rank"], "the weight change is zero")
    for name in ("spectral_norm", "deviation_mean", "adaptation_mean", "l1", "l2", "l1_relative", "l2_relative"):
        assert found.scalars[name] == 0
    assert found.scalars["alignment_mean"] == pytest.approx(1)
    torch.testing.assert_close(found.retention, found.singular_value)


def test_relative_to_a_zero_weight_is_none():
    base = torch.zeros(6, 5)
    found = spectrum(base, svd(base, torch.float32), Dense(torch.ones(6, 5)))
    assert {name for name, value in found.scalars.items() if value is None} == {
        "spectral_norm_relative",
        "l1_relative",
        "l2_relative",
    }
    assert set(found.reasons.values()) == {"the pretrained parameter is zero"}
    assert found.scalars["adaptation_mean"] is not None and math.isfinite(found.scalars["adaptation_mean"])


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (2, 7), (7, 2)])
def test_few_directions_have_no_moving_average(shape):
    base = normal(*shape)
    delta = dense(shape).dense(base)
    values = torch.linalg.svdvals(delta)
    expected = {
        "stable_rank": float(values.square().sum() / values[0] ** 2),
        "spectral_norm": float(values[0]),
        "l1": float(delta.abs().sum()),
        "l2_relative": float(delta.norm() / base.norm()),
    }
    found = spectrum(base, svd(base, torch.float64), Dense(delta), alignment="all")
    assert found.scalars["retention_fluctuation"] is None and found.scalars["adaptation_fluctuation"] is None
    assert set(found.reasons) == {"retention_fluctuation", "adaptation_fluctuation"}
    for name, value in expected.items():
        assert found.scalars[name] == pytest.approx(value), name


@pytest.mark.parametrize("rank", [1, 5, 40])
@pytest.mark.parametrize("deficient", [False, True])
def test_low_rank_changes_of_any_rank_are_as_dense_ones(rank, deficient):
    b, a = normal(20, rank, seed=5), normal(rank, 12, seed=6)
    if deficient:
        b[:, -1] = b[:, 0]
        a[-1] = a[0]
    base = normal(20, 12)
    known = svd(base.float(), torch.float32)
    factors = spectrum(base.float(), known, LowRank(b.float(), a.float()))
    whole = spectrum(base, svd(base, torch.float64), Dense(b @ a))
    assert factors.scalars == pytest.approx(whole.scalars, rel=1e-4)
    largest = float(whole.change_singular_value[0])
    torch.testing.assert_close(
        factors.change_singular_value.double(), whole.change_singular_value, atol=1e-6 * largest, rtol=0
    )


def test_factors_that_cancel_are_a_zero_change():
    column = torch.ones(6, 1)
    change = LowRank(torch.cat([column, -column], 1), torch.ones(2, 4))
    base = normal(6, 4).float()
    assert spectrum(base, svd(base, torch.float32), change).scalars["l2"] == 0


def test_moving_average_mirrors_without_repeating_the_end():
    profile = torch.tensor([1.0, 2.0, 4.0, 8.0])
    average = moving_average(profile)
    assert average is not None
    expected = [(4 + 2 + 1 + 2 + 4) / 5, (2 + 1 + 2 + 4 + 8) / 5, (1 + 2 + 4 + 8 + 4) / 5, (2 + 4 + 8 + 4 + 2) / 5]
    torch.testing.assert_close(average, torch.tensor(expected))
    assert moving_average(profile[:2]) is None and fluctuation(profile[:2]) is None
    assert fluctuation(torch.ones(3)) == 0


def test_ranks_of_known_spectra():
    assert stable_rank(torch.tensor([2.0, 2.0, 0.0])) == pytest.approx(2)
    assert entropy_rank(torch.tensor([2.0, 2.0, 0.0])) == pytest.approx(2)
    assert stable_rank(torch.tensor([2.0, 1.0])) == pytest.approx(1.25)
    assert entropy_rank(torch.tensor([3.0, 1.0])) == pytest.approx(
        math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    )
    assert stable_rank(torch.tensor([1e-30, 1e-30])) == pytest.approx(2), "small changes must not underflow"
    assert stable_rank(torch.zeros(0)) is None and entropy_rank(torch.zeros(3)) is None


@pytest.mark.parametrize("shape", [(60, 30), (30, 60)])
def test_float32_singular_values_are_as_exact_as_float32_allows(shape):
    spread = torch.logspace(0, -6, 30, dtype=torch.float64)
    left = torch.linalg.qr(normal(shape[0], 30, seed=7)).Q
    right = torch.linalg.qr(normal(shape[1], 30, seed=8)).Q
    matrix = ((left * spread) @ right.T).float()
    exact = torch.linalg.svdvals(matrix.double())
    assert float((singular_values(matrix).double() - exact).abs().max()) < 2e-7


def test_norms_of_large_matrices_are_exact():
    values = torch.rand(3000, 1000, generator=torch.Generator().manual_seed(0))
    found = entry_norms(values)
    assert found.l1 == pytest.approx(float(values.double().sum()), rel=1e-6)
    assert found.l2 == pytest.approx(float(values.double().square().sum().sqrt()), rel=1e-6)
