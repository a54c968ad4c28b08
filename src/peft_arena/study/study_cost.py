"""What the runs of a study will cost, before any of them is started: for its plan.

The formulas are those of :mod:`peft_arena.cost.estimate`; here are the numbers that go into them: what the study says,
else what the data says where it is at hand (:mod:`peft_arena.study.known_data`). What is not known is left out and
said, never guessed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from peft_arena.core.errors import UserError
from peft_arena.core.specs import EvalSpec, RLSpec, RunSpec, TaskSpec, TrainSpec
from peft_arena.cost.counts import trained_parameters
from peft_arena.cost.estimate import (
    LAYER_SECONDS,
    Gpu,
    Memory,
    Subject,
    cache_bytes,
    decoding_seconds,
    gpu_named,
    optimizer_seconds,
    sequence_flops,
    training_flops,
    training_memory,
)
from peft_arena.methods.registry import method_of
from peft_arena.models.architecture import Architecture, architecture_of
from peft_arena.models.load import config_at_hand
from peft_arena.study.assumptions import Assumptions, TaskSizes
from peft_arena.study.known_data import Note, known_items, planned
from peft_arena.study.labels import stated_sizes, task_labels
from peft_arena.study.model import Arm, Study
from peft_arena.study.token_lengths import Lengths, context_at_hand, evaluation_lengths, training_lengths
from peft_arena.tasks.base import Kind
from peft_arena.tasks.foreign import is_foreign
from peft_arena.tasks.registry import made_task

PROMPT_TOKENS = 512.0
"""Tokens of a prompt where the study does not say."""
CHOICES = 4
"""Answers whose likelihoods are compared, where a task has choices."""
SMALL, MANY_ROWS, FEW_ROWS = 20_000_000, 64, 16
"""Rows of a batch that evaluation chooses for models below and above so many parameters."""
VLLM_ROWS = 256
"""Sequences that vLLM is taken to decode together."""
HOUR = 3600.0


class Spending(NamedTuple):
    """Operations and seconds of one piece of work."""

    flops: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Spending) -> Spending:  # type: ignore[override]  # of numbers, not of tuples
        """Return both together."""
        return Spending(self.flops + other.flops, self.seconds + other.seconds)

    def times(self, count: float) -> Spending:
        """Return so many times this."""
        return Spending(self.flops * count, self.seconds * count)


@dataclass(frozen=True)
class ArmEstimate:
    """What one run of an arm costs; None where a number it needs is not known, which the notes say."""

    label: str
    target: str
    """Content id of the target task; empty for the base model."""
    task: str
    """Its name."""
    trained: int | None = None
    """Trained parameters."""
    updates: Spending | None = None
    """Of the optimizer steps."""
    rollouts: Spending | None = None
    """Of what reinforcement learning generates."""
    evaluation: Spending | None = None
    """Of the evaluations whose size is known."""
    memory: Memory | None = None
    """Bytes at the peak of a training step."""
    rollout_memory: float = 0.0
    """Bytes while completions are generated, of weights and cache."""
    notes: tuple[Note, ...] = ()

    @property
    def training(self) -> Spending | None:
        """Updates and rollouts together."""
        if self.updates is None:
            return None
        return self.updates if self.rollouts is None else self.updates + self.rollouts

    @property
    def hours(self) -> float | None:
        """GPU hours of one run: training and known evaluations."""
        if self.training is None:
            return None
        return (self.training + (self.evaluation or Spending())).seconds / HOUR

    @property
    def peak(self) -> float | None:
        """Bytes at the peak of the training."""
        return None if self.memory is None else max(self.memory.total, self.rollout_memory)

    def table(self) -> dict[str, Any]:
        """Return everything as JSON values: operations, seconds, bytes, hours."""
        parts = {"updates": self.updates, "rollouts": self.rollouts, "evaluation": self.evaluation}
        return {
            "arm": self.label,
            "target": self.task,
            "trained_parameters": self.trained,
            **{name: None if part is None else part._asdict() for name, part in parts.items()},
            "memory": None if self.memory is None else {**self.memory._asdict(), "rollouts": self.rollout_memory},
            "peak_memory": self.peak,
            "gpu_hours": self.hours,
            "notes": [f"{note.about}: {note.text}" for note in self.notes],
        }


@dataclass(frozen=True)
class StudyEstimate:
    """Estimates of all arms that are not refused, and what they assume."""

    gpu: str
    utilisation: float
    arms: tuple[ArmEstimate, ...]
    """In the order of the study; the base model, which is only evaluated, first."""
    note: str = ""
    """Why there are no estimates at all; empty if there are."""

    @property
    def notes(self) -> dict[str, list[str]]:
        """Return every note once, with the tasks or arms it is about."""
        found: dict[str, list[str]] = {}
        for note in dict.fromkeys(note for arm in self.arms for note in arm.notes):
            found.setdefault(note.text, []).append(note.about)
        return found


def estimate(study: Study, gpu: str | None = None) -> StudyEstimate:
    """Estimate what every arm of a study costs, without any network.

    Args:
        study: read and expanded.
        gpu: name of a GPU, over the study's own.

    Raises:
        UserError: there is no GPU of this name.
    """
    assumed = study.file.execution.estimate
    name = gpu or assumed.gpu
    device = gpu_named(name)
    try:
        config = config_at_hand(study.base.model)
        shapes = None if config is None else architecture_of(config)
        note = "" if shapes else f"the shapes of model '{study.base.model.name}' are not known without network"
    except UserError as error:
        config, shapes, note = None, None, str(error)
    if config is None or shapes is None:
        return StudyEstimate(name, assumed.utilisation, (), f"no estimates: {note}")
    estimator = _Estimator(study, config, shapes, device)
    arms = [estimator.base(), *(estimator.arm(arm) for arm in study.arms if not arm.refused)]
    return StudyEstimate(name, assumed.utilisation, tuple(arms))


@dataclass
class _Estimator:
    study: Study
    config: Mapping[str, Any]
    shapes: Architecture
    gpu: Gpu

    @property
    def assumed(self) -> Assumptions:
        return self.study.file.execution.estimate

    def base(self) -> ArmEstimate:
        notes: list[Note] = []
        spent = self._evaluations(self.study.base, self._subject(0), notes)
        known = Spending() if spent.flops else None
        return ArmEstimate("base", "", "", 0, known, None, spent, notes=tuple(notes))

    def arm(self, arm: Arm) -> ArmEstimate:
        run, target, name = arm.runs[0], arm.target.task.id, self.labels[arm.target.task.id]
        count = trained_parameters(run.model, self.config, run.method)
        if count.trained is None or run.train is None:
            return ArmEstimate(arm.label, target, name, notes=(Note(arm.label, f"not estimated: {count.why}"),))
        subject = self._subject(count.trained, method_of(run.method).virtual_tokens)
        notes: list[Note] = []
        if isinstance(run.train, RLSpec):
            updates, rollouts = self._reinforced(run, run.train, subject, notes)
        else:
            updates, rollouts = self._supervised(run, run.train, subject, notes), None
        memory, generating = self._memory(run.train, subject)
        evaluation = self._evaluations(run, subject, notes)
        if max(memory.total, generating) > self.gpu.memory:
            notes.append(Note(arm.label, "needs more memory than the GPU has"))
        return ArmEstimate(
            arm.label, target, name, count.trained, updates, rollouts, evaluation, memory, generating, tuple(notes)
        )

    def _subject(self, trained: int, virtual: int = 0) -> Subject:
        return Subject(shapes=self.shapes, trained=trained, virtual=virtual, dtype=self.study.base.model.dtype)

    def _sizes(self, task: TaskSpec) -> TaskSizes:
        return stated_sizes(self.study, task)

    def _name(self, task: TaskSpec) -> str:
        return self.labels[task.id]

    @cached_property
    def labels(self) -> dict[str, str]:
        """What each task is called, by its id."""
        return task_labels(self.study)

    def _training_lengths(self, run: RunSpec, train: TrainSpec | RLSpec, notes: list[Note]) -> Lengths | None:
        """Return the lengths of what a run is trained on, where it is a file of the user's, and say so."""
        found = training_lengths(run.model, train, context_at_hand(run.model, run.method))
        if found is not None:
            text = f"training: {found.prompt:.0f} tokens of a prompt, {found.answer:.0f} of an answer, at most "
            text += f"{found.longest} together, {found.how}"
            text += f"; {found.dropped} of them too long and left out" if found.dropped else ""
            notes.append(Note(self._name(train.task), text))
        return found

    @cached_property
    def _rate(self) -> float:
        """Operations per second that are reached."""
        return self.gpu.rate(self.study.base.model.dtype) * self.assumed.utilisation

    def _computed(self, flops: float) -> Spending:
        return Spending(flops, flops / self._rate)

    def _supervised(self, run: RunSpec, train: TrainSpec, subject: Subject, notes: list[Note]) -> Spending | None:
        sizes, schedule = self._sizes(train.task), train.schedule
        length = self._example_tokens(run, train, sizes, notes)
        if schedule.tokens is not None:
            examples: float = schedule.tokens / length
        elif schedule.steps is not None:
            examples = schedule.steps * train.batch_size
        else:
            available = self._available(train, sizes, notes)
            if available is None:
                return None
            examples = float(schedule.epochs or 0) * available
        one = training_flops(subject, length, self.study.file.execution.recompute_activations)
        steps = math.ceil(examples / train.batch_size)
        return self._computed(one).times(examples) + Spending(0.0, steps * optimizer_seconds(subject, self.gpu))

    def _example_tokens(self, run: RunSpec, train: TrainSpec, sizes: TaskSizes, notes: list[Note]) -> float:
        if sizes.example_tokens is not None:
            return min(sizes.example_tokens, self._longest(train))
        found = self._training_lengths(run, train, notes)
        if found is not None:
            return min(found.example, self._longest(train))
        text = (
            "training examples are taken to have max_length tokens, an upper bound (estimate.tasks.NAME.example_tokens)"
        )
        notes.append(Note(self._name(train.task), text))
        return self._longest(train)

    def _longest(self, train: TrainSpec | RLSpec) -> int:
        """Return the most tokens of a sequence: the run's limit, or the model's."""
        return min(train.max_length, int(self.config.get("max_position_embeddings") or train.max_length))

    def _available(self, train: TrainSpec | RLSpec, sizes: TaskSizes, notes: list[Note]) -> int | None:
        items = known_items(train.task, "train") if sizes.train_items is None else None
        there = sizes.train_items if items is None else len(items)
        found = [count for count in (train.examples, there) if count is not None]
        if not found:
            text = "training is not estimated, its number of items is not known (estimate.tasks.NAME.train_items)"
            notes.append(Note(self._name(train.task), text))
        return min(found, default=None)

    def _reinforced(
        self, run: RunSpec, train: RLSpec, subject: Subject, notes: list[Note]
    ) -> tuple[Spending | None, Spending | None]:
        """Return what updates and rollouts cost."""
        sizes, schedule = self._sizes(train.task), train.schedule
        if schedule.steps is not None:
            rollouts = math.ceil(schedule.steps / train.steps_per_rollout)
            steps: float = schedule.steps
        else:
            available = self._available(train, sizes, notes)
            if available is None:
                return None, None
            prompts = train.rollout_size // train.group_size
            rollouts = max(math.ceil(float(schedule.epochs or 0) * available / prompts), 1)
            steps = rollouts * train.steps_per_rollout
        prompt, answer = self._lengths(run, train, sizes, notes)
        forward = sequence_flops(subject, prompt + answer)
        update = training_flops(subject, prompt + answer, self.study.file.execution.recompute_activations)
        scored = (train.steps_per_rollout > 1) + (train.kl > 0)
        updates = self._computed(update).times(steps * train.batch_size)
        updates += self._computed(forward * scored).times(rollouts * train.rollout_size)
        updates += Spending(0.0, steps * optimizer_seconds(subject, self.gpu))
        served = train.rollouts != "transformers"
        rows = min(VLLM_ROWS if served else max(self._rows, train.micro_batch_size or 0), train.rollout_size)
        batches = rollouts * train.rollout_size / rows
        seconds = self._decoding(subject, rows, prompt, answer, 0.0 if served else LAYER_SECONDS)
        reading = self._computed(sequence_flops(subject, prompt)).times(rollouts * train.rollout_size)
        written = Spending((forward - sequence_flops(subject, prompt)) * rollouts * train.rollout_size)
        return updates, reading + written + Spending(0.0, batches * seconds)

    def _lengths(self, run: RunSpec, train: RLSpec, sizes: TaskSizes, notes: list[Note]) -> tuple[float, float]:
        """Return tokens of a prompt and of a completion."""
        limit = train.max_new_tokens or made_task(train.task).generation.max_new_tokens
        if sizes.answer_tokens is None:
            text = "completions are taken to be as long as they may, an upper bound (estimate.tasks.NAME.answer_tokens)"
            notes.append(Note(self._name(train.task), text))
        answer = min(sizes.answer_tokens or limit, limit)
        found = None if sizes.prompt_tokens else self._training_lengths(run, train, notes)
        prompt = sizes.prompt_tokens or (PROMPT_TOKENS if found is None else found.prompt)
        return min(prompt, max(self._longest(train) - answer, 1)), answer

    def _decoding(self, subject: Subject, rows: int, prompt: float, answer: float, layer_seconds: float) -> float:
        return decoding_seconds(
            subject, self.gpu, rows, prompt, answer, utilisation=self.assumed.utilisation, layer_seconds=layer_seconds
        )

    def _memory(self, train: TrainSpec | RLSpec, subject: Subject) -> tuple[Memory, float]:
        """Return the bytes of a training step, and those of generating."""
        rows = train.micro_batch_size or train.batch_size
        longest = self._longest(train)
        memory = training_memory(subject, rows, longest, self.study.file.execution.recompute_activations)
        if not isinstance(train, RLSpec):
            return memory, 0.0
        held = memory.weights + memory.trained
        cached = longest * cache_bytes(self.shapes, subject.dtype)
        if train.rollouts == "transformers":
            return memory, held + max(self._rows, train.micro_batch_size or 0) * cached
        copy = self.shapes.parameters * 2.0  # vLLM's own weights, in two bytes each
        if train.rollouts == "vllm_server":
            return memory, held
        return memory._replace(weights=memory.weights + copy), held + copy + cached

    @property
    def _rows(self) -> int:
        given = self.study.file.execution.eval_batch_size
        return given or (MANY_ROWS if self.shapes.parameters < SMALL else FEW_ROWS)

    def _evaluations(self, run: RunSpec, subject: Subject, notes: list[Note]) -> Spending:
        total = Spending()
        points = 1
        if run.train is not None and self.study.file.evaluate_at == "save_points":
            points = len(run.train.save_points)
        for spec in self.study.evaluations(run):
            one = self._evaluation(spec, subject, notes)
            total += one.times(points if spec.sampling is None else 1)
        return total

    def _evaluation(self, spec: EvalSpec, subject: Subject, notes: list[Note]) -> Spending:
        name, sizes = self._name(spec.task), self._sizes(spec.task)
        there = planned(spec) if sizes.items is None else None
        items = spec.items if there is None else there.items
        items = items if sizes.items is None else min(sizes.items, spec.items or sizes.items)
        if items is None or is_foreign(spec.task.name):
            lm_eval = is_foreign(spec.task.name)
            why = "it is lm-eval's" if lm_eval else "items are not known (estimate.tasks.NAME.items)"
            notes.append(Note(name, f"evaluation is not estimated: {why}"))
            return Spending()
        task = made_task(spec.task)
        found = evaluation_lengths(self.study.base.model, spec, context_at_hand(self.study.base.model))
        prompt = sizes.prompt_tokens or (PROMPT_TOKENS if found is None else found.prompt)
        if task.card.kind != Kind.GENERATE:
            choices = CHOICES if task.card.kind == Kind.CHOICE else 1
            return self._computed(sequence_flops(subject, prompt)).times(items * choices)
        limit = task.generation.max_new_tokens
        if found is not None:
            notes += _of_answers(name, found, limit, stated=sizes.answer_tokens is not None)
        answer = min(sizes.answer_tokens or (limit if found is None else found.answer), limit)
        answers = items * (1 if spec.sampling is None else spec.sampling.samples)
        rows = min(self._rows, answers)
        decoding = self._decoding(subject, rows, prompt, answer, LAYER_SECONDS)
        written = sequence_flops(subject, prompt + answer) - sequence_flops(subject, prompt)
        spent = self._computed(sequence_flops(subject, prompt)).times(answers)
        return spent + Spending(written * answers, math.ceil(answers / rows) * decoding)


def _of_answers(name: str, found: Lengths, limit: int, *, stated: bool) -> list[Note]:
    """Say what an evaluation of the user's data is taken to be."""
    text = f"evaluation: {found.prompt:.0f} tokens of a prompt"
    if not stated:
        text += f"; answers are taken to be as long as the gold ones, {found.answer:.0f} tokens, and may have {limit}"
    notes = [Note(name, f"{text}, {found.how}")]
    if found.dropped:
        text = f"prompt and longest answer of {found.dropped} items do not fit the model's context: they get no score"
        notes.append(Note(name, text))
    return notes
