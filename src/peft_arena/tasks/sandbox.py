"""Run a program nobody vouches for against tests, confined by the kernel; ``docs/sandbox.md`` says what that covers.

Two processes of :mod:`peft_arena.tasks.sandbox_child` run side by side, both confined. One holds the program and
answers calls of its function; the other holds the tests and gives the verdict through a pipe of its own. So nothing
the program does in its process (leaving early, printing, changing builtins, returning objects that equal everything)
can become a verdict: only plain data, sent back for each call, is compared.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from peft_arena.core.errors import UserError
from peft_arena.core.parts import scratch

State = Literal["passed", "failed", "timeout", "limit", "refused"]

CHILD = Path(__file__).with_name("sandbox_child.py")
START_SECONDS = 60.0
"""Time for both processes to start and be confined; the program's own time begins then."""
REPLY_BYTES = 4 << 20
"""Longest answer to one call."""
PROGRAM_BYTES = 1 << 20
"""Longest program that is run."""
_CHECK_SECONDS = 0.05
"""Time between two looks at the folder."""
_REASON_CHARACTERS = 300


@dataclass(frozen=True)
class Limits:
    """What a program may use; the process of its tests may use as much."""

    cpu_s: int = 5
    """Seconds of processor time, at least 1."""
    wall_s: float = 15.0
    """Seconds from the moment both processes are confined."""
    memory_bytes: int = 1 << 30
    """Address space."""
    file_bytes: int = 16 << 20
    """Size of one file, and of all files together."""
    files: int = 200
    """Files at one time."""
    output_bytes: int = 1 << 20
    """What is written to standard output and error together."""


class Outcome(NamedTuple):
    """How a program fared."""

    state: State
    """``refused``: the machine cannot confine it, and nothing was run."""
    reason: str
    """One line; empty for ``passed``."""
    output: str
    """The beginning of what the program wrote to standard output and error."""


def run(program: str, tests: str, entry_point: str, *, setup: str = "", limits: Limits | None = None) -> Outcome:
    """Run tests against a function of a program.

    Args:
        program: Python source that defines the function; it is compiled and run in its own confined process.
        tests: Python source that defines ``check(candidate)``, which raises where the function is wrong. It calls the
            function through a pipe: arguments and results are plain data (None, bool, int, float, complex, str, bytes,
            and list, tuple, dict, set, frozenset of them); what a call changes in its arguments is not seen.
        entry_point: name of the function.
        setup: Python source the tests need before them, such as helper functions; never the program.
        limits: what may be used.

    Raises:
        UserError: the program cannot be confined on this machine.
    """
    if (why := refusal()) is not None:
        raise UserError(why)
    return _run(program, tests, entry_point, setup, limits or Limits())


@cache
def refusal() -> str | None:
    """Return why programs cannot be confined on this machine, or None where they can; found out by trying."""
    if sys.platform != "linux":
        return f"programs are only run where the kernel can confine them: that needs Linux, this is {sys.platform}"
    found = _run("def f(): return 1", "def check(f): assert f() == 1", "f", "", Limits())
    if found.state == "passed":
        return None
    return f"programs are only run where the kernel can confine them, and here it cannot: {found.reason}"


def _run(program: str, tests: str, entry_point: str, setup: str, limits: Limits) -> Outcome:
    if len(program) > PROGRAM_BYTES:
        return Outcome("limit", f"the program has more than {PROGRAM_BYTES} characters", "")
    with scratch("sandbox") as folder, _Pair(folder.resolve(), limits) as pair:
        code = {"program": program, "tests": tests, "setup": setup, "entry_point": entry_point}
        pair.start(code)
        return pair.finish()


class _Stop(Exception):  # noqa: N818 - ends a wait
    """The wait is over before a verdict."""

    def __init__(self, state: State, reason: str) -> None:
        super().__init__(reason)
        self.state = state


