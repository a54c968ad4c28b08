"""Time the merge of an adapter into a model directory against the plain way, and hold both to the same tensors.

The plain way loads the pretrained model in float32, puts the adapter on it with peft, calls ``merge_and_unload``,
rounds to the type of the pretrained files and calls ``save_pretrained``. Ours goes through the files one parameter at a
time; ``verified`` also reads every tensor back, loads the tuned model and what was written, one after the other, and
compares their logits, which the plain way does not.
Each side runs in its own process, one after the other, with the same threads. Times
include reading the models and writing the files; ours also the check of the pretrained files' hashes. Both sides have
merged the micro model before, so that imports are no part of it. Peak memory is resident memory above what the process
had then. Every entry must be the same but for the rounding of float32 sums, 1e-6 of a tensor's largest entry, and one
unit in the last place of the type: the two sides add the same numbers in another order. ``differing`` is the share of
entries that are not identical.

    python benchmarks/merge.py [--quick] [--case NAME] [--threads N]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 8, "alpha": 16.0},
    "oft": {"block_size": 32, "neumann_terms": None},
}
DTYPES = {"micro": "float32", MODEL: "bfloat16"}
"""Of the pretrained files, and so of what is written."""
SUMS = 1e-6
"""Of a tensor's largest entry: what the order of float32 additions may change."""
UNIT = {"float32": 2**-23, "bfloat16": 2**-7}
"""Most that one unit in the last place is of an entry."""
REPEATS = 3
"""Of each side; the fastest counts, and the largest memory."""


def main() -> None:
    """Run the cases and print one JSON line for each comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the micro model, one run of each side")
    parser.add_argument("--case", action="append", choices=METHODS, help="may be given several times; all by default")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", 2)), help="of each side")
    parser.add_argument("--side", choices=("adapter", "ours", "reference"), help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side is not None:
        sys.stdout.write(json.dumps(_side(options.side, json.loads(options.job))) + "\n")
        return
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    for method in options.case or METHODS:
        for case in _cases(method, "micro" if options.quick else MODEL, 1 if options.quick else REPEATS):
            sys.stdout.write(json.dumps(case) + "\n")
            sys.stdout.flush()


def _cases(method: str, model: str, repeats: int) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        job: dict[str, Any] = {"model": model, "method": method, "config": METHODS[method], "dtype": DTYPES[model]}
        small = {**job, "model": "micro", "dtype": "float32", "adapter": str(Path(folder) / "small"), "verify": True}
        job |= {"adapter": str(Path(folder) / "adapter"), "small": small}
        _run("adapter", job)
        reference = _best("reference", job, Path(folder) / "reference", repeats)
        for verify in (False, True):
            name = f"merge-{method}-{'verified' if verify else 'unverified'}-{model.rsplit('/', 1)[-1].lower()}"
            ours = _best("ours", job | {"verify": verify}, Path(folder) / f"ours-{verify}", repeats)
            yield _compare(name, ours, reference, job["dtype"])


def _best(side: str, job: dict[str, Any], out: Path, repeats: int) -> dict[str, Any]:
    found = [_run(side, job | {"out": f"{out}-{number}"}) for number in range(repeats)]
    fastest = min(found, key=lambda run: run["wall_s"])
    return fastest | {"peak_bytes": max(run["peak_bytes"] for run in found)}


def _run(side: str, job: dict[str, Any]) -> dict[str, Any]:
    """Run one side in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--job", json.dumps(job)]
    environment = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", **os.environ}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _side(side: str, job: dict[str, Any]) -> dict[str, Any]:
    """Do one side's work and measure it."""
    from peft_arena.cost.memory import PeakMemory

    if side == "adapter":
        _save_adapter(job)
        _save_adapter(job["small"])
        return {}
    work = _ours if side == "ours" else _reference
    with tempfile.TemporaryDirectory() as folder:
        work(job["small"] | {"out": f"{folder}/out"})
    with PeakMemory(side, cuda=False) as memory:
        start, start_cpu = time.perf_counter(), time.process_time()
        ratio = work(job)
        wall, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    peak = memory.measures[0].value
    return {"wall_s": wall, "cpu_s": cpu, "peak_bytes": peak, "out": job["out"], "logit_ratio": ratio}


def _save_adapter(job: dict[str, Any]) -> None:
    """Attach the method, move its trained numbers at random, and save: a real adapter, but for the training."""
    import torch

    from peft_arena.core.specs import ModelSpec
    from peft_arena.methods.registry import make_method
    from peft_arena.models.load import load

    model = load(ModelSpec(name=job["model"], dtype=job["dtype"])).model
    attached = make_method(job["method"], job["config"]).attach(model, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in attached.trained().values():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    attached.save(Path(job["adapter"]))


def _ours(job: dict[str, Any]) -> float | None:
    from peft_arena.commands.merge_command import merge

    done = merge(job["adapter"], Path(job["out"]), base=job["model"], verify=job["verify"])
    return done.verified.written.ratio if done.verified is not None else None


def _reference(job: dict[str, Any]) -> float | None:
    import torch
    from peft import PeftModel

    from peft_arena.core.specs import ModelSpec
    from peft_arena.models.load import load

    loaded = load(ModelSpec(name=job["model"]))
    wrapped: Any = PeftModel.from_pretrained(loaded.model, job["adapter"])
    merged = wrapped.merge_and_unload()
    merged.to(getattr(torch, job["dtype"])).save_pretrained(job["out"])
    loaded.tokenizer.save_pretrained(job["out"])
    return None


def _compare(name: str, ours: dict[str, Any], reference: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Hold every tensor to be the same, and put both sides on one line."""
    worst, differing = _differences(Path(ours["out"]), Path(reference["out"]))
    case = {
        "name": name,
        "ours_s": ours["wall_s"],
        "reference_s": reference["wall_s"],
        "ratio": reference["wall_s"] / ours["wall_s"],
        "cpu_ratio": reference["cpu_s"] / ours["cpu_s"],
        "ours_peak_bytes": ours["peak_bytes"],
        "reference_peak_bytes": reference["peak_bytes"],
        "memory_ratio": ours["peak_bytes"] / reference["peak_bytes"],
        "max_rel_diff": worst,
        "differing": differing,
        "logit_ratio": ours["logit_ratio"],
        "dtype": dtype,
        "threads": int(os.environ["OMP_NUM_THREADS"]),
    }
    if not worst <= UNIT[dtype]:
        raise AssertionError(f"tensors differ by {worst:.2g} relative: {json.dumps(case)}")
    return case


def _differences(ours: Path, reference: Path) -> tuple[float, float]:
    """Return the largest relative difference of any entry beyond that of sums, and the share of entries that differ.

    Raises:
        AssertionError: the two sides have other tensors, or of another type.
    """
    from peft_arena.weights.files import model_files

    one, other = model_files(ours), model_files(reference)
    if one.shapes != other.shapes:
        raise AssertionError(f"other tensors: {sorted(set(one.places) ^ set(other.places))[:3]}")
    worst, differing, entries = 0.0, 0, 0
    for name in one.places:
        first, second = one.read(name), other.read(name)
        if first.dtype != second.dtype:
            raise AssertionError(f"{name} is {first.dtype} and {second.dtype}")
        differing += int((first != second).sum())
        entries += first.numel()
        gap, size = (first.double() - second.double()).abs(), second.double().abs()
        beyond = (gap - SUMS * float(size.max())).clamp_min(0)
        worst = max(worst, float((beyond / size).nan_to_num(0.0, math.inf).max()))
    return worst, differing / entries


if __name__ == "__main__":
    main()
