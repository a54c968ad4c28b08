"""What is read from the store, what is not, and what is said about the rest."""

import json
from dataclasses import replace

import pytest

from peft_arena.analyze.evidence import asked_fewer
from peft_arena.analyze.study import analyze_study
from peft_arena.core.specs import EvalSpec, TaskSpec
from peft_arena.report.page_tables import gaps_table
from tests.analyze.synthetic import Truth, build_synthetic


def gaps_of(study):
    return [(gap.who, gap.what, gap.kind) for gap in analyze_study(study.store, study.view, draws=50).evidence.gaps]


def first_run(study, arm=0):
    return study.store.run(study.view.arms[arm].runs[0])


def test_a_failure_of_training_is_not_one_of_a_task_with_train_in_its_name(tmp_path):
    study = build_synthetic(tmp_path, [Truth("one", seeds=(0,), untrained=(0,))], items=5)
    run = first_run(study)
    run.create()
    run.event("failed", stage="evaluate trains 0123456789ab at step 200", reason="not training")
    gap = analyze_study(study.store, study.view, draws=50).evidence.gaps[0]
    assert (gap.kind, gap.reason) == ("missing", "started, not finished")
    run.event("failed", stage="train", reason="out of memory")
    run.event("finished", stage="evaluate trains 0123456789ab at step 200")
    gap = analyze_study(study.store, study.view, draws=50).evidence.gaps[0]
    assert (gap.kind, gap.reason) == ("failed", "out of memory")


@pytest.mark.parametrize("name", ["cost-training.json", "cost-inference.json", "training.json", "200"])
def test_one_damaged_record_takes_no_other_with_it(tmp_path, name):
    study = build_synthetic(tmp_path, [Truth("one", seeds=(0,))], items=5)
    run = first_run(study)
    path = next((run.path / "records").glob("000200-1/eval-facts-*")) if name == "200" else run.path / "records" / name
    path.write_text('{"kind": "other"}')
    result = analyze_study(study.store, study.view, draws=50)
    what = {"cost-training.json": "cost of training", "cost-inference.json": "cost of inference", "200": "facts"}
    assert [(gap.who, gap.what, gap.kind) for gap in result.evidence.gaps] == [
        ("one, seed 0", what.get(name, "training"), "damaged")
    ]
    read = result.evidence.arms[0].runs[0]
    assert len(read.costs) == (1 if "cost" in name else 2)
    assert len(read.evaluations) == {"training.json": 0, "200": 6}.get(name, 7)


def test_a_damaged_run_record_is_a_gap_and_its_results_stay(tmp_path):
    study = build_synthetic(tmp_path, [Truth("one", seeds=(0,))], items=5)
    (first_run(study).path / "run.json").write_text("{")
    assert gaps_of(study) == [("one, seed 0", "run", "damaged")]


def test_labels_come_from_the_cards(tmp_path):
    names = {"facts": "my own facts", "format": "twin", "compare": "twin", "operator": "my target"}
    truths = [Truth("one", skipped={"facts": (0, 1, 2)})]
    study = build_synthetic(tmp_path, truths, items=5, names=names, corpus=False)
    result = analyze_study(study.store, study.view, draws=50)
    assert result.targets[0].label == "my target"
    labels = list(result.evidence.labels.values())
    assert "my own facts" in labels
    assert len(set(labels)) == len(labels)
    assert sum(label.startswith("twin (") for label in labels) == 2
    assert "my own facts" in {gap.what for gap in result.evidence.gaps}
    assert "my own facts" in result.targets[0].arms[0].mean_missing


def test_save_points_give_points_along_the_training(tmp_path):
    truths = [Truth("one", gain=0.6, forget=-0.2, save_points=(50, 100)), Truth("two")]
    study = build_synthetic(tmp_path, truths, items=150)
    target = analyze_study(study.store, study.view, draws=100).targets[0]
    assert list(target.along) == ["one"]
    points = target.along["one"]
    assert [point.step for point in points] == [50, 100, 200]
    assert [point.effects.gain.delta.value for point in points] == pytest.approx([15, 30, 60], abs=8)
    assert [point.effects.mean.value for point in points] == pytest.approx([-5, -10, -20], abs=4)
    assert points[-1].effects is target.arms[0]
    assert points[0].effects.mean.seeds == 3


