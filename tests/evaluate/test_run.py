"""The evaluation of a real (small, random) model against independent truth."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from evaluate_toys import TASKS, Broken, Choose, Text, Write, byte_tokenizer, make, small_llama, spec
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn

from peft_arena.core.errors import UserError
from peft_arena.core.specs import EvalSpec, ModelSpec, Sampling, TaskSpec
from peft_arena.evaluate.decode import Job, Stopper, cut, decode, end_tokens
from peft_arena.evaluate.run import evaluate, evaluate_many
from peft_arena.models.load import Loaded
from peft_arena.models.modes import context_length, evaluation_mode
from peft_arena.models.render import encode_example, encode_prompt, encode_text
from peft_arena.store.records import EvaluationRecord, ItemRecord
from peft_arena.tasks.base import Item


def numbers(item: ItemRecord) -> dict[str, float]:
    """Its further values, without weights."""
    return {name: value for name, (value, _) in item.others.items()}


def listen(model: nn.Module, hear: Callable[[Tensor], object]) -> None:
    """Call with the token ids of every forward pass."""
    model.register_forward_pre_hook(lambda _, __, inputs: hear(inputs["input_ids"]), with_kwargs=True)


POINT: dict[str, Any] = {"run_id": "r", "step": 0, "factor": 1.0, "progress": False, "make": make}


def run(loaded: Loaded, name: str, model: Any = None, **options: Any) -> EvaluationRecord:
    return evaluate(loaded, loaded.model if model is None else model, spec(name), **{**POINT, **options})


def argmax_loop(loaded: Loaded, ids: list[int], limit: int) -> list[int]:
    """Greedy tokens the slow way: no cache, no batch, no padding."""
    new: list[int] = []
    for _ in range(limit):
        with torch.no_grad():
            logits = loaded.model(torch.tensor([ids + new])).logits[0, -1]
        new.append(int(logits.argmax()))
        if new[-1] == loaded.tokenizer.eos_token_id:
            break
    return new


def direct_log_likelihood(loaded: Loaded, context: list[int], rest: list[int]) -> float:
    with torch.no_grad():
        logs = loaded.model(torch.tensor([context + rest])).logits[0].double().log_softmax(-1)
    return sum(float(logs[len(context) + place - 1, token]) for place, token in enumerate(rest))


def test_greedy_text_is_that_of_a_plain_argmax_loop(loaded: Loaded) -> None:
    record = run(loaded, "write", batch_size=7)
    task = Write()
    for item, found in zip(task.items("test"), record.items, strict=True):
        new = argmax_loop(loaded, encode_prompt(loaded.tokenizer, item.question), 12)
        new = new[: new.index(loaded.tokenizer.eos_token_id)] if loaded.tokenizer.eos_token_id in new else new
        text = loaded.tokenizer.decode(new, skip_special_tokens=True)
        ends = [text.find(mark) for mark in task.generation.stop if mark in text]
        assert found.output == (text[: min(ends)] if ends else text)
        assert found.id == item.id


def test_choice_scores_are_those_of_a_direct_log_softmax(loaded: Loaded) -> None:
    task = Choose()
    for item, found in zip(task.items("test"), run(loaded, "choose").items, strict=True):
        prompt = encode_prompt(loaded.tokenizer, item.question)
        totals = []
        for text in task.continuations(item):
            example = encode_example(loaded.tokenizer, item.question, text)
            assert example.ids[: example.prompt_length] == prompt
            totals.append(direct_log_likelihood(loaded, prompt, example.ids[example.prompt_length : -1]))
        expected = task.score_choice(item, totals)
        assert found.value == expected.value
        assert found.extracted == expected.extracted
        assert found.others["gold_nll"][0] == pytest.approx(-totals[item.gold or 0], abs=1e-4)


@pytest.mark.parametrize("begin", [False, True])
def test_text_score_predicts_every_token_once(begin: bool) -> None:
    tokenizer = byte_tokenizer(begin)
    loaded = Loaded(spec=ModelSpec(name="toy"), model=small_llama(tokenizer), tokenizer=tokenizer, source="path")
    record = run(loaded, "text")
    for item, found in zip(Text().items("test"), record.items, strict=True):
        ids = tokenizer.encode(item.question, add_special_tokens=False)
        start = tokenizer.bos_token_id if begin else tokenizer.eos_token_id
        total = direct_log_likelihood(loaded, [start], ids)
        assert found.value == pytest.approx(-total / len(ids), abs=1e-4)
        assert found.weight == len(ids)
        bits = -total / math.log(2) / len(item.question.encode())
        assert found.others["bits_per_byte"] == (pytest.approx(bits, abs=1e-4), len(item.question.encode()))
    headline, bytewise = record.metrics
    assert headline.value == pytest.approx(
        sum(i.value * i.weight for i in record.items if i.value is not None) / sum(i.weight for i in record.items)
    )
    assert (headline.unit, bytewise.unit) == ("nats/token", "bits/byte")


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("name", ["write", "chat", "choose"])
def test_the_model_sees_the_ids_of_encode_prompt(name: str, begin: bool) -> None:
    tokenizer = byte_tokenizer(begin)
    model = small_llama(tokenizer)
    loaded = Loaded(spec=ModelSpec(name="toy"), model=model, tokenizer=tokenizer, source="path")
    seen: list[list[int]] = []
    listen(model, lambda ids: seen.append(ids[0].tolist()))
    run(loaded, name, batch_size=1)
    for item in TASKS[name]().items("test"):
        ids = encode_prompt(tokenizer, TASKS[name]().prompt(item))
        assert ids.count(tokenizer.bos_token_id) == int(begin)
        if name == "choose":
            assert any(fed[: len(ids)] == ids for fed in seen)
        else:
            assert ids in seen


@pytest.mark.parametrize("name", ["write", "chat", "choose", "text"])
def test_results_do_not_depend_on_batch_size(loaded: Loaded, name: str) -> None:
    first, *others = [run(loaded, name, batch_size=size) for size in (1, 3, 16)]
    for other in others:
        for a, b in zip(first.items, other.items, strict=True):
            assert a.output == b.output
            assert a.value == pytest.approx(b.value, abs=1e-4)
            assert numbers(a) == pytest.approx(numbers(b), abs=1e-4)


def test_results_do_not_depend_on_item_order(loaded: Loaded) -> None:
    class Turned(Write):
        def items(self, split: Any) -> list[Item]:
            return list(reversed(super().items(split)))

    forward = run(loaded, "write", batch_size=3)
    backward = run(loaded, "write", batch_size=3, make=lambda name, config: Turned())
    assert [i.output for i in forward.items] == [i.output for i in reversed(backward.items)]


ADAPTERS = {
    "lora": LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_do_not_depend_on_batch_size(loaded: Loaded, adapter: str) -> None:
    base = [run(loaded, name) for name in ("write", "choose")]
    torch.manual_seed(0)
    model = get_peft_model(loaded.model, ADAPTERS[adapter])
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.5)
    for name, before in zip(("write", "choose"), base, strict=True):
        one, many = run(loaded, name, model=model, batch_size=1), run(loaded, name, model=model, batch_size=16)
        assert [i.output for i in one.items] == [i.output for i in many.items]
        for a, b in zip(one.items, many.items, strict=True):
            assert numbers(a) == pytest.approx(numbers(b), abs=1e-4)
        assert [(i.output, i.others) for i in one.items] != [(i.output, i.others) for i in before.items]


@pytest.mark.parametrize("adapter", ["prompt", "prefix"])
def test_virtual_tokens_take_room_and_are_decoded_like_a_plain_loop(loaded: Loaded, adapter: str) -> None:
    torch.manual_seed(0)
    model = get_peft_model(loaded.model, ADAPTERS[adapter]).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.5)
    assert context_length(model, loaded.tokenizer) == 128 - 5
    ids = encode_text(loaded.tokenizer, "an ant ran")
    new: list[int] = []
    for _ in range(6):
        with torch.no_grad():
            new.append(int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
    with evaluation_mode(model):
        found = decode(model, loaded.tokenizer, [Job(ids, 6, ())], batch_size=1, done=lambda _: None)
    assert found[0].text == Stopper(loaded.tokenizer, (), end_tokens(model, loaded.tokenizer)).text(new)


def test_an_answer_ends_where_the_template_ends_a_turn() -> None:
    tokenizer = byte_tokenizer()
    model = small_llama(tokenizer)
    turn, other = (int(tokenizer.convert_tokens_to_ids(name)) for name in ("<|im_end|>", "<pad>"))
    tokenizer.eos_token = "<pad>"  # as of pretrained models whose template ends turns with another token
    model.generation_config.eos_token_id = other
    assert end_tokens(model, tokenizer) == {other, turn}
    stopper = Stopper(tokenizer, (), end_tokens(model, tokenizer))
    rows = tokenizer.encode("it is 5<|im_end|>\nuser\nNext? it is 6", add_special_tokens=False)
    assert stopper.text(rows) == "it is 5"
    for template in (None, "{{ messages[0].content }}", "{{ raise_exception('no') }}"):
        tokenizer.chat_template = template
        assert end_tokens(model, tokenizer) == {other}


def test_too_long_is_unscored_and_never_cut(loaded: Loaded) -> None:
    seen: list[int] = []
    listen(loaded.model, lambda ids: seen.append(ids.shape[1]))
    record = run(loaded, "long")
    assert [i.value is None for i in record.items] == [False, False, False, True]
    assert "do not fit the model's context of 128" in record.items[3].reason
    assert (record.metrics[0].n, record.metrics[0].unscored) == (3, 1)
    assert max(seen) == 116 + 11  # what was read in the end is looked at once more as a whole


@pytest.mark.parametrize("name", ["write", "long", "broken"])
def test_answers_that_met_the_limit_are_counted(loaded: Loaded, name: str) -> None:
    record, task = run(loaded, name), TASKS[name]()
    asked = [item for item in task.items("test") if not (name == "broken" and item.question.startswith("3 "))]
    asked = asked[:3] if name == "long" else asked
    jobs = [Job(encode_text(loaded.tokenizer, item.question), 12, ("\n", "an")) for item in asked]
    with evaluation_mode(loaded.model):
        found = decode(loaded.model, loaded.tokenizer, jobs, batch_size=1, done=lambda _: None)
    met = sum(len(one.ids) == 12 and not one.ended for one in found)
    assert record.written is not None and met > 0
    assert record.written.model_dump() == {"answers": len(asked), "met_limit": met, "limit": 12}


def test_where_nothing_is_written_nothing_is_said_of_limits(loaded: Loaded) -> None:
    for name in ("choose", "text"):
        record = run(loaded, name)
        assert record.written is None and "written" not in record.model_dump(mode="json")
    sampled = spec("write").model_copy(update={"sampling": Sampling(samples=3)})
    found = evaluate(loaded, loaded.model, sampled, **POINT).written
    assert found is not None and found.answers == 60 and found.met_limit <= 60


def test_broken_scoring_loses_only_its_items(loaded: Loaded) -> None:
    record = run(loaded, "broken")
    assert [place for place, item in enumerate(record.items) if item.value is None] == [3, 5]
    assert "KeyError" in record.items[3].reason and "ZeroDivisionError: oops" in record.items[5].reason
    assert record.metrics[0].value == 1.0
    assert [item.id for item in record.items] == [item.id for item in Broken().items("test")]


def test_infinite_weights_give_no_number(loaded: Loaded) -> None:
    with torch.no_grad():
        loaded.model.model.norm.weight.fill_(float("nan"))
    for record in evaluate_many(loaded, loaded.model, [spec(name) for name in ("write", "choose", "text")], **POINT):
        assert record.metrics[0].value is None
        assert all("not finite" in item.reason for item in record.items)


def test_the_model_is_left_as_it_was(loaded: Loaded) -> None:
    loaded.model.train()
    loaded.model.model.layers[0].eval()
    for place, p in enumerate(loaded.model.parameters()):
        p.requires_grad_(place % 2 == 0)
    before = [p.detach().clone() for p in loaded.model.parameters()]
    state = torch.get_rng_state()
    run(loaded, "write")
    assert loaded.model.training and not loaded.model.model.layers[0].training
    assert [p.requires_grad for p in loaded.model.parameters()] == [place % 2 == 0 for place in range(len(before))]
    assert all(torch.equal(a, b) for a, b in zip(before, loaded.model.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    loaded.model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()


def test_flags_are_set_inside_and_restored_after_an_error(loaded: Loaded) -> None:
    loaded.model.requires_grad_(False)
    with pytest.raises(RuntimeError, match="inside"), evaluation_mode(loaded.model):
        assert all(p.requires_grad for p in loaded.model.parameters())
        raise RuntimeError("inside")
    assert not any(p.requires_grad for p in loaded.model.parameters())


def test_many_at_once_equals_one_by_one(loaded: Loaded) -> None:
    names = ["write", "choose", "text", "chat"]
    together = evaluate_many(loaded, loaded.model, [spec(name) for name in names], **POINT)
    assert [record.spec.task.name for record in together] == names
    for name, record in zip(names, together, strict=True):
        alone = run(loaded, name)
        assert [i.output for i in alone.items] == [i.output for i in record.items]
        assert [i.value for i in alone.items] == pytest.approx([i.value for i in record.items], abs=1e-4)


def test_record_says_what_ran(loaded: Loaded) -> None:
    record = evaluate(loaded, loaded.model, spec("choose", 5), **{**POINT, "batch_size": 3})
    assert record.card["name"] == "choose" and record.card["metrics"][0]["name"] == "accuracy"
    assert len(record.items) == 5
    assert {m.metric for m in record.metrics} == {"accuracy", "accuracy_sum", "gold_nll"}
    assert record.engine["engine"] == "lm-eval" and record.engine["batch_size"] == 3
    assert EvaluationRecord.model_validate_json(record.model_dump_json()) == record


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (spec("empty"), "no items"),
        (EvalSpec(task=TaskSpec(name="write", revision="1"), split="validation"), "no items"),
        (spec("write", 21), "has 20 items .* 21 were asked for"),
        (EvalSpec(task=TaskSpec(name="write", version=2)), "has version 1, and was planned with 2"),
        (EvalSpec(task=TaskSpec(name="write", revision="0")), "has data 1, and was planned with 0"),
    ],
)
def test_wrong_requests_are_refused(loaded: Loaded, wanted: EvalSpec, message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(loaded, loaded.model, wanted, **POINT)


def test_conversations_need_a_template(loaded: Loaded) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        run(Loaded(loaded.spec, loaded.model, tokenizer, "path"), "chat")


def test_the_same_evaluation_twice_is_refused(loaded: Loaded) -> None:
    with pytest.raises(UserError, match="twice"):
        evaluate_many(loaded, loaded.model, [spec("write"), spec("write")], **POINT)


def test_cut_takes_the_first_of_all_stops() -> None:
    assert cut("one two three", ("three", "two")) == "one "
    assert cut("one", ("x", "")) == "one"


def test_special_token_as_stop_ends_the_row(loaded: Loaded) -> None:
    stopper = Stopper(loaded.tokenizer, ("<|im_start|>", "ab"), frozenset({1}))
    start = loaded.tokenizer.convert_tokens_to_ids("<|im_start|>")
    a, b = loaded.tokenizer.encode("a")[0], loaded.tokenizer.encode("b")[0]
    assert stopper.ended([[a, start], [a, b], [b, a], [a, 1]]) == [True, True, False, True]
    assert stopper.text([a, start, b]) == "a"
    assert stopper.text([b, a, b, a]) == "b"


def test_a_row_that_has_ended_leaves_the_batch(loaded: Loaded) -> None:
    rows: list[int] = []
    listen(loaded.model, lambda ids: rows.append(len(ids)))
    record = run(loaded, "write", batch_size=20)
    assert len({item.output for item in record.items}) > 1
    rows = rows[rows.index(20) :]  # the trial before has fewer
    assert rows[-1] == 1, "the check of what was read"
    assert rows == sorted(rows, reverse=True)
