"""Points by the names that people give them on a command line."""

from __future__ import annotations

from pathlib import Path

from peft_arena.core.bounded import user_path
from peft_arena.core.build import build
from peft_arena.core.errors import UserError
from peft_arena.core.specs import MethodSpec, ModelSpec, RunSpec
from peft_arena.methods.registry import BASE
from peft_arena.models.load import PACKAGED, pin
from peft_arena.store.store import RunDirectory, Store


def inside_run(subject: str, runs: Path) -> tuple[str, Path]:
    """Return ``RUN`` or ``RUN@STEP``, and the runs directory, for the directory of a run or of a checkpoint in one."""
    directory = user_path(subject).absolute()
    if (directory / "run.json").is_file():
        return directory.name, directory.parent
    run = directory.parent.parent
    if directory.name.isdigit() and directory.parent.name == "steps" and (run / "run.json").is_file():
        return f"{run.name}@{int(directory.name)}", run.parent
    return subject, runs


def find_point(point: str, runs: Path, dtype: str = "float32") -> tuple[RunDirectory, int]:
    """Return the run and the step that a name stands for.

    Args:
        point: ``RUN``, ``RUN@STEP`` or the name of a model.
        runs: the runs directory.
        dtype: type of a base model's weights.

    Raises:
        UserError: no such run, step or model.
    """
    name, _, step_text = point.partition("@")
    store = Store(runs)
    if name in PACKAGED or "/" in name:
        if step_text:
            raise UserError(f"'{point}' names a step, and a base model has none")
        spec = RunSpec(model=pin(build(ModelSpec, {"name": name, "dtype": dtype})), method=MethodSpec(name=BASE))
        return store.run(spec), 0
    run = store.find(name)
    if run.spec.is_base:
        if step_text not in {"", "0"}:
            raise UserError(f"run {run.run_id} is a base model: it has no step {step_text}")
        return run, 0
    steps = run.steps()
    training = run.training()
    if not step_text:
        if training is None:
            known = ", ".join(map(str, steps)) or "none"
            raise UserError(
                f"run {run.run_id} is not trained to its end; name a step: {run.run_id}@STEP. Known: {known}"
            )
        return run, training.steps
    if not step_text.isdigit() or int(step_text) not in steps:
        raise UserError(f"run {run.run_id} has no step '{step_text}'. Known: {', '.join(map(str, steps)) or 'none'}")
    return run, int(step_text)
