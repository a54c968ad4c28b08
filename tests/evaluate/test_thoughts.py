"""A thought is no part of an answer: it is not scored, no stop string ends it, and one without an end has no answer."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from evaluate_toys import TEMPLATE, byte_tokenizer, make, small_llama
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from transformers import PreTrainedTokenizerFast

from peft_arena.core.errors import UserError
from peft_arena.core.specs import ModelSpec
from peft_arena.evaluate.adapter import prepare
from peft_arena.evaluate.decode import Stopper
from peft_arena.evaluate.engine import ModelEngine
from peft_arena.evaluate.likelihood import Likelihood, Pair
from peft_arena.models.load import Loaded
from peft_arena.models.pieces import plain_ids
from peft_arena.models.render import encode_example, encode_prompt
from peft_arena.tasks.base import Item, Message

ASK = (Message("user", "in?"),)
EMPTY = "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
TEMPLATES = {
    "hybrid": TEMPLATE.replace("{{ m.content }}", EMPTY),
    "opened": TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}") + "{# </think> #}",
    "marked": TEMPLATE.replace("{{ m.content }}", "{% if m.role == 'assistant' %}final: {% endif %}{{ m.content }}"),
}


def tokenizer_of(name: str, tags: bool) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a thinking model's template, whose tags are one token each or several."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    if tags:
        tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


TOKENIZERS = {(name, tags): tokenizer_of(name, tags) for name in TEMPLATES for tags in (False, True)}
END = TOKENIZERS["hybrid", True].eos_token_id


def judged(name: str, tags: bool, said: str, stop: tuple[str, ...] = ("\n",)) -> tuple[bool, str]:
    """Return whether what was said after a question has ended, and the answer."""
    tokenizer = TOKENIZERS[name, tags]
    stopper = Stopper(tokenizer, stop, frozenset({END}))
    opened = stopper.opened(encode_prompt(tokenizer, ASK))
    ids = plain_ids(tokenizer, said)
    for length in range(1, len(ids)):
        if stopper.ended([ids[:length]], [opened])[0]:
            return True, stopper.text(ids[:length], opened)
    return stopper.ended([ids], [opened])[0], stopper.text(ids, opened)


@pytest.mark.parametrize("tags", [False, True])
@pytest.mark.parametrize(
    ("name", "said", "ended", "answer"),
    [
        ("hybrid", "<think>\n\n</think>\n\n42\nin", True, "42"),
        ("hybrid", "<think>\nin\nthe\n</think>\n\n42<|im_end|>", True, "42"),
        ("hybrid", "\n<think>\nin\nthe 42", False, ""),
        ("hybrid", "42\n", True, "42"),
        ("hybrid", "\n42", True, ""),
        ("hybrid", "<42\n", True, "<42"),
        ("opened", "in\nthe\n</think>\n\n42\n", True, "42"),
        ("opened", "in\nthe 42\n", False, ""),
        ("opened", "in\nthe 42<|im_end|>", True, ""),
        ("marked", "final: 42\n", True, "42"),
        ("marked", "42\n", True, "42"),
    ],
)
def test_the_answer_is_what_follows_the_thought(name: str, tags: bool, said: str, ended: bool, answer: str) -> None:
    assert judged(name, tags, said) == (ended, answer)


@pytest.mark.parametrize("tags", [False, True])
def test_of_several_thoughts_the_last_one_counts(tags: bool) -> None:
    assert judged("hybrid", tags, "<think>in</think>the<think>an</think>42\n", ()) == (False, "42\n")


@given(
    st.sampled_from(sorted(TOKENIZERS)),
    st.text(st.sampled_from("the in 42."), min_size=1, max_size=9).filter(lambda text: text == text.strip()),
)
def test_what_is_trained_on_is_read_as_its_answer(key: tuple[str, bool], answer: str) -> None:
    tokenizer = TOKENIZERS[key]
    ids, length = encode_example(tokenizer, ASK, answer)
    stopper = Stopper(tokenizer, ("\n",), frozenset({END}))
    opened = stopper.opened(ids[:length])
    target = ids[length:]
    ended = [stopper.ended([target[:size]], [opened])[0] for size in range(1, len(target) + 1)]
    assert ended == [False] * (len(target) - 1) + [True]
    assert stopper.text(target, opened) == answer


def test_a_template_without_thoughts_takes_nothing_away() -> None:
    stopper = Stopper(byte_tokenizer(), (), frozenset({END}))
    assert stopper.thoughts is None
    text = "<think>in</think> 42"
    assert stopper.text(plain_ids(byte_tokenizer(), text)) == text


def test_an_answer_of_a_plain_prompt_needs_no_end_of_a_thought() -> None:
    tokenizer = TOKENIZERS["opened", True]
    stopper = Stopper(tokenizer, (), frozenset({END}))
    assert not stopper.opened(encode_prompt(tokenizer, "in <think> the"))
    assert stopper.text(plain_ids(tokenizer, "42")) == "42"


def test_half_a_character_in_an_item_is_an_error_that_names_it() -> None:
    task = make("write", {})
    with pytest.raises(UserError, match=r"task write, item [0-9a-f]{12}: a text holds half of a character"):
        prepare(task, Item(question="in \ud83d", answer="42"), byte_tokenizer())


def test_the_record_says_which_date_a_template_was_told() -> None:
    tokenizer = byte_tokenizer()
    loaded = Loaded(spec=ModelSpec(name="toy"), model=small_llama(tokenizer), tokenizer=tokenizer, source="path")
    assert "chat_date" not in ModelEngine(loaded, loaded.model).describe()
    tokenizer.chat_template = TEMPLATE + "{{ strftime_now('%Y') }}"
    engine = ModelEngine(loaded, loaded.model)
    assert engine.describe()["chat_date"] == "2024-07-26"
    turns = [{"role": "user", "content": "in?"}]
    assert engine.apply_chat_template(turns).endswith("assistant\n2024")


def test_a_rolling_likelihood_has_one_begin_token(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer(begin=True)
    loaded = Loaded(spec=ModelSpec(name="toy"), model=small_llama(tokenizer), tokenizer=tokenizer, source="path")
    engine = ModelEngine(loaded, loaded.model, progress=False)
    seen: list[list[int]] = []

    def likelihoods(model: object, pairs: Sequence[Pair], **_: object) -> list[Likelihood]:
        seen.extend([*pair.context, *pair.continuation] for pair in pairs)
        return [Likelihood(0.0, False) for _ in pairs]

    monkeypatch.setattr("peft_arena.evaluate.engine.log_likelihoods", likelihoods)
    engine.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("the ant",), 0)])
    begin = tokenizer.bos_token_id
    assert seen == [[begin, *plain_ids(tokenizer, "the ant")]]
