"""A study small enough to run whole in seconds, and the command line to run it with."""

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

from peft_arena.cli.app import main

TINY = """\
name: tiny
title: A study of seconds
model: {name: micro}
targets:
  - {task: micro-reverse, items: 12}
retention:
  - {task: micro-sort, items: 12}
train:
  schedule: {steps: 6}
  examples: 24
  batch_size: 4
  learning_rate: 1e-3
  validation_items: 4
  save_points: [0.5, 1.0]
arms:
  - {method: lora}
  - {method: full}
seeds: [0]
execution: {jobs: 2, threads: 1, resume_every: 2, latency_repeats: 2}
"""


def arena(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command in this process, through the same entry point: what it writes, and the code it ends with."""
    said, complained, code = io.StringIO(), io.StringIO(), 0
    given = [str(argument) for argument in arguments]
    with redirect_stdout(said), redirect_stderr(complained), patch.object(sys, "argv", ["peft-arena", *given]):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return subprocess.CompletedProcess(given, code, said.getvalue(), complained.getvalue())


def arena_process(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does, in a process of its own, which takes a second or two more."""
    return subprocess.run(
        [sys.executable, "-m", "peft_arena", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
        check=False,
    )


COUNTED = {"parameters", "FLOPs", "FLOPs/token", "fraction"}
"""Units of costs that are counted, not measured."""
VOLATILE = {"provenance", "created", "resumed_at", "engine"}


def results(root: Path) -> dict[str, object]:
    """Return every result under a runs directory without what may differ between two machines or moments."""
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*.json")):
        if "records" not in path.parts:
            continue
        data = json.loads(path.read_text())
        if path.name.startswith("cost-"):
            data["measures"] = [(m["metric"], m["value"] if m["unit"] in COUNTED else None) for m in data["measures"]]
        found[str(path.relative_to(root))] = {key: data[key] for key in data if key not in VOLATILE}
    for path in sorted(root.rglob("SHA256")):
        found[str(path.relative_to(root))] = path.read_text()
    return found
