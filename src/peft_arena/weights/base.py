"""The pretrained parameters of a model, one at a time, by memory map, without building the model.

Names, shapes and ties come from the architecture on the meta device. Where a parameter is not in the files under its
own name (transformers renames some when it loads), the model is loaded once and its parameters are handed out.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from peft_arena.core.errors import UserError, unknown
from peft_arena.core.specs import ModelSpec
from peft_arena.weights.files import TensorFiles, model_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class BaseWeights:
    """Pretrained parameters by their names in the model, in the values they have in the model's own type."""

    def __init__(
        self,
        architecture: PreTrainedModel,
        dtype: torch.dtype,
        read: Callable[[str], Tensor],
        load: Callable[[], PreTrainedModel],
        content: str | None = None,
    ) -> None:
        """Hold the means to read; use :func:`base_weights` or :meth:`of_model`.

        Args:
            architecture: the model; its weights, which may be on the meta device, are not used.
            dtype: the type the model computes in; a parameter is rounded to it, and handed out as float32.
            read: returns a parameter by its name.
            load: returns the pretrained model, freshly loaded each time, to be changed at will.
            content: what identifies the weights; None if only the weights themselves do.
        """
        from peft_arena.methods.adaptable import linear_layers

        self.architecture = architecture
        self.dtype = dtype
        self.load = load
        self._read = read
        self._content = content
        self._hashes: dict[str, str] = {}
        self._last: tuple[str, Tensor] | None = None
        own = {id(p): name for name, p in architecture.named_parameters()}
        every = list(architecture.named_parameters(remove_duplicate=False))
        self.aliases = {name: own[id(p)] for name, p in every}
        """Every name of every parameter, to the first name it has: tied parameters have several."""
        self.shapes = {name: tuple(p.shape) for name, p in architecture.named_parameters()}
        """Shape by name, each parameter once, in the model's order."""
        self.linears = tuple(linear_layers(architecture))
        """Every linear layer but the output layer, in the model's order."""
        output = architecture.get_output_embeddings()
        self.output = next((name for name, found in architecture.named_modules() if found is output), None)
        """The output layer over the vocabulary."""
        head = f"{self.output}.weight"
        self.own_head = head in self.aliases and not self.tied(head)
        """Whether that layer's weight is not one with the embeddings."""

    @classmethod
    def of_model(cls, model: PreTrainedModel) -> BaseWeights:
        """Return the parameters of a model in memory, which must stay as it is; a copy is made where one is needed."""
        held = dict(model.named_parameters())
        return cls(model, model.dtype, lambda name: held[name].detach().cpu(), lambda: copy.deepcopy(model))

    def canonical(self, name: str) -> str:
        """Return the first of the names that a parameter has.

        Raises:
            UserError: the model has no such parameter.
        """
        if name not in self.aliases:
            raise unknown("parameter", name, self.aliases)
        return self.aliases[name]

    def tied(self, name: str) -> bool:
        """Say whether a parameter stands at several places in the model."""
        first = self.canonical(name)
        return sum(other == first for other in self.aliases.values()) > 1

    def as_held(self, tensor: Tensor) -> Tensor:
        """Return a stored tensor as the model computes with it: rounded to the model's type, float32."""
        return tensor.to(self.dtype).float()

    def tensor(self, name: str) -> Tensor:
        """Return a parameter, float32 on the CPU; it may be a view of a file and must not be written to.

        Raises:
            UserError: the model has no such parameter, or its file cannot be read.
        """
        name = self.canonical(name)
        if self._last is None or self._last[0] != name:  # several points ask for the same one in turn
            self._last = None
            self._last = (name, self.as_held(self._read(name)))
        return self._last[1]

    def content_hash(self, name: str) -> str:
        """Return what identifies the values of a parameter, 64 hex digits.

        The SHA-256 of type, shape and bytes; where the files are pinned by a hash, that of this hash and the name,
        which saves reading them.
        """
        name = self.canonical(name)
        if name not in self._hashes:
            digest = hashlib.sha256(f"{self.dtype} {self.shapes[name]}".encode())
            if self._content is None:
                digest.update(self.tensor(name).contiguous().numpy().data)
            else:
                digest.update(f" {name} of {self._content}".encode())
            self._hashes[name] = digest.hexdigest()
        return self._hashes[name]


