"""Runs on disk without the training: a method in place on the micro model, its numbers moved at random, and saved."""

import torch

from peft_arena.core.specs import MethodSpec, ModelSpec, RunSpec, Schedule, TaskSpec, TrainSpec
from peft_arena.methods.registry import make_method
from peft_arena.models.load import load, pin
from peft_arena.store.checkpoint import write_checkpoint
from peft_arena.store.store import RunDirectory, Store

STEP = 2


def made_run(runs, name, config=None, dtype="float32", size=0.03) -> RunDirectory:
    """Return a run with one checkpoint, at step 2."""
    method = make_method(name, config or {})
    model = pin(ModelSpec(name="micro", dtype=dtype))
    spec = RunSpec(
        model=model,
        method=MethodSpec(name=name, config=method.config.model_dump(mode="json")),
        train=TrainSpec(task=TaskSpec(name="micro-sort"), schedule=Schedule(steps=STEP), learning_rate=1e-3),
    )
    attached = method.attach(load(model).model, seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in attached.trained().values():
            scale = size * (parameter.float().std().item() if name == "full" and parameter.numel() > 1 else 1.0)
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    run = Store(runs).run(spec)
    run.create()
    write_checkpoint(run.checkpoint(STEP), attached.save)
    return run
