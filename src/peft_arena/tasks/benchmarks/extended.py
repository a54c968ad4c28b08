"""PEFT-Arena's further benchmarks of general ability: multiple choice by letters, word problems, XCOPA."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

from peft_arena.tasks.base import (
    ACCURACY,
    CHOICE_METRICS,
    Generation,
    Item,
    Kind,
    Message,
    Prompt,
    Score,
)
from peft_arena.tasks.benchmarks.base import ITEM_ACCURACY, Benchmark, HubSplit, with_item_accuracy
from peft_arena.tasks.benchmarks.letters import (
    FORMS,
    LETTER_DIFFERS,
    SHOTS,
    UNVERIFIED,
    LetterBenchmark,
    retention_card,
)
from peft_arena.tasks.benchmarks.math import GSM8K_TEST
from peft_arena.tasks.benchmarks.medical import MMLU_REVISION
from peft_arena.tasks.data import Row
from peft_arena.tasks.scorers import FINAL_ANSWER_MARK, canonical_number, numeric
from peft_arena.tasks.splits import Keyed

# Commits as read in public evaluations that pin them: lighteval task tables (HellaSwag, ARC), a reader of WinoGrande's
# Parquet files.
HELLASWAG_REVISION = "218ec52e09a7e7462a5400043bb9a69a41d06b76"
WINOGRANDE_REVISION = "01e74176c63542e6b0bcb004dcdea22d94fb67b5"
ARC_REVISION = "210d026faf9955653af8916fad021475a3f00453"
_DIGITS = re.compile(r"[0-9]")
_CALCULATION = re.compile(r"<<[^<>]*>>")
COT_TOKENS = 512


class HellaSwag(LetterBenchmark):
    """The sensible continuation of a scene, out of four."""

    shots = 10
    data: ClassVar[Mapping[str, tuple[HubSplit, ...]]] = {
        "test": (HubSplit("Rowan/hellaswag", "validation", revision=HELLASWAG_REVISION),),
        SHOTS: (HubSplit("Rowan/hellaswag", "train", revision=HELLASWAG_REVISION),),
    }
    card = retention_card(
        name="arena-hellaswag",
        title="HellaSwag, ten-shot, by letter",
        kind=Kind.GENERATE,
        metrics=(ACCURACY,),
        splits=data["test"],
        chance=0.25,
        licence="MIT",
        citation="Zellers et al. 2019, HellaSwag: Can a Machine Really Finish Your Sentence?",
        description=(
            "10,042 scenes of the validation split, as the test split's labels are hidden. Protocol: ten shots, the "
            f"first of the train split by the hash of their content. {FORMS} "
            f"Differs: which shots the original shows is not known; {LETTER_DIFFERS} Published numbers of other "
            f"harnesses compare the endings' likelihoods instead. {UNVERIFIED}"
        ),
        version=2,
    )

    def read(self, row: Row, where: HubSplit) -> Keyed | None:
        """Read the scene, its four endings and the index of the right one, which the hub holds as text."""
        label = str(row["label"])
        scene = f"{row['activity_label']}: {row['ctx']}"
        return self.keyed(scene, row["endings"], int(label) if _DIGITS.fullmatch(label) else -1)

    def request(self, item: Item) -> str:
        """Ask for the ending."""
        return f"Which ending fits the scene best? {super().request(item)}"


class WinoGrande(LetterBenchmark):
    """Which of two names a sentence is about."""

    data: ClassVar[Mapping[str, tuple[HubSplit, ...]]] = {
        "test": (HubSplit("allenai/winogrande", "validation", "winogrande_xl", WINOGRANDE_REVISION),),
    }
    card = retention_card(
        name="arena-winogrande",
        title="WinoGrande, zero-shot, by letter",
        kind=Kind.GENERATE,
        metrics=(ACCURACY,),
        splits=data["test"],
        chance=0.5,
        licence="CC-BY",
        citation="Sakaguchi et al. 2019, WinoGrande: An Adversarial Winograd Schema Challenge at Scale",
        description=(
            "1,267 sentences of the validation split, as the test split's labels are hidden; the options are the "
            f"sentence with each name filled in. Protocol: zero-shot. {FORMS} "
            f"Differs: {LETTER_DIFFERS} Published numbers of other harnesses compare the likelihoods of the rest of "
            f"the sentence instead. {UNVERIFIED}"
        ),
        version=2,
    )

    def read(self, row: Row, where: HubSplit) -> Keyed | None:
        """Read the sentence with its gap, both names and the number of the right one."""
        filled = [str(row["sentence"]).replace("_", str(row[name]), 1) for name in ("option1", "option2")]
        return self.keyed(
            "Which of the two sentences makes sense?", filled, {"1": 0, "2": 1}.get(str(row["answer"]), -1)
        )


SUBJECTS = (
    "abstract_algebra", "anatomy", "astronomy", "business_ethics", "clinical_knowledge", "college_biology",
    "college_chemistry", "college_computer_science", "college_mathematics", "college_medicine", "college_physics",
    "computer_security", "conceptual_physics", "econometrics", "electrical_engineering", "elementary_mathematics",
    "formal_logic", "global_facts", "high_school_biology", "high_school_chemistry", "high_school_computer_science",
    "high_school_european_history", "high_school_geography", "high_school_government_and_politics",
    "high_school_macroeconomics", "high_school_mathematics", "high_school_microeconomics", "high_school_physics",
    "high_school_psychology", "high_school_statistics", "high_school_us_history", "high_school_world_history",
    "human_aging", "human_sexuality", "international_law", "jurisprudence", "logical_fallacies", "machine_learning",
    "management", "marketing", "medical_genetics", "miscellaneous", "moral_disputes", "moral_scenarios", "nutrition",
    "philosophy", "prehistory", "professional_accounting", "professional_law", "professional_medicine",
    "professional_psychology", "public_relations", "security_studies", "sociology", "us_foreign_policy", "virology",
    "world_religions",
)  # fmt: skip


class Mmlu(LetterBenchmark):
    """Examination questions of 57 subjects."""

    shots = 5
    parts = SUBJECTS
    data: ClassVar[Mapping[str, tuple[HubSplit, ...]]] = {
        "test": (HubSplit("cais/mmlu", "test", "all", MMLU_REVISION),),
        SHOTS: (HubSplit("cais/mmlu", "dev", "all", MMLU_REVISION),),
    }
    card = retention_card(
        name="arena-mmlu",
        title="MMLU, five-shot, by letter, mean over 57 subjects",
        kind=Kind.GENERATE,
        metrics=(ACCURACY, ITEM_ACCURACY),
        splits=data["test"],
        chance=0.25,
        licence="MIT",
        citation="Hendrycks et al. 2021, Measuring Massive Multitask Language Understanding",
        description=(
            "14,042 questions of the test splits. accuracy: unweighted mean over the 57 subjects; item_accuracy: over "
            "the questions. Protocol: five shots, the subject's five of the dev split in the order of their hashes. "
            f"{FORMS} Differs: the shots' order; {LETTER_DIFFERS} Other harnesses compare letters' likelihoods and "
            f"weight subjects by size. {UNVERIFIED}"
        ),
        version=2,
    )

    def read(self, row: Row, where: HubSplit) -> Keyed | None:
        """Read the subject, the question, four options and the index of the right one."""
        return self.keyed(row["question"], row["choices"], int(row["answer"]), part=str(row["subject"]))

    def request(self, item: Item) -> str:
        """Ask about the subject."""
        subject = self.stratum(item).replace("_", " ")
        return f"A multiple choice question about {subject}. {super().request(item)}"


class Arc(LetterBenchmark):
    """Science questions for schools that simple methods got wrong."""

    data: ClassVar[Mapping[str, tuple[HubSplit, ...]]] = {
        "test": (HubSplit("allenai/ai2_arc", "test", "ARC-Challenge", ARC_REVISION),),
    }
    card = retention_card(
        name="arena-arc",
        title="ARC-Challenge, zero-shot, by letter",
        kind=Kind.GENERATE,
        metrics=(ACCURACY,),
        splits=data["test"],
        chance=0.25,
        licence="CC-BY-SA-4.0",
        citation="Clark et al. 2018, Think you have Solved Question Answering? Try ARC",
        description=(
            "1,172 questions of the test split, a few with three or five options; the options' own labels, letters or "
            f"numbers, become A, B, C and so on. Protocol: zero-shot. {FORMS} "
            f"Differs: the original may be on the validation split, which was not checked; {LETTER_DIFFERS} "
            f"{UNVERIFIED}"
        ),
        version=2,
    )

    def read(self, row: Row, where: HubSplit) -> Keyed | None:
        """Read the question, the options with their labels and the label of the right one."""
        labels = [str(label) for label in row["choices"]["label"]]
        gold = labels.index(row["answerKey"]) if row["answerKey"] in labels else -1
        return self.keyed(row["question"], row["choices"]["text"], gold)


class Gsm8kCot(Benchmark):
    """Word problems with four worked ones before them."""

    shots: ClassVar[int] = 4
    generation = Generation(max_new_tokens=COT_TOKENS, stop=("Question:",))
    data: ClassVar[Mapping[str, tuple[HubSplit, ...]]] = {
        "test": (GSM8K_TEST,),
        SHOTS: (HubSplit("openai/gsm8k", "train", "main", GSM8K_TEST.revision),),
    }
    card = retention_card(
        name="arena-gsm8k-cot",
        title="GSM8K, four worked examples",
        kind=Kind.GENERATE,
        metrics=(ACCURACY,),
        splits=data["test"],
        chance=0.0,
        licence="MIT",
        citation="Cobbe et al. 2021, Training Verifiers to Solve Math Word Problems",
        description=(
            "1,319 problems of the test split. Protocol: four shots as turns of the model's chat template, the first "
            "of the train split by the hash of their content, with their own solutions without calculator marks, each "
            f"ending 'The answer is N'; greedy, at most {COT_TOKENS} new tokens or the next 'Question:'; the answer is "
            "the first number after the last '####', else the one in the last box or after the last 'answer is', else "
            "the last, and is compared by value. Differs: the original's four worked examples are others, and so is "
            f"its wording. {UNVERIFIED}"
        ),
        version=2,
    )

    def read(self, row: Row, where: HubSplit) -> Keyed | None:
        """Read the problem and its solution, whose last line is ``#### N``."""
        rationale, mark, last = str(row["answer"]).rpartition(FINAL_ANSWER_MARK)
        number = last.strip().replace(",", "")
        if not mark or not number:
            return None
        steps = _CALCULATION.sub("", rationale).strip()
        question = str(row["question"]).strip()
        answer = f"{steps}\nThe answer is {canonical_number(number)}"
        return Keyed(question, Item(question, answer, data={"number": number}))

    def prompt(self, item: Item) -> Prompt:
        """Return four solved problems and this one."""
        turns: list[Message] = []
        shots = [shot for shot in self.items(SHOTS)[: self.shots + 1] if shot.question != item.question]
        for shot in shots[: self.shots]:
            turns += [Message("user", _problem(shot)), Message("assistant", shot.answer)]
        return (*turns, Message("user", _problem(item)))

    def score(self, item: Item, completion: str) -> Score:
        """Compare the answer's number by value."""
        return numeric([item.data["number"]], completion)


