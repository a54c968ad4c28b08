"""A PEFT adapter directory on a base: what its files hold, the changes they make, and how they say points of a path."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from peft_arena.core.bounded import read_table
from peft_arena.core.errors import UserError
from peft_arena.methods.base import PathKind
from peft_arena.methods.files import SETTINGS, WEIGHTS, is_on, refuse_unknown_fields
from peft_arena.models.folder import refuse_both
from peft_arena.weights.base import BaseWeights
from peft_arena.weights.change import Change, Dense, LowRank
from peft_arena.weights.files import TensorFiles
from peft_arena.weights.vocabulary import refuse_other_vocabulary

CONFIG = "config.json"
PREFIX = "base_model.model."
CIRCUMSTANCES = frozenset(
    {
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    }
)
"""Settings of every adapter that say where it is from, or which layers it is on, as its tensors' names do too."""

Maker = Callable[[], Change | None]


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter directory, on a base."""

    directory: Path
    base: BaseWeights
    table: Mapping[str, Any]
    """Its ``adapter_config.json``."""
    files: TensorFiles

    @property
    def kind(self) -> str:
        """The type of adapter, as peft names it."""
        return str(self.table.get("peft_type"))

    def plain(self, known: frozenset[str]) -> bool:
        """Say whether no setting is active but the known ones and ``bias`` is ``none``."""
        ignored = CIRCUMSTANCES | known | {"bias"}
        active = [name for name, value in self.table.items() if is_on(value) and name not in ignored]
        return not active and self.table.get("bias", "none") in ("none", None)

    def parts(self, *suffixes: str, beside: frozenset[str] = frozenset()) -> dict[str, dict[str, str]] | None:
        """Group the tensors by module and by the last parts of their names.

        Args:
            suffixes: last parts of names that are understood.
            beside: names of tensors that belong to no module.

        Returns:
            By module, the tensor's name by suffix; None if a tensor is of none of these.

        Raises:
            UserError: the model has no module that a tensor is for.
        """
        from torch import nn

        modules: dict[str, Any] = dict(self.base.architecture.named_modules())
        found: dict[str, dict[str, str]] = {}
        for name in self.files.places:
            if name in beside:
                continue
            suffix = next((part for part in suffixes if name.startswith(PREFIX) and name.endswith(f".{part}")), None)
            if suffix is None:
                return None
            module = name.removeprefix(PREFIX).removesuffix(f".{suffix}")
            if module not in modules:
                raise UserError(
                    f"{self.directory} is not an adapter of this model: it changes {module}, which "
                    f"{type(self.base.architecture).__name__} does not have here"
                )
            if isinstance(modules[module], nn.Embedding):
                return None
            found.setdefault(module, {})[suffix] = name
        return found

    def read(self, name: str, *shape: int) -> Tensor:
        """Return a tensor as float32, of the shape given.

        Raises:
            UserError: it has another shape.
        """
        self.expect(name, *shape)
        return self.files.read(name).float()

    def expect(self, name: str, *shape: int) -> None:
        """Check the shape of a tensor without reading it.

        Raises:
            UserError: it has another shape than fits the model.
        """
        found = self.files.places[name].shape
        if found != shape:
            raise UserError(
                f"{self.directory} does not fit the model: {name} has shape {found}, the model and the settings of "
                f"the adapter ask for {shape}"
            )

    def weight(self, module: str) -> tuple[str, tuple[int, ...]] | None:
        """Return name and shape of the weight of a linear layer; None if the module is none.

        Raises:
            UserError: the weight stands at other places of the model too, so that a change of this one is none of it.
        """
        from torch import nn

        name = f"{module}.weight"
        if not isinstance(self.base.architecture.get_submodule(module), nn.Linear):
            return None
        refuse_tied(self.base, name, str(self.directory))
        return name, self.base.shapes[self.base.canonical(name)]


class Step(NamedTuple):
    """How far a parameter goes."""

    factor: float
    """Of everything that is no generator of a rotation."""
    turn: float
    """Of generators."""


Tensors = Mapping[str, Tensor]
Writer = Callable[[Step], Tensors | None]
"""The tensors of an adapter's file, by the names they have there, that put a parameter at a step; None: none do."""
Extend = Callable[[dict[str, Tensor], dict[str, Any], Mapping[str, LowRank]], bool]
"""Add low-rank changes to the tensors and settings of a point; False where they cannot be."""


@dataclass(frozen=True)
class OwnFiles:
    """How the files of an adapter express points of its path."""

    adapter: Adapter
    writers: Mapping[str, Writer]
    """By parameter."""
    straight: bool
    """Whether the way of these is the straight one."""
    follows: Mapping[str, str] = field(default_factory=dict)
    """Parameters that are moved by the tensors of another: they cannot have a factor of their own."""
    extend: Extend | None = None
    """None where nothing can be added."""


def times(adapter: Adapter, stored: str) -> Writer:
    """Return the writer of a parameter whose change is proportional to one tensor of the file."""

    def write(step: Step) -> Tensors:
        return {stored: step.factor * adapter.files.read(stored).float()}

    return write


@dataclass(frozen=True)
class Changes:
    """Which parameters a checkpoint may change, and how to read each change."""

    makers: Mapping[str, Maker] = field(default_factory=dict)
    """By parameter, under the first of its names; None from a maker: it is not changed after all."""
    added: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of parameters that the pretrained model does not have, as if they were zero there: biases."""
    kind: PathKind = PathKind.LINEAR
    """Of the path of the changed linear weights, the same for all of them."""
    own: OwnFiles | None = None
    """How files of the adapter's own type express the points of its path; None where they cannot."""


Form = Callable[[Adapter], Changes | None]


def refuse_tied(base: BaseWeights, name: str, where: str) -> None:
    """Refuse the change of one of several places of a tied parameter.

    Raises:
        UserError: it is tied.
    """
    if base.tied(name):
        other = next(alias for alias, first in base.aliases.items() if first == base.canonical(name) and alias != name)
        raise UserError(f"{where} changes {name}, which is one with {other}: there are no weights for one alone")


def open_adapter(base: BaseWeights, directory: Path) -> Adapter:
    """Open a PEFT adapter directory.

    Raises:
        UserError: a file is missing or damaged, a model lies beside it, the installed peft does not know an active
            setting, or it was made for a model of another vocabulary.
    """
    refuse_both(directory)
    table = read_table(directory / SETTINGS)
    if not isinstance(table.get("peft_type"), str):
        raise UserError(f"{directory / SETTINGS} is damaged: it is not an adapter configuration, it has no peft_type")
    refuse_unknown_fields(table, str(directory / SETTINGS))
    files = TensorFiles((directory / WEIGHTS,))
    refuse_other_vocabulary(base, directory, table, files.places)
    return Adapter(directory, base, table, files)


def changed(tuned: Tensor, before: Tensor) -> Change | None:
    """Return tuned minus pretrained values as a change; None where they are equal."""
    import torch

    return None if torch.equal(tuned, before) else Dense(tuned - before)


def added_biases(base: BaseWeights, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the biases, among tensors, of linear layers that have none in the model, by name with their shapes."""
    from torch import nn

    modules: dict[str, Any] = dict(base.architecture.named_modules())
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        module = modules.get(name.removesuffix(".bias")) if name.endswith(".bias") else None
        if isinstance(module, nn.Linear) and module.bias is None and shape == (module.out_features,):
            found[name] = shape
    return found
