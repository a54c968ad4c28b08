"""Parameter budgets: the size of every method is solved for, counted exactly, or refused with what is possible."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import Field

from peft_arena.cli.console import show_plan
from peft_arena.core.errors import UserError
from peft_arena.core.specs import ModelSpec
from peft_arena.methods.low_rank.lora import Lora, LoraConfig
from peft_arena.methods.registry import METHODS, make_method
from peft_arena.methods.size_to_budget import NEAR, at, fit
from peft_arena.models.load import load, skeleton
from peft_arena.store.store import Store
from peft_arena.study.budget import Budget
from peft_arena.study.model import Arm, Study
from peft_arena.study.read_study import find_study, read_study
from peft_arena.study.study_view import view_of
from peft_arena.work.plan import plan

MICRO = ModelSpec(name="micro")
TEXT = """\
name: sized
title: Matched
model: {name: micro}
targets: [{task: micro-reverse, items: 20}]
train: {schedule: {steps: 4}, learning_rate: documented}
budget: {parameters: 100k}
arms:
  - {method: lora}
  - {method: miss}
  - {method: full, budget: null}
  - {method: ln_tuning}
seeds: [0]
"""


def study(tmp_path: Path, old: str = "", new: str = "") -> Study:
    file = tmp_path / "sized.yaml"
    file.write_text(TEXT.replace(old, new) if old else TEXT)
    return read_study(file)


def arms(found: Study) -> dict[str, Arm]:
    return {arm.label: arm for arm in found.arms}


def test_a_study_sizes_every_arm_and_says_so(tmp_path: Path) -> None:
    found = arms(study(tmp_path))
    lora = found["lora"]
    assert lora.runs[0].method.config["rank"] == 8 and lora.spent is not None
    attached = make_method("lora", lora.runs[0].method.config).attach(load(MICRO).model, seed=0)
    assert lora.spent.count == sum(p.numel() for p in attached.trained().values())
    assert str(lora.spent) == "rank 8: 97,280 parameters for 100,000 (-2.7%)"
    assert found["full"].spent is None and not found["full"].refused
    assert "ln_tuning has no setting for its size" in found["ln_tuning"].refused
    view = {arm.label: arm.budget for arm in view_of(study(tmp_path)).arms}
    assert view["lora"] == str(lora.spent) and view["full"] == ""


def test_a_plan_in_json_has_the_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = study(tmp_path)
    show_plan(found, plan(found, Store(tmp_path / "runs")), as_json=True)
    chosen = json.loads(capsys.readouterr().out)["budgets"]
    said = "rank 8: 97,280 parameters for 100,000 (-2.7%)"
    assert chosen["lora"] == {"wanted": 100_000, "setting": "rank", "value": 8, "count": 97_280, "said": said}
    assert set(chosen) == {"lora", "miss"}


def test_the_run_is_the_same_as_with_the_size_written_out(tmp_path: Path) -> None:
    solved = arms(study(tmp_path))["lora"].runs[0]
    written = arms(study(tmp_path, "{method: lora}", "{method: lora, config: {rank: 8}, budget: null}"))["lora"].runs[0]
    assert solved.run_id == written.run_id


def test_a_fraction_counts_the_model(tmp_path: Path) -> None:
    found = arms(study(tmp_path, "{parameters: 100k}", "{fraction: 0.1}"))["lora"].spent
    model = load(MICRO).model
    assert found is not None and found.wanted == round(0.1 * sum(p.numel() for p in model.parameters()))


def test_only_targets_bound_the_rank(tmp_path: Path) -> None:
    """The micro model's k and v have 64 outputs, its gate and up more."""
    wide = "400k}\narms:\n  - {method: lora, config: {targets: [gate_proj, up_proj]}}"
    spent = arms(study(tmp_path, "100k}\narms:\n  - {method: lora}", wide))["lora"].spent
    assert spent is not None and spent.value > 64 and abs(spent.count / spent.wanted - 1) < 0.01


class Bounded(LoraConfig):
    rank: int = Field(default=4, gt=2, lt=9, multiple_of=3)


def test_the_bounds_of_the_setting_bound_the_sizes() -> None:
    method = make_method("lora")
    method.config = Bounded()
    assert list(method.sizes(skeleton(MICRO))) == [3, 6]


def test_a_method_that_does_not_count_is_refused() -> None:
    class Uncounted(Lora):
        def count(self, model: object) -> None:  # type: ignore[override]
            return None

    with pytest.raises(UserError, match="lora does not count its parameters, so no budget can be set for it"):
        fit(Uncounted(), skeleton(MICRO), 100_000)


def test_the_nearest_size_is_stated_when_none_is_near(tmp_path: Path) -> None:
    spent = arms(study(tmp_path, "100k", "18000"))["lora"].spent
    assert spent is not None and spent.value == 1 and str(spent).endswith("(-32.4%, the nearest there is)")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("100k", "10", "lora cannot come near 10 parameters: rank 1 trains 12,160, and allowed is 1 to 64"),
        ("100k", "900M", "lora cannot come near 900,000,000 parameters: rank 64 trains"),
        ("{method: lora}", "{method: lora, config: {rank: 4}}", "rank is set by the budget; leave it out of config"),
    ],
)
def test_what_cannot_be_met_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    refused = arms(study(tmp_path, old, new))["lora"].refused
    assert message in refused and "\n" not in refused


@pytest.mark.parametrize(
    "text", ["{parameters: 2X}", "{parameters: true}", "{}", "{parameters: 5, fraction: 0.1}", "{fraction: 2}", "7"]
)
def test_a_wrong_budget_is_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="budget") as caught:
        study(tmp_path, "{parameters: 100k}", text)
    assert "\n" not in str(caught.value)


def test_units() -> None:
    found = [Budget(parameters=text).parameters for text in ("1.5B", "2 M", "500k", "7", 7)]  # type: ignore[arg-type]
    assert found == [1_500_000_000, 2_000_000, 500_000, 7, 7]


ALL = read_study(find_study("all-methods"))
SIZED = {arm.label: arm.runs[0].method for arm in ALL.arms if METHODS.get(arm.method).size and not arm.refused}


@pytest.mark.parametrize("name", SIZED)
def test_every_sized_method_is_brought_as_near_as_its_sizes_allow(name: str) -> None:
    """Against a search through its first sizes, and the counts grow along them."""
    model = skeleton(MICRO)
    method = make_method(name, SIZED[name].config)
    counts = [at(method, value, model).trained for value in list(method.sizes(model))[:150]]
    assert counts == sorted(counts)
    for wanted in (30_000, 100_000):
        nearest = min(counts, key=lambda count: abs(count - wanted))
        if wanted / NEAR <= nearest <= wanted * NEAR:
            found = fit(method, model, wanted)
            assert abs(found.trained - wanted) <= abs(nearest - wanted), f"{found} and {nearest} is nearer {wanted}"


def test_the_skeleton_has_the_shapes_of_the_model() -> None:
    real, bare = load(MICRO).model, skeleton(MICRO)
    shapes = {name: p.shape for name, p in real.named_parameters()}
    assert shapes == {name: p.shape for name, p in bare.named_parameters()}
    assert {p.device.type for p in bare.parameters()} == {"meta"}
