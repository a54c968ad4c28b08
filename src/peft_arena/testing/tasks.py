"""Conformance of tasks: what every task must do, ours or a contributor's, checked in seconds without a model."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

from peft_arena.core.errors import UserError
from peft_arena.models.assets import Wheel, wheel_path
from peft_arena.tasks.base import Item, Kind, Message, Role, Score, Split, Task
from peft_arena.tasks.gold import gold_problem
from peft_arena.tasks.splits import normal_key

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NASTY_TEXTS = (
    "",
    " \n\t ",
    "\x00\x1b[31m",
    "\ud800 half a surrogate pair",
    "\N{ZERO WIDTH JOINER}\N{RIGHT-TO-LEFT OVERRIDE}٣٤ \N{PILE OF POO}",
    "####",
    "#### #### ,,, - . +",
    "-",
    "1e999999999 NaN inf 1_000",
    "9" * 5000,
    "9^9^9^9 = 99999999999!",
    "\\frac{1}{0} \\boxed{ \\left( $$ $",
    "[" * 3000,
    '{"a": ',
    "*" * 500 + "\n* \n- \n***\n<<>>\nP.S.",
    "word " * 2000,
    "\u0130\u0131\u00df\ufb01 \u1e9e",
)
"""Completions no model should give and every scorer must survive."""


GOLDS = 2000
"""So many right answers of each split are tried."""


def check_task(task: Task, sample: int = 40, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Check that a task keeps the contract of :class:`peft_arena.tasks.base.Task`.

    The splits its role needs are there and not empty, no content is in two splits, items and prompts are the same
    when made again, the right answer is judged right, and nasty completions are judged without an exception. Of the
    first 2,000 items of each split the answer trained on, cut at the stop strings, gets the full score; with a
    tokenizer also after it is written in tokens and cut at the limit of new tokens.

    Args:
        task: the task, with the settings to check it with.
        sample: items of each split whose prompt and scoring are checked; all are checked for content.
        tokenizer: of a model that is to answer.

    Raises:
        AssertionError: the task breaks the contract; the message says how.
    """
    _check_card(task)
    found = _splits(task)
    again = type(task)(task.config)
    for split, items in found.items():
        ids = [item.id for item in items]
        assert len(set(ids)) == len(ids), f"{task.card.name}: split {split} holds an item twice"
        assert ids == [item.id for item in again.items(split)], f"{task.card.name}: split {split} is not deterministic"
        for item in items[:sample]:
            _check_prompt(task, again, item)
            _check_scoring(task, item)
        _check_golds(task, items[:GOLDS], tokenizer)
    if task.card.role is Role.TARGET:
        for item in found["train"][:sample]:
            assert task.target(item).strip(), f"{task.card.name}: a train item has nothing to learn: {item.question!r}"
    for item in found["test"][:3]:
        _check_nasty(task, item)


def need_wheel(wheel: Wheel) -> None:
    """Skip the running test where a wheel cannot be had; on continuous integration (``CI=true``) fail instead.

    Needs pytest.
    """
    import pytest

    try:
        wheel_path(wheel)
    except UserError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"{wheel.filename} cannot be had: {error}")


def _check_card(task: Task) -> None:
    card = task.card
    for field in ("name", "title", "source", "revision", "licence", "citation", "description"):
        assert getattr(card, field).strip(), f"{card.name}: the card's {field} is empty"
    names = [metric.name for metric in card.metrics]
    assert names, f"{card.name}: the card names no metric"
    assert len(set(names)) == len(names), f"{card.name}: the card names a metric twice: {names}"
    assert card.version >= 1, f"{card.name}: versions count from 1"
    assert task.generation.max_new_tokens >= 1, f"{card.name}: no token may be generated"


