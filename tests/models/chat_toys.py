"""Small tokenizers of both families, and chat templates with the habits of real ones."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BEGIN, END, CLOSE, OPEN = "<s>", "</s>", "<|close|>", "<|open|>"
SPECIAL = ["<pad>", "<unk>", BEGIN, END, CLOSE, OPEN, "<think>", "</think>"]
MERGES = [("t", "h"), ("th", "e"), ("i", "n"), ("4", "2"), ("e", "r")]

CHATML = (
    "{% for m in messages %}<|open|>{{ m.role }}\n{{ m.content }}<|close|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|open|>assistant\n{% endif %}"
)
"""Ends a turn with a token that is not the tokenizer's end token, and a line feed."""
BEGUN = "{{ bos_token }}" + CHATML
TWICE = "\n {{ bos_token }}\n{{ bos_token }}" + CHATML
"""White space, and the begin token twice."""
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ '[Q] ' + m.content + ' [/Q]' }}{% endif %}{% endfor %}"
)
"""Writes a space before an answer, and the tokenizer's own end token behind it; as Llama 2."""
TRIMMED = CHATML.replace("m.content }}", "m.content | trim }}")
BARE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""Ends no turn by a token."""
HYBRID = (
    "{% for m in messages %}<|open|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n"
    "{% endif %}{{ m.content }}<|close|>\n{% endfor %}{% if add_generation_prompt %}<|open|>assistant\n"
    "{% if quick is defined and quick %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""Thinks unless it is told to be quick; an answer without a thought gets an empty one."""
THINKER = (
    "{% for m in messages %}<|open|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|close|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|open|>assistant\n<think>\n{% endif %}"
)
"""Opens a thought in the prompt, and leaves thoughts out of what was said; as DeepSeek-R1."""
DATED = "{{ 'Today: ' + strftime_now('%d %b %Y, %H:%M:%S, 100%% %-d') + '\n' }}" + CHATML
NAMED_DATE = (
    "{% if date_string is not defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}"
    "{% else %}{% set date_string = 'never' %}{% endif %}{% endif %}Date: {{ date_string }}\n"
) + CHATML
TEMPLATES = {
    "chatml": CHATML,
    "begun": BEGUN,
    "twice": TWICE,
    "brackets": BRACKETS,
    "trimmed": TRIMMED,
    "bare": BARE,
    "hybrid": HYBRID,
    "thinker": THINKER,
    "dated": DATED,
    "named date": NAMED_DATE,
}
KINDS = ("bytes", "prepend", "metaspace")
"""Byte-level BPE, and SentencePiece as the fast class reads it: by a normalizer, or by a pre-tokenizer."""


def toy_tokenizer(
    kind: str = "bytes", template: str | None = CHATML, *, begin: bool = False, end: bool = False, **more: Any
) -> PreTrainedTokenizerFast:
    """Build a tokenizer.

    Args:
        kind: one of :data:`KINDS`.
        template: its chat template.
        begin: put the begin token before every text.
        end: put the end token behind every text.
        more: for the tokenizer's class.
    """
    core = _byte_level() if kind == "bytes" else _sentence_piece(kind)
    if begin or end:
        single = " ".join([BEGIN] * begin + ["$A"] + [END] * end)
        ids = [(token, SPECIAL.index(token)) for token in (BEGIN, END)]
        core.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token=BEGIN,
        eos_token=END,
        additional_special_tokens=[CLOSE, OPEN],
        chat_template=template,
        name_or_path="toy",
        **more,
    )


def _byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [*MERGES, ("Ġ", "4"), ("Ġ", "the"), ("Ċ", "Ċ")]
    words = [*SPECIAL, *alphabet, *("".join(pair) for pair in merges)]
    core = Tokenizer(models.BPE(vocab={word: place for place, word in enumerate(words)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL[:-2])
    core.add_tokens(SPECIAL[-2:])
    return core


def _sentence_piece(kind: str) -> Tokenizer:
    letters = [chr(code) for code in range(33, 127)]
    merges = [*MERGES, ("▁", "4"), ("▁", "the"), (":", "▁")]
    words = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters, *("".join(pair) for pair in merges)]
    vocabulary = {word: place for place, word in enumerate(words)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if kind == "prepend":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(parts)
    core.add_special_tokens(SPECIAL[:-2])
    core.add_tokens(SPECIAL[-2:])
    return core
