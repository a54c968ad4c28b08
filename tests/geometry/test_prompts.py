"""Prompt sets: from tasks and files, in turn, as training and evaluation would feed them; and every refusal."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from peft_arena.core.errors import UserError
from peft_arena.core.geometry import PromptSpec
from peft_arena.core.ids import file_hash
from peft_arena.core.specs import ModelSpec, TaskSpec
from peft_arena.geometry.prompts import prompt_set, with_hash
from peft_arena.models.load import load_tokenizer, resolve
from peft_arena.models.render import encode_prompt, encode_text
from peft_arena.tasks.base import Item, Kind, Message
from peft_arena.tasks.registry import make_task


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve(ModelSpec(name="micro")))


def spec_of(name: str, **others) -> PromptSpec:
    card = make_task(name).card
    return PromptSpec(task=TaskSpec(name=name, version=card.version, revision=card.revision), **others)


def written(path, text: str) -> PromptSpec:
    path.write_text(text, encoding="utf-8")
    return PromptSpec(file=str(path))


def read(specs, tokenizer, prompts=100, max_length=200):
    return prompt_set(specs, tokenizer, prompts=prompts, max_length=max_length)


def test_prompts_of_a_task_are_those_of_evaluation(tokenizer):
    task = make_task("micro-cipher")
    wanted = [tuple(encode_prompt(tokenizer, task.prompt(item))) for item in task.items("validation")[:5]]
    found = read([spec_of("micro-cipher", split="validation")], tokenizer, prompts=5)
    assert list(found.ids) == wanted
    assert (found.cut, found.empty) == (0, 0)


def test_a_task_of_text_gives_its_texts(tokenizer, monkeypatch):
    class Text:
        card = SimpleNamespace(kind=Kind.TEXT)

        def items(self, split):
            return [Item(question="a text", answer="never shown")]

        def prompt(self, item):
            return "never asked"

    monkeypatch.setattr("peft_arena.tasks.registry.made_task", lambda spec: Text())
    found = read([spec_of("micro-cipher")], tokenizer)
    assert [list(ids) for ids in found.ids] == [encode_text(tokenizer, "a text")]


def test_sources_are_taken_in_turn(tokenizer, tmp_path):
    first = written(tmp_path / "a.txt", "one\ntwo\nthree\nfour\n")
    second = written(tmp_path / "b.txt", "five\n\nsix\n")
    texts = ["one", "five", "two", "six", "three", "four"]
    assert list(read([first, second], tokenizer).ids) == [tuple(encode_text(tokenizer, text)) for text in texts]
    assert len(read([first, second], tokenizer, prompts=3).ids) == 3
    assert read([first, first], tokenizer).ids[0] == read([first, first], tokenizer).ids[1]  # nothing is removed


def test_every_kind_of_entry(tokenizer, tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    values = ["plain", {"text": "plain"}, {"prompt": "Hi"}, {"messages": turns}]
    chat = tokenizer.chat_template is not None
    wanted = [encode_text(tokenizer, "plain")] * 2
    wanted += [encode_prompt(tokenizer, (Message("user", "Hi"),)) if chat else encode_text(tokenizer, "Hi")]
    if chat:
        wanted += [encode_prompt(tokenizer, (Message("system", "Be brief."), Message("user", "Hi")))]
    else:
        values.pop()
    lines = written(tmp_path / "a.jsonl", "\n".join(json.dumps(value) for value in values))
    whole = written(tmp_path / "a.json", json.dumps(values))
    assert [list(ids) for ids in read([lines], tokenizer).ids] == wanted
    assert read([whole], tokenizer).ids == read([lines], tokenizer).ids


def test_messages_need_a_template(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(UserError, match=r"line 1: the tokenizer of .* has no chat template"):
        read([written(tmp_path / "a.jsonl", '{"messages": [{"role": "user", "content": "x"}]}')], tokenizer)
    found = read([written(tmp_path / "b.jsonl", '{"prompt": "Hi"}')], tokenizer)
    assert list(found.ids[0]) == encode_text(tokenizer, "Hi")


def test_long_prompts_are_cut_on_the_right_and_counted(tokenizer, tmp_path):
    spec = written(tmp_path / "a.txt", "one two three four five six seven\none\n")
    whole, cut = read([spec], tokenizer), read([spec], tokenizer, max_length=3)
    assert cut.ids[0] == whole.ids[0][:3]
    assert (cut.cut, whole.cut) == (1, 0)
    assert "1 of them cut to 3 tokens" in cut.describe()
    assert cut.id != whole.id


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "x", r"must end in .json, .jsonl, .txt, got '.csv'"),
        ("a.txt", "\n \n", r"holds no prompts"),
        ("a.json", "[]", r"holds no prompts"),
        ("a.json", '{"text": "x"}', r"must hold a list of prompts, got dict"),
        ("a.json", "[1]", r"entry 1: a prompt is a string or an object, got int"),
        ("a.jsonl", '"x"\n\n{"text": ', r"line 3 is not JSON"),
        ("a.jsonl", '"x"\n{"txet": "y"}', r"unknown key 'txet' \(in prompt file .* line 2\). Did you mean 'text'"),
        ("a.jsonl", '{"text": "x", "prompt": "y"}', r"give exactly one of messages, prompt, text; given: text, prompt"),
        ("a.jsonl", "{}", r"given: none"),
        ("a.jsonl", '{"text": 3}', r"'text' must be a string, got int"),
        ("a.jsonl", '{"text": ""}', r"no prompt of .* has a token; 1 were read"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_line(tokenizer, tmp_path, name, text, message):
    with pytest.raises(UserError, match=message) as caught:
        read([written(tmp_path / name, text)], tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ("[]", "at least one object"),
        ('[{"role": "user"}]', "needs 'role' and 'content'"),
        ('[{"role": "bot", "content": "x"}]', "unknown role 'bot'"),
    ],
)
def test_damaged_messages(tokenizer, tmp_path, monkeypatch, turns, message):
    monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template or "{{ messages[0].content }}")
    with pytest.raises(UserError, match=f"line 1.*{message}|{message}.*line 1"):
        read([written(tmp_path / "a.jsonl", f'{{"messages": {turns}}}')], tokenizer)


def test_files_that_are_not_there_or_not_text(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"'nowhere.txt' does not exist"):
        read([PromptSpec(file="nowhere.txt")], tokenizer)
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        read([PromptSpec(file=str(tmp_path / "folder.txt"))], tokenizer)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="is not UTF-8 text: byte 3"):
        read([PromptSpec(file=str(tmp_path / "latin.txt"))], tokenizer)
    with pytest.raises(UserError, match="needs at least one source"):
        read([], tokenizer)


def test_tasks_of_lm_eval_are_refused(tokenizer):
    with pytest.raises(UserError, match=r"task lm-eval:piqa cannot give prompts"):
        read([PromptSpec(task=TaskSpec(name="lm-eval:piqa"))], tokenizer)


def test_a_file_is_pinned_by_its_content(tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    pinned = with_hash(written(path, "one\n"))
    assert pinned.sha256 == file_hash(path)
    assert with_hash(pinned) == pinned
    assert len(read([pinned], tokenizer).ids) == 1
    path.write_text("two\n")
    with pytest.raises(UserError, match="has changed: its sha256 is"):
        with_hash(pinned)
    with pytest.raises(UserError, match="has changed"):
        read([pinned], tokenizer)
    assert with_hash(spec_of("micro-cipher")) == spec_of("micro-cipher")


def test_half_a_character_is_refused_with_its_place(tokenizer, tmp_path):
    cut = written(tmp_path / "cut.jsonl", '"a text"\n"cut \\ud83d"\n')
    with pytest.raises(UserError, match=r"cut\.jsonl' line 2: a text holds half of a character"):
        read([cut], tokenizer)
