"""A record that cannot be is refused by its file and field, and takes no other record with it."""

import json
import os
import shutil

import pytest

from peft_arena.commands.check import check_path
from peft_arena.core.errors import UserError
from peft_arena.store.files import broken_lines
from peft_arena.store.reading import read_record
from peft_arena.store.records import EvaluationRecord, RunRecord, TrainingRecord
from peft_arena.store.store import RunDirectory, Store
from peft_arena.tasks.recorded import check_task
from scripts.kept import read_kept, unpack
from tests.faults.malformed_kinds import BYTES, COST, EVALUATION, JSON, PLACES, RUN, TRAINING, of_field, of_json


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Return a run of real records: of SmolLM2-135M, trained with lora."""
    runs = tmp_path_factory.mktemp("kept")
    unpack(read_kept("demo"), runs)
    return next(path for path in sorted(runs.iterdir()) if "-lora-" in path.name)


@pytest.fixture
def run(kept, tmp_path):
    shutil.copytree(kept, tmp_path / kept.name, copy_function=os.link)
    return RunDirectory(tmp_path / kept.name, read_record(RunRecord, kept / "run.json").spec)


def files(run):
    evaluation = sorted(run.path.glob("records/*/eval-*.json"))[0]
    records = run.path / "records"
    return {
        "e": evaluation,
        "t": records / "training.json",
        "c": records / "cost-training.json",
        "r": run.path / "run.json",
    }


def read_all(run):
    run.record()
    run.training()
    run.cost("training")
    list(run.evaluations())


KINDS = [
    *(("e", kind, breaks) for kind, breaks in {**EVALUATION, **PLACES, **BYTES, **JSON}.items() if kind != "padding"),
    *(("t", kind, breaks) for kind, breaks in TRAINING.items()),
    *(("c", kind, breaks) for kind, breaks in COST.items()),
    *(("r", kind, breaks) for kind, breaks in RUN.items()),
]


@pytest.mark.parametrize(("which", "kind", "breaks"), KINDS, ids=[f"{which}-{kind}" for which, kind, _ in KINDS])
def test_a_broken_record_is_named(run, which, kind, breaks):
    read_all(run)
    file = files(run)[which]
    breaks(file)
    with pytest.raises(UserError) as caught:
        read_all(run)
    assert file.name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match=file.name):
        check_path(file)


def test_the_message_says_what_is_allowed_and_what_was_given(run):
    EVALUATION["negative step"](files(run)["e"])
    with pytest.raises(UserError, match=r"not a EvaluationRecord of schema 1: step: .*equal to 0, got -1$"):
        list(run.evaluations())


def test_records_in_the_wrong_place_are_refused(run):
    first, second = sorted(run.path.glob("records/*/eval-*.json"))[:2]
    first.unlink()
    os.link(second, first)
    with pytest.raises(UserError, match="out of place: what it holds belongs into records/.*eval-"):
        list(run.evaluations())
    with pytest.raises(UserError, match="out of place"):
        check_path(first)


def test_a_run_in_the_directory_of_another_is_refused_by_check(run):
    RUN["another seed"](files(run)["r"])
    with pytest.raises(UserError, match="out of place: .*-s5-"):
        check_path(files(run)["r"])


def test_every_broken_record_of_a_directory_is_listed_once(run):
    EVALUATION["NaN item"](files(run)["e"])
    COST["seconds below 0"](files(run)["c"])
    PLACES["pipe"](run.path / "events.jsonl")
    with pytest.raises(UserError) as caught:
        check_path(run.path)
    for name in (files(run)["e"].name, "cost-training.json", "events.jsonl is a pipe"):
        assert str(caught.value).count(name) == 1


def test_a_mean_over_parts_of_other_weights_is_still_a_mean():
    """What was settled over strata has items outside [0, 1], and its mean is the headline."""
    mean = {"metric": "f1", "value": 0.5, "unit": "fraction", "better": "higher", "how": "", "n": 2, "stderr": 0.9}
    table = {"run_id": "x", "step": 1, "factor": 1.0, "spec": {"task": {"name": "t"}}, "metrics": [mean]}
    table |= {"card": {}, "engine": {}, "provenance": {}}
    table["items"] = [{"id": "a", "value": 1.4}, {"id": "b", "value": -0.4}]
    from peft_arena.store.sound import doubt

    assert doubt(EvaluationRecord.model_validate(table)) == ""
    table["items"][0]["value"] = 1.5
    assert "metrics.0.value: must be the mean of the items" in doubt(EvaluationRecord.model_validate(table))


def test_an_unreadable_log_of_events_is_no_events(run):
    PLACES["directory"](run.path / "events.jsonl")
    assert run.events() == []
    with pytest.raises(UserError, match=r"events\.jsonl is a directory"):
        run.event_log()
    assert json.loads((run.path / "run.json").read_text())["kind"] == "run"
    assert isinstance(run.training(), TrainingRecord) and Store(run.path.parent).find(run.run_id).run_id == run.run_id


OF_TASK = {
    "an item twice": of_json(lambda t: t["items"][1].update(id=t["items"][0]["id"])),
    "card of another task": of_field("card", "name", value="other"),
    "another chance": of_field("card", "chance", value=0.123),
    "the other direction": of_json(
        lambda t: [one.update(better="lower") for one in (t["metrics"][0], t["card"]["metrics"][0])]
    ),
}


@pytest.mark.parametrize("kind", OF_TASK)
def test_what_the_registered_task_contradicts_is_refused(run, kind):
    OF_TASK[kind](files(run)["e"])
    list(run.evaluations())
    with pytest.raises(UserError, match=f"{files(run)['e'].name} contradicts its task"):
        check_path(files(run)["e"])


def test_a_task_of_another_version_is_not_compared(run):
    for version in (("card", "version"), ("spec", "task", "version")):
        of_field(*version, value=99)(files(run)["e"])
    OF_TASK["another chance"](files(run)["e"])
    check_task(read_record(EvaluationRecord, files(run)["e"]), files(run)["e"])


def test_a_training_that_logged_nothing_is_refused_by_check(run):
    of_field("log", value=[])(files(run)["t"])
    with pytest.raises(UserError, match=r"training\.json contradicts itself: log: must hold at least the last step"):
        check_path(files(run)["t"])


def test_lines_of_killed_writers_are_sound_and_others_are_not(run):
    log = run.path / "events.jsonl"
    log.write_text('{"event": "a"}\n{"event": "sta\n{"a": {"b": 1}\n{\n{"event": "b"}\n{"ev')
    assert [event["event"] for event in run.event_log()] == ["a", "b"] and broken_lines(log) == []
    log.write_text('{"event": "a"}\nnonsense\n[1]\n{"a": NaN}\n{"event": "b"}\n')
    with pytest.raises(UserError, match=r"events\.jsonl is damaged: no JSON object in line 2, 3, 4; remove them"):
        check_path(run.path)


def test_records_without_what_the_run_is_are_mentioned(tmp_path):
    home = tmp_path / "some-lora-0123456789ab"
    cost = {"kind": "cost", "run_id": home.name, "stage": "training", "provenance": {}}
    cost["measures"] = [{"metric": "m", "value": 1.0, "unit": "u", "better": "lower", "how": "", "n": 1}]
    (home / "records").mkdir(parents=True)
    (home / "records" / "cost-training.json").write_text(json.dumps(cost))
    assert check_path(tmp_path)["without_run_json"] == [str(home)]
