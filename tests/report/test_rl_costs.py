"""What rollouts cost is shown where there were rollouts, and missed nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_arena.analyze.study import analyze_study
from peft_arena.report.page_tables import cost_table, main_table
from tests.analyze.synthetic import Truth, build_synthetic
from tests.analyze.synthetic_rl import Learning


@pytest.mark.parametrize("rl", [None, Learning()])
def test_rollouts_are_in_the_cost_columns_of_reinforcement_learning_only(rl: Learning | None, tmp_path: Path) -> None:
    truths = [Truth("lora", setting="l", seeds=(0,)), Truth("oft", "oft", setting="o", seeds=(0,), rl=rl)]
    study = build_synthetic(tmp_path / "runs", truths, items=20)
    target = analyze_study(study.store, study.view, draws=20).targets[0]
    main, every = str(main_table(target)), str(cost_table(target))
    shown = rl is not None
    assert ("rollout FLOPs" in main) == ("4 TFLOPs" in main) == shown
    assert ("rollout time" in every) == ("rollout speed" in every) == shown
