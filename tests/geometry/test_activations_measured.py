"""Whole measurements of activation geometry and KL on the micro model."""

from __future__ import annotations

import math

import pytest
import torch

from peft_arena.core.errors import UserError
from peft_arena.core.geometry import ActivationsSpec, PromptSpec
from peft_arena.core.quantities import quantity_of
from peft_arena.core.specs import ModelSpec
from peft_arena.geometry import measure_activations as module
from peft_arena.geometry.measure_activations import measure_activations
from peft_arena.models.modes import base_of
from tests.geometry.points import base_point, fresh, tuned_point
from tests.geometry.test_activations import plain

PAPER = [f"model.layers.{block}.{part}" for block in (2, 3) for part in
         ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")]  # fmt: skip
TEXTS = {
    "general": ["The cat sat on the mat.", "One plus two is three, is it not?", "Blue", "Once upon a time in the west"],
    "target": ["Shift the letters: a b c d", "Shift the letters: x y z w", "Which is 12 @ 34?"],
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    for name, texts in TEXTS.items():
        (folder / f"{name}.txt").write_text("\n".join(texts))
    return {name: (PromptSpec(file=str(folder / f"{name}.txt")),) for name in TEXTS}


@pytest.fixture(scope="module")
def spec(sources):
    return ActivationsSpec(**sources, gram_tokens=16, pca=(2, 4, 200))


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    folder = tmp_path_factory.mktemp("points")
    sizes = {"lora": 0.02, "prompt_tuning": 0.02, "prefix_tuning": 0.02}
    sizes |= {"oft": 0.02, "dora": 0.01, "full": 3e-3, "pissa": 3e-3}
    return {name: tuned_point(folder / name, name, size=size) for name, size in sizes.items()}


def measure(points, spec, parts=None, progress=lambda part, what: None):
    return measure_activations(points, spec, parts=parts, progress=progress)


@pytest.fixture(scope="module")
def measured(points, spec):
    seen = []
    found = measure([*points.values(), base_point()], spec, progress=lambda part, what: seen.append(part))
    assert seen == sorted(seen) and seen[0] == 0 and seen[-1] == 1
    return dict(zip([*points, "base"], found, strict=True))


def reference(point, which, names):
    """Rows of modules and next-token log-probabilities of every token, by a forward pass for each prompt and module."""
    loaded = fresh()
    model = loaded.model if point is None else point.model(loaded)
    rows, logits = {}, []
    for name in names:
        parts = []
        handle = (
            base_of(model)
            .get_submodule(name)
            .register_forward_hook(lambda m, a, out, parts=parts: parts.append(out[0]))
        )
        logits = []
        for text in TEXTS[which]:
            ids = loaded.tokenizer.encode(text)
            with torch.no_grad():
                logits.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -len(ids) :])
            parts[-1] = parts[-1][-len(ids) :]
        handle.remove()
        rows[name] = torch.cat(parts)
    return rows, [part.double().log_softmax(1) for part in logits]


@pytest.mark.parametrize(
    ("name", "which"),
    [
        *((name, which) for name in ("lora", "prompt_tuning") for which in ("general", "target")),
        *((name, "target") for name in ("prefix_tuning", "oft", "dora", "full", "pissa")),
    ],
)
def test_every_number_is_that_of_plain_passes(points, measured, name, which):
    before, log_before = reference(None, which, PAPER)
    after, log_after = reference(points[name], which, PAPER)
    found = {row.module: row for row in measured[name].rows if row.prompts == which}
    assert list(found) == [*PAPER, ""]
    for module_name in PAPER:
        row = found[module_name]
        wanted = plain(before[module_name], after[module_name], 16, (2, 4))
        assert set(row.reasons) == {"pca_distance_200"}
        values = {key: value for key, value in row.values.items() if value is not None}
        assert values == pytest.approx(wanted, rel=1e-4, abs=1e-5)
        assert row.block == int(module_name.split(".")[2])
    each = [(p.exp() * (p - q)).sum(1) for p, q in zip(log_before, log_after, strict=True)]
    total = torch.cat(each)
    summary = {measure.metric: measure for measure in measured[name].summary}[f"kl_{which}"]
    assert found[""].values["kl"] == summary.value == pytest.approx(float(total.mean()), rel=1e-4)
    sums = [float((part - total.mean()).sum()) for part in each]
    error = math.sqrt(len(each) / (len(each) - 1) * sum(s * s for s in sums)) / len(total)
    assert summary.stderr == pytest.approx(error, rel=1e-3)
    assert (summary.n, summary.unit) == (len(total), "nats/token")


