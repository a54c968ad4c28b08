"""Decompositions and finished pieces kept on disk: whole or made anew, and never a reason to fail."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from peft_arena.assets import wheel_files as assets
from peft_arena.geometry.parts import Parts
from peft_arena.weights import svd as module
from peft_arena.weights.svd import SvdCache, default_root, svd


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spread(shape: tuple[int, int], smallest: float) -> Tensor:
    """A matrix whose singular values go from one to the smallest given."""
    size = min(shape)
    left, right = (torch.linalg.qr(matrix(side, size, seed=side).double()).Q for side in shape)
    return ((left * torch.logspace(0, np.log10(smallest), size, dtype=torch.float64)) @ right.T).float()


def worst(found: module.Svd, weight: Tensor) -> float:
    one = torch.eye(found.values.shape[0], dtype=torch.float64)
    left, values, right = (part.double() for part in found)
    errors = (left.T @ left - one, right @ right.T - one, ((left * values) @ right - weight.double()) / values[0])
    return max(float(error.abs().max()) for error in errors)


@pytest.mark.parametrize("shape", [(50, 20), (20, 50), (20, 20), (1, 5), (5, 1)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.float64, 1e-12)])
def test_a_decomposition_is_one(shape, dtype, tolerance):
    weight = matrix(*shape)
    found = svd(weight, dtype)
    assert [part.shape for part in found] == [(shape[0], min(shape)), (min(shape),), (min(shape), shape[1])]
    assert all(part.dtype == dtype and part.is_contiguous() for part in found)
    assert worst(found, weight) < tolerance
    exact = torch.linalg.svdvals(weight.double())
    assert float((found.values.double() - exact).abs().max()) <= tolerance * float(exact[0])


@pytest.mark.parametrize("smallest", [1e-3, 1e-5, 1e-6, 1e-7, 1e-12])
@pytest.mark.parametrize("shape", [(60, 30), (30, 60)])
def test_ill_conditioned_weights_keep_orthonormal_vectors(shape, smallest):
    weight = spread(shape, smallest)
    assert worst(svd(weight, torch.float32), weight) < 5e-6


def test_singular_weights_are_decomposed_too():
    weight = matrix(12, 3) @ matrix(3, 8, seed=1)
    assert worst(svd(weight, torch.float32), weight) < 5e-6
    left, values, right = svd(torch.zeros(6, 4), torch.float32)
    assert not values.any()
    torch.testing.assert_close(left.T @ left, torch.eye(4))
    torch.testing.assert_close(right @ right.T, torch.eye(4))


def test_large_matrices_are_taken_in_blocks(monkeypatch):
    weight = matrix(50, 20)
    whole = svd(weight, torch.float32)
    monkeypatch.setattr("peft_arena.weights.gram.AT_ONCE", 130)
    blocks = svd(weight, torch.float32)
    torch.testing.assert_close(blocks.values, whole.values)
    assert worst(blocks, weight) < 3e-6


@pytest.fixture
def made(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of what is decomposed, in order."""
    shapes: list[tuple[int, ...]] = []
    plain = module.svd

    def counted(weight: Tensor, dtype: torch.dtype) -> module.Svd:
        shapes.append(tuple(weight.shape))
        return plain(weight, dtype)

    monkeypatch.setattr(module, "svd", counted)
    return shapes


def test_a_decomposition_is_made_once_for_each_content_and_type(tmp_path, made):
    weight = matrix(9, 6)
    first = SvdCache(tmp_path / "new").get(weight, "a", torch.float32)
    again = SvdCache(tmp_path / "new").get(weight, "a", torch.float32)
    assert len(made) == 1
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    SvdCache(tmp_path / "new").get(weight, "a", torch.float64)
    SvdCache(tmp_path / "new").get(weight, "b", torch.float32)
    assert len(made) == 3
    assert not list(tmp_path.rglob("*.part"))


def test_another_version_of_the_algorithm_is_not_read(tmp_path, made, monkeypatch):
    cache = SvdCache(tmp_path)
    cache.get(matrix(5, 4), "a", torch.float32)
    monkeypatch.setattr(module, "ALGORITHM", module.ALGORITHM + 1)
    cache.get(matrix(5, 4), "a", torch.float32)
    assert len(made) == 2


