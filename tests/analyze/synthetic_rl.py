"""Records of reinforcement learning as a training would write them, with curves that are known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from peft_arena.core.measure import Measure
from peft_arena.core.specs import InitFrom, RLSpec, RunSpec, Schedule, TaskSpec
from peft_arena.store.records import (
    CostRecord,
    LogEntry,
    RolloutEntry,
    Rollouts,
    SampledCompletion,
    SampledGroup,
    Start,
    TrainingRecord,
)

GROUP, STEPS = 8, 200


@dataclass(frozen=True)
class Learning:
    """Start and end of what is logged; each moves on a saturating curve between the two, with noise."""

    objective: str = "grpo"
    reward: tuple[float, float] = (0.15, 0.75)
    validation: tuple[float, float] | None = (0.12, 0.7)
    """None: no validation items."""
    length: tuple[float, float] = (24.0, 18.0)
    ended: tuple[float, float] = (0.9, 0.98)
    entropy: tuple[float, float] = (1.1, 0.4)
    kl: tuple[float, float] | None = (0.0, 0.15)
    """None: not measured."""
    zero_variance: tuple[float, float] = (0.35, 0.5)
    unscored: float = 0.0
    noise: float = 0.01
    entries: int = 40
    """Logged points; 0: nothing was logged."""
    texts: tuple[str, ...] = ("the answer is 42", "I do not know", "42")
    """Completions of the sample rollouts, in turn."""
    prompt: str = "What is 40 + 2?"
    init_from: tuple[RunSpec, ...] = ()
    """Run that each seed begins at, by position of the seed."""


def rl_spec(learning: Learning, task: TaskSpec, schedule: Schedule, rate: float, seed: int) -> RLSpec:
    """Return how a run is trained."""
    start = learning.init_from[seed % len(learning.init_from)] if learning.init_from else None
    return RLSpec(
        task=task,
        schedule=schedule,
        learning_rate=rate,
        objective=learning.objective,  # type: ignore[arg-type]
        group_size=GROUP,
        kl=0.0 if learning.kl is None else 0.02,
        init_from=None if start is None else InitFrom(run=start),
    )


def rl_training(learning: Learning, record: TrainingRecord, run: RunSpec, rng: np.random.Generator) -> TrainingRecord:
    """Return the record of a training with the curves and sample rollouts of ``learning``."""
    steps = np.linspace(0, STEPS, learning.entries + 1).round().astype(int)[1:] if learning.entries else []
    log = [] if learning.validation is None else [_entry(0, learning, None, rng)]
    log += [_entry(int(step), learning, _rollout(int(step), learning, rng), rng) for step in steps]
    if not learning.entries:
        log = []
    done = 64 * STEPS
    assert run.train is not None
    start = run.train.init_from if isinstance(run.train, RLSpec) else None
    return record.model_copy(
        update={
            "log": tuple(log),
            "rollouts": Rollouts(
                engine={"name": "transformers"},
                completions=done,
                groups=done // GROUP,
                prompt_tokens=done * 20,
                generated_tokens=done * 20,
                unscored=round(learning.unscored * done),
                rollout_seconds=90.0,
                scoring_seconds=4.0,
                update_seconds=60.0,
                samples=tuple(_group(step, place, learning) for step in (0, 100, 199) for place in range(2)),
            ),
            "start": None
            if start is None
            else Start(run_id=start.run.run_id, step=STEPS, how="merged in float32", sha256="0" * 64),
        }
    )


def _at(step: int, ends: tuple[float, float], noise: float, rng: np.random.Generator) -> float:
    done = (1 - np.exp(-step / 50)) / (1 - np.exp(-STEPS / 50))
    return float(ends[0] + (ends[1] - ends[0]) * done + noise * rng.normal())


def _share(step: int, ends: tuple[float, float], noise: float, rng: np.random.Generator) -> float:
    return float(np.clip(_at(step, ends, noise, rng), 0.0, 1.0))


def _entry(step: int, learning: Learning, rollout: RolloutEntry | None, rng: np.random.Generator) -> LogEntry:
    held = learning.validation if step % 50 == 0 else None
    return LogEntry(
        step=step,
        tokens=step * 2000,
        loss=None if rollout is None else 0.02 * float(rng.normal()),
        learning_rate=None if rollout is None else 1e-5,
        rollout=rollout,
        validation_reward=None if held is None else _share(step, held, learning.noise, rng),
    )


def _rollout(step: int, learning: Learning, rng: np.random.Generator) -> RolloutEntry:
    noise = learning.noise
    reward = _at(step, learning.reward, 2 * noise, rng)
    return RolloutEntry(
        reward=reward,
        reward_std=0.4,
        rewards={"task": reward, "format": 0.5},
        unscored=learning.unscored,
        length=max(_at(step, learning.length, 20 * noise, rng), 1.0),
        ended=_share(step, learning.ended, noise, rng),
        zero_variance=_share(step, learning.zero_variance, noise, rng),
        entropy=max(_at(step, learning.entropy, noise, rng), 1e-4),
        clip_low=0.01,
        clip_high=_share(step, (0.01, 0.04), noise / 4, rng),
        kl=None if learning.kl is None else max(_at(step, learning.kl, noise / 5, rng), 0.0),
        completions=320,
        generated_tokens=6400,
        rollout_seconds=2.2,
        update_seconds=1.5,
    )


def _group(step: int, place: int, learning: Learning) -> SampledGroup:
    completions = tuple(
        SampledCompletion(
            text=learning.texts[(number + place) % len(learning.texts)],
            tokens=12,
            ended=number % 4 != 3,
            reward=float(number % 2),
            rewards={"task": float(number % 2), "format": 0.5},
            advantage=-1.0 if number % 2 == 0 else 1.0,
            extracted="42" if number % 2 else "",
            reason="" if number % 2 else "no number in the answer",
        )
        for number in range(GROUP)
    )
    return SampledGroup(step=step, item=f"sum-{place}", prompt=learning.prompt, answer="42", completions=completions)


def rl_costs(record: CostRecord) -> CostRecord:
    """Return the cost record of a training with what its rollouts cost."""
    found = (
        ("generated_tokens", 256_000.0, "tokens", "neither"),
        ("rollout_time", 90.0, "seconds", "lower"),
        ("scoring_time", 4.0, "seconds", "lower"),
        ("update_time", 60.0, "seconds", "lower"),
        ("rollout_speed", 2844.0, "tokens/second", "higher"),
        ("rollout_flops", 4e12, "FLOPs", "lower"),
    )
    measures = tuple(
        Measure(metric=metric, value=value, unit=unit, better=better, how="made up", n=1)  # type: ignore[arg-type]
        for metric, value, unit, better in found
    )
    return record.model_copy(update={"measures": (*record.measures, *measures)})
