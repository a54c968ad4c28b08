"""A process that restores checkpoints in new processes: started once, it forks one for each question.

It has imported the heavy libraries and done nothing with them, so a restore in a fork of it has seen nothing of the
process that trained, and takes a fraction of a second. The answer is one line of JSON.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

SECONDS = 300


def main() -> None:
    """Answer questions until there are no more."""
    import peft  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    import peft_arena.methods.adapter
    import peft_arena.testing.subject  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            signal.alarm(SECONDS)
            _write(_answer(json.loads(line)))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            _write({"error": f"the process that restored ended with code {os.waitstatus_to_exitcode(status)}"})


def _write(answer: Mapping[str, Any]) -> None:
    os.write(1, f"\n{json.dumps(answer)}\n".encode())


def _answer(question: Mapping[str, Any]) -> dict[str, Any]:
    """Restore a checkpoint and return how far its logits are from the expected ones, or what went wrong."""
    import torch
    from safetensors.torch import load_file

    from peft_arena.core.errors import first_line
    from peft_arena.testing.subject import Subject, difference, logits, tokens

    torch.set_num_threads(question["threads"])
    torch.manual_seed(4242)
    try:
        found: Any = module_named(question["module"], question["file"])
        for part in question["name"].split("."):
            found = getattr(found, part)
    except Exception as error:  # noqa: BLE001 - told in the line
        place = f"{question['module']}:{question['name']}"
        return {"error": f"{place} cannot be imported in a new process ({type(error).__name__}: {error})"}
    try:
        subject = Subject(found, question["config"], question["kind"], question["dtype"])
        restored = subject.make().restore(subject.model(), Path(question["checkpoint"]))
        expected = load_file(question["expected"])["logits"]
        return {"gap": difference(logits(restored.model, tokens()), expected)}
    except Exception as error:  # noqa: BLE001 - told in the line
        return {"error": f"{type(error).__name__}: {first_line(error)}"}


def module_named(name: str, file: str) -> ModuleType:
    """Import a module by its name, or from its file where that is on no search path, as test files may be."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module


if __name__ == "__main__":
    main()
