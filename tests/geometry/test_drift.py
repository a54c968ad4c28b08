"""Drift: the formulas, and whole measurements on the micro model against dense products."""

from __future__ import annotations

import pytest
import torch

from peft_arena.core.errors import UserError
from peft_arena.core.geometry import DriftSpec, PromptSpec
from peft_arena.geometry import measure_drift as module
from peft_arena.geometry.drift import UNCHANGED, Energies, drift_values, squares
from peft_arena.geometry.measure_drift import measure_drift
from peft_arena.geometry.values import mean_measure, ratios
from tests.geometry.points import base_point, fresh, tuned_point

Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.3.mlp.down_proj"


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "general.txt").write_text("The cat sat on the mat.\nOne plus two is three, is it not?\n")
    (folder / "target.txt").write_text("Shift the letters: a b c d\nHi\n")
    sources = {name: (PromptSpec(file=str(folder / f"{name}.txt")),) for name in ("general", "target")}
    return DriftSpec(modules=(Q, DOWN), **sources)


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    return tuned_point(tmp_path_factory.mktemp("lora") / "a", "lora")


def measure(points, spec, parts=None):
    return measure_drift(points, spec, parts=parts, progress=lambda part, what: None)


def test_the_formulas():
    found = drift_values(Energies(tokens=4, inputs=8.0, outputs=16.0, changes=2.0), norm=0.5)
    assert found.values == {"drift_absolute": 0.5, "drift_relative": 0.125, "drift_update_norm": 2 / 8 / 0.25}
    nothing = drift_values(Energies(tokens=4, inputs=8.0, outputs=16.0, changes=0.0), norm=0.0)
    assert nothing.values == {"drift_absolute": 0.0, "drift_relative": 0.0, "drift_update_norm": None}
    assert nothing.reasons == {"drift_update_norm": UNCHANGED}
    silent = drift_values(Energies(tokens=4), norm=1.0)
    assert silent.reasons["drift_update_norm"] == "every input is zero"
    assert "maps every input to zero" in silent.reasons["drift_relative"]
    broken = drift_values(Energies(tokens=4, inputs=8.0, outputs=16.0, changes=float("nan")), norm=1.0)
    assert set(broken.values.values()) == {None} and set(broken.reasons.values()) == {"the value is not finite"}


def test_squares_are_added_up_in_float64():
    rows = torch.full((4096, 64), 0.1)
    assert squares(rows) == pytest.approx(4096 * 64 * float(rows[0, 0].double()) ** 2, rel=1e-10)


def test_ratios_and_means_say_what_is_missing():
    found = ratios({"a": 3.0, "b": 1.0, "c": None}, {"a": 2.0, "b": 0.0, "c": 1.0})
    assert found.values == {"a": 1.5, "b": None, "c": None}
    assert found.reasons == {"b": "the value on target prompts is zero", "c": "there is no value on general prompts"}
    mean = mean_measure("m", [1.0, None, 3.0], unit="1", how="so")
    assert (mean.value, mean.n, mean.unscored, mean.stderr) == (2.0, 2, 1, pytest.approx(1.0))
    assert mean_measure("m", [1.0], unit="1", how="so").stderr is None
    assert mean_measure("m", [None], unit="1", how="so").how == "no module has a value; so"


