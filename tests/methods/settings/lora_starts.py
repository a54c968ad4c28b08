"""Settings of the LoRA variants that differ by their start."""

from __future__ import annotations

from typing import Any

FEW: dict[str, Any] = {"calibration_examples": 4}

SETTINGS: dict[str, dict[str, Any]] = {
    "corda_ipm": {"config": FEW},
    "corda_kpm": {"config": FEW},
    "eva": {"config": FEW},
    "kasa": {},
    "keeplora": {"config": FEW},
    "lora_ga": {"config": {"calibration_examples": 8}},
    "lora_orthogonal": {},
    "mica": {},
    "milora": {},
    "olora": {},
}
