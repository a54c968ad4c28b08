"""Reinforcement learning with verifiable rewards of one run: one path for every method that takes it."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from peft_arena.core.errors import UserError
from peft_arena.core.specs import RLSpec
from peft_arena.methods.base import Attached, Capability
from peft_arena.methods.registry import METHODS
from peft_arena.models.load import Loaded, load
from peft_arena.models.modes import context_length
from peft_arena.store.records import Rollouts, Start, TrainingRecord
from peft_arena.store.store import RunDirectory
from peft_arena.tasks.base import Task
from peft_arena.tasks.rewards import refusal, reward_of
from peft_arena.train.common import checked, follow, training_record
from peft_arena.train.inputs import RLData
from peft_arena.train.outcome import OnStep, TrainOutcome
from peft_arena.train.prompts import Prompt, answer_limit, plan_rollouts, read_prompts
from peft_arena.train.vllm import vllm_refusal

if TYPE_CHECKING:
    from peft_arena.train.proof import Proof
    from peft_arena.train.rl_session import RLSession


def train_rl(
    run: RunDirectory,
    loaded: Loaded,
    attached: Attached,
    task: Task,
    *,
    resume_every: int | None = None,
    progress: bool = True,
    on_step: OnStep | None = None,
    start: Start | None = None,
    proof: Proof | None = None,
) -> TrainOutcome:
    """Train an attached method by the rewards of a task and write its checkpoints.

    See :func:`peft_arena.train.run.train_run` for what is returned, raised and left to the caller.

    Raises:
        UserError: the method's card does not take such objectives, a reward does not suit the task, no prompt fits, or
            the training begins elsewhere than the spec says.
        TrainingFailed: the loss or the model's logits are not finite.
    """
    from peft_arena.train.rl_session import RLSession

    spec = checked(run, loaded, attached, task, RLSpec, resume_every)
    _refuse(run, spec, task, start)
    data = _read(spec, run, loaded, attached, task)

    def record(session: RLSession, resumed_at: int | None) -> TrainingRecord:
        return training_record(
            session,
            resumed_at,
            task=task,
            examples=len(data.train.kept),
            dropped=data.train.dropped,
            rollouts=_rollouts(session),
            start=start,
        )

    return follow(lambda: RLSession(run, loaded, attached, data), record, resume_every, progress, on_step, proof)


def _refuse(run: RunDirectory, spec: RLSpec, task: Task, start: Start | None) -> None:
    """Refuse what cannot be trained like this: by the method's card, the rollouts, the start or the rewards."""
    name = run.spec.method.name
    card = METHODS.get(name).card
    if Capability.ONLINE_RL not in card.capabilities:
        raise UserError(f"method {name} cannot be trained by {spec.objective}: its card does not declare online_rl")
    if spec.rollouts != "transformers" and (problem := vllm_refusal(card, run.spec.model)):
        raise UserError(f"rollouts {spec.rollouts} cannot be used with method {name}: {problem}")
    if spec.rollouts != "transformers" and importlib.util.find_spec("vllm") is None:
        raise UserError(f"rollouts {spec.rollouts} needs vLLM: pip install vllm; or use rollouts: transformers")
    if (start is None) != (spec.init_from is None):
        raise UserError(f"run {run.run_id} begins {'at' if spec.init_from else 'not at'} another run, unlike its spec")
    for reward in spec.rewards:
        if problem := refusal(reward_of(reward), task, answer_limit(spec, task)):
            raise UserError(problem)


def _rollouts(session: RLSession) -> Rollouts:
    """Return what a session has counted of its rollouts."""
    counters = session.counters
    return Rollouts(
        engine=session.rollouts.describe(),
        completions=counters.completions,
        groups=counters.groups,
        prompt_tokens=counters.prompt_tokens,
        generated_tokens=counters.generated_tokens,
        unscored=counters.unscored,
        rollout_seconds=counters.rollout_seconds,
        scoring_seconds=counters.scoring_seconds,
        update_seconds=max(counters.seconds - counters.rollout_seconds, 0.0),
        samples=tuple(counters.samples),
    )


def _read(spec: RLSpec, run: RunDirectory, loaded: Loaded, attached: Attached, task: Task) -> RLData:
    """Tokenize the prompts and fix their order."""
    room = context_length(attached.model)
    limit = spec.max_length if room is None else min(spec.max_length, room)
    train = read_prompts(task, "train", spec.examples, loaded.tokenizer, spec, limit)
    held_out: list[Prompt] = []
    if spec.validation_items:
        held_out = read_prompts(task, "validation", spec.validation_items, loaded.tokenizer, spec, limit).kept
    elsewhere = spec.init_from is not None and spec.kl_reference == "pretrained"
    return RLData(
        spec=spec,
        train=train,
        validation=held_out,
        plan=plan_rollouts(len(train.kept), spec, run.spec.seed),
        limit=answer_limit(spec, task),
        stop=tuple(task.generation.stop),
        pretrained=(lambda: load(run.spec.model).model) if elsewhere else None,
    )
