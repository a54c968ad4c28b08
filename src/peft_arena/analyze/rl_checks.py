"""What a researcher would look at in a reinforcement learning: thresholds, and the numbers that passed them.

A warning states what was measured in which runs and the threshold it passed. It is a reason to look, not a verdict; the
thresholds are conventions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from typing import NamedTuple

import numpy as np

from peft_arena.analyze.rl_curves import TENTH, RLArm, RLRun, ends_of
from peft_arena.store.records import RolloutEntry

COLLAPSED = 0.1
"""Entropy at the end over that of the first log entry, below which a warning is given."""
NO_SIGNAL, EARLY = 0.9, 0.2
"""Share of groups without any difference in reward, over which share of the training, that a warning is given above."""
ERRORS = 2.0
"""Standard errors, over groups, that a reward must rise by to be called risen."""
CEILING = 0.95
"""Validation reward at the end from which on a fall is not warned of."""
_TASK = "task"
"""The reward that is the task's own score, in [0, 1], as the validation reward is."""
TRUNCATED = 0.5
"""Share of completions that end by themselves, below which a warning is given if it was higher at the start."""
FAR = 1.0
"""Nats per token from the reference above which a warning is given."""
UNSCORED = 0.01
"""Share of completions without a score above which a warning is given."""


@dataclass(frozen=True)
class Warned:
    """Something about the training of an arm that a researcher would look at."""

    arm: str
    check: str
    title: str
    """What passed which threshold."""
    seeds: tuple[int, ...]
    """Of the runs it was found in."""
    runs: int
    """Finished runs of the arm."""
    numbers: str
    """What was measured in each of the runs."""
    meaning: str

    @property
    def text(self) -> str:
        """The warning in one line, the numbers before what they may mean."""
        return f"{self.found}. {self.numbers}. {self.meaning}"

    @property
    def found(self) -> str:
        """What was found in how many runs."""
        return f"{self.title} ({len(self.seeds)} of {self.runs} run{'s' if self.runs > 1 else ''})"


class Check(NamedTuple):
    """One thing to warn of."""

    name: str
    title: str
    """What was found, with the threshold."""
    meaning: str
    """What it may mean, in plain words."""
    numbers: Callable[[RLRun], str]
    """Gives what was measured in a run; empty where there is nothing to warn of."""


def _entropy(run: RLRun) -> str:
    first, ends = next(iter(run.series("entropy").values()), 0.0), run.ends("entropy")
    if ends is None or first <= 0 or ends[1] >= COLLAPSED * first:
        return ""
    return f"{first:.3g} first logged → {ends[1]:.3g} nats per token, {100 * ends[1] / first:.1f} % of it"


def _no_signal(run: RLRun) -> str:
    series = run.series("zero_variance")
    early = [value for step, value in series.items() if step <= EARLY * run.training.steps] or list(series.values())[:1]
    mean = float(np.mean(early)) if early else 0.0
    return f"{100 * mean:.1f} % of the groups over {len(early)} log entries" if mean > NO_SIGNAL else ""


def _not_held_out(run: RLRun) -> str:
    entries = run.rollouts()
    task = all(_TASK in entry.rewards for entry in entries)
    ends = ends_of([entry.rewards[_TASK] if task else entry.reward for entry in entries])
    held = run.ends("validation_reward")
    if ends is None or held is None or len(run.series("validation_reward")) < 2:
        return ""
    error = _reward_error(entries, run.spec.group_size, task=task)
    if ends[1] - ends[0] <= ERRORS * error or held[1] >= min(held[0], CEILING):
        return ""
    used = run.training.validation_items
    items = run.spec.validation_items if used is None else used
    return (
        f"{'task reward' if task else 'reward'} {ends[0]:.3g} → {ends[1]:.3g}, standard error of the rise {error:.2g}; "
        f"validation reward {held[0]:.3g} → {held[1]:.3g} on {items} items"
    )


