"""Every loss and every scaling of advantages equals a scalar reference, over several updates of one rollout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_arena.core.specs import RLSpec, Schedule
from peft_arena.testing import rl_practice
from peft_arena.testing.rl_practice import LIMIT, Done, gradients, in_float64, practice_spec, practise
from peft_arena.testing.trial import Life, Trial
from peft_arena.train.rl_trainer import KL_LOG_PROBS

STEPS = 4
"""Two passes over a rollout of two steps."""


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Life:
    torch.set_num_threads(1)
    return Life(Trial("lora").plain, tmp_path_factory.mktemp("lora"))


@dataclass
class Row:
    """One completion, one token at a time."""

    ids: list[int]
    length: int
    kept: bool
    advantage: float
    reference: list[float]
    old: list[float]
    reward: float


def attached(life: Life, double: bool = True) -> Any:
    found = life.twin()
    found.begin(STEPS)
    if double:
        found.model.double()
    return found


def said(model: Any, ids: list[int], length: int, temperature: float) -> list[torch.Tensor]:
    logits = model(input_ids=torch.tensor([ids])).logits[0] / temperature
    first = len(ids) - length
    return [logits[place - 1].log_softmax(-1)[ids[place]] for place in range(first, len(ids))]


def rows_of(done: Done, spec: RLSpec, policy: Any, base: Any) -> list[Row]:
    """Return the completions in the order of training; those that are masked are found by their advantage's place."""
    asked = [prompt for prompt in rl_practice.prompts() for _ in range(spec.group_size)]
    written = [(prompt, one, value) for prompt, one, value in zip(asked, done.written, done.rewards, strict=True)]
    found = []
    for batch in done.batches:
        for place in range(len(batch["advantages"])):
            mask = batch["completion_mask"][place].bool()
            padded = batch["completion_ids"][place].tolist()
            prompt = batch["prompt_ids"][place][batch["prompt_mask"][place].bool()].tolist()
            (_, one, value) = next(
                entry for entry in written if entry[0] == prompt and padded[: len(entry[1].ids)] == entry[1].ids
            )
            kept = spec.truncated == "keep" or one.ended
            assert mask.sum() == (len(one.ids) if kept else 0)
            ids, length = prompt + one.ids, len(one.ids)
            with torch.no_grad():
                old = [float(x) for x in said(policy, ids, length, spec.temperature)]
                reference = [float(x) for x in said(base, ids, length, spec.temperature)]
            found.append(Row(ids, length, kept, float(batch["advantages"][place]), reference, old, value))
            if spec.kl:
                measured = batch[KL_LOG_PROBS][place][mask].tolist()
                assert measured == pytest.approx(reference[: len(measured)], abs=1e-6)
    return found


def expected_advantages(rows: list[Row], spec: RLSpec) -> list[float]:
    """Return the advantage of each row, in whatever order; groups are told by their prompts."""
    values = [
        row.reward - spec.kl * sum(o - r for o, r in zip(row.old, row.reference, strict=True))
        if spec.objective == "rloo"
        else row.reward
        for row in rows
    ]
    groups = [[v for v, other in zip(values, rows, strict=True) if prompt(other) == prompt(row)] for row in rows]
    if spec.objective == "rloo":
        return [v - (sum(group) - v) / (len(group) - 1) for v, group in zip(values, groups, strict=True)]
    spread = {
        "group": [float(torch.tensor(group).std()) for group in groups],
        "batch": [float(torch.tensor(values).std())] * len(rows),
        "none": [1.0 - 1e-4] * len(rows),
    }[spec.advantage_scale]
    return [(v - sum(group) / len(group)) / (s + 1e-4) for v, group, s in zip(values, groups, spread, strict=True)]


def prompt(row: Row) -> list[int]:
    return row.ids[: -row.length]


