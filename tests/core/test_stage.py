"""What the log of a run says of its stages is read by fields; logs of versions that had none are read too."""

import pytest

from peft_arena.core.specs import EvalSpec, TaskSpec
from peft_arena.core.stage import COST_OF_INFERENCE, TRAIN, StageId, evaluation_stage, failures, stage_of

SPEC = EvalSpec(task=TaskSpec(name="micro-sort"), split="test")
STAGES = [
    TRAIN,
    COST_OF_INFERENCE,
    evaluation_stage(SPEC, 20),
    StageId("geometry", "drift-1f"),
    StageId("scan", "own-a1"),
]
EARLIER = ["train", "cost of inference", f"evaluate a task {SPEC.id} at step 20", "geometry drift-1f", "scan own-a1"]


@pytest.mark.parametrize("stage", STAGES, ids=str)
def test_a_stage_is_known_whatever_its_text_says(stage: StageId) -> None:
    assert stage_of({"event": "started", "stage": "some other words", **stage.fields()}) == stage


@pytest.mark.parametrize(("stage", "text"), zip(STAGES, EARLIER, strict=True), ids=str)
def test_logs_without_fields_are_read_by_their_text(stage: StageId, text: str) -> None:
    assert stage_of({"event": "started", "stage": text}) == stage


def test_other_events_are_of_no_stage() -> None:
    assert stage_of({"event": "training_resumed", "step": 20}) is None
    assert stage_of({"event": "failed", "stage": "read records"}) == StageId("read records")


def test_the_last_attempt_of_each_stage_counts() -> None:
    one, other = evaluation_stage(SPEC, 10), evaluation_stage(SPEC, 20)
    log = [
        {"event": "failed", **one.fields(), "reason": "first"},
        {"event": "failed", **other.fields(), "reason": "second"},
        {"event": "failed", **TRAIN.fields()},
        {"event": "started", **one.fields()},
        {"event": "finished", **one.fields()},
    ]
    assert failures(log) == {other: "second", TRAIN: "failed without a reason"}
    assert failures([*log, {"event": "started", **other.fields()}]) == {TRAIN: "failed without a reason"}
