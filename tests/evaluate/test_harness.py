"""Tasks of lm-eval by name, offline, against lm-eval's own model class."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from evaluate_toys import WORDS, spec

from peft_arena.core.errors import UserError
from peft_arena.core.specs import EvalSpec
from peft_arena.evaluate import harness
from peft_arena.evaluate.run import evaluate, evaluate_many
from peft_arena.models.load import Loaded
from peft_arena.tasks.base import TaskCard
from peft_arena.tasks.foreign import packaged_file

POINT: dict[str, Any] = {"run_id": "r", "step": 0, "factor": 1.0, "progress": False}
PLAIN_MEAN = {"aggregation": "mean", "higher_is_better": True}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Local task files with their data."""
    rng = random.Random(3)
    rows = [
        {
            "question": f"{n} " + " ".join(rng.choices(WORDS, k=rng.randint(1, 6))) + (" " if n % 2 else ""),
            "choices": [" ".join(rng.choices(WORDS, k=rng.randint(1, 2))) for _ in range(3)],
            "gold": n % 3,
        }
        for n in range(12)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "metadata": {"version": 1.5},
    }
    choice = {
        "task": "toy_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", **PLAIN_MEAN}, {"metric": "acc_norm", **PLAIN_MEAN}],
    }
    text = {
        "task": "toy_generate",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n", "an"], "max_gen_toks": 10, "do_sample": False},
        "filter_list": [
            {"name": "first", "filter": [{"function": "take_first"}]},
            {"name": "low", "filter": [{"function": "lowercase"}, {"function": "take_first"}]},
        ],
        "metric_list": [{"metric": "exact_match", **PLAIN_MEAN}],
    }
    rolling = {
        "task": "toy_rolling",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    }
    group = {"group": "toy_group", "task": ["toy_choice", "toy_generate"]}
    for table in (shared | choice, shared | text, shared | rolling, group):
        name = table.get("task") if isinstance(table.get("task"), str) else "toy_group"
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(table), encoding="utf-8")
    return tmp_path


