"""Settings of the methods that the shipped studies use."""

from __future__ import annotations

from typing import Any

SETTINGS: dict[str, dict[str, Any]] = {
    "bitfit": {"learning_rate": 2e-2},
    "dora": {},
    "full": {"learning_rate": 2e-3},
    "ia3": {"learning_rate": 2e-2},
    "ln_tuning": {"learning_rate": 2e-2},
    "lora": {},
    "lora_plus": {"learning_rate": 1e-3},
    "miss": {},
    "none": {},
    "oft": {"config": {"block_size": 8}, "awkward": {"block_size": 4}},
    "pissa": {},
    "prompt_tuning": {"config": {"num_virtual_tokens": 6}, "learning_rate": 5e-2},
    "rslora": {},
    "vera": {"config": {"rank": 8}, "learning_rate": 3e-2},
}
