"""Checks of what a model is shown: the item's question, whole and once, without what gives the answer away."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise

from peft_arena.tasks.base import Item, Kind, Message
from peft_arena.tasks.splits import normal_key
from peft_arena.testing.task_trial import (
    ALL,
    POOL,
    TURN,
    NotTestedError,
    TaskTrial,
    enough,
    flat,
    holds,
    random_state,
    spread,
)

WORDS = re.compile(r"\w+|[^\w\s]")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LEAST_QUESTION = 20
"""Characters of a question that is looked for in other prompts: shorter ones are in them by chance."""
LEAKED = 300
"""Items whose prompts are searched for their answers."""
LOOKED = 30
"""So many places of an answer in its prompt are looked at."""
SHORTEST_QUESTION = 5
"""Characters of a question that is looked for where its answer follows, or where the prompt's own is not there."""
START, END = "\x03", "\x04"
LONGEST_CYCLE = 8
"""Items, and numbers, after which the place of the right option may be seen to come again."""
_DIGITS = re.compile(r"[0-9]{1,15}")
_OPTION = re.compile(r"^\s*[(\[]?([A-Z])[)\].:]\s*(.*?)\s*$", re.MULTILINE)


def check_prompts(trial: TaskTrial) -> None:
    """Prompts are made of their item only, are not empty, end as an answer can follow, and differ."""
    task = trial.task
    asked = [item for items in trial.found.values() for item in items[: trial.sample]]
    with random_state(3):
        prompts = [task.prompt(item) for item in asked]
    with random_state(4):
        back = [task.prompt(item) for item in reversed(asked)]
        other = [trial.again.prompt(item) for item in reversed(asked)]
    for prompt, again, anew in zip(prompts, reversed(back), reversed(other), strict=True):
        assert prompt, "an empty prompt"
        assert prompt == again == anew, f"the prompt of an item changes: {flat(prompt)[:60]!r}, {flat(again)[:60]!r}"
        if isinstance(prompt, str):
            _plain(trial, prompt)
        else:
            _turns(prompt)
    test = trial.found["test"]
    different = len({flat(task.prompt(item)) for item in test})
    questions = len({(normal_key(item.question), item.choices, str(item.data.get("messages"))) for item in test})
    if questions > 1:
        assert different > 1, f"one prompt for all of {questions} questions"
        assert different * 2 >= questions or task.card.kind is Kind.CHOICE, (
            f"{questions} questions have {different} prompts: does the prompt show the question?"
        )


def _plain(trial: TaskTrial, prompt: str) -> None:
    assert prompt.strip(), "a prompt of white space"
    if trial.task.card.kind is not Kind.TEXT:
        assert prompt[-1] not in " \t", (
            f"a plain prompt ends with a space, where models put it before the answer: {prompt[-40:]!r}"
        )


def _turns(prompt: Sequence[Message]) -> None:
    assert all(isinstance(turn, Message) for turn in prompt), "a turn is no Message"
    assert prompt[-1].role == "user", "the last turn of a prompt must be the user's"
    assert all(turn.role != "system" for turn in prompt[1:]), "a system turn is not the first"
    assert prompt[-1].content.strip(), "the last turn of a prompt is empty"


def check_shots(trial: TaskTrial) -> None:
    """The question is in its prompt once, and no other test question is shown with it."""
    task, test = trial.task, trial.found["test"]
    if task.card.kind is Kind.TEXT:
        raise NotTestedError("a text is shown by itself")
    long = {item.question.strip() for item in test if len(item.question.strip()) >= LEAST_QUESTION}
    repeated, others = [], []
    sample = spread(test, trial.sample)
    solved = _solved(trial)
    for item in sample:
        prompt, own = task.prompt(item), item.question.strip()
        if not isinstance(prompt, str):
            asked = [turn.content for turn in prompt if turn.role == "user"]
            repeated += [own] if asked[-1] in asked[:-1] else []
        text = flat(prompt)
        if own in long and text.count(own) > 1:
            repeated.append(own)
        shown = _shown_solved(trial, text, solved)
        repeated += [own] if own in shown and text.count(own) > 1 and own not in repeated else []
        rest = text.replace(own, "") if own else text
        others += [own] if shown - {own} or any(one in rest for one in long if one not in own) else []
    assert not repeated, f"{len(repeated)} prompts hold their own question twice: {_first(repeated)}"
    assert len(others) * 5 <= len(sample), f"{len(others)} prompts show other questions of the test split"


