"""Checks of tasks answered by likelihood, of texts, and of what a constant guess earns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from peft_arena.tasks.base import FRACTION, Item, Kind, Score
from peft_arena.tasks.gold import FULL
from peft_arena.testing.task_answer_checks import well_formed
from peft_arena.testing.task_trial import FEWEST, NEARLY, NotTestedError, TaskTrial, judge, spread

GUESSED = 200
"""Items of the test split that a constant answer is tried on."""
PICKED = 2000
"""The same of a constant option, which takes no time."""
FEWEST_GUESSED = 20
CONSTANTS = 3
"""So many of the most frequent answers are tried as a constant."""
OVER = 0.15
"""By so much a constant may be better than the card's chance: classes are seldom of one size."""
APART = 0.05
"""By so much the card's chance may differ from that of a random option."""
LOW = -1e4
MARGIN = 0.1
"""Nats by which an option is the likeliest where it is so by little."""
LIKELIHOODS = (-0.5, -12.5, -25.0, -50.0, -100.0)
"""Of a text of five tokens: up to 20 nats per token, more than a random model loses."""
TWICE = 0.02
"""Share of the items in which the right option may be there twice, as in published data it sometimes is."""
PREFIXES = 0.5
"""Share of the items in which the right option may be the beginning of another one, or the other way around."""


def check_options(trial: TaskTrial) -> None:
    """Options are at least two, different, not empty, and the right one is one of them."""
    if trial.task.card.kind is not Kind.CHOICE:
        raise NotTestedError(f"a task of kind {trial.task.card.kind} compares no options")
    begins, twice, held = 0, 0, [item for items in trial.found.values() for item in items]
    for item in held:
        where = repr(item.question[:60])
        assert len(item.choices) >= 2, f"fewer than two options: {where}"
        assert item.gold is not None and item.gold in range(len(item.choices)), (
            f"the right option is none of the options: {where}"
        )
        texts = trial.task.continuations(item)
        assert len(texts) == len(item.choices), f"not one continuation for each option: {where}"
        assert all(text.strip() for text in texts), f"an option is empty: {where}"
        right = texts[item.gold]
        twice += sum(text.strip() == right.strip() for text in texts) > 1
        begins += any(other != right and (other.startswith(right) or right.startswith(other)) for other in texts)
        prompt = trial.task.prompt(item)
        if isinstance(prompt, str):
            assert not (prompt[-1:].isspace() and right[:1].isspace()), f"two spaces before an option: {where}"
    assert twice <= TWICE * len(held), f"in {twice} of {len(held)} items the right option is there twice"
    assert begins <= PREFIXES * len(held), (
        f"in {begins} of {len(held)} items the right option begins another one, or the other way around: the shorter "
        "always has the higher sum of log-likelihoods"
    )


def check_likelihoods(trial: TaskTrial) -> None:
    """The likeliest option is picked, by far or by little; where all are equally likely, not always the right one."""
    if trial.task.card.kind is not Kind.CHOICE:
        raise NotTestedError(f"a task of kind {trial.task.card.kind} compares no options")
    tied: list[bool] = []
    held = [item for items in trial.found.values() for item in items[: trial.sample]]
    for item in held:
        for picked in range(len(item.choices)):
            score = picking(trial, item, picked)
            well_formed(trial, item, score)
            assert score.value == float(picked == item.gold), f"likelihoods are judged wrongly: {item.question!r}"
            assert score == picking(trial, item, picked), "two scores for the same likelihoods"
        _check_margins(trial, item)
        ties = [trial.task.score_choice(item, [value] * len(item.choices)) for value in (-3.0, 0.0)]
        for score in ties:
            well_formed(trial, item, score)
        tied.append(all(score.value == FULL for score in ties))
    several = len({item.gold for item in held}) > 1
    assert not (several and len(tied) >= FEWEST and all(tied)), (
        "where all options are equally likely the right one counts as picked, wherever it stands"
    )


def _check_margins(trial: TaskTrial, item: Item) -> None:
    """Check that the right option wins by a small margin and loses by one."""
    sizes = [
        (1, len(text), len(text.strip()), len(text.encode(errors="replace")), len(text.split()))
        for text in trial.task.continuations(item)
    ]
    values = [trial.task.score_choice(item, _close(sizes, place)).value for place in range(len(sizes))]
    right = values[item.gold or 0]
    for place, value in enumerate(values):
        if place != item.gold:
            assert value != FULL and (right or 0.0) > (value or 0.0), (
                f"the right option, {MARGIN} nats {'behind' if value == FULL else 'before'} another one, has the score "
                f"{value if value == FULL else right}: {item.question[:60]!r}"
            )


