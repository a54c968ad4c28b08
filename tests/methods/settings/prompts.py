"""Settings of prompt and prefix methods and of others that cannot be merged."""

from __future__ import annotations

from typing import Any

SETTINGS: dict[str, dict[str, Any]] = {
    "adaption_prompt": {"config": {"adapter_len": 6}, "learning_rate": 2e-2},
    "cartridge": {"config": {"num_virtual_tokens": 6, "calibration_examples": 4}, "learning_rate": 2e-2},
    "cpt": {"config": {"num_virtual_tokens": 2, "calibration_examples": 8}, "learning_rate": 2e-2},
    "multitask_prompt_tuning": {"config": {"num_virtual_tokens": 6}, "learning_rate": 5e-2},
    "p_tuning": {"config": {"num_virtual_tokens": 6, "encoder_hidden_size": 32}},
    "p_tuning_v2": {"config": {"num_virtual_tokens": 6}, "learning_rate": 5e-2},
    "prefix_tuning": {"config": {"num_virtual_tokens": 6, "encoder_hidden_size": 32}},
    "shadow": {"config": {"rank": 4}},
}
