"""Tasks that are each wrong in one way, to show that the conformance suite finds it, beside three that are right."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

from pydantic import Field

from peft_arena.core.errors import unknown
from peft_arena.tasks.base import (
    ACCURACY,
    CHOICE_METRICS,
    TEXT_METRICS,
    Generation,
    Item,
    Kind,
    Message,
    Prompt,
    Role,
    Score,
    Split,
    Task,
    TaskCard,
    TaskConfig,
)

WORDS = "ash bay cod dew elm fig gum hop ivy jay kit log map nut oak pea rye sod tar urn vat wax".split()  # noqa: SIM905


def card(name: str, kind: Kind = Kind.GENERATE, **changes: Any) -> TaskCard:
    metrics = {Kind.GENERATE: (ACCURACY,), Kind.CHOICE: CHOICE_METRICS, Kind.TEXT: TEXT_METRICS}[kind]
    fields: dict[str, Any] = {"chance": 0.25 if kind is Kind.CHOICE else None, "citation": "none", "licence": "CC0-1.0"}
    return TaskCard(
        name=name,
        title=name,
        version=1,
        role=Role.TARGET if kind is Kind.GENERATE else Role.RETENTION,
        kind=kind,
        metrics=metrics,
        source="made here",
        revision="1",
        description="made for tests",
        **{**fields, **changes},
    )


class SumConfig(TaskConfig):
    seed: int = 0
    test_items: int = Field(default=24, ge=1)


class Sums(Task):
    """Sums of numbers of two digits, judged by exact match: nothing is wrong with it."""

    card = card("sums")
    Config: ClassVar[type[TaskConfig]] = SumConfig
    generation = Generation(max_new_tokens=8, stop=("\n",))

    @cached_property
    def made(self) -> dict[str, tuple[Item, ...]]:
        settings: Any = self.config
        rng = random.Random(settings.seed)
        pairs = [(one, other) for one in range(10, 99) for other in range(10, 99)]
        rng.shuffle(pairs)
        sizes = {"train": 40, "validation": 24, "test": settings.test_items}
        found, start = {}, 0
        for split, size in sizes.items():
            found[split] = tuple(self.item(*pair) for pair in pairs[start : start + size])
            start += size
        return found

    def item(self, one: int, other: int) -> Item:
        return Item(f"{one} + {other}", answer=f" {one + other}", data={"sum": str(one + other)})

    def items(self, split: Split) -> Sequence[Item]:
        if split not in self.made:
            raise unknown("split", split, self.made)
        return self.made[split]

    def prompt(self, item: Item) -> Prompt:
        return f"Sum: {item.question}\nAnswer:"

    def score(self, item: Item, completion: str) -> Score:
        said = completion.strip()
        return Score(float(said == item.data["sum"]), extracted=said)


class Picks(Task):
    """Which of four words was named, the right one at any place: nothing is wrong with it."""

    card = card("picks", Kind.CHOICE)

    def items(self, split: Split) -> Sequence[Item]:
        made = self.made
        if split not in made:
            raise unknown("split", split, made)
        return made[split]

    @cached_property
    def made(self) -> dict[str, tuple[Item, ...]]:
        rng = random.Random(7)
        items = []
        for number in range(60):
            options = rng.sample(WORDS, 4)
            items.append(self.item(number, options, rng.randrange(4)))
        return {"validation": tuple(items[:20]), "test": tuple(items[20:])}

    def item(self, number: int, options: list[str], gold: int) -> Item:
        return Item(f"Riddle number {number} of the book", choices=tuple(options), gold=gold)

    def prompt(self, item: Item) -> Prompt:
        return f"{item.question}\nAnswer:"


class Texts(Task):
    """Short texts: nothing is wrong with it."""

    card = card("texts", Kind.TEXT)

    def items(self, split: Split) -> Sequence[Item]:
        if split != "test":
            raise unknown("split", split, ["test"])
        rng = random.Random(3)
        return tuple(Item(" ".join(rng.sample(WORDS, 9))) for _ in range(12))

    def prompt(self, item: Item) -> Prompt:
        return item.question


class Letters(Sums):
    """Lettered options in the prompt, answered by their letter: nothing is wrong with it."""

    card = card("letters", chance=0.25)
    Config = TaskConfig

    @cached_property
    def made(self) -> dict[str, tuple[Item, ...]]:
        rng = random.Random(5)
        items = [self.asked(number, rng.sample(WORDS, 4), rng.randrange(4)) for number in range(90)]
        return {"train": tuple(items[:40]), "test": tuple(items[40:])}

    def asked(self, number: int, options: list[str], gold: int) -> Item:
        lines = [self.line(letter, text, letter == "ABCD"[gold]) for letter, text in zip("ABCD", options, strict=True)]
        shown = "\n".join([f"Riddle number {number} of the book", *lines])
        return Item(shown, "ABCD"[gold], tuple("ABCD"), gold, data={"sum": "ABCD"[gold]})

    def line(self, letter: str, text: str, right: bool) -> str:
        return f"{letter}. {text}"


class MarksAnOption(Letters):
    def line(self, letter: str, text: str, right: bool) -> str:
        return f"{letter}. {text}{' (verified)' if right else ''}"


class NoCitation(Sums):
    card = card("sums", citation=" ")


class ChanceOfTwo(Sums):
    card = card("sums", chance=2.0)


class EmptyStop(Sums):
    generation = Generation(max_new_tokens=8, stop=("",))


class IgnoresTheSplit(Sums):
    def items(self, split: Split) -> Sequence[Item]:
        return self.made["test"]


class TrainIsTest(Sums):
    def items(self, split: Split) -> Sequence[Item]:
        return super().items("test" if split == "train" else split)


class TestInOtherCase(Sums):
    __test__ = False

    def items(self, split: Split) -> Sequence[Item]:
        if split != "train":
            return super().items(split)
        return tuple(replace(item, question=f"{item.question} .") for item in super().items("test"))


class HiddenOverlap(Sums):
    def items(self, split: Split) -> Sequence[Item]:
        if split != "validation":
            return super().items(split)
        return tuple(replace(item, question=f"{item.question}\N{ZERO WIDTH SPACE}") for item in super().items("train"))


class ListAnswer(Sums):
    def item(self, one: int, other: int) -> Item:
        answer: Any = [f" {one + other}"]
        return replace(super().item(one, other), answer=answer)

    def target(self, item: Item) -> str:
        return item.answer[0]


class SetInData(Sums):
    def item(self, one: int, other: int) -> Item:
        return replace(super().item(one, other), data={"sum": str(one + other), "all": {one, other}})


class NothingToLearn(Sums):
    def target(self, item: Item) -> str:
        return "" if item in self.made["train"][30:] else item.answer


class TwiceByRow(Sums):
    @cached_property
    def made(self) -> dict[str, tuple[Item, ...]]:
        made = super().made
        first = made["test"][0]
        copy = replace(first, data={**first.data, "row": 17})
        return {**made, "test": (*made["test"][:-1], copy)}


class DrawsFromTheProcess(Sums):
    def items(self, split: Split) -> Sequence[Item]:
        found = list(super().items(split))
        random.shuffle(found)
        return tuple(found)


class KeepsItsList(Sums):
    @cached_property
    def lists(self) -> dict[str, list[Item]]:
        return {split: list(items) for split, items in self.made.items()}

    def items(self, split: Split) -> Sequence[Item]:
        super().items(split)
        return self.lists[split]


class OtherEachTime(Sums):
    loads = 0

    def items(self, split: Split) -> Sequence[Item]:
        found = super().items(split)
        OtherEachTime.loads += 1
        turn = OtherEachTime.loads % len(found)
        return (*found[turn:], *found[:turn])


class IgnoresItsSeed(Sums):
    @cached_property
    def made(self) -> dict[str, tuple[Item, ...]]:
        return Sums(self.Config()).made


class FewerThanAsked(Sums):
    def items(self, split: Split) -> Sequence[Item]:
        return super().items(split)[:-1]


class OnePrompt(Sums):
    def prompt(self, item: Item) -> Prompt:
        return "Work out the sum.\nAnswer:"

    @cached_property
    def made(self) -> dict[str, tuple[Item, ...]]:
        return {split: items[:1] if split == "train" else items for split, items in super().made.items()}


class CutsTheQuestion(Picks):
    def prompt(self, item: Item) -> Prompt:
        return f"{item.question[:10]}\nAnswer:"


class EndsWithASpace(Sums):
    def prompt(self, item: Item) -> Prompt:
        return f"Sum: {item.question}\nAnswer: "


class CountsItsPrompts(Sums):
    asked = 0

    def prompt(self, item: Item) -> Prompt:
        self.asked += item in self.made["test"]
        return f"Sum: {item.question} ({self.asked})\nAnswer:"


class AnswersItself(Sums):
    def prompt(self, item: Item) -> Prompt:
        return (Message("user", item.question), Message("assistant", "The sum is"))


class ShowsItselfFirst(Sums):
    def prompt(self, item: Item) -> Prompt:
        shot = self.made["test"][0]
        return (Message("user", shot.question), Message("assistant", shot.answer), Message("user", item.question))


class ShowsTestRiddles(Picks):
    def prompt(self, item: Item) -> Prompt:
        shots = "\n".join(f"{shot.question}: {shot.choices[shot.gold or 0]}" for shot in self.made["test"][:2])
        return f"{shots}\n{item.question}\nAnswer:"


class ShowsShortSums(Sums):
    def prompt(self, item: Item) -> Prompt:
        shots = "\n".join(f"Sum: {shot.question}\nAnswer:{shot.answer}" for shot in self.made["test"][:3])
        return f"{shots}\nSum: {item.question}\nAnswer:"


class AsksTheNext(Sums):
    def prompt(self, item: Item) -> Prompt:
        test = self.made["test"]
        other = test[(test.index(item) + 1) % len(test)] if item in test else item
        return f"Sum: {other.question}\nAnswer:"


class AsksNowAndThenForAnother(Sums):
    def prompt(self, item: Item) -> Prompt:
        one, _, other = item.question.partition(" + ")
        asked = f"{one} + {int(other) + 500}" if int(other) % 6 == 0 else item.question
        return f"Sum: {asked}\nAnswer:"


class SwapsForTraining(Sums):
    @cached_property
    def made(self) -> dict[str, tuple[Item, ...]]:
        made = super().made
        pairs = [item.question.split(" + ") for item in made["test"]]
        return {**made, "train": tuple(self.item(int(other), int(one)) for one, other in pairs)}


class OtherNumbersInThePrompt(Sums):
    """What no check can see: the answer is right for other numbers than those that are shown."""

    def prompt(self, item: Item) -> Prompt:
        one, other = item.question.split(" + ")
        return f"Sum: {other} + {one[::-1]}\nAnswer:"


class EmptyOption(Picks):
    def item(self, number: int, options: list[str], gold: int) -> Item:
        return super().item(number, [*options, ""], gold)


class NoRightOption(Picks):
    def item(self, number: int, options: list[str], gold: int) -> Item:
        return super().item(number, options, gold + 1)


class RightOptionTwice(Picks):
    def item(self, number: int, options: list[str], gold: int) -> Item:
        return super().item(number, [*options, options[gold]], gold)


class OptionsBeginAlike(Picks):
    def item(self, number: int, options: list[str], gold: int) -> Item:
        return super().item(number, ["".join(options[: place + 1]) for place in range(4)], gold)


class TwoSpaces(Picks):
    def prompt(self, item: Item) -> Prompt:
        return f"{item.question}\nAnswer:\n"


class PicksTheFirst(Picks):
    def score_choice(self, item: Item, log_likelihoods: Sequence[float]) -> Score:
        return super().score_choice(item, [0.0, *(-1.0 for _ in log_likelihoods[1:])])


class TakesTheSecondToo(Picks):
    def score_choice(self, item: Item, log_likelihoods: Sequence[float]) -> Score:
        found = super().score_choice(item, log_likelihoods)
        return replace(found, value=1.0) if max(log_likelihoods) == log_likelihoods[1] else found


class TakesWhatIsNear(Picks):
    def score_choice(self, item: Item, log_likelihoods: Sequence[float]) -> Score:
        found = super().score_choice(item, log_likelihoods)
        near = max(log_likelihoods) - log_likelihoods[item.gold or 0] < 5
        return replace(found, value=1.0) if near else found


class NeedsToBeFarAhead(Picks):
    def score_choice(self, item: Item, log_likelihoods: Sequence[float]) -> Score:
        found = super().score_choice(item, log_likelihoods)
        ahead = sorted(log_likelihoods)[-1] - sorted(log_likelihoods)[-2] > 1
        return found if ahead else replace(found, value=0.0)


class TiesAreRight(Picks):
    def score_choice(self, item: Item, log_likelihoods: Sequence[float]) -> Score:
        found = super().score_choice(item, log_likelihoods)
        return replace(found, value=1.0) if len(set(log_likelihoods)) == 1 else found


class ClipsTheLoss(Texts):
    def score_text(self, item: Item, log_likelihood: float, tokens: int) -> Score:
        found = super().score_text(item, log_likelihood, tokens)
        return found if found.value is None else replace(found, value=min(found.value, 3.0))


class ForgetsTheLikelihood(Texts):
    def score_text(self, item: Item, log_likelihood: float, tokens: int) -> Score:
        return super().score_text(item, -1.0, tokens)


class LikelierIsWorse(Texts):
    def score_text(self, item: Item, log_likelihood: float, tokens: int) -> Score:
        found = super().score_text(item, log_likelihood, tokens)
        return found if found.value is None else replace(found, value=-found.value)
