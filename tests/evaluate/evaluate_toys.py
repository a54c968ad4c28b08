"""A small random Llama, a small tokenizer, and toy tasks."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_arena.core.specs import EvalSpec, TaskSpec
from peft_arena.tasks.base import (
    ACCURACY,
    CHOICE_METRICS,
    TEXT_METRICS,
    Generation,
    Item,
    Kind,
    Message,
    Metric,
    Prompt,
    Role,
    Score,
    Split,
    Task,
    TaskCard,
)

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<pad>", "<|im_end|>", "<s>", "<|im_start|>"]


def byte_tokenizer(begin: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a few merges, so that joining texts can change their tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "a"), ("i", "n"), ("a", "n"), ("Ġ", "the")]
    words = [*SPECIAL, *alphabet, *("".join(pair) for pair in merges)]
    core = Tokenizer(models.BPE(vocab={word: place for place, word in enumerate(words)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    if begin:
        tokens = [("<s>", SPECIAL.index("<s>"))]
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=tokens)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        bos_token="<s>" if begin else None,
        additional_special_tokens=["<|im_start|>"],
        chat_template=TEMPLATE,
        name_or_path="toy",
    )


def small_llama(tokenizer: PreTrainedTokenizerFast, seed: int = 0, context: int = 128) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).eval()


def card(name: str, kind: Kind, metrics: tuple[Metric, ...]) -> TaskCard:
    return TaskCard(
        name=name, title=name, version=1, role=Role.RETENTION, kind=kind, metrics=metrics, chance=None, source="here",
        revision="1", licence="none", citation="none", description="toy",
    )  # fmt: skip


WORDS = ["the", "cat", "in", "an", "ant", "ran", "then", "that", "hat", "and", "a", "tin", "hand"]


def sentence(rng: random.Random, least: int, most: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(least, most)))


class Toy(Task):
    """Twenty items of different lengths."""

    count = 20

    def items(self, split: Split) -> Sequence[Item]:
        rng = random.Random(7)
        return [self.make(rng, number) for number in range(self.count)] if split == "test" else []

    def make(self, rng: random.Random, number: int) -> Item:
        return Item(f"{number} {sentence(rng, 1, 9)}", answer=f" {sentence(rng, 1, 2)}")

    def prompt(self, item: Item) -> Prompt:
        return item.question


class Write(Toy):
    card = card("write", Kind.GENERATE, (ACCURACY,))
    generation = Generation(max_new_tokens=12, stop=("\n", "an"))

    def score(self, item: Item, completion: str) -> Score:
        return Score(float(completion == item.answer), extracted=completion)


class Chat(Write):
    card = card("chat", Kind.GENERATE, (ACCURACY,))

    def prompt(self, item: Item) -> Prompt:
        return (Message("user", item.question),)


class Choose(Toy):
    card = card("choose", Kind.CHOICE, CHOICE_METRICS)

    def make(self, rng: random.Random, number: int) -> Item:
        options = tuple(sentence(rng, 1, 3) for _ in range(3))
        return Item(f"{number} {sentence(rng, 1, 9)} a", choices=options, gold=number % 3)


class Text(Toy):
    card = card("text", Kind.TEXT, TEXT_METRICS)


class Broken(Write):
    """Scoring fails for one item and making the prompt for another."""

    card = card("broken", Kind.GENERATE, (ACCURACY,))

    def prompt(self, item: Item) -> Prompt:
        if item.question.startswith("3 "):
            raise KeyError("no prompt")
        return item.question

    def score(self, item: Item, completion: str) -> Score:
        if item.question.startswith("5 "):
            raise ZeroDivisionError("oops")
        return Score(1.0)


class Long(Write):
    """The last item does not fit the context with its answer."""

    card = card("long", Kind.GENERATE, (ACCURACY,))
    count = 4

    def make(self, rng: random.Random, number: int) -> Item:
        # 128 positions: 116 + 12 fits exactly, 117 + 12 does not
        return Item("q" * (116 if number < 3 else 117), answer=str(number), data={"n": number})


class Empty(Write):
    card = card("empty", Kind.GENERATE, (ACCURACY,))
    count = 0


TASKS: dict[str, type[Task]] = {kind.card.name: kind for kind in (Write, Chat, Choose, Text, Broken, Long, Empty)}


def make(name: str, config: Mapping[str, Any]) -> Task:
    return TASKS[name]()


def spec(name: str, items: int | None = None, **config: Any) -> EvalSpec:
    revision = "" if name not in TASKS else TASKS[name].card.revision
    return EvalSpec(task=TaskSpec(name=name, revision=revision, config=config), items=items)
