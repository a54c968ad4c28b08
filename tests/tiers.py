"""Which tests of many of a kind stand for all in the test command; the deep tier tries the others."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from peft_arena.methods.registry import METHODS


def _files(folder: str, names: str) -> list[str]:
    return [f"{folder}/{name}".removeprefix("/") for name in names.split()]


SLOW = {
    *_files("", "test_benchmarks test_numbers"),
    *_files("cli", "test_cli"),
    *_files("commands", "test_geometry test_paths"),
    *_files("evaluate", "test_gold"),
    *_files("export", "test_export_lora"),
    *_files("families", "test_decoding test_matrix"),
    *_files("methods", "test_conformance test_plugins test_prompts test_whole"),
    *_files("models", "test_chat"),
    *_files("report", "test_findings test_geometry test_paths test_report"),
    *_files("study", "test_custom_data test_shipped_studies test_study"),
    *_files("tasks", "test_benchmarks test_custom test_hygiene test_judge test_micro test_registry test_sandbox"),
    *_files("testing", "test_method_suite test_method_suite_more"),
    *_files("train", "test_recompute test_resume test_rl test_rl_edges test_rl_losses test_train test_vllm"),
    *_files("weights", "test_adapter_files test_forms test_merge test_start test_vocabulary"),
    *_files(
        "work", "test_all_methods test_begun_runs test_own_data test_real_model test_run test_sampled test_sources"
    ),
}
"""Files that take more than ten seconds, of one core: ``make quick`` leaves them out."""


def one_of_each_family() -> list[str]:
    """Return a method of each family: LoRA and full fine-tuning, else the first by name that has a rate to train at."""
    found = {METHODS.get(name).card.family: name for name in ("lora", "full")}
    for name in METHODS.own():
        card = METHODS.get(name).card
        if card.learning_rate is not None:
            found.setdefault(card.family, name)
    return sorted(found.values())


def deep_but(names: Iterable[str], chosen: Iterable[str]) -> list[object]:
    """Return parameters for a test, those that are not chosen marked as deep."""
    few = set(chosen)
    return [pytest.param(name, marks=() if name in few else pytest.mark.deep) for name in names]
