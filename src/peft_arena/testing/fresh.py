"""Restoring in a new process, through the one server of :mod:`peft_arena.testing.reader`."""

from __future__ import annotations

import contextlib
import inspect
import json
import subprocess
import sys
from functools import cache
from typing import Any

from peft_arena.testing.trial import Life


@cache
def reader() -> subprocess.Popen[str]:
    """Start the server, which is ready some seconds later and ends with this process."""
    command = [sys.executable, "-m", "peft_arena.testing.reader"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def gap_in_new_process(life: Life) -> float:
    """Restore a checkpoint in a new process, whose random state is another.

    Returns:
        The largest difference of its logits from those of the trained model.

    Raises:
        AssertionError: the method cannot be imported there, or restoring failed.
    """
    import torch
    from safetensors.torch import save_file

    method = life.subject.method
    assert method.__module__ != "__main__" and "<locals>" not in method.__qualname__, (
        f"{method.__qualname__} cannot be imported in a new process: define it at the top level of a module"
    )
    expected = life.directory / "expected.safetensors"
    save_file({"logits": life.tuned.contiguous()}, expected)
    settings = life.subject.make().config.model_dump(mode="json")
    question = {
        "module": method.__module__,
        "name": method.__qualname__,
        "config": settings,
        "kind": life.subject.kind,
        "dtype": life.subject.dtype,
        "checkpoint": str(life.saved.resolve()),
        "expected": str(expected.resolve()),
        "file": inspect.getsourcefile(method),
        "threads": torch.get_num_threads(),
    }
    answer = _ask(question)
    assert "error" not in answer, answer["error"]
    return float(answer["gap"])


def _ask(question: dict[str, Any]) -> dict[str, Any]:
    server = reader()
    assert server.stdin is not None and server.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        server.stdin.write(json.dumps(question) + "\n")
        server.stdin.flush()
    for line in server.stdout:
        if line.startswith("{"):
            answer: dict[str, Any] = json.loads(line)
            return answer
    reader.cache_clear()
    raise AssertionError(f"the process that restores checkpoints ended with code {server.wait()}")
