"""Checks of a scorer by answers: the right one wins and can be written, wrong, empty and half ones do not."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from peft_arena.tasks.base import FRACTION, Item, Kind, Score
from peft_arena.tasks.gold import gold_problem
from peft_arena.testing.task_trial import NotTestedError, TaskTrial, judge, random_state, shown

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
    "None",
    "nan",
    "null",
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
NONSENSE = "zzz"
JUDGED_AGAIN = 5
"""Items on which the answers of all of them are judged in one order and in the other."""
GOLDS = 2000
"""So many right answers of each split are tried."""
OTHERS = 40
"""So many answers of other items are tried on an item before it is said to take every answer."""
MOST = 0.25
"""Share of the items that may take a part of their answer, as where what is left says the same."""
SHORT = 6
"""Words of an answer that is a name or a number; of longer ones, as of programs, many texts are right."""
DIGITS, WORD = 3, 24
"""No tokenizer in use writes more digits, or longer words, in one token."""
_PIECES = re.compile(r"[^\W\d_]+|\d+|_+|[^\w\s]+")


def check_golds(trial: TaskTrial) -> None:
    """The answer that is trained on gets the full score, cut at the stop strings; with a tokenizer, as its tokens."""
    held = [item for items in trial.found.values() for item in items[:GOLDS]]
    for item in held[:1]:
        if trial.task.target(item):
            _judge_if_text(trial, item)
    lost = [(item, why) for item in held if (why := _gold_problem(trial, item))]
    if trial.tokenizer is not None:
        from peft_arena.evaluate.gold import unwritten

        for items in trial.found.values():
            lost += [(found.item, found.why) for found in unwritten(trial.task, items[:GOLDS], trial.tokenizer)]
    told = [f"{trial.task.target(item)!r} cannot win: {why}" for item, why in lost[:3]]
    assert not told, f"{len(lost)} right answers: {'; '.join(told)}"
    if trial.task.card.kind is not Kind.GENERATE:
        raise NotTestedError(f"a task of kind {trial.task.card.kind} judges no text that a model writes")
    if not any(trial.task.target(item) for item in held):
        raise NotTestedError("the items have no answer of their own")


def _judge_if_text(trial: TaskTrial, item: Item) -> None:
    """Try an item's own answer, where it is a text that is judged, so that what the scorer raises is told."""
    if trial.task.card.kind is Kind.GENERATE:
        trial.score(item, trial.task.target(item))


def _gold_problem(trial: TaskTrial, item: Item) -> str:
    try:
        return gold_problem(trial.task, item)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a contributor's code raises anything
        return f"the scorer raised {type(error).__name__}: {error}"


def check_stops(trial: TaskTrial) -> None:
    """No answer that is trained on holds a stop string before its end."""
    trial.needs_text()
    held = [item for items in trial.found.values() for item in items[:GOLDS]]
    cut = []
    for item in held:
        target = trial.task.target(item)
        if trial.task.generation.cut(target).strip() != target.strip():
            cut.append(target)
    assert not cut, (
        f"a stop string is inside {len(cut)} of {len(held)} answers, so that no model writes them: {shown(cut)}"
    )
    if not trial.task.generation.stop:
        raise NotTestedError("the task has no stop string")


def check_limit(trial: TaskTrial) -> None:
    """The answers fit the limit of new tokens: with any tokenizer, by the fewest tokens that they can have."""
    trial.needs_text()
    limit = trial.task.generation.max_new_tokens
    held = [trial.task.target(item) for items in trial.found.values() for item in items[:GOLDS]]
    sizes = [(fewest_tokens(trial.task.generation.cut(target)), target) for target in held if target.strip()]
    if not sizes:
        raise NotTestedError("the items have no answer of their own")
    over = [(size, target) for size, target in sizes if size > limit]
    assert not over, (
        f"{len(over)} of {len(sizes)} answers need more than max_new_tokens {limit}, such as "
        f"{over[0][1][:60]!r} with at least {over[0][0]}"
    )


def fewest_tokens(text: str) -> int:
    """Return how many tokens a text has at least: tokenizers part words, numbers of over three digits and signs."""
    return sum(max(1, sum(map(_tokens, _PIECES.findall(word)))) for word in text.split())


def _tokens(piece: str) -> int:
    wide = DIGITS if piece[0].isdigit() else WORD
    return math.ceil(len(piece) / wide) if piece[0].isalnum() else 0


