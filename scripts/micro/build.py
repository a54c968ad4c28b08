"""Train the packaged micro model from nothing: ``python -m scripts.micro.build --out DIR``.

The model is trained on the train items of the micro retention tasks, with the loss on the answers and, lightly, on the
questions. The same options on the same machine and library versions give the same weights; the folder also gets
``build_log.jsonl`` with the settings, the loss and the validation accuracies over the steps.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from peft_arena.core.errors import UserError
from peft_arena.core.ids import seed_for
from peft_arena.core.registry import Registry
from peft_arena.tasks.base import Role
from peft_arena.tasks.micro import MICRO_TASKS
from peft_arena.tasks.micro.base import MicroTask
from scripts.micro.answers import accuracy, prompt_text
from scripts.micro.tokenizer import END, count_words, make_tokenizer

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SHARES = {"micro-compare": 1.5, "micro-facts": 1.5}
"""Relative share of a task in a batch where it is not 1."""


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """Everything that decides the weights."""

    seed: int = 0
    steps: int = 4500
    batch_items: int = 64
    learning_rate: float = 2e-3
    """Peak; reached after the warm-up, then a cosine down to a hundredth."""
    warmup_steps: int = 100
    weight_decay: float = 0.05
    question_weight: float = 0.05
    """Weight of a question's token in the loss; an answer's token weighs 1."""
    bfloat16: bool = False
    """Compute in bfloat16 (the weights being trained stay float32)."""
    vocabulary: int = 832
    """The most tokens of the tokenizer."""
    hidden: int = 128
    layers: int = 5
    heads: int = 4
    kv_heads: int = 2
    inner: int = 384
    train_items: int | None = None
    """The most train items of a task that are used; all where None."""
    evaluate_every: int = 500
    evaluate_items: int = 64
    """Validation items of each task for the log."""


class Example(NamedTuple):
    """Token ids of a question with its answer, and the number of tokens of the question."""

    ids: list[int]
    question_tokens: int


def load_tasks(role: Role) -> dict[str, MicroTask]:
    """Return the micro tasks of a role, by name."""
    registry: Registry[type[MicroTask]] = Registry("micro task", MICRO_TASKS)
    classes = {name: registry.get(name) for name in registry.names()}
    return {name: cls() for name, cls in classes.items() if cls.card.role is role}


def make_model(settings: BuildSettings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a randomly initialised Llama with tied embeddings and grouped-query attention."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed_for(settings.seed, "micro", "weights"))
    tokens = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.inner,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        **tokens,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=False, **tokens)
    return model


def encode(task: MicroTask, tokenizer: PreTrainedTokenizerFast, count: int | None = None) -> list[Example]:
    """Return the first ``count`` train items of a task (None: all) as token ids, each ended by the end of the turn."""
    items = task.items("train")[:count]
    questions = tokenizer([prompt_text(task, item, tokenizer) for item in items], add_special_tokens=False)["input_ids"]
    answers = tokenizer([task.target(item) + END for item in items], add_special_tokens=False)["input_ids"]
    return [Example(question + answer, len(question)) for question, answer in zip(questions, answers, strict=True)]


def collate(examples: Sequence[Example], pad: int, question_weight: float) -> tuple[Tensor, Tensor]:
    """Return token ids, shape (batch, tokens), padded on the right, and the loss weight of each token."""
    import torch

    width = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), width), pad)
    weights = torch.zeros(len(examples), width)
    for row, (tokens, start) in enumerate(examples):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        weights[row, :start] = question_weight
        weights[row, start : len(tokens)] = 1.0
    return ids, weights


def learning_rate_at(step: int, settings: BuildSettings) -> float:
    """Return the learning rate of a step, counted from 0: linear warm-up, then a cosine to a hundredth of the peak."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def train_step(model: LlamaForCausalLM, optimizer: Optimizer, batch: tuple[Tensor, Tensor], bfloat16: bool) -> float:
    """Take one step on a batch and return its weighted mean loss, in nats a token."""
    import torch

    ids, weights = batch
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    weight = weights[:, 1:].flatten()
    loss = (losses * weight).sum() / weight.sum()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tasks: dict[str, MicroTask],
    settings: BuildSettings,
    log: Callable[[dict[str, Any]], None],
) -> None:
    """Train the model in place and log its loss and validation accuracies."""
    import torch
    from rich.console import Console
    from rich.progress import track

    pools = {name: encode(task, tokenizer, settings.train_items) for name, task in tasks.items()}
    shares = [SHARES.get(name, 1.0) for name in pools]
    rng = random.Random(seed_for(settings.seed, "micro", "batches"))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=settings.weight_decay, fused=True
    )
    started, recent = time.monotonic(), []
    model.train()
    for step in track(range(settings.steps), "training", console=Console(stderr=True)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, settings)
        names = rng.choices(list(pools), weights=shares, k=settings.batch_items)
        examples = [rng.choice(pools[name]) for name in names]
        batch = collate(examples, cast(int, tokenizer.pad_token_id), settings.question_weight)
        recent.append(train_step(model, optimizer, batch, settings.bfloat16))
        last = step + 1 == settings.steps
        if last or (step + 1) % settings.evaluate_every == 0:
            scores = evaluate(model, tokenizer, tasks, settings.evaluate_items)
            seconds = round(time.monotonic() - started, 1)
            log({"step": step + 1, "loss": sum(recent) / len(recent), "seconds": seconds, "accuracy": scores})
            recent = []


def evaluate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tasks: dict[str, MicroTask], count: int
) -> dict[str, float | None]:
    """Return the accuracy on the first validation items of each task."""
    return {name: accuracy(model, tokenizer, task, task.items("validation")[:count]) for name, task in tasks.items()}


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write weights, configuration and tokenizer.

    Weights are stored in bfloat16, to be small, while the configuration says float32, so that the model is loaded for
    training in float32 unless another type is asked for.
    """
    import torch

    cast(Any, model).to(torch.bfloat16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # written as readable by its owner only, which would not do in a package
    tokenizer.save_pretrained(out)
    path = out / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def build(out: Path, settings: BuildSettings) -> None:
    """Train the micro model and write it to a folder, which must be new or empty.

    Raises:
        UserError: the folder has files in it.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; give a new folder")
    out.mkdir(parents=True, exist_ok=True)
    import torch
    import transformers

    tasks = load_tasks(Role.RETENTION)
    tokenizer = make_tokenizer(
        count_words(item for task in tasks.values() for item in task.items("train")), settings.vocabulary
    )
    model = make_model(settings, tokenizer)

    def log(record: dict[str, Any]) -> None:
        with (out / "build_log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, sort_keys=True) + "\n")

    log(
        {
            "settings": asdict(settings),
            "shares": SHARES,
            "parameters": model.num_parameters(),
            "threads": torch.get_num_threads(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
    )
    train(model, tokenizer, tasks, settings, log)
    save(model, tokenizer, out)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, build the model and return the exit code."""
    usual = BuildSettings()
    parser = argparse.ArgumentParser(description="Train the packaged micro model from nothing.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; new or empty")
    parser.add_argument("--seed", type=int, default=usual.seed, help="seed of weights and batches (default: 0)")
    parser.add_argument("--steps", type=int, default=usual.steps, help=f"training steps (default: {usual.steps})")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    given = parser.parse_args(arguments)
    if min(given.steps, given.threads) < 1:
        parser.error("--steps and --threads must be at least 1")
    import torch

    torch.set_num_threads(given.threads)
    try:
        build(given.out, BuildSettings(seed=given.seed, steps=given.steps))
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
