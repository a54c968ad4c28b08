"""From the rows of the user's data to the items of each split: refused, joined, counted, and said."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from peft_arena.core.errors import UserError
from peft_arena.tasks.base import Item
from peft_arena.tasks.custom_config import LIKELIHOOD, Columns, CustomConfig
from peft_arena.tasks.data_files import RowError, Rows
from peft_arena.tasks.data_forms import recognise, unused
from peft_arena.tasks.data_rows import Placed, item_of, shown_as
from peft_arena.tasks.own_scorer import is_own
from peft_arena.tasks.splits import cut_by_share, near_key, normal_key, same_text, with_groups

Progress = Callable[[int, int], object]
"""Called with the number of rows read and how many there are."""
REPORT_EVERY = 500
TRAIN = "train"


class Lost(NamedTuple):
    """An item that its own answer does not win."""

    place: str
    answer: str
    why: str

    def __str__(self) -> str:
        """Say where the item is and why."""
        return f"{self.place}: its own answer {self.answer[:60]!r} cannot win: {self.why}"


@dataclass
class CustomItems:
    """The items of each split, where each was read from, and what was found on the way."""

    columns: Mapping[str, str]
    """Use to column."""
    form: str = ""
    """What the columns were recognised as; empty where the user named them."""
    parts: dict[str, tuple[Item, ...]] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    """Id of an item to file and row."""
    rows: int = 0
    unread: list[tuple[str, RowError]] = field(default_factory=list)
    """Rows that cannot be used, and why."""
    unused: Sequence[str] = ()
    """Columns that nothing is read from."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Parts of rows that no text model is shown."""
    duplicates: int = 0
    """Rows left out because another has the same prompt and answer."""
    several: list[tuple[str, str]] = field(default_factory=list)
    """Places of two different answers, for each prompt that has more than one."""
    unfit: str = ""
    """Why the data as a whole cannot be used; empty if it can."""
    near: int = 0
    """Prompts that differ from another only in case, spaces, accents, quotation marks and signs that end words."""
    near_across: int = 0
    """Those of them whose like stands in another split."""
    lost: dict[str, list[Lost]] = field(default_factory=dict)
    """Items that their own answer does not win, by scorer; without those that were not tried yet."""

    @property
    def held(self) -> int:
        """Number of items."""
        return sum(map(len, self.parts.values()))

    def notes(self, asks_for_options: bool) -> list[str]:
        """Return what a reader should know of the data, a sentence each."""
        found = [f"read as {self.form}"] if self.form else []
        if self.unused and self.form:
            found.append(f"columns that are not used: {', '.join(self.unused)}")
        if self.left_out:
            listed = ", ".join(f"{count:,} {what}" for what, count in sorted(self.left_out.items()))
            found.append(f"left out of the rows: {listed}")
        if self.unread:
            place, error = self.unread[0]
            found.append(f"{_count(len(self.unread), 'row')} left out that cannot be used, the first {place}: {error}")
        if self.duplicates:
            found.append(f"{_count(self.duplicates, 'row')} left out with the prompt and answer of another row")
        if self.several:
            first, second = self.several[0]
            kept = "each is asked with its own" if asks_for_options else "any of them is accepted"
            found.append(
                f"{_count(len(self.several), 'prompt')} with different answers, the first in {first} and {second}: "
                f"{kept}; where they contradict each other, mend the file"
            )
        if self.near:
            across = f", {self.near_across:,} of them in different splits" if self.near_across else ""
            found.append(
                f"{_count(self.near, 'prompt')} that only letter case, spaces, accents, quotation marks or signs at "
                f"the end of words set apart from another{across}"
            )
        return found


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def columns_of(settings: CustomConfig, sources: Iterable[Rows]) -> tuple[Mapping[str, str], str]:
    """Return the columns and what they were recognised as; the user's own where they are named.

    Raises:
        UserError: no form fits, the sources have different ones, or the form does not go with the scorer.
    """
    sources = list(sources)
    if settings.columns is not None:
        return settings.columns.named(), _form_of(settings.columns, sources)
    found = {recognised.title: recognised for recognised in map(recognise, sources)}
    if len(found) > 1:
        raise UserError(f"the files have different forms: {'; '.join(found)}; name the columns")
    ((title, recognised),) = found.items()
    columns = Columns(**recognised.columns)
    if why := settings.columns_problem(columns):
        raise UserError(f"{why}; the data was read as {title}")
    return columns.named(), title


def _form_of(columns: Columns, sources: Sequence[Rows]) -> str:
    """Return the form whose columns were named, as if it had been recognised; empty if there is none."""
    try:
        forms = [recognise(rows) for rows in sources]
    except UserError:
        return ""
    return forms[0].title if all(form.columns == columns.named() for form in forms) else ""


