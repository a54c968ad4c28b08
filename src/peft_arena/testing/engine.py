"""A model without weights: the whole path from prompt to record runs in milliseconds, with known answers.

Give a :class:`ScriptedModel` to :func:`peft_arena.evaluate.run.evaluate` in the place of the model, and
:func:`scripted_loaded` in the place of the loaded one::

    record = evaluate(scripted_loaded(), knowing(task, items), spec, run_id="test", step=0, factor=1.0)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import LM

from peft_arena.core.specs import ModelSpec
from peft_arena.evaluate.decode import cut
from peft_arena.models.load import Loaded
from peft_arena.models.render import render
from peft_arena.tasks.base import Item, Kind, Task

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

LIKELY = -1.0
"""Log-likelihood, nats, of a continuation the script gives."""
UNLIKELY = -1000.0
"""Log-likelihood, nats, of any other continuation."""
NONSENSE = "zzz"
"""What a model writes that is wrong about everything."""


class PlainTokenizer:
    """The part of a tokenizer that rendering needs: conversations become lines of ``role: content``."""

    name_or_path = "scripted"
    chat_template = "{role}: {content}"

    def get_chat_template(self) -> str:
        """Return the template, which only says what the lines look like."""
        return self.chat_template

    def apply_chat_template(self, turns: Sequence[Mapping[str, str]], **_: object) -> str:
        """Render a conversation and the start of the answer."""
        return "".join(f"{turn['role']}: {turn['content']}\n" for turn in turns) + "assistant:"


class ScriptedModel(LM):
    """Answers each prompt from a script, as an engine of lm-eval.

    A prompt that the script does not know is answered with ``default``. Of the continuations of a prompt, the scripted
    one is likely and all others are not; of texts, each character costs one nat if the script knows the text and ten
    if it does not.
    """

    def __init__(self, script: Mapping[str, str] | Callable[[str], str], default: str = "") -> None:
        """Take the script: rendered prompt to completion, or a function that gives it."""
        super().__init__()
        self._script = script
        self._default = default
        self.rejected: dict[tuple[str, int], str] = {}
        self.met_limit: Counter[tuple[str, int]] = Counter()
        """Always empty: a scripted answer has an end."""

    def answer(self, prompt: str) -> str:
        """Return the scripted completion of a rendered prompt."""
        if callable(self._script):
            return self._script(prompt)
        return self._script.get(prompt, self._default)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the scripted completion of each prompt, up to the first stop string."""
        return [cut(self.answer(prompt), settings.get("until", ())) for prompt, settings in (r.args for r in requests)]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return a high log-likelihood for scripted continuations and a low one for all others."""
        return [self._likelihood(*request.args) for request in requests]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Return the log-likelihood of each text."""
        return [self._likelihood("", request.args[0])[0] for request in requests]

    def text_tokens(self, text: str) -> int:
        """Return the number of characters: each is one token here."""
        return len(text)

    def describe(self) -> dict[str, Any]:
        """Return the engine's name and version."""
        return {"engine": "lm-eval", "version": metadata.version("lm_eval"), "scripted": True}

    def _likelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        if not context:
            known = self.answer(continuation) == continuation
            return -len(continuation) * (1.0 if known else 10.0), known
        known = self.answer(context) == continuation
        return (LIKELY if known else UNLIKELY), known


def scripted_loaded() -> Loaded:
    """Return what stands for a loaded model where no weights are needed."""
    tokenizer: Any = PlainTokenizer()
    nothing: Any = None
    return Loaded(spec=ModelSpec(name="scripted"), model=nothing, tokenizer=tokenizer, source="scripted")


def knowing(task: Task, items: Iterable[Item]) -> ScriptedModel:
    """Return a model that gives the right answer to each of the items."""
    return ScriptedModel({_prompt(task, item): _right(task, item) for item in items})


def wrong(task: Task, items: Iterable[Item]) -> ScriptedModel:
    """Return a model that is wrong about each of the items: nonsense, or the option after the right one."""
    return ScriptedModel({_prompt(task, item): _wrong(task, item) for item in items}, default=NONSENSE)


def silent() -> ScriptedModel:
    """Return a model that writes nothing and finds nothing likely."""
    return ScriptedModel({})


def _prompt(task: Task, item: Item) -> str:
    tokenizer: Any = PlainTokenizer()
    return item.question if task.card.kind is Kind.TEXT else render(tokenizer, task.prompt(item))


def _right(task: Task, item: Item) -> str:
    if task.card.kind is Kind.TEXT:
        return item.question
    if task.card.kind is Kind.CHOICE and item.gold is not None:
        return task.continuations(item)[item.gold]
    return task.target(item)


def _wrong(task: Task, item: Item) -> str:
    if task.card.kind is Kind.CHOICE and item.gold is not None:
        options = task.continuations(item)
        return options[(item.gold + 1) % len(options)]
    return NONSENSE
