"""Settings of the LoRA variants by structure or optimizer, and of the rank-adaptive methods."""

from __future__ import annotations

from typing import Any

SEEN = (33, 90, 105, 179, 184)
"""Tokens that occur both in the suite's training batch and in its evaluation batch."""

INVOKED = ((86, 115), (125, 102), (117, 69), (95, 114), (90, 166), (165, 194))
"""One sequence of tokens of each row of those batches."""

SETTINGS: dict[str, dict[str, Any]] = {
    "adalora": {"config": {"initial_rank": 20, "target_rank": 3}, "learning_rate": 2e-2},
    "adamss": {"learning_rate": 2e-2},
    "adamss_asa": {"config": {"warmup": 0.4, "until": 1.0, "interval": 1}, "learning_rate": 2e-2},
    "alora": {"config": {"invocation": INVOKED}},
    "bdlora": {},
    "lora_fa": {},
    "lora_riemannian": {},
    "monteclora": {"config": {"noise": 1e-2, "kl_weight": 1e-3}},
    "lora_tokens": {"config": {"tokens": SEEN}},
    "trainable_tokens": {"config": {"tokens": SEEN}, "learning_rate": 2e-2},
    "velora": {"config": {"groups": 8}},
}
