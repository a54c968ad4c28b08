"""From a task's prompt to tokens: one rendering for training and evaluation, so that both see the same text.

An answer in a conversation ends as the chat template ends a turn, and a plain answer with the tokenizer's end token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from peft_arena.core.errors import UserError
from peft_arena.models.chat import apply_template, leading_token, opening, thought_end, thought_of, turn_end
from peft_arena.models.pieces import Pair, control_tokens, encode_pair, encode_text, with_spaces_moved
from peft_arena.tasks.base import Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Encoded",
    "Span",
    "control_tokens",
    "encode_example",
    "encode_prompt",
    "encode_text",
    "encode_turns",
    "option_request",
    "render",
    "turn_end",
]

Span = tuple[int, int]
"""From one place in the tokens up to, and without, another."""


class Encoded(NamedTuple):
    """One training example as tokens."""

    ids: list[int]
    prompt_length: int
    """The first so many ids are the prompt; the rest is the answer and its end token."""


def render(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    """Return the text a model is given: plain text as it is, a conversation through the tokenizer's own template.

    Raises:
        UserError: the prompt is a conversation and the tokenizer has no chat template, or one that refuses it.
    """
    if isinstance(prompt, str):
        return prompt
    if tokenizer.chat_template is None:
        raise UserError(
            f"the task's prompts are conversations and the tokenizer of {tokenizer.name_or_path} has no chat template; "
            "use a model that has one, or a task with plain prompts"
        )
    return apply_template(tokenizer, _turns(prompt), add_generation_prompt=True)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Return the token ids of a prompt, as evaluation and training both use them."""
    return encode_text(tokenizer, render(tokenizer, prompt))


def option_request(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, continuation: str) -> tuple[str, str]:
    """Return context and continuation of an option whose likelihood is asked for.

    Spaces at the end of a plain prompt move to the option. What a chat template writes before the words of an answer,
    an empty thought, stands in the context: each option would begin with it.
    """
    if isinstance(prompt, str):
        return with_spaces_moved(prompt, continuation)
    before = opening(tokenizer)
    return render(tokenizer, prompt) + (before if before.strip() else ""), continuation


def encode_example(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, target: str, *, as_option: bool = False
) -> Encoded:
    """Return prompt, target and end token as ids.

    The prompt's ids are those that evaluation uses, and the target is tokenized as it follows them, so that the
    model is trained on exactly the prefix it is later evaluated on. After a conversation stands what the chat template
    makes of the answer, up to the token that ends its turn; see :func:`_answer`.

    Args:
        tokenizer: the model's.
        prompt: what the answer follows.
        target: the answer.
        as_option: the task asks for likelihoods of options: prompt and answer are those of :func:`option_request`.

    Raises:
        UserError: the target is empty, or the tokenizer has no end token.
    """
    if not target:
        raise UserError("a training example has an empty target: there is no answer to train on")
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no end token; training answers would never end")
    if isinstance(prompt, str) or as_option:
        context, rest = option_request(tokenizer, prompt, target) if as_option else (str(prompt), target)
        head, tail = encode_pair(tokenizer, context, rest)
        tail = [*tail, int(tokenizer.eos_token_id) if isinstance(prompt, str) else _end(tokenizer)]
    else:
        head, tail = _answer(tokenizer, prompt, target)
    return Encoded([*head, *tail], len(head))


def encode_turns(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, target: str, *, as_option: bool = False
) -> tuple[Encoded, list[Span]]:
    """Return an example, and where in its tokens the assistant's earlier turns stand, each with its turn's end.

    Raises:
        UserError: as :func:`encode_example`, or the template does not write an earlier turn so that its prompt, as
            evaluation would render it, stands before it.
    """
    encoded = encode_example(tokenizer, prompt, target, as_option=as_option)
    if isinstance(prompt, str):
        return encoded, []
    text = render(tokenizer, prompt)
    places = [place for place, turn in enumerate(prompt) if turn.role == "assistant"]
    return encoded, [_earlier(tokenizer, prompt, place, text, encoded.ids) for place in places]


