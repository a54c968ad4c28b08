"""The best approximation of a rank: by Eckart and Young, and the same from factors as from the matrix."""

import pytest
import torch

from peft_arena.weights.change import Dense, LowRank
from peft_arena.weights.low_rank import rank_within, truncated


def factors(seed=0):
    torch.manual_seed(seed)
    return LowRank(torch.randn(12, 5), torch.randn(5, 9))


@pytest.mark.parametrize("rank", [1, 3, 5, 8, 9, 40])
def test_factors_and_matrix_have_the_same_best_approximation(rank):
    change, base = factors(), torch.zeros(12, 9)
    exact = torch.linalg.svdvals(change.dense(base).double())
    for form in (change, Dense(change.dense(base))):
        best = truncated(form, base, rank)
        assert best.change.a.shape == (min(rank, 9), 9)
        left = float((best.change.dense(base) - change.dense(base)).double().norm())
        assert left == pytest.approx(float(exact[rank:].norm()), abs=1e-4)


def test_a_share_is_kept_by_as_few_directions_as_do():
    change = LowRank(torch.eye(4)[:, :3] * torch.tensor([3.0, 2.0, 1.0]), torch.eye(3, 6))  # squares 9, 4, 1
    ranks = {share: truncated(change, torch.zeros(4, 6), share).change.a.shape[0] for share in (0.1, 0.64, 0.65, 0.95)}
    assert ranks == {0.1: 1, 0.64: 1, 0.65: 2, 0.95: 3}


def test_the_rank_within_a_limit_counts_all_changes_and_what_is_exact():
    spectra = [torch.tensor([3.0, 1.0]).double(), torch.tensor([2.0]).double()]  # squares 9 + 1 + 4
    assert rank_within(spectra, 0.0, 0.9) == 1
    assert rank_within(spectra, 0.0, (1 / 14) ** 0.5 + 1e-9) == 1
    assert rank_within(spectra, 0.0, (1 / 14) ** 0.5 - 1e-9) == 2
    assert rank_within(spectra, 86.0, 0.1 + 1e-9) == 1
    assert rank_within([], 0.0, 0.1) == 0
