"""Modules that train as a whole beside an adapter, and are saved with it: peft's ``modules_to_save``.

peft keeps the pretrained module and trains a copy. Here the copy is float32 on every base, as all that trains is: its
inputs are taken to float32 and its outputs back to the type of the pretrained module.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from peft_arena.core.errors import UserError, unknown
from peft_arena.methods.targets import matches

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

ADAPTER = "default"
PREFIX = "base_model.model."


def whole_modules(model: PreTrainedModel, patterns: Iterable[str], adapted: Collection[str]) -> dict[str, nn.Module]:
    """Return the modules that train as a whole, by name, in the model's order.

    Args:
        model: before anything is attached; its weights may be on the meta device.
        patterns: whole names or last parts of them.
        adapted: names of the modules that have an adapter.

    Raises:
        UserError: a pattern matches no module, or one without weights or a list of them, one that has an adapter or
            lies in another, or one whose weight is one with that of a module which does not train.
    """
    from torch import nn

    modules = {name: module for name, module in model.named_modules() if name}
    lists = (nn.ModuleList, nn.ModuleDict)
    for pattern in patterns:
        if not any(matches(name, pattern) for name in modules):
            raise unknown("module", pattern, {name.rsplit(".", 1)[-1] for name in modules}, "modules_to_save")
    chosen = {name: held for name, held in modules.items() if any(matches(name, pattern) for pattern in patterns)}
    places: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), set()).add(name)
    for name, module in chosen.items():
        inside = sorted(other for other in {*adapted, *chosen} if other.startswith(f"{name}."))
        if name in adapted or inside:
            raise UserError(
                f"modules_to_save: {name} holds {inside[0] if inside else 'an adapter'}, which trains already: name "
                "modules that are not adapted, or choose other targets"
            )
        if isinstance(module, lists) or not list(module.parameters()):
            raise UserError(f"modules_to_save: {name} is a {type(module).__name__} without weights of its own to train")
        for parameter in module.parameters():
            others = sorted(place for place in places[id(parameter)] if not place.startswith(f"{name}."))
            if others:
                raise UserError(
                    f"modules_to_save: the weight of {name} is one with {others[0]} (tied), and cannot train alone"
                )
    return chosen


def wrappers(model: nn.Module) -> dict[str, Any]:
    """Return peft's wrappers around modules that train as a whole, by the name of the base module each stands for."""
    from peft.utils.other import ModulesToSaveWrapper

    found = {name: module for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    return {name.removeprefix(PREFIX): module for name, module in found.items() if ADAPTER in module.modules_to_save}


def prepare_whole(model: nn.Module, wanted: Collection[str]) -> None:
    """Bring the copies that train to float32 on a freshly wrapped model, whose other modules compute as before.

    Raises:
        UserError: peft has wrapped other modules than were wanted.
    """
    found = wrappers(model)
    if set(found) != set(wanted):
        wrong = ", ".join(sorted(set(found) ^ set(wanted))[:3])
        raise UserError(
            f"modules_to_save: peft would train {len(found)} modules, not {len(wanted)}; they differ in {wrong}"
        )
    for wrapper in found.values():
        copy = wrapper.modules_to_save[ADAPTER]
        for parameter in copy.parameters():
            parameter.data = parameter.data.float()
        copy.register_forward_pre_hook(_to_own_type, with_kwargs=True)
        copy.register_forward_hook(_Outward(wrapper))


def _to_own_type(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    inside = next(module.parameters()).dtype
    return _cast(args, inside), {name: _cast(value, inside) for name, value in kwargs.items()}


class _Outward:
    """Gives what a copy computed in the type of the pretrained module, whatever that is by then."""

    def __init__(self, wrapper: Any) -> None:
        self.original = (wrapper.original_module,)  # in a tuple, so that it is no submodule of anything

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return _cast(output, next(self.original[0].parameters()).dtype)


def _cast(value: Any, dtype: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.to(dtype)
    return tuple(_cast(part, dtype) for part in value) if type(value) is tuple else value


def whole_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of the copies by the names peft gives them in files."""
    return {
        f"{PREFIX}{name}.{key}": tensor.detach()
        for name, wrapper in wrappers(model).items()
        for key, tensor in wrapper.modules_to_save[ADAPTER].state_dict().items()
    }


def whole_delta(model: nn.Module, module: str) -> Tensor | None:
    """Return tuned minus pretrained weight of a module that trains as a whole, float32; None if it does not."""
    for name, wrapper in wrappers(model).items():
        if module == name or module.startswith(f"{name}."):
            inner = module.removeprefix(name).removeprefix(".")
            tuned: Any = wrapper.modules_to_save[ADAPTER].get_submodule(inner)
            before: Any = wrapper.original_module.get_submodule(inner)
            change: Tensor = tuned.weight.detach().float() - before.weight.detach().float()
            return change
    return None


def settle_whole(model: nn.Module) -> None:
    """Bring the copies to the type of the pretrained modules, whose places they are about to take."""
    for wrapper in wrappers(model).values():
        copy = wrapper.modules_to_save[ADAPTER]
        for parameter, before in zip(copy.parameters(), wrapper.original_module.parameters(), strict=True):
            parameter.data = parameter.data.to(before.dtype)
        for hooks in (copy._forward_hooks, copy._forward_pre_hooks, copy._forward_pre_hooks_with_kwargs):
            hooks.clear()


@contextmanager
def whole_off(model: nn.Module) -> Iterator[None]:
    """Let the pretrained modules compute inside the block; what trains is what it was afterwards."""
    held = wrappers(model).values()
    before = [wrapper._disable_adapters for wrapper in held]
    try:
        for wrapper in held:
            wrapper._disable_adapters = True
        yield
    finally:
        for wrapper, state in zip(held, before, strict=True):
            wrapper._disable_adapters = state
