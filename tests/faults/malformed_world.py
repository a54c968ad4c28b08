"""Sound runs, models and files that a test may break, and a command line in a process that cannot outlive it."""

import contextlib
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

from peft_arena.models.load import PACKAGED
from peft_arena.store.checkpoint import write_checkpoint
from peft_arena.store.store import RunDirectory
from scripts.kept import read_kept, unpack
from tests.faults.malformed_kinds import STUDY
from tests.interop.library import LORA, RESULT, experiment
from tests.made_runs import trained_run

SECONDS = 60
MEMORY = 6 << 30
"""Bytes that a command may take beyond what the tests' process has."""
CODES = (1, 2)


class Ended(NamedTuple):
    """How a command ended."""

    code: int | None
    """None: it had to be ended."""
    text: str

    @property
    def lines(self) -> list[str]:
        """What the program itself complained of."""
        return [line for line in self.text.splitlines() if line.startswith("peft-arena:")]

    def problem(self, codes: tuple[int, ...] = CODES) -> str:
        """Say what is wrong with how it ended; empty if nothing is."""
        if self.code is None:
            return f"it was ended after {SECONDS} s"
        if "Traceback" in self.text or "this is a bug" in self.text or "panicked" in self.text:
            return f"a traceback: {self.text[-1500:]}"
        if self.code not in codes:
            return f"exit code {self.code}, not of {codes}: {self.text[-600:]}"
        if self.code == 2 and not self.lines and "Usage:" not in self.text:
            return f"no line that says why: {self.text[-600:]}"
        if len(self.lines) > 1 or any(len(line) > 20_000 for line in self.lines):
            return f"{len(self.lines)} lines: {self.text[-600:]}"
        return ""


class World:
    """Where everything lies; ``copy`` gives a case its own."""

    def __init__(self, root: Path) -> None:
        """Make sound runs, a model directory, an adapter, and files to import."""
        self.root = root
        kept = root / "kept"
        unpack(read_kept("demo"), kept)
        for training in kept.glob("*/records/training.json"):
            for step in json.loads(training.read_text())["save_points"]:
                place = training.parents[1] / "steps" / f"{step:06d}"
                write_checkpoint(place, lambda part: (part / "weights").write_text("none") and None)
        self.lora = next(path.name for path in sorted(kept.iterdir()) if "-lora-" in path.name)
        made: RunDirectory = trained_run(root / "made", "lora", {"rank": 2})
        self.made = made.run_id
        shutil.copytree(made.checkpoint(2), root / "adapter", ignore=shutil.ignore_patterns("DONE", "SHA256"))
        shutil.copytree(PACKAGED["micro"], root / "model")
        for package in (root / "model").glob("*.jsonl"):
            package.unlink()
        experiment(root, "lora/a", adapter=LORA)
        (root / "result.json").write_text(json.dumps(RESULT))
        (root / "study.yaml").write_text(STUDY)
        (root / "rows.jsonl").write_text(
            "".join(json.dumps({"question": f"q {n}?", "answer": str(n)}) + "\n" for n in range(30))
        )
        (root / "prompts.txt").write_text("one prompt\nanother prompt\n")

    def copy(self, place: Path, *names: str) -> Path:
        """Copy parts of the world by hard links, so that what a case replaces leaves the world's own as it is."""
        for name in names:
            source = self.root / name
            if source.is_dir():
                shutil.copytree(source, place / name, copy_function=os.link)
            else:
                place.mkdir(parents=True, exist_ok=True)
                os.link(source, place / name)
        return place


def run_command(arguments: list[str], place: Path) -> Ended:
    """Run the command line in a child of this process, which has the libraries; it cannot outlive its limits."""
    said = place / "said.txt"
    child = os.fork()
    if child == 0:
        _become(arguments, place, said)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return Ended(code, said.read_text(errors="replace"))
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return Ended(None, said.read_text(errors="replace"))


def _become(arguments: list[str], place: Path, said: Path) -> None:
    code = 99
    try:
        os.setsid()
        os.chdir(place)
        target = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(target, 1)
        os.dup2(target, 2)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
        os.environ["COLUMNS"] = "200"
        sys.argv = ["peft-arena", *arguments]
        from peft_arena.cli.app import main

        main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001 - shown as what it is
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