def _earlier(
    tokenizer: PreTrainedTokenizerBase, prompt: tuple[Message, ...], place: int, text: str, ids: list[int]
) -> Span:
    """Return where the words and the end of an assistant's turn stand in a rendered conversation's tokens.

    Raises:
        UserError: they do not stand behind the prompt that evaluation would render, or have no end token.
    """
    owner, number = tokenizer.name_or_path, place + 1
    wrong = f"loss_on = every cannot be used: the chat template of {owner}"
    if place == 0:
        raise UserError(f"{wrong} is given a conversation that begins with the assistant's turn, which answers nothing")
    before = render(tokenizer, prompt[:place])
    if not text.startswith(before):
        raise UserError(
            f"{wrong} renders what stands before turn {number} of a conversation otherwise than when that turn is "
            "asked for (it may leave out earlier thoughts); use loss_on = last"
        )
    rest = text[len(before) :]
    size = _ends(tokenizer, rest, prompt[place].content.strip(), first=True)
    if size < 0:
        raise UserError(
            f"{wrong} does not write the words of turn {number} and an end token behind them; use loss_on = last"
        )
    head, whole = encode_text(tokenizer, before), encode_text(tokenizer, before + rest[:size])
    if ids[: len(whole)] != whole or whole[: len(head)] != head:
        raise UserError(f"{wrong} gives turn {number} tokens that reach over its beginning or end; use loss_on = last")
    return len(head), len(whole)


def _answer(tokenizer: PreTrainedTokenizerBase, prompt: tuple[Message, ...], target: str) -> Pair:
    """Return a conversation as a prompt, and what is trained on after it.

    The conversation is rendered with the answer. If that begins with the prompt, and has the answer's words behind it,
    the target is what the template wrote from there to the token that ends the turn: with an empty thought before the
    words where the template puts one, without the line feed behind the end. A template without such a token gets the
    tokenizer's end token. If the rendering does not match (templates that trim what they are given, or rewrite it), the
    answer's words are taken as they are, with the same end; behind a prompt that opens a thought, the thought is ended
    first.
    """
    text = render(tokenizer, prompt)
    full = apply_template(tokenizer, [*_turns(prompt), {"role": "assistant", "content": target}])
    rest = full[len(text) :] if full.startswith(text) else ""
    size = _ends(tokenizer, rest, target)
    if size >= 0:
        return encode_pair(tokenizer, text, rest[:size])
    blank = _blank_end(rest, target)
    words = rest[:blank] if blank >= 0 else _in_thought(tokenizer, text, target)
    head, tail = encode_pair(tokenizer, text, words)
    return Pair(head, [*tail, _end(tokenizer)])


def _end(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that ends a turn: the template's, or else the tokenizer's end token."""
    end = turn_end(tokenizer)
    return int(tokenizer.eos_token_id) if end is None else end


def _ends(tokenizer: PreTrainedTokenizerBase, rest: str, words: str, first: bool = False) -> int:
    """Return where, behind the words, the token that ends their turn ends; -1 if no token stands behind the words.

    Args:
        tokenizer: knows the tokens.
        rest: what the template wrote behind a prompt.
        words: of the turn.
        first: take the first place that has a token behind it, not the last: the conversation goes on. It may end
            this turn by another token than the last, and the words are looked for before the next turn only.
    """
    end = turn_end(tokenizer)
    last = str(tokenizer.convert_ids_to_tokens(end)) if first and end is not None else ""
    place, found = rest.find(words), -1
    while place >= 0 and not (last and last in rest[:place]):
        behind = rest[place + len(words) :]
        blank = len(behind) - len(behind.lstrip())
        mark = leading_token(tokenizer, behind[blank:])
        if mark is not None and (first or tokenizer.convert_tokens_to_ids(mark) == end):
            found = place + len(words) + blank + len(mark)
            if first:
                break
        place = rest.find(words, place + 1)
    return found


def _blank_end(rest: str, words: str) -> int:
    """Return where the words end, if nothing but white space stands behind them; else -1."""
    place = rest.rfind(words)
    return place + len(words) if place >= 0 and not rest[place + len(words) :].strip() else -1


def _in_thought(tokenizer: PreTrainedTokenizerBase, text: str, target: str) -> str:
    """Return the words of an answer as they follow a prompt that may have opened a thought."""
    end, thought = thought_end(tokenizer, text), thought_of(tokenizer)
    if not end or thought is None:
        return target
    if thought.closing in target:
        return target.lstrip().removeprefix(thought.opening).lstrip("\n")
    return end + target


def _turns(prompt: tuple[Message, ...]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in prompt]
