"""Strength of blocks against the same numbers from multiplied-out weights."""

import math

import pytest
import torch

from peft_arena.core.errors import UserError
from peft_arena.methods.targets import block_of
from peft_arena.paths.strength import block_strengths, refuses
from peft_arena.weights.adapter_directory import Changes
from peft_arena.weights.change import Dense
from peft_arena.weights.effective import EffectiveWeights
from peft_arena.weights.rotation import Rotation, StretchedRotation
from tests.paths.path_toys import BLOCKS, EMBEDDING, KINDS, NORM, multiplied_out, tuned, weight_of


def expected(weights, order):
    """Return by block the root mean square over all its linear layers of a ratio of matrix norms."""
    changes = multiplied_out(weights)
    found = {block: [] for block in range(BLOCKS)}
    for module in weights.modules():
        name = f"{module}.weight"
        size = [float(torch.linalg.matrix_norm(each, ord=order)) for each in (changes[name], weight_of(name))]
        found[block_of(name)].append((size[0] / size[1]) ** 2)
    assert all(len(squares) == 7 for squares in found.values())
    return {block: math.sqrt(sum(squares) / 7) for block, squares in found.items()}


@pytest.mark.parametrize("form", KINDS)
@pytest.mark.parametrize(("kind", "order"), [("relative_norm", "fro"), ("spectral", 2)])
def test_it_is_that_of_the_multiplied_out_change(form, kind, order):
    for weights in (tuned(form), tuned(form).interpolated(0.4), tuned(form).along("linear").interpolated(0.4)):
        found = block_strengths(weights, kind)
        assert found == pytest.approx(expected(weights, order), rel=2e-5)
        assert list(found) == list(range(BLOCKS))


def test_the_angle_is_that_of_the_eigenvalues_of_the_rotation():
    weights = tuned("rotation").interpolated(0.7)
    found = block_strengths(weights, "angle")
    for block in range(BLOCKS):
        squares = [0.0] * 5  # linear layers that are not turned
        for name in (f"model.layers.{block}.self_attn.q_proj", f"model.layers.{block}.mlp.up_proj"):
            change = weights.pair(name).change
            turned = torch.eye(8) + change.beyond
            angles = torch.linalg.eigvals(turned.double()).angle()
            squares.append(float(angles.square().mean()))
        assert found[block] == pytest.approx(math.sqrt(sum(squares) / 7), rel=1e-5)


def test_a_plane_turned_by_a_right_angle_has_that_strength():
    weights = tuned("rotation")
    quarter = torch.tensor([[[0.0, 1.0], [-1.0, 0.0]]])  # 2 arctan 1
    makers = {f"{name}.weight": lambda: Rotation(quarter, None, (32, 32)) for name in weights.modules()}
    weights = EffectiveWeights(weights.base_weights, Changes(makers, kind=KINDS["rotation"]))
    assert block_strengths(weights, "angle", blocks=[2]) == {2: pytest.approx(math.pi / 2)}


def test_rows_stretched_beside_a_rotation_have_no_angle():
    weights = tuned("rotation")
    beyond = {32: torch.full((32,), 0.5), 48: torch.full((48,), 0.5)}

    def stretched(maker):
        return lambda: StretchedRotation(maker(), beyond[maker().shape[0]])

    makers = {name: stretched(maker) for name, maker in weights.changes.makers.items()}
    both = EffectiveWeights(weights.base_weights, Changes(makers, kind=KINDS["rotation"]))
    assert block_strengths(both, "angle") == block_strengths(weights, "angle")
    assert refuses(both, "angle") == ""
    assert block_strengths(both) != pytest.approx(block_strengths(weights), rel=0.1)


@pytest.mark.parametrize("kind", ["relative_norm", "spectral", "angle"])
def test_blocks_that_are_not_touched_have_none(kind):
    weights = tuned("rotation", sizes=(0, 0.5, 0, 0, 0.5, 0), others={NORM: 0.1, EMBEDDING: 0.1})
    found = block_strengths(weights, kind)
    assert [block for block, strength in found.items() if strength > 0] == [1, 4]
    assert set(block_strengths(weights.interpolated(0.0), kind).values()) == {0.0}


def test_only_the_blocks_asked_for_are_measured():
    weights, read = tuned("low-rank"), []
    found = block_strengths(weights, blocks={4, 1}, progress=lambda fraction, name: read.append((fraction, name)))
    whole = block_strengths(weights)
    assert found == {1: whole[1], 4: whole[4]}
    assert len(read) == 15 and read[-1] == (1.0, "") and {block_of(name) for _, name in read[:-1]} == {1, 4}
    assert [fraction for fraction, _ in read] == sorted(fraction for fraction, _ in read)


def test_a_layer_of_zeros_has_no_relative_change_and_is_left_out():
    weights = tuned("dense")
    before, name = block_strengths(weights)[2], "model.layers.2.mlp.up_proj"
    base, change = weights.pair(name)
    share = float(change.delta.norm() / base.norm()) ** 2
    zero, read = torch.zeros(base.shape), weights.base_weights._read
    weights.base_weights._read = lambda asked: zero if asked == f"{name}.weight" else read(asked)
    assert block_strengths(weights)[2] == pytest.approx(math.sqrt((7 * before**2 - share) / 6), rel=1e-5)


def test_values_that_are_not_finite_are_refused_by_name():
    weights = tuned("dense")
    name = "model.layers.2.mlp.up_proj.weight"
    broken = Dense(torch.full(weights.base_weights.shapes[name], math.nan))
    weights = EffectiveWeights(weights.base_weights, Changes({**weights.changes.makers, name: lambda: broken}))
    with pytest.raises(UserError, match=r"model.layers.2.mlp.up_proj has values that are not finite"):
        block_strengths(weights)


def test_what_has_no_strength_is_said():
    nothing = EffectiveWeights(tuned("dense").base_weights, Changes())
    only_norms = tuned("dense", sizes=[0] * BLOCKS, others={NORM: 0.1})
    for weights in (nothing, only_norms):
        assert "no weight of a linear layer inside a transformer block" in refuses(weights, "relative_norm")
    assert refuses(tuned("low-rank"), "relative_norm") == refuses(tuned("rotation"), "angle") == ""
    assert "which the change of model.layers.0.self_attn.q_proj is not" in refuses(tuned("low-rank"), "angle")
    assert "the way linear leaves" in refuses(tuned("rotation").along("linear"), "angle")
    with pytest.raises(UserError, match="angle is for block rotations"):
        block_strengths(tuned("dora"), "angle")
