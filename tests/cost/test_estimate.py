"""Estimates of cost: formulas against torch's counter, against what is kept and allocated, against published runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peft_arena.core.errors import UserError
from peft_arena.cost import estimate
from peft_arena.cost.estimate import (
    GPUS,
    STATE_BYTES,
    Subject,
    decoding_seconds,
    gpu_named,
    optimizer_seconds,
    sequence_flops,
    training_flops,
    training_memory,
)
from peft_arena.methods.base import Capability
from peft_arena.methods.registry import make_method
from peft_arena.models.architecture import architecture_of
from peft_arena.models.known import known_models

PUBLISHED = Path(__file__).parents[3] / "shared/data/hf-method-comparison/MetaMathQA/results"
LENGTH = 96
SMALL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 832,
    "tie_word_embeddings": True,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
}
SHAPES = architecture_of(SMALL)
CLOSE = {
    "full": 0.02,
    "lora": 0.02,
    "dora": 0.05,
    "adalora": 0.05,
    "ia3": 0.03,
    "bitfit": 0.05,
    "miss": 0.05,
    "oft": 0.15,
    "ln_tuning": 0.03,
    "prompt_tuning": 0.05,
    "hira": 0.5,
    "adapter_houlsby": 0.06,
}
"""Method to how far the formula may be off; the wide ones do work that their trained parameters do not show."""


def attached(method: str, dtype: str = "float32") -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SMALL), dtype=getattr(torch, dtype))
    return make_method(method).attach(model.eval(), seed=0)


def subject(method: str, found: Any, dtype: Any = "float32") -> Subject:
    made = make_method(method)
    prompted = Capability.VIRTUAL_TOKENS in made.card.capabilities
    virtual = int(made.config.num_virtual_tokens) if prompted else 0  # type: ignore[attr-defined]  # of such methods
    trained = sum(p.numel() for p in found.trained().values())
    return Subject(shapes=SHAPES, trained=trained, virtual=virtual, dtype=dtype)


@pytest.mark.parametrize("method", CLOSE)
def test_training_flops_agree_with_the_counter(method: str) -> None:
    from peft_arena.cost.flops import training_flops_per_token

    found = attached(method)
    counted = training_flops_per_token(found.model, batch=2, length=LENGTH) * LENGTH
    assert training_flops(subject(method, found), LENGTH) == pytest.approx(counted, rel=CLOSE[method])


@pytest.mark.parametrize("method", ["full", "lora", "prompt_tuning"])
def test_forward_flops_agree_with_the_counter(method: str) -> None:
    from peft_arena.cost.flops import forward_flops

    found = attached(method)
    assert sequence_flops(subject(method, found), LENGTH) == pytest.approx(forward_flops(found.model, LENGTH), rel=0.03)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_recomputed_activations_cost_what_the_counter_says(method: str) -> None:
    from peft_arena.cost.flops import training_flops_per_token
    from peft_arena.train.recompute import activations_recomputed

    found = attached(method)
    with activations_recomputed(found.model):
        counted = training_flops_per_token(found.model, batch=2, length=LENGTH) * LENGTH
    assert training_flops(subject(method, found), LENGTH, recompute=True) == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("method", ["full", "lora", "ia3"])
def test_states_of_trained_parameters_are_exact(method: str) -> None:
    """Weight, gradient and moments of a step that is done, to the byte (the optimizer's step counts left out)."""
    import torch

    found = attached(method)
    optimizer = found.optimizer(1e-3, 0.0)
    found.model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    trained = list(found.trained().values())
    assert all(p.grad is not None for p in trained)
    moments = [t for state in optimizer.state.values() for t in state.values() if t.numel() > 1 or t.ndim]
    held = sum(t.nbytes for t in (*trained, *(p.grad for p in trained if p.grad is not None), *moments))
    memory = training_memory(subject(method, found), 1, 8)
    assert memory.trained == held == STATE_BYTES * sum(p.numel() for p in trained)
    frozen = sum(p.nbytes for p in found.model.parameters() if not p.requires_grad)
    assert memory.weights == frozen if method != "full" else memory.weights == frozen == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["lora", "full", "ia3", "bitfit", "oft", "prompt_tuning"])
def test_activations_are_within_a_factor_of_two(method: str, dtype: str) -> None:
    found = attached(method, dtype)
    kept = saved_bytes(found, dtype)
    memory = training_memory(subject(method, found, dtype), 2, LENGTH)
    copies = sum(p.numel() for p in found.trained().values()) * (2 if dtype == "bfloat16" else 0)
    labelled = 2 * LENGTH * SHAPES.vocabulary * 4  # the softmax, kept in float32
    assert 0.5 < (memory.activations + copies + labelled) / kept < 2


def test_recomputing_keeps_the_inputs_of_blocks() -> None:
    """What is kept are those inputs, and outside the blocks the last norm's input and the softmax."""
    from peft_arena.train.recompute import activations_recomputed

    found = attached("lora")
    tokens = 2 * LENGTH
    stream = 4 * tokens * SHAPES.hidden * SHAPES.layers
    with activations_recomputed(found.model):
        kept = saved_bytes(found, "float32")
    assert kept == pytest.approx(stream + 4 * tokens * (SHAPES.hidden + SHAPES.vocabulary), rel=0.02)
    block = training_memory(subject("lora", found), 2, LENGTH).activations / SHAPES.layers
    assert training_memory(subject("lora", found), 2, LENGTH, recompute=True).activations == stream + block