def read_items(
    settings: CustomConfig,
    sources: Mapping[str, Rows],
    join: Callable[[str, str], str],
    progress: Progress | None = None,
) -> CustomItems:
    """Make the items of each split.

    Args:
        settings: the task's.
        sources: split to rows; under the empty name the rows that are yet to be divided.
        join: from prompt and answer to the answer as it follows the prompt.
        progress: told how many rows are read.

    Raises:
        UserError: the rows cannot be used; the message names file and row.
    """
    columns, form = columns_of(settings, sources.values())
    found = CustomItems(columns, form)
    total = sum(len(rows.rows) for rows in sources.values())
    placed: dict[str, list[Placed]] = {}
    optional = {use: column for use, column in columns.items() if use in {"input", "system"}}
    for name, rows in sources.items():
        placed[name] = []
        for row, place in rows.numbered([column for use, column in columns.items() if use not in optional]):
            found.rows += 1
            try:
                if isinstance(row, RowError):
                    raise row
                made = item_of({**dict.fromkeys(optional.values()), **row}, columns, place, join)
                placed[name].append(_with_row(made, row) if is_own(settings.scorer) else made)
            except RowError as error:
                found.unread.append((place, error))
            if progress is not None and (found.rows % REPORT_EVERY == 0 or found.rows == total):
                progress(found.rows, total)
    found.unused = unused([row for rows in sources.values() for row in rows.rows[:REPORT_EVERY]], columns)
    for rows_of in placed.values():
        for one in rows_of:
            found.left_out.update(one.left_out)
    found.parts = _divided(settings, placed, found)
    _count_near(found, placed)
    return found


def _with_row(made: Placed, row: Mapping[str, Any]) -> Placed:
    """Keep the whole row for a scorer of the user's own."""
    plain = json.loads(json.dumps(row, ensure_ascii=False, default=str), parse_constant=str)
    item = replace(made.keyed.item, data={**made.keyed.item.data, "row": plain})
    return made._replace(keyed=made.keyed._replace(item=item))


def _divided(
    settings: CustomConfig, placed: Mapping[str, list[Placed]], found: CustomItems
) -> dict[str, tuple[Item, ...]]:
    """Return the items of each split: each row once, all accepted answers of a prompt with each of its items.

    Training has an item for every answer; elsewhere a prompt is asked once.
    """
    kept = {name: _once(rows, found) for name, rows in placed.items()}
    joins = settings.scorer != LIKELIHOOD and not is_own(settings.scorer)
    if "group" not in found.columns:
        kept = _with_continuations(kept)
    every = [row for rows in kept.values() for row in rows]
    shares = settings.shares
    if shares is not None:
        refuse_two_groups(every)
    else:
        refuse_overlap(kept)
    answers = _answers(every, found)
    if joins:
        kept = {name: [_accepting(row, answers[row.same]) for row in rows] for name, rows in kept.items()}
        every = [row for rows in kept.values() for row in rows]
    first: set[str] = set()
    asked: set[str] = set()
    for row in every:
        found.places.setdefault(row.keyed.item.id, row.place)
        if (prompt := row.same) not in asked:
            asked.add(prompt)
            first.add(row.keyed.item.id)
    if shares is not None:
        parts = cut_by_share([row.keyed for row in every], shares)
    else:
        parts = {name: with_groups(row.keyed for row in rows) for name, rows in kept.items()}
    if joins:
        parts = {
            name: items if name == TRAIN else tuple(item for item in items if item.id in first)
            for name, items in parts.items()
        }
    empty = [name for name, items in parts.items() if not items]
    if empty:
        keys = {normal_key(row.keyed.key) for row in every}
        what = "group" if "group" in found.columns else "prompt"
        unread = f" and {_count(len(found.unread), 'row')} that cannot be used" if found.unread else ""
        found.unfit = (
            f"nothing is left for {', '.join(empty)}: {_count(found.rows, 'row')} hold only "
            f"{_count(len(keys), f'different {what}')}{unread}"
        )
    return parts


def _once(rows: Sequence[Placed], found: CustomItems) -> list[Placed]:
    """Return the rows without those whose prompt and answer another has already."""
    seen: set[tuple[object, ...]] = set()
    kept = []
    for row in rows:
        item = row.keyed.item
        whole = json.dumps(item.data["row"], sort_keys=True) if "row" in item.data else ""
        accepted = tuple(map(same_text, item.data.get("accepted", ())))
        key = (row.same, same_text(item.answer), item.choices, item.gold, accepted, whole)
        if key in seen:
            found.duplicates += 1
        else:
            seen.add(key)
            kept.append(row)
    return kept


