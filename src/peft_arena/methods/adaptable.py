"""Linear layers that no adapter can act on, found on the model itself: by its code, its ties and one forward pass.

An adapter stands in a linear layer's place and acts when the layer is called. A layer whose weight the model reads
itself (a state-space mixer, a fused kernel that some devices have), that is never called, that gives something else
than its product, or whose weight stands at a second place in the model, would be trained in vain or be another than
it is evaluated as. An expert that no token of the forward pass was sent to is none of these.
"""

from __future__ import annotations

import ast
import inspect
import operator
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from peft_arena.core.text import few
from peft_arena.methods.boundary import LIBRARY, is_refusal

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

TOKENS = 4
"""Length of the row that is sent through the model."""
_ABOUT = frozenset({"dtype", "device", "shape", "ndim", "size", "numel", "is_meta", "requires_grad"})
"""What may be asked of a weight without reading it."""
_KNOWN: WeakKeyDictionary[nn.Module, dict[str, str]] = WeakKeyDictionary()


_SAME: WeakKeyDictionary[nn.Module, PreTrainedModel] = WeakKeyDictionary()


def look_at(original: PreTrainedModel, for_model: PreTrainedModel) -> None:
    """Let layers of a model that cannot be adapted be looked for on another one, once for all that name it.

    Args:
        original: has the same code, shapes, ties and kind of device, and is never changed.
        for_model: stands for it until it is gone.
    """
    _SAME[for_model] = original


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return every linear layer by name, except the output layer over the vocabulary."""
    from torch import nn

    output = model.get_output_embeddings()
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not output
    }


def left_out(model: PreTrainedModel) -> Mapping[str, str]:
    """Return the linear layers, but for the output layer, that cannot be adapted, by name, each with the reason.

    They are looked for once per model.

    Args:
        model: not yet adapted; one forward pass of four tokens is run, without weights where it is on the meta device.
    """
    model = _SAME.get(model, model)
    if model not in _KNOWN:
        linears = linear_layers(model)
        found = {**_uncalled(model, linears), **_read_itself(model, linears), **_tied(model, linears)}
        _KNOWN[model] = {name: found[name] for name in linears if name in found}
    return _KNOWN[model]


def notice(model: PreTrainedModel) -> str:
    """Return one line that says which layers are left out and why; empty if there are none."""
    every = linear_layers(model)
    found = left_out(model)
    names = list(found)
    reasons = dict.fromkeys(found.values())
    said = [f"{few(_leaves(name for name in names if found[name] == reason), 4)}: {reason}" for reason in reasons]
    return f"{len(names)} of {len(every)} linear layers cannot be adapted: {'; '.join(said)}" if names else ""


def _leaves(names: Iterable[str]) -> Iterable[str]:
    """Return the last parts of some names, each once."""
    return dict.fromkeys(name.rsplit(".", 1)[-1] for name in names)


def _tied(model: PreTrainedModel, linears: Mapping[str, nn.Linear]) -> dict[str, str]:
    """Return the layers whose weight stands at a second place: a change at one of them is none at the other."""
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    found = {}
    for name, module in linears.items():
        same = places.get(id(module.weight), [])
        others = [place for place in same if place != f"{name}.weight"]
        if others:
            found[name] = "its weight stands at more than one place in the model"
    return found


def _read_itself(model: PreTrainedModel, linears: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return the layers whose weight the module around them reads itself, on this device or another."""
    modules = dict(model.named_modules())
    read: dict[str, frozenset[str]] = {}
    found = {}
    for name in linears:
        parent, _, leaf = name.rpartition(".")
        if parent not in read:
            read[parent] = weights_read(modules[parent])
        if leaf in read[parent]:
            found[name] = f"{type(modules[parent]).__name__} reads its weight itself instead of calling it"
    return found


def weights_read(module: nn.Module) -> frozenset[str]:
    """Return the names of submodules whose ``weight`` is read in what ``forward`` of a module runs of its class.

    Asking for the weight's type, shape or device is no reading, and a branch that the module's settings close is not
    run. Nothing is found where the source is not there.
    """
    reached: set[str] = set()
    waiting = ["forward"]
    read: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in reached:
            continue
        reached.add(name)
        for node, asked in _run_by(_source(getattr(type(module), name, None)), module):
            if not isinstance(node, ast.Attribute):
                continue
            if _of_self(node):
                waiting.append(node.attr)
            elif node.attr == "weight" and isinstance(node.value, ast.Attribute) and _of_self(node.value) and not asked:
                read.add(node.value.attr)
    return frozenset(read)


