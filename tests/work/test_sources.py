"""Runs that begin at another run wait for it: on disk, in plans, among workers, and where it fails."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from peft_arena.store.store import Store
from peft_arena.study.read_study import read_study, study_from
from peft_arena.weights.start import init_of
from peft_arena.work.plan import plan
from peft_arena.work.pool import Outcome, _Sources
from peft_arena.work.run_study import orders_for
from tests.made_runs import STEP, made_spec, trained_run
from tests.running import TINY, arena

RL = {"batch_size": 4, "group_size": 2, "schedule": {"steps": 2}, "max_new_tokens": 4, "validation_items": 2}
ARMS = [
    {"method": "oft", "label": "last", "train": {"objective": "rloo", "init_from": {"arm": "rl"}}},
    {"method": "lora", "label": "rl", "train": {"objective": "grpo", "init_from": {"arm": "sft", "step": 3}}},
    {"method": "lora", "label": "sft"},
]


def study_file(folder: Path, **changes: object) -> Path:
    data = yaml.safe_load(TINY) | {"rl": RL | {"save_points": [1.0]}, "arms": ARMS} | changes
    path = folder / "chain.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study whose first arm begins at the second and that at the third, run by the command line."""
    folder = tmp_path_factory.mktemp("chain")
    done = arena("run", study_file(folder), "--runs", folder / "runs", "--json")
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def runs_of(path: Path, root: Path):
    study = read_study(path)
    return study, {arm.label: Store(root).run(arm.runs[0]) for arm in study.arms}


def test_a_chain_is_trained_in_its_order(finished):
    folder, said = finished
    assert said["worked"] == 4
    assert set(said["runs"].values()) == {"done"}
    _, runs = runs_of(folder / "chain.yaml", folder / "runs")
    rl, last = (runs[label].training().start for label in ("rl", "last"))
    assert (rl.run_id, rl.step) == (runs["sft"].run_id, 3)
    assert (last.run_id, last.step) == (runs["rl"].run_id, 2)
    assert runs["sft"].training().start is None

    def when(label, name):
        return next(e["time"] for e in runs[label].events() if e["event"] == name and e.get("kind") == "train")

    assert when("sft", "finished") <= when("rl", "started") <= when("rl", "finished") <= when("last", "started")
    again = arena("run", folder / "chain.yaml", "--runs", folder / "runs", "--json")
    assert json.loads(again.stdout)["worked"] == 0


def test_gain_and_retention_are_from_the_pretrained_model(finished):
    from peft_arena.analyze.study import analyze_study
    from peft_arena.study.study_view import view_of

    folder, _ = finished
    study, runs = runs_of(folder / "chain.yaml", folder / "runs")
    base = Store(folder / "runs").run(study.base)
    spec = study.targets[0]
    before = base.evaluation(base.final_point(), spec).metrics[0].value
    for arm in analyze_study(Store(folder / "runs"), view_of(study)).targets[0].arms:
        run = next(runs[label] for label in runs if label in arm.evidence.arm.label.split())
        after = run.evaluation(run.final_point(), spec).metrics[0].value
        assert (arm.gain.base, arm.gain.tuned) == pytest.approx((before, after))


def test_a_single_run_begins_at_a_run_by_its_name(finished):
    folder, _ = finished
    _, runs = runs_of(folder / "chain.yaml", folder / "runs")
    settings = ["batch_size=4", "group_size=2", "schedule.steps=1", "max_new_tokens=4", "validation_items=0"]
    settings += ["learning_rate=1e-3", f"init_from.run={runs['sft'].spec.id}"]
    options = [part for setting in settings for part in ("--set", f"train.{setting}")]
    command = ["train", "grpo", "--model", "micro", "--method", "vera", "--task", "micro-reverse", "--out"]
    done = arena(*command, folder / "runs", *options, "--json")
    assert done.returncode == 0, done.stderr
    (run_id,) = [name for name in json.loads(done.stdout)["runs"] if "vera" in name]
    run = Store(folder / "runs").find(run_id)
    assert run.training().start.run_id == runs["sft"].run_id
    assert run.training().start.step == 6
    wrong = arena(*command, folder / "nowhere", *options)
    assert wrong.returncode == 2
    assert f"no run '{runs['sft'].spec.id}' in" in wrong.stderr


