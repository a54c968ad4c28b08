"""One of our tasks as lm-eval sees it: prepared requests out, scores back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from lm_eval.api.instance import Instance
from lm_eval.api.task import Task as HarnessTask
from lm_eval.config.task import TaskConfig as HarnessConfig
from lm_eval.filters import build_filter_ensemble

from peft_arena.core.errors import UserError, is_of_machine
from peft_arena.core.ids import seed_for
from peft_arena.evaluate.metrics import weighted_mean
from peft_arena.evaluate.samples import Samples
from peft_arena.models.pieces import refuse_halves
from peft_arena.models.render import option_request, render
from peft_arena.tasks.base import Item, Kind, Score, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peft_arena.core.specs import Sampling
    from peft_arena.evaluate.engine import Engine

SCORE = "score"
OUTPUT_TYPES = {Kind.GENERATE: "generate_until", Kind.CHOICE: "multiple_choice", Kind.TEXT: "loglikelihood"}


class Question(NamedTuple):
    """An item and the arguments of its requests."""

    item: Item
    requests: tuple[tuple[Any, ...], ...]


def prepare(
    task: Task, item: Item, tokenizer: PreTrainedTokenizerBase, sampling: Sampling | None = None
) -> Question | Score:
    """Return the requests of an item, or a score without value if the task cannot make them.

    Args:
        task: makes the prompt.
        item: what is asked.
        tokenizer: renders the prompt.
        sampling: ask for several sampled answers, a request each; only for tasks that generate.

    Raises:
        UserError: the tokenizer cannot render the prompt, or no tokenizer could read a text; says which item.
    """
    try:
        requests = _requests(task, item, tokenizer, sampling)
        for text in {str(part) for request in requests for part in request if isinstance(part, str)}:
            refuse_halves(text)
    except UserError as error:
        raise UserError(f"task {task.card.name}, item {task.place_of(item)}: {error}") from None
    except Exception as error:
        if is_of_machine(error):  # no property of the item: another day it has a score
            raise
        return Score(None, reason=_failed("preparing", error))
    if not requests:
        return Score(None, reason="the item has no choices")
    return Question(item, requests)


def _requests(
    task: Task, item: Item, tokenizer: PreTrainedTokenizerBase, sampling: Sampling | None
) -> tuple[tuple[Any, ...], ...]:
    if task.card.kind is Kind.TEXT:
        return (("", item.question),)
    asked = task.prompt(item)
    if task.card.kind is Kind.CHOICE:
        options = task.continuations(item)
        return tuple(option_request(tokenizer, asked, continuation) for continuation in options)
    prompt = render(tokenizer, asked)
    settings = {"until": list(task.generation.stop), "max_gen_toks": task.generation.max_new_tokens}
    if sampling is None:
        return ((prompt, {**settings, "do_sample": False}),)
    settings |= {"do_sample": True, "temperature": sampling.temperature}
    settings |= {"top_k": sampling.top_k, "top_p": sampling.top_p}
    seeds = (seed_for(sampling.seed, "sample", item.id, number) for number in range(sampling.samples))
    return tuple((prompt, {**settings, "seed": seed}) for seed in seeds)


class Adapter(HarnessTask):
    """A task of ours with prepared questions, in lm-eval's interface. Its documents are the questions' numbers."""

    VERSION = None

    def __init__(
        self,
        name: str,
        task: Task,
        questions: Sequence[Question],
        engine: Engine,
        sampling: Sampling | None = None,
    ) -> None:
        """Adapt a task.

        Args:
            name: unique in one call of lm-eval.
            task: scores the answers.
            questions: what is asked; at least one.
            engine: tells which documents it could not answer.
            sampling: what the questions were prepared with.
        """
        self.OUTPUT_TYPE = OUTPUT_TYPES[task.card.kind]
        self.task = task
        self.questions = questions
        self.engine = engine
        self.sampling = sampling
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

    def process_results(self, doc: dict[str, int], results: list[Any]) -> dict[str, Score | Samples]:
        """Score one document by the task's own definition."""
        reason = self.engine.rejected.get((str(self._config.task), doc["number"]))
        if reason is not None:
            return {SCORE: Score(None, reason=reason)}
        return {SCORE: self._score(self.questions[doc["number"]].item, results)}

    def _score(self, item: Item, results: list[Any]) -> Score | Samples:
        if self.task.card.kind is Kind.GENERATE:
            scores = [_guarded(partial(self.task.score, item, str(answer))) for answer in results]
            return scores[0] if self.sampling is None else Samples(self.sampling, scores, list(map(str, results)))
        totals = [float(total) for total, _ in results]
        if not all(map(math.isfinite, totals)):
            return Score(None, reason="a log-likelihood is not finite")
        if self.task.card.kind is Kind.CHOICE:
            return _guarded(lambda: self.task.score_choice(item, totals))
        tokens = self.engine.text_tokens(item.question)
        return _guarded(lambda: self.task.score_text(item, totals[0], tokens))

    def aggregation(self) -> dict[str, Callable[[Sequence[Score | Samples]], float | None]]:
        """Return the weighted mean of the scores."""
        return {SCORE: _mean}

    def higher_is_better(self) -> dict[str, bool]:
        """Return the direction of the headline metric."""
        return {SCORE: self.task.card.headline.better == "higher"}


def _mean(found: Sequence[Score | Samples]) -> float | None:
    scores = [one.score if isinstance(one, Samples) else one for one in found]
    return weighted_mean([score.value for score in scores], [score.weight for score in scores]).value


def _guarded(score: Callable[[], Score]) -> Score:
    try:
        return score()
    except Exception as error:
        if is_of_machine(error):  # no property of the item: another day it has a score
            raise
        return Score(None, reason=_failed("scoring", error))


def _failed(what: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{what} failed: {type(error).__name__}: {text[:200]}"