class _Pair:
    """The two processes and their pipes."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        self.folder = folder
        self.limits = limits
        self._open: list[int] = []
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._status: dict[int, str] = {}
        self._said: dict[str, bytes] = {"program": b"", "tests": b"", "output": b""}

    def __enter__(self) -> _Pair:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        for descriptor in self._open:
            os.close(descriptor)

    def start(self, code: dict[str, str]) -> None:
        """Start both processes and send each its part."""
        calls_in, calls_out = self._pipe()
        replies_in, replies_out = self._pipe()
        output_in, output_out = self._pipe()
        self._status[output_in] = "output"
        nowhere = os.open(os.devnull, os.O_WRONLY)
        self._open.append(nowhere)
        given = [calls_in, calls_out, replies_in, replies_out, output_out]
        for part, calls, replies, out in (
            ("program", calls_in, replies_out, output_out),
            ("tests", calls_out, replies_in, nowhere),
        ):
            status_in, status_out = self._pipe()
            self._status[status_in] = part
            given.append(status_out)
            job = {
                "part": part, "parent": os.getpid(), "folder": str(self.folder), "limits": asdict(self.limits),
                "reply_bytes": REPLY_BYTES, "calls": calls, "replies": replies, "status": status_out,
                "entry_point": code["entry_point"],
                **({"program": code["program"]} if part == "program" else
                   {"tests": code["tests"], "setup": code["setup"]}),
            }  # fmt: skip
            self._processes[part] = self._spawn(job, (calls, replies, status_out), out)
        for descriptor in given:
            self._open.remove(descriptor)
            os.close(descriptor)

    def finish(self) -> Outcome:
        """Wait for the verdict, end both processes, and say how it went."""
        try:
            self._wait(START_SECONDS, lambda: all(b"\n" in self._said[part] for part in self._processes))
            for part in self._processes:
                self._check(part)
            self._wait(self.limits.wall_s, lambda: self._said["tests"].count(b"\n") > 1)
            failure = str(self._line("tests", 1)["failure"])
            outcome = self._failed(failure) if failure else Outcome("passed", "", "")
        except _Stop as stop:
            outcome = Outcome(stop.state, str(stop), "")
        self._end()
        self._drain()
        text = self._said["output"][: self.limits.output_bytes].decode("utf-8", errors="replace")
        reason = "".join(c if c.isprintable() else " " for c in outcome.reason)[:_REASON_CHARACTERS]
        return outcome._replace(reason=reason, output=text)

    def _drain(self) -> None:
        """Read what was written before the end; nobody can write any more, so the pipe has one."""
        for descriptor in (found for found, part in self._status.items() if part == "output"):
            while len(self._said["output"]) <= self.limits.output_bytes and (chunk := os.read(descriptor, 1 << 16)):
                self._said["output"] += chunk

    def _failed(self, failure: str) -> Outcome:
        """Say more of a failure than the tests can see."""
        if failure.startswith("MemoryError"):
            return Outcome("limit", f"{failure} (within {self.limits.memory_bytes} bytes)", "")
        if "ended before it answered" not in failure:
            return Outcome("failed", failure, "")
        with suppress(subprocess.TimeoutExpired):
            code = self._processes["program"].wait(timeout=1.0)
            if code in (-signal.SIGXCPU, -signal.SIGKILL):
                return Outcome("timeout", f"the program used more than {self.limits.cpu_s} s of processor time", "")
            return Outcome("failed", f"{failure} (exit code {code})", "")
        return Outcome("failed", failure, "")

    def _check(self, part: str) -> None:
        """Stop if the first thing a process said is that it cannot be confined."""
        first = self._line(part, 0)
        if "refused" in first:
            raise _Stop("refused", str(first["refused"]))

    def _line(self, part: str, number: int) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._said[part].split(b"\n")[number])
        return found

    def _wait(self, seconds: float, done: Callable[[], bool]) -> None:
        """Read what the processes write until something is done.

        Raises:
            _Stop: time or a limit is over, or a process ended before.
        """
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            for descriptor in self._status:
                selector.register(descriptor, selectors.EVENT_READ)
            while not done():
                left = deadline - time.monotonic()
                if left <= 0:
                    raise _Stop("timeout", f"the program took longer than {seconds:g} s")
                for key, _ in selector.select(min(left, _CHECK_SECONDS)):
                    self._read(selector, key.fd)
                self._look()

    def _read(self, selector: selectors.BaseSelector, descriptor: int) -> None:
        part = self._status[descriptor]
        chunk = os.read(descriptor, 1 << 16)
        self._said[part] += chunk
        if len(self._said["output"]) > self.limits.output_bytes:
            raise _Stop("limit", f"the program wrote more than {self.limits.output_bytes} bytes of output")
        if chunk:
            return
        selector.unregister(descriptor)
        del self._status[descriptor]
        if part == "output":
            return
        if b"\n" in self._said[part]:
            self._check(part)
        wanted = 2 if part == "tests" else 1
        if self._said[part].count(b"\n") < wanted:
            raise self._died(part)

    def _died(self, part: str) -> _Stop:
        with suppress(subprocess.TimeoutExpired):
            self._processes[part].wait(timeout=1.0)
        code = self._processes[part].returncode
        if b"\n" not in self._said[part]:
            text = self._said["output"].decode("utf-8", errors="replace").strip().rpartition("\n")[2]
            return _Stop("refused", f"the process of the {part} ended at its start, exit code {code}: {text}")
        if code in (-signal.SIGXCPU, -signal.SIGKILL):
            return _Stop("timeout", f"the tests used more than {self.limits.cpu_s} s of processor time")
        return _Stop("failed", f"the tests ended without a verdict, exit code {code}")

    def _look(self) -> None:
        """Stop at too many files, or too much in them; folders cannot be made, so there is one level."""
        total = 0
        with os.scandir(self.folder) as entries:
            for count, entry in enumerate(entries, 1):
                with suppress(FileNotFoundError):
                    total += entry.stat(follow_symlinks=False).st_size
                if count > self.limits.files:
                    raise _Stop("limit", f"the program made more than {self.limits.files} files")
        if total > self.limits.file_bytes:
            raise _Stop("limit", f"the program wrote more than {self.limits.file_bytes} bytes to files")

    def _spawn(self, job: dict[str, Any], keep: tuple[int, ...], out: int) -> subprocess.Popen[bytes]:
        """Start a process that has nothing of ours but its pipes: no environment, no site packages, its own session."""
        process = subprocess.Popen(
            [sys.executable, "-s", "-S", "-P", "-B", "-u", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=out,
            pass_fds=keep,
            cwd=self.folder,
            env={"PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.flush()
        with suppress(BrokenPipeError):
            process.stdin.close()
        return process

    def _pipe(self) -> tuple[int, int]:
        ends = os.pipe()
        self._open.extend(ends)
        return ends

    def _end(self) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()
