"""Whether the tasks of a study have the items it asks for, and what defaults take where there are fewer.

A number that the study states is met or refused. A default takes what there is, and what it took is said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peft_arena.core.errors import UserError
from peft_arena.core.geometry import PromptedSpec
from peft_arena.core.specs import RLSpec, TaskSpec, TrainSpec
from peft_arena.methods.registry import method_of
from peft_arena.study.known_data import Note
from peft_arena.study.labels import task_labels
from peft_arena.study.model import Arm, Study
from peft_arena.tasks.base import Item, Split, split_items
from peft_arena.tasks.foreign import is_foreign
from peft_arena.tasks.registry import display_name, made_task
from peft_arena.tasks.rewards import caution, reward_of
from peft_arena.train.plan import examples_wanted
from peft_arena.train.prompts import prompt_room

HELD_OUT, CALIBRATION = "validation_items", "calibration_examples"


def check_items(study: Study, *, at_hand_only: bool = False) -> list[Note]:
    """Check that every task has the items that the study and its methods ask for; reads or makes them.

    Args:
        study: read and expanded.
        at_hand_only: leave out tasks whose items are not at hand, so that nothing is fetched.

    Returns:
        Notes for the reader of a plan, each once: of data, of defaults that take less than they say, of rewards.

    Raises:
        UserError: a task has fewer items than the study states, lacks a split that is needed, or leaves nothing to
            train on.
    """
    check = _Check(study, at_hand_only)
    for evaluation in (*study.targets, *study.retention):
        check.at_least("items", evaluation.items or 1, evaluation.task, evaluation.split)
        check.data(evaluation.task)
    for arm in study.arms:
        if not arm.refused:
            check.arm(arm)
    return list(dict.fromkeys(check.notes))


class _Check:
    """The checks of one study; items are read once for all of them."""

    def __init__(self, study: Study, at_hand_only: bool) -> None:
        self.study = study
        self.at_hand_only = at_hand_only
        self.notes: list[Note] = []
        self.labels = task_labels(study)
        self.stated: Mapping[str, Mapping[str, object]] = {
            entry.label or entry.method: entry.config for entry in study.file.arms
        }
        """Label of an arm to the settings of its method that the study states."""

    def name(self, spec: TaskSpec) -> str:
        """Return what the study calls a task."""
        return self.labels.get(spec.id) or display_name(spec)

    def items(self, spec: TaskSpec, split: Split) -> Sequence[Item] | None:
        """Return the items of a split; None where they are not to be looked at."""
        if is_foreign(spec.name):
            return None
        task = made_task(spec)
        return task.items(split) if task.at_hand or not self.at_hand_only else None

    def data(self, spec: TaskSpec) -> None:
        """Note what the task says of its data."""
        if self.items(spec, "test") is not None:
            self.notes += [Note(self.name(spec), text) for text in made_task(spec).notes()]

    def at_least(self, key: str, count: int, spec: TaskSpec, split: Split) -> None:
        """Refuse a split with fewer items than the study states."""
        items = self.items(spec, split)
        if items is not None and count > len(items):
            raise UserError(_too_few(key, count, spec, len(items), split))

    def arm(self, arm: Arm) -> None:
        """Check what an arm is trained on, shown and measured on."""
        run = arm.runs[0]
        train = run.train
        assert train is not None, "an arm is trained"
        if isinstance(train, RLSpec):
            prompt_room(train, made_task(train.task), train.max_length)
            self.rewards(train)
        items = self.items(train.task, "train")
        if items is not None:
            self.at_least("train.examples", train.examples or 1, train.task, "train")
            available = min(train.examples or len(items), len(items))
            if isinstance(train, TrainSpec):
                examples_wanted(available, train)
            self.calibration(arm, train.task, available)
            self.held_out(train)
        for part in self.study.geometry(run):
            for source in (*part.general, *part.target) if isinstance(part, PromptedSpec) else ():
                if source.task is not None:
                    self.at_least("prompts of the geometry", 1, source.task, source.split)

    def rewards(self, train: RLSpec) -> None:
        """Note the rewards that can be won without being right."""
        task = made_task(train.task)
        said = (caution(reward_of(reward), task) for reward in train.rewards if reward.weight)
        self.notes += [Note(self.name(train.task), text) for text in said if text]

    def calibration(self, arm: Arm, task: TaskSpec, available: int) -> None:
        """Refuse more calibration examples than there are, or note that a default takes what there is."""
        wanted = method_of(arm.runs[0].method).calibration_examples
        if wanted <= available:
            return
        stated = getattr(arm.runs[0].train, "examples", None)
        if CALIBRATION not in self.stated[arm.label]:
            examples = f"{available} training example{'' if available == 1 else 's'}"
            text = f"its start is chosen by {examples}, all there are, not {wanted} ({CALIBRATION})"
            self.notes.append(Note(arm.label, text))
        elif stated is not None:
            raise UserError(f"{CALIBRATION} of {arm.label} is {wanted}, and train.examples {stated}")
        else:
            raise UserError(_too_few(f"{CALIBRATION} of {arm.label}", wanted, task, available, "train"))

    def held_out(self, train: TrainSpec | RLSpec) -> None:
        """Refuse more validation items than there are, or note that a default takes what there is."""
        wanted, what = train.validation_items, "reward" if isinstance(train, RLSpec) else "loss"
        if not wanted:
            return
        found = split_items(made_task(train.task), "validation")
        there = len(found or ())
        if there >= wanted:
            return
        key, name = f"train.{HELD_OUT}", self.name(train.task)
        if HELD_OUT in train.model_fields_set:
            if found is not None:
                raise UserError(_too_few(key, wanted, train.task, there, "validation"))
            raise UserError(
                f"{key} is {wanted}, and task {name} has no validation split: give it one, or leave {key} out"
            )
        count = f"{there} validation item{'' if there == 1 else 's'}"
        text = f"the held-out {what} is over {count}, all there are, not {wanted} ({key})"
        if not there:
            text = f"there is no held-out {what}: the task has no validation {'items' if found == () else 'split'}"
        self.notes.append(Note(name, text))


def _too_few(key: str, count: int, spec: TaskSpec, found: int, split: str) -> str:
    return f"{key} is {count}, and task {display_name(spec)} has {found} items in its {split} split"
