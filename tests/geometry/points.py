"""Tuned points on the micro model for tests: a method attached, its trained tensors moved, and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from peft_arena.core.specs import MethodSpec, ModelSpec
from peft_arena.methods.registry import make_method
from peft_arena.models.load import Loaded, load, pin
from peft_arena.weights.tuned import Tuned

CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "alpha": 8.0},
    "prompt_tuning": {"num_virtual_tokens": 5},
    "prefix_tuning": {"num_virtual_tokens": 4},
    "oft": {"block_size": 32},
    "dora": {"rank": 4, "alpha": 8.0},
    "pissa": {"rank": 4},
}


def base_spec(dtype: str = "float32") -> ModelSpec:
    return pin(ModelSpec(name="micro", dtype=dtype))  # type: ignore[arg-type]


def base_point(dtype: str = "float32") -> Tuned:
    return Tuned(base=base_spec(dtype), directory=None, method=None, subject="base", step=0)


def fresh() -> Loaded:
    return load(base_spec())


def tuned_point(directory: Path, name: str, *, seed: int = 0, size: float = 0.02, config: Any = None) -> Tuned:
    """Return a point whose trained tensors were moved at random, saved in a directory."""
    method = make_method(name, CONFIGS.get(name, {}) if config is None else config)
    attached = method.attach(fresh().model, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attached.trained().values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    attached.save(directory)
    spec = MethodSpec(name=name, config=method.config.model_dump(mode="json"))
    return Tuned(base=base_spec(), directory=directory, method=spec, subject=f"{name}-{seed}", step=1)
