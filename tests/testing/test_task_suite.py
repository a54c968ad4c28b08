"""The conformance suite for tasks finds each of many planted mistakes, by the check that is for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from peft_arena.tasks.base import Task
from peft_arena.testing import check_task
from peft_arena.testing.tasks import CHECKS, SUITE, WAIVABLE
from tests.testing import broken_scorers as scorers
from tests.testing import broken_tasks as planted

RIGHT = (
    planted.Sums,
    scorers.Marked,
    planted.Picks,
    planted.Letters,
    planted.Texts,
    scorers.AnyOfTheListAndSaysSo,
    scorers.NearIsPartlyRight,
    scorers.WaivesItsHint,
)
WRONG: dict[str, tuple[type[Task], ...]] = {
    "card": (planted.NoCitation, planted.ChanceOfTwo, planted.EmptyStop),
    "splits": (planted.IgnoresTheSplit,),
    "items": (planted.ListAnswer, planted.SetInData, planted.NothingToLearn),
    "overlap": (planted.TrainIsTest, planted.TestInOtherCase, planted.HiddenOverlap),
    "reordered": (planted.SwapsForTraining,),
    "duplicates": (planted.TwiceByRow,),
    "order": (planted.DrawsFromTheProcess, planted.KeepsItsList, planted.OtherEachTime),
    "settings": (planted.IgnoresItsSeed, planted.FewerThanAsked),
    "prompts": (planted.OnePrompt, planted.EndsWithASpace, planted.CountsItsPrompts, planted.AnswersItself),
    "shots": (planted.ShowsItselfFirst, planted.ShowsTestRiddles, planted.ShowsShortSums),
    "asked": (planted.AsksTheNext, planted.AsksNowAndThenForAnother),
    "options": (
        planted.EmptyOption,
        planted.NoRightOption,
        planted.RightOptionTwice,
        planted.OptionsBeginAlike,
        planted.TwoSpaces,
    ),
    "likelihoods": (
        planted.PicksTheFirst,
        planted.TakesTheSecondToo,
        planted.TakesWhatIsNear,
        planted.NeedsToBeFarAhead,
        planted.TiesAreRight,
    ),
    "texts": (planted.ForgetsTheLikelihood, planted.LikelierIsWorse, planted.ClipsTheLoss),
    "golds": (scorers.Percent, scorers.LowersTheAnswerOnly),
    "scores": (scorers.TruthValues, scorers.WeighsNothing),
    "odd_texts": (scorers.OddTextsRaise,),
    "stops": (scorers.StopInside,),
    "limit": (scorers.TooShort,),
    "wrong": (scorers.AlwaysRight, scorers.DropsDigits, scorers.OnlyRightIsScored),
    "silent": (scorers.EmptyIsRight, scorers.EmptyIsHalfRight, scorers.FormIsEnough, scorers.FindsSomethingInNothing),
    "partial": (scorers.SubstringIsRight, scorers.PrefixIsRight, scorers.FoundInside, scorers.BeginsRight),
    "numbers": (scorers.AboutRight, scorers.AnySign, scorers.AnyOrderOfDigits),
    "listing": (scorers.AnyOfTheList,),
    "judge_state": (scorers.RemembersTheLast,),
    "gold_marks": (
        scorers.FirstOption,
        scorers.LongestOption,
        scorers.SecondSmallestOption,
        scorers.StarredOption,
        scorers.CapitalOption,
        scorers.InOrderOfGold,
        planted.MarksAnOption,
    ),
    "answer_in_prompt": (
        scorers.Hint,
        scorers.HintBeforeTheQuestion,
        scorers.PlaceInThePrompt,
        scorers.RightOptionShown,
    ),
    "gold_cycle": (scorers.GoldGoesRound, scorers.GoldByTheNumber),
    "echo": (scorers.EchoIsRight,),
    "chance": (scorers.OneAnswer, scorers.FewItemsOneAnswer, scorers.ChanceTooLow, scorers.ChanceOfAnotherNumber),
    "process": (
        scorers.OrderOfASet,
        scorers.SaltedHash,
        scorers.OrderOfTheFolder,
        scorers.SaltedScore,
        scorers.DependsOnWhereItRuns,
        scorers.ReadsBesideTheCommand,
    ),
}
CASES = [(check, kind) for check, kinds in WRONG.items() for kind in kinds]


def test_every_check_has_a_planted_mistake() -> None:
    assert list(WRONG) and set(WRONG) == set(CHECKS)


@pytest.mark.parametrize("kind", RIGHT, ids=lambda kind: kind.__name__)
def test_what_is_right_passes(kind: type[Task]) -> None:
    record = check_task(kind())
    assert set(record.passed).isdisjoint(record.not_tested)
    assert {*record.passed, *record.not_tested} == set(CHECKS)
    assert (record.name, record.suite) == (kind.card.name, SUITE)
    assert "process" in record.passed, record.not_tested["process"]
    assert "order" in record.passed
    assert all(record.not_tested.values())


@pytest.mark.parametrize(("check", "kind"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_a_planted_mistake_is_found(check: str, kind: type[Task], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    with pytest.raises(AssertionError) as caught:
        check_task(kind())
    assert str(caught.value).startswith(f"{kind.card.name}, check {check}: "), str(caught.value)


def test_what_was_not_tested_is_said_with_its_reason() -> None:
    record = check_task(planted.Texts())
    assert record.not_tested["golds"] == "a task of kind text judges no text that a model writes"
    assert "texts" in record.passed
    assert record.config == {}
    assert check_task(planted.Sums()).config == {"seed": 0, "test_items": 24}


def test_a_prompt_in_other_words_than_its_question_is_said_to_be_untested() -> None:
    record = check_task(planted.OtherNumbersInThePrompt())
    assert "24 of 24 prompts do not hold their question word for word" in record.not_tested["asked"]


def test_a_waiver_is_printed_and_must_be_needed() -> None:
    record = check_task(scorers.WaivesItsHint())
    assert record.not_tested["answer_in_prompt"].startswith("waived: the task is to copy the hint (found: ")
    with pytest.raises(AssertionError, match="check listing is waived and does not fail; remove it"):
        check_task(scorers.WaivesForNothing())
    with pytest.raises(AssertionError, match="the card waives splits; only"):
        check_task(scorers.WaivesTheSplits())
    assert set(CHECKS) > WAIVABLE


def test_a_task_that_no_new_process_can_import_says_so() -> None:
    class Local(planted.Sums):
        pass

    record = check_task(Local())
    assert "Local cannot be imported in a new process" in record.not_tested["process"]


ENDLESS = """
from peft_arena.tasks.base import Role
from peft_arena.tasks.micro.base import Candidate, MicroTask, draw, micro_card, stream
from peft_arena.testing import check_task

class Own(MicroTask):
    card = micro_card("own", "Sums", Role.RETENTION, 0.0, "Add two numbers.")

    def candidates(self):
        rng = stream(self.card.name)
        while True:
            one, other = draw(rng, range(10, {end}), 2)
            key = f"{{min(one, other)}} {{max(one, other)}}"
            yield Candidate(f"What is {{one}} plus {{other}}?", str(one + other), key)

print(check_task(Own()).not_tested["process"])
"""


@pytest.mark.parametrize(
    ("end", "words"),
    [(100, "put the call into a test, or behind: if __name__"), (30, "candidates gave no new item, with ")],
)
def test_a_script_that_checks_its_own_endless_task_ends_with_a_reason(tmp_path: Path, end: int, words: str) -> None:
    script = tmp_path / "own.py"
    script.write_text(ENDLESS.format(end=end))
    found = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert words in found.stdout + found.stderr, found.stdout + found.stderr