def check_scores(trial: TaskTrial) -> None:
    """A score has every metric of its item, as finite numbers, and fractions lie in [0, 1]."""
    trial.needs_text()
    for item in (item for items in trial.found.values() for item in items[: trial.sample]):
        if trial.task.target(item):
            well_formed(trial, item, trial.score(item, trial.task.target(item)))
    for item in trial.judged:
        well_formed(trial, item, trial.score(item, NONSENSE))


def check_silent(trial: TaskTrial) -> None:
    """No answer, and the form of an answer without its content, earn nothing."""
    trial.needs_text()
    formed: list[str] = []
    for item in trial.judged:
        for text in ("", " ", " \n\t "):
            value = trial.score(item, text).value
            assert not value, f"the empty answer {text!r} has the score {value} for {item.question[:60]!r}"
        if len(trial.decisive(item).split()) <= SHORT and trial.score(item, "").extracted.strip():
            raise AssertionError(f"{trial.score(item, '').extracted[:60]!r} is found in an empty answer")
        frame = _frame(trial, item)
        if frame and trial.right(item, frame):
            formed.append(frame)
    assert len(formed) <= MOST * len(trial.judged), (
        f"the form of the answer alone wins in {len(formed)} of {len(trial.judged)} items: {shown(formed)}"
    )


def _frame(trial: TaskTrial, item: Item) -> str:
    """Return an item's own answer without what is judged in it, wherever it stands; empty if nothing is left."""
    part = trial.decisive(item)
    return re.sub(rf"(?<!\w){re.escape(part)}(?!\w)", "", trial.task.target(item)).strip() if part else ""


def check_wrong(trial: TaskTrial) -> None:
    """Wrong answers lose: nonsense, and the right answers of other items."""
    trial.needs_text()
    values = {trial.score(item, text).value for item in trial.judged for text in (NONSENSE, *NASTY_TEXTS[2:12])}
    values |= {trial.score(item, target).value for item in trial.judged if (target := trial.task.target(item))}
    assert len(values - {None}) > 1 or not values - {None}, f"every answer tried has the score {values - {None}}"
    taken = [item for item in trial.judged if trial.right(item, NONSENSE)]
    assert len(taken) * 2 <= len(trial.judged), f"{NONSENSE!r} is right for {len(taken)} of {len(trial.judged)} items"
    lost = []
    for item in trial.needs_answers():
        others = _others(trial, item)
        lost += [item] if others and all(trial.score(item, other).value is None for other in others) else []
        wins = [other for other in others if trial.right(item, other)]
        if others and len(wins) == len(others):
            raise AssertionError(f"an item takes every answer: {shown(others)} for {trial.task.target(item)[:60]!r}")
    assert len(lost) * 2 <= len(trial.judged), (
        f"a wrong answer is not scored in {len(lost)} of {len(trial.judged)} items: then the mean is of right ones only"
    )


def _others(trial: TaskTrial, item: Item) -> list[str]:
    """Return answers of other items, up to the first that is wrong for this one."""
    own, found = trial.task.target(item).strip(), list[str]()
    for other in trial.found["test"]:
        text = trial.task.target(other)
        if not text.strip() or text.strip() == own or text in found:
            continue
        found.append(text)
        if len(found) >= OTHERS or not trial.right(item, text):
            break
    return found


