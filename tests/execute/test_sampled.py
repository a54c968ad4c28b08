"""A study with sampled answers, from its file to the report, without a command line."""

import json

import yaml

from peft_arena.execute.path_command import _claims
from peft_arena.execute.plan import plan
from peft_arena.execute.run import orders_for
from peft_arena.execute.single import evaluate_point
from peft_arena.execute.study import study_from
from peft_arena.execute.view import view_of
from peft_arena.execute.work import do
from peft_arena.report.build import build_report
from peft_arena.store.store import Store

from .conftest import TINY


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
