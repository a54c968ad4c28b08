r"""Data to train on: mathematics with long reasoning, and medical reasoning.

PEFT-Arena trains on 50,000 problems of OpenR1-Math and on 23,000 of "MedThink". It publishes both sets, filtered, as
Parquet files, but not the filters. ``data-openr1-math`` and ``data-medthink`` filter the original data by rules that
are on their cards; ``data-arena-math`` and ``data-arena-medical`` read the published files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from peft_arena.core.errors import UserError
from peft_arena.tasks.base import ACCURACY, Generation, Item, Kind, Prompt, Role, Score, TaskCard
from peft_arena.tasks.benchmarks.base import Benchmark, HubSplit
from peft_arena.tasks.benchmarks.math import BOX_REQUEST, MATH_TOKENS, ask_for_box, plain_answer
from peft_arena.tasks.benchmarks.medical import LETTERS, MEDICAL_TOKENS, ask_for_letter, chosen_letter
from peft_arena.tasks.data import Row
from peft_arena.tasks.scorers import boxed, last_box
from peft_arena.tasks.splits import Keyed, cut, cut_by_share, normal_key

HELD_OUT = 40
"""Problems in each of validation and test: of 50,000 rows 49,920 are left, the 195 batches of 256 in an epoch of
PEFT-Arena's 780 steps."""
OPENR1_TRAIN = 50_000
OPENR1_CHARACTERS = 24_000
"""Longest reasoning and answer; about 8,192 tokens."""
THOUGHT_END = "</think>"
MINIATURE_SHARES = {"train": 0.5, "validation": 0.25, "test": 0.25}
PEFT_ARENA = "Huang et al. 2026, PEFT-Arena: Understanding Parameter-Efficient Finetuning (arXiv 2605.28819)"


class TrainingData(Benchmark):
    """Rows to train on, a few of which are held out. Subclasses say how many, and read one row."""

    sizes: ClassVar[Mapping[str, int | None]]
    """Problems of each split, in the order in which they are dealt out by the hash of their keys."""
    repeats: ClassVar[bool] = False
    """Whether several rows with one key are kept, all in one split; else the first is."""

    def _keyed(self, where: HubSplit) -> Iterator[Keyed]:
        """Read the rows of the hub split."""
        seen: set[str] = set()
        for found in super()._keyed(where):
            key = normal_key(found.key)
            if self.repeats or key not in seen:
                seen.add(key)
                yield found

    def _read_split(self, split: str) -> tuple[Item, ...]:
        """Read the one hub split there is, and deal its rows out to ours."""
        (where,) = self.data["train"]
        keyed = list(self._keyed(where))
        if self.settings.source == "miniature":
            self._kept.update(cut_by_share(keyed, MINIATURE_SHARES))
        else:
            self._kept.update(cut(keyed, self.sizes))
        empty = [name for name, items in self._kept.items() if not items]
        if empty:
            raise UserError(
                f"task {self.card.name}: nothing is left for {', '.join(empty)} of {len(keyed)} usable rows"
            )
        return self._kept[split]


def training_card(
    *,
    name: str,
    title: str,
    data: HubSplit,
    chance: float,
    licence: str,
    citation: str,
    description: str,
    version: int = 1,
) -> TaskCard:
    """Return the card of data to train on."""
    return TaskCard(
        name=name,
        title=title,
        version=version,
        role=Role.TARGET,
        kind=Kind.GENERATE,
        metrics=(ACCURACY,),
        chance=chance,
        source=str(data),
        revision=f"{data.hub}@{data.revision}",
        licence=licence,
        citation=citation,
        description=description,
    )


# Commit as pinned by several public training recipes, e.g. for "sft" beside fineweb-edu; columns as they use them.
_OPENR1 = HubSplit("open-r1/OpenR1-Math-220k", "train", "default", "e4e141ec9dea9f8326f4d347be56105859b2bd68")
_M23K = HubSplit("UCSC-VLAA/m23k-tokenized", "train")
# Folders and files as a public converter of this data set names them.
_ARENA = "SphereLab/PEFTArena-data"
_ARENA_MATH = HubSplit(_ARENA, "train", "openr1-50k", file="data/openr1-50k/train.parquet")
_ARENA_MEDICAL = HubSplit(_ARENA, "train", "medthink-23k", file="data/medthink-23k/train.parquet")