def _with_continuations(kept: Mapping[str, list[Placed]]) -> dict[str, list[Placed]]:
    """Give a chat and those that go on from its answer one key: exports hold a conversation once for each answer.

    The words of the shorter one, its gold answer included, stand in the prompt of the longer.
    """
    every = [row for rows in kept.values() for row in rows]
    if not any(turn["role"] == "assistant" for row in every for turn in row.keyed.item.data.get("messages", ())):
        return dict(kept)
    ends: dict[str, str] = {}
    for row in (row for row in every if row.keyed.item.answer):
        turns = row.keyed.item.data.get("messages") or [{"role": "user", "content": row.keyed.item.question}]
        ends[_words([*turns, {"role": "assistant", "content": row.keyed.item.answer}])] = row.normal
    roots: dict[str, str] = {}

    def root(key: str) -> str:
        while (above := roots.get(key, key)) != key:
            key = above
        return key

    for row in every:
        turns = row.keyed.item.data.get("messages", ())
        for size in (place + 1 for place, turn in enumerate(turns) if turn["role"] == "assistant"):
            if (shorter := ends.get(_words(turns[:size]))) is not None:
                low, high = sorted((root(shorter), root(row.normal)))
                roots[high] = low
    return {
        name: [row._replace(keyed=row.keyed._replace(key=root(row.normal))) for row in rows]
        for name, rows in kept.items()
    }


def _words(turns: Sequence[Mapping[str, str]]) -> str:
    return normal_key(shown_as(turns))


def _answers(rows: Sequence[Placed], found: CustomItems) -> dict[str, dict[str, str]]:
    """Return the accepted answers of each prompt, by the form in which they are compared; several are noted."""
    answers: dict[str, dict[str, str]] = {}
    places: dict[str, str] = {}
    told: set[str] = set()
    for row in rows:
        prompt, item = row.same, row.keyed.item
        if item.choices:
            prompt = f"{prompt}\n{json.dumps(sorted(item.choices))}"
        own = [item.choices[item.gold or 0]] if item.choices else _accepted(item)
        held = answers.setdefault(prompt, {})
        if held and not any(same_text(text) in held for text in own) and prompt not in told:
            told.add(prompt)
            found.several.append((places[prompt], row.place))
        places.setdefault(prompt, row.place)
        for text in own:
            held.setdefault(same_text(text), text)
    return answers


def _accepted(item: Item) -> list[str]:
    if "accepted" in item.data:
        return list(item.data["accepted"])
    return [item.data["answer"]] if "answer" in item.data else []


def _accepting(row: Placed, answers: Mapping[str, str]) -> Placed:
    """Return a row that accepts all answers of its prompt, its own first."""
    item = row.keyed.item
    if len(answers) < 2:
        return row
    own = _accepted(item)
    held = {same_text(text) for text in own}
    accepted = [*own, *(text for key, text in answers.items() if key not in held)]
    data = {**item.data, "accepted": accepted}
    return row._replace(keyed=row.keyed._replace(item=replace(item, data=data)))


def _count_near(found: CustomItems, placed: Mapping[str, list[Placed]]) -> None:
    """Count the prompts that have a near duplicate, and those that have it in another split."""
    split_of = {id_: name for name, items in found.parts.items() for id_ in (item.id for item in items)}
    first_at = {place: id_ for id_, place in found.places.items()}
    alike: dict[str, dict[str, str]] = {}
    for rows in placed.values():
        for row in rows:
            split = split_of.get(first_at.get(row.place, ""), "")
            alike.setdefault(near_key(row.normal), {}).setdefault(row.same, split)
    for different in alike.values():
        if len(different) > 1:
            found.near += len(different)
            found.near_across += len(different) if len(set(different.values()) - {""}) > 1 else 0


def refuse_two_groups(rows: Iterable[Placed]) -> None:
    """Refuse a prompt that stands in two groups, since it might then be in two splits.

    Raises:
        UserError: there is such a prompt; the message says where.
    """
    seen: dict[str, tuple[str, str]] = {}
    for row in rows:
        group, first = seen.setdefault(row.normal, (normal_key(row.keyed.key), row.place))
        if group != normal_key(row.keyed.key):
            raise UserError(
                f"{row.place}: the prompt also stands in {first} with another group; rows with one prompt need one "
                f"group, got {row.keyed.key!r} and {group!r}"
            )


def refuse_overlap(parts: Mapping[str, Sequence[Placed]]) -> None:
    """Refuse splits that share a prompt in its canonical form (:func:`peft_arena.tasks.splits.normal_key`).

    A chat and one that goes on from its answer share one.

    Raises:
        UserError: a prompt is in two splits; the message says where the first stands and how many there are.
    """
    seen: dict[str, tuple[str, str]] = {}
    shared: dict[str, str] = {}
    for split, rows in parts.items():
        for row in rows:
            key = row.normal if row.keyed.item.group else row.keyed.key
            owner, first = seen.setdefault(key, (split, row.place))
            if owner != split:
                shared.setdefault(key, f"{owner} ({first}) and {split} ({row.place})")
    if shared:
        key, places = next(iter(shared.items()))
        raise UserError(f"splits overlap: {len(shared)} prompts are in two, the first in {places}: {key[:80]!r}")
