"""The quantities of geometry by name: what each is, its unit, and where it comes from. Records and figures go by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple


class Quantity(NamedTuple):
    """One quantity."""

    title: str
    """For tables and axes."""
    unit: str
    """``1`` for pure numbers."""
    formula: str
    part: Literal["spectra", "norms", "drift", "activations", "output"]
    """Which measurement gives it; ``norms`` also exist of parameters that are no linear weights."""


QUANTITIES: Mapping[str, Quantity] = {
    # D = W1 - W0 = tuned minus pretrained weight, W0 = U S V^T
    "stable_rank": Quantity("stable rank", "1", "||D||_F^2 / ||D||_2^2", "spectra"),
    "entropy_rank": Quantity(
        "entropy effective rank", "1", "exp(-sum p log p), p = singular values of D over their sum", "spectra"
    ),
    "spectral_norm": Quantity("spectral norm of D", "1", "||D||_2", "spectra"),
    "spectral_norm_relative": Quantity("relative spectral norm", "1", "||D||_2 / ||W0||_2", "spectra"),
    "deviation_mean": Quantity("mean deviation", "1", "mean_i |u_i^T W1 v_i - s_i|", "spectra"),
    "retention_fluctuation": Quantity(
        "retention fluctuation", "1", "mean |P - moving average of P|, P_i = u_i^T W1 v_i", "spectra"
    ),
    "adaptation_mean": Quantity("mean adaptation", "1", "mean_i ||D v_i||_2", "spectra"),
    "adaptation_fluctuation": Quantity(
        "adaptation fluctuation", "1", "mean |E - moving average of E|, E_i = ||D v_i||_2", "spectra"
    ),
    "alignment_mean": Quantity("singular-vector alignment", "1", "mean_i |cos(v_i, v_i of W1)|", "spectra"),
    "l1": Quantity("L1 norm of D", "1", "sum |d|", "norms"),
    "l2": Quantity("L2 norm of D", "1", "||D||_F", "norms"),
    "l1_relative": Quantity("relative L1 norm", "1", "sum |d| / sum |w0|", "norms"),
    "l2_relative": Quantity("relative L2 norm", "1", "||D||_F / ||W0||_F", "norms"),
    # h = base activations at a module's input, E over the tokens of the prompts
    "drift_absolute": Quantity("drift", "1", "E||D h||^2", "drift"),
    "drift_relative": Quantity("relative drift", "1", "E||D h||^2 / E||W0 h||^2", "drift"),
    "drift_update_norm": Quantity("drift per update norm", "1", "E||D h||^2 / (||D||_F^2 E||h||^2)", "drift"),
    # X0, X1 = token-level outputs of a module of the base and of the tuned model
    "cosine": Quantity("mean cosine", "1", "mean_t cos(x0_t, x1_t)", "activations"),
    "cosine_drift": Quantity("cosine drift", "1", "1 - mean cosine", "activations"),
    "angle_mean": Quantity("mean angular drift", "rad", "mean_t arccos cos(x0_t, x1_t)", "activations"),
    "angle_median": Quantity("median angular drift", "rad", "median_t arccos cos(x0_t, x1_t)", "activations"),
    "log_norm_ratio": Quantity("|log norm ratio|", "1", "mean_t |log(||x1_t|| / ||x0_t||)|", "activations"),
    "norm_ratio_mean": Quantity("mean norm ratio", "1", "mean_t ||x1_t|| / ||x0_t||", "activations"),
    "norm_ratio_std": Quantity("spread of norm ratio", "1", "std_t ||x1_t|| / ||x0_t||", "activations"),
    "gram_distortion": Quantity(
        "Gram distortion", "1", "||Z1 Z1^T - Z0 Z0^T||_F / ||Z0 Z0^T||_F, rows of unit length", "activations"
    ),
    "raw_residual": Quantity("raw residual", "1", "||X1 - X0||_F / ||X0||_F, centred", "activations"),
    "procrustes_residual": Quantity(
        "Procrustes residual", "1", "min over orthogonal R of ||X1 R - X0||_F / ||X0||_F, centred", "activations"
    ),
    "procrustes_improvement": Quantity("Procrustes improvement", "1", "raw - Procrustes residual", "activations"),
    "cka": Quantity("linear CKA", "1", "||X0^T X1||_F^2 / (||X0^T X0||_F ||X1^T X1||_F), centred", "activations"),
    "kl": Quantity("forward KL per token", "nats/token", "mean_t KL(base || tuned) of the next token", "output"),
}
PCA = "pca_distance_"
"""Begins the name of a distance of principal subspaces; their dimension ends it."""


def quantity_of(name: str) -> Quantity:
    """Return what a name in a record stands for.

    Raises:
        KeyError: no such quantity.
    """
    if name.startswith(PCA):
        size = int(name.removeprefix(PCA))
        formula = f"||sin theta||_2 / sqrt({size}), theta the principal angles of the {size}-dimensional subspaces"
        return Quantity(f"PCA distance, {size}", "1", formula, "activations")
    return QUANTITIES[name]
