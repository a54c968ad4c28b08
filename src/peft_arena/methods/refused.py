"""Methods that are known and not offered, each with the reason."""

from __future__ import annotations

from collections.abc import Mapping

REFUSED: Mapping[str, str] = {
    "loftq": "its start is computed by peft only with bitsandbytes on a CUDA device",
    "lora_layer_replication": "it repeats layers, so the tuned model is not of the pretrained architecture",
}
"""Name of a method to why it is not offered."""
