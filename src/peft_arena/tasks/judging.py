"""The child of a :class:`peft_arena.tasks.judge.Judge`: reads answers, writes scores and rewards.

Each line is one JSON object, in and out. The first names task and rewards; then ``answer`` asks for a score, and
``warm`` has an item's own answer scored and the result thrown away. Ends with its input.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from contextlib import suppress
from typing import Any, TextIO

from peft_arena.core.errors import UserError, first_line
from peft_arena.core.specs import RewardSpec, TaskSpec
from peft_arena.tasks.base import Item, Score, Task
from peft_arena.tasks.judge import PROTOCOL
from peft_arena.tasks.registry import task_of
from peft_arena.tasks.rewards import Answer, Judged, Reward, judge_answer, refusal, reward_of

MEMORY_BYTES = 4 * 2**30
"""Address space of the child, where the platform can limit it."""
_GRACE_SECONDS = 2.0


def main() -> None:
    """Serve one judge."""
    requests, replies = _take_pipes()
    _limit_memory()
    first = json.loads(requests.readline())
    try:
        task, rewards = _prepare(first)
    except UserError as error:
        _say(replies, {"error": str(error)})
        return
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a plug-in raises anything; its user sees one line
        told = f"{type(error).__name__}: {first_line(error)}"
        _say(replies, {"error": f"task {first['task']['name']} and its rewards cannot be made: {told}"})
        return
    _say(replies, {"ready": True})
    for line in requests:
        message = json.loads(line)
        if "warm" in message:
            answer = _answer(message["warm"])
            judge_answer(task, rewards, answer._replace(completion=_own(task, answer.item)))
            _say(replies, {"ready": True})
            continue
        # Ends this process, whatever it is doing, if the parent is no longer there to do it.
        faulthandler.dump_traceback_later(2 * first["seconds"] + _GRACE_SECONDS, exit=True, file=2)
        judged = judge_answer(task, rewards, _answer(message["answer"]))
        _say(replies, _plain(judged))
        faulthandler.cancel_dump_traceback_later()


def _take_pipes() -> tuple[TextIO, TextIO]:
    """Take standard input and output for the protocol; what a task prints or asks for goes nowhere."""
    requests = os.fdopen(os.dup(0), "r", encoding="ascii")
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    os.close(nowhere)
    return requests, replies


def _limit_memory() -> None:
    """Bound the address space, so that a scorer gets a MemoryError before the machine runs out."""
    try:
        import resource
    except ImportError:
        return
    with suppress(ValueError, OSError):  # a lower limit is set already, or the platform has none
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


def _prepare(first: dict[str, Any]) -> tuple[Task, list[Reward]]:
    if first["protocol"] != PROTOCOL:
        raise UserError(f"the scoring process is of another version of peft-arena, at {sys.executable}")
    task = task_of(TaskSpec.model_validate(first["task"]))
    rewards = [reward_of(RewardSpec.model_validate(spec)) for spec in first["rewards"]]
    for problem in filter(None, (refusal(reward, task, sys.maxsize) for reward in rewards)):
        raise UserError(problem)
    return task, rewards


def _own(task: Task, item: Item) -> str:
    """Return what the model should write, as far as the task knows."""
    try:
        return task.target(item)
    except Exception:  # noqa: BLE001 - only warms up; any text will do
        return ""


def _answer(plain: dict[str, Any]) -> Answer:
    item = plain["item"]
    return Answer(**{**plain, "item": Item(**{**item, "choices": tuple(item["choices"])})})


def _plain(judged: Judged) -> dict[str, Any]:
    return {"score": _plain_score(judged.score), "rewards": judged.rewards, "problems": dict(judged.problems)}


def _plain_score(score: Score) -> dict[str, Any]:
    return {
        "value": None if score.value is None else float(score.value),
        "extracted": str(score.extracted),
        "reason": str(score.reason),
        "weight": float(score.weight),
        "others": {str(name): [float(part.value), float(part.weight)] for name, part in score.others.items()},
    }


def _say(replies: TextIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
    os._exit(0)  # whatever threads a task has started