def flip(raw: bytes) -> bytes:
    return raw[:-30] + bytes([raw[-30] ^ 4]) + raw[-29:]


@pytest.mark.parametrize(
    "damage", [lambda raw: b"", lambda raw: raw[:-1], lambda raw: raw[:7], flip, lambda raw: b"{}" * 40]
)
def test_a_damaged_file_is_made_anew(tmp_path, made, damage):
    weight, cache = matrix(9, 5), SvdCache(tmp_path)
    first = cache.get(weight, "a", torch.float32)
    first = module.Svd(*(part.clone() for part in first))
    path = cache.path("a", torch.float32)
    path.write_bytes(damage(path.read_bytes()))
    again = cache.get(weight, "a", torch.float32)
    assert len(made) == 2
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    cache.get(weight, "a", torch.float32)
    assert len(made) == 2, "the new file is not used"


def test_a_file_of_another_shape_is_not_used(tmp_path, made):
    cache = SvdCache(tmp_path)
    cache.get(matrix(9, 5), "a", torch.float32)
    assert cache.get(matrix(5, 9), "a", torch.float32).left.shape == (5, 5)
    assert len(made) == 2


def test_a_full_disk_costs_only_the_speed_and_is_said_once(tmp_path, made, monkeypatch, caplog):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    cache = SvdCache(tmp_path)
    with caplog.at_level(logging.WARNING):
        for content in ("a", "b", "c"):
            assert worst(cache.get(matrix(6, 4), content, torch.float32), matrix(6, 4)) < 3e-6
    assert len(caplog.records) == 1 and "No space left" in caplog.text and str(tmp_path) in caplog.text
    assert "\n" not in caplog.records[0].getMessage()
    assert not list(tmp_path.iterdir()), "a part was left behind"


def test_a_place_that_is_no_directory_costs_only_the_speed(tmp_path, made, caplog):
    (tmp_path / "file").write_text("")
    cache = SvdCache(tmp_path / "file" / "svd")
    cache.get(matrix(6, 4), "a", torch.float32)
    assert len(caplog.records) == 1
    SvdCache(None).get(matrix(6, 4), "a", torch.float32)
    assert len(made) == 2


def test_the_place_is_under_the_cache_of_everything(monkeypatch, tmp_path):
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path))
    assert default_root() == tmp_path / "svd"


ARRAYS = {"one": np.arange(6, dtype=np.float32).reshape(2, 3).T, "none": np.zeros((0, 2)), "scalar": np.array(3.0)}
SCALARS = {"third": 1 / 3, "absent": None, "names": ["b", "a"], "nested": {"z": 1, "a": 2}}


def test_a_piece_is_read_back_exactly(tmp_path):
    Parts(tmp_path / "new").put("key", SCALARS, ARRAYS)
    read = Parts(tmp_path / "new").get("key")
    assert read is not None
    assert read[0] == SCALARS and list(read[0]["nested"]) == ["z", "a"]
    assert set(read[1]) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert read[1][name].dtype == array.dtype
        np.testing.assert_array_equal(read[1][name], array)
    assert Parts(tmp_path / "new").get("other") is None
    assert Parts(None).get("key") is None
    Parts(None).put("key", SCALARS, ARRAYS)


@pytest.mark.parametrize("damage", [lambda raw: b"", lambda raw: raw[:-2], flip])
def test_a_damaged_piece_is_missing(tmp_path, damage):
    parts = Parts(tmp_path)
    parts.put("key", SCALARS, {"values": np.arange(50.0)})
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert parts.get("key") is None
    parts.put("key", SCALARS, {})
    assert parts.get("key") == (SCALARS, {})


def test_a_piece_is_read_under_its_own_key_only(tmp_path):
    parts = Parts(tmp_path)
    parts.put("key", {}, {})
    source, target = parts.path("key"), parts.path("other")
    assert isinstance(source, Path) and isinstance(target, Path)
    source.rename(target)
    assert parts.get("other") is None


def test_pieces_that_cannot_be_kept_are_said_once(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    parts = Parts(tmp_path / "file" / "parts")
    parts.put("a", {}, {})
    parts.put("b", {}, {})
    assert len(caplog.records) == 1 and parts.get("a") is None


def test_a_number_that_is_not_finite_is_no_result(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        Parts(tmp_path).put("key", {"value": float("nan")}, {})
