"""Eleven small procedural skills, the world in which the packaged micro model lives; no network, no torch.

The retention tasks are what the micro model was trained on before it was packaged; the target tasks are what it has
never seen. Importing this package imports no task.
"""

from __future__ import annotations

MICRO_TASKS: dict[str, str] = {
    "micro-boolean": "peft_arena.tasks.micro.reasoning:Boolean",
    "micro-calendar": "peft_arena.tasks.micro.reasoning:Calendar",
    "micro-cipher": "peft_arena.tasks.micro.targets:Cipher",
    "micro-compare": "peft_arena.tasks.micro.reasoning:Compare",
    "micro-facts": "peft_arena.tasks.micro.facts:Facts",
    "micro-format": "peft_arena.tasks.micro.letters:Format",
    "micro-months": "peft_arena.tasks.micro.targets:Months",
    "micro-operator": "peft_arena.tasks.micro.targets:Operator",
    "micro-position": "peft_arena.tasks.micro.letters:Position",
    "micro-reverse": "peft_arena.tasks.micro.targets:Reverse",
    "micro-sort": "peft_arena.tasks.micro.letters:Sort",
}
"""Task name to ``module:Class``, for a registry."""
