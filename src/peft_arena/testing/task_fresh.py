"""The check that a task gives the same items, prompts and scores in every process."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from peft_arena.tasks.base import Kind
from peft_arena.testing.task_child import LOADING, seen
from peft_arena.testing.task_trial import NotTestedError, TaskTrial

HASH_SEEDS = ("1", "2")
"""Of the processes; the second is asked where few items may be in one order by chance."""
FEW = 60
"""So few items in all may be."""
COMPARED = 3
"""Items of each split whose prompts and scores are compared."""
TEXTS = ["zzz", "7"]
"""What is scored beside an item's own answer."""


@cache
def child(hash_seed: str) -> subprocess.Popen[str]:
    """Start the server of a hash seed, which is ready a second later and ends with this process."""
    command = [sys.executable, "-m", "peft_arena.testing.task_child"]
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": paths, LOADING: "1"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def check_process(trial: TaskTrial) -> None:
    """Items, their order, prompts and scores are the same in a new process with another hash seed, elsewhere."""
    kind = type(trial.task)
    file = inspect.getsourcefile(kind) if kind.__module__ != "__main__" else _main_file()
    if "<locals>" in kind.__qualname__ or file is None:
        raise NotTestedError(
            f"{kind.__qualname__} cannot be imported in a new process: define it at the top of a module"
        )
    count = sum(map(len, trial.found.values()))
    splits: dict[str, int] = {split: COMPARED for split in trial.found}
    texts = TEXTS if trial.task.card.kind is Kind.GENERATE else []
    question = {
        "module": kind.__module__ if kind.__module__ != "__main__" else "peft_arena_tested_main",
        "name": kind.__qualname__,
        "file": str(Path(file).resolve()),
        "config": trial.task.config.model_dump(mode="json"),
        "splits": splits,
        "texts": texts,
        "elsewhere": not _relative(trial.task.config),
    }
    here = json.loads(json.dumps(seen(trial.task, splits, texts)))
    own = os.environ.get("PYTHONHASHSEED")
    for seed in HASH_SEEDS if count <= FEW else HASH_SEEDS[:1]:
        hash_seed = f"{seed}0" if seed == own else seed
        there = _ask(question, hash_seed)
        if "unknown" in there:
            raise NotTestedError(there["unknown"])
        if "refused" in there:
            here_too = _ask({**question, "elsewhere": False}, hash_seed)
            assert "refused" in here_too, f"it depends on the working directory: elsewhere {there['refused']}"
            raise NotTestedError(f"its data cannot be had in a new process: {there['refused']}")
        assert "error" not in there, f"in a new process it ends in {there['error']}"
        for split, one in here.items():
            other = there[split]
            assert sorted(one["items"]) == sorted(other["items"]), f"split {split} has other items in a new process"
            assert one["items"] == other["items"], f"split {split} is in another order in a new process"
            assert one["prompts"] == other["prompts"], f"prompts of {split} are others in a new process"
            assert one["scores"] == other["scores"], f"scores of {split} are others in a new process"


def _main_file() -> str | None:
    file = getattr(sys.modules["__main__"], "__file__", None)
    return file if file is not None and Path(file).is_file() else None


def _relative(config: Any) -> bool:
    """Say whether settings name a file relative to the working directory."""
    path = getattr(config, "path", None)
    return isinstance(path, str | Path) and not Path(path).expanduser().is_absolute()


def _ask(question: dict[str, Any], hash_seed: str) -> dict[str, Any]:
    server = child(hash_seed)
    assert server.stdin is not None and server.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        server.stdin.write(json.dumps(question) + "\n")
        server.stdin.flush()
    for line in server.stdout:
        if line.startswith("{"):
            answer: dict[str, Any] = json.loads(line)
            return answer
    child.cache_clear()
    raise AssertionError(f"the process that loads tasks ended with code {server.wait()}")
