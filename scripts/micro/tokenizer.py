"""The micro model's tokenizer: byte-level BPE whose merges make the words of the micro tasks single tokens.

Any text can be written, as every byte is a token. Single letters and digits are never merged with one another, so that
the skills on letters and digits see one token each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from string import ascii_letters
from typing import TYPE_CHECKING

from peft_arena.tasks.base import Item

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD = "<|pad|>"
TURN = "<|im_start|>"
END = "<|im_end|>"

MOST_COUNTED = 100
"""No word counts more often than this, so that rare words become tokens too."""

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}"
    "{%- else %}{{- message['content'] + '<|im_end|>' }}{%- endif %}"
    "{{- '\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
"""ChatML; the generation markers let a trainer take the loss on the assistant's words and the end of its turn."""


def count_words(items: Iterable[Item]) -> dict[str, int]:
    """Count the words of two letters or more in the texts of the items; words in capitals are left out.

    A word keeps the space before it, as byte-level BPE does.
    """
    counts: Counter[str] = Counter()
    for item in items:
        for text in (item.question, item.answer):
            counts.update(f" {word}" for word in _letters_only(text).split() if len(word) > 1 and not word.isupper())
    return dict(sorted(counts.items()))


def make_tokenizer(words: Mapping[str, int], vocabulary: int) -> PreTrainedTokenizerFast:
    """Build the tokenizer: every byte, single letters after a space, and merges that form the words.

    Args:
        words: words that should become one token, each with the space before it, and how often each is seen.
        vocabulary: the most tokens, special ones included.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, TURN, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    frequent = [f" {letter}" for letter in ascii_letters] + ["user", "system", "assistant"]
    weighted = [text for word, count in words.items() for text in (word, word.strip()) * min(count, MOST_COUNTED)]
    core.train_from_iterator([*frequent * MOST_COUNTED, *weighted], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[TURN],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )


def _letters_only(text: str) -> str:
    return "".join(character if character.isalpha() else " " for character in text)
