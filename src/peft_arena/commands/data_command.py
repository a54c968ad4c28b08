"""A look at a file of the user's own, without a study: what it is, how long, what repeats, what would be refused."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from peft_arena.core.build import build
from peft_arena.core.errors import UserError
from peft_arena.core.specs import ModelSpec
from peft_arena.models.load import load_tokenizer, resolve
from peft_arena.models.render import encode_example
from peft_arena.study.token_lengths import characters_of
from peft_arena.tasks.base import Item
from peft_arena.tasks.custom import Custom
from peft_arena.tasks.custom_config import LIKELIHOOD, CustomConfig
from peft_arena.tasks.data_files import read_rows
from peft_arena.tasks.data_forms import recognise
from peft_arena.tasks.gold import FULL
from peft_arena.tasks.scorers import FINAL_ANSWER_MARK, SCORERS, last_box

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LABELS = 50
"""Most different answers that are taken for labels."""
LABEL_CHARACTERS = 40
NUMBER_CHARACTERS = 24
LINE_CHARACTERS = 80
"""A longer answer is no short answer."""
MEASURED = 2000
"""Items whose prompts are counted in tokens, drawn at random, the same every time, where there are more."""
TRIED = 200
"""Answers that a scorer is tried on before it is suggested."""
TOKEN_STEP = 16
"""The suggested limit of new tokens is a multiple of it."""
Tell = Callable[[float, str], None]


class Lengths(NamedTuple):
    """Lengths of some texts."""

    unit: str
    median: float
    p95: float
    longest: int
    of: int
    """Texts that were measured."""


class Refused(NamedTuple):
    """Why rows would be refused."""

    reason: str
    rows: int
    first: str
    """Place of the first and what was found there."""


@dataclass(frozen=True)
class Looked:
    """What a file holds."""

    file: str
    rows: int
    form: str
    columns: Mapping[str, str]
    unused_columns: Sequence[str]
    left_out: Mapping[str, int]
    """Parts of rows that no text model is shown."""
    items: Mapping[str, int]
    """Items of each split, with the default shares."""
    duplicates: int
    near_duplicates: int
    several_answers: int
    several_first: str
    labels: Mapping[str, int]
    """Answer to count, the most frequent first; empty where there are too many different ones for labels."""
    prompts: Lengths
    answers: Lengths
    refused: Sequence[Refused]
    unfit: str
    """Why a study could not use the file as a whole; empty if it can."""
    scorer: str
    scorer_why: str
    entry: str
    """The task as it stands in a study."""

    def summary(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            **asdict(self),
            "prompts": self.prompts._asdict(),
            "answers": self.answers._asdict(),
            "refused": [one._asdict() for one in self.refused],
        }


def look_at(
    path: Path,
    model: str | None = None,
    scorer: str | None = None,
    columns: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
    tell: Tell = lambda done, what: None,
) -> Looked:
    """Look at a file.

    Args:
        path: a file that task ``custom`` reads.
        model: whose tokens lengths are counted in; None: in characters.
        scorer: what answers are tried with; None: one that fits them is suggested.
        columns: use to column; None: recognised.
        settings: further settings of the task.
        tell: told the share that is done, and what is being done.

    Raises:
        UserError: the file cannot be read, its form is not recognised, or the model or the scorer is unknown.
    """
    tokenizer = None if model is None else load_tokenizer(resolve(ModelSpec(name=model)))
    given = {"path": path, "unusable": "count", **(settings or {})} | ({"columns": dict(columns)} if columns else {})
    tell(0.0, "reading")
    asks = "choices" in (columns or recognise(read_rows(path)).columns)
    first = scorer or (LIKELIHOOD if asks else "exact_match")
    found = _custom({**given, "scorer": first}, lambda done, of: tell(0.1 + 0.4 * done / of, "reading")).found
    items = [item for part in found.parts.values() for item in part]
    chosen, why = (scorer, "as asked") if scorer else _suggested(items, asks)
    tell(0.6, "trying the answers")
    task = _custom({**given, "scorer": chosen})
    lost = [] if not task.lost else [Refused("its own answer cannot win", len(task.lost), str(task.lost[0]))]
    tell(0.7, "measuring")
    prompts, answers, limit = _lengths(task, items, tokenizer)
    if tokenizer is not None:
        tell(0.8, "writing the answers in the model's tokens")
        lost += _unwritten(_custom({"max_new_tokens": limit, **given, "scorer": chosen}), tokenizer)
    tell(1.0, "done")
    refused = [*_unread(task), *lost]
    entry = _entry(path, found.columns, chosen, None if asks else limit, sum(one.rows for one in refused))
    return Looked(
        file=str(path),
        rows=found.rows,
        form=found.form or "the columns that were named",
        columns=dict(found.columns),
        unused_columns=list(found.unused),
        left_out=dict(found.left_out),
        items={split: len(part) for split, part in found.parts.items()},
        duplicates=found.duplicates,
        near_duplicates=found.near,
        several_answers=len(found.several),
        several_first=" and ".join(found.several[0]) if found.several else "",
        labels=_labels(items),
        prompts=prompts,
        answers=answers,
        refused=refused,
        unfit=found.unfit,
        scorer=chosen,
        scorer_why=why,
        entry=entry,
    )


def _custom(settings: Mapping[str, Any], progress: Callable[[int, int], object] | None = None) -> Custom:
    return Custom(build(CustomConfig, settings, where="data"), progress, refuses=False)


def _answer(item: Item) -> str:
    return item.choices[item.gold or 0] if item.choices else str(item.data.get("answer", ""))


def _suggested(items: Sequence[Item], asks_for_options: bool) -> tuple[str, str]:
    """Return a scorer that fits the answers, and why."""
    if asks_for_options:
        return LIKELIHOOD, "the rows have options"
    answers = list(dict.fromkeys(_answer(item) for item in items))
    tried = random.Random(0).sample(answers, min(TRIED, len(answers)))
    if all(last_box(answer) is not None for answer in tried):
        return "boxed", "every answer tried has a box"
    if all(_is_number(answer) for answer in tried):
        return "numeric", "every answer tried is a number"
    if len(answers) <= LABELS and max(map(len, answers)) <= LABEL_CHARACTERS and 2 * len(answers) <= len(items):
        return "exact_match", f"the answers are {len(answers)} labels"
    if all("\n" not in answer.strip() and len(answer) <= LINE_CHARACTERS for answer in tried):
        return "normalised_match", "the answers are short texts"
    return (
        "exact_match",
        "no scorer of ours fits: the answers are long texts, which are hardly ever repeated word for word; a function "
        "of your own can judge them (scorer: my.py:function)",
    )


def _is_number(answer: str) -> bool:
    """Say whether an answer is a number, perhaps with its unit, or ends in one after the mark of a final answer."""
    short = len(answer) <= NUMBER_CHARACTERS and not answer.strip()[:1].isalpha()
    return (short or FINAL_ANSWER_MARK in answer) and SCORERS.get("numeric")([answer], answer).value == FULL


def _labels(items: Sequence[Item]) -> dict[str, int]:
    counts = Counter(_answer(item) for item in items)
    if len(counts) > LABELS or max(map(len, counts)) > LABEL_CHARACTERS or 2 * len(counts) > len(items):
        return {}
    return dict(counts.most_common())


def _lengths(
    task: Custom, items: Sequence[Item], tokenizer: PreTrainedTokenizerBase | None
) -> tuple[Lengths, Lengths, int]:
    """Return lengths of prompts and answers, and a limit of new tokens with room for the longest answer.

    They are in tokens as they are trained on, or in characters; a token holds at least one byte.
    """
    if tokenizer is None:
        texts = [_answer(item) for item in items]
        prompts = _lengths_of("characters", [characters_of(task.prompt(item)) for item in items])
        longest = max((len(text.encode()) for text in texts), default=0)
        return prompts, _lengths_of("characters", list(map(len, texts))), _limit(longest)
    drawn = items if len(items) <= MEASURED else random.Random(0).sample(list(items), MEASURED)
    asked, closings = [], []
    for item in (item for item in drawn if task.target(item)):
        try:
            encoded = encode_example(tokenizer, task.prompt(item), task.target(item))
        except UserError:
            continue  # it is among the refused
        asked.append(encoded.prompt_length)
        closings.append(len(encoded.ids) - encoded.prompt_length - _sizes([task.target(item)], tokenizer)[0])
    beyond = max(closings, default=1)
    answers = [size + beyond for size in _sizes([task.target(item) or " " for item in items], tokenizer)]
    return _lengths_of("tokens", asked), _lengths_of("tokens", answers), _limit(max(answers, default=0))


def _sizes(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of texts by themselves."""
    found: list[int] = []
    for start in range(0, len(texts), MEASURED):
        chunk = texts[start : start + MEASURED]
        found += map(len, tokenizer(list(chunk), add_special_tokens=False, verbose=False)["input_ids"])
    return found


