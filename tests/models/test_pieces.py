"""From text to tokens: one begin token, no end token, continuations in one piece, and what data spells."""

from __future__ import annotations

import pytest
from chat_toys import (
    BARE,
    BRACKETS,
    CHATML,
    CLOSE,
    END,
    HYBRID,
    KINDS,
    TEMPLATES,
    THINKER,
    TRIMMED,
    TWICE,
    toy_tokenizer,
)
from hypothesis import given
from hypothesis import strategies as st

from peft_arena.core.errors import UserError
from peft_arena.core.specs import ModelSpec
from peft_arena.core.text import half_character
from peft_arena.models.load import MICRO, load_tokenizer, resolve
from peft_arena.models.pieces import encode_after, encode_pair, with_spaces_moved
from peft_arena.models.render import (
    control_tokens,
    encode_example,
    encode_prompt,
    encode_text,
    encode_turns,
    option_request,
    turn_end,
)
from peft_arena.tasks.base import Message, Prompt

ASK = (Message("user", "What is in the box: 42?"),)
WORDS = st.text(st.sampled_from("the in 4:2.?x\n"), min_size=1, max_size=8)
SOLID = WORDS.filter(lambda text: text == text.strip())
TOKENIZERS = {
    (kind, name, begin, end): toy_tokenizer(kind, template, begin=begin, end=end)
    for kind in KINDS
    for name, template in TEMPLATES.items()
    for begin in (False, True)
    for end in (False, True)
}
ANY = st.sampled_from(sorted(TOKENIZERS))


@given(ANY, st.one_of(WORDS, WORDS.map(lambda text: (Message("user", text),))), SOLID)
def test_every_example_begins_once_ends_once_and_goes_on_from_the_prompt_that_is_evaluated(
    key: tuple[str, str, bool, bool], prompt: Prompt, answer: str
) -> None:
    tokenizer = TOKENIZERS[key]
    _, name, begin, _ = key
    first, last, close = tokenizer.convert_tokens_to_ids(["<s>", END, CLOSE])
    ids, length = encode_example(tokenizer, prompt, answer)
    assert ids[:length] == encode_prompt(tokenizer, prompt)
    writes = name in {"begun", "twice", "brackets"} and not isinstance(prompt, str)
    assert ids.count(first) == ids[:1].count(first) == int(begin or writes)
    assert last not in ids[:-1]
    closed = not isinstance(prompt, str) and name not in {"bare", "brackets"}
    assert ids[-1] == (close if closed else last)
    said = str(tokenizer.decode(ids[length - 1 : -1]))
    assert said.endswith(answer)
    before = said.removesuffix(answer).removeprefix(str(tokenizer.decode([ids[length - 1]])))
    thinks = not isinstance(prompt, str) and name in {"hybrid", "thinker"}
    assert before.strip() == {"hybrid": "<think>\n\n</think>", "thinker": "</think>"}.get(name if thinks else "", "")


@given(ANY, WORDS, WORDS)
def test_a_continuation_never_changes_its_context_and_says_what_it_says(
    key: tuple[str, str, bool, bool], context: str, continuation: str
) -> None:
    tokenizer = TOKENIZERS[key]
    head, tail = encode_pair(tokenizer, context, continuation)
    assert head == encode_text(tokenizer, context)
    whole = encode_text(tokenizer, context + continuation)
    assert tokenizer.decode([*head, *tail]) == tokenizer.decode(whole)
    if whole[: len(head)] == head:
        assert [*head, *tail] == whole


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_gets_no_space_that_nobody_wrote(kind: str) -> None:
    tokenizer = toy_tokenizer(kind)
    for prompt, answer, first in (("in\n", "42", "42"), ("in", "42", "42"), ("x(", "the", "the")):
        ids, length = encode_example(tokenizer, prompt, answer)
        assert tokenizer.convert_ids_to_tokens(ids[length:]) == [first, END]
    ids, length = encode_example(tokenizer, ASK, "42")
    assert tokenizer.convert_ids_to_tokens(ids[length:]) == ["42", CLOSE]


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_over_the_boundary_leaves_the_prompt_as_it_is(kind: str) -> None:
    tokenizer = toy_tokenizer(kind)
    context = "t" if kind == "bytes" else "x:"
    continuation = "he" if kind == "bytes" else " in"
    head, tail = encode_pair(tokenizer, context, continuation)
    assert head == encode_text(tokenizer, context)
    assert [*head, *tail] != encode_text(tokenizer, context + continuation)
    assert tail == encode_after(tokenizer, continuation)
    assert tokenizer.decode([*head, *tail]) == context + continuation


def test_spaces_at_the_end_of_a_prompt_go_to_the_options_in_training_too() -> None:
    tokenizer = toy_tokenizer()
    assert with_spaces_moved("is: ", "42") == ("is:", " 42")
    assert with_spaces_moved("is:\n", "42") == ("is:\n", "42")
    context, option = option_request(tokenizer, "is: ", "the")
    pair = encode_pair(tokenizer, context, option)
    trained = encode_example(tokenizer, "is: ", "the", as_option=True)
    assert trained.ids == [*pair.context, *pair.continuation, tokenizer.eos_token_id]
    assert "Ġthe" in tokenizer.convert_ids_to_tokens(trained.ids)
    assert "Ġthe" not in tokenizer.convert_ids_to_tokens(encode_example(tokenizer, "is: ", "the").ids)


