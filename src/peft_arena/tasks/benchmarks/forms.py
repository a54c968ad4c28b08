"""Multiple choice in two forms: the letter is written, or the likelihoods of the letters are compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from peft_arena.tasks.base import CHOICE_METRICS, Item, Kind, Score, TaskConfig
from peft_arena.tasks.benchmarks.base import ITEM_ACCURACY, Benchmark, BenchmarkConfig, with_item_accuracy
from peft_arena.tasks.letter_text import LETTERS


class FormConfig(BenchmarkConfig):
    """Settings of a benchmark that is answered with a letter."""

    form: Literal["generate", "likelihood"] = "generate"
    """``generate``: the model writes the answer; ``likelihood``: the likelihoods of the options' letters are
    compared."""


class TwoForms(Benchmark):
    """A set of multiple-choice questions, its card being that of the form 'generate'."""

    Config: ClassVar[type[TaskConfig]] = FormConfig

    def __init__(self, config: TaskConfig | None = None) -> None:
        """Create the task; kind and metrics on its card are those of its form."""
        super().__init__(config)
        if self.compares:
            metrics = (*CHOICE_METRICS, ITEM_ACCURACY) if self.parts else CHOICE_METRICS
            self.card = self.card.model_copy(update={"kind": Kind.CHOICE, "metrics": metrics})

    @property
    def compares(self) -> bool:
        """Whether likelihoods are compared instead of a written answer being judged."""
        assert isinstance(self.config, FormConfig)
        return self.config.form == "likelihood"

    def judged(self, said: str, right: bool) -> Score:
        """Return the score of a written answer."""
        score = Score(float(right), extracted=said)
        return with_item_accuracy(score) if self.parts else score

    def score_choice(self, item: Item, log_likelihoods: Sequence[float]) -> Score:
        """Judge by the log-likelihood of each letter."""
        score = super().score_choice(item, log_likelihoods)
        return with_item_accuracy(score) if self.parts else score


def lettered(question: str, options: Sequence[str]) -> str:
    """Return a question with its options, each on a line that begins with its letter."""
    return "\n".join([question, *(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))])


def options_of(shown: str, count: int) -> tuple[str, ...]:
    """Return the texts of the options of a question that :func:`lettered` put together; none where they are not found.

    Args:
        shown: question and options.
        count: number of options.
    """
    texts: list[str] = []
    for letter in reversed(LETTERS[:count]):
        shown, mark, text = shown.rpartition(f"\n{letter}. ")
        if not mark:
            return ()
        texts.append(text)
    return tuple(reversed(texts))