PARTS: Mapping[str, Callable[[str], str]] = {
    "without its last sign": lambda text: text[:-1],
    "without its first sign": lambda text: text[1:],
    "its first half": lambda text: text[: len(text) // 2],
    "its last half": lambda text: text[(len(text) + 1) // 2 :],
    "its first sign": lambda text: text[:1],
    "a sign more behind": lambda text: text + ("7" if text[-1:].isdigit() else "q"),
    "a sign more in front": lambda text: ("7" if text[:1].isdigit() else "q") + text,
}
"""Answers that are nearly right, by what was done to the right one."""


def check_partial(trial: TaskTrial) -> None:
    """A part of the right answer, and the right answer inside a longer word or number, lose."""
    items = trial.needs_answers()
    tried, won = Counter[str](), dict[str, list[str]]()
    for item in items:
        whole = trial.decisive(item)
        for kind, change in PARTS.items() if len(whole.split()) <= SHORT else ():
            part = change(whole)
            if _letters(part) == _letters(whole) or not _letters(part):
                continue
            tried[kind] += 1
            alone = trial.right(item, whole) and trial.right(item, part)
            if alone or trial.right(item, trial.reworded(item, part)):
                won.setdefault(kind, []).append(f"{part[:40]} for {whole[:40]}")
    for kind, cases in won.items():
        assert len(cases) <= max(MOST * tried[kind], min(tried[kind] - 1, 1)), (
            f"the answer, {kind}, is right in {len(cases)} of {tried[kind]} items: {shown(cases)}"
        )
    if not tried:
        raise NotTestedError("the answers are single signs, or texts that many others may replace")


def _letters(text: str) -> str:
    return "".join(sign for sign in text.casefold() if sign.isalnum())


def check_listing(trial: TaskTrial) -> None:
    """An answer that names several candidates does not win, or the task says so in ``reward_caution``."""
    items = [item for item in trial.needs_answers() if len(trial.decisive(item).split()) <= SHORT]
    parts = list(dict.fromkeys(trial.decisive(item) for item in items))
    if len(parts) < 2:
        raise NotTestedError("the items tried have one answer, or texts for answers")
    for joint in (", ", " or ", " "):
        won = [item for item in items if _wins_in_any_order(trial, item, parts, joint)]
        assert len(won) * 2 <= len(items) or trial.task.reward_caution(), (
            f"an answer that lists candidates, joined by {joint!r}, wins in {len(won)} of {len(items)} items: let the "
            "scorer refuse it, or say so in reward_caution"
        )


def _wins_in_any_order(trial: TaskTrial, item: Item, parts: Sequence[str], joint: str) -> bool:
    own = trial.decisive(item)
    others = [part for part in parts if not trial.right(item, part)][:3]
    return bool(others) and all(
        trial.right(item, trial.reworded(item, joint.join((*others[:place], own, *others[place:]))))
        for place in range(len(others) + 1)
    )


def check_odd_texts(trial: TaskTrial) -> None:
    """Texts that no model should write are judged without an exception, twice the same."""
    trial.needs_text()
    for item in trial.found["test"][:3]:
        for text in NASTY_TEXTS:
            score = judge(trial.task, item, text)
            well_formed(trial, item, score)
            assert score == judge(trial.task, item, text), f"two scores for {text[:40]!r}"


def check_judge_state(trial: TaskTrial) -> None:
    """A score depends on item and answer alone: not on what was judged before, or by which instance, or on chance."""
    trial.needs_text()
    items = trial.judged[:JUDGED_AGAIN]
    texts = dict.fromkeys((*(trial.task.target(item) for item in items), NONSENSE, ""))
    pairs = [(item, text) for text in texts for item in items]
    ids = [item.id for item in items]
    with random_state(1):
        first = [judge(trial.task, item, text) for item, text in pairs]
    with random_state(2):
        back = [judge(trial.task, item, text) for item, text in reversed(pairs)]
    other = [judge(trial.again, item, text) for item, text in pairs[1::2]]
    for (item, text), one, two in zip(pairs, first, reversed(back), strict=True):
        assert one == two, f"the score of {text[:40]!r} for {item.question[:60]!r} depends on what was judged before"
    assert first[1::2] == other, "another instance of the task gives other scores"
    assert ids == [item.id for item in items], "judging changes the items"


def well_formed(trial: TaskTrial, item: Item, score: Score, bounded: bool = True) -> None:
    """Check that a score has every metric that the item has, finite, and in [0, 1] where it is a fraction."""
    task = trial.task
    assert isinstance(score.extracted, str), f"what was judged is a {type(score.extracted).__name__}, not a text"
    number(score.weight, "a weight")
    assert score.weight > 0, f"a weight of {score.weight}"
    if score.value is None:
        assert score.reason, "no value and no reason"
        return
    expected = set(task.metrics_of(item))
    assert set(score.others) == expected, f"the item has {sorted(expected)}, a score {sorted(score.others)}"
    units = {metric.name: metric.unit for metric in task.card.metrics}
    values = {task.card.headline.name: score.value, **{key: part.value for key, part in score.others.items()}}
    for metric, value in values.items():
        number(value, metric)
        if bounded and units[metric] == FRACTION:
            assert 0.0 <= value <= 1.0, f"{metric} is {value}"


def number(value: object, what: str) -> None:
    """Check that a value is a finite number, and no truth value or text."""
    assert isinstance(value, int | float) and not isinstance(value, bool), f"{what} is no number: {value!r}"
    assert math.isfinite(value), f"{what} is {value}"
