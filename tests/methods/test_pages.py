"""The list of methods and their pages say what the cards say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from peft_arena.cli import catalogue, console
from peft_arena.cli.app import What, list_command
from peft_arena.core.errors import UserError
from peft_arena.methods.base import Capability
from peft_arena.methods.pages import CAN, INDEX, allowed, method_page, pages, write_pages
from peft_arena.methods.registry import METHODS, make_method

COMMITTED = Path(__file__).parents[2] / "docs" / "methods"


def test_committed_pages_are_what_the_cards_say() -> None:
    found = {path.name: path.read_text(encoding="utf-8") for path in COMMITTED.glob("*.md")}
    assert found == pages(), "run `make docs`"


def test_every_capability_and_setting_is_explained() -> None:
    assert set(CAN) == set(Capability)
    for name in METHODS.own():
        for key, field in METHODS.get(name).Config.model_fields.items():
            assert field.description, f"{name}: {key}"
            assert "typing" not in allowed(field) and "pydantic" not in allowed(field), (
                f"{name}: {key}: {allowed(field)}"
            )


@pytest.mark.parametrize("name", [name for name in METHODS.own() if METHODS.get(name).card.learning_rate])
def test_the_study_arm_of_a_page_is_one(name: str) -> None:
    block = method_page(name, METHODS.get(name)).partition("```yaml\n")[2].partition("```")[0]
    (arm,) = yaml.safe_load(block)["arms"]
    make_method(arm["method"], arm.get("config"))
    assert float(arm["train"]["learning_rate"]) == METHODS.get(name).card.learning_rate


def test_bounds_of_settings() -> None:
    fields = METHODS.get("lora").Config.model_fields
    assert allowed(fields["rank"]) == "whole number, ≥ 1" and allowed(fields["dropout"]) == "number, ≥ 0, < 1"
    assert allowed(fields["init"]) == "`default` or `gaussian`"
    assert allowed(fields["layers"]) == "list of whole numbers ≥ 0 or null"
    assert allowed(METHODS.get("miss").Config.model_fields["rank"]) == "whole number, ≥ 2, multiple of 2"


def test_pages_of_methods_that_are_gone_are_removed_and_nothing_else(tmp_path: Path) -> None:
    write_pages(tmp_path)
    (tmp_path / "gone.md").write_text((tmp_path / "lora.md").read_text())
    write_pages(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {INDEX, *(f"{name}.md" for name in METHODS.own())}
    (tmp_path / "notes.md").write_text("mine")
    with pytest.raises(UserError, match="no page of a method"):
        write_pages(tmp_path)


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METHODS, "refused", {"loftq_test": "its start needs CUDA"})


def test_the_list_is_readable_at_100_columns(refusing: None, capsys: pytest.CaptureFixture[str]) -> None:
    rows = catalogue.listing("methods")
    console.show_methods(rows, as_json=False, width=100)
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines()) <= 100
    for name in METHODS.own():
        card = METHODS.get(name).card
        line = next(line for line in text.splitlines() if line.split()[:1] == [name])
        assert card.family.split()[0] in line and line.split()[-1] == (
            f"{card.learning_rate:.4g}" if card.learning_rate else "–"
        )
    assert "not offered:\n  loftq_test: its start needs CUDA" in text


@pytest.mark.parametrize("name", ["vblora", "none"])
def test_what_a_card_does_not_state_is_left_out(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    list_command(What.METHODS, name)
    lines = capsys.readouterr().out.splitlines()
    assert lines and not [line for line in lines if line.endswith((": None", ": ")) and not line.startswith(" ")]
    list_command(What.METHODS, name, as_json=True)
    assert json.loads(capsys.readouterr().out)["equation"] is None


def test_json_has_everything(refusing: None, capsys: pytest.CaptureFixture[str]) -> None:
    console.show_methods(catalogue.listing("methods"), as_json=True)
    rows: dict[str, Any] = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    card = METHODS.get("pissa").card
    assert rows["pissa"]["deviations"] == list(card.deviations) and rows["pissa"]["paper"] == card.paper
    assert rows["pissa"]["capabilities"] == sorted(card.capabilities) and rows["pissa"]["config"]["rank"] == 8
    assert rows["loftq_test"]["refused"] == "its start needs CUDA" and rows["loftq_test"]["family"] is None
    assert len({tuple(row) for row in rows.values()}) == 1, "rows have different keys"
