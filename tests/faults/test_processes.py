"""Real commands whose processes are killed, stopped or cut off: nothing lives on, it is said, and it resumes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from peft_arena.commands.check import check_path
from tests.running import arena_process, results

from .faulty import STUDY, in_child, work_on

pytestmark = [pytest.mark.deep, pytest.mark.slow]
WAIT_S = 120.0


class Command:
    """A command in a directory of its own, its output in a file."""

    def __init__(self, folder: Path, jobs: int = 2) -> None:
        self.folder = folder
        self.runs = folder / "runs"
        self.study = folder / "faulty.yaml"
        self.study.write_text(STUDY.replace("- {method: lora}", "- {method: lora}\n  - {method: ia3}"))
        self.arguments = ["run", str(self.study), "--runs", str(self.runs), "--set", f"execution.jobs={jobs}"]
        self.said = folder / "said"

    def start(self, **how: object) -> None:
        self.mark = f"FAULT_{os.getpid()}_{id(self)}"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(self.folder), "FAULT_MARK": self.mark}
        with self.said.open("w") as out:
            given = {"stdout": out, "stderr": out, **how}
            self.process = subprocess.Popen(
                [sys.executable, "-m", "peft_arena", *self.arguments], env=environment, cwd=self.folder, **given
            )  # type: ignore[call-overload]

    def ours(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("FAULT_MARK") == self.mark:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def named(self, text: str) -> list[psutil.Process]:
        found = []
        for process in self.ours():
            with contextlib.suppress(psutil.NoSuchProcess):  # it may end between two questions
                if process.ppid() == self.process.pid and text in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def workers(self) -> list[psutil.Process]:
        return [child for server in self.named("forkserver") for child in server.children()]

    def until(self, ready: Callable[[], object]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not ready():
            assert self.process.poll() is None, self.said.read_text()
            assert time.monotonic() < deadline, self.said.read_text()
            time.sleep(0.01)

    def is_over(self) -> int:
        """Wait for the command to end, and for all that it started."""
        code = self.process.wait(WAIT_S)
        deadline = time.monotonic() + 5
        while left := self.ours():
            assert time.monotonic() < deadline, "\n".join(
                f"{one.pid} {one.ppid()} {one.status()} {one.cmdline()}" for one in left
            )
            time.sleep(0.05)
        return code

    def resumes(self, undisturbed: dict[str, object], by_command: bool = False) -> None:
        """Go on in a forked child, which is fast, or by the same command, which also clears temporary files away."""
        before = {path: path.read_bytes() for path in self.runs.glob("*/records/**/*.json")}
        if by_command:
            done = arena_process(*self.arguments, TMPDIR=str(self.folder))
            assert done.returncode == 0, done.stderr
            assert not list(self.folder.rglob("*.part"))
        else:
            ended = in_child(lambda: work_on(self.study, self.runs), self.folder / "resumed")
            assert ended.code == 0, ended.text
        assert results(self.runs) == undisturbed
        assert all(path.read_bytes() == text for path, text in before.items())
        assert "left_by_killed_writers" not in check_path(self.runs)
        assert not list(self.runs.rglob("*.part"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    import peft_arena.work.preload  # noqa: F401 - loaded once, here, for all children

    command = Command(tmp_path_factory.mktemp("undisturbed"))
    ended = in_child(lambda: work_on(command.study, command.runs), command.said)
    assert ended.code == 0, ended.text
    return results(command.runs)


@pytest.fixture
def command(tmp_path: Path) -> Command:
    return Command(tmp_path)


def importing(command: Command) -> object:
    return command.named("forkserver")


def training(command: Command) -> object:
    return list(command.runs.glob("*/resume/*"))


def evaluating(command: Command) -> object:
    return list(command.runs.glob("*/records/training.json"))


@pytest.mark.parametrize("moment", [importing, training, evaluating])
def test_the_process_that_workers_are_forked_from_is_killed(
    moment: Callable[[Command], object], command: Command, undisturbed: dict[str, object]
) -> None:
    command.start()
    command.until(lambda: moment(command))
    command.named("forkserver")[0].kill()
    assert command.is_over() == 0, command.said.read_text()
    text = command.said.read_text()
    assert "the process that workers are forked from was ended" in text and "started again" in text
    assert "Traceback" not in text and "Aborted" not in text
    assert results(command.runs) == undisturbed
    command.resumes(undisturbed)


def test_it_is_killed_again_and_again(command: Command, undisturbed: dict[str, object]) -> None:
    command.start()
    known: set[int] = set()
    while command.process.poll() is None:
        for server in command.named("forkserver"):
            if server.pid not in known and len(known) < 3:
                known.add(server.pid)
                server.kill()
        time.sleep(0.02)
    assert command.is_over() == 1
    text = command.said.read_text()
    assert "3 times" in text and "Traceback" not in text, text
    command.resumes(undisturbed)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("moment", [importing, training])
def test_the_command_is_ended(
    number: signal.Signals, moment: Callable[[Command], object], command: Command, undisturbed: dict[str, object]
) -> None:
    command.start()
    command.until(lambda: moment(command))
    command.process.send_signal(number)
    code = command.is_over()
    text = command.said.read_text()
    assert "Traceback" not in text and "Aborted" not in text and "leaked" not in text
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert code == 128 + number and f"peft-arena: ended by {number.name}" in text
    command.resumes(undisturbed, by_command=moment is training and number == signal.SIGKILL)


def test_the_command_is_killed_while_everything_is_stopped(command: Command, undisturbed: dict[str, object]) -> None:
    command.start()
    command.until(command.workers)
    for process in (*command.workers(), *command.named("forkserver")):
        process.suspend()
    command.process.kill()
    command.is_over()
    command.resumes(undisturbed)


def test_a_stopped_worker_is_ended_too(command: Command, undisturbed: dict[str, object]) -> None:
    command.start()
    command.until(lambda: training(command))
    command.workers()[0].suspend()
    command.process.terminate()
    assert command.is_over() == 143
    command.resumes(undisturbed)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_is_killed(number: signal.Signals, command: Command, undisturbed: dict[str, object]) -> None:
    command.start()
    command.until(lambda: training(command))
    command.workers()[0].send_signal(number)
    assert command.is_over() == 1
    assert f"the worker process was ended by {number.name}" in command.said.read_text()
    command.resumes(undisturbed)


def test_the_tracker_of_shared_memory_is_killed(command: Command, undisturbed: dict[str, object]) -> None:
    command.start()
    command.until(lambda: training(command))
    command.named("resource_tracker")[0].kill()
    assert command.is_over() == 0
    assert "Traceback" not in command.said.read_text() and "Warning" not in command.said.read_text()
    assert results(command.runs) == undisturbed


def test_nobody_reads_what_it_says(command: Command, undisturbed: dict[str, object]) -> None:
    ends = os.pipe()
    os.close(ends[0])
    command.start(stdout=ends[1], stderr=ends[1])
    os.close(ends[1])
    assert command.is_over() == 1
    command.resumes(undisturbed)


def test_it_has_no_standard_streams(command: Command, undisturbed: dict[str, object]) -> None:
    command.start(preexec_fn=lambda: [os.close(number) for number in (0, 1, 2)])
    assert command.is_over() == 0
    assert results(command.runs) == undisturbed


def test_the_locale_is_plain(command: Command, undisturbed: dict[str, object]) -> None:
    done = arena_process(*command.arguments, LC_ALL="C", LANG="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 0, done.stderr
    assert results(command.runs) == undisturbed
