r"""PEFT-Arena's medical questions: options with letters, the letter of the answer in ``\boxed{}`` or by likelihood.

Where columns and commits are from is said beside each data set. None of it was loaded from the hub by us: there is no
network where this was written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from peft_arena.tasks.base import (
    ACCURACY,
    Generation,
    Item,
    Kind,
    Message,
    Prompt,
    Role,
    Score,
    TaskCard,
)
from peft_arena.tasks.benchmarks.base import ITEM_ACCURACY, HubSplit, pins
from peft_arena.tasks.benchmarks.forms import LETTERS, TwoForms, lettered
from peft_arena.tasks.data import Row
from peft_arena.tasks.letter_answers import SHORT_CHARACTERS, given_letter
from peft_arena.tasks.splits import Keyed

LETTER_REQUEST = "Please reason step by step, and put the letter of your final answer within \\boxed{}."
MEDICAL_TOKENS = 8192
PROTOCOL = (
    "Protocol: zero-shot. Form 'generate': one user turn of the model's chat template, the question, its options as "
    f"lines 'A. ...' and '{LETTER_REQUEST}'; greedy, at most {MEDICAL_TOKENS} new tokens, no stop string; the answer "
    "is the letter, or the whole text of one option, in the last closed \\boxed{}; without a box the letter, or the "
    "text of "
    "one option, that is said to be the answer, last where a text turns from one to another; in a text of at most "
    f"{SHORT_CHARACTERS} characters else the only letter that is named and not rejected; anything else is wrong, and "
    "nothing is guessed. Form 'likelihood': question and options as plain text, then 'Answer:'; "
    "the option whose letter has the highest log-likelihood is the answer, "
    "options' texts are not compared."
)
DIFFERS = (
    "Differs: PEFT-Arena asks for 'your final answer' instead of its letter, and looks for the answer in further "
    "places that were not compared; its shell script allows 8,192 new tokens, as here, where its Python script's "
    "default is 1,024; its bundled questions are those of the m1 evaluation, which may be other rows. The "
    "likelihood form is not in its published results."
)
UNVERIFIED = "The hub was not reached: columns and labels are as public code describes them."


def chosen_letter(text: str, options: Sequence[str]) -> str:
    r"""Return the letter of the option a text gives as its answer; empty where it gives none, or several.

    That is what stands in the last closed ``\boxed{}``: a letter, perhaps in brackets or with its option's text, or
    exactly one option's text, even one that begins like a letter (``C. difficile``). A box with anything else is no
    answer. Without a box it is what :func:`peft_arena.tasks.letter_answers.given_letter` reads.

    Args:
        text: what a model wrote.
        options: texts of the options, the first being A; letters beyond them are no answer.
    """
    return given_letter(text, len(options), options)


def ask_for_letter(question: str) -> tuple[Message, ...]:
    r"""Return the conversation that asks for the letter of an option in ``\boxed{}``."""
    return (Message("user", f"{question}\n{LETTER_REQUEST}"),)


def medical_card(
    *, name: str, title: str, rows: str, data: Sequence[HubSplit], chance: float, licence: str, citation: str
) -> TaskCard:
    """Return the card of one set of questions, in the form 'generate'."""
    return TaskCard(
        name=name,
        title=title,
        version=2,
        role=Role.RETENTION,
        kind=Kind.GENERATE,
        metrics=(ACCURACY,),
        chance=chance,
        source="; ".join(map(str, data)),
        revision=pins(data),
        licence=licence,
        citation=citation,
        description=f"{rows} {PROTOCOL} {DIFFERS} {UNVERIFIED}",
    )


class MedicalSet(TwoForms):
    """A set of multiple-choice questions. Subclasses read question, options and the place of the right one."""

    generation = Generation(max_new_tokens=MEDICAL_TOKENS, stop=())

    def keyed(self, question: str, options: Sequence[str], gold: int, part: str = "") -> Keyed | None:
        """Make an item; a row whose right option is none of at least two is left out."""
        texts = [str(option).strip() for option in options]
        if not 0 <= gold < len(texts) or len(texts) < 2:
            return None
        data = {"options": texts, **({"part": part} if part else {})}
        shown = lettered(question.strip(), texts)
        letters = tuple(LETTERS[: len(texts)])
        return Keyed(shown, Item(shown, f"\\boxed{{{letters[gold]}}}", letters, gold, data))

    def prompt(self, item: Item) -> Prompt:
        """Return question and options, as a conversation or as plain text."""
        if self.compares:
            return f"Question: {item.question}\nAnswer:"
        return ask_for_letter(item.question)

    def score(self, item: Item, completion: str) -> Score:
        """Compare the letter given with the right one."""
        if self.compares:
            return super().score(item, completion)
        said = chosen_letter(completion, item.data["options"])
        return self.judged(said, item.gold is not None and said == item.choices[item.gold])


# Commit and columns as a public catalogue of medical data sets gives them; also pinned by public evaluations.
_MEDMCQA = HubSplit("openlifescienceai/medmcqa", "validation", revision="91c6572c454088bf71b679ad90aa8dffcd0d5868")
# Commit and columns as the same catalogue gives them; also pinned by public evaluations.
_MEDQA = HubSplit("GBaker/MedQA-USMLE-4-options", "test", revision="0fb93dd23a7339b6dcd27e241cb9b5eca62d4d18")
# Commit as pinned for inspect_evals' pubmedqa.
_PUBMEDQA = HubSplit("qiaojin/PubMedQA", "train", "pqa_labeled", "9001f2853fb87cab8d220904e0de81ac6973b318")
MMLU_REVISION = "c30699e8356da336a370243923dbaf21066bb9fe"
"""Commit of cais/mmlu, as pinned by a public evaluation that counts its 57 subjects."""
MMLU_MEDICAL = (
    "anatomy",
    "clinical_knowledge",
    "college_biology",
    "college_medicine",
    "medical_genetics",
    "professional_medicine",
)
_MMLU = tuple(HubSplit("cais/mmlu", "test", subject, MMLU_REVISION) for subject in MMLU_MEDICAL)


class MedMcqa(MedicalSet):
    """Questions of Indian medical entrance examinations."""

    data: ClassVar[Mapping[str, tuple[HubSplit, ...]]] = {"test": (_MEDMCQA,)}
    card = medical_card(
        name="arena-medmcqa",
        title="MedMCQA: medical entrance examinations",
        rows="The 4,183 questions of the validation split, as the test split's labels are hidden.",
        data=(_MEDMCQA,),
        chance=0.25,
        licence="Apache-2.0 on the hub, MIT in its repository",
        citation="Pal et al. 2022, MedMCQA: A Large-scale Multi-Subject Multi-Choice Dataset for Medical domain",
    )

    def read(self, row: Row, where: HubSplit) -> Keyed | None:
        """Read the question, four options and the index of the right one; -1 stands for a hidden label."""
        return self.keyed(row["question"], [row[f"op{letter}"] for letter in "abcd"], int(row["cop"]))


_PLACES = {letter: place for place, letter in enumerate("ABCD")}


class MedQa(MedicalSet):
    """Questions of the United States Medical Licensing Examination with four options."""

    data: ClassVar[Mapping[str, tuple[HubSplit, ...]]] = {"test": (_MEDQA,)}
    card = medical_card(
        name="arena-medqa",
        title="MedQA: US medical licensing examination, four options",
        rows="1,273 questions of the test split.",
        data=(_MEDQA,),
        chance=0.25,
        licence="CC-BY-4.0",
        citation="Jin et al. 2020, What Disease does this Patient Have? A Large-scale Open Domain QA Dataset",
    )

    def read(self, row: Row, where: HubSplit) -> Keyed | None:
        """Read the question, the options by letter and the letter of the right one."""
        options = row["options"]
        return self.keyed(
            row["question"], [options[letter] for letter in "ABCD"], _PLACES.get(str(row["answer_idx"]), -1)
        )


class PubMedQa(MedicalSet):
    """Questions about abstracts of biomedical papers."""

    labels: ClassVar[tuple[str, ...]] = ("yes", "no", "maybe")
    data: ClassVar[Mapping[str, tuple[HubSplit, ...]]] = {"test": (_PUBMEDQA,)}
    card = medical_card(
        name="arena-pubmedqa",
        title="PubMedQA: yes, no or maybe from an abstract",
        rows=(
            "All 1,000 expert-labelled questions, which the hub calls train; the paper's test split is 500 of them. "
            "The abstract without its conclusion comes first; the options are A. yes, B. no, C. maybe."
        ),
        data=(_PUBMEDQA,),
        chance=1 / 3,
        licence="MIT",
        citation="Jin et al. 2019, PubMedQA: A Dataset for Biomedical Research Question Answering",
    )

    def read(self, row: Row, where: HubSplit) -> Keyed | None:
        """Read the abstract's parts, the question and the decision."""
        contexts = row["context"]["contexts"]
        question = "\n".join([*(str(part).strip() for part in contexts), str(row["question"]).strip()])
        decision = row["final_decision"]
        return self.keyed(question, self.labels, self.labels.index(decision) if decision in self.labels else -1)


class MmluMedical(MedicalSet):
    """The six medical subjects of MMLU."""

    parts = MMLU_MEDICAL
    data: ClassVar[Mapping[str, tuple[HubSplit, ...]]] = {"test": _MMLU}
    card = medical_card(
        name="arena-mmlu-medical",
        title="MMLU, six medical subjects",
        rows=(
            "The test splits of anatomy, clinical knowledge, college biology, college medicine, medical genetics and "
            "professional medicine; accuracy is the unweighted mean over the six, item_accuracy that over questions."
        ),
        data=_MMLU,
        chance=0.25,
        licence="MIT",
        citation="Hendrycks et al. 2021, Measuring Massive Multitask Language Understanding",
    ).model_copy(update={"metrics": (ACCURACY, ITEM_ACCURACY)})

    def read(self, row: Row, where: HubSplit) -> Keyed | None:
        """Read the question, the options and the index of the right one."""
        return self.keyed(row["question"], row["choices"], int(row["answer"]), part=where.subset or "")
