"""From the training settings of the library's MetaMathQA experiments to ours; what has no counterpart is refused.

Facts about their training, as read in ``method_comparison/MetaMathQA`` of the library's repository: the loss is on
prompt and answer; batches are made of examples of similar length; an experiment's ``optimizer_kwargs`` replace the
default ones as a whole, so that a file with a rate alone has the optimizer's own weight decay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from peft_arena.core.errors import UserError
from peft_arena.interop.translation import ADAMW
from peft_arena.tasks.benchmarks.library import QUERY_TEMPLATE

OWN_DECAY: Mapping[str, float] = {ADAMW: 0.01, "lora-fa": 0.0, "riemannian": 0.01}
"""Type of optimizer to the weight decay it has where none is given; the last is AdamW's, which it wraps."""
GENERATION = {"max_length": 800, "max_new_tokens": 300}
"""Limits of its answers."""
WARMUP = 0.1
"""Share of the steps in which the rate of their cosine schedule rises."""
VALIDATION_ITEMS = 50
"""Their validation items."""
COMMON_NOTES = (
    "weight decay: ours leaves out scales, biases and other vectors; the library's reaches all that trains",
    "examples of more than max_length tokens are dropped, where the library cuts them",
    "batch_size_eval has no counterpart: in float32 the batch size of an evaluation changes no result",
)


@dataclass(frozen=True)
class Training:
    """What the training settings of one experiment become."""

    model: str
    dtype: str
    seed: int
    steps: int
    table: Mapping[str, Any]
    """Training settings of a study file."""
    optimizer: str
    optimizer_settings: Mapping[str, Any]
    """Of the optimizer, but for learning rate and weight decay."""
    notes: tuple[str, ...] = ()


Check = Callable[[Any], bool]
_HERE = "which there is no setting for here"
REQUIRED: Mapping[str, tuple[Check, str]] = {
    "compile": (lambda value: value is False, _HERE),
    "use_amp": (lambda value: value is False, _HERE),
    "autocast_adapter_dtype": (lambda value: value is True, "but adapters here always train in float32"),
    "attn_implementation": (lambda value: value is None, _HERE),
    "init_kv_cache_prefix": (lambda value: value is None, _HERE),
    "lr_scheduler": (lambda value: value == "cosine", "but only 'cosine' is translated"),
    "query_template": (lambda value: value == QUERY_TEMPLATE, f"but the task asks {QUERY_TEMPLATE!r}"),
    "generation_kwargs": (lambda value: value == GENERATION, f"but the task has {GENERATION!r}"),
    "dtype": (lambda value: value in {"float32", "bfloat16"}, "but there are float32 and bfloat16 here"),
    "grad_norm_clip": (lambda value: _number(value) and value > 0, "but gradients are always clipped here"),
    "use_gc": (lambda value: isinstance(value, bool), "neither true nor false"),
    "model_id": (lambda value: isinstance(value, str) and bool(value), "no name of a model"),
    "optimizer_type": (lambda value: isinstance(value, str), "no name of an optimizer"),
    "optimizer_kwargs": (
        lambda value: (
            isinstance(value, dict)
            and _number(value.get("lr"))
            and value["lr"] > 0
            and _number(value.get("weight_decay", 0))
            and value.get("weight_decay", 0) >= 0
        ),
        "without a rate above 0, or with a weight_decay that is no number from 0",
    ),
    **{
        name: (lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 1, "no whole number")
        for name in ("max_seq_length", "batch_size", "batch_size_eval", "max_steps", "eval_steps")
    },
    "seed": (lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0, "no whole number"),
}
"""Every training setting of theirs to what it must be, and what is said if it is not."""


def training_of(table: Mapping[str, Any]) -> Training:
    """Return what training settings become.

    Args:
        table: the defaults with an experiment's own settings over them.

    Raises:
        UserError: a setting that is missing, not known, or cannot be had here; names it and its value.
    """
    for name in table:
        if name not in REQUIRED:
            raise UserError(f"{name} is {table[name]!r}: an unknown training setting")
    for name, (check, otherwise) in REQUIRED.items():
        if name not in table:
            raise UserError(f"{name} is missing in the training settings")
        if not check(table[name]):
            raise UserError(f"{name} is {table[name]!r}, {otherwise}")
    kind, rest = str(table["optimizer_type"]), dict(table["optimizer_kwargs"])
    if kind not in OWN_DECAY:
        raise UserError(f"optimizer_type is '{kind}', {_HERE}; known: {', '.join(OWN_DECAY)}")
    rate, decay = rest.pop("lr"), rest.pop("weight_decay", OWN_DECAY[kind])
    steps = int(table["max_steps"])
    notes = []
    if "weight_decay" not in table["optimizer_kwargs"]:
        notes.append(f"optimizer_kwargs names no weight_decay: {kind}'s own, {decay:g}")
    if table["use_gc"]:
        notes.append("use_gc true: saves memory there and changes no result; ours keeps activations")
    return Training(
        model=str(table["model_id"]),
        dtype=str(table["dtype"]),
        seed=int(table["seed"]),
        steps=steps,
        table={
            "schedule": {"steps": steps},
            "batch_size": table["batch_size"],
            "learning_rate": float(rate),
            "lr_schedule": "cosine",
            "warmup_fraction": WARMUP,
            "weight_decay": float(decay),
            "max_grad_norm": float(table["grad_norm_clip"]),
            "max_length": table["max_seq_length"],
            "loss_on": "all",
            "group_by_length": True,
            "validation_items": VALIDATION_ITEMS,
            "validate_every": min(1.0, table["eval_steps"] / steps),
        },
        optimizer=kind,
        optimizer_settings=rest,
        notes=tuple(notes),
    )


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