class OpenR1Math(TrainingData):
    """Problems with one verified line of reasoning of DeepSeek-R1 each."""

    generation = Generation(max_new_tokens=MATH_TOKENS, stop=())
    data: ClassVar[Mapping[str, tuple[HubSplit, ...]]] = {"train": (_OPENR1,), "test": (_OPENR1,)}
    sizes: ClassVar[Mapping[str, int | None]] = {"validation": HELD_OUT, "test": HELD_OUT, "train": OPENR1_TRAIN}
    card = training_card(
        name="data-openr1-math",
        title="OpenR1-Math, 50,000 verified solutions",
        data=_OPENR1,
        chance=0.0,
        licence="Apache-2.0",
        citation=f"Hugging Face 2025, OpenR1-Math-220k; {PEFT_ARENA}",
        description=(
            "Protocol: the problem asked as in arena-math500, in the chat, with the request for a box; trained on the "
            "first generation that math-verify found right, whose reasoning is complete, that has a closed \\boxed{} "
            f"after its reasoning and at most {OPENR1_CHARACTERS:,} characters; problems without such a generation or "
            "without an answer are left out, one row is kept of each problem. By the hash of the problem "
            f"{HELD_OUT} problems are validation, {HELD_OUT} test and the next {OPENR1_TRAIN:,} train. Judged by the "
            "last box with math-verify. "
            "Differs: PEFT-Arena's filter is not published; its filtered rows are, and data-arena-math reads them; the "
            "two share the source, not the rows. The hub was not reached: how many rows pass the filter is not known."
        ),
    )

    def read(self, row: Row, where: HubSplit) -> Keyed | None:
        """Read a problem, the solution to learn and the final answer."""
        problem, gold = str(row["problem"]).strip(), plain_answer(row["answer"] or "")
        solution = _verified(row)
        if not problem or not gold or not solution:
            return None
        return Keyed(problem, Item(problem, answer=solution, data={"answer": gold}))

    def prompt(self, item: Item) -> Prompt:
        """Return the problem and the request for a box."""
        return ask_for_box(item.question)

    def score(self, item: Item, completion: str) -> Score:
        """Compare the last box with the gold answer."""
        return boxed([item.data["answer"]], completion)


def _verified(row: Row) -> str | None:
    """Return the first generation of a row that is right, complete, boxed and short enough."""
    flags = zip(row["correctness_math_verify"] or (), row["is_reasoning_complete"] or (), strict=False)
    for generation, (right, complete) in zip(row["generations"] or (), flags, strict=False):
        text = str(generation).strip()
        boxed_last = last_box(text.rpartition(THOUGHT_END)[2])
        if right and complete and boxed_last and len(text) <= OPENR1_CHARACTERS:
            return text
    return None


class MedThink(TrainingData):
    """Medical questions with reasoning and an answer with its letter."""

    generation = Generation(max_new_tokens=MEDICAL_TOKENS, stop=())
    data: ClassVar[Mapping[str, tuple[HubSplit, ...]]] = {"train": (_M23K,), "test": (_M23K,)}
    sizes: ClassVar[Mapping[str, int | None]] = {"validation": HELD_OUT, "test": HELD_OUT, "train": None}
    card = training_card(
        name="data-medthink",
        title="Medical reasoning, 23,000 questions",
        data=_M23K,
        chance=0.25,
        licence="not stated by the data set",
        citation=f"Huang et al. 2025, m1: Unleash the Potential of Test-Time Scaling; {PEFT_ARENA}",
        description=(
            "Protocol: the data set's prompt, question and lettered options, asked as in arena-medqa; trained on "
            "<think>, the reasoning, </think> and the data set's answer, to which a line with the gold letter in "
            "\\boxed{} is added where no letter can be read from it; rows whose answer says another letter, and rows "
            f"without reasoning or letter, are left out. By the hash of the prompt {HELD_OUT} are validation, "
            f"{HELD_OUT} test and all others train. Judged as arena-medqa's form 'generate'. "
            "Differs: no data set called MedThink was found. m23k, used here, is the likely source: it has as many "
            "rows, PEFT-Arena's files call theirs med_23k_think and it evaluates on the questions of m23k's authors. "
            "PEFT-Arena's own rows are read by data-arena-medical. The hub was not reached: the data set's columns are "
            "as public code uses them."
        ),
        version=2,
    )

    def read(self, row: Row, where: HubSplit) -> Keyed | None:
        """Read the question with its options, the text to learn and the gold letter."""
        question, gold = str(row["prompt"]).strip(), str(row["answer_letter"] or "").strip()
        reasoning = str(row["reasoning"] or "").strip()
        answer = str(row["distilled_answer_string"] or "").strip()
        if not reasoning:
            return None
        response = f"<think>\n{reasoning}\n{THOUGHT_END}\n\n{answer}"
        if not question or len(gold) != 1 or gold not in LETTERS or chosen_letter(answer, LETTERS) not in ("", gold):
            return None
        if chosen_letter(response, LETTERS) != gold:
            response = f"{response}\n\n\\boxed{{{gold}}}"
        return Keyed(question, Item(question, answer=response, data={"answer": gold}))

    def prompt(self, item: Item) -> Prompt:
        """Return the question and the request for a boxed letter."""
        return ask_for_letter(item.question)

    def score(self, item: Item, completion: str) -> Score:
        """Compare the letter given with the right one."""
        said = chosen_letter(completion, LETTERS)
        return Score(float(said == item.data["answer"]), extracted=said)


