"""Checkpoints of every method give the same outputs in a new process, whatever its random state."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from safetensors.torch import save_file

from peft_arena.methods.registry import METHODS, make_method
from peft_arena.testing.methods import EXACT, MERGE, logits, tiny_model, tokens, train

READER = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from peft_arena.methods.registry import METHODS, make_method
from peft_arena.testing.methods import difference, logits, tiny_model, tokens

torch.manual_seed(int(sys.argv[2]))
expected = load_file(Path(sys.argv[1]) / "expected.safetensors")
for name in METHODS.names():
    restored = make_method(name).restore(tiny_model(), Path(sys.argv[1]) / name)
    print(name, difference(logits(restored.model, tokens()), expected[name]))
"""


def test_checkpoints_read_in_a_new_process(tmp_path: Path) -> None:
    expected = {}
    for name in METHODS.names():
        attached = make_method(name).attach(tiny_model(), seed=3)
        if attached.trained():
            train(attached, 5e-3, steps=2)
        attached.save(tmp_path / name)
        expected[name] = logits(attached.model, tokens()).contiguous()
    save_file(expected, tmp_path / "expected.safetensors")
    command = [sys.executable, "-c", READER, str(tmp_path), "4242"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    gaps = dict(line.split() for line in done.stdout.splitlines())
    assert sorted(gaps) == METHODS.names()
    for name, gap in gaps.items():
        limit = MERGE if name == "pissa" else EXACT
        assert float(gap) <= limit, f"{name} differs by {gap} in a new process"