def test_the_base_against_itself(measured):
    exact = {"cosine": 1, "cka": 1, "norm_ratio_mean": 1}
    for row in measured["base"].rows:
        for name, value in row.values.items():
            if value is not None:
                assert value == pytest.approx(exact.get(name, 0), abs=1e-12), (row.module, name)


def test_the_summary_is_the_mean_over_modules(measured):
    found = measured["lora"]
    summary = {measure.metric: measure for measure in found.summary}
    names = list(found.rows[0].values)
    assert set(summary) == {f"{name}_{which}" for name in [*names, "kl"] for which in TEXTS}
    values = [row.values["cka"] for row in found.rows if row.prompts == "general" and row.module]
    assert summary["cka_general"].value == pytest.approx(sum(values) / 8)
    assert (summary["cka_general"].n, summary["cka_general"].unit) == (8, quantity_of("cka").unit)
    assert summary["pca_distance_200_target"].value is None
    assert summary["pca_distance_200_target"].unscored == 8
    assert "prompts, none of them cut" in summary["kl_general"].how


def test_one_point_gives_the_same_as_several(points, measured, spec):
    (alone,) = measure([points["prefix_tuning"]], spec)
    assert alone == measured["prefix_tuning"]


def test_a_sample_of_the_tokens_is_the_same_for_all(points, sources):
    spec = ActivationsSpec(
        **sources, preset="none", modules=("o_proj",), layers=(1,), tokens=12, pca=(2,), max_length=6
    )
    lora, again = (measure([points["lora"]], spec)[0] for _ in range(2))
    assert lora == again
    assert [row.module for row in lora.rows] == ["model.layers.1.self_attn.o_proj", ""] * 2
    kl = next(measure for measure in lora.summary if measure.metric == "kl_general")
    assert kl.n == 12
    assert "cut to 6 tokens" in kl.how
    other, _ = measure([points["lora"], base_point()], spec.model_copy(update={"seed": 1}))
    assert other != lora


def test_finished_modules_are_not_measured_again(points, spec, measured, tmp_path, monkeypatch):
    calls = []
    original = module.Work.rows
    monkeypatch.setattr(module.Work, "rows", lambda self, *place: (calls.append(place), original(self, *place))[1])
    put = module.Parts.put

    def interrupted(self, key, scalars, arrays):
        if len(list(tmp_path.glob("*.safetensors"))) == 5:
            raise KeyboardInterrupt
        put(self, key, scalars, arrays)

    monkeypatch.setattr(module.Parts, "put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure([points["lora"]], spec, tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".safetensors"] * 5  # no rows are left behind
    monkeypatch.setattr(module.Parts, "put", put)
    calls.clear()
    assert measure([points["lora"]], spec, tmp_path) == [measured["lora"]]
    collected = {(which, name) for which, name, side in calls if side == "tuned" and name}
    assert len(collected) == 16 - 5
    calls.clear()
    assert measure([points["lora"]], spec, tmp_path) == [measured["lora"]]
    assert calls == []
    assert measure([points["prefix_tuning"]], spec, tmp_path) == [measured["prefix_tuning"]]
    assert calls


def test_different_bases_are_refused(points, spec):
    from dataclasses import replace

    other = replace(points["lora"], base=ModelSpec(name="micro", dtype="bfloat16"), subject="other")
    with pytest.raises(UserError, match=r"other is on micro \(bfloat16, None\), lora-0 on micro \(float32, sha256"):
        measure([points["lora"], other], spec)
    with pytest.raises(UserError, match="at least one"):
        measure([], spec)
    gone = replace(points["lora"], directory=points["lora"].directory / "gone")
    with pytest.raises(UserError, match="there is no directory '.*gone'"):
        measure([gone], spec)


def test_a_model_in_bfloat16(points, spec):
    from dataclasses import replace

    base = base_point("bfloat16")
    same, tuned = measure([base, replace(points["lora"], base=base.base)], spec)
    assert all(row.values["raw_residual"] == 0 for row in same.rows if row.module)
    assert [row.values["kl"] for row in same.rows if not row.module] == [0, 0]
    assert all(row.values["raw_residual"] > 0.01 for row in tuned.rows if row.module)


def test_a_broken_model_gives_reasons_not_numbers(points, spec, tmp_path):
    broken = tuned_point(tmp_path / "broken", "lora", size=float("inf"))
    (found,) = measure([broken], spec)
    for row in found.rows:
        assert set(row.reasons) == set(row.values)
    kl = next(measure for measure in found.summary if measure.metric == "kl_target")
    assert kl.value is None and kl.stderr is None and "not finite" in kl.how
