"""The quick runs of the benchmarks that the statistics rest on: they run, and say what the docs say of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


def lines(name, *options):
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def kept_coverage():
    text = (ROOT / "results" / "benchmarks" / "coverage.jsonl").read_text()
    return by_table([json.loads(line) for line in text.splitlines()[1:]])


def by_table(cells):
    found = {}
    for cell in cells:
        found.setdefault(cell["table"], []).append(cell)
    return found


def test_coverage_counts_every_table():
    quick, full = by_table(lines("coverage", "--quick")), kept_coverage()
    assert list(full) == list(quick)
    assert all(set(full[name][0]) == set(cells[0]) for name, cells in quick.items()), "the kept table is of this script"
    equal = quick["equal"]
    assert len(equal) == len(full["equal"]) == 5 * 5 * 3
    assert sum(cell["pair"] for cell in equal) / len(equal) > 0.93
    assert sum(cell["family"] for cell in equal) / len(equal) < 0.05


def test_coverage_is_seeded():
    options = ("--table", "parts", "--table", "power", "--studies", "5")
    assert lines("coverage", *options, "--processes", "1") == lines("coverage", *options, "--processes", "2")


def test_the_kept_coverage_holds_what_is_promised():
    tables = kept_coverage()
    assert all(cell["studies"] >= 1000 for cells in tables.values() for cell in cells)
    for cell in tables["equal"]:
        low = [rate for rate in cell["outside"] if cell[rate] < 0.95 and rate in ("gain", "pair", "retention")]
        assert not low, f"too narrow: {cell}"
        assert not {"twin", "family"} & set(cell["outside"]), f"too many false alarms: {cell}"
        assert not cell["outside"] or cell["kind"].startswith("near"), f"too wide away from 0 and 1: {cell}"
    for name, cells in tables.items():
        known = [cell for cell in cells if name not in ("equal", "wild") and cell.get("seeds", 1) > 1]
        low = [cell for cell in known if any(cell[rate] < 0.95 for rate in cell["outside"] if rate != "family")]
        assert not low, f"{name} is too narrow: {low}"
        assert not any("family" in cell["outside"] for cell in known), f"too many false alarms of {name}"
    (hard,) = [c for c in tables["power"] if (c["better by"], c["seeds"], c["items"]) == (0.12, 3, 200)]
    assert hard["one pair"] >= 0.6


def test_the_kept_analysis_of_many_items_took_what_is_promised():
    text = (ROOT / "results" / "benchmarks" / "analyze.jsonl").read_text()
    kept = [json.loads(line) for line in text.splitlines()[1:]]
    assert len(kept) == 2
    assert all(one["item_records"] == 100_000 and one["seconds"] < 10 and one["memory_mib"] < 1024 for one in kept)


def test_the_analysis_of_many_items_is_timed():
    found = lines("analyze", "--quick")
    assert [one["study"] for one in found] == ["10 arms, 5 seeds", "50 arms, 1 seed"]
    assert all(one["item_records"] == 10_000 and one["seconds"] > 0 and one["ratio"] > 1 for one in found)