class Held(NamedTuple):
    """Weights that have been opened before."""

    base: BaseWeights
    directory: Path
    stamps: tuple[tuple[str, int, int], ...]
    """Name, size and time of change of every file."""


_HELD: dict[ModelSpec, Held] = {}
"""The base that was opened last, if it is pinned: its files are hashed and their headers read once per process."""


def base_weights(spec: ModelSpec) -> BaseWeights:
    """Return the pretrained parameters of a model from its files; the same object while the files are the same.

    Raises:
        UserError: the model cannot be found, is not at the spec's revision, a shard is missing, a file is damaged, or
            a parameter has another shape than the configuration says.
    """
    from peft_arena.models.load import weight_files

    held = _HELD.get(spec)
    if held is not None and held.stamps == _stamps(held.directory):
        return held.base
    _HELD.clear()
    directory = weight_files(spec)
    stamps = _stamps(directory)
    base = _opened(spec, directory)
    if spec.revision is not None:
        _HELD[spec] = Held(base, directory, stamps)
    return base


def _stamps(directory: Path) -> tuple[tuple[str, int, int], ...]:
    files = [(file.name, file.stat()) for file in sorted(directory.glob("*")) if file.is_file()]
    return tuple((name, found.st_size, found.st_mtime_ns) for name, found in files)


def _opened(spec: ModelSpec, directory: Path) -> BaseWeights:
    from peft_arena.models.folder import settle_ties_as
    from peft_arena.models.load import Source, load_model, skeleton

    architecture = skeleton(spec.model_copy(update={"name": str(directory), "revision": None, "new_tokens": ()}))
    files = model_files(directory)
    dtype: torch.dtype = getattr(torch, spec.dtype)
    content = spec.revision
    if content is not None and spec.new_tokens:
        content = f"{content} with {list(spec.new_tokens)}"

    def fresh() -> PreTrainedModel:
        return load_model(Source("path", str(directory), None), spec)

    places = names_in(files, architecture)
    if places is None:
        if len(list(architecture.named_parameters(remove_duplicate=False))) > len(list(architecture.parameters())):
            settle_ties_as(architecture, fresh())  # what is one weight is seen only once it has been loaded
        return BaseWeights(architecture, dtype, _from_loaded(fresh), fresh, content)
    check_shapes(files, architecture, places, str(directory))
    return BaseWeights(architecture, dtype, lambda name: files.read(places[name]), fresh, content)


def names_in(files: TensorFiles, architecture: PreTrainedModel) -> dict[str, str] | None:
    """Return by the name of each parameter its name in the files; None if one of them is not there."""
    first = {id(p): name for name, p in architecture.named_parameters()}
    found: dict[str, str] = {}
    for name, parameter in architecture.named_parameters(remove_duplicate=False):
        if name in files:
            found.setdefault(first[id(parameter)], name)
    return found if set(found) == set(first.values()) else None


def check_shapes(files: TensorFiles, architecture: PreTrainedModel, places: dict[str, str], where: str) -> None:
    """Check that every parameter has the shape the architecture gives it.

    Raises:
        UserError: one has not.
    """
    shapes = files.shapes
    for name, parameter in architecture.named_parameters():
        if shapes[places[name]] != tuple(parameter.shape):
            given, wanted = shapes[places[name]], tuple(parameter.shape)
            raise UserError(f"{where} holds {name} as {given}, the model's configuration says {wanted}")


def _from_loaded(load: Callable[[], PreTrainedModel]) -> Callable[[str], Tensor]:
    held: dict[str, Tensor] = {}

    def read(name: str) -> Tensor:
        if not held:
            held.update({name: p.detach().cpu() for name, p in load().named_parameters()})
        return held[name]

    return read
