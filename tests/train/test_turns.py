"""Which tokens of a conversation the loss is taken on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.nn import functional

from peft_arena.core.build import build
from peft_arena.core.errors import UserError
from peft_arena.core.specs import RunSpec, TrainSpec
from peft_arena.tasks.base import Item, Message, Prompt, Split
from peft_arena.train.batch import IGNORED, collate
from peft_arena.train.data import Example, Examples, read_examples
from peft_arena.train.loss import TokenLoss
from tests.models.chat_toys import BARE, CHATML, HYBRID, toy_tokenizer

from .toy import ToyAttached, ToyTask, load_model, run_spec


class Talk(ToyTask):
    """Conversations of three questions."""

    def items(self, split: Split) -> Sequence[Item]:
        """Return three items."""
        return [Item(question=f"the {number}?", answer=f"in {number}") for number in (4, 42, 424)]

    def prompt(self, item: Item) -> Prompt:
        """Return a talk in which the assistant has spoken twice."""
        said = (Message("user", "in?"), Message("assistant", "the 42"), Message("user", "the?"))
        return (Message("system", "the"), *said, Message("assistant", "42"), Message("user", item.question))


def spec(**changes: Any) -> TrainSpec:
    table = {"task": {"name": "toy", "revision": "1"}, "schedule": {"steps": 1}, "learning_rate": 1e-3, **changes}
    return build(TrainSpec, table)


def read(template: str = CHATML, kind: str = "bytes", **changes: Any) -> Examples:
    return read_examples(Talk(), "train", None, toy_tokenizer(kind, template), spec(**changes), 500)


def trained_on(example: Example, kind: str = "bytes") -> list[str]:
    """Return the parts of a text that have a loss."""
    labels = collate([example], packing=False, limit=999, pad=0).labels[0].tolist()
    parts: list[list[int]] = [[]]
    for label in labels:
        if label != IGNORED:
            parts[-1].append(label)
        elif parts[-1]:
            parts.append([])
    return [str(toy_tokenizer(kind).decode(part)).strip() for part in parts if part]


@pytest.mark.parametrize("kind", ["bytes", "prepend", "metaspace"])
def test_every_assistant_turn_has_a_loss_with_its_end_and_nothing_else_has(kind: str) -> None:
    for example, number in zip(read(kind=kind, loss_on="every").kept, (4, 42, 424), strict=True):
        turns = ["the 42<|close|>", "42<|close|>", f"in {number}<|close|>"]
        assert trained_on(example, kind) == turns
        batch = collate([example], packing=False, limit=999, pad=0)
        assert int((batch.labels != IGNORED).sum()) == example.labels == len(batch.targets)


def test_the_answer_alone_has_a_loss_unless_told_otherwise() -> None:
    last, answer, every = (read(loss_on=word) for word in ("last", "answer", "every"))
    assert last == answer == read()
    assert [trained_on(example) for example in last.kept] == [[f"in {n}<|close|>"] for n in (4, 42, 424)]
    assert [example.ids for example in last.kept] == [example.ids for example in every.kept]
    assert last.id != every.id
    assert trained_on(read(loss_on="all").kept[0])[0].startswith("system")


def test_last_is_another_word_for_answer_and_no_other_run() -> None:
    assert spec(loss_on="last") == spec() and spec(loss_on="last").id == spec().id
    assert spec(loss_on="every").id != spec().id
    with pytest.raises(UserError, match="loss_on"):
        spec(loss_on="each")


def test_a_template_that_cannot_be_split_is_refused_with_the_item() -> None:
    with pytest.raises(UserError, match=r"task toy, train item 0 \([0-9a-f]{12}\): loss_on = every cannot be used"):
        read(BARE, loss_on="every")
    assert len(trained_on(read(HYBRID, loss_on="every").kept[0])) == 3


def test_a_plain_prompt_has_no_earlier_turns() -> None:
    found = [
        read_examples(ToyTask(), "train", None, toy_tokenizer(), spec(loss_on=on), 500) for on in ("every", "answer")
    ]
    assert found[0] == found[1] and found[0].id == found[1].id


@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_is_the_mean_over_the_turns_tokens(model_dir: Any, packing: bool) -> None:
    examples = [Example([5, 9, 11, 4, 30, 8, 0], 2, ((3, 5),)), Example([7, 8, 3, 9, 0], 1, ((2, 3), (3, 4)))]
    assert [example.labels for example in examples] == [3, 2]
    model = ToyAttached(load_model(model_dir).model, rate=0.0).model.eval()
    wanted = torch.zeros(())
    for example in examples:
        labels = torch.tensor(example.ids)
        labels[: example.first_label] = IGNORED
        for begin, end in example.skipped:
            labels[begin:end] = IGNORED
        logits = model(input_ids=torch.tensor([example.ids])).logits[0]
        wanted = wanted + functional.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORED, reduction="sum")
    batch = collate(examples, packing=packing, limit=64, pad=0)
    with TokenLoss(model, autocast=False) as loss:
        parts = loss(batch)
    torch.testing.assert_close(parts.nats, wanted, rtol=1e-5, atol=1e-5)
    assert len(batch.targets) == 5


def test_an_example_without_skipped_parts_has_the_id_it_always_had() -> None:
    plain = Examples([Example([5, 9, 11], 1)], 0)
    assert plain.id == "278284ca101a"
    assert Examples([Example([5, 9, 11], 1, ((2, 3),))], 0).id != plain.id


def test_a_run_read_from_disk_is_the_run_it_was(model_dir: Any) -> None:
    run = run_spec(model_dir)
    table = run.model_dump(mode="json")
    assert "rendering" not in table["model"] and "chat" not in table["model"]
    assert RunSpec.model_validate(table).id == run.id