def _reward_error(entries: Sequence[RolloutEntry], size: int, *, task: bool) -> float:
    """Return a bound on the standard error of the mean reward at the end minus that at the start.

    Completions of one prompt are alike, and how much is not in the log: a group counts as one observation.

    Args:
        entries: of new rollouts.
        size: completions of a group.
        task: bound that of the task's score, whose variance in [0, 1] is at most mean (1 - mean), and not of the sum.
    """
    share = ceil(TENTH * len(entries))
    variance = 0.0
    for part in (entries[:share], entries[-share:]):
        groups = sum(entry.completions for entry in part) / size
        spread = sum(entry.completions / size * _variance(entry, task=task) for entry in part)
        variance += spread / max(groups, 1.0) ** 2
    return sqrt(variance)


def _variance(entry: RolloutEntry, *, task: bool) -> float:
    return max(entry.rewards[_TASK] * (1 - entry.rewards[_TASK]), 0.0) if task else entry.reward_std**2


def _truncated(run: RLRun) -> str:
    ends = run.ends("ended")
    if ends is None or ends[1] >= TRUNCATED or ends[1] >= ends[0]:
        return ""
    length = run.ends("length")
    long = f", mean length {length[0]:.1f} → {length[1]:.1f} tokens" if length is not None else ""
    return f"{100 * ends[0]:.1f} % → {100 * ends[1]:.1f} % ended{long}"


def _far(run: RLRun) -> str:
    series = run.series("kl")
    if not series or max(series.values()) <= FAR:
        return ""
    steps = list(series)
    most = max(steps, key=lambda step: series[step])
    return (
        f"{series[most]:.3g} nats per token at step {most}, {series[steps[0]]:.3g} first logged, "
        f"{series[steps[-1]]:.3g} last"
    )


def _unscored(run: RLRun) -> str:
    """Count over all rollouts where the record has them, else over the log."""
    whole = run.training.rollouts
    entries = run.rollouts()
    count = whole.completions if whole is not None else sum(entry.completions for entry in entries)
    without = whole.unscored if whole is not None else round(sum(e.unscored * e.completions for e in entries))
    if not count or without <= UNSCORED * count:
        return ""
    return f"{without} of {count} completions, {100 * without / count:.1f} %"


CHECKS = (
    Check(
        "no_signal",
        f"More than {100 * NO_SIGNAL:.0f} % of the groups had equal rewards in the first {100 * EARLY:.0f} % of steps",
        "Such groups teach nothing: the task is too hard or too easy for the model at first, or groups are too small.",
        _no_signal,
    ),
    Check(
        "not_held_out",
        f"The reward rose by more than {ERRORS:g} standard errors and the validation reward fell",
        "The training prompts may have been learned by heart, or the reward can be had without a right answer: read "
        "the sample rollouts. Few validation items make the held-out value uncertain.",
        _not_held_out,
    ),
    Check(
        "entropy",
        f"Entropy fell below {100 * COLLAPSED:.0f} % of its first value",
        "The policy nearly always writes the same, so that groups hardly differ and pass@k with k above 1 may suffer.",
        _entropy,
    ),
    Check(
        "truncated",
        f"Fewer than {100 * TRUNCATED:.0f} % of the completions ended before the limit, fewer than at the start",
        "Answers are cut off: they may be growing to please the reward, or the limit is too low.",
        _truncated,
    ),
    Check(
        "kl",
        f"KL from the reference above {FAR:g} nat per token",
        "The policy is far from the reference: the learning rate may be too high, or the KL weight too low. A training "
        "that began at another run may be far from the pretrained model at once.",
        _far,
    ),
    Check(
        "unscored",
        f"More than {100 * UNSCORED:.0f} % of the completions had no score",
        "They counted as reward 0, whatever they said; the sample rollouts give the reasons.",
        _unscored,
    ),
)
"""Everything that is warned of, in the order it is shown."""


def warnings_of(arm: RLArm) -> list[Warned]:
    """Return what a researcher would look at in the runs of an arm, with the numbers."""
    found = []
    for check in CHECKS:
        numbers = {run.seed: told for run in arm.runs if (told := check.numbers(run))}
        if numbers:
            each = "; ".join(f"seed {seed}: {told}" for seed, told in numbers.items())
            each = f"{each[:1].upper()}{each[1:]}"
            found.append(Warned(arm.label, check.name, check.title, tuple(numbers), len(arm.runs), each, check.meaning))
    return found
