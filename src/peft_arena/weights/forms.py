"""From a checkpoint directory to the changes it makes, by what its own files say.

A closed form is used only where every tensor of the file and every active setting of the configuration is understood;
everything else goes through the method's own merge, or peft's, see :mod:`peft_arena.weights.merging`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from peft_arena.core.bounded import read_table
from peft_arena.core.errors import UserError
from peft_arena.methods.base import PathKind
from peft_arena.methods.files import is_on, refuse_unknown_fields
from peft_arena.models.folder import refuse_both
from peft_arena.models.stored import INDEX, SINGLE
from peft_arena.weights.base import BaseWeights
from peft_arena.weights.change import Change, Dense
from peft_arena.weights.files import TensorFiles, model_files
from peft_arena.weights.vocabulary import refuse_other_vocabulary

if TYPE_CHECKING:
    from peft_arena.weights.adapter_files import OwnFiles

WEIGHTS = "adapter_model.safetensors"
SETTINGS = "adapter_config.json"
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


def closed_form(base: BaseWeights, directory: Path) -> Changes | None:
    """Return the changes of a checkpoint where its files alone say them; None where they do not.

    Raises:
        UserError: a file is missing or damaged, or does not fit the base.
    """
    from peft_arena.weights.forms_adapter import FORMS
    from peft_arena.weights.forms_whole import with_whole_modules

    if (directory / SETTINGS).exists():
        adapter = open_adapter(base, directory)
        form = FORMS.get(adapter.kind)
        try:
            found = with_whole_modules(adapter, form) if form is not None else None
            return found.all if found is not None and _complete(adapter, found.adapted) else None
        except (KeyError, TypeError, ValueError, ArithmeticError, re.error) as error:
            problem = f"{type(error).__name__}: {error}"
            raise UserError(f"{directory / SETTINGS} is damaged: a setting is missing or wrong ({problem})") from error
    if (directory / CONFIG).exists() or (directory / SINGLE).exists() or (directory / INDEX).exists():
        return stored_weights(base, model_files(directory), str(directory), whole=True)
    if (directory / WEIGHTS).exists():
        return stored_weights(base, TensorFiles((directory / WEIGHTS,)), str(directory), whole=False)
    return None


def _complete(adapter: Adapter, changes: Changes) -> bool:
    """Say whether an adapter has tensors for exactly the modules that its settings name.

    Raises:
        UserError: it lacks those of some: part of the file is gone, and what is left is another adapter.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    absent = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"))
    settings = SimpleNamespace(**{**absent, "target_parameters": None, **adapter.table})
    if not settings.target_modules:
        return False
    held = {name.rpartition(".")[0] for name in changes.makers}
    named = {
        name
        for name, module in adapter.base.architecture.named_modules()
        if getattr(module, "weight", None) is not None and check_target_module_exists(settings, name)
    }
    lacking = sorted(named - held)
    if lacking:
        raise UserError(
            f"{adapter.directory / WEIGHTS} lacks the tensors of {len(lacking)} of the {len(named)} modules that its "
            f"{SETTINGS} names, e.g. {lacking[0]}"
        )
    return named == held


def stored_weights(base: BaseWeights, files: TensorFiles, where: str, whole: bool) -> Changes | None:
    """Return the changes of a checkpoint that holds tuned weights under the names of the model's parameters.

    Args:
        base: the pretrained weights.
        files: the checkpoint's tensors.
        where: names the checkpoint in messages.
        whole: whether every parameter must be there; if not, those that are not are unchanged.

    Returns:
        None where names are not those of the model.

    Raises:
        UserError: a shape differs, or weights that are one in the model are two in the checkpoint.
    """
    added = added_biases(base, files.shapes)
    buffers = {name for name, _ in base.architecture.named_buffers()}
    if any(name not in base.aliases and name not in added and name not in buffers for name in files.places):
        return None
    places: dict[str, str] = {}
    for name in files.places:
        if name not in base.aliases:
            continue
        first = base.aliases[name]
        if files.places[name].shape != base.shapes[first]:
            given, wanted = files.places[name].shape, base.shapes[first]
            raise UserError(f"{where} does not fit the model: {name} has shape {given}, the model's {wanted}")
        other = places.setdefault(first, name)
        if other != name and not bool((files.read(other) == files.read(name)).all()):
            raise UserError(f"{where} has its own weights for {other} and {name}, which are one in the model")
    if whole and set(places) != set(base.shapes):
        return None

    def difference(first: str, name: str) -> Change | None:
        return changed(base.as_held(files.read(name)), base.tensor(first))

    def addition(name: str) -> Change:
        return Dense(base.as_held(files.read(name)))

    makers: dict[str, Maker] = {first: partial(difference, first, name) for first, name in places.items()}
    makers |= {name: partial(addition, name) for name in added}
    return Changes(makers, added)


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
