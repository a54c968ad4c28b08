"""Studies with known truth, written through the store as real runs would be.

A correct answer is a latent score below a threshold: the item's difficulty, shared by all runs, plus noise of the run.
So base and tuned model agree on most items, as real ones do, and the true change of accuracy is known.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy import stats

from peft_arena.analyze.view import Arm, Refusal, StudyView
from peft_arena.core.measure import Measure
from peft_arena.core.specs import EvalSpec, MethodSpec, ModelSpec, RunSpec, Schedule, TaskSpec, TrainSpec
from peft_arena.store.records import CostRecord, EvaluationRecord, ItemRecord, LogEntry, TrainingRecord
from peft_arena.store.store import RunDirectory, Store
from tests.analyze.synthetic_rl import Learning, rl_costs, rl_spec, rl_training

PROVENANCE = {
    "peft_arena": "0.1.0",
    "git_commit": "0123456789abcdef0123456789abcdef01234567",
    "git_dirty": False,
    "python": "3.11.7",
    "platform": "Linux-test",
    "processor": "Test CPU @ 2.0 GHz",
    "cores": 2,
    "threads": 1,
    "packages": {"numpy": "2.4.6", "torch": "2.13.0"},
}
RETENTION = ("boolean", "calendar", "compare", "facts", "format")
BASE_LEVEL = {"boolean": 0.82, "calendar": 0.71, "compare": 0.93, "facts": 0.64, "format": 0.88}
CHANCE = {"boolean": 0.5, "calendar": 1 / 3, "compare": 0.5, "facts": 0.02, "format": 0.2}
CORPUS = "corpus"


@dataclass(frozen=True)
class Truth:
    """What is true of one arm: changes of accuracy as fractions, of cross-entropy in nats per token."""

    label: str
    method: str = "lora"
    learning_rate: float = 1e-3
    gain: float = 0.3
    forget: float = -0.02
    corpus: float = 0.01
    spread: float = 0.0
    """Standard deviation over seeds of the accuracies."""
    parameters: int = 10_000
    memory: float = 1.2e9
    seeds: tuple[int, ...] = (0, 1, 2)
    target: str = "operator"
    failed: dict[int, str] = field(default_factory=dict)
    """Seeds that failed, with the reason."""
    untrained: tuple[int, ...] = ()
    skipped: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Retention task to seeds that were not evaluated on it."""
    save_points: tuple[int, ...] = ()
    """Steps before the last, 200, that were evaluated as well; changes grow in proportion to the step."""
    batch_size: int = 16
    """Of the evaluations."""
    resumed: tuple[int, ...] = ()
    """Seeds whose training was interrupted, so that their speed is unknown."""
    setting: str = ""
    """Part of the method's configuration, by default the label: arms with the same one have the same method."""
    rl: Learning | None = None
    """How reinforcement learning went; None: supervised fine-tuning."""


@dataclass
class Synthetic:
    """A store, its view and the truth behind it."""

    store: Store
    view: StudyView
    truths: dict[str, Truth]


def build_synthetic(
    root: Path,
    truths: list[Truth],
    *,
    items: int = 200,
    seed: int = 0,
    unscored: float = 0.0,
    with_base: bool = True,
    corpus: bool = True,
    refused: tuple[Refusal, ...] = (),
    dtype: str = "float32",
    names: dict[str, str] | None = None,
    every_save_point: bool = False,
    passage: int = 1,
) -> Synthetic:
    """Write a study with ``items`` items per task into ``root`` and return its view.

    ``names``: what a task's card calls it, where that is not its name in the study.
    ``passage``: how many items share a passage, and with it most of their difficulty.
    """
    store = Store(root)
    tasks = [*RETENTION, *([CORPUS] if corpus else [])]
    retention = tuple(EvalSpec(task=TaskSpec(name=name), items=items) for name in tasks)
    base = RunSpec(model=ModelSpec(name="micro", dtype=dtype), method=MethodSpec(name="none"))
    arms = tuple(
        Arm(truth.label, tuple(_run(truth, number, dtype) for number in truth.seeds), _target(truth.target, items))
        for truth in truths
    )
    view = StudyView(
        "synthetic", base, arms, retention, "A synthetic study", "Made up for a test.", refused, every_save_point
    )
    world = _World(np.random.default_rng(seed), items, unscored, dtype, names or {}, passage)
    if with_base:
        directory = store.run(base)
        directory.create()
        for spec in (*view.targets, *retention):
            directory.write_evaluation(directory.point(0), world.answer(base.run_id, 0, spec, 0.0, 0.0))
        directory.write_cost(_costs(base.run_id, "inference", latency=1.0))
    for truth, arm in zip(truths, arms, strict=True):
        for run in arm.runs:
            _write_run(store, truth, run, arm.target, retention, world)
    return Synthetic(store, view, {truth.label: truth for truth in truths})


