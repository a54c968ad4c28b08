"""Tensors of training checkpoints, read by the tools of the libraries that wrote them.

PyTorch's distributed checkpoints (accelerate's FSDP writes them) are read tensor by tensor with
``torch.distributed.checkpoint``, without accelerate's ``merge_fsdp_weights``, which holds all tensors in memory. Their
``.metadata`` is a Python pickle, which could run code: it is opened with the few names such a file needs and no other,
before PyTorch reads it. Tensors are read by PyTorch with ``weights_only``. DeepSpeed's ZeRO checkpoints are read by
DeepSpeed, which runs what their pickles say: only those from a trusted source may be read.
"""

from __future__ import annotations

import importlib.util
import pickle
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from peft_arena.core.errors import UserError, first_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

METADATA = ".metadata"
BINARIES = ("adapter_model.bin", "pytorch_model.bin", "pytorch_model_fsdp.bin", "pytorch_model.bin.index.json")
TRAINING = frozenset(
    {
        *("optimizer", "optim", "optimizers", "scheduler", "lr_scheduler", "scaler", "train_state", "trainer_state"),
        *("dataloader", "dataloaders", "rng", "random_states", "extra_state", "step", "epoch", "global_step"),
    }
)
"""First parts of names, in a checkpoint of a whole training, that are not the model's."""
WRAPPERS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"})
"""Parts of names that torch's wrappers of modules put in."""
OUTER = ("", "model.", "module.", "state_dict.", "app.model.", "model.module.", "app.")
"""What may stand before the names of a model's tensors."""
DAMAGE = (
    *(OSError, EOFError, RuntimeError, ValueError, KeyError, AttributeError, ImportError, IndexError, TypeError),
    pickle.UnpicklingError,
)
"""What the libraries raise for checkpoints that are missing parts or damaged."""
CHECKPOINT = "torch.distributed.checkpoint"
NAMES: Mapping[str, frozenset[str]] = {
    f"{CHECKPOINT}.metadata": frozenset(
        {
            *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties"),
            *("BytesStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
        }
    ),
    f"{CHECKPOINT}.filesystem": frozenset({"_StorageInfo"}),
    "torch.serialization": frozenset({"_get_layout"}),
    "pathlib": frozenset({"PosixPath", "WindowsPath"}),
    "pathlib._local": frozenset({"PosixPath", "WindowsPath"}),
    "collections": frozenset({"OrderedDict"}),
}
"""What the metadata of a distributed checkpoint may name, by module; of ``torch`` its types and ``Size``."""


class _Metadata(pickle.Unpickler):
    """Reads metadata without letting them name anything that could do harm."""

    def find_class(self, module: str, name: str) -> Any:
        import torch

        plain = module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype))
        if not plain and name not in NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs and which is not loaded")
        return super().find_class(module, name)


@dataclass(frozen=True)
class Stored:
    """Type and shape of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Shards:
    """Tensors of a checkpoint by name."""

    directory: Path
    layout: str
    """Who wrote it, for messages and records."""
    stored: Mapping[str, Stored]
    read: Callable[[str], Tensor]
    """Returns a tensor by name, in the type it is stored in."""


def shards_in(directory: Path) -> Shards | None:
    """Return the tensors of a sharded checkpoint in a directory, or one level below it; None if there is none.

    Raises:
        UserError: a file of it is missing or damaged, several are there, or the library that reads it is not
            installed.
    """
    below = [child for child in sorted(directory.iterdir()) if child.is_dir() and (child / METADATA).is_file()]
    models = [child for child in below if not child.name.startswith("optimizer")]
    if (directory / METADATA).is_file():
        return distributed(directory)
    if len(models) > 1:
        names = ", ".join(child.name for child in models)
        raise UserError(f"{directory} holds several sharded models ({names}); name the directory of one")
    if models:
        return distributed(models[0])
    if (directory / "zero_to_fp32.py").exists() or any(directory.glob("global_step*/")):
        return zero(directory)
    return None


def refuse_binaries(directory: Path) -> None:
    """Name the pickled files that are there instead of what could be read.

    Raises:
        UserError: there are some.
    """
    found = [name for name in BINARIES if (directory / name).exists()]
    if found:
        raise UserError(
            f"{directory} holds its weights in {found[0]}, a Python pickle, which is not read; save the checkpoint "
            "with safetensors (save_safetensors, safe_serialization)"
        )


def distributed(directory: Path) -> Shards:
    """Open a distributed checkpoint of PyTorch; tensors are read one at a time.

    Raises:
        UserError: its metadata are damaged, or a file with values is missing.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    try:
        with (directory / METADATA).open("rb") as file:
            metadata: Any = _Metadata(file).load()
        tensors = {
            name: Stored(tuple(item.size), item.properties.dtype)
            for name, item in metadata.state_dict_metadata.items()
            if isinstance(item, TensorStorageMetadata)
        }
        files = sorted({str(place.relative_path) for place in metadata.storage_data.values()})
    except DAMAGE as error:
        raise UserError(f"{directory / METADATA} is damaged: {first_line(error)}") from error
    lost = [name for name in files if not (directory / name).exists()]
    if lost:
        raise UserError(f"{directory} lacks {len(lost)} of its {len(files)} shards, the first: {lost[0]}")

    def read(name: str) -> Tensor:
        import torch

        found = torch.empty(tensors[name].shape, dtype=tensors[name].dtype)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it reads in one process is meant
                dcp.load({name: found}, storage_reader=dcp.FileSystemReader(directory), no_dist=True)
        except (*DAMAGE, dcp.CheckpointException) as error:
            raise UserError(f"{directory} is damaged: {name} cannot be read: {first_line(error)}") from error
        return found

    return Shards(directory, "torch.distributed.checkpoint", tensors, read)


