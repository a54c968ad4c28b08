"""PEFT-Arena's two target domains as targets: trained on one data set, tested on several benchmarks."""

from __future__ import annotations

from typing import ClassVar, Literal

from peft_arena.tasks.base import TaskConfig
from peft_arena.tasks.benchmarks.base import Benchmark
from peft_arena.tasks.benchmarks.composite import Composite, CompositeConfig, composite_card, joined_generation
from peft_arena.tasks.benchmarks.math import Aime24, Amc23, Math500
from peft_arena.tasks.benchmarks.medical import MedMcqa, MedQa, MmluMedical, PubMedQa
from peft_arena.tasks.benchmarks.training import ArenaMathRows, ArenaMedicalRows, MedThink, OpenR1Math

_MEAN = (
    "accuracy is the unweighted mean over the {count} benchmarks and exists only if each of them has a value; each has "
    "its own under its name, and item_accuracy is the mean over all questions."
)
_SPLIT = (
    "Validation is held out of the training data; training problems that are test problems are left out, "
    "compared without their options, letter case, spaces and punctuation; rewordings are not found."
)


class ArenaConfig(CompositeConfig):
    """Settings of PEFT-Arena's targets."""

    rows: Literal["filtered", "published"] = "filtered"
    """What is trained on. ``filtered``: the original data, filtered by rules of ours; ``published``: the rows that
    PEFT-Arena publishes."""


class ArenaTarget(Composite):
    """A target of PEFT-Arena, whose training rows are there in two forms."""

    Config: ClassVar[type[TaskConfig]] = ArenaConfig
    published: ClassVar[type[Benchmark]]
    """Gives the train and validation items in the form 'published'."""

    def trained_on(self) -> type[Benchmark]:
        """Return the task of the form that was chosen."""
        assert isinstance(self.config, ArenaConfig)
        return self.published if self.config.rows == "published" else self.training


class ArenaMath(ArenaTarget):
    """Mathematics: OpenR1-Math to train on; MATH-500, AIME 2024 and AMC 2023 to test."""

    training = OpenR1Math
    published = ArenaMathRows
    members = (Math500, Aime24, Amc23)
    generation = joined_generation(members)
    card = composite_card(
        name="arena-math",
        title="PEFT-Arena mathematics",
        training=training,
        members=members,
        description=(
            "Trained on data-openr1-math, or data-arena-math with rows 'published'; tested on arena-math500, "
            "arena-aime24 and arena-amc23, all asked alike. "
            f"Protocol: as of those tasks; {_MEAN.format(count='three')} {_SPLIT} "
            "Differs: as those tasks do; in the training rows most of all. PEFT-Arena's 16 samples at temperature 0.6 "
            "are set in the study, not here."
        ),
    )


class ArenaMedical(ArenaTarget):
    """Medicine: reasoning about medical questions to train on; MedQA, MedMCQA, PubMedQA and MMLU to test."""

    training = MedThink
    published = ArenaMedicalRows
    members = (MedQa, MedMcqa, PubMedQa, MmluMedical)
    generation = joined_generation(members)
    card = composite_card(
        name="arena-medical",
        title="PEFT-Arena medicine",
        training=training,
        members=members,
        description=(
            "Trained on data-medthink, or data-arena-medical with rows 'published'; tested on arena-medqa, "
            "arena-medmcqa, arena-pubmedqa and arena-mmlu-medical, "
            f"whose form is 'generate'. Protocol: as of those tasks; {_MEAN.format(count='four')} {_SPLIT} "
            "Differs: as those tasks do; in the training rows most of all; PEFT-Arena's medical mean is over these and "
            "further sets of the m1 evaluation."
        ),
        version=2,
    )
