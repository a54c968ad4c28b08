"""The changes of methods without a closed form, by their own merge or peft's: one model in memory.

The change is then the difference of two float32 weights: it is exact to about 1e-7 of the weight, not of the change.
"""

from __future__ import annotations

import contextlib
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_arena.core.errors import UserError, first_line
from peft_arena.core.foreign import reading
from peft_arena.core.text import few
from peft_arena.methods.base import Attached, Capability, Method
from peft_arena.methods.files import WEIGHTS
from peft_arena.methods.wrapping import names_kept, renamed_by_peft
from peft_arena.models.stored import unreported, whole
from peft_arena.weights.adapter_directory import (
    PREFIX,
    Adapter,
    Changes,
    Maker,
    added_biases,
    changed,
    open_adapter,
    refuse_tied,
)
from peft_arena.weights.base import BaseWeights
from peft_arena.weights.change import Change, Dense

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

FOREIGN = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, NotImplementedError)
"""What peft and transformers raise for directories that do not fit a model."""


def own_merge(base: BaseWeights, directory: Path, method: Method) -> Changes:
    """Return the changes a checkpoint of a method makes, by the method's own merge in float32.

    Raises:
        UserError: the directory does not fit, or the method gives no weights.
    """
    attached = method.restore(base.load(), directory)
    in_float32(attached.model)
    if Capability.MERGEABLE in method.card.capabilities:
        return merged_weights(base, attached.merged(), str(directory))
    return Changes({f"{name}.weight": partial(_delta, attached, name) for name in base.linears})


def _delta(attached: Attached, module: str) -> Change | None:
    found = attached.delta(module)
    return None if found is None else Dense(found.detach().cpu())


def merged_weights(base: BaseWeights, merged: nn.Module, where: str) -> Changes:
    """Return the changes from the pretrained weights to those of a model in memory.

    Raises:
        UserError: the model has other parameters, or weights that are one in the pretrained model are two in it.
    """
    tuned: dict[str, Tensor] = {name: p.detach() for name, p in merged.named_parameters(remove_duplicate=False)}
    added = added_biases(base, {name: tuple(tensor.shape) for name, tensor in tuned.items()})
    wrong = sorted(set(tuned) ^ (set(base.aliases) | set(added)))
    if wrong:
        raise UserError(f"{where} has other parameters than the model, the first: {wrong[0]}")
    for name, first in base.aliases.items():
        if tuple(tuned[name].shape) != base.shapes[first]:
            raise UserError(f"{where} holds {name} as {tuple(tuned[name].shape)}, the model as {base.shapes[first]}")
        if tuned[name] is not tuned[first] and not torch.equal(tuned[name], tuned[first]):
            raise UserError(f"{where} has its own weights for {first} and {name}, which are one in the model")

    def difference(name: str) -> Change | None:
        if name in added:
            return Dense(tuned[name].cpu().float())
        return changed(tuned[name].cpu().float(), base.tensor(name))

    makers: dict[str, Maker] = {name: partial(difference, name) for name in (*base.shapes, *added)}
    return Changes(makers, added)


def in_float32(model: nn.Module) -> None:
    """Bring all weights of a model, and of what is attached to it, to float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    for buffer in model.buffers():
        if buffer.dtype in (torch.bfloat16, torch.float16):
            buffer.data = buffer.data.float()


def foreign_merge(base: BaseWeights, directory: Path) -> Changes:
    """Return the changes of a PEFT adapter that is not a checkpoint of ours, by peft's own merge in float32.

    Raises:
        UserError: peft cannot load or merge it, or it does not fit the base.
    """
    wrapped: Any = foreign_adapter(base, base.load(), directory)
    in_float32(wrapped)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = wrapped.merge_and_unload()
    except FOREIGN as error:
        raise UserError(f"peft cannot merge the adapter in {directory}: {first_line(error)}") from error
    return merged_weights(base, merged, str(directory))


def foreign_adapter(
    base: BaseWeights, model: PreTrainedModel, directory: Path, *, by_peft_alone: bool = False
) -> PeftModel:
    """Put a PEFT adapter that is not a checkpoint of ours on a model, in evaluation mode.

    Args:
        base: the pretrained weights.
        model: the pretrained model; it is wrapped.
        directory: of the adapter.
        by_peft_alone: refuse an adapter that others, who have peft and nothing else, would read as another one: peft
            takes some names of layers for those that an architecture's experts had in older versions of transformers.

    Raises:
        UserError: peft cannot load it, or would read it as another one; a tensor of the file has no place, or of the
            model none in the file; or an entry is no finite number.
    """
    from peft import PeftModel, get_peft_model_state_dict

    from peft_arena.methods.adapter import tuner_layers

    adapter = open_adapter(base, directory)
    for name in adapter.files.places:
        adapter.files.read(name)  # shows that its entries are numbers
    renamed = _renamed(adapter, model)
    if renamed and by_peft_alone:
        raise UserError(
            f"peft alone would read another model from this adapter: it takes {few(renamed)} for the fused experts of "
            f"{type(model).__name__}, and the adapter is of the layers of that name; peft-arena merge writes the whole"
        )
    try:
        with warnings.catch_warnings(), names_kept() if renamed else contextlib.nullcontext():
            warnings.simplefilter("ignore")
            wrapped: PeftModel = PeftModel.from_pretrained(model, str(directory))
    except FOREIGN as error:
        raise UserError(f"peft cannot load the adapter in {directory}: {first_line(error)}") from error
    wanted = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    lacking = sorted(wanted - set(adapter.files.places))
    if lacking:
        raise UserError(f"{directory / WEIGHTS} lacks {len(lacking)} tensors of its own settings, e.g. {lacking[0]}")
    stray = sorted(name for name in adapter.files.places if name not in wanted and _own(name) not in base.aliases)
    if stray:
        raise UserError(f"{directory / WEIGHTS} holds {len(stray)} tensors that have no place, e.g. {stray[0]}")
    for module in tuner_layers(wrapped):
        if f"{module}.weight" in base.aliases:
            refuse_tied(base, f"{module}.weight", str(directory))
    wrapped.requires_grad_(False)
    wrapped.eval()
    return wrapped


def _renamed(adapter: Adapter, model: PreTrainedModel) -> list[str]:
    """Return the targets that peft takes for experts although the adapter's tensors are of the model's own layers."""
    from peft import PeftConfig

    layers = {f"{name}." for name, module in adapter.base.architecture.named_modules() if isinstance(module, nn.Linear)}
    if not all(any(name.startswith(f"{PREFIX}{layer}") for layer in layers) for name in adapter.files.places):
        return []
    with reading(f"peft cannot load the adapter in {adapter.directory}"):
        return renamed_by_peft(PeftConfig.from_pretrained(str(adapter.directory)), model)


def foreign_model(base: BaseWeights, directory: Path) -> Changes:
    """Return the changes of a model directory whose tensors have other names than the model's parameters.

    Raises:
        UserError: transformers cannot load it into the base's architecture.
    """
    kind: Any = type(base.architecture)
    try:
        with unreported():
            made = kind.from_pretrained(
                directory,
                dtype=base.dtype,
                output_loading_info=True,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
            )
    except FOREIGN as error:
        raise UserError(f"cannot load the model in {directory}: {first_line(error)}") from error
    loaded = whole(made, f"{directory} is no tuned version of this model", directory)
    return merged_weights(base, loaded, str(directory))


def _own(name: str) -> str:
    return name.removeprefix(PREFIX).replace(".base_layer.", ".")
