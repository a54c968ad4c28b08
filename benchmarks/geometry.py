"""Time the geometry of tuned models against a plain way of computing it, and hold both to be equal.

Spectra: four adapters of one pretrained model at once, random but of real files, with the pretrained decompositions
kept from before (``cached``) or not (``cold``); and one matrix of 3584 x 18944. The plain way is
``geometry_reference.py``. Each side runs in its own process, one after the other, with the same threads. Times include
reading the models; ``ratio_without_loading`` takes it off the plain side alone. Peak memory is resident memory above
what the process had after its imports. ``max_rel_diff`` is the largest difference of any number: scalars relative to
themselves, profiles relative to the largest entry of the profile; above 1e-4 the benchmark fails. Singular vectors of
close singular values turn into each other by rounding, which single entries of ``adaptation`` and ``deviation`` show
and to a few parts in ten thousand some means over them. These are therefore held against the plain way in float64,
outside of the time, on every fifth layer of the first adapter; entries of ``alignment``, and those of the large matrix,
by their mean alone. ``reference_float32_off`` says how far the plain way in float32 is from ours where it is not held.

    python benchmarks/geometry.py [--quick] [--case NAME] [--threads N]
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
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from peft_arena.geometry.measured import Measured

TOLERANCE = 1e-4
HANGING = ("deviation_mean", "adaptation_fluctuation")
"""Means that rounding in float32 moves by more than the tolerance in the plain way."""
RESOLVED = ("singular_value", "retention", "change_singular_value")
"""Profiles whose single entries the plain way gets right in float32."""
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 8, "alpha": 16.0},
    "oft": {"block_size": 32, "neumann_terms": None},
}
ADAPTERS = 4
SHAPE = (3584, 18944)
CASES = ("lora", "oft", "matrix", "activations")


def main() -> None:
    """Run the cases and print one JSON line for each comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="the micro model, nothing kept, no large matrix: about a minute"
    )
    parser.add_argument("--case", action="append", choices=CASES, help="may be given several times; all by default")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", 2)), help="of each side")
    parser.add_argument("--side", choices=("adapters", "ours", "reference"), help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side is not None:
        sys.stdout.write(json.dumps(_side(options.side, json.loads(options.job))) + "\n")
        return
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    for case in _cases(options.quick, options.case or CASES):
        sys.stdout.write(json.dumps(case) + "\n")
        sys.stdout.flush()


def _cases(quick: bool, wanted: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    for method in METHODS:
        if method in wanted:
            yield from _adapter_cases(method, *(("micro", ("cold",)) if quick else (MODEL, ("cold", "cached"))))
    if "matrix" in wanted and not quick:
        yield from _matrix_cases()
    if "activations" in wanted:
        import geometry_activations

        yield from geometry_activations.cases(quick)


def _adapter_cases(method: str, model: str, states: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Compare the two sides on adapters of a method: without and with kept decompositions."""
    with tempfile.TemporaryDirectory() as folder:
        directories = [str(Path(folder) / f"{method}-{number}") for number in range(ADAPTERS)]
        job = {"model": model, "method": method, "config": METHODS[method], "adapters": directories}
        job |= {"alignment": method == "oft", "svd": str(Path(folder) / "svd"), "out": folder}
        _run("adapters", job)
        reference = _run("reference", job)
        for state in states:
            short = model.rsplit("/", 1)[-1].lower()
            yield _compare(f"spectra-{method}-{state}-{short}-x{ADAPTERS}", _run("ours", job), reference)


def _matrix_cases() -> Iterator[dict[str, Any]]:
    """Compare the two sides on one large matrix with a LoRA change."""
    with tempfile.TemporaryDirectory() as folder:
        job = {"shape": SHAPE, "rank": 8, "alignment": False, "svd": str(Path(folder) / "svd"), "out": folder}
        reference = _run("reference", job)
        for state in ("cold", "cached"):
            yield _compare(f"spectra-lora-{state}-matrix-{SHAPE[0]}x{SHAPE[1]}", _run("ours", job), reference)


def _run(side: str, job: dict[str, Any]) -> dict[str, Any]:
    """Run one side in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--job", json.dumps(job)]
    environment = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", **os.environ}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _side(side: str, job: dict[str, Any]) -> dict[str, Any]:
    """Do one side's work and measure it; its numbers are left in a file."""
    import peft  # noqa: F401 - neither side's time and memory has imports in it
    import polars  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401
    from safetensors.torch import save_file

    import peft_arena.geometry.measure_spectra
    import peft_arena.weights.merging
    import peft_arena.weights.tuned  # noqa: F401
    from peft_arena.cost.memory import PeakMemory

    if side == "adapters":
        _save_adapters(job)
        return {}
    matrix = _matrix(job) if "shape" in job else None
    torch.linalg.svd(torch.eye(64))
    with PeakMemory(side, cuda=False) as memory:
        start, start_cpu = time.perf_counter(), time.process_time()
        if matrix is not None:
            found: Any = _on_matrix(side, job, *matrix)
        else:
            found = _ours(job) if side == "ours" else _reference(job)
        wall, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    scalars, profiles, loading = _numbers(found) if isinstance(found, list) else found
    exact: dict[str, dict[str, float]] = {}
    if side == "reference" and matrix is None:
        import geometry_reference

        exact, exact_profiles = geometry_reference.exact_spectra(job)
        profiles |= exact_profiles
    file = Path(job["out"]) / f"{side}.safetensors"
    texts = {"scalars": json.dumps(scalars), "exact": json.dumps(exact)}
    save_file({key: tensor.contiguous() for key, tensor in profiles.items()}, file, texts)
    peak = memory.measures[0].value
    return {"wall_s": wall, "cpu_s": cpu, "loading_s": loading, "peak_bytes": peak, "file": str(file)}


Numbers = tuple[dict[str, dict[str, float]], "dict[str, Tensor]", float]


def _save_adapters(job: dict[str, Any]) -> None:
    """Attach the method, move its trained numbers at random, and save: real adapters, but for the training."""
    import torch

    from peft_arena.core.specs import ModelSpec
    from peft_arena.methods.registry import make_method
    from peft_arena.models.load import load

    for seed, directory in enumerate(job["adapters"]):
        attached = make_method(job["method"], job["config"]).attach(load(ModelSpec(name=job["model"])).model, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in attached.trained().values():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
        attached.save(Path(directory))


def _ours(job: dict[str, Any]) -> list[Measured]:
    from peft_arena.core.geometry import SpectraSpec
    from peft_arena.core.specs import MethodSpec, ModelSpec
    from peft_arena.geometry.measure_spectra import measure_spectra
    from peft_arena.methods.registry import make_method
    from peft_arena.models.load import pin
    from peft_arena.weights.svd import SvdCache
    from peft_arena.weights.tuned import Tuned

    base = pin(ModelSpec(name=job["model"]))
    config = make_method(job["method"], job["config"]).config.model_dump(mode="json")
    method = MethodSpec(name=job["method"], config=config)
    tuned = [Tuned(base, Path(directory), method, directory, 1) for directory in job["adapters"]]
    return measure_spectra(tuned, SpectraSpec(), cache=SvdCache(Path(job["svd"])), parts=None, progress=lambda *_: None)


def _numbers(found: list[Measured]) -> Numbers:
    """Return what was measured by the names the plain way has."""
    from peft_arena.geometry.measure_spectra import PROFILES

    scalars: dict[str, dict[str, float]] = {}
    profiles: dict[str, Tensor] = {}
    for number, measured in enumerate(found):
        totals = {m.metric: m.value for m in measured.summary if m.metric.startswith("global_")}
        scalars[f"{number} "] = {name: float(value) for name, value in totals.items() if value is not None}
        for row in measured.rows:
            scalars[f"{number} {row.module}"] = {k: float(v) for k, v in row.values.items() if v is not None}
        assert measured.arrays is not None
        for (module,), frame in measured.arrays.group_by("module"):
            for name in PROFILES:
                if frame[name].null_count() == 0:
                    profiles[f"{number} {module} {name}"] = frame[name].to_torch().clone()
    return scalars, profiles, 0.0


def _reference(job: dict[str, Any]) -> Numbers:
    import geometry_reference

    scalars: dict[str, dict[str, float]] = {}
    profiles: dict[str, Tensor] = {}
    loading = 0.0
    for key, values, arrays in geometry_reference.model_spectra(job):
        if key.endswith(" load"):
            loading += values["seconds"]
            continue
        scalars[key] = values
        profiles |= {f"{key} {name}": array for name, array in arrays.items() if name in RESOLVED}
    return scalars, profiles, loading


def _matrix(job: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Return W0, B and A; the same on both sides, and in memory before the measurement begins."""
    import torch

    generator = torch.Generator().manual_seed(0)
    rows, columns = job["shape"]
    base = torch.randn(rows, columns, generator=generator) * 0.02
    b = torch.randn(rows, job["rank"], generator=generator) * 0.01
    return base, b, torch.randn(job["rank"], columns, generator=generator) * 0.01


def _on_matrix(side: str, job: dict[str, Any], base: Tensor, b: Tensor, a: Tensor) -> Numbers:
    import torch

    import geometry_reference
    from peft_arena.geometry.measure_spectra import PROFILES
    from peft_arena.geometry.spectra import spectrum
    from peft_arena.weights.change import LowRank
    from peft_arena.weights.svd import SvdCache

    if side == "reference":
        scalars, profiles = geometry_reference.spectra(base, b @ a, job["alignment"])
        return {"matrix": scalars}, {f"matrix {name}": profiles[name] for name in RESOLVED}, 0.0
    svd = SvdCache(Path(job["svd"])).get(base, "matrix", torch.float32)
    found = spectrum(base, svd, LowRank(b, a))
    held = {f"matrix {name}": getattr(found, name) for name in PROFILES}
    values = {name: value for name, value in found.scalars.items() if value is not None}
    return {"matrix": values}, {name: array for name, array in held.items() if array is not None}, 0.0


def _compare(name: str, ours: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Hold every number to be the same, and put both sides on one line."""
    worst, off = _differences(Path(ours["file"]), Path(reference["file"]))
    where = max(worst, key=lambda quantity: worst[quantity])
    case = {
        "name": name,
        "ours_s": ours["wall_s"],
        "reference_s": reference["wall_s"],
        "ratio": reference["wall_s"] / ours["wall_s"],
        "ratio_without_loading": (reference["wall_s"] - reference["loading_s"]) / ours["wall_s"],
        "cpu_ratio": reference["cpu_s"] / ours["cpu_s"],
        "ours_peak_bytes": ours["peak_bytes"],
        "reference_peak_bytes": reference["peak_bytes"],
        "memory_ratio": ours["peak_bytes"] / reference["peak_bytes"],
        "max_rel_diff": worst[where],
        "max_rel_diff_of": where,
        "reference_float32_off": off,
        "ours_cpu_s": ours["cpu_s"],
        "reference_cpu_s": reference["cpu_s"],
        "threads": int(os.environ["OMP_NUM_THREADS"]),
    }
    if not worst[where] <= TOLERANCE:
        raise AssertionError(f"{where} differs by {worst[where]:.2g} relative: {worst}: {json.dumps(case)}")
    return case


def _differences(ours: Path, reference: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Return the largest relative difference of each quantity, and of those that hang on rounding in float32.

    Raises:
        AssertionError: the two sides have other numbers.
    """
    from safetensors import safe_open

    worst: dict[str, float] = {}
    off: dict[str, float] = {}
    with safe_open(ours, "pt") as first, safe_open(reference, "pt") as second:
        one, other = (json.loads(file.metadata()["scalars"]) for file in (first, second))
        if not set(first.keys()) >= set(second.keys()) or one.keys() != other.keys():
            raise AssertionError(
                f"profiles or modules are missing: {sorted(set(second.keys()) - set(first.keys()))[:3]}"
            )
        exact = json.loads(second.metadata()["exact"])
        for key, values in other.items():
            if values.keys() != one[key].keys():
                raise AssertionError(f"{key}: other quantities: {values.keys() ^ one[key].keys()}")
            for name, value in (values | exact.get(key, {})).items():
                held = off if exact and name in HANGING and key not in exact else worst
                held[name] = max(held.get(name, 0.0), _number(abs(one[key][name] - value) / abs(value)))
        for key in second.keys():  # noqa: SIM118 - it is no mapping
            name = key.rsplit(" ", 1)[-1]
            mine, wanted = first.get_tensor(key).double(), second.get_tensor(key).double()
            found = float((mine - wanted).abs().max() / wanted.abs().max())
            worst[f"profile {name}"] = max(worst.get(f"profile {name}", 0.0), _number(found))
    return worst, off


def _number(difference: float) -> float:
    """Return a difference; one that is no number is larger than all, where ``max`` would pass it over."""
    return math.inf if math.isnan(difference) else difference


if __name__ == "__main__":
    main()
