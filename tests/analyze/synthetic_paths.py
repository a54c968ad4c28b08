"""Runs with scans of known truth: accuracies along a path are given, answers are drawn, the choice is the real one.

An item is answered right if a latent number is below the accuracy: the item's difficulty, shared by all, plus noise of
the run and a little of the point. So points of one run agree on most items, as real ones do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from scipy import stats

from peft_arena.analyze.paths import choose
from peft_arena.analyze.view import Arm, StudyView
from peft_arena.core.measure import Measure
from peft_arena.core.paths import ScanSpec
from peft_arena.core.specs import OWN, EvalSpec, MethodSpec, ModelSpec, PathSpec, RunSpec, Schedule, TaskSpec, TrainSpec
from peft_arena.store.records import EvaluationRecord, ItemRecord, PathRecord, Strength, TrainingRecord
from peft_arena.store.store import RunDirectory, Store
from tests.analyze.synthetic import PROVENANCE

TARGET, RETENTION, CORPUS = "sums", ("facts", "logic"), "corpus"
BASE = {TARGET: 0.2, "facts": 0.7, "logic": 0.85}
GRID = tuple(round(0.1 * step, 1) for step in range(1, 11))
STEPS = 200
Curve = Callable[[float], float]


def saturating(most: float, at: float = 0.4) -> Curve:
    """Return a gain that is complete at a factor and stays."""
    return lambda factor: most * min(1.0, factor / at)


def straight(most: float) -> Curve:
    """Return a change in proportion to the factor."""
    return lambda factor: most * factor


GAIN, FORGET = saturating(0.4), straight(-0.3)


@dataclass(frozen=True)
class Walk:
    """What is true along the paths of one arm: changes of accuracy, as fractions, from the pretrained model."""

    label: str
    gain: Curve = GAIN
    forget: Curve = FORGET
    method: str = "lora"
    seeds: tuple[int, ...] = (0,)
    paths: tuple[PathSpec, ...] = (OWN,)
    grid: tuple[float, ...] = GRID
    save_points: tuple[int, ...] = ()
    unscanned: tuple[int, ...] = ()
    """Seeds that are trained and have no scan."""
    untrained: tuple[int, ...] = ()
    unscored: float = 0.0
    forced: dict[int, float | None] = field(default_factory=dict)
    """Seed to the factor that is recorded as chosen, whatever the validation items say."""


@dataclass
class Walked:
    """A store with scanned runs, its view and the truth."""

    store: Store
    view: StudyView
    world: World
    scans: dict[tuple[str, int], ScanSpec] = field(default_factory=dict)
    """Label and number of the path to its scan."""


class World:
    """Difficulties of the items, the same for every run."""

    def __init__(self, seed: int, validation: int, test: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.counts = {"validation": validation, "test": test}
        self.difficulty: dict[tuple[str, str], np.ndarray] = {}
        self.of_run: dict[tuple[str, str, str], np.ndarray] = {}

    def specs(self, split: str) -> tuple[EvalSpec, ...]:
        """Return the evaluations on one split, the target first."""
        names = (TARGET, *RETENTION, CORPUS)
        return tuple(EvalSpec(task=TaskSpec(name=n), split=split, items=self.counts[split]) for n in names)  # type: ignore[arg-type]

    def answer(
        self, run_id: str, step: int, factor: float, path: PathSpec, spec: EvalSpec, change: float, unscored: float
    ) -> EvaluationRecord:
        """Draw the answers of a point whose accuracy on the task is changed by so much."""
        name, count = spec.task.name, self.counts[spec.split]
        for table, key in ((self.difficulty, (name, spec.split)), (self.of_run, (run_id, name, spec.split))):
            if key not in table:
                table[key] = self.rng.normal(size=count)
        shared, own = self.difficulty[name, spec.split], self.of_run[run_id, name, spec.split]
        point = self.rng.normal(size=count)
        if name == CORPUS:
            values, metric = 2.5 + 0.4 * shared - change + 0.01 * point, ("cross_entropy", "nats/token", "lower")
        else:
            latent = stats.norm.cdf(np.sqrt(0.8) * shared + np.sqrt(0.1) * own + np.sqrt(0.1) * point)
            values = (latent < np.clip(BASE[name] + change, 0, 1)).astype(float)
            metric = ("accuracy", "fraction", "higher")
        lost = self.rng.random(count) < unscored
        items = tuple(
            ItemRecord(
                id=f"{name}-{spec.split}-{place}",
                value=None if lost[place] else float(values[place]),
                reason="no answer" if lost[place] else "",
            )
            for place in range(count)
        )
        headline = dict(zip(("name", "unit", "better"), metric, strict=True))
        mean = Measure(
            metric=metric[0],
            value=float(values[~lost].mean()) if (~lost).any() else None,
            unit=metric[1],
            better=metric[2],  # type: ignore[arg-type]
            how="synthetic",
            n=int((~lost).sum()),
            unscored=int(lost.sum()),
        )
        return EvaluationRecord(
            run_id=run_id,
            step=step,
            factor=factor,
            path=path,
            spec=spec,
            card={"name": name, "title": name, "metrics": [headline], "chance": None},
            metrics=(mean,),
            items=items,
            engine={"engine": "scripted", "batch_size": 16, "dtype": "float32"},
            provenance=PROVENANCE,
        )


def build_walks(root: Path, walks: list[Walk], *, validation: int = 100, test: int = 200, seed: int = 0) -> Walked:
    """Write runs with their scans, as a study would."""
    store, world = Store(root), World(seed, validation, test)
    claims, chooses = world.specs("test"), world.specs("validation")
    base = RunSpec(model=ModelSpec(name="micro"), method=MethodSpec(name="none"))
    directory = store.run(base)
    directory.create()
    for spec in (*claims, *chooses):
        directory.write_evaluation(directory.point(0), world.answer(base.run_id, 0, 1.0, OWN, spec, 0.0, 0.0))
    arms, paths, scans = [], {}, {}
    for walk in walks:
        runs = tuple(_run(walk, number) for number in walk.seeds)
        arms.append(Arm(walk.label, runs, claims[0]))
        asked = tuple(
            ScanSpec(
                path=path,
                grid=walk.grid,
                choose_on=chooses,
                claim_on=claims,
                save_points=bool(walk.save_points),
            )
            for path in walk.paths
        )
        scans |= {(walk.label, place): scan for place, scan in enumerate(asked)}
        for run in runs:
            paths[run.run_id] = asked
            _write(store.run(run), base, store, walk, asked, world)
    view = StudyView("walks", base, tuple(arms), claims[1:], "Walks", paths=paths)
    return Walked(store, view, world, scans)


def _run(walk: Walk, seed: int) -> RunSpec:
    return RunSpec(
        model=ModelSpec(name="micro"),
        method=MethodSpec(name=walk.method, config={"label": walk.label}),
        train=TrainSpec(task=TaskSpec(name=TARGET), schedule=Schedule(steps=STEPS), learning_rate=1e-3),
        seed=seed,
    )


def _write(
    directory: RunDirectory, base: RunSpec, store: Store, walk: Walk, scans: tuple[ScanSpec, ...], world: World
) -> None:
    seed = directory.spec.seed
    directory.create()
    if seed in walk.untrained:
        return
    directory.write_training(
        TrainingRecord(
            run_id=directory.run_id,
            steps=STEPS,
            tokens=1000,
            padded_tokens=1000,
            examples=100,
            dropped=0,
            log=(),
            save_points=(*walk.save_points, STEPS),
            provenance=PROVENANCE,
        )
    )

    def evaluate(step: int, factor: float, path: PathSpec, spec: EvalSpec, done: float = 1.0) -> EvaluationRecord:
        point = directory.point(step, factor, path)
        found = directory.evaluation(point, spec)
        if found is None:
            bend = 1.0 if path == OWN else 1.3  # the other paths forget more for the same factor
            at = factor * done
            change = walk.gain(at) if spec.task.name == TARGET else walk.forget(at) * (bend if factor != 1 else 1.0)
            found = world.answer(directory.run_id, step, factor, point.path, spec, change, walk.unscored)
            directory.write_evaluation(point, found)
        return found

    for scan in scans:
        tuned = [evaluate(STEPS, 1.0, OWN, spec) for spec in scan.choose_on]
        _ = [evaluate(STEPS, 1.0, OWN, spec) for spec in scan.claim_on]
        for step in walk.save_points:
            _ = [evaluate(step, 1.0, OWN, spec, step / STEPS) for spec in scan.choose_on]
        if seed in walk.unscanned:
            continue
        origin = store.run(base)
        points = {
            factor: [
                origin.evaluation(origin.point(0), spec) if factor == 0 else evaluate(STEPS, factor, scan.path, spec)
                for spec in scan.choose_on
            ]
            for factor in scan.grid
        }
        choice = choose(scan, tuned, points)  # type: ignore[arg-type]
        choice = replace(choice, chosen=walk.forced.get(seed, choice.chosen))
        if choice.chosen is not None:
            _ = [evaluate(STEPS, choice.chosen, scan.path, spec) for spec in scan.claim_on]
        kept = choice.chosen or 1.0
        record = PathRecord(
            run_id=directory.run_id,
            step=STEPS,
            spec=scan,
            chosen=choice.chosen,
            reason=choice.reason,
            rows=choice.rows,
            strengths=()
            if choice.chosen is None
            else tuple(
                Strength(block=block, tuned=0.02 * (1 + block) ** 1.5, chosen=kept * 0.02 * (1 + block) ** 1.5)
                for block in range(6)
            ),
            expressed="adapter",
            orthogonality=1e-7 if walk.method == "oft" else None,
            provenance=PROVENANCE,
        )
        directory.write_scan(directory.point(STEPS), record)