def _close(sizes: Sequence[tuple[int, ...]], place: int) -> list[float]:
    """Return log-likelihoods where one option is the likeliest by little: in sum, by character, byte and word."""
    values = []
    for one in sizes:
        wider = max(own / max(best, 1) for own, best in zip(one, sizes[place], strict=True))
        values.append(-10.0 * wider - MARGIN)
    values[place] = -10.0
    return values


def picking(trial: TaskTrial, item: Item, place: int) -> Score:
    """Return the score where one option is far likelier than all others."""
    values = [-1.0 if one == place else LOW for one in range(len(item.choices))]
    return trial.task.score_choice(item, values)


def check_texts(trial: TaskTrial) -> None:
    """The score of a text is finite, follows its likelihood in the card's direction, and weighs its tokens."""
    task = trial.task
    if task.card.kind is not Kind.TEXT:
        raise NotTestedError(f"a task of kind {task.card.kind} has no texts")
    sign = 1.0 if task.card.headline.better == "lower" else -1.0
    for item in (item for items in trial.found.values() for item in items[: trial.sample]):
        near = task.score_text(item, -12.5, 5)
        scores = [task.score_text(item, likelihood, 5) for likelihood in LIKELIHOODS]
        for score in scores:
            well_formed(trial, item, score, bounded=False)
            assert score.value is not None, f"a text has no value: {score.reason}"
        for likelihood, one, other in zip(LIKELIHOODS, scores, scores[1:], strict=False):
            assert sign * ((other.value or 0.0) - (one.value or 0.0)) > 0, (
                f"a text that is less likely than {-likelihood / 5:g} nats per token is no worse"
            )
        assert near == task.score_text(item, -12.5, 5), "two scores for the same likelihood"
        assert task.score_text(item, -12.5, 10).value != near.value or task.card.headline.unit == "nats", (
            "the number of tokens plays no part"
        )
        assert task.score_text(item, 0.0, 0).value is None, "a text without tokens must not have a value"


def check_chance(trial: TaskTrial) -> None:
    """Neither a constant answer nor a random option earns much more than the card's chance."""
    card = trial.task.card
    if card.kind is Kind.TEXT or card.headline.unit != FRACTION:
        raise NotTestedError("the headline is no fraction that guessing could reach")
    answers = {target for item in trial.pool if (target := trial.task.target(item).strip())}
    assert len(answers) != 1 or len(trial.pool) < FEWEST or card.kind is not Kind.GENERATE, (
        f"all items have the same answer: {answers}"
    )
    if len(trial.found["test"]) < FEWEST_GUESSED:
        raise NotTestedError(f"{len(trial.found['test'])} test items are too few to say what a constant guess earns")
    items = spread(trial.found["test"], PICKED if card.kind is Kind.CHOICE else GUESSED)
    if card.chance is not None and card.kind is Kind.CHOICE:
        random = sum(1 / len(item.choices) for item in items) / len(items)
        assert abs(random - card.chance) <= APART, (
            f"the card's chance is {card.chance:g}, that of a random option {random:.3g}"
        )
    guesses = _picked(trial, items) if card.kind is Kind.CHOICE else _said(trial, items)
    if not guesses:
        raise NotTestedError("the items have no answer of their own")
    bound = NEARLY if card.chance is None else card.chance + OVER + 1 / len(items) ** 0.5
    for guess, earned in guesses.items():
        assert earned <= bound, (
            f"the constant answer {guess[:60]!r} earns {earned:.3g}, and the card's chance is {card.chance}"
        )


def _picked(trial: TaskTrial, items: Sequence[Item]) -> dict[str, float]:
    """Return what always picking the same place earns."""
    most = max(len(item.choices) for item in items)
    return {
        f"option {place + 1}": _mean(trial, items, [picking(trial, item, place) for item in items])
        for place in range(most)
    }


def _said(trial: TaskTrial, items: Sequence[Item]) -> dict[str, float]:
    """Return what always saying one of the most frequent answers earns."""
    counts = Counter(text for item in items if (text := trial.task.target(item)).strip())
    common = [text for text, count in counts.most_common(CONSTANTS) if count > 1]
    common += [text for text in list(counts)[:1] if text not in common]
    return {
        text: _mean(trial, items, [judge(trial.task, item, trial.task.generation.cut(text)) for item in items])
        for text in common
    }


def _mean(trial: TaskTrial, items: Sequence[Item], scores: Sequence[Score]) -> float:
    """Return the headline of some scores; 0 where there is none."""
    settled = [score for score in trial.task.settle(items, scores) if score.value is not None]
    total = sum(score.weight for score in settled)
    return sum((score.value or 0.0) * score.weight for score in settled) / total if total else 0.0
