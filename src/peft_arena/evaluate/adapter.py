"""One of our tasks as lm-eval sees it: prepared requests out, scores back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lm_eval.api.instance import Instance
from lm_eval.api.task import Task as HarnessTask
from lm_eval.config.task import TaskConfig as HarnessConfig
from lm_eval.filters import build_filter_ensemble

from peft_arena.core.errors import UserError
from peft_arena.evaluate.metrics import weighted_mean
from peft_arena.models.render import render
from peft_arena.store.records import ItemRecord
from peft_arena.tasks.base import Item, Kind, Score, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peft_arena.evaluate.engine import Engine

SCORE = "score"
OUTPUT_TYPES = {Kind.GENERATE: "generate_until", Kind.CHOICE: "multiple_choice", Kind.TEXT: "loglikelihood"}


class Question(NamedTuple):
    """An item and the arguments of its requests."""

    item: Item
    requests: tuple[tuple[Any, ...], ...]


def prepare(task: Task, item: Item, tokenizer: PreTrainedTokenizerBase) -> Question | Score:
    """Return the requests of an item, or a score without value if the task cannot make them.

    Raises:
        UserError: the tokenizer cannot render the task's prompts.
    """
    try:
        requests = _requests(task, item, tokenizer)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - the one boundary to a plug-in's own code: its bug must not lose the other items
        return Score(None, reason=_failed("preparing", error))
    if not requests:
        return Score(None, reason="the item has no choices")
    return Question(item, requests)


def _requests(task: Task, item: Item, tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[Any, ...], ...]:
    if task.card.kind is Kind.TEXT:
        return (("", item.question),)
    prompt = render(tokenizer, task.prompt(item))
    if task.card.kind is Kind.CHOICE:
        return tuple((prompt, continuation) for continuation in task.continuations(item))
    settings = {
        "until": list(task.generation.stop),
        "max_gen_toks": task.generation.max_new_tokens,
        "do_sample": False,
    }
    return ((prompt, settings),)


class Adapter(HarnessTask):
    """A task of ours with prepared questions, in lm-eval's interface. Its documents are the questions' numbers."""

    VERSION = None

    def __init__(self, name: str, task: Task, questions: Sequence[Question], engine: Engine) -> None:
        """Adapt a task.

        Args:
            name: unique in one call of lm-eval.
            task: scores the answers.
            questions: what is asked; at least one.
            engine: tells which documents it could not answer.
        """
        self.OUTPUT_TYPE = OUTPUT_TYPES[task.card.kind]
        self.task = task
        self.questions = questions
        self.engine = engine
        # lm-eval's own constructor is not called: it loads a data set and configures a task that generates
        self.fewshot_rnd = None
        self._instances: list[Instance] = []
        self._filters = [build_filter_ensemble("none", [("take_first", None)])]
        generates = task.card.kind is Kind.GENERATE
        settings = {"until": list(task.generation.stop), "do_sample": False} if generates else None
        self._config = HarnessConfig(
            task=name,
            output_type=self.OUTPUT_TYPE,
            num_fewshot=0,
            generation_kwargs=settings,
            metadata={"version": task.card.version},
        )

    def download(self, *_: object, **__: object) -> None:
        """Do nothing: the questions are already here."""

    def has_training_docs(self) -> bool:
        """Say no: lm-eval only evaluates."""
        return False

    def has_validation_docs(self) -> bool:
        """Say no: the questions, of whatever split, are given as test documents."""
        return False

    def has_test_docs(self) -> bool:
        """Say yes."""
        return True

    def test_docs(self) -> list[dict[str, int]]:
        """Return one small document per question: its number."""
        return [{"number": number} for number in range(len(self.questions))]

    def doc_to_text(self, doc: dict[str, int]) -> str:
        """Return the question's prompt."""
        return str(self.questions[doc["number"]].requests[0][0])

    def doc_to_target(self, doc: dict[str, int]) -> str:
        """Return the question's gold answer."""
        return self.questions[doc["number"]].item.answer

    def build_all_requests(self, **_: object) -> None:
        """Make lm-eval's instances from the prepared requests."""
        self._instances = [
            instance
            for number, doc in enumerate(self.test_docs())
            for instance in self.construct_requests(doc, "", metadata=(self._config.task, number, 1))
        ]

    def construct_requests(self, doc: dict[str, int], ctx: str, **settings: Any) -> list[Instance]:
        """Return the instances of one document."""
        kind = "generate_until" if self.OUTPUT_TYPE == "generate_until" else "loglikelihood"
        requests = self.questions[doc["number"]].requests
        return [
            Instance(kind, doc, arguments, place, metadata=settings["metadata"])
            for place, arguments in enumerate(requests)
        ]

    def process_results(self, doc: dict[str, int], results: list[Any]) -> dict[str, Score]:
        """Score one document by the task's own definition."""
        reason = self.engine.rejected.get((str(self._config.task), doc["number"]))
        if reason is not None:
            return {SCORE: Score(None, reason=reason)}
        return {SCORE: self._score(self.questions[doc["number"]].item, results)}

    def _score(self, item: Item, results: list[Any]) -> Score:
        if self.task.card.kind is Kind.GENERATE:
            return _guarded(lambda: self.task.score(item, str(results[0])))
        totals = [float(total) for total, _ in results]
        if not all(map(math.isfinite, totals)):
            return Score(None, reason="a log-likelihood is not finite")
        if self.task.card.kind is Kind.CHOICE:
            return _guarded(lambda: self.task.score_choice(item, totals))
        tokens = self.engine.text_tokens(item.question)
        return _guarded(lambda: self.task.score_text(item, totals[0], tokens))

    def aggregation(self) -> dict[str, Callable[[Sequence[Score]], float | None]]:
        """Return the weighted mean of the scores."""
        return {SCORE: lambda scores: weighted_mean([s.value for s in scores], [s.weight for s in scores]).value}

    def higher_is_better(self) -> dict[str, bool]:
        """Return the direction of the headline metric."""
        return {SCORE: self.task.card.headline.better == "higher"}


def _guarded(score: Callable[[], Score]) -> Score:
    try:
        return score()
    except Exception as error:  # noqa: BLE001 - the one boundary to a plug-in's own code: its bug must not lose the other items
        return Score(None, reason=_failed("scoring", error))


def _failed(what: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{what} failed: {type(error).__name__}: {text[:200]}"


def item_record(item: Item, score: Score, output: str = "") -> ItemRecord:
    """Return the record of one item; a value that is not finite becomes an unscored item with a reason."""
    if score.value is not None and not (math.isfinite(score.value) and math.isfinite(score.weight)):
        score = Score(None, extracted=score.extracted, reason=f"the value is not finite: {score.value}")
    others = {
        name: (float(part.value), float(part.weight))
        for name, part in score.others.items()
        if math.isfinite(part.value) and math.isfinite(part.weight)
    }
    return ItemRecord(
        id=item.id,
        value=None if score.value is None else float(score.value),
        weight=float(score.weight),
        others=others if score.value is not None else {},
        extracted=score.extracted,
        reason=score.reason,
        output=output,
    )