def test_a_source_that_fails_fails_what_begins_at_it_and_nothing_else(tmp_path):
    path = study_file(tmp_path, arms=ARMS[:3])
    study, runs = runs_of(path, tmp_path / "runs")
    runs["sft"].create()
    (runs["sft"].path / "steps").write_text("no directory")
    done = arena("run", path, "--runs", tmp_path / "runs", "--json")
    assert done.returncode == 1, done.stderr
    said = json.loads(done.stdout)
    reason = said["failed"][runs["sft"].run_id]
    assert said["failed"] == {
        runs["sft"].run_id: reason,
        runs["rl"].run_id: f"source run {runs['sft'].run_id} failed: {reason}",
        runs["last"].run_id: f"source run {runs['rl'].run_id} failed: source run {runs['sft'].run_id} failed: {reason}",
    }
    assert said["runs"][study.base.run_id] == "done"
    assert said["runs"][runs["rl"].run_id] == "missing", "nothing was tried"
    shown = arena("status", path, "--runs", tmp_path / "runs")
    assert f"missing rl {runs['rl'].run_id}: waits for {runs['sft'].run_id}" in shown.stdout


def orders(root, *specs):
    """Return an order for each run, as a study of single runs gives them."""
    study = study_from(yaml.safe_load(TINY))
    (first, *_) = orders_for(study, Store(root), study.file.execution)
    return [replace(first, run=spec) for spec in specs]


class Told:
    def __init__(self):
        self.said = []

    def progress(self, run_id, stage, fraction, detail):
        self.said.append((run_id, stage))

    def ended(self, run_id, problem):
        self.said.append((run_id, problem))


def test_orders_are_kept_back_until_their_source_is_on_disk(tmp_path):
    source = Store(tmp_path).run(made_spec("lora"))
    begun, free = made_spec("oft", start=source), made_spec("dora")
    told = Told()
    waiting = orders(tmp_path, begun, free)
    sources = _Sources(told)
    assert sources.first_ready(waiting).run == free
    assert sources.first_ready(waiting[:1]) is None
    assert told.said == [(begun.run_id, f"waits for {source.run_id}")], "said once"
    outcome = Outcome()
    sources.drop_lost(waiting, {source.run_id}, outcome)
    assert (len(waiting), outcome.failed) == (2, {}), "its source is worked on"
    trained_run(tmp_path, "lora")
    assert sources.first_ready(waiting).run == begun


def test_orders_whose_source_is_lost_are_given_up(tmp_path):
    source = Store(tmp_path).run(made_spec("lora"))
    begun = made_spec("oft", start=source)
    last = made_spec("dora", start=Store(tmp_path).run(begun))
    for failed, reason in [({source.run_id: "no room"}, "failed: no room"), ({}, "is not trained, and nothing here")]:
        told, outcome = Told(), Outcome(failed=dict(failed))
        waiting = orders(tmp_path, last, begun)
        _Sources(told).drop_lost(waiting, {begun.run_id, last.run_id}, outcome)
        assert waiting == []
        assert outcome.failed[begun.run_id].startswith(f"source run {source.run_id} {reason}")
        assert outcome.failed[last.run_id].startswith(f"source run {begun.run_id} failed: source run {source.run_id}")
        assert [run_id for run_id, _ in told.said] == [begun.run_id, last.run_id]


def test_a_source_that_is_no_arm_is_trained_and_no_more(tmp_path):
    source = made_spec("lora")
    data = yaml.safe_load(TINY) | {"rl": RL, "arms": [ARMS[1]]}
    data["arms"][0]["train"] = {"objective": "grpo", "init_from": {"run": "x"}}
    study = study_from(data, find_run=lambda name: source)
    assert study.sources() == [source]
    found = {order.run.run_id: order for order in orders_for(study, Store(tmp_path), study.file.execution)}
    hidden = found[source.run_id]
    assert (hidden.train_only, hidden.evaluations, hidden.geometry, hidden.scans) == (True, (), (), ())
    assert not found[study.arms[0].runs[0].run_id].train_only
    (item,) = [item for item in plan(study, Store(tmp_path)) if item.label == "source"]
    assert [stage.what for stage in item.stages] == ["describe", "train"]
    run = trained_run(tmp_path, "lora")
    assert run.spec == source
    states = {item.label: item.state for item in plan(study, Store(tmp_path))}
    assert states["source"] == "done"
    (rl,) = [item for item in plan(study, Store(tmp_path)) if item.label == "rl"]
    assert rl.reason == "", "there is nothing to wait for"
    assert init_of(rl.run).run == source
    assert run.steps() == [STEP]
