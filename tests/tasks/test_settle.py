"""Means over the parts of a benchmark, as values of its items."""

from __future__ import annotations

import math

import numpy as np
import pytest

from peft_arena.core.errors import UserError
from peft_arena.core.measure import Measure
from peft_arena.core.specs import Sampling
from peft_arena.evaluate.metrics import weighted_mean
from peft_arena.evaluate.samples import Samples, item_score, with_settled_rates
from peft_arena.tasks.base import Score
from peft_arena.tasks.groups import GROUPS, Member, group_mean, group_members
from peft_arena.tasks.registry import TASKS, make_task
from peft_arena.tasks.settle import settle_rates, settle_strata

PARTS = {"a": [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0], "b": [0.0, 0.0, 1.0], "c": [1.0, 1.0, 1.0, 0.0]}


def flat(parts: dict[str, list[float]]) -> tuple[list[Score], list[str]]:
    return [Score(x) for found in parts.values() for x in found], [name for name, found in parts.items() for _ in found]


def test_mean_and_error_are_those_of_the_parts() -> None:
    scores, strata = flat(PARTS)
    found = weighted_mean([score.value for score in settle_strata(scores, strata, list(PARTS))])
    assert found.value == pytest.approx(np.mean([np.mean(x) for x in PARTS.values()]), abs=1e-15)
    # variance of a mean of independent means, each estimated without bias, and n / (n - 1) of all
    exact = sum(np.var(x, ddof=1) / len(x) for x in PARTS.values()) / 9
    assert found.stderr == pytest.approx(math.sqrt(exact * found.n / (found.n - 1)), rel=1e-12)


def test_without_one_part_there_is_no_mean() -> None:
    scores, strata = flat(PARTS)
    scores[8:11] = [Score(None, reason="too long")] * 3
    settled = settle_strata(scores, strata, list(PARTS))
    assert {score.value for score in settled} == {None}
    assert settled[0].reason == "no mean over parts: fewer than 2 scored items in b"
    assert settled[8].reason == "too long"


def test_one_item_of_a_part_has_no_error_so_there_is_no_mean() -> None:
    scores, strata = flat(PARTS)
    scores[9:11] = [Score(None, reason="too long")] * 2
    settled = settle_strata(scores, strata, list(PARTS))
    assert {score.value for score in settled} == {None}
    assert settled[8].reason == "no mean over parts: fewer than 2 scored items in b"


@pytest.mark.parametrize(("parts", "each"), [(57, 2), (27, 4), (14, 7)])
def test_the_error_of_a_mean_over_small_parts_is_unbiased(parts: int, each: int) -> None:
    rng = np.random.default_rng(0)
    levels = rng.uniform(0.2, 0.9, parts)
    truth = math.sqrt((levels * (1 - levels)).sum() / each) / parts
    strata = [f"part {place}" for place in range(parts) for _ in range(each)]
    variances = []
    for _ in range(300):
        right = rng.random((parts, each)) < levels[:, None]
        settled = settle_strata([Score(float(value)) for value in right.ravel()], strata, sorted(set(strata)))
        variances.append((weighted_mean([score.value for score in settled]).stderr or 0.0) ** 2)
    assert math.sqrt(np.mean(variances)) == pytest.approx(truth, rel=0.03)


def test_unscored_items_are_left_out_of_their_part_only() -> None:
    scores, strata = flat(PARTS)
    scores[0] = Score(None, reason="too long")
    settled = settle_strata(scores, strata, list(PARTS))
    known = [score.value for score in settled if score.value is not None]
    assert len(known) == len(scores) - 1
    assert np.mean(known) == pytest.approx((4 / 7 + 1 / 3 + 3 / 4) / 3)


def test_weights_count_within_a_part() -> None:
    scores = [Score(1.0, weight=3.0), Score(0.0, weight=1.0), Score(0.0), Score(0.0)]
    settled = settle_strata(scores, ["a", "a", "b", "b"], ["a", "b"])
    assert np.mean([score.value for score in settled if score.value is not None]) == pytest.approx(0.75 / 2)


def headline(value: float | None, unit: str = "fraction") -> Measure:
    stderr = None if value is None else 0.03
    return Measure(metric="accuracy", value=value, unit=unit, better="higher", how="x", n=9, stderr=stderr)


def test_group_mean_needs_every_member() -> None:
    members = [Member(name, headline(place / 10)) for place, name in enumerate(GROUPS["general"])]
    whole = group_mean("general", members)
    assert whole.value == pytest.approx(0.1)
    assert whole.stderr == pytest.approx(0.03 / math.sqrt(3))
    for left in (members[:-1], [*members[:-1], Member(GROUPS["general"][-1], headline(None))]):
        part = group_mean("general", left)
        assert part.value is None
        assert GROUPS["general"][-1] in part.how


def test_group_mean_mixes_no_units() -> None:
    members = [Member(name, headline(0.5)) for name in GROUPS["general"]]
    members[0] = Member(members[0].task, headline(0.5, "nats/token"))
    assert group_mean("general", members).value is None


def test_groups_name_known_tasks() -> None:
    assert {name for members in GROUPS.values() for name in members} <= set(TASKS.own())
    with pytest.raises(UserError, match=r"unknown group of tasks 'generel' \(in x\)\. Did you mean 'general'\?"):
        group_members("generel", "x")


def test_pass_at_k_is_taken_over_the_same_parts_as_the_headline() -> None:
    task = make_task("arena-math", {"source": "miniature"})
    items = task.items("test")
    first = {name: next(item for item in items if item.data["member"] == name) for name in GROUPS["math"]}
    right = [
        first["arena-aime24"],
        first["arena-amc23"],
        *[i for i in items if i.data["member"] == "arena-math500"][:3],
    ]
    said = {one.id: [task.target(one), "\\boxed{?}"] for one in right}  # right in one of two samples
    sampling = Sampling(samples=2, k=(1, 2))
    samples = [Samples(sampling, [task.score(one, text) for text in said.get(one.id, ["", ""])], []) for one in items]
    scores = [item_score(one) for one in samples]
    settled = with_settled_rates(task, items, scores, task.settle(items, scores), sampling)
    share = {name: [one.id in said for one in items if one.data["member"] == name] for name in GROUPS["math"]}
    by_member = [sum(found) / len(found) for found in share.values()]
    assert len(set(by_member)) > 1, "parts of different scores, or the mean over items would be the same"
    means = {name: np.mean([one.others[name].value for one in settled]) for name in ("pass@1", "pass@2")}
    assert means["pass@2"] == pytest.approx(np.mean(by_member))
    assert (
        means["pass@1"] == pytest.approx(np.mean([one.value for one in settled])) == pytest.approx(means["pass@2"] / 2)
    )


def test_pass_at_k_of_a_part_that_is_missing_has_no_value() -> None:
    assert settle_rates([1.0, None], ["a", "b"], ["a", "b"]) == [None, None]
    assert np.mean(settle_rates([1.0, 1.0, 0.0, 0.0], ["a", "a", "b", "b"], ["a", "b"])) == pytest.approx(0.5)