def test_a_save_point_without_an_evaluation_is_a_gap_if_the_study_wants_it(tmp_path):
    for wanted in (False, True):
        truths = [Truth("one", seeds=(0,), save_points=(50,))]
        study = build_synthetic(tmp_path / str(wanted), truths, items=5, every_save_point=wanted)
        run = first_run(study)
        next((run.path / "records" / "000050-1").glob("eval-facts-*")).unlink()
        expected = [("one, seed 0", "facts at step 50", "missing")] if wanted else []
        assert gaps_of(study) == expected
        facts = next(spec for spec in study.view.retention if spec.task.name == "facts")
        run.event("failed", stage=f"evaluate facts {facts.id} at step 50", reason="gone")
        assert gaps_of(study) == [("one, seed 0", "facts at step 50", "failed")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_batch_sizes_are_noticed_in_bfloat16(tmp_path, dtype):
    truths = [Truth("one", seeds=(0,)), Truth("two", seeds=(0,), batch_size=32)]
    study = build_synthetic(tmp_path, truths, items=5, dtype=dtype, corpus=False)
    notices = [gap for gap in analyze_study(study.store, study.view, draws=50).evidence.gaps if gap.kind == "notice"]
    if dtype == "float32":
        assert not notices
        return
    assert {gap.who for gap in notices} == {"two, seed 0"}
    assert len(notices) == 6
    assert "batch size 32, the base model at 16: in bfloat16 another batch size rounds" in notices[0].reason


def test_evaluations_of_other_studies_are_not_read(tmp_path):
    study = build_synthetic(tmp_path, [Truth("one", seeds=(0,))], items=5)
    run = first_run(study)
    other = EvalSpec(task=TaskSpec(name="other"))
    run.record_path(run.point(200), f"eval-{other.key}").write_text("junk")
    run.record_path(run.point(200), "eval-nonsense").write_text('{"schema_version": 2}')
    assert gaps_of(study) == []


def test_a_training_that_was_shown_fewer_items_than_a_default_takes_is_named(tmp_path):
    study = build_synthetic(tmp_path, [Truth("one", seeds=(0,))], items=10)
    assert gaps_of(study) == [], "older records say nothing of it"
    run = first_run(study)
    path = run.path / "records" / "training.json"
    written = json.loads(path.read_text())
    asked = run.spec.train.validation_items
    for used, said in [(asked, []), (asked - 1, ["fewer"])]:
        path.write_text(json.dumps({**written, "validation_items": used}))
        result = analyze_study(study.store, study.view, draws=50)
        assert [gap.kind for gap in result.evidence.gaps] == said
    assert f"held out {asked - 1} validation items, all there are" in result.evidence.gaps[0].reason
    assert "1 training was shown fewer items than a default takes" in gaps_table(result.evidence.gaps)


def test_records_that_say_other_than_their_run_are_gaps(tmp_path):
    study = build_synthetic(tmp_path, [Truth("one", seeds=(0,))], items=8)
    run = first_run(study)
    path = next((run.path / "records").glob("000200-1/eval-facts-*"))
    table = json.loads(path.read_text())
    table["items"] = table["items"][:4]
    values = [item["value"] for item in table["items"]]
    table["metrics"][0].update(n=4, value=sum(values) / 4)
    path.write_text(json.dumps(table))
    training = run.path / "records" / "cost-training.json"
    training.write_text(training.read_text().replace('"FLOPs"', '"bytes"'))
    assert gaps_of(study) == [("one, seed 0", "cost of training", "damaged"), ("one, seed 0", "facts", "damaged")]


def test_a_run_that_was_asked_fewer_items_than_others_is_named(tmp_path):
    """Where the spec asks for all items, only the other runs say how many there are."""
    study = build_synthetic(tmp_path, [Truth("one", seeds=(0,))], items=8, corpus=False)
    evidence = analyze_study(study.store, study.view, draws=50).evidence
    whole = EvalSpec(task=TaskSpec(name="facts"))
    one = evidence.runs[0]
    record = next(iter(one.evaluations.values())).model_copy(update={"spec": whole})
    runs = [
        replace(run, evaluations={whole.id: record.model_copy(update={"items": record.items[:count]})}, along={})
        for run, count in zip(evidence.runs, (8, 4), strict=True)
    ]
    (gap,) = asked_fewer(runs, {whole.id: "facts"})
    assert (gap.who, gap.what, gap.kind) == ("one, seed 0", "facts", "unscored")
    assert gap.reason == "it was asked 4 items, other runs 8"
    assert asked_fewer(runs[:1], {whole.id: "facts"}) == []
