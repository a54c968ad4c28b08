"""Settings of methods that are ours, of freezing, and of the mixtures of peft."""

from __future__ import annotations

from typing import Any

SETTINGS: dict[str, dict[str, Any]] = {
    "adapter_houlsby": {"config": {"bottleneck": 8}, "learning_rate": 1e-2},
    "adapter_parallel": {"config": {"bottleneck": 8}, "learning_rate": 1e-2},
    "adapter_pfeiffer": {"config": {"bottleneck": 8}, "learning_rate": 1e-2},
    "freeze": {"config": {"blocks": 1}, "learning_rate": 2e-3},
    "lily": {"config": {"rank": 16, "stride": 2}},
    "poly": {"learning_rate": 1e-2},
    "qalora": {},
    "svft": {"config": {"off_diagonals": 4}, "learning_rate": 2e-2},
    "xlora": {"config": {"experts": 2}},
}