def _splits(task: Task) -> dict[Split, Sequence[Item]]:
    """Return the splits the task has, after checking that they are the ones its role needs and share nothing."""
    found: dict[Split, Sequence[Item]] = {}
    for split in get_args(Split):
        try:
            found[split] = task.items(split)
        except UserError:
            needed = split == "test" or (split == "train" and task.card.role is Role.TARGET)
            assert not needed, f"{task.card.name}: a {task.card.role} task needs a split '{split}'"
    owner: dict[str, str] = {}
    for split, items in found.items():
        assert items, f"{task.card.name}: split {split} is empty"
        for item in items:
            first = owner.setdefault(_content(item), split)
            assert first == split, f"{task.card.name}: in {first} and {split}: {item.question[:100]!r}"
    return found


def _content(item: Item) -> str:
    """Return what a reader of the prompt sees of an item, in normal form."""
    shown = [item.question, sorted(item.choices), item.data.get("messages")]
    return normal_key(json.dumps(shown, ensure_ascii=False))


def _check_prompt(task: Task, again: Task, item: Item) -> None:
    prompt = task.prompt(item)
    assert prompt, f"{task.card.name}: an empty prompt"
    assert prompt == again.prompt(item), f"{task.card.name}: the prompt of an item changes"
    if not isinstance(prompt, str):
        assert all(isinstance(turn, Message) for turn in prompt), f"{task.card.name}: a turn is no Message"
        assert prompt[-1].role == "user", f"{task.card.name}: the last turn of a prompt must be the user's"


def _check_scoring(task: Task, item: Item) -> None:
    name = task.card.name
    if task.card.kind is Kind.TEXT:
        _check_score(task, item, task.score_text(item, -12.5, 5), bounded=False)
        assert task.score_text(item, 0.0, 0).value is None, f"{name}: a text without tokens must not have a value"
    elif task.card.kind is Kind.CHOICE:
        assert len(item.choices) >= 2, f"{name}: fewer than two options: {item.question!r}"
        assert item.gold in range(len(item.choices)), f"{name}: the right option is none of the options"
        texts = task.continuations(item)
        assert len(texts) == len(item.choices), f"{name}: not one continuation for each option"
        for right in (True, False):
            values = [-1.0 if (place == item.gold) == right else -1000.0 for place in range(len(texts))]
            score = task.score_choice(item, values)
            assert score.value == float(right), f"{name}: likelihoods are judged wrongly: {item.question!r}"
            _check_score(task, item, score)
    elif task.target(item):
        _check_score(task, item, task.score(item, task.target(item)))


def _check_golds(task: Task, items: Sequence[Item], tokenizer: PreTrainedTokenizerBase | None) -> None:
    lost = [(item, why) for item in items if (why := gold_problem(task, item))]
    if tokenizer is not None:
        from peft_arena.evaluate.gold import unwritten

        lost += [(found.item, found.why) for found in unwritten(task, items, tokenizer)]
    told = [f"{task.target(item)!r} cannot win: {why}" for item, why in lost[:3]]
    assert not told, f"{task.card.name}: {len(lost)} right answers: {'; '.join(told)}"


def _check_nasty(task: Task, item: Item) -> None:
    if task.card.kind is not Kind.GENERATE:
        return
    for text in NASTY_TEXTS:
        score = task.score(item, text)
        _check_score(task, item, score)
        assert score == task.score(item, text), f"{task.card.name}: two scores for {text[:40]!r}"


def _check_score(task: Task, item: Item, score: Score, bounded: bool = True) -> None:
    """Check that a score has every metric that the item has, finite, and in [0, 1] where it is a fraction."""
    name = task.card.name
    if score.value is None:
        assert score.reason, f"{name}: no value and no reason"
        return
    expected = set(task.metrics_of(item))
    assert set(score.others) == expected, f"{name}: the item has {sorted(expected)}, a score {sorted(score.others)}"
    units = {metric.name: metric.unit for metric in task.card.metrics}
    values = {task.card.headline.name: score.value, **{key: part.value for key, part in score.others.items()}}
    for metric, value in values.items():
        assert math.isfinite(value), f"{name}: {metric} is {value}"
        if bounded and units[metric] == "fraction":
            assert 0.0 <= value <= 1.0, f"{name}: {metric} is {value}"
    assert score.weight > 0, f"{name}: a weight of {score.weight}"
