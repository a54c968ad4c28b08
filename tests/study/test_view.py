"""What the analysis is told of a study: labels that say how an arm was trained where that is not the same for all."""

from peft_arena.core.specs import EvalSpec, MethodSpec, ModelSpec, RLSpec, RunSpec, Schedule, TaskSpec, TrainSpec
from peft_arena.study.model import Arm, Study
from peft_arena.study.study_file import StudyFile
from peft_arena.study.study_view import view_of

TASK = TaskSpec(name="micro_add")
MODEL = ModelSpec(name="micro")
TARGET = EvalSpec(task=TASK)


def arm(label, objective, refused=""):
    common = {"task": TASK, "schedule": Schedule(steps=2), "learning_rate": 1e-3}
    train = TrainSpec(**common) if objective == "sft" else RLSpec(**common, objective=objective)
    run = RunSpec(model=MODEL, method=MethodSpec(name="lora", config={"label": label}), train=train)
    return Arm(label, "lora", TARGET, (run,), refused)


def labels(*arms):
    file = StudyFile.model_validate(
        {
            "name": "some",
            "title": "Some",
            "model": {"name": "micro"},
            "targets": [{"task": "micro_add"}],
            "train": {},
            "arms": [{"method": "lora"}],
            "seeds": [0],
        }
    )
    view = view_of(Study(file, RunSpec(model=MODEL, method=MethodSpec(name="none")), arms, (TARGET,), ()))
    assert {found.objective for found in view.arms} == set(view.objectives)
    return [found.label for found in (*view.arms, *view.refused)]


def test_a_label_says_how_the_arm_was_trained_where_there_are_several_ways():
    found = labels(arm("lora", "sft"), arm("lora on top", "grpo"), arm("oft-GRPO", "grpo"), arm("x", "rloo", "no"))
    assert found == ["lora (sft)", "lora on top (grpo)", "oft-GRPO", "x (rloo)"]


def test_with_one_way_labels_stay():
    assert labels(arm("lora", "sft"), arm("oft", "sft")) == ["lora", "oft"]
    assert labels(arm("lora", "grpo"), arm("oft", "grpo")) == ["lora", "oft"]
