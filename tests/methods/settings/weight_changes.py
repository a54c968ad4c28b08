"""Settings of the methods that add a change to each weight."""

from __future__ import annotations

from typing import Any

SETTINGS: dict[str, dict[str, Any]] = {
    "c3a": {"config": {"block_size": 8}, "awkward": {"block_size": 4}, "learning_rate": 5e-2},
    "delora": {},
    "fourierft": {"config": {"coefficients": 100, "scaling": 60.0}, "learning_rate": 2e-2},
    "gralora": {},
    "hira": {"config": {"rank": 8}, "learning_rate": 1e-2},
    "loha": {"learning_rate": 1e-2},
    "lokr": {"config": {"rank": 3}, "learning_rate": 1e-2},
    "pvera": {"config": {"rank": 8}, "learning_rate": 3e-2},
    "randlora": {"config": {"rank": 8, "alpha": 160.0}},
    "shira": {"config": {"rank": 4}, "learning_rate": 2e-2},
    "tinylora": {"config": {"vector_length": 16}, "learning_rate": 5e-2},
    "unilora": {"config": {"theta_length": 1000}, "learning_rate": 5e-2},
    "vblora": {
        "config": {"vectors": 32, "vector_length": 16},
        "awkward": {"vectors": 32, "vector_length": 4},
        "learning_rate": 5e-2,
    },
    "waveft": {"config": {"coefficients": 100}, "learning_rate": 2e-2},
}
