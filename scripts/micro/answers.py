"""Greedy answers and accuracies of a small model on micro tasks, in plain transformers.

The product's own evaluation does this for any model; the build script and the tests use this short version, so that
the packaged weights do not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from peft_arena.tasks.base import Item, Message, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def prompt_text(task: Task, item: Item, tokenizer: PreTrainedTokenizerFast) -> str:
    """Return an item's prompt as text, rendered by the tokenizer's chat template up to the model's turn."""
    turns = cast(tuple[Message, ...], task.prompt(item))
    chat = [{"role": turn.role, "content": turn.content} for turn in turns]
    return cast(str, tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))


def greedy_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], longest: int, batch: int = 64
) -> list[str]:
    """Return the model's greedy continuation of each prompt, without special tokens.

    Args:
        model: a causal language model; it is put in evaluation mode and back.
        tokenizer: its tokenizer, padding on the left.
        prompts: rendered prompts.
        longest: the most tokens an answer may have.
        batch: prompts generated together.
    """
    import torch

    was_training = model.training
    model.eval()
    answers: list[str] = []
    for start in range(0, len(prompts), batch):
        encoded = tokenizer(
            list(prompts[start : start + batch]), return_tensors="pt", padding=True, add_special_tokens=False
        )
        with torch.no_grad():
            output = cast(Any, model).generate(**encoded, max_new_tokens=longest, do_sample=False)
        fresh = output[:, encoded["input_ids"].shape[1] :]
        answers.extend(tokenizer.batch_decode(fresh, skip_special_tokens=True))
    model.train(was_training)
    return answers


def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, task: Task, items: Sequence[Item]
) -> float | None:
    """Return the mean score of the model's greedy answers; None where no item could be scored."""
    prompts = [prompt_text(task, item, tokenizer) for item in items]
    answers = greedy_answers(model, tokenizer, prompts, task.generation.max_new_tokens)
    scores = [task.score(item, answer).value for item, answer in zip(items, answers, strict=True)]
    values = [value for value in scores if value is not None]
    return sum(values) / len(values) if values else None