def stock(loaded: Loaded, folder: Path, name: str, **options: Any) -> dict[str, Any]:
    """What lm-eval itself reports, with its own model class."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    lm = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=4)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(model=lm, tasks=[name], task_manager=manager, bootstrap_iters=0, **options)
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    assert found is not None
    return dict(found)


def test_choices_agree_with_lm_eval(loaded: Loaded, folder: Path) -> None:
    expected = stock(loaded, folder, "toy_choice")
    record = evaluate(loaded, loaded.model, spec("lm-eval:toy_choice", include_path=str(folder)), **POINT)
    accuracy, normalised = record.metrics
    assert accuracy.value == pytest.approx(expected["results"]["toy_choice"]["acc,none"])
    assert normalised.value == pytest.approx(expected["results"]["toy_choice"]["acc_norm,none"])
    assert accuracy.stderr is not None and accuracy.n == 12 and accuracy.unit == "fraction"
    theirs = {sample["doc_id"]: sample for sample in expected["samples"]["toy_choice"]}
    assert [item.value for item in record.items] == [theirs[place]["acc"] for place in range(12)]


def test_few_shot_examples_are_those_of_lm_eval(loaded: Loaded, folder: Path) -> None:
    expected = stock(loaded, folder, "toy_choice", num_fewshot=1)
    wanted = spec("lm-eval:toy_choice", include_path=str(folder), num_fewshot=1)
    record = evaluate(loaded, loaded.model, wanted, **POINT)
    theirs = {sample["doc_id"]: sample for sample in expected["samples"]["toy_choice"]}
    assert [item.value for item in record.items] == [theirs[place]["acc"] for place in range(12)]
    assert record.engine["num_fewshot"] == 1


def test_generation_agrees_with_lm_eval(loaded: Loaded, folder: Path) -> None:
    expected = stock(loaded, folder, "toy_generate")
    record = evaluate(loaded, loaded.model, spec("lm-eval:toy_generate", include_path=str(folder)), **POINT)
    theirs = {s["doc_id"]: s["resps"][0][0] for s in expected["samples"]["toy_generate"]}
    assert [item.output for item in record.items] == [theirs[place] for place in range(12)]
    assert record.card["description"].count("filter first")


def test_rolling_agrees_with_lm_eval_and_has_no_item_numbers(loaded: Loaded, folder: Path) -> None:
    expected = stock(loaded, folder, "toy_rolling")["results"]["toy_rolling"]
    record = evaluate(loaded, loaded.model, spec("lm-eval:toy_rolling", include_path=str(folder)), **POINT)
    assert record.metrics[0].value == pytest.approx(expected["word_perplexity,none"], rel=1e-4)
    assert record.metrics[1].value == pytest.approx(expected["bits_per_byte,none"], rel=1e-4)
    assert record.metrics[0].stderr is None and "own function" in record.metrics[0].how
    assert {item.value for item in record.items} == {None}
    assert all("no number per item" in item.reason for item in record.items)


def test_chat_template_is_applied(loaded: Loaded, folder: Path) -> None:
    expected = stock(loaded, folder, "toy_generate", apply_chat_template=True)
    options = {"include_path": str(folder), "apply_chat_template": True}
    record = evaluate(loaded, loaded.model, spec("lm-eval:toy_generate", **options), **POINT)
    theirs = {s["doc_id"]: s["resps"][0][0] for s in expected["samples"]["toy_generate"]}
    assert [item.output for item in record.items] == [theirs[place] for place in range(12)]


def test_metric_and_filter_can_be_chosen(loaded: Loaded, folder: Path) -> None:
    here = {"include_path": str(folder)}
    record = evaluate(loaded, loaded.model, spec("lm-eval:toy_choice", **here, metric="acc_norm"), **POINT)
    assert [m.metric for m in record.metrics] == ["acc_norm", "acc"]
    record = evaluate(loaded, loaded.model, spec("lm-eval:toy_generate", **here, metric="exact_match,low"), **POINT)
    assert "exact_match,low" in record.metrics[0].how


def test_limit_keeps_the_first_items(loaded: Loaded, folder: Path) -> None:
    record = evaluate(loaded, loaded.model, spec("lm-eval:toy_choice", 4, include_path=str(folder)), **POINT)
    assert [item.id.split("-")[0] for item in record.items] == ["0", "1", "2", "3"]


def test_long_prompts_are_unscored_where_lm_eval_would_cut_them(loaded: Loaded, folder: Path) -> None:
    options = {"include_path": str(folder), "max_new_tokens": 118}
    record = evaluate(loaded, loaded.model, spec("lm-eval:toy_generate", **options), **POINT)
    reasons = [item.reason for item in record.items if item.value is None]
    assert reasons and all("do not fit the model's context of 128" in reason for reason in reasons)
    assert record.metrics[0].unscored == len(reasons)


def test_card_is_filled_from_the_definition(loaded: Loaded, folder: Path) -> None:
    record = evaluate(loaded, loaded.model, spec("lm-eval:toy_choice", include_path=str(folder)), **POINT)
    card = TaskCard.model_validate(record.card)
    assert card.name == "lm-eval:toy_choice" and card.kind == "choice"
    assert card.source == "json (test split)" and "version 1.5" in card.revision and card.licence == "see source"
    (folder / "toy_choice.yaml").write_text((folder / "toy_choice.yaml").read_text() + "# edited\n")
    edited = evaluate(loaded, loaded.model, spec("lm-eval:toy_choice", include_path=str(folder)), **POINT)
    assert edited.card["revision"] != card.revision


def test_random_generators_are_put_back(loaded: Loaded, folder: Path) -> None:
    random.seed(5)
    expected = random.random(), torch.manual_seed(5) and torch.rand(1)
    random.seed(5)
    torch.manual_seed(5)
    evaluate(loaded, loaded.model, spec("lm-eval:toy_choice", include_path=str(folder)), **POINT)
    assert (random.random(), torch.rand(1)) == expected


def test_ours_and_theirs_together(loaded: Loaded, folder: Path) -> None:
    from evaluate_toys import make

    wanted = [spec("lm-eval:toy_choice", include_path=str(folder)), spec("write")]
    records = evaluate_many(loaded, loaded.model, wanted, make=make, **POINT)
    assert [record.card["name"] for record in records] == ["lm-eval:toy_choice", "write"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("toy_group", {}, "is a group .* one by one: toy_choice, toy_generate"),
        ("toy_choice", {"metric": "f1"}, "no metric 'f1'. Known: acc,none, acc_norm,none"),
        ("toy_choice", {"num_fewshots": 2}, "unknown key 'num_fewshots'.*Did you mean 'num_fewshot'"),
        ("toy_choice", {"max_new_tokens": 2}, "does not generate"),
        ("toy_choice", {"include_path": "/nowhere"}, "is not a folder"),
    ],
)
def test_wrong_settings_are_refused(
    loaded: Loaded, folder: Path, name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(loaded, loaded.model, spec(f"lm-eval:{name}", **{"include_path": str(folder), **options}), **POINT)


def test_too_many_items_and_other_splits_are_refused(loaded: Loaded, folder: Path) -> None:
    wanted = spec("lm-eval:toy_choice", 13, include_path=str(folder))
    with pytest.raises(UserError, match="has 12 items; 13"):
        evaluate(loaded, loaded.model, wanted, **POINT)
    other = EvalSpec(task=wanted.task, split="validation")
    with pytest.raises(UserError, match="evaluated on its test split"):
        evaluate(loaded, loaded.model, other, **POINT)


def test_unknown_names_get_the_nearest(loaded: Loaded, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    built: list[int] = []

    def small_index() -> Any:
        built.append(1)
        return TaskManager(include_path=str(folder), include_defaults=False)

    monkeypatch.setattr(harness, "_all_tasks", small_index)
    with pytest.raises(UserError, match=r"unknown lm-eval task 'toy_choise'\. Nearest: toy_choice"):
        evaluate(loaded, loaded.model, spec("lm-eval:toy_choise"), **POINT)
    assert built == [1]


def test_known_names_need_no_index(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_index() -> Any:
        raise AssertionError("the index was built")

    monkeypatch.setattr(harness, "_all_tasks", no_index)
    found = packaged_file("piqa")
    assert found is not None and found.name == "piqa.yaml"
    assert packaged_file("no_such_task_anywhere") is None
