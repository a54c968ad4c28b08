"""Scoring in a process of its own, so that no answer can stop, crash or fill up a training.

The child runs :mod:`peft_arena.tasks.judging`; parent and child exchange lines of JSON over pipes. A child that does
not answer in time is killed with its process group and replaced, and so is one that died.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from peft_arena.core.errors import UserError
from peft_arena.core.specs import RewardSpec, TaskSpec
from peft_arena.tasks.base import Part, Score
from peft_arena.tasks.rewards import Answer, Judged

CHILD = "peft_arena.tasks.judging"
PROTOCOL = 1
"""Version of the messages."""
SECONDS = 10.0
"""Time for scoring one answer and giving it all rewards."""
START_SECONDS = 120.0
"""Time for a child to start, and then to import what its task imports when it first scores."""
STARTS = 3
"""Failed starts in a row after which there will be no further."""
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_CHUNK = 1 << 16


class _NoReplyError(Exception):
    """The child gave no answer; the text says why, and follows the name of what it was doing."""


class Judge:
    """Scores answers to one task in a child process, and gives each its rewards.

    An answer whose scoring takes too long, or ends the child, is unscored with the reason, and all its rewards are 0.
    May be used from any thread; threads take turns.
    """

    def __init__(self, task: TaskSpec, rewards: Sequence[RewardSpec], *, seconds: float = SECONDS) -> None:
        """Create the judge; the child starts when the judge is entered, or else with the first answer.

        Args:
            task: whose answers are scored.
            rewards: each name at most once.
            seconds: for scoring one answer and giving it all rewards.
        """
        if seconds <= 0:
            raise ValueError(f"seconds must be above 0, got {seconds}")
        names = [reward.name for reward in rewards]
        if len(set(names)) < len(names):
            raise ValueError(f"a reward is named twice: {names}")
        self.seconds = seconds
        self._task = task
        self._names = names
        self._first = {
            "protocol": PROTOCOL,
            "task": task.model_dump(mode="json"),
            "rewards": [reward.model_dump(mode="json") for reward in rewards],
            "seconds": seconds,
        }
        self._child: _Child | None = None
        self._warmed = False
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        """Start the child.

        Raises:
            UserError: the task or a reward cannot be made, or the child does not start.
        """
        with self._lock:
            self._ready()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the child."""
        self.close()

    def close(self) -> None:
        """End the child, if there is one; a later :meth:`judge` starts another."""
        with self._lock:
            self._end()

    def judge(self, answers: Sequence[Answer]) -> list[Judged]:
        """Return score and rewards of each answer, in the same order.

        Raises:
            UserError: the task or a reward cannot be made, or the child does not start.
        """
        with self._lock:
            try:
                return [self._one(answer) for answer in answers]
            except BaseException:
                self._end()  # an interrupted exchange: the next line of the child would answer an earlier question
                raise

    def _one(self, answer: Answer) -> Judged:
        child = self._ready()
        if not self._warmed:
            child = self._warm(child, answer)
        try:
            return _judged(child.ask({"answer": _plain(answer)}, self.seconds))
        except _NoReplyError as lost:
            self._end()
            reason = f"scoring an answer to {self._task.name} {lost}"
            return Judged(Score(None, reason=reason), dict.fromkeys(self._names, 0.0))

    def _warm(self, child: _Child, answer: Answer) -> _Child:
        """Let a new child score an item's own answer, so that imports do not count against the time of the first."""
        try:
            child.ask({"warm": _plain(answer)}, START_SECONDS)
        except _NoReplyError:
            self._end()
            child = self._ready()
        self._warmed = True
        return child

    def _ready(self) -> _Child:
        """Return the running child, started if there is none."""
        last = ""
        for _ in range(STARTS):
            if self._child is not None:
                return self._child
            child = self._child = _Child()
            self._warmed = False
            try:
                answer = child.ask(self._first, START_SECONDS)
            except _NoReplyError as lost:
                self._end()
                last = str(lost)
            else:
                if "error" in answer:
                    self._end()
                    raise UserError(answer["error"])
        raise UserError(f"the process that scores {self._task.name} did not start {STARTS} times in a row: it {last}")

    def _end(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child = None


class _Child:
    """One child process and the two ends of its pipes."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", CHILD],  # -P: nothing is imported from the working directory
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **_ONE_THREAD},
            start_new_session=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._to, self._from = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._to, False)
        os.set_blocking(self._from, False)

    def ask(self, message: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Send a message and return the answer.

        Raises:
            _NoReplyError: there was none in time, or the child died; it must be killed then.
        """
        unsent = memoryview(json.dumps(message).encode("ascii") + b"\n")
        received = bytearray()
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as waiting:
            waiting.register(self._from, selectors.EVENT_READ)
            waiting.register(self._to, selectors.EVENT_WRITE)
            while not received.endswith(b"\n"):
                left = deadline - time.monotonic()
                if left <= 0:
                    raise _NoReplyError(f"took longer than {seconds:g} s")
                for key, _ in waiting.select(left):
                    if key.fd == self._to:
                        unsent = unsent[self._write(unsent) :]
                        if not unsent:
                            waiting.unregister(self._to)
                    else:
                        received += self._read()
        found: dict[str, Any] = json.loads(received)
        return found

    def kill(self) -> None:
        """End the child and everything it started in its process group, at once."""
        with suppress(ProcessLookupError, PermissionError):  # PermissionError: macOS on a group of zombies
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()

    def _write(self, data: memoryview) -> int:
        try:
            return os.write(self._to, data)
        except BlockingIOError:
            return 0
        except BrokenPipeError:
            raise _NoReplyError(self._died()) from None

    def _read(self) -> bytes:
        try:
            found = os.read(self._from, _CHUNK)
        except BlockingIOError:
            return b""
        if not found:
            raise _NoReplyError(self._died())
        return found

    def _died(self) -> str:
        """Say how the child ended."""
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "closed the connection to its process"
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"ended its process ({how})"


def _plain(answer: Answer) -> dict[str, Any]:
    item = answer.item
    fields = {"question": item.question, "answer": item.answer, "choices": item.choices, "gold": item.gold}
    return {
        "item": {**fields, "data": dict(item.data)},
        "completion": answer.completion,
        "tokens": answer.tokens,
        "ended": answer.ended,
        "limit": answer.limit,
    }


def _judged(found: dict[str, Any]) -> Judged:
    score = found["score"]
    others = {name: Part(*part) for name, part in score["others"].items()}
    return Judged(Score(**{**score, "others": others}), found["rewards"], found["problems"])