def _solved(trial: TaskTrial) -> dict[str, re.Pattern[str]]:
    """Return, by short question of the test split, what finds it with its answer right behind it."""
    found = {}
    for item in trial.found["test"]:
        own, answer = item.question.strip(), trial.task.target(item).strip() if not item.choices else ""
        if SHORTEST_QUESTION <= len(own) < LEAST_QUESTION and answer and answer not in own:
            before, behind = _whole(own).pattern, _whole(answer).pattern
            found[own] = re.compile(rf"{before}\W*(?:\w+\W+){{0,2}}{behind}")
    return found


def _shown_solved(trial: TaskTrial, text: str, solved: Mapping[str, re.Pattern[str]]) -> set[str]:
    """Return the short test questions that a prompt shows with their answers, not as parts of a training question."""
    shown = {question for question, pattern in solved.items() if question in text and pattern.search(text)}
    longer = [item.question for item in trial.found.get("train", ()) if shown and item.question in text]
    return {question for question in shown if not any(question in one for one in longer)}


def check_asked(trial: TaskTrial) -> None:
    """A prompt asks the question of its item, not that of another; where its words are others, that is not tested."""
    if trial.task.card.kind is Kind.TEXT:
        raise NotTestedError("a text is shown by itself")
    sample = spread(trial.found["test"], trial.sample)
    questions = {text for item in trial.found["test"] if len(text := normal_key(item.question)) >= SHORTEST_QUESTION}
    prompts = [(normal_key(item.question), normal_key(flat(trial.task.prompt(item)))) for item in sample]
    absent = [(own, text) for own, text in prompts if not own or own not in text]
    wrong = [own for own, text in absent if own and any(_holds(text, one) for one in questions if one != own)]
    assert len(wrong) * 2 <= len(sample), (
        f"{len(wrong)} of {len(sample)} prompts ask the question of another item instead of their own: {_first(wrong)}"
    )
    assert not 0 < len(absent) * 2 <= len(sample), (
        f"{len(absent)} of {len(sample)} prompts do not hold their question, which the others do word for word: "
        f"{_first([own for own, _ in absent])}"
    )
    if absent:
        raise NotTestedError(
            f"{len(absent)} of {len(sample)} prompts do not hold their question word for word: whether they ask what "
            "the answer is right for cannot be seen"
        )


def _holds(text: str, question: str) -> bool:
    return question in text and _whole(question).search(text) is not None


def _first(texts: Sequence[str]) -> str:
    """Return the first text for a message."""
    return repr(texts[0][:100])


def check_answer_in_prompt(trial: TaskTrial) -> None:
    """The right answer cannot be read off the prompt at a fixed place or behind fixed words."""
    task = trial.task
    if task.card.kind is Kind.TEXT:
        raise NotTestedError("a text has no answer")
    items = spread(trial.pool, LEAKED)
    enough(len(items))
    secrets = [_secrets(trial, item) for item in items]
    texts = [flat(task.prompt(item)).casefold() for item in items]
    tried = 0
    for kind in sorted({kind for held in secrets for kind in held}):
        pairs = [(text, held[kind]) for text, held in zip(texts, secrets, strict=True) if kind in held]
        if len({secret for _, secret in pairs}) < 2:
            continue  # the same for all: that is what a constant guess finds
        tried += 1
        if found := _place_of_answer(pairs):
            raise AssertionError(f"the prompt gives {kind} away: {found}")
    if task.card.kind is Kind.CHOICE and not _fixed(items):
        alone = [_only_gold_shown(item, text) for item, text in zip(items, texts, strict=True)]
        assert not holds(sum(alone), len(alone)), "of the options only the right one is in the prompt"
        tried += 1
    if not tried:
        raise NotTestedError("all items have the same answer, or none of their own")


def _secrets(trial: TaskTrial, item: Item) -> Mapping[str, str]:
    """Return what must not be read off a prompt, by what it is."""
    found: dict[str, str] = {}
    if target := trial.task.target(item).strip():
        found["the answer"] = target
    if trial.task.card.kind is Kind.GENERATE and target:
        lines = [line.strip() for line in target.splitlines() if line.strip()]
        found["the end of the answer"] = lines[-1].rpartition("####")[2].strip() or lines[-1]
    if item.gold is not None and item.gold in range(len(item.choices)):
        found["the right option"] = item.choices[item.gold].strip()
        found["the place of the right option"] = str(item.gold)
        found["the number of the right option"] = str(item.gold + 1)
        found["the letter of the right option"] = LETTERS[item.gold % 26]
    return {kind: secret.casefold() for kind, secret in found.items() if secret}