def test_drift_is_that_of_dense_products(spec, lora, tmp_path):
    others = [tuned_point(tmp_path / name, name, size=3e-3) for name in ("full", "oft", "dora", "pissa")]
    *found, base = measure([lora, *others, base_point()], spec)
    loaded = fresh()
    for point, result in zip([lora, *others], found, strict=True):
        weights = point.weights()
        for name in (Q, DOWN):
            pair = weights.pair(name)
            delta = pair.change.dense(pair.base).double()
            rows = {row.prompts: row.values for row in result.rows if row.module == name}
            for which in ("general", "target"):
                h = inputs(loaded, spec, which, name)
                moved, before = (h @ delta.T).square().sum(1).mean(), (h @ pair.base.double().T).square().sum(1).mean()
                wanted = {
                    "drift_absolute": moved,
                    "drift_relative": moved / before,
                    "drift_update_norm": moved / (delta.square().sum() * h.square().sum(1).mean()),
                }
                assert rows[which] == pytest.approx({key: float(value) for key, value in wanted.items()}, rel=1e-4)
            for key, value in rows["ratio"].items():
                assert value == pytest.approx(rows["general"][key] / rows["target"][key])
        assert [(row.module, row.block, row.prompts) for row in result.rows] == [
            (name, block, which) for name, block in ((Q, 1), (DOWN, 3)) for which in ("general", "target", "ratio")
        ]
    nothing = base.rows[0]
    assert nothing.values == {"drift_absolute": 0.0, "drift_relative": 0.0, "drift_update_norm": None}


def inputs(loaded, spec, which, name):
    """Inputs of a module, one prompt after the other."""
    seen = []
    handle = loaded.model.get_submodule(name).register_forward_pre_hook(
        lambda m, args: seen.append(args[0][0].double())
    )
    with torch.no_grad():
        for line in open(getattr(spec, which)[0].file).read().splitlines():  # noqa: SIM115, PTH123
            loaded.model(input_ids=torch.tensor([loaded.tokenizer.encode(line)]))
    handle.remove()
    return torch.cat(seen)


def test_the_summary_is_the_mean_over_modules(spec, lora):
    (found,) = measure([lora], spec)
    summary = {measure.metric: measure for measure in found.summary}
    assert set(summary) == {
        f"drift_{what}_{which}"
        for what in ("absolute", "relative", "update_norm")
        for which in ("general", "target", "ratio")
    }
    values = [row.values["drift_relative"] for row in found.rows if row.prompts == "target"]
    assert summary["drift_relative_target"].value == pytest.approx(sum(values) / 2)
    assert summary["drift_relative_target"].n == 2
    assert "tokens of 2 prompts, none of them cut" in summary["drift_relative_target"].how


def test_a_method_without_weights_is_refused(spec, tmp_path):
    point = tuned_point(tmp_path / "p", "prompt_tuning")
    with pytest.raises(UserError, match=r"drift needs a change of weights, and prompt_tuning-0 has none: .*no weights"):
        measure([point], spec)


def test_finished_modules_are_not_measured_again(spec, lora, tmp_path, monkeypatch):
    parts = tmp_path / "parts"
    first = measure([lora], spec, parts)
    asked = []
    original = module._measure
    monkeypatch.setattr(module, "_measure", lambda *args: (asked.append(args[2]), original(*args)))
    assert measure([lora], spec, parts) == first
    assert asked == []
    damaged = sorted(parts.iterdir())[0]
    damaged.write_bytes(damaged.read_bytes()[:-20])
    assert measure([lora], spec, parts) == first
    assert len(asked) == 1 and len(asked[0]) == 1
    other = tuned_point(tmp_path / "other", "lora", seed=1)
    assert measure([other], spec, parts) != first
    assert len(asked) == 3 and len(asked[1]) == 2


def test_changes_that_do_not_fit_in_memory_are_read_again(lora):
    few = module.Changes([lora.weights()], limit=0)
    assert few.get(0, Q) is not few.get(0, Q)
    many = module.Changes([lora.weights()])
    assert many.get(0, Q) is many.get(0, Q)
    assert few.norm(0, Q) == many.norm(0, Q) > 0


def test_what_a_change_has_computed_counts_as_held(tmp_path):
    change = module.Changes([tuned_point(tmp_path / "oft", "oft").weights()]).get(0, Q)
    parts = sum(part.nbytes for part in change.parts)
    assert module._bytes(change) == change.skew.nbytes + parts + change.beyond.nbytes > 0
    assert module._bytes(None) == 0
