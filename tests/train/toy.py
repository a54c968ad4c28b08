"""A tiny random Llama, its tokenizer, a toy task and a toy method for the training tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_arena.core.specs import MethodSpec, ModelSpec, RunSpec, Schedule, TaskSpec, TrainSpec
from peft_arena.methods.base import Attached
from peft_arena.models.load import Loaded
from peft_arena.store.store import RunDirectory, Store
from peft_arena.tasks.base import ACCURACY, Item, Kind, Prompt, Role, Split, Task, TaskCard

WORDS = [f"w{number}" for number in range(60)]
CONTEXT = 96


class ToyTask(Task):
    """Repeat the last words of a sentence; prompts and answers of many lengths."""

    card = TaskCard(
        name="toy",
        title="Toy",
        version=1,
        role=Role.TARGET,
        kind=Kind.GENERATE,
        metrics=(ACCURACY,),
        chance=None,
        source="generator",
        revision="1",
        licence="none",
        citation="none",
        description="Repeat the last words.",
    )

    def items(self, split: Split) -> Sequence[Item]:
        """Return 37 training or 11 other items."""
        count, shift = (37, 0) if split == "train" else (11, 1000)
        found = []
        for number in range(shift, shift + count):
            words = [WORDS[(number * 7 + place * (number % 5 + 1)) % len(WORDS)] for place in range(3 + number % 17)]
            found.append(Item(question=" ".join(words), answer=" ".join(words[-1 - number % 6 :])))
        return found

    def prompt(self, item: Item) -> Prompt:
        """Return the words and a colon."""
        return f"{item.question} :"


class ToyAttached(Attached):
    """Trains a low-rank change of the output layer and every norm; dropout before it, so that seeds matter."""

    def __init__(self, model: Any, rate: float = 0.1, seed: int = 0) -> None:
        """Attach to a model."""
        import torch

        self.model = model
        model.requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        for name, module in list(model.named_modules()):
            if name.endswith(("q_proj", "down_proj")):
                parent = model.get_submodule(name.rpartition(".")[0])
                setattr(parent, name.rpartition(".")[2], _LowRank(module, rate, generator))
            if name.endswith("layernorm"):
                module.weight.data = module.weight.data.float()
                module.weight.requires_grad_(True)

    def save(self, directory: Path) -> None:
        """Write the trained tensors, and draw random numbers and change modes, as a careless method might."""
        import torch
        from safetensors.torch import save_file

        torch.rand(3)
        self.model.eval()
        save_file({name: tensor.contiguous() for name, tensor in self.state().items()}, directory / "toy.safetensors")


def _LowRank(module: Any, rate: float, generator: Any) -> Any:  # noqa: N802
    import torch
    from torch import nn

    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = module
            self.dropout = nn.Dropout(rate)
            self.down = nn.Parameter(torch.randn(4, module.in_features, generator=generator) / 8)
            self.up = nn.Parameter(torch.zeros(module.out_features, 4))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            low = nn.functional.linear(self.dropout(inputs.to(self.down.dtype)), self.down)
            return self.base(inputs) + nn.functional.linear(low, self.up)

    return LowRank()


def build_model(directory: Path) -> None:
    """Write a random Llama of 60 thousand weights with a word tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<end>", "<unk>", ":", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>", pad_token="<end>")
    fast.save_pretrained(directory)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            initializer_range=0.15,
            eos_token_id=0,
            bos_token_id=None,
            pad_token_id=0,
        )
        LlamaForCausalLM(config).save_pretrained(directory)


def load_model(directory: Path, dtype: str = "float32") -> Loaded:
    """Load the model of :func:`build_model`."""
    from peft_arena.models.load import load

    return load(ModelSpec(name=str(directory), dtype=dtype))  # type: ignore[arg-type]


def run_spec(directory: Path, seed: int = 0, dtype: str = "float32", **changes: Any) -> RunSpec:
    """Return the spec of a short toy run."""
    settings: dict[str, Any] = {
        "task": TaskSpec(name="toy", revision="1"),
        "schedule": Schedule(steps=9),
        "batch_size": 4,
        "learning_rate": 1e-2,
        "max_length": 64,
        "save_points": (0.5, 1.0),
        "validation_items": 6,
        "log_every": 2,
        "validate_every": 0.5,
    }
    return RunSpec(
        model=ModelSpec(name=str(directory), dtype=dtype),  # type: ignore[arg-type]
        method=MethodSpec(name="toy"),
        train=TrainSpec(**(settings | changes)),
        seed=seed,
    )


def open_run(root: Path, spec: RunSpec) -> RunDirectory:
    """Create the run's directory."""
    run = Store(root).run(spec)
    run.create()
    return run


def weights(run: RunDirectory, step: int) -> bytes:
    """Return the bytes of a checkpoint's weights."""
    return (run.checkpoint(step) / "toy.safetensors").read_bytes()


def log_of(run: RunDirectory) -> str:
    """Return the run's log as text."""
    record = run.training()
    assert record is not None
    return json.dumps([entry.model_dump() for entry in record.log])
