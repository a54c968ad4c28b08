"""A retention task of recall: invented people and what they have.

A fact cannot be guessed, so every fact must have been seen in training. What is held out is the *question*: each fact
is asked in six phrasings, of which the hash of the fact gives one to the test split, another to validation and four to
train. A test score therefore says "the fact is known, and found from a form of question never seen with it", and not
that anything new was inferred.
"""

from __future__ import annotations

from collections.abc import Iterator

from peft_arena.core.ids import seed_for
from peft_arena.tasks.base import Role, Split
from peft_arena.tasks.micro.base import VERSION, Candidate, MicroTask, micro_card

NAMES = tuple(
    start + end
    for start in ("Bal", "Cor", "Dem", "Fen", "Gol", "Hus", "Jat", "Kir")
    for end in ("ado", "emi", "ilo", "opa", "uva", "anu", "iso", "eku")
)
ATTRIBUTES = {
    "colour": ("red", "blue", "green", "black", "white", "pink", "brown", "grey"),
    "pet": ("cat", "dog", "goat", "hen", "fox", "owl", "mouse", "frog"),
    "food": ("bread", "rice", "soup", "fish", "corn", "beans", "cake", "eggs"),
    "town": ("Arden", "Brill", "Calne", "Diss", "Eton", "Frome", "Goole", "Hythe"),
}
PHRASINGS = (
    "What is the {what} of {who}?",
    "Tell me the {what} of {who}.",
    "Which {what} does {who} have?",
    "Say which {what} belongs to {who}.",
    "{who} has which {what}?",
    "Name the {what} that {who} has.",
)


def value_of(who: str, what: str) -> str:
    """Return the invented value of an attribute of a person; the same on every machine."""
    values = ATTRIBUTES[what]
    return values[seed_for(VERSION, "micro-facts", who, what) % len(values)]


class Facts(MicroTask):
    """Recall of 256 invented facts; the fact was seen in training, this phrasing of its question was not."""

    card = micro_card(
        "micro-facts",
        "Recall of invented facts",
        Role.RETENTION,
        1 / 8,
        "Recall the colour, pet, food or town of an invented person. All facts occur in the train split; "
        "the phrasing in which a fact is asked is in one split only. Chance is one of eight values.",
    )

    def candidates(self) -> Iterator[Candidate]:
        """Yield every fact in every phrasing; the key is the fact and the number of the phrasing."""
        for who in NAMES:
            for what in ATTRIBUTES:
                for number, phrasing in enumerate(PHRASINGS):
                    question = phrasing.format(who=who, what=what)
                    yield Candidate(question, value_of(who, what), key=f"{who} {what} {number}")

    def split(self, candidate: Candidate) -> Split:
        """Return the split of a phrasing of a fact: each fact has one for test, one for validation, four for train."""
        who, what, number = candidate.key.split()
        turn = (int(number) + seed_for(VERSION, "micro-facts", "phrasing", who, what)) % len(PHRASINGS)
        return "test" if turn == 0 else "validation" if turn == 1 else "train"
