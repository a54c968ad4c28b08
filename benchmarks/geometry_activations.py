"""Time activation geometry, forward KL and drift against a plain way of computing them, and hold both to be equal.

The plain way (ours, written for this comparison) keeps both models in memory and does for each prompt set and each
module one forward pass of the pretrained and one of the tuned model, eight prompts at a time in the order given, padded
on the right; it keeps the rows of all tokens in memory, takes full singular value decompositions, and multiplies the
weight change out. Both sides see the same prompts and the same sample of tokens, and run one after the other in
processes of their own with the same threads. Times include loading the models. ``max_rel_diff`` is the largest relative
difference of any value; above 1e-4 the benchmark fails.

    python benchmarks/geometry_activations.py [--quick] [--method NAME]
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from peft_arena.core.geometry import ActivationsSpec, DriftSpec
    from peft_arena.geometry.collect import Sample
    from peft_arena.geometry.prompts import PromptSet
    from peft_arena.weights.tuned import Tuned

TOLERANCE = 1e-4
TINY = 1e-9
"""Differences below this are the rounding of float32 activations, whatever they are relative to."""
BATCH = 8
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 8, "alpha": 16.0},
    "oft": {"block_size": 32},
    "dora": {"rank": 8, "alpha": 16.0},
    "pissa": {"rank": 8},
    "full": {},
}
SIZES = {"full": 3e-3, "pissa": 5e-3}
"""Standard deviation of the change of each trained number, where it is not the usual one."""
FULL = {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "general": ["nq_open", "piqa"], "target": ["chain_sum"]}
FULL_LIMITS = {"prompts": 24, "max_length": 256, "tokens": 4096, "gram_tokens": 1024, "pca": [32, 64]}
QUICK = {"model": "micro", "general": ["micro-facts", "micro-sort"], "target": ["micro-cipher"]}
QUICK_LIMITS = {"prompts": 40, "max_length": 64, "tokens": 512, "gram_tokens": 256, "pca": [4, 16]}


def main() -> None:
    """Run the cases and print one JSON line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the micro model: about a minute")
    parser.add_argument("--method", action="append", choices=tuple(METHODS), help="may be given several times")
    parser.add_argument("--side", choices=("ours", "reference"), help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side is not None:
        sys.stdout.write(json.dumps(_side(options.side, json.loads(options.job))) + "\n")
        return
    for case in cases(options.quick, options.method):
        sys.stdout.write(json.dumps(case) + "\n")
        sys.stdout.flush()


def cases(quick: bool, methods: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield one comparison after the other.

    Args:
        quick: the micro model, else SmolLM2-135M.
        methods: which methods; LoRA if none are named.

    Raises:
        AssertionError: a value of the two sides differs by more than :data:`TOLERANCE`.
    """
    what, limits = (QUICK, QUICK_LIMITS) if quick else (FULL, FULL_LIMITS)
    for method in methods or ["lora"]:
        with tempfile.TemporaryDirectory() as folder:
            job = {**what, "limits": limits, "method": method, "directory": str(Path(folder) / "tuned")}
            make_point(job)
            for measured in ("activations", "drift"):
                whole = {**job, "measured": measured}
                reference, ours = (_run(side, whole) for side in ("reference", "ours"))
                yield _compare(f"{measured}-{method}-{what['model'].rsplit('/', 1)[-1].lower()}", ours, reference)


def make_point(job: dict[str, Any]) -> None:
    """Save a checkpoint of a method whose trained numbers were moved at random."""
    import torch

    from peft_arena.core.specs import ModelSpec
    from peft_arena.methods.registry import make_method
    from peft_arena.models.load import load

    attached = make_method(job["method"], METHODS[job["method"]]).attach(
        load(ModelSpec(name=job["model"])).model, seed=0
    )
    generator = torch.Generator().manual_seed(0)
    size = SIZES.get(job["method"], 2e-2)
    with torch.no_grad():
        for parameter in attached.trained().values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    attached.save(Path(job["directory"]))


def _run(side: str, job: dict[str, Any]) -> dict[str, Any]:
    """Run one side in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--job", json.dumps(job)]
    environment = {"OMP_NUM_THREADS": "1" if job["model"] == "micro" else "2", "HF_HUB_OFFLINE": "1", **os.environ}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _compare(name: str, ours: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Put both sides on one line, after holding every value to be the same."""
    worst, where = 0.0, ""
    if set(ours["values"]) != set(reference["values"]):
        raise AssertionError(
            f"{name}: the two sides have other values: {set(ours['values']) ^ set(reference['values'])}"
        )
    for key, value in ours["values"].items():
        wanted = reference["values"][key]
        gap = abs(value - wanted)
        relative = 0.0 if gap < TINY else gap / abs(wanted)
        if math.isnan(relative):  # one that is no number must not pass
            relative = math.inf
        if relative > worst:
            worst, where = relative, key
    case = {
        "name": name,
        "ours_s": ours["seconds"],
        "reference_s": reference["seconds"],
        "ratio": reference["seconds"] / ours["seconds"],
        "ours_peak_bytes": ours["peak_bytes"],
        "reference_peak_bytes": reference["peak_bytes"],
        "max_rel_diff": worst,
        "values": len(ours["values"]),
        "tokens": ours["tokens"],
    }
    if worst > TOLERANCE:
        raise AssertionError(f"{where} differs by {worst:.2g} relative: {json.dumps(case)}")
    return case


def _side(side: str, job: dict[str, Any]) -> dict[str, Any]:
    """Measure on one side."""
    import resource

    import peft  # noqa: F401 - neither side's time has the import in it
    import transformers.models.llama  # noqa: F401

    point, spec = _point(job), _spec(job)
    start = time.perf_counter()
    values, tokens = (_ours if side == "ours" else _reference)(point, spec)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"values": values, "tokens": tokens, "seconds": seconds, "peak_bytes": peak}


def _point(job: dict[str, Any]) -> Tuned:
    from peft_arena.core.specs import MethodSpec, ModelSpec
    from peft_arena.methods.registry import make_method
    from peft_arena.models.load import pin
    from peft_arena.weights.tuned import Tuned

    config = make_method(job["method"], METHODS[job["method"]]).config.model_dump(mode="json")
    return Tuned(
        base=pin(ModelSpec(name=job["model"])),
        directory=Path(job["directory"]),
        method=MethodSpec(name=job["method"], config=config),
        subject=job["method"],
        step=1,
    )


def _spec(job: dict[str, Any]) -> ActivationsSpec | DriftSpec:
    from peft_arena.core.geometry import ActivationsSpec, DriftSpec, PromptSpec
    from peft_arena.core.specs import ModelSpec, TaskSpec
    from peft_arena.geometry.modules import linear_modules, paper_modules
    from peft_arena.models.load import skeleton
    from peft_arena.tasks.registry import make_task

    def sources(names: Sequence[str]) -> tuple[PromptSpec, ...]:
        cards = [make_task(name).card for name in names]
        return tuple(
            PromptSpec(task=TaskSpec(name=card.name, version=card.version, revision=card.revision, config=config))
            for card, config in zip(cards, ({} for _ in names), strict=True)
        )

    limits = job["limits"]
    both: dict[str, Any] = {which: sources(job[which]) for which in ("general", "target")}
    both |= {name: limits[name] for name in ("prompts", "max_length")}
    if job["measured"] == "activations":
        return ActivationsSpec(
            **both, tokens=limits["tokens"], gram_tokens=limits["gram_tokens"], pca=tuple(limits["pca"])
        )
    names = linear_modules(skeleton(ModelSpec(name=job["model"])))
    return DriftSpec(**both, modules=paper_modules(names, job["model"]))


def _ours(point: Tuned, spec: ActivationsSpec | DriftSpec) -> tuple[dict[str, float], int]:
    from peft_arena.core.geometry import DriftSpec
    from peft_arena.geometry.measure_activations import measure_activations
    from peft_arena.geometry.measure_drift import measure_drift

    if isinstance(spec, DriftSpec):
        (found,) = measure_drift([point], spec, parts=None, progress=lambda part, what: None)
    else:
        (found,) = measure_activations([point], spec, parts=None, progress=lambda part, what: None)
    values = {
        f"{row.module} {row.prompts} {name}": value
        for row in found.rows
        for name, value in row.values.items()
        if value is not None and row.prompts != "ratio"
    }
    return values, sum(measure.n for measure in found.summary if measure.metric.startswith("kl_"))


def _reference(point: Tuned, spec: ActivationsSpec | DriftSpec) -> tuple[dict[str, float], int]:
    """The plain way: both models in memory, a forward pass for each module and prompt set."""
    import torch

    from peft_arena.core.geometry import DriftSpec
    from peft_arena.geometry.collect import draw
    from peft_arena.geometry.modules import linear_modules, paper_modules
    from peft_arena.geometry.prepare import prompt_sets
    from peft_arena.models.load import load

    loaded = load(point.base)
    base = loaded.model
    prompts = prompt_sets(spec, loaded)
    names = paper_modules(linear_modules(base), "the model")
    values: dict[str, float] = {}
    tokens = 0
    with torch.no_grad():
        if isinstance(spec, DriftSpec):
            weights = point.weights()
            for which, texts in prompts.items():
                for name in names:
                    inputs = _rows(base, base.get_submodule(name), texts, before=True)
                    pair = weights.pair(name)
                    delta = torch.zeros_like(pair.base) if pair.change is None else pair.change.dense(pair.base)
                    found = _plain_drift(inputs.double(), pair.base.double(), delta.double())
                    values |= {f"{name} {which} {key}": value for key, value in found.items()}
            return values, 0
        tuned = point.model(load(point.base))
        inner = tuned.get_base_model() if hasattr(tuned, "get_base_model") else tuned
        for which, texts in prompts.items():
            sample = draw(texts, spec.tokens, spec.seed)
            picked = _picked(texts, sample)
            tokens += len(picked)
            for name in names:
                first = _rows(base, base.get_submodule(name), texts)[picked]
                second = _rows(tuned, inner.get_submodule(name), texts)[picked]
                found = _plain_geometry(first, second, spec.gram_tokens, spec.pca)
                values |= {f"{name} {which} {key}": value for key, value in found.items()}
            logits = [_rows(model, None, texts)[picked] for model in (base, tuned)]
            values[f" {which} kl"] = _plain_kl(*logits)
    return values, tokens


def _rows(model: nn.Module, module: nn.Module | None, prompts: PromptSet, before: bool = False) -> Tensor:
    """Return outputs (or inputs) of a module, or the logits, at all tokens, by one pass over the prompts."""
    import torch

    seen: list[Tensor] = []
    handle = None
    if module is not None:
        handle = module.register_forward_hook(lambda _, given, output: seen.append(given[0] if before else output))
    found = []
    for first in range(0, len(prompts.ids), BATCH):
        texts = prompts.ids[first : first + BATCH]
        longest = max(map(len, texts))
        ids, mask = (torch.zeros(len(texts), longest, dtype=torch.long) for _ in range(2))
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        found.append((logits if module is None else seen.pop()).float()[mask.bool()])
    if handle is not None:
        handle.remove()
    return torch.cat(found)


def _picked(prompts: PromptSet, sample: Sample) -> list[int]:
    """Return the numbers of the sampled tokens among all tokens."""
    found, before = [], 0
    for ids, drawn in zip(prompts.ids, sample.positions, strict=True):
        found += [before + place for place in drawn]
        before += len(ids)
    return found


def _plain_drift(inputs: Tensor, weight: Tensor, delta: Tensor) -> dict[str, float]:
    moved = float((inputs @ delta.T).square().sum(1).mean())
    before, size = float((inputs @ weight.T).square().sum(1).mean()), float(inputs.square().sum(1).mean())
    norm = float(delta.square().sum())
    found = {"drift_absolute": moved, "drift_relative": moved / before}
    return {**found, "drift_update_norm": moved / (norm * size)} if norm else found


def _plain_kl(base: Tensor, tuned: Tensor) -> float:
    total = 0.0
    for first, second in zip(base.split(512), tuned.split(512), strict=True):
        p, q = first.double().log_softmax(1), second.double().log_softmax(1)
        total += float((p.exp() * (p - q)).sum())
    return total / len(base)


def _plain_geometry(base: Tensor, tuned: Tensor, gram_tokens: int, pca: Sequence[int]) -> dict[str, float]:
    """Return every quantity by its formula, in float64."""
    import torch

    x0, x1 = base.double(), tuned.double()
    cosine = torch.nn.functional.cosine_similarity(x0, x1, dim=1)
    angle = cosine.clamp(-1, 1).arccos()
    ratio = x1.norm(dim=1) / x0.norm(dim=1)
    n = len(x0)
    kept = [place * n // min(n, gram_tokens) for place in range(min(n, gram_tokens))]
    z0, z1 = (x[kept] / x[kept].norm(dim=1, keepdim=True) for x in (x0, x1))
    c0, c1 = x0 - x0.mean(0), x1 - x1.mean(0)
    left, _, right = torch.linalg.svd(c1.T @ c0)
    raw = (c1 - c0).norm() / c0.norm()
    turned = (c1 @ (left @ right) - c0).norm() / c0.norm()
    found = {
        "cosine": cosine.mean(),
        "cosine_drift": 1 - cosine.mean(),
        "angle_mean": angle.mean(),
        "angle_median": angle.quantile(0.5),
        "log_norm_ratio": ratio.log().abs().mean(),
        "norm_ratio_mean": ratio.mean(),
        "norm_ratio_std": ratio.std(correction=0),
        "gram_distortion": (z1 @ z1.T - z0 @ z0.T).norm() / (z0 @ z0.T).norm(),
        "raw_residual": raw,
        "procrustes_residual": turned,
        "procrustes_improvement": raw - turned,
        "cka": (c0.T @ c1).norm() ** 2 / ((c0.T @ c0).norm() * (c1.T @ c1).norm()),
    }
    v0, v1 = (torch.linalg.svd(c, full_matrices=False).Vh for c in (c0, c1))
    for k in pca:
        cosines = torch.linalg.svdvals(v0[:k] @ v1[:k].T).clamp(max=1)
        found[f"pca_distance_{k}"] = ((1 - cosines.square()).sum() / k).sqrt()
    return {name: float(value) for name, value in found.items()}


if __name__ == "__main__":
    main()
