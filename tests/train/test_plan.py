"""The order of the data, the schedule and the layout of rows; no model."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import pytest

from peft_arena.core.errors import UserError
from peft_arena.core.specs import Schedule, TaskSpec, TrainSpec
from peft_arena.train.data import Example, layout
from peft_arena.train.plan import make_plan
from peft_arena.train.schedule import rate_factor, save_steps, validation_steps

DRAW = random.Random(5)
LENGTHS = [DRAW.randint(3, 90) for _ in range(333)]


def spec(**changes) -> TrainSpec:
    settings = {"task": TaskSpec(name="toy", revision="1"), "schedule": Schedule(steps=10), "learning_rate": 1e-3}
    return TrainSpec(**(settings | changes))


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("count", [7, 8, 50, 333])
def test_each_epoch_has_every_example_once(grouped, count):
    plan = make_plan(LENGTHS[:count], spec(group_by_length=grouped, schedule=Schedule(epochs=3)), seed=1)
    order = [index for batch in plan.steps for index in batch]
    assert len(order) == 3 * count
    for epoch in range(3):
        assert grouped or sorted(order[epoch * count : (epoch + 1) * count]) == list(range(count))
    assert set(Counter(order).values()) == {3}


def test_grouped_epochs_are_whole_too():
    """The batch at the seam of two epochs is sorted by length, so epochs are whole up to that batch."""
    count, size = 333, 8
    plan = make_plan(LENGTHS, spec(schedule=Schedule(epochs=3)), seed=1)
    order = [index for batch in plan.steps for index in batch]
    for epoch in range(3):
        inner = order[epoch * count + size : (epoch + 1) * count - size]
        assert len(set(inner)) == len(inner)


def test_grouping_cuts_padding():
    def padding(grouped):
        plan = make_plan(LENGTHS, spec(group_by_length=grouped, schedule=Schedule(epochs=1)), seed=0)
        return sum(len(batch) * max(LENGTHS[index] for index in batch) for batch in plan.steps) / sum(LENGTHS)

    assert padding(True) < 1.1 < 1.4 < padding(False)


def test_order_is_random_and_a_function_of_the_seed():
    plans = {seed: make_plan(LENGTHS, spec(), seed) for seed in (0, 1)}
    assert plans[0].steps != plans[1].steps
    assert plans[0].id != plans[1].id
    assert make_plan(LENGTHS, spec(), 0) == plans[0]
    longest = [max(LENGTHS[index] for index in batch) for batch in plans[0].steps]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


def test_batches_are_full_and_divide_into_micro_batches():
    plan = make_plan(LENGTHS, spec(batch_size=6, micro_batch_size=2, schedule=Schedule(steps=100)), seed=0)
    assert len(plan.steps) == 100 and {len(batch) for batch in plan.steps} == {6}
    assert [len(micro) for micro in plan.micro_batches(3)] == [2, 2, 2]
    assert sum(plan.micro_batches(3), ()) == plan.steps[3]


@pytest.mark.parametrize("tokens", [1, 500, 5000, 40000])
def test_token_schedule_rounds_up_to_whole_steps(tokens):
    plan = make_plan(LENGTHS, spec(schedule=Schedule(tokens=tokens)), seed=0)
    counts = [sum(LENGTHS[index] for index in batch) for batch in plan.steps]
    assert sum(counts) >= tokens > sum(counts[:-1])


@pytest.mark.parametrize(("epochs", "examples"), [(1, 333), (2.5, 832), (0.1, 33)])
def test_epoch_schedule(epochs, examples):
    plan = make_plan(LENGTHS, spec(schedule=Schedule(epochs=epochs)), seed=0)
    assert sum(map(len, plan.steps)) == examples
    assert len(plan.steps) == -(-examples // 8)


def test_less_than_one_example_is_refused():
    with pytest.raises(UserError, match="less than one example"):
        make_plan(LENGTHS[:3], spec(schedule=Schedule(epochs=0.01)), seed=0)


def test_packed_rows_hold_every_example_and_fit():
    examples = [Example(list(range(length)), 1) for length in LENGTHS[:40]]
    rows = layout(examples, packing=True, limit=100)
    assert sorted(len(example.ids) for row in rows for example in row) == sorted(LENGTHS[:40])
    assert max(sum(len(example.ids) for example in row) for row in rows) <= 100
    assert len(rows) < 30
    assert layout(examples, packing=False, limit=100) == [[example] for example in examples]


def test_learning_rate():
    total = 100
    rates = {
        kind: [rate_factor(spec(lr_schedule=kind), step, total) for step in range(total)]
        for kind in ("cosine", "linear", "constant")
    }
    for kind, factors in rates.items():
        assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)]), kind
        assert factors[10] == 1.0
        assert min(factors) > 0
        assert all(later <= earlier for earlier, later in pairwise(factors[10:]))
    assert rates["cosine"][55] == pytest.approx(0.5) == rates["linear"][55]
    assert rates["constant"][-1] == 1.0
    assert rate_factor(spec(warmup_fraction=0), 0, total) == 1.0


def test_steps_that_are_kept():
    assert save_steps(spec(save_points=(0.01, 0.02, 0.5, 1.0)), 10) == (1, 5, 10)
    assert validation_steps(spec(validate_every=0.25), 10) == {0, 2, 5, 8, 10}
    assert validation_steps(spec(validate_every=0.4), 10) == {0, 4, 8, 10}
    assert validation_steps(spec(validate_every=0.1), 10) == set(range(11))
    assert validation_steps(spec(validation_items=0), 10) == frozenset()


@pytest.mark.parametrize("examples", [1, 2, 5])
@pytest.mark.parametrize("grouped", [True, False])
def test_a_batch_larger_than_the_data_takes_what_there_is(examples, grouped):
    epochs = make_plan([3] * examples, spec(batch_size=8, schedule=Schedule(epochs=2), group_by_length=grouped), 0)
    assert sorted(index for step in epochs.steps for index in step) == sorted(list(range(examples)) * 2)
    steps = make_plan([3] * examples, spec(batch_size=8, schedule=Schedule(steps=3), group_by_length=grouped), 0)
    assert [len(step) for step in steps.steps] == [8, 8, 8]
