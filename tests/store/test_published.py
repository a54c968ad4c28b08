"""Published tables: what they hold is checked, and the shipped ones are as their sources have them."""

import json

import pytest
from pydantic import ValidationError

from peft_arena.core.errors import UserError
from peft_arena.cost.pscp import pscp
from peft_arena.methods.registry import METHODS, make_method
from peft_arena.store.published import PublishedTable, find_tables, read_published, shipped_tables

TABLE = {
    "id": "someone/table",
    "title": "A table",
    "source": {"text": "Someone"},
    "ran": {"model": "m", "regime": "sft", "target": "t"},
    "columns": [{"name": "score", "title": "score", "unit": "fraction", "better": "higher"}],
    "rows": [{"label": "a", "values": {"score": 0.5}}],
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": [{"label": "a", "values": {"score": 50.0}}]}, "is not a fraction"),
        ({"rows": [{"label": "a", "values": {}}]}, "columns and values differ in score"),
        ({"rows": [{"label": "a", "status": "failed", "values": {"score": 0.1}}]}, "is failed and yet has numbers"),
        ({"rows": TABLE["rows"] * 2}, "has a row twice: a"),
        ({"columns": TABLE["columns"] * 2}, "has a column twice"),
        ({"runs_per_row": 3}, "Input should be 1"),
        ({"rows": [{"label": "a", "values": {"score": float("nan")}}]}, "finite number"),
    ],
)
def test_a_table_that_cannot_be_true_is_refused(change, said):
    assert PublishedTable.model_validate(TABLE).rows[0].values["score"] == 0.5
    with pytest.raises(ValidationError, match=said):
        PublishedTable.model_validate({**TABLE, **change})


def test_a_damaged_file_is_one_line(tmp_path):
    file = tmp_path / "x.json"
    file.write_text(json.dumps({"tables": [{**TABLE, "colour": 1}]}))
    with pytest.raises(UserError, match=r"tables\.0\.colour") as raised:
        read_published(file)
    assert "\n" not in str(raised.value)


def test_tables_are_found_by_id_and_by_source():
    assert [table.id for table in find_tables("peft-bench/pscp-llama-3-8b")] == ["peft-bench/pscp-llama-3-8b"]
    assert len(find_tables("peft-arena")) == 8
    with pytest.raises(
        UserError, match=r"unknown published table 'peft-arna' \(in x line 3\). Did you mean 'peft-arena'"
    ):
        find_tables("peft-arna", "x line 3")


def test_every_shipped_table_names_methods_that_are_ours():
    tables = shipped_tables()
    assert len(tables) == 10
    for table in tables.values():
        assert table.source.url and table.source.date and table.caveats
        for row in table.rows:
            assert row.method in METHODS, row.label
    for table in find_tables("peft-arena"):
        for row in table.rows:
            make_method(str(row.method), row.settings)


def test_pscp_of_the_published_inputs_is_what_was_published():
    (table,) = find_tables("peft-bench")
    found = {}
    for row in table.rows:
        value = {key: float(number) for key, number in row.values.items() if number is not None}
        costs = (value["trainable_parameters"], value["extra_forward_flops"], value["memory_max"])
        found[row.label] = round(100 * pscp(value["performance"], *costs), 2)
    assert found == {
        "LoRA": 60.08,
        "LNTuning": 60.19,
        "BitFit": 58.38,
        "IA3": 55.62,
        "Prefix tuning": 33.18,
        "Prompt tuning": 29.49,
        "P-tuning": 29.26,
    }


def test_some_cells_of_peft_arena_by_hand():
    def cell(table, label):
        (found,) = [row.values for row in shipped_tables()[table].rows if row.label == label]
        return found["target"], found["general"]

    assert cell("peft-arena/sft-math-qwen2.5-7b", "OFT b32") == (0.4693, 0.4437)
    assert cell("peft-arena/sft-math-llama-3.2-3b", "PiSSA r8a16") == (0.0067, 0.0974)
    assert cell("peft-arena/sft-medical-llama-3.2-3b", "VeRA r256") == (0.4068, 0.4894)
    assert cell("peft-arena/grpo-medical-qwen2.5-7b", "full") == (0.4624, 0.4322)
    assert cell("peft-arena/grpo-medical-llama-3.2-3b", "LoRA r8a16") == (0.4497, 0.5353)
