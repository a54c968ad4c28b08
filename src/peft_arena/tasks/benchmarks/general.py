"""PEFT-Arena's benchmarks of general ability: IFEval and Natural Questions; BIG-Bench Hard is in ``bbh``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import ClassVar

from peft_arena.tasks.base import FRACTION, Generation, Item, Kind, Message, Metric, Part, Prompt, Score
from peft_arena.tasks.benchmarks.base import Benchmark, HubSplit
from peft_arena.tasks.benchmarks.letters import UNVERIFIED, retention_card
from peft_arena.tasks.data import Row
from peft_arena.tasks.instruction_following import InstructionFollowing, InstructionLibrary, follow, load_library
from peft_arena.tasks.scorers import GAMED_BY, contains, first_line, normalised_match
from peft_arena.tasks.splits import Keyed

# Commit as read in a public evaluation that pins data set and checksum.
IFEVAL_REVISION = "966cd89545d6b6acfd7638bc708b98261ca58e84"
# Commit and columns as read in public evaluations that pin them with the files' checksums.
NQ_REVISION = "5dd9790a83002ad084ddeb7c420dc716852c6f28"
IFEVAL_TOKENS = 1025
NQ_TOKENS = 50
_ANSWER_MARK = re.compile(r"answer is:?", re.IGNORECASE)


class IfEval(Benchmark):
    """541 requests with one to three instructions that a program can check."""

    generation = Generation(max_new_tokens=IFEVAL_TOKENS, stop=())
    data: ClassVar[Mapping[str, tuple[HubSplit, ...]]] = {
        "test": (HubSplit("google/IFEval", "train", revision=IFEVAL_REVISION),)
    }
    card = retention_card(
        name="arena-ifeval",
        title="IFEval, instructions followed strictly",
        kind=Kind.GENERATE,
        metrics=InstructionFollowing.card.metrics,
        splits=data["test"],
        chance=None,
        licence="Apache-2.0",
        citation="Zhou et al. 2023, Instruction-Following Evaluation for Large Language Models",
        description=(
            "541 requests, which the hub calls train. instruction_strict: share of all 834 instructions followed, so a "
            "request counts as often as it has instructions; prompt_strict: share of requests with all of them "
            "followed; the loose values also accept the text without its first or last line or asterisks. Protocol: "
            f"one user turn of the model's chat template; greedy, at most {IFEVAL_TOKENS} new tokens, no stop string; "
            "judged by lm-eval's copy of the checkers with a seeded language detector. Differs: the original judges by "
            "OpenCompass's copy of the checkers, which was not compared. No chance value: some instructions are met by "
            f"most texts. {UNVERIFIED}"
        ),
    )

    def read(self, row: Row, where: HubSplit) -> Keyed | None:
        """Read the request and its instructions; arguments an instruction does not take are null on the hub."""
        names = [str(name) for name in row["instruction_id_list"]]
        settings = [{key: value for key, value in given.items() if value is not None} for given in row["kwargs"]]
        if not names or len(settings) != len(names):
            return None
        data = {"instruction_id_list": names, "kwargs": settings}
        prompt = str(row["prompt"])
        return Keyed(prompt, Item(prompt, answer=str(row.get("_answer", "")), data=data))

    def prompt(self, item: Item) -> Prompt:
        """Return the request as one user turn."""
        return (Message("user", item.question),)

    def score(self, item: Item, completion: str) -> Score:
        """Judge by lm-eval's checkers, strictly and loosely."""
        return follow(self._library, item, completion)

    @cached_property
    def _library(self) -> InstructionLibrary:
        return load_library()


def answer_part(completion: str) -> str:
    """Return the first line of an answer from after its last ``answer is``, if it has one."""
    return _ANSWER_MARK.split(first_line(completion))[-1].strip()


class NaturalQuestions(Benchmark):
    """Short factual questions asked of a search engine, answered from memory."""

    generation = Generation(max_new_tokens=NQ_TOKENS, stop=())
    data: ClassVar[Mapping[str, tuple[HubSplit, ...]]] = {
        "test": (HubSplit("google-research-datasets/nq_open", "validation", revision=NQ_REVISION),)
    }
    card = retention_card(
        name="arena-nq",
        title="Natural Questions, open, zero-shot",
        kind=Kind.GENERATE,
        metrics=(
            Metric(name="contains", unit=FRACTION, better="higher"),
            Metric(name="exact_match", unit=FRACTION, better="higher"),
        ),
        splits=data["test"],
        chance=0.0,
        licence="CC-BY-SA-3.0",
        citation="Kwiatkowski et al. 2019, Natural Questions; Lee et al. 2019, Latent Retrieval (the open variant)",
        description=(
            "3,610 questions of the validation split. contains: the answer holds an accepted one as whole words; "
            "exact_match: it is one; both after lower-casing and removing punctuation, articles and surplus white "
            f"space. Protocol: zero-shot, one user turn of the model's chat template; greedy, at most {NQ_TOKENS} new "
            "tokens, no stop string; judged is the first line, from after its last 'answer is'. Differs: the original "
            "also counts an accepted answer inside a longer word or number, and its request is worded otherwise. "
            f"{UNVERIFIED}"
        ),
    )

    def read(self, row: Row, where: HubSplit) -> Keyed | None:
        """Read the question and its accepted answers."""
        answers = [str(answer).strip() for answer in row["answer"] if str(answer).strip()]
        if not answers:
            return None
        question = f"{str(row['question']).strip().rstrip('?').strip()}?"
        return Keyed(question, Item(question, f"The answer is {answers[0]}", data={"answers": answers}))

    def prompt(self, item: Item) -> Prompt:
        """Return the question as one user turn that asks for a short answer."""
        request = "Answer with as few words as possible, in the form 'The answer is ...'."
        return (Message("user", f"{request}\nQuestion: {item.question}"),)

    def score(self, item: Item, completion: str) -> Score:
        """Judge the answer against every accepted one."""
        said = answer_part(completion)
        answers = item.data["answers"]
        exact = normalised_match(answers, said).value
        judged = contains(answers, said)
        return Score(judged.value, judged.extracted, others={"exact_match": Part(exact or 0.0)})

    def reward_caution(self) -> str:
        """Return how answers can win without being right: as those of the scorer it uses."""
        return GAMED_BY["contains"]