def _problem(item: Item) -> str:
    return f"Question: {item.question}\nLet's think step by step.\nAnswer:"


LANGUAGES = ("et", "ht", "id", "it", "qu", "sw", "ta", "th", "tr", "vi", "zh")
_XCOPA = tuple(HubSplit("cambridgeltl/xcopa", "test", language) for language in LANGUAGES)


class Xcopa(Benchmark):
    """Cause or effect of a premise, out of two, in eleven languages."""

    parts = LANGUAGES
    data: ClassVar[Mapping[str, tuple[HubSplit, ...]]] = {"test": _XCOPA}
    card = retention_card(
        name="arena-xcopa",
        title="XCOPA, zero-shot by likelihood, mean over eleven languages",
        kind=Kind.CHOICE,
        metrics=(*CHOICE_METRICS, ITEM_ACCURACY),
        splits=_XCOPA,
        chance=0.5,
        licence="CC-BY-4.0",
        citation="Ponti et al. 2020, XCOPA: A Multilingual Dataset for Causal Commonsense Reasoning",
        description=(
            "500 premises of the test split in each of et, ht, id, it, qu, sw, ta, th, tr, vi, zh. accuracy: "
            "unweighted mean over languages; item_accuracy: over premises. Protocol: zero-shot; 'Premise: ...' and "
            "'Cause:' or 'Effect:' as plain text; the option with the highest log-likelihood per character is the "
            "answer (accuracy_sum: the highest in sum). Differs: the original's two options stand in two different "
            "templates, so that their likelihoods cannot be compared; here both stand in the same. It averages the "
            "loss over the tokens of the whole text, and reads the train split of its own copy of the data. No commit "
            f"of the hub's data is pinned: the one loaded is recorded. {UNVERIFIED}"
        ),
    )

    def read(self, row: Row, where: HubSplit) -> Keyed | None:
        """Read the premise, what is asked (cause or effect), both options and the index of the right one."""
        asked = {"cause": "Cause", "effect": "Effect"}.get(str(row["question"]))
        gold = int(row["label"])
        if asked is None or gold not in (0, 1):
            return None
        choices = (str(row["choice1"]).strip(), str(row["choice2"]).strip())
        question = f"Premise: {str(row['premise']).strip()}\n{asked}:"
        part = {"part": where.subset or ""}
        shared = f"premise {row['idx']}" if "idx" in row else ""  # the languages translate the same premises
        item = Item(question, f" {choices[gold]}", choices, gold, part, group=shared)
        return Keyed("\n".join([where.subset or "", question, *choices]), item)

    def prompt(self, item: Item) -> Prompt:
        """Return premise and what is asked, as plain text."""
        return item.question

    def score_choice(self, item: Item, log_likelihoods: Sequence[float]) -> Score:
        """Judge by the log-likelihood of each option."""
        return with_item_accuracy(super().score_choice(item, log_likelihoods))
