"""Prompt sets: the prompts of tasks, or lines of a file, as the tokens that training and evaluation would feed.

Files hold one prompt each line (txt), one JSON value each line (jsonl) or one JSON list (json). A value is a string,
given to the model as it is, or an object with exactly one of these keys:

- ``text``: a string, given as it is;
- ``prompt``: a string, a user's message in the tokenizer's chat template; given as it is if there is no template;
- ``messages``: a list of objects with ``role`` and ``content``, through the chat template, which there must be.

Empty lines are passed over. Nothing is removed for being there twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from peft_arena.core.bounded import DATA_BYTES, parse_json, read_bytes, user_path
from peft_arena.core.errors import UserError, unknown
from peft_arena.core.geometry import PromptSpec
from peft_arena.core.ids import content_id, file_hash
from peft_arena.models.render import encode_prompt
from peft_arena.tasks.base import Kind, Message, Prompt
from peft_arena.tasks.registry import display_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peft_arena.core.specs import TaskSpec

SUFFIXES = (".json", ".jsonl", ".txt")
KEYS = ("messages", "prompt", "text")
ROLES = ("assistant", "system", "user")


class PromptSet(NamedTuple):
    """Prompts as tokens, and what became of those that were read."""

    ids: tuple[tuple[int, ...], ...]
    """Tokens of each prompt, at least one."""
    cut: int
    """Prompts that were longer and lost their end."""
    empty: int
    """Prompts left out because they have no tokens."""
    max_length: int

    @property
    def tokens(self) -> int:
        """Number of tokens of all prompts."""
        return sum(map(len, self.ids))

    @property
    def id(self) -> str:
        """Hash of all tokens."""
        return content_id(self.ids)

    def describe(self) -> str:
        """Return the numbers as a phrase for a record."""
        parts = f"{self.tokens} tokens of {len(self.ids)} prompts"
        cut = f"{self.cut} of them cut to {self.max_length} tokens" if self.cut else "none of them cut"
        return f"{parts}, {cut}" + (f", {self.empty} empty ones left out" if self.empty else "")


def with_hash(spec: PromptSpec) -> PromptSpec:
    """Return the spec with the hash of its file's content filled in; a task's spec as it is.

    Raises:
        UserError: there is no such file, it cannot hold prompts, or its content is not what the spec names.
    """
    if spec.file is None:
        return spec
    found = file_hash(_path(spec.file), DATA_BYTES)
    if spec.sha256 is not None and spec.sha256 != found:
        raise UserError(f"prompt file '{spec.file}' has changed: its sha256 is {found}, expected {spec.sha256}")
    return spec.model_copy(update={"sha256": found})


def prompt_set(
    specs: Sequence[PromptSpec], tokenizer: PreTrainedTokenizerBase, *, prompts: int, max_length: int
) -> PromptSet:
    """Return the first prompts of some sources, taken from them in turn, as tokens.

    Args:
        specs: the sources.
        tokenizer: of the model.
        prompts: most prompts.
        max_length: most tokens of a prompt; the rest is cut off at its end.

    Raises:
        UserError: a source cannot be read, or no prompt has a token.
    """
    if not specs:
        raise UserError("a prompt set needs at least one source: a task or a file")
    sources = [_source(spec, tokenizer) for spec in specs]
    found: list[tuple[int, ...]] = []
    cut = empty = taken = 0
    while sources and taken < prompts:
        for source in list(sources):
            if taken == prompts:
                break
            encoded = next(source, None)
            if encoded is None:
                sources.remove(source)
                continue
            taken += 1
            cut += len(encoded) > max_length
            empty += not encoded
            if encoded:
                found.append(tuple(encoded[:max_length]))
    if not found:
        names = ", ".join(_called(spec) for spec in specs)
        raise UserError(f"no prompt of {names} has a token; {taken} were read")
    return PromptSet(tuple(found), cut, empty, max_length)


def _called(spec: PromptSpec) -> str:
    return spec.name if spec.task is None else display_name(spec.task)


def _source(spec: PromptSpec, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Return the prompts of one source as tokens, one after the other; opening it reports what is wrong with it."""
    if spec.task is not None:
        prompts = _of_task(spec.task, spec)
        return (_encoded(tokenizer, f"task {spec.task.name} prompt {n}", prompt) for n, prompt in enumerate(prompts, 1))
    with_hash(spec)
    path = _path(str(spec.file))
    read: dict[str, Callable[[Path], list[tuple[str, Any]]]] = {
        ".txt": _lines,
        ".jsonl": _json_lines,
        ".json": _json_list,
    }
    rows = read[path.suffix](path)
    if not rows:
        raise UserError(f"prompt file '{path}' holds no prompts")
    rendered = [_rendered(value, place, tokenizer) for place, value in rows]
    return (_encoded(tokenizer, place, prompt) for (place, _), prompt in zip(rows, rendered, strict=True))


