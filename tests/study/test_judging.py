"""What a study file says of how its arms are judged: margin, declared spread, primary pairs, seeds of an arm."""

import pytest

from peft_arena.analyze.view import Margin, SeedSd
from peft_arena.core.errors import UserError
from peft_arena.study.read_study import read_study
from peft_arena.study.study_view import view_of
from tests.study.test_study import study_file

LAST = "seeds: [0, 1]\n"


def view(tmp_path, more, *changes):
    return view_of(read_study(study_file(tmp_path, (LAST, f"{LAST}{more}\n"), *changes)))


def test_the_margin_is_two_points_unless_said(tmp_path):
    assert view(tmp_path, "").margin == Margin(None, 2.0)
    assert Margin().on_target("points") == 2.0
    assert Margin().on_target("nats/token") is None, "no margin is made up for another unit"


@pytest.mark.parametrize(
    ("text", "margin"),
    [("3", Margin(3, 3)), ("{target: 1.5}", Margin(1.5, 2)), ("{retention: 0.5}", Margin(None, 0.5))],
)
def test_one_margin_for_both_or_one_for_each(tmp_path, text, margin):
    found = view(tmp_path, f"margin: {text}").margin
    assert found == margin


def test_a_margin_counts_in_its_own_unit_only(tmp_path):
    in_nats = Margin(target=0.05, unit="nats/token")
    assert in_nats.on_target("nats/token") == 0.05
    assert in_nats.on_target("points") == 2.0
    assert Margin(target=3).on_target("nats/token") is None


def test_the_margin_of_a_path_is_that_of_the_study(tmp_path):
    study = read_study(study_file(tmp_path, (LAST, f"{LAST}margin: {{target: 3}}\npaths: {{}}\n")))
    (scan,) = study.scans(study.arms[0].runs[0])
    assert scan.tolerance == 3


def test_a_declared_spread_and_primary_pairs_reach_the_analysis(tmp_path):
    found = view(
        tmp_path, "seed_sd: {target: 2, retention: 1, runs: 10, source: ten runs of lora}\nprimary: [[full, lora]]"
    )
    assert found.seed_sd == SeedSd(2, 1, 10, "ten runs of lora")
    assert found.primary == (("full", "lora"),)
    assert view(tmp_path, "seed_sd: 1.5").seed_sd == SeedSd(1.5, 1.5)


def test_one_arm_may_have_more_seeds_than_the_others(tmp_path):
    found = view(tmp_path, "", (LAST, "seeds: [0]\n"), ("method: lora\n", "method: lora\n    seeds: [0, 1, 2]\n"))
    assert [arm.seeds for arm in found.arms] == [(0, 1, 2), (0,)]


def test_a_primary_pair_has_a_seed_in_common(tmp_path):
    with pytest.raises(UserError, match=r"primary pairs 'full' with 'lora', which have no seed in common"):
        view(tmp_path, "primary: [[full, lora]]", ("method: lora\n", "method: lora\n    seeds: [7]\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("margin: 0", r"margin.target: .*greater than 0, got 0 \(in .*line 19\)"),
        ("margin: {targets: 2}", r"unknown key 'margin.targets' .*Did you mean 'target'"),
        ("margin: {target: .nan}", r"margin.target: .*finite number"),
        ("margin: two", r"margin: .*got 'two'"),
        ("seed_sd: -1", r"seed_sd.target: .*greater than 0, got -1"),
        ("seed_sd: {target: 2}", r"'seed_sd.retention' is required \(in .*line 19\)"),
        ("seed_sd: {target: 2, retention: 2, runs: 1}", r"seed_sd.runs: .*greater than or equal to 2, got 1"),
        ("primary: [[lora, ful]]", r"unknown arm 'ful' \(in .*line 19\). Did you mean 'full'"),
        ("primary: [[lora, lora]]", r"primary compares two different arms, got 'lora' twice \(in .*line 19\)"),
        (
            "primary: [[lora, full], [full, lora]]",
            r"primary names the pair of 'full' and 'lora' twice \(in",
        ),
        ("margin: {target: 101}", r"margin.target: .*less than or equal to 100, got 101"),
        ("margin: {target: '2'}", r"margin.target: .*got '2'"),
        ("margin: {retention: true}", r"margin.retention: .*got True"),
        ("primary: [[lora]]", r"primary.0: .*at least 2 items"),
        ("paths: {tolerance: 1}", r"'tolerance' is the study's margin now: margin: \{target: POINTS\}"),
    ],
)
def test_every_mistake_is_one_line_that_says_where(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        view(tmp_path, text)
    assert "\n" not in str(caught.value)
