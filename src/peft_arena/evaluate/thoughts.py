"""What a thinking model writes before its answer is not its answer: where thoughts end in new tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft_arena.models.chat import Thought, opening, thought_of
from peft_arena.models.pieces import plain_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DECODE: Mapping[str, Any] = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
NEAR = 32
"""So many tokens at a prompt's end, or at a completion's head, show whether a thought begins there."""


@dataclass(frozen=True)
class Thoughts:
    """Tells thoughts and answers of one tokenizer's models apart.

    An answer is what follows the last end of a thought. A completion that begins a thought, or whose prompt did, and
    does not end it has no answer. What else the template writes before an answer's words is taken from its head.
    """

    tokenizer: PreTrainedTokenizerBase
    thought: Thought | None
    before: str
    """What the template writes before an answer's words, as it is decoded; empty if that is a thought."""
    closing: int | None
    """The token that ends a thought; None if its end is several tokens."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Thoughts | None:
        """Return the thoughts of a tokenizer; None if its template writes neither thoughts nor anything like them."""
        thought = thought_of(tokenizer)
        before = str(tokenizer.decode(plain_ids(tokenizer, opening(tokenizer)), **DECODE)).strip()
        if thought is None:
            return cls(tokenizer, None, before, None) if before else None
        ids = plain_ids(tokenizer, thought.closing)
        return cls(tokenizer, thought, "", ids[0] if len(ids) == 1 else None)

    def opened(self, prompt: Sequence[int]) -> bool:
        """Say whether a prompt's tokens end within a thought that they open."""
        if self.thought is None:
            return False
        return str(self.tokenizer.decode(list(prompt[-NEAR:]))).rstrip().endswith(self.thought.opening)

    def answer(self, row: Sequence[int], opened: bool) -> str:
        """Return the words of the answer among new tokens; nothing while the thought goes on."""
        begin = self._begin(row, opened)
        if begin is None:
            return ""
        said = self._decoded(row[begin:])
        if begin:
            return said.lstrip()
        head = said.lstrip()
        return head.removeprefix(self.before).lstrip() if self.before and head.startswith(self.before) else said

    def tail(self, row: Sequence[int], opened: bool, window: int) -> str:
        """Return the end of the answer among new tokens, where a stop string is looked for.

        Args:
            row: the new tokens.
            opened: whether their prompt ends within a thought.
            window: a stop string that the last token completed lies within so many tokens. More are returned behind a
                thought, because the white space there must not stop the answer.
        """
        begin = self._begin(row, opened)
        if begin is None or (begin == 0 and self._may_begin_thought(row)):
            return ""
        return self.answer(row, opened) if begin or len(row) <= window else self._decoded(row[-window:])

    def _decoded(self, row: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(row), **DECODE))

    def _begin(self, row: Sequence[int], opened: bool) -> int | None:
        """Return the place of the first token behind the last thought; None within a thought."""
        if self.thought is None:
            return 0
        behind = self._behind(row, self.thought.closing)
        if behind:
            return behind
        return None if opened or self._head(row).startswith(self.thought.opening) else 0

    def _may_begin_thought(self, row: Sequence[int]) -> bool:
        """Say whether new tokens are so few that they may still become the beginning of a thought."""
        return self.thought is not None and len(row) < NEAR and self.thought.opening.startswith(self._head(row))

    def _head(self, row: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(row[:NEAR]))).lstrip()

    def _behind(self, row: Sequence[int], tag: str) -> int:
        """Return the place behind the last tag that ends a thought; 0 if there is none."""
        if self.closing is not None:
            return next((place + 1 for place in reversed(range(len(row))) if row[place] == self.closing), 0)
        said = str(self.tokenizer.decode(list(row)))
        if tag not in said:
            return 0
        count = said.count(tag)
        low, high = 1, len(row)
        while low < high:
            middle = (low + high) // 2
            if str(self.tokenizer.decode(list(row[:middle]))).count(tag) >= count:
                high = middle
            else:
                low = middle + 1
        return low
