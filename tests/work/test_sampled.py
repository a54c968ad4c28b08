"""A study with sampled answers, from its file to the report, without a command line."""

import json

import pytest
import yaml

from peft_arena.commands.path_command import _claims
from peft_arena.commands.single_run import evaluate_point
from peft_arena.core.errors import UserError
from peft_arena.report.build import build_report
from peft_arena.store.store import Store
from peft_arena.study.read_study import study_from
from peft_arena.study.study_view import view_of
from peft_arena.work.order import do
from peft_arena.work.plan import plan
from peft_arena.work.run_study import orders_for
from tests.running import TINY


def study_with(sampling):
    data = yaml.safe_load(TINY) | {"evaluate_at": "save_points", "arms": [{"method": "lora"}]}
    data["targets"][0]["sampling"] = sampling
    return study_from(data)


def work_on(study, store):
    for order in orders_for(study, store, study.file.execution):
        while do(order):
            pass


def test_samples_are_asked_at_the_ends_and_reported(tmp_path):
    study, store = study_with({"samples": 3, "k": [1, 3]}), Store(tmp_path / "runs")
    work_on(study, store)
    assert {item.state for item in plan(study, store)} == {"done"}
    lora = store.run(study.arms[0].runs[0])
    sampled = study.evaluations(lora.spec)[-1]
    greedy = study.targets[0]
    assert sampled.sampling is not None
    for directory, asked in ((store.run(study.base), {0}), (lora, {6})):
        found = [record for record in directory.evaluations() if record.spec == sampled]
        assert {record.step for record in found} == asked
        assert all(len(item.outputs) == 3 for record in found for item in record.items)
    assert {record.step for record in lora.evaluations() if record.spec == greedy} == {3, 6}
    assert all(item.outputs == () for record in lora.evaluations() if record.spec == greedy for item in record.items)
    build_report(store, view_of(study), tmp_path / "report", draws=100)
    summary = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert summary["gaps"] == []
    assert set(summary["targets"][0]["passk"]["base"]) == {"pass@1", "pass@3"}
    assert all(spec.sampling is None for spec in _claims(lora, None, None)), "a scan is judged by greedy answers"
    rows = evaluate_point(
        lora.run_id, ["micro-reverse"], store.root, items=12, split="test", dtype="float32", batch_size=None,
        sampling={"samples": 3, "k": ["1", "3"]},
    )  # fmt: skip
    assert [row["metric"] for row in rows] == ["accuracy", "pass@1", "pass@3"]
    assert len([record for record in lora.evaluations() if record.spec.sampling]) == 1, "read again, not done again"
    more = study_with({"samples": 4})
    states = {stage.what: stage.state for item in plan(more, store) for stage in item.stages}
    assert [state for what, state in states.items() if "samples" in what] == ["missing", "missing"]
    assert {state for what, state in states.items() if "samples" not in what} == {"done"}


def judged_study(**more):
    data = yaml.safe_load(TINY) | {"arms": [{"method": "lora"}], "evaluate_at": "final", **more}
    data["targets"][0] |= {"judged_by": "samples", "sampling": {"samples": 3, "k": [1, 3]}}
    return study_from(data)


def test_a_target_can_be_judged_by_its_samples_alone(tmp_path):
    study = judged_study(paths={"grid": [0.5, 1.0], "items": 6, "paths": [{"rule": "uniform"}]})
    store = Store(tmp_path / "runs")
    work_on(study, store)
    assert {item.state for item in plan(study, store)} == {"done"}
    target = study.targets[0]
    for directory in (store.run(study.base), store.run(study.arms[0].runs[0])):
        tests = [found for found in directory.evaluations() if found.spec.task == target.task]
        assert [found.spec for found in tests if found.spec.split == "test" and found.factor == 1.0] == [target]
    build_report(store, view_of(study), tmp_path / "report", draws=100)
    summary = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert summary["gaps"] == []
    (shown,) = summary["targets"]
    (arm,) = shown["arms"]
    record = store.run(study.arms[0].runs[0]).evaluation(store.run(study.arms[0].runs[0]).final_point(), target)
    base = store.run(study.base).evaluation(store.run(study.base).point(0), target)
    assert arm["gain"]["delta"]["value"] == pytest.approx(
        100 * (record.metrics[0].value - base.metrics[0].value), abs=1e-9
    )
    assert set(shown["passk"]["base"]) == {"pass@1", "pass@3"}


def test_judging_by_samples_is_refused_where_it_cannot_be():
    with pytest.raises(UserError, match="judged_by 'samples' needs sampling"):
        study_from(yaml.safe_load(TINY) | {"targets": [{"task": "micro-reverse", "judged_by": "samples"}]})
    target = {"task": "bench-copa", "config": {"source": "miniature"}, "sampling": {"samples": 2}}
    with pytest.raises(
        UserError, match="sampling cannot be asked of target 'bench-copa'.*an F1 or a correlation is of one"
    ):
        study_from(yaml.safe_load(TINY) | {"targets": [{**target, "judged_by": "samples"}]})
    assert study_from(yaml.safe_load(TINY) | {"targets": [target]}).sampled, "beside greedy answers it can be asked for"
    with pytest.raises(UserError, match="evaluate_at 'save_points' cannot be used with a target judged by samples"):
        judged_study(evaluate_at="save_points")


def test_a_group_stands_for_its_tasks(monkeypatch):
    monkeypatch.setattr("peft_arena.tasks.groups.GROUPS", {"small": ("micro-sort", "micro-boolean")})
    data = yaml.safe_load(TINY) | {"retention": [{"group": "small", "items": 5}]}
    study = study_from(data)
    assert [(spec.task.name, spec.items) for spec in study.retention] == [("micro-sort", 5), ("micro-boolean", 5)]
    monkeypatch.setattr("peft_arena.tasks.groups.GROUPS", {"small": ("arena-nq", "arena-humaneval")})
    config = {"source": "miniature", "arena-humaneval": {"execute": True}}
    given = study_from(data | {"retention": [{"group": "small", "config": config}]}).retention
    assert [spec.task.config["source"] for spec in given] == ["miniature"] * 2
    assert [spec.task.config.get("execute") for spec in given] == [None, True]
    monkeypatch.setattr("peft_arena.tasks.groups.GROUPS", {"small": ("micro-sort", "micro-boolean")})
    with pytest.raises(UserError, match="unknown group of tasks 'smal'"):
        study_from(data | {"retention": [{"group": "smal"}]})
    for wrong in ({"items": 5}, {"group": "small", "task": "micro-sort"}):
        with pytest.raises(UserError, match="give exactly one of task and group"):
            study_from(data | {"retention": [wrong]})
