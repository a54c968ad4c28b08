"""Each form of a change against the same change multiplied out."""

import pytest
import torch

from peft_arena.methods.base import PathKind
from peft_arena.weights.change import Change, Dense, LowRank, Svd
from peft_arena.weights.planar import Planar
from peft_arena.weights.rescaled import Columns, Decomposed, Rows
from peft_arena.weights.rotation import Rotation, StretchedRotation

SHAPES = [(24, 24), (16, 32), (48, 24)]
FORMS = ["low-rank", "rotation", "one block", "series", "series of 2", "rows", "columns", "dora", "stretched", "planar"]


def weight(shape):
    torch.manual_seed(0)
    values = torch.logspace(0, -2, min(shape), dtype=torch.float64)
    left, _, right = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    return (left * values) @ right


def make(form: str, shape: tuple[int, int], base) -> Change:
    torch.manual_seed(1)
    out, inner = shape
    if form == "low-rank":
        return LowRank(0.1 * torch.randn(out, 3).double(), torch.randn(3, inner).double())
    if form == "dora":
        lengths = base.norm(dim=1) * (1 + 0.1 * torch.randn(out))
        return Decomposed(0.1 * torch.randn(out, 3).double(), torch.randn(3, inner).double(), lengths)
    if form in ("rows", "columns"):
        kind, size = (Rows, out) if form == "rows" else (Columns, inner)
        return kind(0.1 * torch.randn(size).double(), shape)
    if form == "planar":
        return Planar(0.2 * torch.randn(2, out).double(), 0.1 * torch.randn(2, out).double(), 4, shape)
    skew = 0.05 * torch.randn(1 if form == "one block" else inner // 8, 8, 8).double()
    terms = {"series": 5, "series of 2": 2}.get(form)
    rotation = Rotation(skew - skew.transpose(1, 2), terms, shape)
    return StretchedRotation(rotation, 0.1 * torch.randn(out).double()) if form == "stretched" else rotation


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("factor", [1.0, 0.4])
def test_structure_changes_no_number(form, shape, factor):
    base = weight(shape)
    svd = Svd(*torch.linalg.svd(base, full_matrices=False))
    change = make(form, shape, base).scaled(factor)
    plain = Dense(change.dense(base))
    near = {"rtol": 1e-9, "atol": 1e-10}
    for found, wanted in zip(change.projected(base, svd), plain.projected(base, svd), strict=True):
        torch.testing.assert_close(found, wanted, **near)
    values = change.singular_values(base, svd)
    wanted = torch.linalg.svdvals(plain.delta)
    torch.testing.assert_close(values, wanted[: len(values)], **near)
    assert float(wanted[len(values) :].sum()) < 1e-12
    torch.testing.assert_close(torch.tensor(change.norms(base)), torch.tensor(plain.norms(base)), **near)
    inputs = torch.randn(5, shape[1]).double()
    torch.testing.assert_close(change.apply(inputs, base), inputs @ plain.delta.T, **near)
    assert change.shape == shape


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_float32_agrees_with_float64(form, shape):
    exact = weight(shape)
    base = exact.float()
    exact = base.double()
    svd, svd64 = (Svd(*torch.linalg.svd(one, full_matrices=False)) for one in (base, exact))
    change = make(form, shape, exact)
    short, long = change.to(torch.float32), change.to(torch.float32).to(torch.float64)
    assert short.dense(base).dtype == torch.float32
    pairs = [
        (short.dense(base), long.dense(exact)),
        (short.singular_values(base, svd), long.singular_values(exact, svd64)),
        *zip(short.projected(base, svd), long.projected(exact, svd64), strict=True),
    ]
    for found, wanted in pairs:
        assert float((found - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())


@pytest.mark.parametrize("form", FORMS)
def test_path_starts_at_the_pretrained_weight(form):
    base = weight((16, 32))
    change = make(form, (16, 32), base)
    assert bool((change.scaled(0.0).dense(base) == 0).all())
    torch.testing.assert_close(change.scaled(0.5).scaled(2.0).dense(base), change.dense(base))


def test_only_rotations_give_singular_vectors():
    base = weight((16, 32))
    svd = Svd(*torch.linalg.svd(base, full_matrices=False))
    assert [form for form in FORMS if make(form, (16, 32), base).rotated(svd) is not None] == ["rotation", "one block"]


def test_rotated_singular_vectors_are_those_of_the_tuned_weight():
    base = weight((24, 24))
    svd = Svd(*torch.linalg.svd(base, full_matrices=False))
    change = make("rotation", (24, 24), base)
    tuned = torch.linalg.svd(base + change.dense(base), full_matrices=False)
    torch.testing.assert_close((change.rotated(svd) * tuned.Vh).sum(1).abs(), torch.ones(24).double())
    torch.testing.assert_close(tuned.S, svd.values)


def test_exact_rotation_stays_orthogonal_along_its_path_and_the_straight_line_does_not():
    change = make("rotation", (24, 24), None).to(torch.float32)
    one = torch.eye(24)
    gaps = []
    for factor in (0.25, 0.5, 1.0, 1.5):
        turned = one + change.scaled(factor).dense(one)
        gaps.append(float((turned.T @ turned - one).norm()))
    assert max(gaps) < 1e-5
    straight = one + 0.5 * change.dense(one)
    assert float((straight.T @ straight - one).norm()) > 1e-2


@pytest.mark.parametrize("form", FORMS)
def test_forms_say_how_their_path_goes(form):
    base = weight((16, 32))
    change = make(form, (16, 32), base)
    straight = 0.5 * change.dense(base)
    if form != "series of 2":  # 2 Q alone
        assert change.straight == bool(torch.allclose(change.scaled(0.5).dense(base), straight, rtol=1e-9, atol=1e-12))
    turns = form in ("rotation", "one block", "series", "series of 2", "stretched")
    assert (change.path is PathKind.CAYLEY) == turns == (change.orthogonality() is not None)
    root = change.by_root(0.25).dense(base)
    half, quarter = change.scaled(0.5).dense(base), change.scaled(0.25).dense(base)
    wanted = half if turns and form != "stretched" else quarter
    assert torch.equal(root, wanted) == (form != "stretched")


def test_the_root_of_the_factor_is_for_the_generator_alone():
    base = weight((16, 32))
    change = make("stretched", (16, 32), base)
    turned = change.rotation.scaled(0.5).dense(base)
    wanted = turned + 0.25 * change.beyond[:, None] * (base + turned)
    torch.testing.assert_close(change.by_root(0.25).dense(base), wanted)


@pytest.mark.parametrize("side", [32, 576])
@pytest.mark.parametrize("norm", [0.1, 1.0, 3.0])
def test_blocks_of_any_size_stay_orthogonal_in_float32(side, norm):
    skew = torch.randn(1, side, side, generator=torch.Generator().manual_seed(0))
    skew = skew - skew.transpose(1, 2)
    change = Rotation(norm * skew / skew.norm(), None, (side, side))
    for factor in (0.3, 1.0, 1.2):
        found = change.scaled(factor)
        turned = torch.eye(side, dtype=torch.float64) + found.dense(torch.eye(side)).double()
        wanted = float((turned.T @ turned - torch.eye(side)).norm())
        assert wanted <= 1e-5
        assert found.orthogonality() == pytest.approx(wanted, abs=1e-9)


def test_a_series_leaves_the_rotations_and_so_does_the_straight_way():
    plane = torch.zeros(1, 8, 8)
    plane[0, 0, 1], plane[0, 1, 0] = 1.0, -1.0
    by_series, exact = Rotation(plane, 5, (8, 8)), Rotation(plane, None, (8, 8))
    assert by_series.orthogonality() > 0.1 and exact.orthogonality() < 1e-6
    assert exact.orthogonality(0.5) == pytest.approx(0.5 * 2**0.5)  # a quarter turn in a plane: R^T R is 0.5 I there
    assert exact.orthogonality(0.0) == 0


def test_a_large_block_turned_far_is_still_a_rotation_in_float32():
    skew = 0.1 * torch.randn(1, 512, 512, generator=torch.Generator().manual_seed(0))
    skew = skew - skew.transpose(1, 2)
    turned = [
        Rotation(skew.to(dtype), None, (512, 512)).rotated(
            Svd(torch.eye(512, dtype=dtype), torch.ones(512, dtype=dtype), torch.eye(512, dtype=dtype))
        )
        for dtype in (torch.float32, torch.float64)
    ]
    torch.testing.assert_close(turned[0], turned[1].float(), atol=1e-5, rtol=0)


def test_small_rotation_keeps_its_digits():
    shape, base = (24, 24), weight((24, 24))
    change = make("rotation", shape, base).scaled(1e-4)
    exact, found = change.dense(base), change.to(torch.float32).dense(base.float())
    assert float((found - exact).norm() / exact.norm()) < 1e-6


def test_dora_at_a_tiny_change_keeps_its_digits():
    base = weight((24, 24)).float().double()
    change = Decomposed(1e-4 * torch.randn(24, 2), torch.randn(2, 24), base.norm(dim=1).float())
    exact = change.to(torch.float64).dense(base)
    assert float((change.dense(base.float()) - exact).norm() / exact.norm()) < 1e-4
