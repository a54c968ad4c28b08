"""Ending by a signal, and what is then said."""

import subprocess
import sys

LEAVES_ONE = """
from peft_arena.core.ending import silence_leaks
silence_leaks()
silence_leaks()
import multiprocessing, os
kept = multiprocessing.Lock()
os._exit(0)
"""


def test_what_ended_workers_left_is_not_told():
    done = subprocess.run([sys.executable, "-c", LEAVES_ONE], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
