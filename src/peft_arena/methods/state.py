"""Moving tensors in and out of a model, and the random numbers an attachment may draw."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from peft_arena.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def copy_into(targets: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str = "the state") -> None:
    """Copy every tensor of a state over the tensor of the same name; nothing is copied if any of them does not fit.

    Args:
        targets: the tensors to overwrite, by name.
        state: the new values; exactly the same names, shapes and types.
        where: what the state is called in messages.

    Raises:
        UserError: a name is missing or unknown, or a shape or type differs.
    """
    import torch

    check_fits(targets, state, where)
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(state[name])


def check_fits(targets: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str) -> None:
    """Check that a state has exactly the names, shapes and types of the targets.

    Raises:
        UserError: a name is missing or unknown, or a shape or type differs.
    """
    missing = sorted(set(targets) - set(state))
    if missing:
        raise UserError(f"{where} lacks {len(missing)} of {len(targets)} tensors, the first: {missing[0]}")
    unknown = sorted(set(state) - set(targets))
    if unknown:
        raise UserError(f"{where} has {len(unknown)} tensors the model does not have, the first: {unknown[0]}")
    for name, target in targets.items():
        if target.shape != state[name].shape:
            raise UserError(f"{where} holds {name} as {tuple(state[name].shape)}, the model as {tuple(target.shape)}")
        if target.dtype != state[name].dtype:
            raise UserError(f"{where} holds {name} as {state[name].dtype}, the model as {target.dtype}")


@contextmanager
def swapped(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Give tensors other contents inside the block; the old contents come back untouched, whatever happens."""
    kept = {name: targets[name].data for name in values}
    try:
        for name, value in values.items():
            targets[name].data = value
        yield
    finally:
        for name, value in kept.items():
            targets[name].data = value


@contextmanager
def local_random(seed: int) -> Iterator[None]:
    """Seed torch inside the block; afterwards its random state is what it was."""
    import torch

    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        seed_torch(seed)
        yield


def seed_torch(seed: int) -> None:
    """Seed torch's generators as ``torch.manual_seed`` does, without the 2 ms that takes.

    It records a stack for each kind of device that is not there.
    """
    import torch

    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)
    if torch.xpu.is_available():
        torch.xpu.manual_seed_all(seed)