def pass_loss(rows: list[Row], model: Any, spec: RLSpec, tokens: int, clipped: list[bool]) -> Any:
    """Return the loss of one forward pass, before it is divided by the passes of a step."""
    sums, total = [], 0
    for row in rows:
        new = said(model, row.ids, row.length, spec.temperature)
        if spec.objective == "rloo":
            change = sum(new[1:], new[0]) - sum(row.old)
            sums.append(-surrogate((change * row.kept).exp(), row.advantage, spec, clipped))
            continue
        inside: Any = 0.0 * new[0]
        for now, old, reference in zip(new, row.old, row.reference, strict=True):
            ratio = (now - old).exp()
            divergence = (reference - now).exp() - (reference - now) - 1
            inside = inside - surrogate(ratio, row.advantage, spec, clipped) + spec.kl * ratio * divergence
        total += row.length * row.kept
        inside = inside * row.kept
        sums.append(inside / row.length if spec.loss == "grpo" else inside)
    whole = sum(sums[1:], sums[0])
    if spec.objective == "rloo" or spec.loss == "grpo":
        return whole / len(rows)
    if spec.loss == "bnpo":
        return whole / max(total, 1)
    if spec.loss == "dr_grpo":
        return whole / (len(rows) * LIMIT)
    passes_of_rollout = spec.rollout_size // (spec.micro_batch_size or spec.batch_size)
    return whole / (tokens / passes_of_rollout)


def surrogate(ratio: torch.Tensor, advantage: float, spec: RLSpec, clipped: list[bool]) -> torch.Tensor:
    bounded = ratio.clamp(1 - spec.clip_low, 1 + spec.clip_high)
    clipped.append(bool(bounded * advantage < ratio * advantage))
    return torch.minimum(ratio * advantage, bounded * advantage)


VARIANTS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "bnpo": {"loss": "bnpo"},
    "dr_grpo": {"loss": "dr_grpo", "advantage_scale": "none"},
    "dapo": {"loss": "dapo", "advantage_scale": "batch", "clip_high": 0.05},
    "dapo without divergence": {"loss": "dapo", "kl": 0.0},
    "rloo": {"objective": "rloo"},
    "rloo without divergence": {"objective": "rloo", "kl": 0.0},
    "grpo, masked": {"truncated": "mask"},
    "dapo, masked": {"loss": "dapo", "truncated": "mask"},
    "rloo, masked": {"objective": "rloo", "truncated": "mask"},
    "whole steps": {"micro_batch_size": None, "loss": "bnpo"},
    "norm": {"max_grad_norm": 1e-3},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_updates_equal_the_reference(life: Life, tmp_path: Path, name: str) -> None:
    spec = practice_spec(**{"schedule": Schedule(steps=STEPS), "updates_per_rollout": 2, **VARIANTS[name]})
    assert spec.steps_per_rollout == STEPS
    first, second, base = attached(life), attached(life), life.subject.model().double()
    with in_float64():
        done = practise(first, first.optimizer(5e-3, 0.0), spec, "float64", tmp_path)
        rows = rows_of(done, spec, second.model, base)
        found = [row.advantage for row in rows]
        assert found == pytest.approx(expected_advantages(rows, spec), rel=1e-6, abs=1e-6)
        assert {row.kept for row in rows} == ({True, False} if spec.truncated == "mask" else {True})
        optimizer = second.optimizer(5e-3, 0.0)
        size, loss, clipped = spec.micro_batch_size or spec.batch_size, 0.0, []
        tokens = sum(row.length for row in rows if row.kept)
        second.model.train()
        for step in range(STEPS):
            begin = step % 2 * spec.batch_size
            for start in range(begin, begin + spec.batch_size, size):
                part = pass_loss(rows[start : start + size], second.model, spec, tokens, clipped)
                (part * size / spec.batch_size).backward()
                loss += float(part.detach()) * size / spec.batch_size / STEPS
            torch.nn.utils.clip_grad_norm_(second.trained().values(), spec.max_grad_norm)
            wanted = gradients(second)
            largest = max(float(one.abs().max()) for one in wanted.values())
            assert largest > 0 or step > 0
            for key, gradient in wanted.items():
                torch.testing.assert_close(done.gradients[step][key], gradient, rtol=0, atol=1e-6 * largest)
            optimizer.step()
            optimizer.zero_grad()
        assert 0 < sum(clipped) < len(clipped), "no ratio was clipped, or all"
        assert done.loss == pytest.approx(loss, abs=1e-6)
        for key, parameter in second.trained().items():
            torch.testing.assert_close(first.trained()[key], parameter, rtol=0, atol=1e-6)