def _place_of_answer(pairs: Sequence[tuple[str, str]]) -> str:
    """Say by which words in nearly all prompts the answer is found; empty where there are none."""
    counts: Counter[tuple[bool, tuple[str, ...]]] = Counter()
    for text, secret in pairs:
        counts.update(set(_contexts(text, secret)))
    for (before, words), hits in counts.most_common():
        if not holds(hits, len(pairs)):
            break
        for last in (False, True):
            right = sum(_read(text, words, before, last, secret) for text, secret in pairs)
            if holds(right, len(pairs)):
                told = " ".join(words).replace(START, "the start").replace(END, "the end").replace(TURN, "a turn")
                return f"in {right} of {len(pairs)} prompts it stands {'behind' if before else 'before'} {told!r}"
    return ""


def _contexts(text: str, secret: str) -> Iterator[tuple[bool, tuple[str, ...]]]:
    """Yield the one and the two words before (True) and behind (False) each place of an answer in a text."""
    for found in list(_whole(secret).finditer(text))[:LOOKED]:
        before = [START, START, *_words(text[max(0, found.start() - 80) : found.start()])]
        behind = [*_words(text[found.end() : found.end() + 80]), END, END]
        for count in (1, 2):
            yield True, tuple(before[-count:])
            yield False, tuple(behind[:count])


def _read(text: str, words: tuple[str, ...], before: bool, last: bool, secret: str) -> bool:
    """Say whether the first or last place of some words in a text has the answer beside it."""
    joined = r"\s*".join(_edge(word) for word in words)
    places = list(re.finditer(joined, text))
    if not places:
        return False
    place = places[-1 if last else 0]
    if before:
        return _whole(secret).match(text, place.end() + len(_blank(text[place.end() :]))) is not None
    held = text[: place.start()].rstrip()
    return held.endswith(secret) and _whole(secret).match(text, len(held) - len(secret)) is not None


def _blank(text: str) -> str:
    return text[: len(text) - len(text.lstrip())]


def _edge(word: str) -> str:
    if word == START:
        return r"\A"
    return r"\Z" if word == END else rf"(?<!\w){re.escape(word)}(?!\w)" if word[0].isalnum() else re.escape(word)


def _words(text: str) -> list[str]:
    return WORDS.findall(text)


def _whole(secret: str) -> re.Pattern[str]:
    left = r"(?<!\w)" if secret[0].isalnum() else ""
    right = r"(?!\w)" if secret[-1].isalnum() else ""
    return re.compile(left + re.escape(secret) + right)


def _only_gold_shown(item: Item, text: str) -> bool:
    shown = [place for place, one in enumerate(item.choices) if _whole(one.strip().casefold() or " ").search(text)]
    return shown == [item.gold]


def check_gold_marks(trial: TaskTrial) -> None:
    """The right option is not always at one place, of one rank by length or number, or the only one with some mark."""
    sets = [found for item in trial.pool if (found := _options(trial, item)) is not None]
    if not sets:
        raise NotTestedError("no item has options")
    enough(len(sets), "items with options")
    for place in (*range(max(len(options) for options, _ in sets)), -1):
        hits = sum(gold == (place if place >= 0 else len(options) - 1) for options, gold in sets)
        told = f"number {place + 1}" if place >= 0 else "the last"
        assert not holds(hits, len(sets)), f"the right option is {told} in {hits} of {len(sets)} items"
    if len({tuple(sorted(options)) for options, _ in sets}) > 1:
        _check_marks(sets)
    golds = [gold for options, gold in (_options(trial, item) or ((), -1) for item in trial.found["test"]) if options]
    changes = sum(one != other for one, other in pairwise(golds))
    kinds = Counter(golds)
    assert not (len(golds) >= 12 and len(kinds) > 1 and min(kinds.values()) > 2 and changes == len(kinds) - 1), (
        "the test items are in the order of their right options: the first of them are no sample"
    )


