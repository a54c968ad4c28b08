"""Settings of the orthogonal, selective and weight-dependent methods."""

from __future__ import annotations

from typing import Any

SETTINGS: dict[str, dict[str, Any]] = {
    "beft": {"learning_rate": 2e-2},
    "boft": {},
    "coft": {"config": {"block_size": 8}, "awkward": {"block_size": 4}},
    "deft": {},
    "deft_para": {},
    "frod": {"learning_rate": 5e-3},
    "glora": {},
    "hra": {},
    "miss_bat": {"awkward": {"rank": 4}},
    "miss_mini": {"awkward": {"mini_rank": 4}},
    "osf": {"learning_rate": 2e-3},
    "peanut": {},
    "psoft": {"config": {"rank": 12}},
    "road": {"learning_rate": 2e-2, "config": {"group_size": 16}, "awkward": {"group_size": 4}},
    "supertuning": {"learning_rate": 2e-2},
    "supra": {},
}