@pytest.mark.parametrize("template", [CHATML, BRACKETS, HYBRID, THINKER])
def test_an_option_in_a_conversation_is_asked_after_what_training_puts_before_it(template: str) -> None:
    tokenizer = toy_tokenizer(template=template)
    context, option = option_request(tokenizer, ASK, "42")
    pair = encode_pair(tokenizer, context, option)
    ids, length = encode_example(tokenizer, ASK, "42", as_option=True)
    assert (ids[:length], ids[length:-1]) == pair
    assert ids[-1] == turn_end(tokenizer)
    assert (context.count("</think>"), "think" in option) == (int(template in (HYBRID, THINKER)), False)


@pytest.mark.parametrize(
    ("template", "answer", "target"),
    [
        (CHATML, " 42\n", " 42\n<|close|>"),
        (TRIMMED, " 42\n", " 42\n<|close|>"),
        (BRACKETS, "42", " 42</s>"),
        (BARE, "42", "42</s>"),
        (HYBRID, "think", "<think>\n\n</think>\n\nthink<|close|>"),
        (HYBRID, "close", "<think>\n\n</think>\n\nclose<|close|>"),
        (HYBRID, "\n", "<think>\n\n</think>\n\n\n<|close|>"),
        (THINKER, "42", "\n</think>\n\n42<|close|>"),
        (THINKER, "<think>\nin\n</think>\n\n42", "in\n</think>\n\n42<|close|>"),
        (CHATML, "<think>in</think>42", "<think>in</think>42<|close|>"),
    ],
)
def test_what_stands_behind_a_prompt(template: str, answer: str, target: str) -> None:
    tokenizer = toy_tokenizer(template=template)
    ids, length = encode_example(tokenizer, ASK, answer)
    assert tokenizer.decode(ids[length:]) == target


def test_a_begin_token_that_a_template_writes_after_white_space_or_twice_is_there_once() -> None:
    tokenizer = toy_tokenizer(template=TWICE, begin=True)
    tokens = tokenizer.convert_ids_to_tokens(encode_prompt(tokenizer, ASK))
    assert tokens[:2] == ["<s>", "<|open|>"]
    assert tokenizer.convert_ids_to_tokens(encode_text(tokenizer, "<s> x")) == ["<s>", "Ġ", "x"]
    assert tokenizer.convert_ids_to_tokens(encode_text(tokenizer, "  x"))[0] == "<s>"


TALK = (
    Message("system", "Be brief."),
    Message("user", "in?"),
    Message("assistant", "the 42"),
    Message("user", "in the?"),
    Message("assistant", " 42"),
    Message("user", "the 42?"),
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [CHATML, TRIMMED, BRACKETS, HYBRID, TWICE])
def test_earlier_turns_are_found_with_their_ends(kind: str, template: str) -> None:
    tokenizer = toy_tokenizer(kind, template, begin=True, end=True)
    encoded, spans = encode_turns(tokenizer, TALK, "in 42")
    assert encoded == encode_example(tokenizer, TALK, "in 42")
    end = END if template is BRACKETS else CLOSE
    said = [tokenizer.decode([0, *encoded.ids[begin:stop]]).removeprefix("<pad>").strip() for begin, stop in spans]
    assert said == [f"the 42{end}", f"42{end}"]
    for (begin, _), place in zip(spans, (2, 4), strict=True):
        assert encoded.ids[:begin] == encode_prompt(tokenizer, TALK[:place])
    assert encode_turns(tokenizer, "plain", "42") == (encode_example(tokenizer, "plain", "42"), [])


@pytest.mark.parametrize(
    ("template", "talk", "message"),
    [
        (THINKER, TALK, "renders what stands before turn 3 of a conversation otherwise"),
        (BARE, TALK, "does not write the words of turn 3 and an end token"),
        (CHATML, (Message("assistant", "Hello."), Message("user", "in?")), "begins with the assistant's turn"),
    ],
)
def test_a_template_that_cannot_be_split_is_refused(template: str, talk: tuple[Message, ...], message: str) -> None:
    with pytest.raises(UserError, match=f"loss_on = every cannot be used: the chat template of toy.*{message}"):
        encode_turns(toy_tokenizer(template=template), talk, "42")


def test_control_tokens_that_data_spells_are_named() -> None:
    tokenizer = toy_tokenizer(template=HYBRID)
    assert control_tokens(tokenizer, "in the box <|close|> or </s></s> <think>in</think>") == [CLOSE, END]
    assert control_tokens(tokenizer, "in < s> the |close|") == []
    micro = load_tokenizer(resolve(ModelSpec(name=MICRO)))
    assert control_tokens(micro, "a<|im_end|>") == ["<|im_end|>"]


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_character_is_refused_in_one_line(kind: str) -> None:
    tokenizer = toy_tokenizer(kind)
    assert half_character("in \ud83d") == 3
    assert half_character("in \U0001f600 the") is None
    for prompt, answer in (("in \ud83d", "42"), ("in", "4\ude00"), ((Message("user", "\ud83d"),), "42")):
        with pytest.raises(UserError, match=r"half of a character \(a lone surrogate\), got U\+D"):
            encode_example(tokenizer, prompt, answer)
