"""Resume states: everything needed to continue a killed training bit for bit, as safetensors and JSON.

A state needs no random generator: each optimizer step seeds its own random numbers from the run's seed (see
:mod:`peft_arena.train.quiet`). It needs no position in the data either: the plan is a function of the spec.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from peft_arena.core.errors import UserError
from peft_arena.methods.base import Attached
from peft_arena.store.checkpoint import verify_checkpoint, write_checkpoint
from peft_arena.store.files import read_json, write_once
from peft_arena.store.records import LogEntry
from peft_arena.store.store import RunDirectory

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

FOLDER = "resume"
COUNTERS = "counters.json"
WEIGHTS = "weights.safetensors"
OPTIMIZER = "optimizer.safetensors"
BUFFER = "buffer.safetensors"


class Counters(BaseModel):
    """What training has counted so far."""

    model_config = ConfigDict(extra="forbid")

    plan: str
    """Id of the data plan, so that a state is never continued with other data."""
    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Real input tokens."""
    padded_tokens: int = 0
    rows: int = 0
    """Rows of all forward passes."""
    nats: float = 0.0
    """Training loss since the last log entry, summed over its labels."""
    labels: int = 0
    """Labels behind ``nats``."""
    seconds: float = 0.0
    """Wall time of the optimizer steps."""
    cpu_seconds: float = 0.0
    threads: int = 0
    """Threads of the arithmetic; another number adds in another order."""
    log: list[LogEntry] = Field(default_factory=list)


C = TypeVar("C", bound=Counters)


def write_state(
    run: RunDirectory, counters: Counters, attached: Attached, optimizer: Optimizer, buffer: Mapping[str, Tensor]
) -> None:
    """Write a resume state whole or not at all, and remove the older ones.

    Args:
        run: where to write.
        counters: what was counted.
        attached: gives the weights.
        optimizer: gives its moments.
        buffer: further tensors; mostly none.

    Raises:
        UserError: the disk refused the write; the older state is still there.
    """
    from safetensors.torch import save_file

    def save(directory: Path) -> None:
        save_file(_writable(attached.state()), directory / WEIGHTS)
        save_file(_writable(_optimizer_tensors(optimizer)), directory / OPTIMIZER)
        save_file(_writable(buffer), directory / BUFFER)
        write_once(directory / COUNTERS, counters.model_dump(mode="json"))

    target = _path(run, counters.step)
    write_checkpoint(target, save)
    for old in _found(run):
        if old != target:
            shutil.rmtree(old, ignore_errors=True)


def read_state(
    run: RunDirectory, begin: C, attached: Attached, optimizer: Optimizer, save_at: Collection[int] = ()
) -> tuple[C, dict[str, Tensor]] | None:
    """Put the newest whole resume state in place.

    A state that cannot be used is left out with an event in the run's log, and the one before is tried.

    Args:
        run: where to look.
        begin: the counters of a training that begins: a state must be of their type and plan.
        attached: gets the weights.
        optimizer: gets its moments.
        save_at: steps of the save points; a state after one whose checkpoint is damaged or gone cannot be used, because
            that would never be written again.

    Returns:
        What had been counted, and the further tensors; None if training starts from the beginning, and then nothing
        was changed.
    """
    for path in sorted(_found(run), reverse=True):
        try:
            for step in sorted(one for one in save_at if 0 < one <= int(path.name)):
                verify_checkpoint(run.checkpoint(step))
            return _restore(path, begin, attached, optimizer)
        except UserError as error:
            run.event("resume_state_ignored", level="warning", path=path.name, reason=str(error))
    return None


def drop_states(run: RunDirectory) -> None:
    """Remove every resume state; the run is trained."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(run.path / FOLDER)


def _restore(path: Path, begin: C, attached: Attached, optimizer: Optimizer) -> tuple[C, dict[str, Tensor]]:
    """Check everything a state holds, then put it in place."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    verify_checkpoint(path)
    try:
        counters = type(begin).model_validate(read_json(path / COUNTERS))
        weights = load_file(path / WEIGHTS)
        moments = load_file(path / OPTIMIZER)
        buffer = load_file(path / BUFFER)
    except (OSError, SafetensorError, ValidationError) as error:
        raise UserError(f"resume state {path} cannot be read: {str(error).splitlines()[0]}") from None
    if counters.plan != begin.plan:
        raise UserError(f"resume state {path} is of other training data or another schedule")
    if counters.threads != torch.get_num_threads():
        raise UserError(
            f"resume state {path} was computed with {counters.threads} threads and this process has "
            f"{torch.get_num_threads()}: the run would be neither of the two"
        )
    state = _optimizer_state(optimizer, moments, path)
    attached.load_state(weights)
    optimizer.load_state_dict(state)
    return counters, buffer


def _optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{number}.{key}": value for number, entry in state.items() for key, value in entry.items()}


def _optimizer_state(optimizer: Optimizer, tensors: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Build the optimizer's state from tensors named ``number.key``.

    Raises:
        UserError: a number or shape is not that of the optimizer's parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, _, key = name.partition(".")
        if not number.isdigit() or int(number) >= len(parameters):
            raise UserError(f"resume state {path} holds {name}, and there are {len(parameters)} trained parameters")
        if value.ndim and value.shape != parameters[int(number)].shape:
            raise UserError(f"resume state {path} holds {name} as {tuple(value.shape)}: of another parameter")
        state.setdefault(int(number), {})[key] = value
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


def _writable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU, contiguous, none sharing memory with another."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        place = plain.untyped_storage().data_ptr()
        shared = place in seen or plain.numel() * plain.itemsize != plain.untyped_storage().nbytes()
        result[name] = plain.clone() if shared else plain
        seen.add(place)
    return result


def _path(run: RunDirectory, step: int) -> Path:
    return run.path / FOLDER / f"{step:08d}"


def _found(run: RunDirectory) -> list[Path]:
    return [path for path in (run.path / FOLDER).glob("[0-9]*") if path.is_dir()]
