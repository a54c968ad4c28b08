"""The weighted mean and its standard error, against numbers worked out by hand and by resampling."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from peft_arena.evaluate.metrics import measures, weighted_mean
from peft_arena.store.records import ItemRecord
from peft_arena.tasks.base import Metric


def test_equal_weights_give_the_usual_mean_and_error() -> None:
    values = [1.0, 0.0, 1.0, 1.0, 0.0]
    found = weighted_mean(values)
    assert found.value == pytest.approx(0.6)
    assert found.stderr == pytest.approx(statistics.stdev(values) / math.sqrt(5))
    assert (found.n, found.unscored) == (5, 0)


def test_weights_by_hand() -> None:
    found = weighted_mean([1.0, 3.0], [1.0, 3.0])
    assert found.value == pytest.approx(10 / 4)
    # deviations -1.5 and 0.5, weighted -1.5 and 1.5; 2 / 1 * (2.25 + 2.25) / 16
    assert found.stderr == pytest.approx(math.sqrt(2 * 4.5 / 16))


def test_linearised_error_is_the_spread_of_resampled_means() -> None:
    rng = random.Random(0)
    items = [(rng.gauss(3, 1), rng.uniform(1, 20)) for _ in range(400)]
    found = weighted_mean(*map(list, zip(*items, strict=True)))
    means = []
    for _ in range(400):
        drawn = rng.choices(items, k=len(items))
        means.append(sum(x * w for x, w in drawn) / sum(w for _, w in drawn))
    assert found.stderr == pytest.approx(statistics.stdev(means), rel=0.15)


def test_missing_is_counted_and_left_out() -> None:
    found = weighted_mean([1.0, None, math.nan, 0.0])
    assert (found.value, found.n, found.unscored) == (0.5, 2, 2)


def test_one_item_has_no_error_and_none_has_no_value() -> None:
    assert weighted_mean([0.25]) == (0.25, None, 1, 0)
    assert weighted_mean([None, None]) == (None, None, 0, 2)
    assert weighted_mean([]) == (None, None, 0, 0)


def test_measures_use_each_metrics_own_weights() -> None:
    metrics = (Metric(name="a", unit="u", better="lower"), Metric(name="b", unit="v", better="higher"))
    items = [
        ItemRecord(id="1", value=2.0, weight=1.0, others={"b": (10.0, 3.0)}),
        ItemRecord(id="2", value=4.0, weight=3.0, others={"b": (20.0, 1.0)}),
        ItemRecord(id="3", value=None, reason="too long"),
        ItemRecord(id="4", value=4.0, weight=4.0),
    ]
    first, second = measures(metrics, items, "tested")
    assert (first.metric, first.value, first.n, first.unscored) == ("a", pytest.approx(30 / 8), 3, 1)
    assert (second.metric, second.value, second.n, second.unscored) == ("b", pytest.approx(50 / 4), 2, 2)
    assert first.how.startswith("tested; ") and "weighted" in first.how
