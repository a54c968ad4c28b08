"""Time the analysis of a study with 10⁵ item records, reading included, against reading its files as plain JSON.

Fifty runs answer 2,000 items each, of one target and five retention tasks; once as ten arms of five seeds, once as
fifty arms of one. Answers are drawn, and written as the records of a real study. Each side runs in a process of its
own on one core. ``seconds`` and ``memory_mib`` are of the analysis alone, imports included in memory and not in time;
``ratio`` is over the time of ``json.loads`` on the same files.

    python benchmarks/analyze.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from peft_arena.analyze.study import analyze_study
from peft_arena.analyze.view import Arm, StudyView
from peft_arena.core.measure import Measure
from peft_arena.core.specs import EvalSpec, MethodSpec, ModelSpec, RunSpec, Schedule, TaskSpec, TrainSpec
from peft_arena.store.records import EvaluationRecord, ItemRecord, TrainingRecord
from peft_arena.store.store import RunDirectory, Store

TARGET, RETENTION = "target", ("facts", "logic", "format", "code", "sums")
SHAPES = {"10 arms, 5 seeds": (10, 5), "50 arms, 1 seed": (50, 1)}
ITEMS, QUICK_ITEMS = {TARGET: 500, **dict.fromkeys(RETENTION, 300)}, {TARGET: 50, **dict.fromkeys(RETENTION, 30)}
STEPS = 100
MEBIBYTE = 1024.0
"""Kilobytes in one, as ``ru_maxrss`` counts."""


def _view(arms: int, seeds: int, items: dict[str, int]) -> StudyView:
    specs = {name: EvalSpec(task=TaskSpec(name=name), items=count) for name, count in items.items()}
    base = RunSpec(model=ModelSpec(name="micro"), method=MethodSpec(name="none"))
    train = TrainSpec(task=TaskSpec(name=TARGET), schedule=Schedule(steps=STEPS), learning_rate=1e-3)
    made = [
        Arm(
            f"arm {arm}",
            tuple(
                RunSpec(model=base.model, method=MethodSpec(name="lora", config={"rank": arm}), train=train, seed=seed)
                for seed in range(seeds)
            ),
            specs[TARGET],
        )
        for arm in range(arms)
    ]
    return StudyView("benchmark", base, tuple(made), tuple(specs[name] for name in RETENTION))


def _record(directory: RunDirectory, step: int, spec: EvalSpec, right: np.ndarray) -> EvaluationRecord:
    name = spec.task.name
    mean = Measure(
        metric="accuracy", value=float(right.mean()), unit="fraction", better="higher", how="drawn", n=len(right)
    )
    card = {"name": name, "title": name, "metrics": [{"name": "accuracy", "unit": "fraction", "better": "higher"}]}
    return EvaluationRecord(
        run_id=directory.run_id,
        step=step,
        factor=1.0,
        spec=spec,
        card={**card, "chance": None},
        metrics=(mean,),
        items=tuple(
            ItemRecord(id=f"{name}-{place}", value=float(value), output="an answer of a few words")
            for place, value in enumerate(right)
        ),
        engine={"engine": "drawn", "batch_size": 16, "dtype": "float32"},
        provenance={},
    )


def write(root: Path, view: StudyView) -> None:
    """Write the records of a study whose answers are drawn.

    Args:
        root: runs directory.
        view: of the study.
    """
    rng, store = np.random.default_rng(0), Store(root)
    specs = (*view.targets, *view.retention)
    hard = {spec.id: rng.normal(size=spec.items) for spec in specs}
    for number, run in enumerate([view.base, *(run for arm in view.arms for run in arm.runs)]):
        directory = store.run(run)
        directory.create()
        step = 0 if run.is_base else STEPS
        if not run.is_base:
            counts = {"tokens": 1000, "padded_tokens": 1000, "examples": 100, "dropped": 0}
            record = TrainingRecord(
                run_id=run.run_id, steps=STEPS, log=(), save_points=(STEPS,), provenance={}, **counts
            )
            directory.write_training(record)
        for spec in specs:
            right = (hard[spec.id] + 0.5 * rng.normal(size=spec.items) < 0.02 * (number % 10)).astype(float)
            directory.write_evaluation(directory.point(step), _record(directory, step, spec, right))


def _side(side: str, root: Path, shape: str, quick: bool) -> None:
    """Do one side in this process and print what it took."""
    start = time.perf_counter()
    if side == "ours":
        result = analyze_study(Store(root), _view(*SHAPES[shape], QUICK_ITEMS if quick else ITEMS))
        words = sum(pair.gain.word != "not comparable" for target in result.targets for pair in target.comparisons)
        assert words, "the arms were compared"
    else:
        for file in sorted(root.rglob("*.json")):
            json.loads(file.read_text(encoding="utf-8"))
    took = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MEBIBYTE
    print(json.dumps({"seconds": took, "memory_mib": peak}))  # noqa: T201


def _run(side: str, root: Path, shape: str, quick: bool) -> dict[str, Any]:
    command = [sys.executable, __file__, "--side", side, "--root", str(root), "--shape", shape]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *(["--quick"] if quick else [])], capture_output=True, text=True, check=True, env=environment
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    """Time both sides for each shape of a study and print one JSON line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the items: seconds")
    parser.add_argument("--side", choices=("ours", "json"), help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--shape", choices=SHAPES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        _side(args.side, args.root, args.shape, args.quick)
        return
    items = QUICK_ITEMS if args.quick else ITEMS
    for shape, (arms, seeds) in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), _view(arms, seeds, items))
            ours, plain = (_run(side, Path(folder), shape, args.quick) for side in ("ours", "json"))
        line = {
            "study": shape,
            "item_records": arms * seeds * sum(items.values()),
            **ours,
            "ratio": ours["seconds"] / plain["seconds"],
        }
        print(json.dumps(line), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