@lru_cache(maxsize=4096)
def _source(function: object) -> ast.AST | None:
    """Return a function's source as a tree; None for what is no function of a model's, or has no source."""
    plain = inspect.unwrap(function) if inspect.isfunction(function) else None
    if plain is None or str(plain.__module__).startswith("torch."):
        return None
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(plain)))
    except (OSError, TypeError, SyntaxError):
        return None


def _run_by(tree: ast.AST | None, module: nn.Module, asked: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Give every part of a tree that a module may run, and whether only a property of it is asked for."""
    if tree is None:
        return
    yield tree, asked
    if isinstance(tree, ast.If):
        known = _value(tree.test, module)
        yield from _run_by(tree.test, module)
        for branch, closed in ((tree.body, known is False), (tree.orelse, known is True)):
            for statement in () if closed else branch:
                yield from _run_by(statement, module)
        return
    about = isinstance(tree, ast.Attribute) and tree.attr in _ABOUT
    for node in ast.iter_child_nodes(tree):
        yield from _run_by(node, module, about)


def _value(test: ast.AST, module: nn.Module) -> bool | None:
    """Return what a condition is, if it hangs on nothing but the module's settings; else None."""
    if isinstance(test, ast.BoolOp):
        values = [_value(part, module) for part in test.values]
        decides = isinstance(test.op, ast.Or)
        if decides in values:
            return decides
        return None if None in values else not decides
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        value = _value(test.operand, module)
        return None if value is None else not value
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and type(test.ops[0]) in _COMPARED:
        left, right = _setting(test.left, module), _setting(test.comparators[0], module)
        if left is None or right is None:
            return None
        return bool(_COMPARED[type(test.ops[0])](left, right))
    found = _setting(test, module)
    return found if isinstance(found, bool) else None


_COMPARED: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
}


def _setting(node: ast.AST, module: nn.Module) -> bool | int | float | str | None:
    """Return a constant, or a plain value that the module holds; None for anything else, and for its mode."""
    found: Any = None
    if isinstance(node, ast.Constant):
        found = node.value
    elif isinstance(node, ast.Attribute) and _of_self(node) and node.attr != "training":
        found = module.__dict__.get(node.attr)
    return found if isinstance(found, bool | int | float | str) else None


def _of_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id == "self"


def _uncalled(model: PreTrainedModel, linears: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return the layers that are not called although the module around them is, and those that give no product."""
    seen = _Seen(model)
    if not seen.whole:
        return {}
    found = {}
    for name in linears:
        parent = name.rpartition(".")[0]
        if name in seen.odd:
            found[name] = "it gives something else than the product with its weight"
        elif name not in seen.called and parent in seen.called and parent not in seen.unproven:
            found[name] = "the model never calls it"
    return found


class _Seen:
    """Which modules one forward pass called."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.called: set[str] = set()
        self.odd: set[str] = set()
        self.unproven: set[str] = set()
        """Modules whose forward pass did not come to its end, which happens without weights: shapes hung on values."""
        self.whole = False
        """Whether the pass of the whole model came to its end."""
        import torch

        from peft_arena.methods.imagined import imagined
        from peft_arena.methods.state import local_random

        device = next(model.parameters()).device
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            meta = device.type == "meta"
            with self._watching(model, meta), torch.no_grad(), local_random(0), imagined(model):
                ids = torch.arange(1, TOKENS + 1, device=device).repeat(2, 1)
                model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
            self.whole = True
        except LIBRARY as error:  # a model that cannot be run like this says so when it is attached to
            if not is_refusal(error):
                raise
        finally:
            for module, mode in modes:
                module.training = mode

    @contextmanager
    def _watching(self, model: PreTrainedModel, meta: bool) -> Iterator[None]:
        """Note each call of a module inside the block; ``forward`` itself is noted, which hooks do not see."""
        modules = dict(model.named_modules())
        held = {name: module.__dict__.get("forward") for name, module in modules.items()}
        for name, module in modules.items():
            module.__dict__["forward"] = self._noted(name, module, meta and name != "")
        try:
            yield
        finally:
            for name, module in modules.items():
                if held[name] is None:
                    del module.__dict__["forward"]
                else:
                    module.__dict__["forward"] = held[name]

    def _noted(self, name: str, module: nn.Module, passes_on: bool) -> Callable[..., Any]:
        import torch

        forward = module.forward
        sides = getattr(module, "out_features", None) if isinstance(module, torch.nn.Linear) else None

        @wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.called.add(name)
            try:
                output = forward(*args, **kwargs)
            except LIBRARY as error:
                given = next((one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)), None)
                if not passes_on or given is None or not is_refusal(error):
                    raise
                self.unproven.add(name)  # most modules of a residual stream give what they are given, in shape
                return given
            if sides is not None and not (isinstance(output, torch.Tensor) and output.shape[-1] == sides):
                self.odd.add(name)
            return output

        return run
