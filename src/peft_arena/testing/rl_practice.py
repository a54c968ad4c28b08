"""Reinforcement learning of a method on a tiny model through the arena's own trainer, and what the trainer did.

The rewards are a fixed function of a completion's tokens, so that no task is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from peft_arena.core.specs import RLSpec, Schedule, TaskSpec
from peft_arena.methods.base import Attached
from peft_arena.methods.state import seed_torch
from peft_arena.models.modes import base_of
from peft_arena.tasks.base import Score
from peft_arena.tasks.rewards import Judged
from peft_arena.testing.subject import STEPS, every_tensor, global_random_untouched, surface, tokens
from peft_arena.train.loss import TokenLoss
from peft_arena.train.policy import pretrained
from peft_arena.train.quiet import random_kept, seed_step, surface_kept
from peft_arena.train.rl_trainer import TRAINERS, RolloutTrainer, Work
from peft_arena.train.rollouts import Rollouts, Written

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GROUP = 4
"""Completions of each prompt."""
LIMIT = 5
"""Most tokens of a completion."""
STOP = ("3",)
"""Ends a completion: about a third of the words have this digit."""
SEED = 5
NOISE_SEED = 11
"""Before each forward pass in training mode."""
KINDS = 16
"""Different values of the reward."""


def prompts() -> list[list[int]]:
    """Return the token ids of two prompts, the second twice as long as the first."""
    rows, more = tokens().tolist(), tokens(seed=3).tolist()
    return [rows[0], more[0] + rows[1]]


def practice_spec(**changes: Any) -> RLSpec:
    """Return two optimizer steps on one rollout, of two passes each, with clipping and divergence."""
    settings: dict[str, Any] = {
        "objective": "grpo",
        "task": TaskSpec(name="practice", revision="none"),
        "schedule": Schedule(steps=2),
        "batch_size": GROUP,
        "micro_batch_size": GROUP // 2,
        "prompts_per_rollout": 2,
        "group_size": GROUP,
        "learning_rate": 5e-3,
        "clip_low": 0.02,
        "clip_high": 0.03,
        "kl": 0.1,
        "temperature": 0.8,
        "max_grad_norm": 1e9,
    }
    return RLSpec(**(settings | changes))


@cache
def word_tokenizer(size: int) -> PreTrainedTokenizerBase:
    """Return a tokenizer whose tokens are the words ``w0`` to ``w<size - 1>``; ``w0`` pads and ends."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{number}": number for number in range(size)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w0", unk_token="w0")


def reward(ids: Sequence[int]) -> float:
    """Return a number in [0, 1) that float32 holds exactly."""
    return sum(place * token for place, token in enumerate(ids, 1)) % KINDS / KINDS


def seeds(rollout: int, count: int) -> list[int]:
    """Return a seed for each completion of a rollout."""
    return [1000 * rollout + number for number in range(count)]


@dataclass
class Done:
    """What the trainer did."""

    loss: float = 0.0
    """Mean over the steps."""
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    """Of each trained parameter, by step."""
    moved: set[str] = field(default_factory=set)
    """Trained parameters that the optimizer changed in any step."""
    batches: list[dict[str, Tensor]] = field(default_factory=list)
    """The forward passes of the last rollout, as the trainer divided and padded it."""
    written: list[Written] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    disturbed: str = ""
    """What a rollout left unlike it was."""


class _WatchedRollouts(Rollouts):
    """Completes prompts, and sees whether that leaves model and random state as they were."""

    done: Done

    def sample(self, prompts: Sequence[list[int]], seeds: Sequence[int], step: int) -> list[Written]:
        """Sample a completion of each prompt."""
        before, modes = tensors_of(self.model), surface(self.model)
        with global_random_untouched():
            written = super().sample(prompts, seeds, step)
        if moved := changed(self.model, before):
            self.done.disturbed = f"values of {', '.join(moved[:3])}"
        elif modes != surface(self.model):
            self.done.disturbed = "modes of modules, or what trains"
        return written