def check_gold_cycle(trial: TaskTrial) -> None:
    """The place of the right option goes neither round with the items nor with a number in the prompt."""
    held = [(item, *found) for item in trial.found["test"][:POOL] if (found := _options(trial, item)) is not None]
    golds = [gold for _, _, gold in held]
    if len({tuple(sorted(options)) for _, options, _ in held}) < 2:
        raise NotTestedError("all items have the same options, or none")
    if len(golds) < ALL or len(set(golds)) < 2:
        raise NotTestedError(f"{len(golds)} test items with {len(set(golds))} places of the right option are too few")
    for length in range(2, LONGEST_CYCLE + 1):
        assert golds[length:] != golds[:-length], f"the place of the right option repeats every {length} items"
    numbers = [_DIGITS.findall(flat(trial.task.prompt(item))) for item, _, _ in held]
    if not all(numbers):
        return
    for told, place in (("first", 0), ("last", -1)):
        for length in range(2, LONGEST_CYCLE + 1):
            pairs = {(int(found[place]) % length, gold) for found, gold in zip(numbers, golds, strict=True)}
            assert len(pairs) > len({rest for rest, _ in pairs}), (
                f"the place of the right option can be read from the {told} number in the prompt, divided by {length}"
            )


def _check_marks(sets: Sequence[tuple[tuple[str, ...], int]]) -> None:
    for told, size in MEASURED.items():
        ranks: Counter[str] = Counter()
        for options, gold in sets:
            sizes = [size(option) for option in options]
            if sizes.count(sizes[gold]) == 1:
                below = sum(one < sizes[gold] for one in sizes)
                ranks[_rank(below, "smallest")] += 1
                ranks[_rank(len(sizes) - 1 - below, "largest")] += 1
        for rank, hits in ranks.items():
            assert not holds(hits, len(sets)), f"the right option has the {rank} {told} in {hits} of {len(sets)} items"
    marks: dict[tuple[str, bool], int] = defaultdict(int)
    for options, gold in sets:
        held = [_marks(option) for option in options]
        others = held[:gold] + held[gold + 1 :]
        for mark in held[gold] - set().union(*others):
            marks[mark, True] += 1
        for mark in set.intersection(*others) - held[gold]:
            marks[mark, False] += 1
    for (mark, has), hits in marks.items():
        assert not holds(hits, len(sets)), (
            f"the right option alone {'has' if has else 'lacks'} {mark} in {hits} of {len(sets)} items"
        )


def _rank(before: int, end: str) -> str:
    """Return how a rank is called, counted from one end."""
    return end if before == 0 else f"number {before + 1} from the {end}"


def _number(option: str) -> float:
    found = re.findall(r"-?\d+(?:\.\d+)?", option.replace(",", ""))
    return float(found[0]) if len(found) == 1 else 0.0


MEASURED: Mapping[str, Callable[[str], float]] = {
    "number of characters": len,
    "number of words": lambda option: len(option.split()),
    "number in it": _number,
}


def _marks(option: str) -> set[str]:
    """Return what may mark an option: its signs, its words, how it begins and ends."""
    marks = {f"the sign {sign!r}" for sign in option if not sign.isalnum() and sign != " "}
    marks |= {f"the word {word!r}" for word in _words(option.casefold()) if word.isalnum()}
    text = option.strip()
    marks |= {f"the end {text[-1:]!r}"} if text and not text[-1].isalnum() else set()
    marks |= {"a capital at the start"} if text[:1].isupper() else set()
    marks |= {"capitals only"} if text.isupper() else set()
    marks |= {"a digit"} if any(sign.isdigit() for sign in option) else set()
    marks |= {"white space around it"} if text != option else set()
    return marks | ({"two spaces in it"} if "  " in text else set())


def _options(trial: TaskTrial, item: Item) -> tuple[tuple[str, ...], int] | None:
    """Return an item's options as text and the place of the right one; those of a prompt that gives them letters."""
    if item.gold is None or len(item.choices) < 2 or item.gold not in range(len(item.choices)):
        return None
    letters = tuple(LETTERS[: len(item.choices)])
    if tuple(one.strip(" ().") for one in item.choices) != letters:
        return item.choices, item.gold
    held = dict(_OPTION.findall(flat(trial.task.prompt(item))))
    named = tuple(held.get(letter, "") for letter in letters)
    return (named if all(named) else item.choices), item.gold


def _fixed(items: Sequence[Item]) -> bool:
    """Say whether all items have the same options."""
    return len({tuple(sorted(item.choices)) for item in items}) < 2
