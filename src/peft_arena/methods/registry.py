"""Every method by name; nothing is imported until a name is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft_arena.core.build import build
from peft_arena.core.registry import Registry
from peft_arena.methods.base import Method

METHODS: Registry[type[Method]] = Registry(
    "method",
    {
        "bitfit": "peft_arena.methods.bitfit:BitFit",
        "dora": "peft_arena.methods.lora:Dora",
        "full": "peft_arena.methods.full:Full",
        "ia3": "peft_arena.methods.ia3:IA3",
        "ln_tuning": "peft_arena.methods.norms:LNTuning",
        "lora": "peft_arena.methods.lora:Lora",
        "lora_plus": "peft_arena.methods.lora:LoraPlus",
        "miss": "peft_arena.methods.miss:Miss",
        "none": "peft_arena.methods.none:NoTraining",
        "oft": "peft_arena.methods.oft:Oft",
        "pissa": "peft_arena.methods.pissa:Pissa",
        "prompt_tuning": "peft_arena.methods.prompt:PromptTuning",
        "rslora": "peft_arena.methods.lora:RsLora",
        "vera": "peft_arena.methods.vera:Vera",
    },
)

BASE = "none"
"""The base model itself, a run like any other."""


def make_method(name: str, config: Mapping[str, Any] | None = None, where: str = "") -> Method:
    """Return a method with its settings checked.

    Args:
        name: one of ``METHODS.names()``.
        config: the method's own settings; what is not given takes its default.
        where: file and line the request was read from, for messages.

    Raises:
        UserError: unknown name, unknown key or forbidden value.
    """
    kind = METHODS.get(name, where)
    place = f"method {name}" + (f", {where}" if where else "")
    return kind(build(kind.Config, config or {}, where=place))