def zero(directory: Path) -> Shards:
    """Open a ZeRO checkpoint of DeepSpeed; all tensors are in memory, in float32.

    Raises:
        UserError: DeepSpeed is not installed, or cannot read it.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"{directory} is a checkpoint of DeepSpeed ZeRO, which needs deepspeed (pip install deepspeed)")
    tool: Any = importlib.import_module("deepspeed.utils.zero_to_fp32")
    try:
        tensors: dict[str, Tensor] = tool.get_fp32_state_dict_from_zero_checkpoint(str(directory))
    except DAMAGE as error:
        raise UserError(f"deepspeed cannot read {directory}: {first_line(error)}") from error
    stored = {name: Stored(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    return Shards(directory, "deepspeed", stored, lambda name: tensors[name].detach().cpu())


class Places(NamedTuple):
    """Names of tensors in a checkpoint."""

    wanted: dict[str, str]
    """By the name of each tensor that is to be written."""
    others: dict[str, str]
    """By the name of each other tensor that is known and there."""


def places(shards: Shards, wanted: Iterable[str], others: Iterable[str], *, adapter: bool) -> Places:
    """Find the place of every tensor of a checkpoint.

    Names may have something before them and parts that wrappers put in.

    Args:
        shards: the checkpoint.
        wanted: names of the tensors that are to be written; each has to be there.
        others: names of tensors that may be there too.
        adapter: names may have one part more than is wanted, the name of the adapter in memory (``.default.``).

    Raises:
        UserError: one is missing, or a tensor has no place.
    """
    wanted, others = set(wanted), set(others) - set(wanted)
    plain = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in shards.stored}
    owned = {name: text for name, text in plain.items() if text.split(".")[0] not in TRAINING}
    best: dict[str, str] = {}
    for outer in OUTER:
        found: dict[str, str] = {}
        for name, text in owned.items():
            rest = text.removeprefix(outer)
            place = _place(rest, wanted, others, adapter) if text.startswith(outer) else None
            if place is not None and place not in found:
                found[place] = name
        if len(found) > len(best):
            best = found
    lacking = sorted(wanted - set(best))
    if lacking:
        raise UserError(f"{shards.directory} lacks {len(lacking)} of {len(wanted)} tensors, the first: {lacking[0]}")
    stray = sorted(set(owned) - set(best.values()))
    if stray:
        raise UserError(f"{shards.directory} holds {len(stray)} tensors that have no place, the first: {stray[0]}")
    kept = {name: best[name] for name in sorted(others & set(best))}
    return Places({name: best[name] for name in sorted(wanted)}, kept)


def _place(name: str, wanted: set[str], others: set[str], adapter: bool) -> str | None:
    if name in wanted or name in others:
        return name
    if not adapter:
        return None
    parts = [part for part in name.split(".") if part != "modules_to_save"]
    shorter = {".".join(parts[:place] + parts[place + 1 :]) for place in range(1, len(parts))} & wanted
    return shorter.pop() if len(shorter) == 1 else None
