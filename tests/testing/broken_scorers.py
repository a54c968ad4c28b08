"""Tasks whose scorers, marks, chance or processes are each wrong in one way; see ``broken_tasks``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from peft_arena.core.errors import UserError
from peft_arena.tasks.base import Generation, Item, Kind, Message, Prompt, Score, Split, TaskConfig
from tests.testing.broken_tasks import IgnoresTheSplit, Letters, Picks, Sums, card


class Percent(Sums):
    def score(self, item: Item, completion: str) -> Score:
        found = super().score(item, completion)
        return replace(found, value=100 * (found.value or 0.0))


class LowersTheAnswerOnly(Letters):
    def score(self, item: Item, completion: str) -> Score:
        return Score(float(completion.strip().lower() == item.data["sum"]), extracted=completion.strip())


class TruthValues(Sums):
    def score(self, item: Item, completion: str) -> Score:
        return replace(super().score(item, completion), value=completion.strip() == item.data["sum"])


class WeighsNothing(Sums):
    def score(self, item: Item, completion: str) -> Score:
        return replace(super().score(item, completion), weight=0.0)


class OddTextsRaise(Sums):
    def score(self, item: Item, completion: str) -> Score:
        completion.encode()
        return super().score(item, completion)


class StopInside(Sums):
    generation = Generation(max_new_tokens=8, stop=(".",))

    def item(self, one: int, other: int) -> Item:
        return replace(super().item(one, other), answer=f" {one + other}. That is all.")


class TooShort(Sums):
    generation = Generation(max_new_tokens=3, stop=("\n",))

    def item(self, one: int, other: int) -> Item:
        return replace(super().item(one, other), answer=f" together they make {one + other}")

    def score(self, item: Item, completion: str) -> Score:
        said = completion.split()[-1:] or [""]
        return Score(float(said[0] == item.data["sum"]), extracted=said[0])


class AlwaysRight(Sums):
    def score(self, item: Item, completion: str) -> Score:
        return Score(1.0, extracted=completion)


class DropsDigits(Sums):
    def score(self, item: Item, completion: str) -> Score:
        left = "".join(sign for sign in completion if not sign.isdigit()).strip()
        return Score(float(not left), extracted=completion.strip())


class OnlyRightIsScored(Sums):
    def score(self, item: Item, completion: str) -> Score:
        found = super().score(item, completion)
        return found if found.value else Score(None, reason="no answer")


class FindsSomethingInNothing(Sums):
    def score(self, item: Item, completion: str) -> Score:
        return replace(super().score(item, completion), extracted=completion.strip() or "nothing")


class EmptyIsRight(Sums):
    def score(self, item: Item, completion: str) -> Score:
        said = completion.strip()
        return Score(float(not said or said == item.data["sum"]), extracted=said)


class EmptyIsHalfRight(Sums):
    def score(self, item: Item, completion: str) -> Score:
        found = super().score(item, completion)
        return found if completion.strip() else replace(found, value=0.5)


class Marked(Sums):
    """Answers behind a mark: nothing is wrong with it."""

    def item(self, one: int, other: int) -> Item:
        return replace(super().item(one, other), answer=f" #### {one + other}")

    def score(self, item: Item, completion: str) -> Score:
        said = completion.partition("####")[2].strip()
        return Score(float(said == item.data["sum"]), extracted=said)


class FormIsEnough(Marked):
    def score(self, item: Item, completion: str) -> Score:
        found = super().score(item, completion)
        return replace(found, value=1.0) if completion.strip() == "####" else found


class SubstringIsRight(Sums):
    def score(self, item: Item, completion: str) -> Score:
        said = completion.strip()
        return Score(float(bool(said) and said in item.data["sum"]), extracted=said)


class PrefixIsRight(Sums):
    def score(self, item: Item, completion: str) -> Score:
        said = completion.strip()
        return Score(float(bool(said) and item.data["sum"].startswith(said)), extracted=said)


class FoundInside(Sums):
    def score(self, item: Item, completion: str) -> Score:
        return Score(float(item.data["sum"] in completion), extracted=completion.strip())


class BeginsRight(Sums):
    def score(self, item: Item, completion: str) -> Score:
        said = completion.strip()
        return Score(float(said.startswith(item.data["sum"])), extracted=said)


class AboutRight(Sums):
    def score(self, item: Item, completion: str) -> Score:
        said = completion.strip()
        near = said.lstrip("-").isdecimal() and len(said) < 9 and abs(int(said) - int(item.data["sum"])) <= 9
        return Score(float(near), extracted=said)


class AnySign(Sums):
    def score(self, item: Item, completion: str) -> Score:
        said = completion.strip()
        return Score(float(said.lstrip("-+") == item.data["sum"]), extracted=said)


class AnyOrderOfDigits(Sums):
    def score(self, item: Item, completion: str) -> Score:
        said = completion.strip()
        return Score(float(sorted(said) == sorted(item.data["sum"])), extracted=said)


class NearIsPartlyRight(Sums):
    """Less for a number further off: nothing is wrong with it."""

    def score(self, item: Item, completion: str) -> Score:
        said, right = completion.strip(), int(item.data["sum"])
        off = abs(int(said) - right) if said.isdecimal() and len(said) < 9 else right
        return Score(max(0.0, 1 - off / right), extracted=said)


class EchoIsRight(Sums):
    def score(self, item: Item, completion: str) -> Score:
        said = completion.strip()
        return Score(float(said in (item.data["sum"], item.question)), extracted=said)


class AnyOfTheList(Sums):
    def score(self, item: Item, completion: str) -> Score:
        said = completion.replace(",", " ").split()
        return Score(float(item.data["sum"] in said), extracted=completion.strip())


class AnyOfTheListAndSaysSo(AnyOfTheList):
    """Nothing is wrong with it: it says how it can be won."""

    def reward_caution(self) -> str:
        return "an answer may list candidates"


class RemembersTheLast(Sums):
    last = ""

    def score(self, item: Item, completion: str) -> Score:
        said, last = completion.strip(), self.last
        self.last = item.data["sum"]
        right = said == item.data["sum"] or (said != "" and said == last != item.data["sum"])
        return Score(float(right), extracted=said)


class FirstOption(Picks):
    def item(self, number: int, options: list[str], gold: int) -> Item:
        return super().item(number, options, 0)


class LongestOption(Picks):
    def item(self, number: int, options: list[str], gold: int) -> Item:
        options[gold] += " and so on"
        return super().item(number, options, gold)


class SecondSmallestOption(Picks):
    def item(self, number: int, options: list[str], gold: int) -> Item:
        right = 40 + 7 * number % 31
        others = iter((right - 3 - number % 5, right + 2 + number % 3, right + 9 + number % 7))
        texts = [str(right if place == gold else next(others)) for place in range(len(options))]
        return super().item(number, texts, gold)


class StarredOption(Picks):
    def item(self, number: int, options: list[str], gold: int) -> Item:
        texts = [text + ("*" if place == gold else "+") for place, text in enumerate(options)]
        return super().item(number, texts, gold)


class CapitalOption(Picks):
    def item(self, number: int, options: list[str], gold: int) -> Item:
        options[gold] = options[gold].title()
        return super().item(number, options, gold)


class GoldGoesRound(Picks):
    def item(self, number: int, options: list[str], gold: int) -> Item:
        return replace(super().item(number, options, number % 4), question=f"Which of {' and '.join(options)}?")


class GoldByTheNumber(Picks):
    def item(self, number: int, options: list[str], gold: int) -> Item:
        return super().item(4 * number + gold, options, gold)


class InOrderOfGold(Picks):
    def items(self, split: Split) -> Sequence[Item]:
        return tuple(sorted(super().items(split), key=lambda item: item.gold or 0))


class Hint(Sums):
    def prompt(self, item: Item) -> Prompt:
        return f"Sum: {item.question} (hint: {item.data['sum']})\nAnswer:"


class HintBeforeTheQuestion(Sums):
    def prompt(self, item: Item) -> Prompt:
        return (Message("system", f"{item.data['sum']}"), Message("user", item.question))


class PlaceInThePrompt(Picks):
    def prompt(self, item: Item) -> Prompt:
        return f"{item.question}\n[label={item.gold}]\nAnswer:"


class RightOptionShown(Picks):
    def prompt(self, item: Item) -> Prompt:
        word = item.choices[item.gold or 0]
        return f"The {word} of {item.question}\nAnswer:" if item.gold else f"{item.question} is {word}\nAnswer:"


class OneAnswer(Sums):
    def item(self, one: int, other: int) -> Item:
        return Item(f"{one} + {other} > 0?", answer=" yes", data={"sum": "yes"})


class FewItemsOneAnswer(OneAnswer):
    Config = TaskConfig

    @cached_property
    def made(self) -> dict[str, tuple[Item, ...]]:
        items = tuple(self.item(number, 50) for number in range(10, 22))
        return {"train": items[:6], "test": items[6:]}


class ChanceTooLow(Sums):
    card = card("sums", chance=0.01)

    def item(self, one: int, other: int) -> Item:
        even = "yes" if (one + other) % 2 else "no"
        return Item(f"{one} + {other} is odd?", answer=f" {even}", data={"sum": even})


class ChanceOfAnotherNumber(Picks):
    card = card("picks", Kind.CHOICE, chance=0.5)


class WaivesForNothing(Sums):
    card = card("sums", waived={"listing": "no reason"})


class WaivesTheSplits(IgnoresTheSplit):
    card = card("sums", waived={"splits": "it is easier"})


class WaivesItsHint(Hint):
    """Nothing is wrong with it: it says that the answer is shown, and why."""

    card = card("sums", waived={"answer_in_prompt": "the task is to copy the hint"})


class OrderOfASet(Sums):
    @cached_property
    def made(self) -> dict[str, tuple[Item, ...]]:
        made = super().made
        by_question = {item.question: item for item in made["test"]}
        return {**made, "test": tuple(by_question[question] for question in set(by_question))}


class SaltedHash(Sums):
    @cached_property
    def made(self) -> dict[str, tuple[Item, ...]]:
        return {
            split: tuple(sorted(items, key=lambda item: hash(item.question))) for split, items in super().made.items()
        }


class OrderOfTheFolder(Sums):
    @cached_property
    def made(self) -> dict[str, tuple[Item, ...]]:
        here = [path.name for path in Path(__file__).parent.iterdir() if path.suffix == ".py"]
        made = super().made
        turn = here.index(Path(__file__).name)
        return {**made, "test": (*made["test"][turn + 1 :], *made["test"][: turn + 1])}


class SaltedScore(Sums):
    def score(self, item: Item, completion: str) -> Score:
        found = super().score(item, completion)
        return found if found.value or not found.extracted else replace(found, extracted=str(hash(found.extracted)))


class ReadsBesideTheCommand(Sums):
    @cached_property
    def made(self) -> dict[str, tuple[Item, ...]]:
        if not Path("pyproject.toml").exists():
            raise UserError("no file pyproject.toml")
        return super().made


class DependsOnWhereItRuns(Sums):
    @cached_property
    def made(self) -> dict[str, tuple[Item, ...]]:
        made = super().made
        return made if Path("pyproject.toml").exists() else {**made, "test": made["test"][::-1]}