def published(row: Row) -> tuple[str, str, str]:
    """Return question, response and gold answer of a row of PEFT-Arena's own files.

    The columns are those that its training script names: ``extra_info.question``, ``extra_info.answer`` and
    ``reward_model.ground_truth``. A request for a box at the end of the question is taken off.
    """
    extra, reward = row["extra_info"], row["reward_model"]
    question = str(extra["question"]).strip().removesuffix(BOX_REQUEST).strip()
    return question, str(extra["answer"]).strip(), plain_answer(reward["ground_truth"])


_PUBLISHED = (
    "Protocol: rows as PEFT-Arena publishes them, columns extra_info.question, extra_info.answer and "
    "reward_model.ground_truth; trained on the response as it is; rows without one of the three are left out, one row "
    f"is kept of each question; by the hash of the question {HELD_OUT} are validation, {HELD_OUT} test and all others "
    "train. Asked and judged as "
)
_PUBLISHED_DIFFERS = (
    "Differs: PEFT-Arena validates on a file of its own (test.parquet), which is not read, and may train without the "
    "request for a box. The hub was not reached: files and columns are as its scripts and a public converter name them."
)


class ArenaMathRows(OpenR1Math):
    """The mathematics that PEFT-Arena trains on, as published."""

    data: ClassVar[Mapping[str, tuple[HubSplit, ...]]] = {"train": (_ARENA_MATH,), "test": (_ARENA_MATH,)}
    card = training_card(
        name="data-arena-math",
        title="PEFT-Arena's training rows, mathematics",
        data=_ARENA_MATH,
        chance=0.0,
        licence="not stated; made from OpenR1-Math-220k, Apache-2.0",
        citation=f"{PEFT_ARENA}; Hugging Face 2025, OpenR1-Math-220k",
        description=f"50,000 problems of OpenR1-Math. {_PUBLISHED}data-openr1-math. {_PUBLISHED_DIFFERS}",
    )

    def read(self, row: Row, where: HubSplit) -> Keyed | None:
        """Read a problem, the solution to learn and the final answer."""
        problem, solution, gold = published(row)
        if not problem or not solution or not gold:
            return None
        return Keyed(problem, Item(problem, answer=solution, data={"answer": gold}))


class ArenaMedicalRows(MedThink):
    """The medical questions that PEFT-Arena trains on, as published."""

    data: ClassVar[Mapping[str, tuple[HubSplit, ...]]] = {"train": (_ARENA_MEDICAL,), "test": (_ARENA_MEDICAL,)}
    card = training_card(
        name="data-arena-medical",
        title="PEFT-Arena's training rows, medicine",
        data=_ARENA_MEDICAL,
        chance=0.25,
        licence="not stated",
        citation=PEFT_ARENA,
        description=(
            f"23,000 questions of MedThink. {_PUBLISHED}data-medthink; rows whose gold answer is no letter are left "
            f"out too. {_PUBLISHED_DIFFERS}"
        ),
        version=2,
    )

    def read(self, row: Row, where: HubSplit) -> Keyed | None:
        """Read the question with its options, the text to learn and the gold letter."""
        question, response, gold = published(row)
        if not question or not response or len(gold) != 1 or gold not in LETTERS:
            return None
        return Keyed(question, Item(question, answer=response, data={"answer": gold}))
