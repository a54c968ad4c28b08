"""Result files of the PEFT library: every number as it stands, what is missing stays missing, a crash stays one."""

import json

import pytest

from peft_arena.core.errors import UserError
from peft_arena.interop.results import import_results
from peft_arena.interop.results_schema import ALONG, AT_END, SECTIONS, TRAIN_CONFIG
from peft_arena.store.published import shipped_tables
from tests.interop.library import COMPARISON, RESULT, result

needs_comparison = pytest.mark.skipif(not COMPARISON.is_dir(), reason=f"there is no {COMPARISON}")


def written(path, content, name="one.json"):
    file = path / name
    file.write_text(json.dumps(content))
    return file


def row_of(path, content):
    ((row,),) = [table.rows for table in import_results([written(path, content)]).tables]
    return row


def test_a_row_has_every_number_with_its_meaning(tmp_path):
    (table,) = import_results([written(tmp_path, RESULT)]).tables
    (row,) = table.rows
    assert row.values == {
        "accuracy": 0.25,
        "forgetting": 0.05,
        "train_time": 50.0,
        "memory_max": 3000.0,
        "memory_avg": 1000.0,
        "memory_99th": 2000.0,
        "file_size": 400.0,
        "trainable_parameters": 10.0,
        "total_parameters": 1000.0,
        "total_time": 100.0,
        "train_loss": 0.6,
        "train_tokens": 77.0,
    }
    assert (row.label, row.method, row.status) == ("lora/rank32", "lora", "success")
    said = {"seed": 0, "learning_rate": 1e-4, "weight_decay": 0.1, "peft": "0.19.2", "peft_commit": "b" * 40}
    assert said.items() <= row.settings.items() and row.settings["accelerator"] == "some GPU"
    assert (table.id, table.ran.revision, table.seeds) == ("peft-library/metamathqa", "a" * 40, (0,))
    units = {column.name: (column.unit, column.better) for column in table.columns}
    assert units["accuracy"] == ("fraction", "higher") and units["forgetting"] == ("nats/token", "lower")


@pytest.mark.parametrize("status", ["failed", "canceled"])
def test_a_run_that_crashed_stays_failed_and_has_no_numbers(tmp_path, status):
    row = row_of(tmp_path, result(train_info__status=status, run_info__error_msg="CUDA out of memory"))
    assert (row.status, row.reason) == (status, "CUDA out of memory")
    assert set(row.values.values()) == {None}


def test_what_is_missing_stays_missing(tmp_path):
    last = {"step": 5000, "test accuracy": None, "forgetting": None, "train loss": 0.5}
    row = row_of(tmp_path, result(train_info__metrics=[last], train_info__train_time=None))
    absent = {"accuracy", "forgetting", "train_time", "train_tokens"}
    assert {name for name, value in row.values.items() if value is None} == absent
    assert row.values["train_loss"] == 0.5


def test_the_size_of_no_file_is_no_size(tmp_path):
    assert row_of(tmp_path, result(train_info__file_size=99999999)).values["file_size"] is None


def test_a_measured_zero_is_a_zero(tmp_path):
    last = {**RESULT["train_info"]["metrics"][-1], "test accuracy": 0.0}
    assert row_of(tmp_path, result(train_info__metrics=[last])).values["accuracy"] == 0.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train_info__status": ...}, r"one\.json: train_info\.status is missing"),
        ({"train_info__gpu_hours": 3}, r"one\.json: train_info\.gpu_hours is unknown"),
        ({"meta_info__license": "x"}, r"one\.json: meta_info\.license is unknown"),
        ({"train_info__status": "ok"}, r"one\.json: train_info\.status is 'ok'"),
        ({"train_info__metrics": 5}, r"one\.json: train_info\.metrics must be a list"),
        ({"run_info__train_config": []}, r"one\.json: run_info\.train_config must be a mapping"),
        ({"train_info__metrics": [{"test accuracy": 0.5, "bleu": 1}]}, r"train_info\.metrics has 'bleu'"),
        ({"train_info__metrics": [{"test accuracy": 47.8}]}, r"column accuracy: 47\.8 is not a fraction"),
    ],
)
def test_another_schema_is_refused_with_file_and_key(tmp_path, change, said):
    with pytest.raises(UserError, match=said) as raised:
        import_results([written(tmp_path, result(**change))])
    assert "\n" not in str(raised.value)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"run_info is missing"):
        import_results([written(tmp_path, {})])
    with pytest.raises(UserError, match="must be a mapping, got list"):
        import_results([written(tmp_path, [])])
    with pytest.raises(UserError, match="no result file in"):
        import_results([(tmp_path / "empty").mkdir() or tmp_path / "empty"])
    with pytest.raises(UserError, match="no file or directory"):
        import_results([tmp_path / "nowhere"])


def test_two_files_of_one_run_are_refused(tmp_path):
    files = [written(tmp_path, RESULT, name) for name in ("one.json", "two.json")]
    with pytest.raises(UserError, match="has a row twice: lora/rank32"):
        import_results(files)


@needs_comparison
def test_all_94_files_of_the_library_are_read():
    tables = {table.id: table for table in import_results([COMPARISON]).tables}
    assert {key: len(table.rows) for key, table in tables.items()} == {
        "peft-library/metamathqa": 63,
        "peft-library/image-gen": 31,
    }
    rows = [row for table in tables.values() for row in table.rows]
    assert {row.status for row in rows} == {"success"} and all(row.method for row in rows)
    for row in tables["peft-library/metamathqa"].rows:
        data = json.loads((COMPARISON / "MetaMathQA/results" / f"{row.label.replace('/', '--')}.json").read_text())
        last = data["train_info"]["metrics"][-1]
        assert (row.values["accuracy"], row.values["forgetting"]) == (last["test accuracy"], last["forgetting"])
    missing = {(row.label, key) for row in rows for key, value in row.values.items() if value is None}
    assert ("randlora/flux2-klein-default", "file_size") in missing, "its file has 99999999"
    assert missing == {
        ("randlora/flux2-klein-default", "file_size"),
        ("full-finetuning/flux2-klein-default", "drift"),
    }


@needs_comparison
def test_the_shipped_table_is_what_the_files_give():
    (table,) = import_results([COMPARISON / "MetaMathQA"]).tables
    assert shipped_tables()["peft-library/metamathqa"] == table


@needs_comparison
def test_the_schema_is_that_of_the_files():
    for path in (COMPARISON / "MetaMathQA" / "results").glob("*.json"):
        data = json.loads(path.read_text())
        assert tuple(data) == tuple(SECTIONS)
        assert all(tuple(data[name]) == keys for name, keys in SECTIONS.items())
        assert set(data["run_info"]["train_config"]) == set(TRAIN_CONFIG)
        *along, last = data["train_info"]["metrics"]
        assert tuple(last) == AT_END and all(tuple(entry) == ALONG for entry in along)
