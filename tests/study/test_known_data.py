"""What a plan knows of the user's own file: counts, lengths, what defaults take, what is refused before any work."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_arena.core.errors import UserError
from peft_arena.core.specs import ModelSpec
from peft_arena.models.load import pin
from peft_arena.study import token_lengths as lengths
from peft_arena.study.item_checks import check_items
from peft_arena.study.known_data import planned
from peft_arena.study.labels import task_labels
from peft_arena.study.preflight import check_place, check_study
from peft_arena.study.reach import reaches
from peft_arena.study.read_study import study_from
from peft_arena.study.study_cost import estimate
from peft_arena.tasks.base import Task, split_items
from peft_arena.tasks.registry import display_name, make_task

COLUMNS = {"prompt": "question", "response": "reply"}


def write(path, count, size=5):
    words = [f"{number:0{size}d}" for number in range(count)]
    rows = [{"question": f"Turn round: {word}", "reply": word[::-1]} for word in words]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def study(tmp_path, count=400, *, train=None, config=None, arms=None, **more):
    """Return the study of the README with a file of so many rows."""
    own = {"path": str(write(tmp_path / "tickets.jsonl", count)), "columns": COLUMNS, "scorer": "exact_match"}
    own |= {"name": "tickets", **(config or {})}
    target = {"task": "custom", "config": own, **more.pop("target", {})}
    data = {"name": "own", "title": "Mine", "model": {"name": "micro"}, "targets": [target]}
    data["train"] = {"schedule": {"epochs": 2}, "learning_rate": 1e-3, **(train or {})}
    data |= {"arms": arms or [{"method": "lora"}], "seeds": [0], **more}
    return study_from(data)


def notes(found):
    """Return the notes but that of the form, which every study of a file has."""
    return [f"{note.about}: {note.text}" for note in found if not note.text.startswith("read as ")]


def test_a_default_takes_the_validation_items_there_are_and_says_so(tmp_path):
    (said,) = notes(check_study(study(tmp_path), at_hand_only=True))
    assert said == (
        "tickets: the held-out loss is over 40 validation items, all there are, not 64 (train.validation_items)"
    )
    assert notes(check_study(study(tmp_path, 800))) == []


def test_the_run_is_the_same_whether_the_default_was_stated_or_not(tmp_path):
    assert study(tmp_path, 800).runs()[1].id == study(tmp_path, 800, train={"validation_items": 64}).runs()[1].id


@pytest.mark.parametrize("at_hand_only", [True, False])
def test_a_number_that_the_study_states_is_met_or_refused(tmp_path, at_hand_only):
    for changes, message in [
        (
            {"train": {"validation_items": 64}},
            "train.validation_items is 64, and task tickets has 40 items",
        ),
        ({"target": {"items": 500}}, "items is 500, and task tickets has 40 items in its test split"),
        ({"train": {"examples": 321}}, "train.examples is 321, and task tickets has 320 items in its train split"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            check_study(study(tmp_path, **changes), at_hand_only=at_hand_only)
        assert "\n" not in str(caught.value)


def test_without_a_validation_split_there_is_no_held_out_loss_unless_it_was_asked_for(tmp_path):
    halves = {"config": {"splits": {"train": 0.5, "test": 0.5}}}
    assert notes(check_study(study(tmp_path, **halves))) == [
        "tickets: there is no held-out loss: the task has no validation split"
    ]
    with pytest.raises(UserError, match="validation_items is 8, and task tickets has no validation split: give it one"):
        check_study(study(tmp_path, **halves, train={"validation_items": 8}))
    assert notes(check_study(study(tmp_path, **halves, train={"validation_items": 0}))) == []


def test_calibration_takes_the_examples_there_are_unless_a_number_was_stated(tmp_path):
    eva = {"method": "eva"}
    said = notes(check_study(study(tmp_path, 12, arms=[eva])))
    assert said[0] == "eva: its start is chosen by 10 training examples, all there are, not 64 (calibration_examples)"
    stated = {**eva, "config": {"calibration_examples": 64}}
    with pytest.raises(UserError, match="calibration_examples of eva is 64, and task tickets has 10 items"):
        check_study(study(tmp_path, 12, arms=[stated]))


@given(rows=st.integers(3, 60), wanted=st.integers(1, 12))
def test_whatever_the_size_a_default_never_refuses_and_a_number_is_met_or_refused(tmp_path_factory, rows, wanted):
    folder = tmp_path_factory.mktemp("rows")
    check_items(study(folder, rows))
    stated = study(folder, rows, train={"validation_items": wanted})
    there = len(split_items(make_task("custom", stated.targets[0].task.config), "validation"))
    if wanted <= there:
        assert notes(check_items(stated)) == []
    else:
        with pytest.raises(UserError, match=f"validation_items is {wanted}, and task tickets has {there} items"):
            check_items(stated)


def test_what_a_training_would_refuse_is_refused_before_it(tmp_path):
    grpo = {"method": "lora", "train": {"objective": "grpo", "max_new_tokens": 64}}
    for changes, message in [
        ({"train": {"max_length": 8}}, "no train example of task tickets is left: all 320 have more than 8 tokens"),
        (
            {"train": {"max_length": 20, "overlong": "error"}},
            r"tickets, train item 0 .* and at most 20 are allowed",
        ),
        ({"train": {"schedule": {"epochs": 0.001}}}, "schedule.epochs 0.001 of 320 examples is less than one example"),
        ({"arms": [grpo], "train": {"max_length": 64}}, "max_new_tokens 64 leaves no room for a prompt"),
        ({"arms": [{"method": "none"}]}, "nothing can be run: none trains nothing"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            check_study(study(tmp_path, **changes), at_hand_only=True)
        assert "\n" not in str(caught.value)


def test_packing_with_virtual_tokens_is_a_refused_arm(tmp_path):
    found = study(tmp_path, train={"packing": True}, arms=[{"method": "prompt_tuning"}, {"method": "lora"}])
    assert "packing cannot be used with method prompt_tuning" in found.arms[0].refused
    assert not found.arms[1].refused


def test_nothing_that_is_not_at_hand_is_read_for_a_plan(tmp_path, monkeypatch):
    found = study(tmp_path)
    monkeypatch.setattr(Task, "at_hand", False)
    monkeypatch.setattr("peft_arena.tasks.custom.Custom.items", lambda *_: pytest.fail("read"))
    assert notes(check_study(found, at_hand_only=True)) == []
    assert planned(found.targets[0]) is None


def test_lengths_are_measured_with_the_models_tokenizer(tmp_path, monkeypatch):
    found = study(tmp_path, train={"max_length": 64})
    texts = estimate(found).notes
    (training,) = (text for text in texts if text.startswith("training: "))
    assert "from all 320 items of its split" in training and texts[training] == ["tickets"]
    assert not any("upper bound" in text or "not known" in text for text in texts)
    train = found.arms[0].runs[0].train
    measured = lengths.training_lengths(found.base.model, train, 256)
    task = make_task("custom", found.targets[0].task.config)
    tokenizer = lengths.tokenizer_at_hand(found.base.model)
    sizes = [len(tokenizer.encode(task.target(item), add_special_tokens=False)) + 1 for item in task.items("train")]
    assert measured.answer == pytest.approx(sum(sizes) / len(sizes)) and measured.counted
    assert measured.prompt + measured.answer <= measured.example <= measured.longest
    monkeypatch.setattr(lengths, "tokenizer_at_hand", lambda _: pytest.fail("measured before"))
    assert lengths.training_lengths(found.base.model, train, 256) == measured


def test_without_a_tokenizer_characters_are_counted_and_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(lengths, "tokenizer_at_hand", lambda _: None)
    found = study(tmp_path, 30)
    measured = lengths.evaluation_lengths(found.base.model, found.targets[0], None)
    assert not measured.counted and measured.prompt == round(len("Turn round: 00000") / 4)
    assert "from all 3 items of its split, 4 characters taken for a token" in measured.how


def test_a_models_tokenizer_is_at_hand_only_where_its_files_are(tmp_path):
    assert lengths.tokenizer_at_hand(pin(ModelSpec(name="micro"))) is not None
    assert lengths.tokenizer_at_hand(ModelSpec(name="someone/somewhere", revision="0" * 40)) is None


def test_items_of_one_group_are_one_unit(tmp_path):
    rows = [{"question": f"{number}?", "reply": "yes", "of": number % 4} for number in range(40)]
    path = tmp_path / "grouped.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = {"train": 0.5, "test": 0.5}
    config = {"path": str(path), "columns": {**COLUMNS, "group": "of"}, "splits": splits, "name": "tickets"}
    found = study(tmp_path, config=config)
    asked = planned(found.targets[0])
    assert (asked.items, asked.units, asked.alike) == (20, 2, 2.0)
    (target,) = reaches(found)
    assert "too few items to say anything on tickets: 2 groups, and an interval needs 6" in str(target)


def test_two_files_are_told_apart(tmp_path):
    other = write(tmp_path / "other.jsonl", 60, size=6)
    own = {"path": str(other), "columns": COLUMNS, "scorer": "exact_match", "role": "retention"}
    own |= {"splits": {"train": 0.2, "test": 0.8}}
    named = study(tmp_path, retention=[{"task": "custom", "config": {**own, "name": "letters"}}])
    assert list(task_labels(named).values()) == ["tickets", "letters"]
    assert [one.what for one in reaches(named)] == ["on tickets", "of mean retention over 1 task"]
    alike = study(tmp_path, retention=[{"task": "custom", "config": {**own, "name": "tickets"}}])
    one, two = task_labels(alike).values()
    assert one != two and one.startswith("tickets (") and two.startswith("tickets (")
    assert display_name(named.retention[0].task) == "letters"


def test_what_the_study_says_of_a_file_is_found_by_its_name(tmp_path):
    sizes = {"execution": {"estimate": {"tasks": {"tickets": {"example_tokens": 9}}}}}
    assert not any(text.startswith("training: ") for text in estimate(study(tmp_path, **sizes)).notes)


def test_a_runs_directory_that_cannot_be_is_refused_and_none_is_made(tmp_path):
    check_place(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to .*file/runs: .*file is a file"):
        check_place(tmp_path / "file" / "runs")


def test_gold_answers_that_an_answer_cannot_hold_are_refused_or_counted(tmp_path):
    found = study(tmp_path, config={"max_new_tokens": 4})
    with pytest.raises(
        UserError, match=r"row \d+ cannot be won by its own answer '\d+': it has 5 tokens .* is 4"
    ) as why:
        check_study(found, at_hand_only=True)
    assert "nor can 399 more items" in str(why.value) and "\n" not in str(why.value)
    with pytest.raises(UserError, match="nor can 399 more items"):
        check_study(found)
    counted = study(tmp_path, config={"max_new_tokens": 4, "unusable": "count"})
    assert any("tickets: 400 items that cannot be won" in text for text in notes(check_study(counted)))
    assert not any("cannot be won" in text for text in notes(check_study(study(tmp_path))))
