"""Whether a model can write each item's own gold answer: in its tokens, within the limit, as one text that wins.

Needs a tokenizer and no model. What needs none is in :mod:`peft_arena.tasks.gold`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from peft_arena.core.errors import UserError
from peft_arena.evaluate.decode import Stopper
from peft_arena.models.render import control_tokens, encode_example, encode_prompt, option_request, turn_end
from peft_arena.tasks.base import Item, Kind, Task
from peft_arena.tasks.gold import gold_problem, lost

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WRITTEN = 300
"""So many items are written out and read back whatever they are, the first; of the others those that look odd."""
NEAR = 4
"""Tokens below the limit at which an answer is written out too: its end and the template's words come on top."""
CHUNK = 1000
"""Answers that are tokenized at once."""


class Unwritten(NamedTuple):
    """An item that cannot be won, and why."""

    item: Item
    why: str
    asked: bool = True
    """False: it cannot even be asked, as the model's tokenizer or template cannot make a prompt of it."""


def unwritten(task: Task, items: Sequence[Item], tokenizer: PreTrainedTokenizerBase) -> Iterator[Unwritten]:
    """Yield the items whose own answer a model with this tokenizer cannot write so that it wins.

    Looked at are all items for control tokens, answers over the limit of new tokens and answers with unknown tokens;
    the first :data:`WRITTEN` and those that are near one of these are tokenized as in training, cut at the limit,
    decoded and scored as an answer is. An item that its answer does not win as a text either is not repeated here.

    Args:
        task: that asks.
        items: some of its items.
        tokenizer: of the model.
    """
    stopper = stopper_of(task, tokenizer)
    for number, (item, odd) in enumerate(_odd(task, items, tokenizer)):
        write = odd or number < WRITTEN
        why = written_problem(task, item, stopper) if write else controls(task, item, tokenizer)
        if why:
            yield Unwritten(item, why, asked=not (write and asking_problem(task, item, tokenizer)))


def _odd(task: Task, items: Sequence[Item], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[Item, bool]]:
    """Yield each item and whether its answer is near the limit or holds tokens that stand for what is not known."""
    limit, unknown = task.generation.max_new_tokens - NEAR, tokenizer.unk_token_id
    for chunk in (items[start : start + CHUNK] for start in range(0, len(items), CHUNK)):
        texts = [task.target(item) or " " for item in chunk]
        for item, ids in zip(chunk, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
            yield item, len(ids) >= limit or (unknown is not None and unknown in ids)


def stopper_of(task: Task, tokenizer: PreTrainedTokenizerBase) -> Stopper:
    """Return what ends and reads the answers to a task, by the tokenizer's own end and that of its template's turns."""
    ends = frozenset(int(one) for one in (tokenizer.eos_token_id, turn_end(tokenizer)) if one is not None)
    return Stopper(tokenizer, task.generation.stop, ends)


def written_problem(task: Task, item: Item, stopper: Stopper) -> str:
    """Say why a model cannot write an item's own answer so that it wins; empty if it can.

    Args:
        task: that asks.
        item: one of its items.
        stopper: of the task and the model's tokenizer, see :func:`stopper_of`.
    """
    tokenizer = stopper.tokenizer
    if why := controls(task, item, tokenizer):
        return why
    target = task.target(item)
    if why := asking_problem(task, item, tokenizer):
        return why
    if task.card.kind is Kind.CHOICE:
        return _options_alike(task, item, tokenizer)
    if task.card.kind is not Kind.GENERATE or not target or gold_problem(task, item):
        return ""
    try:
        encoded = encode_example(tokenizer, task.prompt(item), target)
    except UserError as error:
        return str(error)
    ids, limit = encoded.ids[encoded.prompt_length :], task.generation.max_new_tokens
    said = stopper.text(ids[:limit], stopper.opened(encoded.ids[: encoded.prompt_length]))
    why = lost(task, item, said)
    if why and len(ids) - 1 > limit:
        template = len(ids) - 1 - len(tokenizer.encode(target, add_special_tokens=False))
        before = f", {template} of them an empty thought that the chat template begins with" if template > 1 else ""
        return f"it has {len(ids) - 1} tokens of this model{before}, and max_new_tokens is {limit}"
    if why and said.strip() != target.strip():
        return f"this model's tokens write it as {said[:60]!r}"
    return why


def asking_problem(task: Task, item: Item, tokenizer: PreTrainedTokenizerBase) -> str:
    """Say why no prompt can be made of an item for a model with this tokenizer; empty if one can.

    A template that writes something else each time it is asked makes no prompt either: training and evaluation would
    see two.
    """
    try:
        first, second = (encode_prompt(tokenizer, task.prompt(item)) for _ in range(2))
    except UserError as error:
        return str(error)
    return "" if first == second else "the chat template writes another text each time it is asked"


def controls(task: Task, item: Item, tokenizer: PreTrainedTokenizerBase) -> str:
    """Say which control tokens an item's data spells; empty if none.

    A plain prompt may hold them: there they are the user's own template.
    """
    prompt = task.prompt(item)
    turns = [] if isinstance(prompt, str) else [(f"a {turn.role} turn", turn.content) for turn in prompt]
    for what, text in [*turns, ("the answer", task.target(item)), *(("an option", one) for one in item.choices)]:
        if found := control_tokens(tokenizer, text):
            return f"{what} spells the control token {found[0]!r} of this model"
    return ""


def _options_alike(task: Task, item: Item, tokenizer: PreTrainedTokenizerBase) -> str:
    """Say which options this model's tokens do not tell apart."""
    prompt = task.prompt(item)
    seen: dict[tuple[int, ...], str] = {}
    for text, choice in zip(task.continuations(item), item.choices, strict=True):
        _, option = option_request(tokenizer, prompt, text)
        ids = tuple(tokenizer.encode(option, add_special_tokens=False))
        if seen.get(ids, choice) != choice:
            return f"options {seen[ids]!r} and {choice!r} are the same tokens of this model"
        seen[ids] = choice
    return ""
