"""Keeping things apart that share global state: random numbers, a model's modes, the trainer's own changes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from peft_arena.core.ids import seed_for
from peft_arena.methods.state import seed_torch
from peft_arena.models.modes import base_of


def seed_step(seed: int, step: int) -> None:
    """Seed every random generator for one optimizer step.

    Whatever happens between two steps (validation, saving, a restart) so cannot change the dropout of the next.
    """
    number = seed_for(seed, "dropout", step)
    seed_torch(number)
    np.random.seed(number)
    random.seed(number)


@contextmanager
def random_kept() -> Iterator[None]:
    """Give the random generators back as they were before the block."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def model_kept(model: nn.Module) -> Iterator[None]:
    """Put back, after the block, what of the model is in training mode and what is trained."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with random_kept():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)


@contextmanager
def surface_kept(model: nn.Module) -> Iterator[None]:
    """Take back what the block does to the forward methods and settings of a model and of the one it wraps."""
    base = base_of(model)
    models = {id(model): model, id(base): base}.values()
    kept = [(one, one.__dict__.get("forward")) for one in models]
    settings = [getattr(one, name, None) for one in models for name in ("config", "generation_config")]
    contents = [(one, dict(vars(one))) for one in settings if hasattr(one, "__dict__")]
    try:
        yield
    finally:
        for one, content in contents:
            vars(one).clear()
            vars(one).update(content)
        for one, forward in kept:
            if forward is not None:
                one.__dict__["forward"] = forward
            else:
                one.__dict__.pop("forward", None)