def _target(name: str, items: int) -> EvalSpec:
    return EvalSpec(task=TaskSpec(name=name), items=items)


def _run(truth: Truth, seed: int, dtype: str = "float32") -> RunSpec:
    task, schedule = TaskSpec(name=truth.target), Schedule(steps=200)
    return RunSpec(
        model=ModelSpec(name="micro", dtype=dtype),  # type: ignore[arg-type]
        method=MethodSpec(name=truth.method, config={"rank": 8, "label": truth.setting or truth.label}),
        train=TrainSpec(task=task, schedule=schedule, learning_rate=truth.learning_rate)
        if truth.rl is None
        else rl_spec(truth.rl, task, schedule, truth.learning_rate, seed),
        seed=seed,
    )


class _World:
    """Item difficulties, the same for every run."""

    def __init__(
        self, rng: np.random.Generator, items: int, unscored: float, dtype: str, names: dict[str, str], passage: int
    ) -> None:
        self.rng = rng
        self.items = items
        self.unscored = unscored
        self.dtype = dtype
        self.names = names
        self.passage = passage
        self.difficulty: dict[str, np.ndarray] = {}

    def answer(
        self, run_id: str, step: int, spec: EvalSpec, change: float, spread: float, batch_size: int = 16
    ) -> EvaluationRecord:
        name = spec.task.name
        if name not in self.difficulty:
            self.difficulty[name] = self.rng.normal(size=self.items)
            if self.passage > 1:
                passages = self.rng.normal(size=self.items)[np.arange(self.items) // self.passage]
                self.difficulty[name] = np.sqrt(0.2) * self.difficulty[name] + np.sqrt(0.8) * passages
        shared, own = self.difficulty[name], self.rng.normal(size=self.items)
        change = change + spread * self.rng.normal()
        if name == CORPUS:
            values = 2.5 + 0.4 * shared + change + 0.02 * own
            weights = np.round(np.exp(4 + 0.5 * shared))
            card = _card(name, "cross_entropy", "nats/token", "lower", None)
        else:
            level = np.clip(BASE_LEVEL.get(name, 0.03) + change, 0.0, 1.0)
            latent = stats.norm.cdf(np.sqrt(0.85) * shared + np.sqrt(0.15) * own)
            values, weights = (latent < level).astype(float), np.ones(self.items)
            card = _card(name, "accuracy", "fraction", "higher", CHANCE.get(name, 0.01))
        lost = self.rng.random(self.items) < self.unscored
        records = tuple(
            ItemRecord(
                id=f"{name}-{place}",
                value=None if lost[place] else float(values[place]),
                weight=float(weights[place]),
                reason="no answer in the output" if lost[place] else "",
                group=f"passage {place // self.passage}" if self.passage > 1 else "",
                others={"bits": (1.0, 2.0)} if name == CORPUS and not lost[place] else {},
            )
            for place in range(self.items)
        )
        headline = card["metrics"][0]
        mean = Measure(
            metric=headline["name"],
            value=float(np.average(values[~lost], weights=weights[~lost])),
            unit=headline["unit"],
            better=headline["better"],
            how="synthetic",
            n=int((~lost).sum()),
            unscored=int(lost.sum()),
        )
        return EvaluationRecord(
            run_id=run_id,
            step=step,
            factor=1.0,
            spec=spec,
            card={**card, "name": self.names.get(name, name)},
            metrics=(mean,),
            items=records,
            engine={"engine": "scripted", "batch_size": batch_size, "dtype": self.dtype},
            provenance=PROVENANCE,
        )


def _card(name: str, metric: str, unit: str, better: str, chance: float | None) -> dict[str, object]:
    return {
        "name": name,
        "title": name.capitalize(),
        "version": 1,
        "metrics": [{"name": metric, "unit": unit, "better": better}],
        "chance": chance,
    }


def _write_run(
    store: Store, truth: Truth, run: RunSpec, target: EvalSpec, retention: tuple[EvalSpec, ...], world: _World
) -> None:
    if run.seed in truth.untrained:
        return
    directory = store.run(run)
    directory.create()
    if run.seed in truth.failed:
        directory.event("failed", stage="train", reason=truth.failed[run.seed])
        return
    steps = 200
    first, last = 3.2, 2.6 - 2.4 * truth.gain
    log = tuple(
        LogEntry(
            step=step,
            tokens=step * 300,
            loss=last + (first - last) * float(np.exp(-step / 40)) + 0.05 * float(world.rng.normal()),
            validation_loss=last + 0.1 + (first - last) * float(np.exp(-step / 40)) if step % 50 == 0 else None,
            learning_rate=truth.learning_rate,
        )
        for step in range(5, steps + 1, 5)
    )
    record = TrainingRecord(
        run_id=run.run_id,
        steps=steps,
        tokens=60_000,
        padded_tokens=64_000,
        examples=1600,
        dropped=0,
        log=log,
        save_points=(*truth.save_points, steps),
        resumed_at=60 if run.seed in truth.resumed else None,
        provenance=PROVENANCE,
    )
    directory.write_training(record if truth.rl is None else rl_training(truth.rl, record, run, world.rng))
    for step in (steps, *truth.save_points):
        _evaluate(directory, truth, step, step / steps, target, retention, world)
    costs = {"parameters": truth.parameters, "memory": truth.memory + 1e6 * run.seed}
    trained = _costs(run.run_id, "training", resumed=run.seed in truth.resumed, **costs)
    directory.write_cost(trained if truth.rl is None else rl_costs(trained))
    directory.write_cost(_costs(run.run_id, "inference", latency=1.05))


def _evaluate(
    directory: RunDirectory,
    truth: Truth,
    step: int,
    done: float,
    target: EvalSpec,
    retention: tuple[EvalSpec, ...],
    world: _World,
) -> None:
    """Write the evaluations of a run at one step, when a share of all changes is ``done``."""
    changes = [(target, truth.gain, truth.spread)]
    changes += [
        (spec, truth.corpus if spec.task.name == CORPUS else truth.forget, truth.spread / 2)
        for spec in retention
        if directory.spec.seed not in truth.skipped.get(spec.task.name, ())
    ]
    for spec, change, spread in changes:
        record = world.answer(directory.run_id, step, spec, done * change, spread, truth.batch_size)
        directory.write_evaluation(directory.point(step), record)


def _costs(run_id: str, stage: str, resumed: bool = False, **values: float) -> CostRecord:
    measures = []
    if "parameters" in values:
        measures += [
            _measure("trained_parameters", values["parameters"], "parameters", "lower", "counted"),
            _measure("peak_memory_training", values["memory"], "bytes", "lower", "measured, peak resident set"),
            _measure("training_time", 24.0, "seconds", "lower", "measured"),
            _measure("training_speed", None, "tokens/second", "higher", "the training was interrupted")
            if resumed
            else _measure("training_speed", 2500.0, "tokens/second", "higher", "real tokens over time"),
            _measure("training_flops", 3.1e13, "FLOPs", "lower", "counted"),
            _measure("checkpoint_bytes", 4 * values["parameters"], "bytes", "lower", "size of the adapter file"),
        ]
    if "latency" in values:
        measures += [
            _measure("time_per_token", 0.01 * values["latency"], "seconds/token", "lower", "median of 20"),
            _measure("time_per_token_base", 0.01, "seconds/token", "lower", "median of 20"),
        ]
    return CostRecord(run_id=run_id, stage=stage, measures=tuple(measures), provenance=PROVENANCE)  # type: ignore[arg-type]


def _measure(metric: str, value: float | None, unit: str, better: str, how: str) -> Measure:
    return Measure(metric=metric, value=value, unit=unit, better=better, how=how, n=int(value is not None))  # type: ignore[arg-type]
