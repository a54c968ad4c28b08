"""Spectra of tuned points by their files: rows, totals, what is shared and what an interruption costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_arena.core.errors import UserError
from peft_arena.core.geometry import SpectraSpec
from peft_arena.core.quantities import QUANTITIES
from peft_arena.geometry import measure_spectra as module
from peft_arena.geometry.measure_spectra import measure_spectra
from peft_arena.weights import svd as svd_module
from peft_arena.weights.svd import SvdCache
from peft_arena.weights.tuned import Tuned
from tests.geometry.points import base_point, fresh, tuned_point
from tests.geometry.test_spectra import truth

Q = "model.layers.1.self_attn.q_proj"
MODULES = 35


@pytest.fixture(scope="module")
def points(tmp_path_factory) -> dict[str, Tuned]:
    root = tmp_path_factory.mktemp("points")
    wanted: dict[str, dict[str, Any]] = {
        "lora": {"rank": 4, "alpha": 8.0},
        "oft": {"block_size": 16},
        "dora": {"rank": 4},
        "full": {},
        "pissa": {"rank": 4},
        "bitfit": {},
    }
    return {name: tuned_point(root / name, name, config=config) for name, config in wanted.items()}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> SvdCache:
    return SvdCache(tmp_path_factory.mktemp("svd"))


def measure(tuned: list[Tuned], cache: SvdCache, parts: Path | None = None, **spec: Any) -> list[Any]:
    return measure_spectra(tuned, SpectraSpec(**spec), cache=cache, parts=parts, progress=lambda *_: None)


def row(measured: Any, name: str) -> Any:
    return next(row for row in measured.rows if row.module == name)


def by_metric(measured: Any) -> dict[str, Any]:
    return {measure.metric: measure for measure in measured.summary}


@pytest.mark.parametrize("name", ["lora", "oft", "dora", "full", "pissa"])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_rows_are_the_formulas_on_whole_matrices(points, cache, name, precision):
    (found,) = measure([points[name]], cache, precision=precision, alignment="all", layers=[1])
    before = dict(fresh().model.named_parameters())
    after = dict(points[name].model(fresh()).named_parameters()) if name == "full" else merged(points[name])
    assert len(found.rows) == 7
    for shown in found.rows:
        base = before[f"{shown.module}.weight"].detach().double()
        scalars, profiles = truth(base, after[f"{shown.module}.weight"].detach().double() - base)
        rank = ("stable_rank", "entropy_rank")
        loose = {key: scalars.pop(key) for key in rank} if name in ("pissa", "lora") else {}
        assert {key: shown.values[key] for key in scalars} == pytest.approx(scalars, rel=1e-4)
        for key, value in loose.items():  # the merge in float32 adds noise of full rank
            assert shown.values[key] == pytest.approx(value, rel=1e-2)
        own = found.arrays.filter(pl.col("module") == shown.module)
        assert own["index"].to_list() == list(range(min(base.shape)))
        for key, expected in profiles.items():
            if key != "alignment":  # of single directions it hangs on the gaps between singular values
                np.testing.assert_allclose(own[key].to_numpy(), expected, atol=1e-4 * expected.max(), err_msg=key)
    kind = pl.Float32 if precision == "float32" else pl.Float64
    assert {found.arrays.schema[key] for key in profiles} == {kind}


@pytest.mark.parametrize("name", ["lora", "pissa"])
def test_ranks_of_low_rank_changes_are_those_of_the_factors_in_the_file(points, cache, name):
    (found,) = measure([points[name]], cache)
    settings = json.loads((points[name].directory / "adapter_config.json").read_text())
    tensors = load_file(points[name].directory / "adapter_model.safetensors")
    scale = settings["lora_alpha"] / settings["r"]
    for shown in found.rows:
        a, b = (tensors[f"base_model.model.{shown.module}.lora_{which}.weight"].double() for which in "AB")
        values = np.linalg.svd((scale * b @ a).numpy(), compute_uv=False)
        shares = values[: settings["r"]] / values.sum()
        assert values[settings["r"]] < 1e-10 * values[0]
        assert shown.values["stable_rank"] == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-5)
        assert shown.values["entropy_rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)


def merged(point: Tuned) -> dict[str, torch.Tensor]:
    model = fresh().model
    point.weights().load_into(model)
    return dict(model.named_parameters())


def test_float32_agrees_with_float64(points, cache):
    tuned = [points["lora"], points["oft"], points["full"]]
    single, double = (measure(tuned, cache, precision=precision) for precision in ("float32", "float64"))
    for one, other in zip(single, double, strict=True):
        for first, second in zip(one.rows, other.rows, strict=True):
            assert first.values == pytest.approx(second.values, rel=1e-4), first.module
        for first, second in zip(one.summary, other.summary, strict=True):
            assert first.value == pytest.approx(second.value, rel=1e-4), first.metric


def test_the_summary_is_the_mean_over_modules_and_totals_over_the_whole_model(points, cache):
    (found,) = measure([points["full"]], cache)
    metrics = by_metric(found)
    linear = [shown for shown in found.rows if "stable_rank" in shown.values]
    others = [shown for shown in found.rows if "stable_rank" not in shown.values]
    assert len(linear) == MODULES and {shown.module for shown in others} >= {"model.norm.weight"}
    assert all(set(shown.values) == {"l1", "l2", "l1_relative", "l2_relative"} for shown in others)
    values = [shown.values["stable_rank"] for shown in linear]
    assert metrics["stable_rank"].value == pytest.approx(np.mean(values))
    assert metrics["stable_rank"].stderr == pytest.approx(np.std(values, ddof=1) / np.sqrt(MODULES))
    assert metrics["stable_rank"].n == MODULES
    assert "alignment_mean" not in metrics
    before, after = dict(fresh().model.named_parameters()), dict(points["full"].model(fresh()).named_parameters())
    change = torch.cat([(after[name] - before[name]).detach().double().flatten() for name in before])
    whole = torch.cat([weight.detach().double().flatten() for weight in before.values()])
    assert metrics["global_l1"].value == pytest.approx(float(change.abs().sum()), rel=1e-4)
    assert metrics["global_l2"].value == pytest.approx(float(change.norm()), rel=1e-4)
    assert metrics["global_l2_relative"].value == pytest.approx(float(change.norm() / whole.norm()), rel=1e-4)
    (part,) = measure([points["full"]], cache, layers=[0])
    assert by_metric(part)["global_l2"].value == pytest.approx(metrics["global_l2"].value)
    assert len(part.rows) == 7


def test_unchanged_weights_have_norms_of_zero_and_no_spectrum(points, cache):
    (biases,) = measure([points["bitfit"]], cache)
    shown = row(biases, Q)
    assert [shown.values[name] for name in ("l1", "l2", "l1_relative", "l2_relative")] == [0, 0, 0, 0]
    assert shown.values["stable_rank"] is None and shown.reasons["stable_rank"] == "the weight is unchanged"
    added = row(biases, f"{Q}.bias")
    assert added.values["l2"] > 0 and added.values["l2_relative"] is None
    assert added.reasons["l2_relative"] == "the pretrained parameter is zero"
    assert biases.arrays.is_empty() and set(biases.arrays.columns) >= {"module", "retention"}
    metrics = by_metric(biases)
    assert metrics["stable_rank"].value is None and metrics["stable_rank"].n == 0
    assert metrics["global_l2"].value > 0
    (base,) = measure([base_point()], cache)
    assert by_metric(base)["global_l1"].value == 0
    assert len(base.rows) == MODULES


def test_profiles_have_an_alignment_only_where_there_is_one(points, cache, tmp_path):
    exact = tuned_point(tmp_path, "oft", config={"block_size": 16, "neumann_terms": None})
    turned, added = measure([exact, points["lora"]], cache, modules=["q_proj"])
    assert turned.arrays["alignment"].null_count() == 0
    assert added.arrays["alignment"].null_count() == len(added.arrays) > 0
    assert "alignment_mean" in by_metric(turned) and "alignment_mean" not in by_metric(added)


def test_several_points_share_one_decomposition(points, tmp_path, monkeypatch):
    made = []
    plain = svd_module.svd
    monkeypatch.setattr(svd_module, "svd", lambda weight, dtype: made.append(1) or plain(weight, dtype))
    tuned = [points["lora"], points["oft"], points["full"]]
    together = measure(tuned, SvdCache(None), modules=["q_proj"])
    assert len(made) == 5
    kept = SvdCache(tmp_path)
    alone = [measure([point], kept, modules=["q_proj"])[0] for point in tuned]
    assert len(made) == 10
    assert [one.rows for one in alone] == [one.rows for one in together]


def test_an_interrupted_call_goes_on_from_the_module_it_was_at(points, cache, tmp_path, monkeypatch):
    done: list[str] = []
    plain = module.spectrum

    def counted(*args: Any, **kwargs: Any) -> Any:
        if len(done) == 20:
            raise KeyboardInterrupt
        done.append("")
        return plain(*args, **kwargs)

    tuned = [points["lora"], points["oft"]]
    undisturbed = measure(tuned, cache)
    monkeypatch.setattr(module, "spectrum", counted)
    with pytest.raises(KeyboardInterrupt):
        measure(tuned, cache, tmp_path)
    assert len(done) == 20
    monkeypatch.setattr(module, "spectrum", lambda *args, **kwargs: done.append("") or plain(*args, **kwargs))
    again = measure(tuned, cache, tmp_path)
    assert len(done) == 2 * MODULES
    damaged = sorted(tmp_path.iterdir())[3]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    repeated = measure(tuned, cache, tmp_path)
    assert len(done) == 2 * MODULES + 1
    for one, other, plainly in zip(again, repeated, undisturbed, strict=True):
        assert one.rows == other.rows == plainly.rows
        assert one.summary == other.summary == plainly.summary
        assert one.arrays.equals(other.arrays) and one.arrays.equals(plainly.arrays)


def test_pieces_are_of_one_checkpoint_one_factor_and_one_spec(points, cache, tmp_path, monkeypatch):
    done: list[str] = []
    plain = module.spectrum
    monkeypatch.setattr(module, "spectrum", lambda *args, **kwargs: done.append("") or plain(*args, **kwargs))
    point = tuned_point(tmp_path / "point", "lora")
    half = Tuned(point.base, point.directory, point.method, point.subject, point.step, 0.5)

    def count(tuned: Tuned, **spec: Any) -> int:
        before = len(done)
        measure([tuned], cache, tmp_path / "parts", modules=["q_proj"], **spec)
        return len(done) - before

    assert [count(point), count(point), count(half), count(point, precision="float64")] == [5, 0, 5, 5]
    file = tmp_path / "point" / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    assert count(point) == 5


def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest(points, cache):
    with pytest.raises(UserError, match=r"'q_prj'.*Did you mean 'q_proj'"):
        measure([points["lora"]], cache, modules=["q_prj"])
    with pytest.raises(UserError, match="layers: 9 holds none of the modules; allowed: 0 to 4"):
        measure([points["lora"]], cache, layers=[9])


def test_points_of_different_models_are_refused(points, cache):
    other = Tuned(points["lora"].base.model_copy(update={"dtype": "bfloat16"}), None, None, "other", None)
    with pytest.raises(
        UserError, match=r"other is on micro \(bfloat16, .*on micro \(float32, .*measure them in two calls"
    ):
        measure([points["lora"], other], cache)
    assert measure([], cache) == []


def test_a_change_beyond_the_largest_number_is_no_number(tmp_path, cache):
    point = tuned_point(tmp_path, "lora")
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if "layers.1.self_attn.q_proj" in name:
            tensors[name].fill_(1e30)
    save_file(tensors, file, {"format": "pt"})
    (found,) = measure([point], cache)
    shown = row(found, Q)
    assert set(shown.values) == set(shown.reasons) and "stable_rank" in shown.reasons and "l2" in shown.reasons
    metrics = by_metric(found)
    assert metrics["stable_rank"].n == MODULES - 1 and metrics["stable_rank"].unscored == 1
    assert metrics["global_l2"].value is None


def test_progress_ends_at_one_and_names_modules(points, cache):
    seen: list[tuple[float, str]] = []
    spec = SpectraSpec(modules=("q_proj",))
    measure_spectra([points["lora"]], spec, cache=cache, parts=None, progress=lambda *told: seen.append(told))
    fractions = [fraction for fraction, _ in seen]
    assert fractions == sorted(fractions) and fractions[0] == 0 and fractions[-1] == 1
    assert Q in {what for _, what in seen}


def test_the_metrics_are_known_quantities(points, cache):
    (found,) = measure([points["lora"]], cache, modules=["q_proj"])
    assert all(measure.metric.removeprefix("global_") in QUANTITIES for measure in found.summary)
