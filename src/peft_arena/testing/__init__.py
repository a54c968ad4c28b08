"""Public checks for tasks, methods and models that others add; needs pytest only where a function says so.

Nothing heavy is imported until one of them is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_arena.testing.methods import check_method, method_tests
    from peft_arena.testing.tasks import check_task

__all__ = ["check_method", "check_task", "method_tests"]
_MODULES = {"check_method": "methods", "check_task": "tasks", "method_tests": "methods"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
