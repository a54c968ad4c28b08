"""From a checkpoint directory to the changes it makes, by what its own files say.

A closed form is used only where every tensor of the file and every active setting of the configuration is understood;
everything else goes through the method's own merge, or peft's, see :mod:`peft_arena.weights.merging`.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from peft_arena.core.errors import UserError
from peft_arena.methods.files import SETTINGS, WEIGHTS
from peft_arena.models.stored import INDEX, SINGLE
from peft_arena.weights.adapter_directory import CONFIG, Adapter, Changes, Maker, added_biases, changed, open_adapter
from peft_arena.weights.base import BaseWeights
from peft_arena.weights.change import Change, Dense
from peft_arena.weights.files import TensorFiles, model_files
from peft_arena.weights.forms_adapter import FORMS
from peft_arena.weights.forms_whole import with_whole_modules


def closed_form(base: BaseWeights, directory: Path) -> Changes | None:
    """Return the changes of a checkpoint where its files alone say them; None where they do not.

    Raises:
        UserError: a file is missing or damaged, or does not fit the base.
    """
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
