"""Tidy tables: the same schema with and without rows, one row per observation."""

import polars as pl
import pytest

from peft_arena.core.measure import Measure
from peft_arena.core.specs import EvalSpec, MethodSpec, ModelSpec, RunSpec, Schedule, TaskSpec, TrainSpec
from peft_arena.store.reading import read_record
from peft_arena.store.records import CostRecord, EvaluationRecord, ItemRecord, LogEntry, RunRecord, TrainingRecord
from peft_arena.store.store import Store
from peft_arena.store.tables import COSTS, CURVES, ITEMS, METRICS, RUNS, RunRecords, all_tables

SCHEMAS = {"runs": RUNS, "items": ITEMS, "metrics": METRICS, "costs": COSTS, "curves": CURVES}


def read(run):
    """Return the records of a run as a caller of the tables reads them."""
    path = run.path / "run.json"
    record = read_record(RunRecord, path) if path.exists() else None
    costs = tuple(cost for stage in ("training", "inference") if (cost := run.cost(stage)))
    return RunRecords(run.spec, record, run.training(), costs, tuple(run.evaluations()))


@pytest.fixture
def runs(tmp_path):
    store = Store(tmp_path)
    train = TrainSpec(task=TaskSpec(name="sums"), schedule=Schedule(steps=2), learning_rate=1e-3)
    method = MethodSpec(name="some", config={"rank": 8})
    spec = RunSpec(model=ModelSpec(name="micro"), method=method, train=train, seed=3)
    run = store.run(spec)
    run.create()
    log = (LogEntry(step=1, tokens=10, loss=2.0), LogEntry(step=2, tokens=20, validation_loss=1.5))
    run.write_training(
        TrainingRecord(
            run_id=run.run_id,
            steps=2,
            tokens=20,
            padded_tokens=24,
            examples=8,
            dropped=1,
            log=log,
            save_points=(2,),
            provenance={},
        )
    )
    measure = Measure(metric="accuracy", value=0.5, unit="fraction", better="higher", how="test", n=2, unscored=1)
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
        "runs": 2,
        "items": 3,
        "metrics": 1,
        "costs": 1,
        "curves": 2,
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


def test_a_run_that_was_never_started_has_no_row(tmp_path):
    missing = Store(tmp_path).run(RunSpec(model=ModelSpec(name="other"), method=MethodSpec(name="none")))
    assert all(frame.height == 0 for frame in all_tables([read(missing)]).values())


def test_a_run_whose_own_record_is_lost_keeps_its_row(runs):
    lost = [run._replace(run=None) for run in runs if run.training]
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