def tensors_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return a copy of every parameter and buffer by name."""
    return {name: one.detach().clone() for name, one in every_tensor(model).items()}


def changed(model: torch.nn.Module, before: Mapping[str, Tensor]) -> list[str]:
    """Return the names of parameters and buffers that are not, bit for bit, what they were."""
    now = every_tensor(model)
    kept = {name for name in now if name in before and torch.equal(now[name], before[name])}
    return sorted({*now, *before} - kept)


class Watch(TrainerCallback):
    """Does what a session does at each step, and keeps the gradients."""

    def __init__(self, attached: Attached, done: Done) -> None:
        """Refer to what is trained and to where the gradients are kept."""
        self.attached = attached
        self.done = done
        self.step = 0
        self.before: dict[str, Tensor] = {}

    def on_step_begin(self, *_: object, **__: object) -> None:
        """Seed the step's random numbers."""
        seed_step(SEED, self.step)

    def on_pre_optimizer_step(self, *_: object, **__: object) -> None:
        """Keep gradients and parameters."""
        self.done.gradients.append(gradients(self.attached))
        self.before = {name: p.detach().clone() for name, p in self.attached.trained().items()}

    def on_optimizer_step(self, *_: object, **__: object) -> None:
        """See what moved, and let the method do what it needs."""
        now = self.attached.trained()
        self.done.moved |= {name for name, p in self.before.items() if not torch.equal(now[name], p)}
        self.step += 1
        self.attached.after_step(self.step, STEPS)


def gradients(attached: Attached) -> dict[str, Tensor]:
    """Return a copy of the gradient of every trained parameter; zero where there is none."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        for name, p in attached.trained().items()
    }


def practise(attached: Attached, optimizer: Optimizer, spec: RLSpec, dtype: str, directory: Path) -> Done:
    """Train by the arena's trainer, on the prompts of :func:`prompts`.

    Args:
        attached: what trains, begun; in training mode afterwards.
        optimizer: over its trained parameters.
        spec: how; its schedule is in steps, its rewards are one.
        dtype: ``bfloat16`` computes in mixed precision.
        directory: an existing directory; nothing is written there.
    """
    done = Done()
    model, given = cast("PreTrainedModel", attached.model), prompts()
    tokenizer = word_tokenizer(int(model.config.vocab_size))
    rollouts = _WatchedRollouts(model, tokenizer, spec, limit=LIMIT, stop=STOP, dtype=dtype)
    rollouts.done = done
    (name,) = [one.name for one in spec.rewards]

    def judge(_: Sequence[int], written: Sequence[Written]) -> list[Judged]:
        done.written = list(written)
        done.rewards = [reward(one.ids) for one in written]
        return [Judged(Score(value), {name: value}) for value in done.rewards]

    with (
        random_kept(),
        surface_kept(model),
        noise_fixed(attached),
        TokenLoss(model, autocast=dtype == "bfloat16", added=attached.extra_loss) as loss,
    ):
        for settings in (base_of(model).config, base_of(model).generation_config):
            settings.eos_token_id = tokenizer.eos_token_id  # or the trainer says at length that they differ
        steps = int(spec.schedule.steps or 0)
        work = Work(
            prompts=given,
            plan=[range(len(given))] * steps,
            first_step=0,
            steps=steps,
            seeds=seeds,
            rollouts=rollouts,
            judge=judge,
            reference=lambda: _reference(attached, dtype),
            measured=lambda _: True,
            loss=loss,
            attached=attached,
        )
        trainer: RolloutTrainer = TRAINERS[spec.objective](
            model=model,
            tokenizer=tokenizer,
            spec=spec,
            work=work,
            optimizer=optimizer,
            scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
            callback=Watch(attached, done),
            directory=directory,
        )
        model.train()
        done.loss = float(cast("Any", trainer).train().training_loss)
    done.batches = trainer._buffered_inputs
    model.zero_grad(set_to_none=True)
    return done


@contextmanager
def _reference(attached: Attached, dtype: str) -> Iterator[TokenLoss]:
    """Give what a session gives; in float64 also where a method keeps its start in float32."""
    with pretrained(attached, autocast=dtype == "bfloat16") as loss:
        if dtype == "float64":
            loss.model.double()
        yield loss


@contextmanager
def noise_fixed(attached: Attached) -> Iterator[None]:
    """Give each forward pass in training mode the same random numbers inside the block."""

    def seed(module: Any, _: object) -> None:
        if module.training:
            seed_torch(NOISE_SEED)

    handle = attached.model.register_forward_pre_hook(seed)
    try:
        yield
    finally:
        handle.remove()


class _Float64(TorchDispatchMode):
    """Makes float64 of what was to become float32 of another type; float64 itself so stays what it is."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Run one operation."""
        given = dict(kwargs or {})
        if args and isinstance(args[0], torch.Tensor) and func is not torch.ops.aten.view.dtype:  # bytes as numbers
            args = [torch.float64 if one is torch.float32 else one for one in args]
            given = {name: torch.float64 if one is torch.float32 else one for name, one in given.items()}
        return func(*args, **given)


@contextmanager
def in_float64() -> Iterator[None]:
    """Compute in float64 inside the block where the operands are, whatever a model casts to float32 on the way."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64():
            yield
    finally:
        torch.set_default_dtype(before)
