"""The plain way to the spectra, written for the comparison: whole matrices, full decompositions, nothing kept.

For each adapter two whole models in float32 are held in memory, the pretrained weights and the change of each, and for
each linear layer W0 and D are decomposed in full, and W1 too where singular vectors are compared. Where float32 would
leave fewer than four digits, the plain formula is taken that keeps them: deviations are |u^T D v| (P - s keeps two),
LoRA's D is B A (the difference of merged weights is noise of full rank), and singular values of D below 1e-6 of the
largest, which are that noise, count as zero in the entropy.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

NOISE = 1e-6


def model_spectra(job: dict[str, Any]) -> Iterator[tuple[str, dict[str, float], dict[str, Tensor]]]:
    """Yield adapter and module, scalars and profiles; first the seconds that loading took."""
    import torch

    for number, directory in enumerate(job["adapters"]):
        start = time.perf_counter()
        base, changes = two_models(job, Path(directory))
        yield f"{number} load", {"seconds": time.perf_counter() - start}, {}
        with torch.no_grad():
            for module, change in changes.items():
                yield f"{number} {module}", *spectra(base[f"{module}.weight"], change, job["alignment"])
            yield f"{number} ", global_norms(base, changes), {}
        del base, changes, change


def exact_spectra(job: dict[str, Any]) -> tuple[dict[str, dict[str, float]], dict[str, Tensor]]:
    """Return scalars and profiles in float64, of every fifth layer of the first adapter; none of alignment."""
    import torch

    base, changes = two_models(job, Path(job["adapters"][0]))
    found: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        for module in list(changes)[::5]:
            scalars[f"0 {module}"], profiles = spectra(
                base[f"{module}.weight"].double(), changes[module].double(), alignment=False
            )
            found |= {f"0 {module} {name}": array for name, array in profiles.items()}
    return scalars, found


def two_models(job: dict[str, Any], directory: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return every pretrained parameter, and D of every linear layer as peft gives it."""
    import torch

    from peft_arena.core.specs import ModelSpec
    from peft_arena.methods.registry import make_method
    from peft_arena.models.load import load

    model = load(ModelSpec(name=job["model"])).model
    base = {name: weight.detach() for name, weight in model.named_parameters()}
    modules = [name.removesuffix(".weight") for name in base if name.endswith("_proj.weight")]
    method = make_method(job["method"], job["config"])
    with torch.no_grad():
        if job["method"] == "lora":
            layers: Any = method.restore(model, directory)
            return base, {module: layers.adapted(module).get_delta_weight("default") for module in modules}
        base = {name: weight.clone() for name, weight in base.items()}
        tuned = dict(method.restore(model, directory).merged().named_parameters())
        return base, {module: tuned[f"{module}.weight"].sub_(base[f"{module}.weight"]) for module in modules}


def spectra(base: Tensor, change: Tensor, alignment: bool) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Return the scalars and profiles of one layer from whole matrices."""
    import torch

    left, values, right = torch.linalg.svd(base, full_matrices=False)
    _, own, _ = torch.linalg.svd(change, full_matrices=False)
    moved = change @ right.T
    kept = (left.T @ moved).diagonal()
    profiles = {
        "singular_value": values,
        "retention": values + kept,
        "deviation": kept.abs(),
        "adaptation": moved.square().sum(0).sqrt(),
        "change_singular_value": own,
    }
    shares = own[own > NOISE * own[0]] / own.sum()
    l1, l2 = float(change.abs().sum()), float(change.square().sum().sqrt())
    scalars = {
        "stable_rank": float(own.square().sum() / own[0].square()),
        "entropy_rank": math.exp(-float((shares * shares.log()).sum())),
        "spectral_norm": float(own[0]),
        "spectral_norm_relative": float(own[0] / values[0]),
        "deviation_mean": float(kept.abs().mean()),
        "retention_fluctuation": fluctuation(profiles["retention"]),
        "adaptation_mean": float(profiles["adaptation"].mean()),
        "adaptation_fluctuation": fluctuation(profiles["adaptation"]),
        "l1": l1,
        "l2": l2,
        "l1_relative": l1 / float(base.abs().sum()),
        "l2_relative": l2 / float(base.square().sum().sqrt()),
    }
    if alignment:
        _, _, turned = torch.linalg.svd(base + change, full_matrices=False)
        profiles["alignment"] = (right * turned).sum(1).abs()
        scalars["alignment_mean"] = float(profiles["alignment"].mean())
    return scalars, profiles


def fluctuation(profile: Tensor) -> float:
    """Return the mean distance from the mean of the five entries around each, the ends mirrored."""
    from torch.nn import functional

    mirrored = functional.pad(profile[None].double(), (2, 2), mode="reflect")[0]
    return float((profile.double() - mirrored.unfold(0, 5, 1).mean(1)).abs().mean())


def global_norms(base: dict[str, Tensor], changes: dict[str, Tensor]) -> dict[str, float]:
    """Return the norms over the whole model."""
    l1 = sum(float(change.abs().sum()) for change in changes.values())
    l2 = math.sqrt(sum(float(change.square().sum()) for change in changes.values()))
    whole = [sum(float(weight.abs().sum()) for weight in base.values())]
    whole.append(math.sqrt(sum(float(weight.square().sum()) for weight in base.values())))
    names = ("global_l1", "global_l2", "global_l1_relative", "global_l2_relative")
    return dict(zip(names, (l1, l2, l1 / whole[0], l2 / whole[1]), strict=True))
