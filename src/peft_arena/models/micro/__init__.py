"""The packaged micro model: a Llama of about a million weights that knows the micro retention tasks.

It is small enough for a laptop and for tests, and loads without a network::

    AutoModelForCausalLM.from_pretrained(weights_dir())

``python -m peft_arena.models.micro.build --out DIR`` makes it again.
"""

from __future__ import annotations

from pathlib import Path


def weights_dir() -> Path:
    """Return the folder of the packaged weights, configuration, tokenizer and build log."""
    return Path(__file__).parent / "weights"
