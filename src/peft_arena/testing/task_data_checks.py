"""Checks of a task's card and items: what is there, in which order, and what is there twice."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from typing import cast

from peft_arena.core.errors import UserError
from peft_arena.tasks.base import FRACTION, Item, Kind, Role, Split
from peft_arena.tasks.splits import near_key, normal_key
from peft_arena.testing.task_trial import NotTestedError, TaskTrial, all_items, flat, random_state

NO_SPLIT = cast(Split, "no such split")
_WORDS = re.compile(r"\w+|[^\w\s]")
SAME_ANSWER = 0.95
"""Of the sets of words that are asked in several orders, so many must have one answer for order to play no part."""
NEAR_SHARE = 0.2
"""Share of the test items that may be asked in nearly the same words in another split."""


def check_card(trial: TaskTrial) -> None:
    """The card is complete, and its numbers can be."""
    task, card = trial.task, trial.task.card
    for field in ("name", "title", "source", "revision", "licence", "citation", "description"):
        assert getattr(card, field).strip(), f"the card's {field} is empty"
    names = [metric.name for metric in card.metrics]
    assert names, "the card names no metric"
    assert len(set(names)) == len(names), f"the card names a metric twice: {names}"
    assert card.version >= 1, "versions count from 1"
    if card.chance is not None:
        allowed = card.headline.unit != FRACTION or 0.0 <= card.chance <= 1.0
        assert allowed and math.isfinite(card.chance), f"chance is {card.chance}"
    assert task.generation.max_new_tokens >= 1, "no token may be generated"
    assert all(task.generation.stop), "a stop string is empty"


def check_splits(trial: TaskTrial) -> None:
    """The splits that the role needs are there, and another one is an unknown split."""
    for split, items in trial.found.items():
        assert items, f"split {split} is empty"
    try:
        trial.task.items(NO_SPLIT)
    except UserError:
        return
    except Exception as error:
        raise AssertionError(f"a split that is not there ends in {type(error).__name__}, not in a UserError") from error
    raise AssertionError(f"it gives items of a split '{NO_SPLIT}': does the loader look at the split?")


def check_items(trial: TaskTrial) -> None:
    """Items hold text and JSON values, and training items something to learn."""
    for split, item in all_items(trial.found):
        where = f"an item of {split}"
        assert isinstance(item, Item), f"{where} is a {type(item).__name__}"
        for field in ("question", "answer", "group"):
            value = getattr(item, field)
            assert isinstance(value, str), f"{where} has a {field} that is no text: {value!r}"
        assert isinstance(item.choices, tuple), f"{where} has choices that are no tuple: {item.choices!r}"
        assert all(isinstance(one, str) for one in item.choices), f"{where} has choices that are no text"
        assert item.gold is None or type(item.gold) is int, (
            f"{where} has a right choice that is no place: {item.gold!r}"
        )
        target = trial.task.target(item)
        assert isinstance(target, str), f"{where} has a target that is no text: {target!r}"
        if split == "train" and trial.task.card.role is Role.TARGET:
            assert target.strip(), f"a train item has nothing to learn: {item.question!r}"
        try:
            json.dumps(dict(item.data), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise AssertionError(f"{where} has data that are no JSON values: {error}") from error
        if trial.task.card.kind is Kind.TEXT:
            assert item.question.strip(), f"{where} is an empty text"


def check_order(trial: TaskTrial) -> None:
    """Items and their order are the same when loaded again, whatever the caller or a random state did before."""
    for split, items in trial.found.items():
        ids = [item.id for item in items]
        with random_state(20261130):
            again = trial.again.items(split)
        assert ids == [item.id for item in again], f"split {split} is not deterministic"
        if isinstance(again, list):
            again.reverse()
            assert ids == [item.id for item in trial.again.items(split)], (
                f"split {split} is a list that the task keeps: whoever sorts it changes the task; give a tuple"
            )


def check_settings(trial: TaskTrial) -> None:
    """Settings that say how many items there are, or with which seed they are drawn, are obeyed."""
    config = trial.task.config
    fields = set(type(config).model_fields)
    tried = False
    for split, items in trial.found.items():
        wanted = getattr(config, f"{split}_items", None)
        if isinstance(wanted, int):
            tried = True
            assert len(items) == wanted, f"split {split} has {len(items)} items and {split}_items is {wanted}"
    if "seed" in fields and isinstance(config.seed, int):  # type: ignore[attr-defined]
        tried = True
        other = type(trial.task)(config.model_copy(update={"seed": config.seed + 1}))  # type: ignore[attr-defined]
        same = [split for split, items in trial.found.items() if [one.id for one in other.items(split)] == _ids(items)]
        assert len(same) < len(trial.found), "another seed gives the same items"
    if not tried:
        raise NotTestedError("no setting says how many items there are or how they are drawn")


def check_overlap(trial: TaskTrial) -> None:
    """No content and no prompt is in two splits, and few questions are in nearly the same words."""
    owner: dict[str, Split] = {}
    near: dict[str, Split] = {}
    close: Counter[Split] = Counter()
    for split, item in all_items(trial.found):
        for content in (_content(item), _asked(trial, item)):
            first = owner.setdefault(content, split)
            assert first == split, f"in {first} and {split}: {item.question[:100]!r}"
        first = near.setdefault(near_key(flat(trial.task.prompt(item))), split)
        close[split] += first != split and not item.choices
    for split, count in close.items():
        assert count <= NEAR_SHARE * len(trial.found[split]), (
            f"{count} of {len(trial.found[split])} items of {split} are in another split in nearly the same words"
        )


def check_reordered(trial: TaskTrial) -> None:
    """Few test items are those of another split with their words in another order, where order plays no part."""
    answers: dict[str, list[str]] = defaultdict(list)
    splits: dict[str, set[Split]] = defaultdict(set)
    asked: list[tuple[Split, str]] = []
    for split, item in all_items(trial.found):
        target = trial.task.target(item).strip()
        if target and not item.choices:
            key = " ".join(sorted(_WORDS.findall(near_key(flat(trial.task.prompt(item))))))
            answers[key].append(target)
            splits[key].add(split)
            asked.append((split, key))
    if not asked:
        raise NotTestedError("the items have no answer of their own")
    shared = [held for held in answers.values() if len(held) > 1]
    alike = sum(len(set(held)) == 1 for held in shared)
    if alike < SAME_ANSWER * len(shared):
        return  # the order of words decides the answer
    for split in trial.found:
        keys = [key for one, key in asked if one == split]
        count = sum(len(splits[key]) > 1 for key in keys) if split != "train" else 0
        assert count <= NEAR_SHARE * len(keys), (
            f"{count} of {len(keys)} items of {split} are in another split with their words in another order"
        )


def check_duplicates(trial: TaskTrial) -> None:
    """No item is in a split twice; those that ask the same are marked as one group."""
    for split, items in trial.found.items():
        ids = _ids(items)
        assert len(set(ids)) == len(ids), f"split {split} holds an item twice"
        seen: dict[str, list[Item]] = defaultdict(list)
        for item in items:
            seen[_asked(trial, item)].append(item)
        for same in seen.values():
            alone = [item for item in same if not item.group]
            assert len(same) < 2 or not alone, (
                f"split {split} asks the same {len(same)} times, and not as one group: {same[0].question[:100]!r}"
            )


def _ids(items: tuple[Item, ...]) -> list[str]:
    return [item.id for item in items]


def _content(item: Item) -> str:
    """Return what a reader of the prompt sees of an item, in normal form."""
    held = [item.question, sorted(item.choices), item.data.get("messages")]
    return normal_key(json.dumps(held, ensure_ascii=False))


def _asked(trial: TaskTrial, item: Item) -> str:
    """Return what a model is given of an item, prompt and options, in normal form."""
    options = trial.task.continuations(item) if trial.task.card.kind is Kind.CHOICE else ()
    return normal_key("\n".join((flat(trial.task.prompt(item)), *sorted(options))))
