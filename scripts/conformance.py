"""Run the conformance suite over every shipped method, and keep what it tried, found and did not test.

    python -m scripts.conformance                  # all methods; writes results/conformance.json
    python -m scripts.conformance lora oft         # these alone; the records of the others stay

A method that fails is named with the reason, nothing is written of it, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from peft_arena.methods.registry import METHODS
from peft_arena.store.conformance import NAME, MethodRecord, conformance_text, read_conformance
from peft_arena.testing.methods import check_method
from tests.methods.settings import SETTINGS

FILE = Path(__file__).resolve().parents[1] / "results" / NAME


def run(names: Sequence[str], file: Path = FILE) -> list[str]:
    """Try methods, write the records of those that pass beside the ones that are there, and return what failed."""
    kept: dict[str, MethodRecord] = dict(read_conformance(file)) if file.exists() else {}
    records = {name: record for name, record in kept.items() if name in METHODS.own()}
    failed = []
    for number, name in enumerate(names, 1):
        records.pop(name, None)
        try:
            records[name] = check_method(name, **SETTINGS[name])
        except AssertionError as error:
            failed.append(str(error))
        state = "passed" if name in records else failed[-1]
        sys.stderr.write(f"{number}/{len(names)} {name}: {state}\n")
        file.write_text(conformance_text(records), encoding="utf-8")
    return failed


def main() -> None:
    """Run the suite over the methods named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD")
    failed = run(parser.parse_args().methods or METHODS.own())
    for reason in failed:
        sys.stdout.write(f"{reason}\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