def _encoded(tokenizer: PreTrainedTokenizerBase, place: str, prompt: Prompt) -> list[int]:
    try:
        return encode_prompt(tokenizer, prompt)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def _of_task(task_spec: TaskSpec, spec: PromptSpec) -> Iterator[Prompt]:
    from peft_arena.tasks.foreign import is_foreign
    from peft_arena.tasks.registry import made_task

    if is_foreign(task_spec.name):
        raise UserError(
            f"task {task_spec.name} cannot give prompts: lm-eval makes them while it evaluates; name a task of our own "
            "or write the prompts to a txt, jsonl or json file"
        )
    task = made_task(task_spec)
    items = task.items(spec.split)
    if not items:
        raise UserError(f"task {display_name(task_spec)} has no items in split {spec.split}")
    if task.card.kind is Kind.TEXT:
        return (item.question for item in items)
    return (task.prompt(item) for item in items)


def _path(name: str) -> Path:
    path = user_path(name)
    if path.suffix not in SUFFIXES:
        raise UserError(f"prompt file '{name}' must end in {', '.join(SUFFIXES)}, got '{path.suffix}'")
    if not path.is_file():
        raise UserError(f"prompt file '{name}' {'is a folder' if path.is_dir() else 'does not exist'}")
    return path


def _text(path: Path) -> str:
    try:
        return read_bytes(path, DATA_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"prompt file '{path}' is not UTF-8 text: byte {error.start} cannot be read") from error


def _numbered(path: Path) -> list[tuple[str, str]]:
    """Return each line that is not empty, with its place. Only line feeds end lines: prompts may hold the others."""
    lines = enumerate(_text(path).split("\n"), 1)
    return [(f"prompt file '{path}' line {number}", line.rstrip("\r")) for number, line in lines if line.strip()]


def _lines(path: Path) -> list[tuple[str, Any]]:
    return [(place, line) for place, line in _numbered(path)]


def _json_lines(path: Path) -> list[tuple[str, Any]]:
    return [(place, _parsed(line, place)) for place, line in _numbered(path)]


def _json_list(path: Path) -> list[tuple[str, Any]]:
    place = f"prompt file '{path}'"
    found = _parsed(_text(path), place)
    if not isinstance(found, list):
        raise UserError(f"{place} must hold a list of prompts, got {type(found).__name__}")
    return [(f"{place} entry {number}", value) for number, value in enumerate(found, 1)]


def _parsed(text: str, place: str) -> Any:
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{place} is not JSON: {error.msg} at line {error.lineno} column {error.colno}") from error
    except ValueError as error:
        raise UserError(f"{place} is not JSON: {error}") from None


def _rendered(value: Any, place: str, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Return a file's value as a prompt."""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        raise UserError(f"{place}: a prompt is a string or an object, got {type(value).__name__}")
    for key in value:
        if key not in KEYS:
            raise unknown("key", str(key), KEYS, where=place)
    if len(value) != 1:
        raise UserError(f"{place}: give exactly one of {', '.join(KEYS)}; given: {', '.join(value) or 'none'}")
    ((key, content),) = value.items()
    if key == "messages":
        return _messages(content, place, tokenizer)
    if not isinstance(content, str):
        raise UserError(f"{place}: '{key}' must be a string, got {type(content).__name__}")
    return (Message("user", content),) if key == "prompt" and tokenizer.chat_template is not None else content


def _messages(turns: Any, place: str, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    if tokenizer.chat_template is None:
        raise UserError(f"{place}: the tokenizer of {tokenizer.name_or_path} has no chat template for messages")
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{place}: 'messages' must be a list with at least one object")
    for turn in turns:
        if not isinstance(turn, dict) or set(turn) != {"role", "content"} or not isinstance(turn["content"], str):
            raise UserError(f"{place}: each message needs 'role' and 'content', a string, and nothing else")
        if turn["role"] not in ROLES:
            raise unknown("role", str(turn["role"]), ROLES, where=place)
    return tuple(Message(turn["role"], turn["content"]) for turn in turns)
