"""Runs on disk without the training: a method in place on the micro model, its numbers moved at random, and saved."""

import torch

from peft_arena.core.specs import InitFrom, MethodSpec, ModelSpec, RLSpec, RunSpec, Schedule, TrainSpec
from peft_arena.methods.registry import make_method
from peft_arena.models.load import load, pin
from peft_arena.store.checkpoint import write_checkpoint
from peft_arena.store.records import LogEntry, TrainingRecord
from peft_arena.store.store import RunDirectory, Store
from peft_arena.study.read_study import task_spec
from peft_arena.weights.start import load_start, note_start

STEP = 2


def made_run(runs, name, config=None, dtype="float32", size=0.03) -> RunDirectory:
    """Return a run with one checkpoint, at step 2."""
    spec = made_spec(name, config, dtype=dtype)
    run = Store(runs).run(spec)
    run.create()
    _save(run, load(spec.model).model, name, size)
    return run


def made_spec(name, config=None, dtype="float32", start=None, seed=0) -> RunSpec:
    """Return the spec of a run of two steps: of SFT, or of GRPO if it begins at another run."""
    method = make_method(name, config or {})
    task, schedule = task_spec("micro-sort", {}, ""), Schedule(steps=STEP)
    train = TrainSpec(task=task, schedule=schedule, learning_rate=1e-3)
    if start is not None:
        train = RLSpec(
            objective="grpo", task=task, schedule=schedule, learning_rate=1e-3, init_from=InitFrom(run=start.spec)
        )
    method_spec = MethodSpec(name=name, config=method.config.model_dump(mode="json"))
    return RunSpec(model=pin(ModelSpec(name="micro", dtype=dtype)), method=method_spec, train=train, seed=seed)


def trained_run(runs, name, config=None, dtype="float32", size=0.03, start=None, seed=0) -> RunDirectory:
    """Return a run with a checkpoint and a training record; it may begin at another one."""
    spec = made_spec(name, config, dtype, start, seed)
    run = Store(runs).run(spec)
    run.create()
    loaded, began = load_start(run)
    note_start(run, began)
    _save(run, loaded.model, name, size, seed=3 if start is None else 4)
    run.write_training(
        TrainingRecord(
            run_id=run.run_id,
            steps=STEP,
            tokens=1,
            padded_tokens=1,
            examples=1,
            dropped=0,
            log=(LogEntry(step=STEP, tokens=1, loss=1.0),),
            save_points=(STEP,),
            start=began,
            provenance={},
        )
    )
    return run


def _save(run, model, name, size, seed=3):
    method = make_method(name, run.spec.method.config)
    attached = method.attach(model, seed=0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attached.trained().values():
            scale = size * (parameter.float().std().item() if name == "full" and parameter.numel() > 1 else 1.0)
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    write_checkpoint(run.checkpoint(STEP), attached.save)
