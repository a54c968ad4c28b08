"""Sampled evaluations with known chances of a right answer, added to a synthetic study."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from peft_arena.core.measure import Measure
from peft_arena.core.passk import metric_name, pass_at_k
from peft_arena.core.specs import EvalSpec, Sampling
from peft_arena.store.records import EvaluationRecord, ItemRecord
from tests.analyze.synthetic import PROVENANCE, Synthetic

SAMPLING = Sampling(samples=16, k=(1, 4, 16))
ITEMS = 300


def chances() -> dict[str, np.ndarray]:
    """Chance of a right answer to each item: of the base, and of arms that sharpen, widen, improve, stay."""
    base = np.random.default_rng(5).beta(0.35, 0.9, ITEMS)
    base[:30] = 0.0
    return {
        "base": base,
        "sharpened": np.where(base > 0.25, 0.75 + 0.25 * base, 0.0),
        "widened": 0.6 * base + 0.05,
        "better": base + 0.4 * (1 - base),
        "same": base,
    }


def add_samples(made: Synthetic, known: Mapping[str, np.ndarray], *, unscored: int = 0, skip_base: bool = False):
    """Write sampled evaluations of the base and of every arm that has chances; return the study with them asked for."""
    (target,) = made.view.targets
    spec = target.model_copy(update={"sampling": SAMPLING, "items": ITEMS})
    arms = tuple(replace(arm, sampled=spec) for arm in made.view.arms)
    store = made.store
    if not skip_base:
        base = store.run(made.view.base)
        base.write_evaluation(base.point(0), _record(base.run_id, 0, spec, known["base"], 90, unscored))
    for arm in arms:
        for run in arm.runs:
            directory = store.run(run)
            training = directory.training()
            if arm.label in known and training is not None:
                found = _record(run.run_id, training.steps, spec, known[arm.label], run.seed + 91, 0)
                directory.write_evaluation(directory.point(training.steps), found)
    return replace(made, view=replace(made.view, arms=arms))


def _record(run_id: str, step: int, spec: EvalSpec, known: np.ndarray, seed: int, unscored: int) -> EvaluationRecord:
    rng = np.random.default_rng(seed)
    n = SAMPLING.samples
    items = []
    for number, chance in enumerate(known):
        if number < unscored:
            items.append(ItemRecord(id=f"item-{number}", value=None, reason="made up", outputs=("",) * n))
            continue
        right = int(rng.binomial(n, chance))
        others = {metric_name(k): (pass_at_k(n, right, k), 1.0) for k in SAMPLING.k}
        items.append(ItemRecord(id=f"item-{number}", value=right / n, others=others, outputs=("x",) * n))
    scored = [item.value for item in items if item.value is not None]
    mean = Measure(
        metric="accuracy", value=float(np.mean(scored)) if scored else None, unit="fraction", better="higher",
        how="synthetic", n=len(scored), unscored=unscored,
    )  # fmt: skip
    card = {"name": spec.task.name, "title": spec.task.name, "metrics": [], "chance": None}
    return EvaluationRecord(
        run_id=run_id, step=step, factor=1.0, spec=spec, card=card, metrics=(mean,), items=tuple(items),
        engine={"batch_size": 16, "dtype": "float32"}, provenance=PROVENANCE,
    )  # fmt: skip
