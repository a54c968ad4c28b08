"""Fixtures: a small random Llama with its tokenizer."""

from __future__ import annotations

import pytest
from evaluate_toys import byte_tokenizer, small_llama
from transformers import PreTrainedTokenizerFast

from peft_arena.core.specs import ModelSpec
from peft_arena.models.load import Loaded


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without a begin token."""
    return byte_tokenizer()


@pytest.fixture
def loaded(tokenizer: PreTrainedTokenizerFast) -> Loaded:
    """A fresh model for each test."""
    return Loaded(spec=ModelSpec(name="toy"), model=small_llama(tokenizer), tokenizer=tokenizer, source="path")
