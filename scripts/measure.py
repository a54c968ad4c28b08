"""Run a benchmark and keep what it prints, with the version and the machine, in ``results/benchmarks/NAME.jsonl``.

    python -m scripts.measure NAME [options of the benchmark]     # NAME: a file of benchmarks/, without .py

Where the benchmark fails nothing is kept.
"""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import date
from pathlib import Path

from peft_arena.core.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "results" / "benchmarks"
TOLD = ("peft_arena", "git_commit", "processor", "cores")


def made() -> dict[str, str | int]:
    """Return which version measures, on what machine and when."""
    known = provenance()
    return {**{name: known[name] for name in TOLD}, "date": str(date.today())}


def write(name: str, about: dict[str, str | int], lines: list[str]) -> Path:
    """Write what a benchmark printed below a line that says who measured; return the file."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    file = FOLDER / f"{name}.jsonl"
    file.write_text("\n".join([json.dumps({"made": about}), *lines]) + "\n", encoding="utf-8")
    return file


def main() -> None:
    """Run the benchmark that is named first, with the options that follow."""
    name, *options = sys.argv[1:] or [""]
    script = ROOT / "benchmarks" / f"{name}.py"
    if not script.is_file():
        sys.exit(
            f"{name!r} is no benchmark; there are: {', '.join(sorted(one.stem for one in script.parent.glob('*.py')))}"
        )
    done = subprocess.run([sys.executable, str(script), *options], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{script.relative_to(ROOT)} failed with exit code {done.returncode}; nothing is kept")
    print(write(name, made(), done.stdout.splitlines()))  # noqa: T201


if __name__ == "__main__":
    main()
