"""Tidy tables: the same schema with and without rows, one row per observation."""

import polars as pl
import pytest

from peft_arena.core.measure import Measure
from peft_arena.core.specs import (
    EvalSpec,
    MethodSpec,
    ModelSpec,
    RLSpec,
    RunSpec,
    Sampling,
    Schedule,
    TaskSpec,
    TrainSpec,
)
from peft_arena.store.reading import read_record
from peft_arena.store.records import (
    CostRecord,
    EvaluationRecord,
    ItemRecord,
    LogEntry,
    RolloutEntry,
    RunRecord,
    TrainingRecord,
)
from peft_arena.store.store import Store
from peft_arena.store.tables import COSTS, CURVES, ITEMS, METRICS, RL, RUNS, RunRecords, all_tables

SCHEMAS = {"runs": RUNS, "items": ITEMS, "metrics": METRICS, "costs": COSTS, "curves": CURVES, "rl": RL}
ROLLOUT = RolloutEntry(
    reward=0.5,
    reward_std=0.4,
    rewards={"task": 0.4, "format": 0.2},
    unscored=0.0,
    length=12.5,
    ended=0.9,
    zero_variance=0.3,
    entropy=0.7,
    clip_low=0.01,
    clip_high=0.02,
    kl=None,
    completions=64,
    generated_tokens=800,
    rollout_seconds=1.5,
    update_seconds=0.5,
)


def read(run):
    """Return the records of a run as a caller of the tables reads them."""
    path = run.path / "run.json"
    record = read_record(RunRecord, path) if path.exists() else None
    costs = tuple(cost for stage in ("training", "inference") if (cost := run.cost(stage)))
    return RunRecords(run.spec, record, run.training(), costs, tuple(run.evaluations()))


def _training(run_id, log):
    counts = {"steps": 2, "tokens": 20, "padded_tokens": 24, "examples": 8, "dropped": 1}
    return TrainingRecord(run_id=run_id, **counts, log=log, save_points=(2,), provenance={})


def _rl_spec():
    train = RLSpec(task=TaskSpec(name="sums"), schedule=Schedule(steps=2), learning_rate=1e-5, objective="grpo")
    return RunSpec(model=ModelSpec(name="micro"), method=MethodSpec(name="online"), train=train, seed=3)


@pytest.fixture
def runs(tmp_path):
    store = Store(tmp_path)
    train = TrainSpec(task=TaskSpec(name="sums"), schedule=Schedule(steps=2), learning_rate=1e-3)
    method = MethodSpec(name="some", config={"rank": 8})
    spec = RunSpec(model=ModelSpec(name="micro"), method=method, train=train, seed=3)
    run = store.run(spec)
    run.create()
    log = (LogEntry(step=1, tokens=10, loss=2.0), LogEntry(step=2, tokens=20, validation_loss=1.5))
    run.write_training(_training(run.run_id, log))
    store.run(_rl_spec()).create()
    rl_log = (
        LogEntry(step=0, tokens=0, validation_reward=0.25),
        LogEntry(step=2, tokens=900, loss=0.01, rollout=ROLLOUT),
    )
    store.run(_rl_spec()).write_training(_training(_rl_spec().run_id, rl_log))
    measure = Measure(metric="accuracy", value=0.5, unit="fraction", better="higher", how="test", n=1, unscored=1)
    items = (
        ItemRecord(id="a", value=1.0, others={"bits": (0.5, 3.0)}),
        ItemRecord(id="b", value=None, reason="no answer"),
    )
    run.write_evaluation(
        run.point(2),
        EvaluationRecord(
            run_id=run.run_id,
            step=2,
            factor=1.0,
            spec=EvalSpec(task=TaskSpec(name="sums")),
            card={},
            metrics=(measure,),
            items=items,
            engine={},
            provenance={},
        ),
    )
    run.write_cost(CostRecord(run_id=run.run_id, stage="training", measures=(measure,), provenance={}))
    store.run(RunSpec(model=ModelSpec(name="micro"), method=MethodSpec(name="none"))).create()
    return [read(run) for run in store.runs()]


def test_the_schema_does_not_depend_on_rows(runs):
    full, empty = all_tables(runs), all_tables([])
    assert set(full) == set(SCHEMAS)
    for name, schema in SCHEMAS.items():
        assert dict(full[name].schema) == dict(empty[name].schema) == dict(schema)
        assert empty[name].height == 0
        assert full[name].height > 0


