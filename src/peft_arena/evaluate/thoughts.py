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
LAST = 16
"""So many tokens at a prompt's end show whether it opens a thought."""


@dataclass(frozen=True)
class Thoughts:
    """Tells thoughts and answers of one tokenizer's models apart.

    An answer is what follows the last end of a thought. A completion that begins a thought, or whose prompt did, and
    does not end it has no answer. What else the template writes before an answer's words is taken from its head.
    """

    tokenizer: PreTrainedTokenizerBase
    thought: Thought | None
    before: str
    """What the template writes before an answer's words, as it is decoded."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Thoughts | None:
        """Return the thoughts of a tokenizer; None if its template writes neither thoughts nor anything like them."""
        thought = thought_of(tokenizer)
        before = str(tokenizer.decode(plain_ids(tokenizer, opening(tokenizer)), **DECODE)).strip()
        return cls(tokenizer, thought, before if thought is None else "") if thought or before else None

    def opened(self, prompt: Sequence[int]) -> bool:
        """Say whether a prompt's tokens end within a thought that they open."""
        if self.thought is None:
            return False
        return str(self.tokenizer.decode(list(prompt[-LAST:]))).rstrip().endswith(self.thought.opening)

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
        """Return the end of the answer among new tokens, no more than a window of tokens."""
        begin = self._begin(row, opened)
        if begin is None:
            return ""
        return self.answer(row, opened) if len(row) - begin <= window else self._decoded(row[-window:])

    def _decoded(self, row: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(row), **DECODE))

    def _begin(self, row: Sequence[int], opened: bool) -> int | None:
        """Return the place of the first token behind the last thought; None within a thought."""
        if self.thought is None:
            return 0
        closing = self._id(self.thought.closing)
        if closing is not None:
            ends = [place for place, token in enumerate(row) if token == closing]
            if ends:
                return ends[-1] + 1
        else:
            place = self._behind_text(row, self.thought.closing)
            if place:
                return place
        begun = str(self.tokenizer.decode(list(row[:LAST]))).lstrip().startswith(self.thought.opening)
        return None if opened or begun else 0

    def _id(self, tag: str) -> int | None:
        """Return the id of a tag that is one token."""
        ids = plain_ids(self.tokenizer, tag)
        return ids[0] if len(ids) == 1 else None

    def _behind_text(self, row: Sequence[int], tag: str) -> int:
        """Return the place behind the last tag that is several tokens; 0 if there is none."""
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
