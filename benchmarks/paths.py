"""Time a walk of twelve points along a LoRA's path against merging, saving, loading and evaluating at every point.

The plain way is two commands a point, each a process of its own, as with a merge script and an evaluation script: the
first loads the model and the adapter, scales it, merges it and saves the model; the second loads that and evaluates it.
Ours is one process that loads once and moves the weights in place. Both answer the same items through the same
evaluation, in float32, with the same threads; the answers of every item are held to be the same. ``ratio`` is of whole
processes. ``ratio_without_starts`` takes the start of Python and the imports off both sides, as if the plain way were
one script with a loop. ``loading_s``, ``placing_s`` and ``evaluating_s`` say where the time goes.

    python benchmarks/paths.py [--quick] [--threads N]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
POINTS = [round(0.1 * place, 10) for place in range(1, 13)]
TASKS = {"chain_sum": 24, "piqa": 16}
QUICK_POINTS = [0.4, 0.8, 1.2]
QUICK_TASKS = {"micro-reverse": 24, "micro-sort": 16}


def main() -> None:
    """Make an adapter, walk its path both ways and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the micro model and three points: under a minute")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", 2)), help="of each side")
    parser.add_argument("--side", choices=("adapter", "ours", "merge", "evaluate"), help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side is not None:
        sys.stdout.write(json.dumps(_side(options.side, json.loads(options.job))) + "\n")
        return
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    model, tasks = ("micro", QUICK_TASKS) if options.quick else (MODEL, TASKS)
    points = QUICK_POINTS if options.quick else POINTS
    with tempfile.TemporaryDirectory() as folder:
        sys.stdout.write(json.dumps(_compare(folder, model, tasks, points)) + "\n")


def _compare(folder: str, model: str, tasks: dict[str, int], points: list[float]) -> dict[str, Any]:
    job = {"model": model, "tasks": tasks, "adapter": f"{folder}/adapter", "points": points}
    _run("adapter", job)
    ours = _run("ours", job)
    reference: list[dict[str, Any]] = []
    for factor in points:
        merged = f"{folder}/merged-{factor:g}"
        parts = [_run(side, {**job, "factor": factor, "merged": merged}) for side in ("merge", "evaluate")]
        reference.append({key: sum(part.get(key, 0.0) for part in parts) for key in ("process_s", "work_s", "eval_s")})
        if parts[1]["answers"] != ours["answers"][f"{factor:g}"]:
            raise SystemExit(f"the two ways answer differently at factor {factor:g}")
    total = {key: sum(part[key] for part in reference) for key in ("process_s", "work_s", "eval_s")}
    return {
        "name": f"path-lora-{model.rsplit('/', 1)[-1].lower()}-x{len(points)}",
        "items": sum(tasks.values()),
        "ours_s": ours["process_s"],
        "reference_s": total["process_s"],
        "ratio": total["process_s"] / ours["process_s"],
        "ratio_without_starts": total["work_s"] / ours["work_s"],
        "loading_s": ours["loading_s"],
        "placing_s": ours["placing_s"],
        "evaluating_s": ours["eval_s"],
        "reference_evaluating_s": total["eval_s"],
        "same_answers": True,
    }


def _run(side: str, job: dict[str, Any]) -> dict[str, Any]:
    """Run one command in a process of its own, and time the whole of it."""
    command = [sys.executable, __file__, "--side", side, "--job", json.dumps(job)]
    environment = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", **os.environ}
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**result, "process_s": time.perf_counter() - start}


def _side(side: str, job: dict[str, Any]) -> dict[str, Any]:
    """Do the work of one command; imports are not in its time."""
    import peft
    import transformers.models.llama.modeling_llama  # noqa: F401

    import peft_arena.weights.tuned

    if side == "adapter":
        return _make_adapter(job)
    if side == "merge":
        start = time.perf_counter()
        _merge(job, peft)
        return {"work_s": time.perf_counter() - start}
    import peft_arena.evaluate.adapter
    import peft_arena.evaluate.run  # noqa: F401

    start = time.perf_counter()
    found = _ours(job) if side == "ours" else _evaluated(job)
    return {**found, "work_s": time.perf_counter() - start}


def _make_adapter(job: dict[str, Any]) -> dict[str, Any]:
    """Save a LoRA of random numbers: the time does not depend on which."""
    import torch

    from peft_arena.core.specs import ModelSpec
    from peft_arena.methods.registry import make_method
    from peft_arena.models.load import load

    attached = make_method("lora", {"rank": 16, "alpha": 32.0}).attach(load(ModelSpec(name=job["model"])).model, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in attached.trained().values():
            parameter.add_(0.003 * torch.randn(parameter.shape, generator=generator))
    attached.save(Path(job["adapter"]))
    return {}


def _merge(job: dict[str, Any], peft: Any) -> None:
    """Merge a scaled adapter into the model and save it, the plain way."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from peft_arena.core.specs import ModelSpec
    from peft_arena.models.load import weight_files

    directory = weight_files(ModelSpec(name=job["model"]))
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), job["adapter"])
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.scaling["default"] *= job["factor"]
    model.merge_and_unload().save_pretrained(job["merged"])
    AutoTokenizer.from_pretrained(directory).save_pretrained(job["merged"])


def _specs(job: dict[str, Any]) -> list[Any]:
    from peft_arena.core.specs import EvalSpec
    from peft_arena.study.read_study import task_spec

    return [EvalSpec(task=task_spec(name, {}, ""), items=items) for name, items in job["tasks"].items()]


def _answers(records: Any) -> list[tuple[str, float | None, str]]:
    return [[item.id, item.value, item.extracted] for record in records for item in record.items]


def _evaluated(job: dict[str, Any]) -> dict[str, Any]:
    from peft_arena.core.specs import ModelSpec
    from peft_arena.evaluate.run import evaluate_many
    from peft_arena.models.load import load

    loaded = load(ModelSpec(name=job["merged"]))
    start = time.perf_counter()
    records = evaluate_many(loaded, loaded.model, _specs(job), run_id="plain", step=0, factor=1.0, progress=False)
    return {"answers": _answers(records), "eval_s": time.perf_counter() - start}


def _ours(job: dict[str, Any]) -> dict[str, Any]:
    from peft_arena.core.specs import OWN, MethodSpec, ModelSpec
    from peft_arena.evaluate.run import evaluate_many
    from peft_arena.methods.registry import make_method
    from peft_arena.models.load import pin
    from peft_arena.paths.placing import Placer
    from peft_arena.paths.scan import kept_tasks
    from peft_arena.weights.tuned import Tuned

    start = time.perf_counter()
    config = make_method("lora", {"rank": 16, "alpha": 32.0}).config.model_dump(mode="json")
    method = MethodSpec(name="lora", config=config)
    tuned = Tuned(pin(ModelSpec(name=job["model"])), Path(job["adapter"]), method, "ours", 1)
    placer = Placer(tuned, OWN)
    placer.at(0.0)  # loads the model
    make, specs = kept_tasks(), _specs(job)
    times = {"loading_s": time.perf_counter() - start, "placing_s": 0.0, "eval_s": 0.0}
    answers: dict[str, Any] = {}
    for factor in job["points"]:
        start = time.perf_counter()
        placed = placer.at(factor)
        ready = time.perf_counter()
        records = evaluate_many(*placed, specs, run_id="ours", step=1, factor=factor, progress=False, make=make)
        answers[f"{factor:g}"] = _answers(records)
        times["placing_s"] += ready - start
        times["eval_s"] += time.perf_counter() - ready
    return {**times, "answers": answers}


if __name__ == "__main__":
    main()
