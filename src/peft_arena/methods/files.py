"""The two files of an adapter directory: written plainly, read with every doubt raised as a user error."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_arena.core import bounded
from peft_arena.core.bounded import present
from peft_arena.core.errors import UserError
from peft_arena.models.folder import ADAPTER_SETTINGS

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor

WEIGHTS = "adapter_model.safetensors"
SETTINGS = ADAPTER_SETTINGS
CIRCUMSTANCES = frozenset({"base_model_name_or_path", "revision", "peft_version", "inference_mode", "auto_mapping"})
"""Entries of an adapter's configuration that say where it was made, not what it is."""
DEAD = frozenset({"merge_weights"})
"""Fields that peft once had and that changed nothing of what a saved adapter computes, whatever they say."""


def settings_table(config: PeftConfig) -> dict[str, Any]:
    """Return a peft configuration as JSON values, sets sorted so that equal settings give equal text."""
    return {name: _plain(value) for name, value in config.to_dict().items()}


def write_adapter(directory: Path, config: PeftConfig, base: str, tensors: Mapping[str, Tensor]) -> None:
    """Write a plain adapter directory that ``PeftModel.from_pretrained`` loads.

    Args:
        directory: created if it does not exist.
        config: the adapter's settings.
        base: name or path of the model the adapter belongs to.
        tensors: the adapter's weights by their names in a peft checkpoint.
    """
    from safetensors.torch import save_file

    table = settings_table(config) | {"base_model_name_or_path": base, "inference_mode": True}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / SETTINGS).write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, directory / WEIGHTS, metadata={"format": "pt"})


def read_settings(directory: Path, method: str) -> dict[str, Any]:
    """Read the settings of an adapter directory.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    table = read_table(directory / SETTINGS, method)
    if "peft_type" not in table:
        raise UserError(f"{directory / SETTINGS} is not an adapter configuration: it has no peft_type")
    return table


def read_table(file: Path, method: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: the file is missing or damaged.
    """
    if not present(file):
        raise UserError(f"no checkpoint of method {method} in {file.parent}: {file.name} is missing")
    return bounded.read_table(file)


def check_settings(
    saved: Mapping[str, Any], own: Mapping[str, Any], ignored: Collection[str], method: str, directory: Path
) -> None:
    """Check that a checkpoint was made with the settings of the method that is to read it.

    Raises:
        UserError: another kind of adapter, or the first settings that differ.
    """
    if saved["peft_type"] != own["peft_type"]:
        raise UserError(f"{directory} holds a {saved['peft_type']} adapter, method {method} needs {own['peft_type']}")
    skipped = CIRCUMSTANCES | set(ignored)
    shared = [name for name in own if name in saved and name not in skipped]
    wrong = [
        f"{name} = {saved[name]!r} instead of {own[name]!r}"
        for name in shared
        if _comparable(saved[name]) != _comparable(own[name])
    ]
    if wrong:
        raise UserError(f"{directory} was made with other settings than method {method} has: {', '.join(wrong[:3])}")


def refuse_unknown_fields(table: Mapping[str, Any], where: str) -> None:
    """Refuse the settings of an adapter that the installed peft would drop although they are active.

    A field that is off (None, False, 0, or empty) says nothing and passes, and so do fields of peft's past that never
    changed what a saved adapter computes. An adapter type that peft does not have is left to peft to refuse.

    Args:
        table: of ``adapter_config.json``.
        where: names the adapter in messages.

    Raises:
        UserError: names the fields and what they are set to.
    """
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind: Any = str(table.get("peft_type"))  # any text may stand there
    made: Any = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    if made is None:
        return
    odd = [f"`{name}` = {table[name]!r}" for name in unknown_active(table, made.__dataclass_fields__)]
    if odd:
        plural = "s" if len(odd) > 1 else ""
        raise UserError(
            f"{where}: the installed peft {peft.__version__} has no such field{plural} of {kind} as "
            f"{', '.join(odd[:3])}; what it does to the weights cannot be known here"
        )


def unknown_active(table: Mapping[str, Any], known: Collection[str]) -> list[str]:
    """Return the entries of an adapter's configuration that are none of the known fields and are on, sorted."""
    return sorted(name for name in set(table) - set(known) - DEAD if is_on(table[name]))


def is_on(value: object) -> bool:
    """Say whether a setting is on: anything but None, False, zero, and tables and lists of nothing else."""
    if isinstance(value, Mapping):
        return any(is_on(held) for held in value.values())
    if isinstance(value, list | tuple):
        return any(is_on(held) for held in value)
    return bool(value)


def read_tensors(file: Path, method: str) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        UserError: the file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.exists():
        raise UserError(f"no checkpoint of method {method} in {file.parent}: {file.name} is missing")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file} is damaged: {error}") from None


def _plain(value: object) -> object:
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value.value if isinstance(value, Enum) else value


def _comparable(value: object) -> object:
    """Return what two settings are compared by: lists without their order, and nothing as nothing."""
    if isinstance(value, list | tuple | Mapping) and not value:
        return None
    return sorted(value, key=str) if isinstance(value, list | tuple) else value
