"""The estimates of a plan: what goes into them, what is left out and said, and how a plan shows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peft_arena.cli.console import show_plan
from peft_arena.cli.console_plan import hours, plan_rows, plan_totals, short
from peft_arena.core.errors import UserError
from peft_arena.cost.counts import Count
from peft_arena.cost.estimate import (
    GPUS,
    Subject,
    decoding_seconds,
    optimizer_seconds,
    sequence_flops,
    training_flops,
    training_memory,
)
from peft_arena.models.architecture import architecture_of
from peft_arena.models.load import config_at_hand
from peft_arena.store.store import Store
from peft_arena.study import study_cost as estimates
from peft_arena.study.model import Study
from peft_arena.study.read_study import read_study
from peft_arena.study.study_cost import ArmEstimate, estimate
from peft_arena.tasks.micro.base import MicroTask
from peft_arena.work.plan import plan

TEXT = """\
name: priced
title: What it will cost
model: {name: micro}
targets: [{task: micro-reverse, items: 40}]
retention: [{task: micro-boolean, items: 30}]
train: {schedule: {steps: 10}, batch_size: 4, max_length: 64, learning_rate: documented}
arms:
  - {method: lora}
  - {method: full}
  - {method: prompt_tuning}
  - {method: qalora}
seeds: [0, 1, 2]
"""
GPU = GPUS["A100-80GB"]


def study(tmp_path: Path, *changes: tuple[str, str], more: str = "") -> Study:
    text = TEXT
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "priced.yaml").write_text(text + more)
    return read_study(tmp_path / "priced.yaml")


def arms(found: Study, gpu: str | None = None) -> dict[str, ArmEstimate]:
    return {one.label: one for one in estimate(found, gpu).arms}


def lora(found: Study, trained: int) -> Subject:
    config = config_at_hand(found.base.model)
    assert config is not None
    return Subject(shapes=architecture_of(config), trained=trained, dtype="float32")


def test_supervised_training_is_examples_times_their_tokens(tmp_path: Path) -> None:
    found = study(tmp_path)
    one = arms(found)["lora"]
    assert one.trained == 97_280 and one.training is not None and one.memory is not None
    subject = lora(found, 97_280)
    assert one.training.flops == pytest.approx(40 * training_flops(subject, 64))
    computing = one.training.flops / (GPU.float32 * 0.25)
    assert one.training.seconds == pytest.approx(computing + 10 * optimizer_seconds(subject, GPU))
    assert one.memory == training_memory(subject, 4, 64)
    assert arms(found)["full"].trained == 1_090_944
    assert set(arms(found)) == {"base", "lora", "full", "prompt_tuning"}, "refused arms cost nothing"


def test_what_the_study_says_is_taken(tmp_path: Path) -> None:
    said = "execution: {estimate: {gpu: L40S, utilisation: 0.5, tasks: {micro-reverse: {example_tokens: 16}}}}\n"
    plain, told = study(tmp_path), study(tmp_path, more=said)
    one, other = arms(plain)["lora"].training, arms(told)["lora"].training
    assert one is not None and other is not None
    assert other.flops < one.flops / 4
    assert [run.id for run in told.runs()] == [run.id for run in plain.runs()], "an assumption changes no run"
    assert estimate(told).gpu == "L40S" and estimate(told, "H100-SXM").gpu == "H100-SXM"
    texts = estimate(plain).notes
    assert [about for text, about in texts.items() if "upper bound" in text] == [["micro-reverse"]]
    assert not any("training examples" in text for text in estimate(told).notes)


def test_the_models_own_limit_bounds_the_tokens(tmp_path: Path) -> None:
    far = arms(study(tmp_path, ("max_length: 64", "max_length: 4096")))["lora"]
    near = arms(study(tmp_path, ("max_length: 64", "max_length: 256")))["lora"]
    assert far.training == near.training and far.memory == near.memory


def test_epochs_need_the_number_of_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    epochs = ("{steps: 10}", "{epochs: 2}")
    counted = arms(study(tmp_path, epochs))["lora"].training
    whole = arms(study(tmp_path, epochs, ("max_length: 64", "max_length: 64, examples: 4000")))["lora"].training
    assert counted == whole, "data at hand is counted"
    monkeypatch.setattr(MicroTask, "at_hand", False)
    unknown = study(tmp_path, epochs)
    assert arms(unknown)["lora"].hours is None and arms(unknown)["lora"].memory is not None
    assert any("number of items is not known" in text for text in estimate(unknown).notes)
    given = study(tmp_path, epochs, ("max_length: 64", "max_length: 64, examples: 20"))
    told = study(tmp_path, epochs, more="execution: {estimate: {tasks: {micro-reverse: {train_items: 20}}}}\n")
    steps = arms(study(tmp_path))["lora"].training
    assert steps == arms(given)["lora"].training == arms(told)["lora"].training


def test_a_schedule_in_tokens(tmp_path: Path) -> None:
    found = arms(study(tmp_path, ("{steps: 10}", "{tokens: 2560}")))["lora"].training
    assert found == arms(study(tmp_path))["lora"].training


def test_recomputing_trades_operations_for_memory(tmp_path: Path) -> None:
    plain = arms(study(tmp_path))["lora"]
    other = arms(study(tmp_path, more="execution: {recompute_activations: true}\n"))["lora"]
    assert plain.training and other.training and plain.peak and other.peak
    assert other.training.flops > plain.training.flops and other.peak < plain.peak


def test_evaluations_are_items_times_prompt_and_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = (
        "{micro-reverse: {prompt_tokens: 20, answer_tokens: 5}, micro-boolean: {prompt_tokens: 10, answer_tokens: 1}}"
    )
    found = study(tmp_path, more=f"execution: {{eval_batch_size: 10, estimate: {{tasks: {sizes}}}}}\n")
    base = arms(found)["base"].evaluation
    subject = lora(found, 0)
    assert base is not None
    assert base.flops == pytest.approx(40 * sequence_flops(subject, 25) + 30 * sequence_flops(subject, 11))
    least = 4 * decoding_seconds(subject, GPU, 10, 20, 5, utilisation=0.25)
    assert base.seconds > least > base.seconds / 2
    whole = study(tmp_path, ("items: 40", "config: {}"))
    assert not any("not known" in text for text in estimate(whole).notes)
    monkeypatch.setattr(MicroTask, "at_hand", False)
    assert any("items are not known" in text for text in estimate(whole).notes)


def test_reinforcement_learning_counts_rollouts_and_updates(tmp_path: Path) -> None:
    rl = "rl: {group_size: 4, batch_size: 8, max_new_tokens: 6, max_length: 48}\n"
    grpo = ("{method: lora}", "{method: lora, train: {objective: grpo}}")
    sizes = "{micro-reverse: {prompt_tokens: 20, answer_tokens: 5}}"
    found = study(tmp_path, grpo, more=f"{rl}execution: {{estimate: {{tasks: {sizes}}}}}\n")
    one = arms(found)["lora"]
    subject = lora(found, 97_280)
    assert one.updates is not None and one.rollouts is not None and one.training is not None
    assert one.updates.flops == pytest.approx(10 * 8 * training_flops(subject, 25))
    assert one.rollouts.flops == pytest.approx(10 * 8 * sequence_flops(subject, 25))
    assert one.training.seconds == one.updates.seconds + one.rollouts.seconds
    twice = study(tmp_path, grpo, more=f"{rl.replace('}', ', updates_per_rollout: 2, kl: 0.1}')}")
    again = arms(twice)["lora"]
    assert again.rollouts is not None and again.updates is not None
    assert any("as long as they may" in text for text in estimate(twice).notes)
    plain = arms(study(tmp_path, grpo, more=rl))["lora"]
    assert plain.rollouts is not None and plain.updates is not None
    assert again.rollouts.flops == pytest.approx(plain.rollouts.flops / 2), "half as many rollouts for as many steps"
    assert again.updates.flops > plain.updates.flops, "and two further passes over each"


def test_what_cannot_be_counted_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "trained_parameters", lambda *_: Count(None, "no formula"))
    found = arms(study(tmp_path))["lora"]
    assert found.trained is None and found.hours is None and found.peak is None
    assert found.table()["notes"] == ["lora: not estimated: no formula"]
    monkeypatch.setattr(estimates, "config_at_hand", lambda _: None)
    assert estimate(study(tmp_path)).note.startswith("no estimates: the shapes of model 'micro' are not known")


def test_more_than_the_gpu_has_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = GPU.__class__(bfloat16=1e12, float32=1e12, bandwidth=1e11, memory=2e7, source="")
    monkeypatch.setitem(estimates.gpu_named.__globals__["GPUS"], "A100-80GB", small)
    about = estimate(study(tmp_path)).notes["needs more memory than the GPU has"]
    assert "full" in about and len(about) < 4


def test_an_unknown_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown GPU 'TPU'"):
        estimate(study(tmp_path), "TPU")


def test_a_plan_has_a_line_for_each_arm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = study(tmp_path, ("[{task: micro-reverse, items: 40}]", "[{task: micro-reverse}, {task: micro-months}]"))
    plans = plan(found, Store(tmp_path / "runs"))
    guess = estimate(found)
    show_plan(found, plans, False, guess)
    text = capsys.readouterr().out
    lines = {line.split()[0]: line for line in text.splitlines() if line}
    assert "6 missing" in lines["lora"] and "97.3 k" in lines["lora"] and " 2 " in lines["lora"]
    assert "6 refused" in lines["qalora"] and "needs a quantised base model" in text
    assert "19 missing, 6 refused" in text and "runs/" not in text
    assert found.arms[0].runs[0].run_id not in text
    show_plan(found, plans, False, guess, every_run=True)
    assert found.arms[0].runs[0].run_id in capsys.readouterr().out


def test_what_is_known_is_shown_without_hours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MicroTask, "at_hand", False)
    found = study(tmp_path, ("{steps: 10}", "{epochs: 2}"))
    plans = plan(found, Store(tmp_path / "runs"))
    show_plan(found, plans, False, estimate(found))
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if line.startswith("lora"))
    assert "97.3 k" in row and "MB" in row
    assert "for 1 of 10 runs" in text, "the base model's evaluation is known"


def test_totals_are_sums(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = study(tmp_path)
    plans = plan(found, Store(tmp_path / "runs"))
    guess = estimate(found)
    each = {one.label: one.hours or 0.0 for one in guess.arms}
    expected = each["base"] + 3 * (each["lora"] + each["full"] + each["prompt_tuning"])
    totals = plan_totals(plans, guess, plan_rows(plans, guess))
    assert totals["gpu_hours"] == totals["gpu_hours_missing"] == pytest.approx(expected)
    assert totals["runs"] == totals["runs_estimated"] == 10
    show_plan(found, plans, True, guess)
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert said["estimates"]["totals"]["gpu_hours"] == pytest.approx(expected)
    by_arm = {row["arm"]: row for row in said["estimates"]["arms"]}
    assert by_arm["lora"]["trained_parameters"] == 97_280
    assert by_arm["lora"]["peak_memory"] == sum(by_arm["lora"]["memory"].values())
    assert len(said["runs"]) == len(plans) == 13
    show_plan(found, plans, True)
    assert "estimates" not in json.loads(capsys.readouterr().out)


def test_numbers_are_short() -> None:
    assert [short(value) for value in (None, 12.0, 7.6e9, 3.3e22)] == ["–", "12", "7.6 G", "33 Z"]
    assert short(80e9, "B") == "80 GB" and short(5.0, "B") == "5 B"
    assert [hours(value) for value in (0.0, 0.0001, 0.25, 1234.5)] == ["0", "<0.001", "0.25", "1,234"]
