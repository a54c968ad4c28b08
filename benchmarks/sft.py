"""Time peft-arena's supervised fine-tuning against a plain loop, on SmolLM2-135M with LoRA in bfloat16.

The plain loop (ours, written for this comparison): same model, method object, optimizer, precision, number of steps
and batch size; batches in random order, padded on the right with a padding mask, logits at every position. Each side
runs in its own process, one after the other, with the same threads. Compared is processor time per real token, because
the two sides see the examples in another order. ``max_rel_diff`` is the relative difference of the mean training loss
over the last half of the steps; the held-out losses of both, on the same items, are given too.

    python benchmarks/sft.py [--quick] [--steps N] [--task NAME]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft_arena.models.render import Encoded
    from peft_arena.tasks.base import Item

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
BATCH = 8
RATE = 1e-3
VALIDATION = 32
METHOD = {"rank": 16, "alpha": 32.0}


def main() -> None:
    """Run both sides for each task and print one JSON line per task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps, one task: under a minute")
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps of each side")
    parser.add_argument("--task", action="append", default=None, help="task name; may be given several times")
    parser.add_argument("--side", choices=("ours", "reference"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    steps = options.steps or (4 if options.quick else 60)
    tasks = options.task or (["asdiv"] if options.quick else ["asdiv", "medmcqa"])
    if options.side is not None:
        side = _ours if options.side == "ours" else _reference
        sys.stdout.write(json.dumps({**side(tasks[0], steps), "peak_bytes": _peak_bytes()}) + "\n")
        return
    for task in tasks:
        reference, ours = (_measure(side, task, steps) for side in ("reference", "ours"))
        sys.stdout.write(json.dumps(_compare(f"sft-lora-bf16-{task}", ours, reference)) + "\n")
        sys.stdout.flush()


def _measure(side: str, task: str, steps: int) -> dict[str, Any]:
    """Run one side in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--task", task, "--steps", str(steps)]
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **os.environ}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _compare(name: str, ours: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Put both sides on one line; the ratio is processor time per real token, reference over ours."""
    per_token = {side["side"]: side["cpu_s"] / side["tokens"] for side in (ours, reference)}
    return {
        "name": name,
        "ours_s": ours["wall_s"],
        "reference_s": reference["wall_s"],
        "ratio": per_token["reference"] / per_token["ours"],
        "wall_ratio": (reference["wall_s"] / reference["tokens"]) / (ours["wall_s"] / ours["tokens"]),
        "ours_peak_bytes": ours["peak_bytes"],
        "reference_peak_bytes": reference["peak_bytes"],
        "max_rel_diff": abs(ours["loss"] - reference["loss"]) / reference["loss"],
        **{f"ours_{key}": ours[key] for key in SHOWN},
        **{f"reference_{key}": reference[key] for key in SHOWN},
    }


SHOWN = ("cpu_s", "tokens", "padded_tokens", "tokens_per_s", "loss", "held_out_loss")


def _setting(task_name: str, steps: int) -> tuple[Any, Any, Any, Any]:
    """Return the run's spec, the loaded model, the attached method and the task."""
    from peft_arena.core.specs import MethodSpec, ModelSpec, RunSpec, Schedule, TaskSpec, TrainSpec
    from peft_arena.methods.registry import make_method
    from peft_arena.models.load import load
    from peft_arena.tasks.registry import make_task

    task = make_task(task_name)
    spec = RunSpec(
        model=ModelSpec(name=MODEL, dtype="bfloat16"),
        method=MethodSpec(name="lora", config=METHOD),
        train=TrainSpec(
            task=TaskSpec(name=task_name, version=task.card.version),
            schedule=Schedule(steps=steps),
            batch_size=BATCH,
            group_by_length=True,
            learning_rate=RATE,
            log_every=1,
            validation_items=VALIDATION,
            validate_every=1.0,
        ),
    )
    loaded = load(spec.model)
    attached = make_method(spec.method.name, spec.method.config).attach(loaded.model, seed=0)
    return spec, loaded, attached, task


def _ours(task_name: str, steps: int) -> dict[str, Any]:
    from peft_arena.store.store import Store
    from peft_arena.train.sft import train_sft

    spec, loaded, attached, task = _setting(task_name, steps)
    with tempfile.TemporaryDirectory() as folder:
        run = Store(Path(folder)).run(spec)
        run.create()
        outcome = train_sft(run, loaded, attached, task, progress=False)
    record = outcome.record
    losses = [entry.loss for entry in record.log if entry.loss is not None]
    return {
        "side": "ours",
        "wall_s": outcome.seconds,
        "cpu_s": outcome.cpu_seconds,
        "tokens": record.tokens,
        "padded_tokens": record.padded_tokens,
        "tokens_per_s": record.tokens / outcome.cpu_seconds,
        "loss": _last_half(losses),
        "held_out_loss": record.log[-1].validation_loss,
    }


def _reference(task_name: str, steps: int) -> dict[str, Any]:
    import torch
    from torch.nn import functional

    from peft_arena.models.render import encode_example
    from peft_arena.train.schedule import rate_factor

    spec, loaded, attached, task = _setting(task_name, steps)
    model, train = attached.model, spec.train

    def encode(items: Sequence[Item]) -> list[Encoded]:
        return [encode_example(loaded.tokenizer, task.prompt(item), task.target(item)) for item in items]

    def nats(batch: list[Any]) -> tuple[Any, int, int]:
        width = max(len(example.ids) for example in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, -100)
        for row, example in enumerate(batch):
            size = len(example.ids)
            ids[row, :size] = torch.tensor(example.ids)
            mask[row, :size] = 1
            labels[row, example.prompt_length : size] = ids[row, example.prompt_length : size]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        wanted = labels[:, 1:].flatten()
        total = functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), wanted, reduction="sum")
        return total, int((wanted != -100).sum()), int(mask.sum())

    examples = [example for example in encode(task.items("train")) if len(example.ids) <= train.max_length]
    held_out = encode(task.items("validation")[:VALIDATION])
    order = list(range(len(examples)))
    random.Random(0).shuffle(order)
    optimizer = torch.optim.AdamW(attached.parameter_groups(train.learning_rate, train.weight_decay))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(train, step, steps))
    losses, tokens, padded = [], 0, 0
    model.train()
    start, start_cpu = time.perf_counter(), time.process_time()
    for step in range(steps):
        batch = [examples[order[(step * BATCH + place) % len(order)]] for place in range(BATCH)]
        total, labels, real = nats(batch)
        loss = total / labels
        loss.backward()
        torch.nn.utils.clip_grad_norm_(attached.trained().values(), train.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        tokens += real
        padded += BATCH * max(len(example.ids) for example in batch)
    wall, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    model.eval()
    with torch.no_grad():
        parts = [nats(held_out[first : first + BATCH]) for first in range(0, len(held_out), BATCH)]
    return {
        "side": "reference",
        "wall_s": wall,
        "cpu_s": cpu,
        "tokens": tokens,
        "padded_tokens": padded,
        "tokens_per_s": tokens / cpu,
        "loss": _last_half(losses),
        "held_out_loss": sum(float(part[0]) for part in parts) / sum(part[1] for part in parts),
    }


def _last_half(losses: list[float]) -> float:
    part = losses[len(losses) // 2 :]
    return sum(part) / len(part)


def _peak_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