def test_one_row_per_observation(runs):
    tables = all_tables(runs)
    assert {name: frame.height for name, frame in tables.items()} == {
        "runs": 3,
        "items": 3,
        "metrics": 1,
        "costs": 1,
        "curves": 2,
        "rl": 2,
    }
    items = tables["items"].sort("item_id", "metric")
    assert items["value"].to_list() == [1.0, 0.5, None]
    assert items["weight"].to_list() == [1.0, 3.0, 1.0]
    assert items["reason"].to_list()[-1] == "no answer"
    run = tables["runs"].filter(pl.col("method") == "some").row(0, named=True)
    assert (run["seed"], run["learning_rate"], run["trained"], run["dropped"]) == (3, 1e-3, True, 1)
    assert run["method_config"] == '{"rank":8}'
    base = tables["runs"].filter(pl.col("method") == "none").row(0, named=True)
    assert (base["seed"], base["trained"], base["steps"]) == (None, False, None)


def test_a_log_of_reinforcement_learning_is_in_its_own_table(runs):
    tables = all_tables(runs)
    first, second = tables["rl"].rows(named=True)
    assert first == {
        **dict.fromkeys(RL),
        "run_id": _rl_spec().run_id,
        "step": 0,
        "tokens": 0,
        "validation_reward": 0.25,
    }
    assert second["rewards"] == '{"format":0.2,"task":0.4}'
    assert (second["policy_loss"], second["reward"], second["kl"]) == (0.01, 0.5, None)
    assert set(RL) >= set(RolloutEntry.model_fields)
    assert set(tables["curves"]["run_id"]) == {run.spec.run_id for run in runs if run.spec.method.name == "some"}
    ways = dict(tables["runs"].select("method", "objective").iter_rows())
    assert ways == {"some": "sft", "online": "grpo", "none": None}


def test_a_sampled_evaluation_is_told_from_a_greedy_one(runs):
    run = next(run for run in runs if run.evaluations)
    (greedy,) = run.evaluations
    sampled = greedy.model_copy(update={"spec": greedy.spec.model_copy(update={"sampling": Sampling(samples=4)})})
    found = all_tables([run._replace(evaluations=(greedy, sampled))])
    assert found["metrics"]["samples"].to_list() == [None, 4]
    assert found["items"]["samples"].to_list() == [None] * 3 + [4] * 3


def test_an_entry_without_a_new_rollout_repeats_nothing(runs):
    run = next(run for run in runs if run.training and run.spec.method.name == "online")
    log = (LogEntry(step=3, tokens=1, rollout=ROLLOUT.model_copy(update={"completions": 0})),)
    (row,) = all_tables([run._replace(training=run.training.model_copy(update={"log": log}))])["rl"].rows(named=True)
    repeated = ("reward", "reward_std", "rewards", "unscored", "length", "ended", "zero_variance")
    assert [row[name] for name in repeated] == [None] * 7
    assert (row["entropy"], row["clip_low"], row["completions"]) == (0.7, 0.01, 0)


def test_a_run_that_was_never_started_has_no_row(tmp_path):
    missing = Store(tmp_path).run(RunSpec(model=ModelSpec(name="other"), method=MethodSpec(name="none")))
    assert all(frame.height == 0 for frame in all_tables([read(missing)]).values())


def test_a_run_whose_own_record_is_lost_keeps_its_row(runs):
    lost = [run._replace(run=None) for run in runs if run.spec.method.name == "some"]
    row = all_tables(lost)["runs"].row(0, named=True)
    assert (row["method"], row["steps"], row["created"], row["git_commit"]) == ("some", 2, None, None)


def test_a_task_is_called_what_its_card_says(runs):
    named = [
        run._replace(
            evaluations=tuple(record.model_copy(update={"card": {"name": "mine"}}) for record in run.evaluations)
        )
        for run in runs
    ]
    assert all_tables(runs)["metrics"]["task"].to_list() == ["sums"]
    assert all_tables(named)["metrics"]["task"].to_list() == ["mine"]
    assert set(all_tables(named)["items"]["task"]) == {"mine"}


def test_the_tables_survive_csv(runs, tmp_path):
    for name, frame in all_tables(runs).items():
        path = tmp_path / f"{name}.csv"
        frame.write_csv(path)
        assert pl.read_csv(path, schema=dict(SCHEMAS[name])).select("run_id").equals(frame.select("run_id"))