def _lengths_of(unit: str, lengths: Sequence[int]) -> Lengths:
    ordered = sorted(lengths) or [0]
    median, high = (ordered[min(int(share * len(ordered)), len(ordered) - 1)] for share in (0.5, 0.95))
    return Lengths(unit, median, high, ordered[-1], len(lengths))


def _limit(longest: int) -> int:
    """Return a limit of new tokens that leaves room for the longest answer and its end."""
    return max(TOKEN_STEP, TOKEN_STEP * math.ceil((longest + 1) / TOKEN_STEP))


def _unread(task: Custom) -> list[Refused]:
    """Return why rows cannot be read, the most frequent reason first."""
    counts = Counter(error.what for _, error in task.found.unread)
    firsts: dict[str, str] = {}
    for place, error in task.found.unread:
        firsts.setdefault(error.what, f"{place}: {error}")
    return [Refused(reason, count, firsts[reason]) for reason, count in counts.most_common()]


def _unwritten(task: Custom, tokenizer: PreTrainedTokenizerBase) -> list[Refused]:
    """Return why items cannot be won in the model's tokens, the most frequent reason first."""
    from peft_arena.evaluate.gold import unwritten

    items = [item for part in task.found.parts.values() for item in part]
    found: dict[str, list[str]] = {}
    for item, why, _ in task.in_order(unwritten(task, items, tokenizer), key=lambda one: one.item):
        found.setdefault(why, []).append(task.place_of(item))
    ordered = sorted(found.items(), key=lambda entry: -len(entry[1]))
    return [Refused(why, len(places), places[0]) for why, places in ordered]


def _entry(path: Path, columns: Mapping[str, str], scorer: str, limit: int | None, refused: int) -> str:
    """Return the lines of a study's ``targets`` for the file."""
    named = ", ".join(f"{use}: {_yaml(column)}" for use, column in columns.items())
    lines = [
        "- task: custom",
        "  config:",
        f"    path: {_yaml(str(path))}",
        f"    columns: {{{named}}}",
        f"    scorer: {_yaml(scorer)}",
    ]
    if limit is not None:
        lines.append(f"    max_new_tokens: {limit}")
    if refused:
        lines.append(f"    # unusable: count   # instead of refusing {refused:,} row{'s' if refused > 1 else ''}")
    return "\n".join(lines)


def _yaml(text: str) -> str:
    """Return a text as YAML writes it: bare where that is safe."""
    return text if text.replace("_", "").replace(".", "").replace("/", "").isalnum() else json.dumps(text)
