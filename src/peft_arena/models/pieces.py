"""From text to tokens: one begin token, no end token, and a continuation tokenized as in one piece with its context."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

from peft_arena.core.errors import UserError
from peft_arena.core.text import half_character, half_words
from peft_arena.models.chat import TAGS, settings_of, turn_end

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LETTER = "a"
BEFORE = "\n"
"""Stands before a continuation while it is tokenized alone, and is taken away again."""


class Habits(NamedTuple):
    """What a tokenizer does to every text."""

    begin: tuple[int, ...]
    """The tokens it puts before a text."""
    doubled: re.Pattern[str] | None
    """What is taken from the head of a text that writes its begin token itself, perhaps twice."""
    begins: tuple[str, ...]
    """The begin token as text."""
    spaced: bool
    """Whether it puts a space before every text, as SentencePiece does."""


class Pair(NamedTuple):
    """A context and what follows it, as tokens."""

    context: list[int]
    continuation: list[int]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenize the beginning of a text that goes on.

    The tokenizer's own begin token is there exactly once, if it uses one: also where the text, or the template that
    made it, writes the token itself. An end token that the tokenizer puts behind every text is not there.

    Raises:
        UserError: the text holds half of a character, or belongs to a run that was rendered otherwise.
    """
    habits = _habits(tokenizer)
    if habits.doubled is None or not text.lstrip().startswith(habits.begins):
        return [*habits.begin, *plain_ids(tokenizer, text)]
    return plain_ids(tokenizer, habits.doubled.sub("", text, count=1))


def encode_pair(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> Pair:
    """Tokenize a context and what follows it, as in one piece.

    The context's tokens are those of :func:`encode_text`. Where a token of the whole would reach over the boundary, the
    continuation is tokenized by itself, without the space that SentencePiece puts before a text.
    """
    head = encode_text(tokenizer, context)
    whole = encode_text(tokenizer, context + continuation)
    if whole[: len(head)] == head:
        return Pair(head, whole[len(head) :])
    return Pair(head, encode_after(tokenizer, continuation))


def encode_after(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenize a text that follows another one, without the space that SentencePiece puts before a text."""
    if _habits(tokenizer).spaced:
        before, both = plain_ids(tokenizer, BEFORE), plain_ids(tokenizer, BEFORE + text)
        if both[: len(before)] == before:
            return both[len(before) :]
    return plain_ids(tokenizer, text)


def with_spaces_moved(context: str, continuation: str) -> tuple[str, str]:
    """Move the spaces at the end of a context to the continuation, as lm-eval does: tokens begin with their space."""
    kept = context.rstrip(" ")
    return kept, context[len(kept) :] + continuation


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenize a text without the tokens that the tokenizer puts around every text.

    Raises:
        UserError: the text holds half of a character.
    """
    try:
        return list(tokenizer.encode(text, add_special_tokens=False))
    except (TypeError, UnicodeError):
        refuse_halves(text)
        raise


def refuse_halves(text: str) -> None:
    """Refuse text that no tokenizer can read.

    Raises:
        UserError: the text holds half of a character.
    """
    place = half_character(text)
    if place is not None:
        raise UserError(
            f"a text holds half of a character (a lone surrogate), got {half_words(text, place)}; mend or remove it"
        )


def control_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """Return the control tokens of a tokenizer that a text spells, each once, in their order in the text.

    They are its special tokens and the one that ends a turn in its chat template: where data spells one, the model
    reads the end of a turn or of the text. Tags of thoughts are none of them: answers may hold a thought.
    """
    return list(dict.fromkeys(_controls(tokenizer).findall(text)))


_HABITS: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[object, Habits]] = WeakKeyDictionary()
_CONTROLS: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[object, re.Pattern[str]]] = WeakKeyDictionary()


def _habits(tokenizer: PreTrainedTokenizerBase) -> Habits:
    outdated = settings_of(tokenizer).outdated
    if outdated:
        raise UserError(
            f"this run of model '{outdated}' is from before prompts and answers were rendered as they are now "
            "(docs/studies.md, Chat templates): it can be read and reported, and nothing new be asked of it; train it "
            "again"
        )
    key = (tokenizer.bos_token, getattr(tokenizer, "add_bos_token", None), len(tokenizer))
    kept = _HABITS.get(tokenizer)
    if kept is None or kept[0] != key:
        kept = _HABITS[tokenizer] = (key, _learn(tokenizer))
    return kept[1]


def _learn(tokenizer: PreTrainedTokenizerBase) -> Habits:
    """Find out from short texts what the tokenizer puts around them."""
    bare = plain_ids(tokenizer, LETTER)
    full = list(tokenizer.encode(LETTER, add_special_tokens=True))
    starts = (start for start in range(len(full) - len(bare) + 1) if full[start : start + len(bare)] == bare)
    begin = tuple(full[: next(starts, 0)])
    texts = {str(tokenizer.bos_token)} if tokenizer.bos_token is not None else set()
    if begin:
        texts.add(str(tokenizer.decode(list(begin))))
    doubled = None
    if texts:
        mark = "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))
        doubled = re.compile(rf"\A\s*(?:(?:{mark})\s*)*(?=(?:{mark}))")
    before, both = plain_ids(tokenizer, BEFORE), plain_ids(tokenizer, BEFORE + LETTER)
    return Habits(begin, doubled, tuple(texts), both != [*before, *bare])


def _controls(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    key = (tokenizer.chat_template, len(tokenizer))
    kept = _CONTROLS.get(tokenizer)
    if kept is not None and kept[0] == key:
        return kept[1]
    added = {int(place): token for place, token in tokenizer.added_tokens_decoder.items()}
    marks = {str(token) for token in added.values() if token.special} | set(map(str, tokenizer.all_special_tokens))
    end = turn_end(tokenizer)
    marks |= {str(added[end])} if end in added else set()
    marks -= {tag for pair in TAGS for tag in pair}
    longest = sorted((mark for mark in marks if mark.strip()), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest)) or "(?!)")
    _CONTROLS[tokenizer] = (key, pattern)
    return pattern
