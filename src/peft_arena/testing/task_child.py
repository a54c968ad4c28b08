"""A process that loads tasks in new processes: started once for a hash seed, it forks one for each question.

A task loaded there has seen nothing of the process that asks: another hash seed, another state of the random numbers,
another time zone and working directory, and folders that are listed in another order. The answer is one line of JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

SECONDS = 300
LOADING = "PEFT_ARENA_LOADS_A_TASK"
"""Environment variable that is set in a process which loads a task for a check."""


def main() -> None:
    """Answer questions until there are no more."""
    import peft_arena.tasks.registry  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            signal.alarm(SECONDS)
            _write(_answer(json.loads(line)))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            _write({"error": f"the process ended with code {os.waitstatus_to_exitcode(status)}"})


def digest(text: str) -> str:
    """Return a short hash of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def seen(task: Any, splits: Mapping[str, int], texts: list[str]) -> dict[str, Any]:
    """Return what a task gives in this process: items in order, prompts and scores.

    Args:
        task: the task.
        splits: its splits, and of how many items of each prompts and scores are wanted.
        texts: what is scored beside an item's own answer.
    """
    from peft_arena.tasks.base import Kind
    from peft_arena.testing.task_trial import flat

    found: dict[str, Any] = {}
    for split, count in splits.items():
        items = task.items(split)
        scores = []
        for item in items[:count] if task.card.kind is Kind.GENERATE else ():
            judged = [task.score(item, text) for text in (task.target(item), *texts)]
            scores.append([[score.value, digest(score.extracted)] for score in judged])
        found[split] = {
            "items": [item.id for item in items],
            "prompts": [digest(flat(task.prompt(item))) for item in items[:count]],
            "scores": scores,
        }
    return found


def _write(answer: Mapping[str, Any]) -> None:
    with os.fdopen(os.dup(1), "wb") as out:
        out.write(f"\n{json.dumps(answer)}\n".encode())


def _answer(question: Mapping[str, Any]) -> dict[str, Any]:
    """Load a task and return what it gives, or what went wrong."""
    from peft_arena.core.errors import UserError, first_line
    from peft_arena.testing.reader import module_named

    try:
        module = module_named(question["module"], question["file"])
        kind: Any = module
        for part in question["name"].split("."):
            kind = getattr(kind, part)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - told in the line
        return {"unknown": f"{question['name']} cannot be imported there ({type(error).__name__}: {error})"}
    try:
        _differ(question["elsewhere"])
        task = kind(kind.Config.model_validate(question["config"]))
        return seen(task, question["splits"], question["texts"])
    except UserError as error:
        return {"refused": first_line(error)}
    except (Exception, SystemExit) as error:  # noqa: BLE001 - told in the line
        return {"error": f"{type(error).__name__}: {first_line(error)}"}


def _differ(elsewhere: bool) -> None:
    """Make this process unlike the one that asks, in what no task may depend on."""
    random.seed(4242)
    os.environ["TZ"] = "Pacific/Kiritimati"
    time.tzset()
    if elsewhere:
        os.chdir(tempfile.gettempdir())
    listdir, scandir = os.listdir, os.scandir

    def backwards(*where: Any) -> list[Any]:
        return sorted(listdir(*where), reverse=True)

    class Backwards:
        """A folder's entries, the last by name first."""

        def __init__(self, *where: Any) -> None:
            with scandir(*where) as entries:
                self._entries = iter(sorted(entries, key=lambda entry: entry.name, reverse=True))

        def __iter__(self) -> Iterator[Any]:
            return self._entries

        def __next__(self) -> Any:
            return next(self._entries)

        def __enter__(self) -> Backwards:
            return self

        def __exit__(self, *_: object) -> None:
            self.close()

        def close(self) -> None:
            """Do nothing: the entries were read at once."""

    os.listdir = backwards  # type: ignore[assignment]
    os.scandir = Backwards  # type: ignore[assignment]


if __name__ == "__main__":
    main()
