"""Supervised fine-tuning of one run: one path for every method."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_arena.core.errors import UserError
from peft_arena.core.specs import TrainSpec
from peft_arena.methods.base import Attached
from peft_arena.models.load import Loaded
from peft_arena.models.modes import context_length, virtual_tokens
from peft_arena.store.records import TrainingRecord
from peft_arena.store.store import RunDirectory
from peft_arena.tasks.base import Task
from peft_arena.train.common import checked, follow, training_record
from peft_arena.train.data import Example, packing_refusal, read_examples
from peft_arena.train.inputs import TrainData
from peft_arena.train.outcome import OnStep, TrainOutcome
from peft_arena.train.plan import make_plan

if TYPE_CHECKING:
    from peft_arena.train.proof import Proof
    from peft_arena.train.sft_session import SftSession


def train_sft(
    run: RunDirectory,
    loaded: Loaded,
    attached: Attached,
    task: Task,
    *,
    resume_every: int | None = None,
    progress: bool = True,
    on_step: OnStep | None = None,
    proof: Proof | None = None,
) -> TrainOutcome:
    """Train an attached method on a task and write its checkpoints.

    See :func:`peft_arena.train.run.train_run` for what is returned, raised and left to the caller.

    Raises:
        UserError: an example is too long or none is left, or packing does not suit the method.
    """
    from peft_arena.train.sft_session import SftSession

    spec = checked(run, loaded, attached, task, TrainSpec, resume_every)
    if spec.packing and virtual_tokens(attached.model):
        raise UserError(packing_refusal(run.spec.method.name))
    data = _read(spec, run, loaded, attached, task)

    def record(session: SftSession, resumed_at: int | None) -> TrainingRecord:
        return training_record(
            session, resumed_at, task=task, examples=len(data.train.kept), dropped=data.train.dropped
        )

    return follow(lambda: SftSession(run, loaded, attached, data), record, resume_every, progress, on_step, proof)


def _read(spec: TrainSpec, run: RunDirectory, loaded: Loaded, attached: Attached, task: Task) -> TrainData:
    """Tokenize the data and fix its order."""
    room = context_length(attached.model)
    limit = spec.max_length if room is None else min(spec.max_length, room)
    train = read_examples(task, "train", spec.examples, loaded.tokenizer, spec, limit)
    held_out: list[Example] = []
    if spec.validation_items:
        held_out = read_examples(task, "validation", spec.validation_items, loaded.tokenizer, spec, limit).kept
    plan = make_plan([len(example.ids) for example in train.kept], spec, run.spec.seed)
    return TrainData(spec, train, held_out, plan, limit)