def saved_bytes(found: Any, dtype: str) -> int:
    """Return the bytes that a forward pass keeps for its backward pass, parameters left out, each storage once."""
    import torch
    from torch.nn import functional

    model = found.model.train()
    ids = torch.randint(0, SHAPES.vocabulary, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            seen[tensor.untyped_storage().data_ptr()] = tensor  # kept, so that no other takes its place
        return tensor

    same: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor  # noqa: E731
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, same),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"),
    ):
        logits = model(input_ids=ids, use_cache=False).logits[:, -LENGTH:]
        functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten())
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


def published() -> list[dict[str, Any]]:
    """Return the result files of the PEFT library's comparison, all on one L40S, that finished."""
    found = [json.loads(file.read_text()) for file in sorted(PUBLISHED.glob("*.json"))]
    return [record for record in found if record["train_info"]["status"] == "success"]


def test_published_runs() -> None:
    """Time and memory of the published runs; which methods are slower than twice the estimate is in the docs."""
    records = published()
    if not records:
        pytest.skip("the published result files are not on this machine")
    gpu = GPUS["L40S"]
    hours, memories, names = [], [], []
    for record in records:
        info, config = record["train_info"], record["run_info"]["train_config"]
        shapes = architecture_of(known_models()[config["model_id"]].config)
        timed = [row for row in info["metrics"] if "tokens / sec" in row]
        seconds = sum(row["train time"] for row in timed)
        tokens = sum(row["train time"] * row["tokens / sec"] for row in timed)
        length = tokens / config["max_steps"] / config["batch_size"]
        one = Subject(shapes=shapes, trained=info["num_trainable_params"])
        flops = training_flops(one, length) * config["max_steps"] * config["batch_size"]
        guess = flops / (gpu.bfloat16 * estimate.UTILISATION) + config["max_steps"] * optimizer_seconds(one, gpu)
        hours.append(guess / seconds)
        peak = training_memory(one, config["batch_size"], config["max_seq_length"]).total
        memories.append(peak / info["accelerator_memory_max"])
        names.append(record["run_info"]["experiment_name"])
    assert len(records) >= 50
    assert all(0.5 < ratio < 2 for ratio in memories), dict(zip(names, memories, strict=True))
    near = [name for name, ratio in zip(names, hours, strict=True) if 0.5 < ratio < 2]
    far = {name.split("/")[0] for name in names} - {name.split("/")[0] for name in near}
    assert far <= {"adamss", "boft", "frod", "osf", "waveft"}
    assert 0.9 < hours[names.index("lora/llama-3.2-3B-rank32")] < 1.2


def test_a_published_evaluation_takes_as_long_as_decoding_is_estimated() -> None:
    """50 rows to 300 tokens, 12.2 s on an L40S (lora rank 32 of the PEFT library's comparison)."""
    shapes = architecture_of(known_models()["meta-llama/Llama-3.2-3B"].config)
    one = Subject(shapes=shapes, trained=9_175_040)
    assert 0.7 < decoding_seconds(one, GPUS["L40S"], 50, 100, 300) / 12.2 < 1.2


def test_decoding_reads_weights_and_cache() -> None:
    """A 7B model on a GPU without overheads reads its weights once a token; a long cache adds to it."""
    shapes = architecture_of(known_models()["Qwen/Qwen2.5-7B"].config)
    one, gpu = Subject(shapes=shapes, trained=0), GPUS["A100-80GB"]
    weights = shapes.matrix_parameters * 2 / (gpu.bandwidth * estimate.BANDWIDTH_SHARE)
    assert decoding_seconds(one, gpu, 1, 0, 1, layer_seconds=0) == pytest.approx(weights, rel=0.01)
    assert estimate.cache_bytes(shapes, "bfloat16") == 2 * 28 * 4 * 128 * 2
    long = decoding_seconds(one, gpu, 16, 32_000, 1, layer_seconds=0)
    assert long == pytest.approx(weights * (1 + 16 * 32_000 * 57_344 / (shapes.matrix_parameters * 2)), rel=0.01)


def test_full_fine_tuning_of_7b_needs_more_than_one_gpu() -> None:
    shapes = architecture_of(known_models()["Qwen/Qwen2.5-7B"].config)
    whole = training_memory(Subject(shapes=shapes, trained=shapes.parameters), 1, 1024)
    assert whole.weights == 0 and whole.trained == 18 * shapes.parameters
    assert (
        whole.total > gpu_named("A100-80GB").memory > training_memory(Subject(shapes=shapes, trained=0), 1, 1024).total
    )


def test_an_unknown_gpu_is_one_line() -> None:
    with pytest.raises(UserError, match="unknown GPU 'A100'.*Known: A100-80GB, H100-SXM, L40S"):
        gpu_named("A100")


def test_estimating_imports_no_torch() -> None:
    code = "import sys, peft_arena.cost.estimate, peft_arena.study.study_cost; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
