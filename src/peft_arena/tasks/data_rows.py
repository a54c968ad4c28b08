"""From a row of a table to an item: texts, turns of a chat, options. What cannot be used is refused with its reason."""

from __future__ import annotations

import ast
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from peft_arena.core.text import half_character, half_words
from peft_arena.tasks.base import Item
from peft_arena.tasks.data_files import RowError, short
from peft_arena.tasks.splits import Keyed, normal_key, same_text

ROLES: Mapping[str, str] = {
    "assistant": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "developer": "system",
    "system": "system",
    "human": "user",
    "user": "user",
    "function": "tool",
    "function_call": "tool",
    "function_response": "tool",
    "ipython": "tool",
    "observation": "tool",
    "tool": "tool",
    "tool_call": "tool",
    "tool_response": "tool",
}
"""What exports call a turn's speaker, and whose turn it is; a tool's turns are left out."""
TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
"""Types of the parts of a turn that are its words; thoughts, calls and pictures are other parts."""
MOST_DIGITS = 6
"""An index has fewer."""
_LETTER = re.compile(r"[A-Z]")


class Placed(NamedTuple):
    """An item, the file and row it was read from, and its prompt."""

    keyed: Keyed
    place: str
    prompt: str
    """All of it, as far as it decides what the model is shown."""
    left_out: Mapping[str, int] = {}
    """Parts of the row that no text model is shown, and how many: turns of tools, images."""
    same: str = ""
    """:func:`peft_arena.tasks.splits.same_text` of the prompt."""
    normal: str = ""
    """:func:`peft_arena.tasks.splits.normal_key` of the prompt."""


def item_of(row: Mapping[str, Any], columns: Mapping[str, str], place: str, join: Callable[[str, str], str]) -> Placed:
    """Make an item of a row.

    Args:
        row: the row, with all named columns.
        columns: use to column, see :class:`peft_arena.tasks.custom_config.Columns`.
        place: file and row, for messages.
        join: from prompt and answer to the answer as it follows the prompt.

    Raises:
        RowError: a value has the wrong type, is empty or is no text.
    """
    data: dict[str, Any] = {}
    left: Counter[str] = Counter()
    answers: list[str] = []
    if turns := _conversation(row, columns, left):
        question = turns[-1]["content"]
        if "messages" in columns:
            answers = [question]
            turns = turns[:-1]
            question = turns[-1]["content"]
        data["messages"] = turns
        key = shown_as(turns)
    else:
        question = key = _question(row, columns)
    if "response" in columns:
        answers = [_answer(row, columns["response"], left)]
    if "accepted" in columns:
        answers += [text for text in _accepted(row, columns["accepted"]) if text not in answers]
    group = _group(row, columns["group"]) if "group" in columns else ""
    if "choices" in columns:
        choices, gold = _options(row, columns)
        item = Item(question, join(question, choices[gold]), choices, gold, data, group)
    else:
        if answers:
            data["answer"] = answers[0]
        if len(answers) > 1:
            data["accepted"] = answers
        item = Item(question, join(question, answers[0]) if answers else "", data=data, group=group)
    normal = normal_key(key)
    return Placed(Keyed(group or normal, item), place, key, dict(left), same_text(key), normal)


def shown_as(turns: Sequence[Mapping[str, str]]) -> str:
    """Return a chat as one text that decides what counts as the same content; of one user's turn its words alone.

    A line stands for each turn, so that white space around the words of a turn does not count, as in a plain prompt.
    """
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content'].strip()}" for turn in turns)


def text_of(value: object, what: str) -> str:
    """Return a value as text: numbers and booleans, lists and objects as JSON has them.

    Raises:
        RowError: it is empty, null, or holds half a surrogate pair, which is no text.
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        raise RowError(f"{what} is empty", "" if value is None else value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if not text.strip():
        raise RowError(f"{what} is empty")
    if (place := half_character(text)) is not None:
        raise RowError(f"{what} holds half of a character (a lone surrogate)", half_words(text, place))
    return text


def _conversation(row: Mapping[str, Any], columns: Mapping[str, str], left: Counter[str]) -> list[dict[str, str]]:
    """Return the turns of a row's chat, the answer's included if the chat holds it; empty where it has none."""
    if "messages" in columns:
        turns = _turns(row[columns["messages"]], columns["messages"], left)
        if len(turns) < 2 or turns[-1]["role"] != "assistant":
            last = turns[-1]["role"] if turns else "none"
            raise RowError(f"column '{columns['messages']}': the last turn must be an assistant's, after another", last)
    elif "prompt" in columns and isinstance(row[columns["prompt"]], list):
        turns = _turns(row[columns["prompt"]], columns["prompt"], left)
        if not turns or turns[-1]["role"] != "user":
            last = turns[-1]["role"] if turns else "none"
            raise RowError(f"column '{columns['prompt']}': the last turn of a prompt must be a user's", last)
    else:
        turns = []
    if "system" in columns and _given(row[columns["system"]]):
        said = text_of(row[columns["system"]], f"column '{columns['system']}'")
        turns = turns or [{"role": "user", "content": _question(row, columns)}]
        turns.insert(0, {"role": "system", "content": said})
    return turns


def _given(value: object) -> bool:
    """Say whether a value that may be left out is there: not null, not NaN, not blank."""
    return value is not None and value == value and str(value).strip() != ""


def _question(row: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    """Return the prompt, and behind it, after an empty line, what column ``input`` adds to it where it has anything."""
    text = text_of(row[columns["prompt"]], f"column '{columns['prompt']}'")
    if "input" in columns and _given(row.get(columns["input"])):
        return f"{text}\n\n{text_of(row[columns['input']], _named(columns['input']))}"
    return text


def _named(column: str) -> str:
    return f"column '{column}'"


def _answer(row: Mapping[str, Any], column: str, left: Counter[str]) -> str:
    value = row[column]
    if isinstance(value, list) and value and all(isinstance(turn, dict) and _speaker(turn) for turn in value):
        turns = _turns(value, column, left)
        if len(turns) != 1 or turns[0]["role"] != "assistant":
            raise RowError(f"column '{column}' must hold one turn of an assistant", [turn["role"] for turn in turns])
        return turns[0]["content"]
    return text_of(value, _named(column))


def _accepted(row: Mapping[str, Any], column: str) -> list[str]:
    value = row[column]
    values = _decoded(value) if isinstance(value, str) else value
    listed = values if isinstance(values, list) else [value]
    if not listed:
        raise RowError(f"column '{column}' holds no accepted answer")
    return [text_of(one, _named(column)) for one in listed]


def _decoded(text: str) -> object:
    """Return what a text of a CSV file holds where it is JSON, or a list as Python writes it; else the text itself."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return text


def _group(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise RowError(f"column '{column}' must be text or a whole number that is not empty", repr(value))
    return text_of(value, _named(column))


def _options(row: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[tuple[str, ...], int]:
    choices, gold = row[columns["choices"]], row[columns["gold"]]
    choices = _decoded(choices) if isinstance(choices, str) else choices
    where = _named(columns["choices"])
    if not isinstance(choices, list) or len(choices) < 2:
        raise RowError(f"{where} must be a list of at least two options", choices)
    texts = tuple(text_of(choice, where) for choice in choices)
    if len(set(texts)) < len(texts):
        raise RowError(f"{where} holds an option twice", choices)
    return texts, _right(gold, texts, _named(columns["gold"]))


def _right(gold: object, texts: Sequence[str], where: str) -> int:
    """Return the index of the right option: its text, its index from 0, or its letter from A, in this order."""
    said = gold if isinstance(gold, str) else json.dumps(gold, ensure_ascii=False, default=str)
    if said in texts:
        return texts.index(said)
    digits, place = said.strip(), -1
    if not isinstance(gold, bool) and digits.isascii() and digits.isdigit() and len(digits) < MOST_DIGITS:
        place = int(digits)
    elif _LETTER.fullmatch(digits):
        place = ord(digits) - ord("A")
    if not 0 <= place < len(texts):
        allowed = f"an index from 0 to {len(texts) - 1}, a letter from A or the text of an option"
        raise RowError(f"{where} must be {allowed}", repr(gold))
    return place


def _turns(value: object, column: str, left: Counter[str]) -> list[dict[str, str]]:
    """Return the turns that hold text, as role and content; turns of tools are left out and counted.

    Turns of one speaker that a tool's turns stood between become one, an empty line between them.
    """
    where = _named(column)
    value = _decoded(value) if isinstance(value, str) else value
    if not isinstance(value, list) or not value:
        raise RowError(f"{where} must be a list of turns", value)
    turns: list[dict[str, str]] = []
    broken = False
    for number, turn in enumerate(value):
        place = f"{where}, turn {number}"
        said = _speaker(turn) if isinstance(turn, dict) else None
        if said is None:
            raise RowError(f"{where}: a turn must have 'role' and 'content', or 'from' and 'value'", turn)
        role, content = said
        if role not in ROLES:
            raise RowError(f"{where}: the role of a turn must be one of {', '.join(sorted(ROLES))}", repr(role))
        calls = [key for key in ("tool_calls", "function_call") if turn.get(key)]
        text = "" if ROLES[role] == "tool" else _content(content, place, left)
        if ROLES[role] == "tool" or calls:
            left["turns and calls of tools"] += 1
            broken = True
        elif not text.strip():
            raise RowError(f"{where}: a turn holds no text", f"turn {number}: {short(content)}")
        if not text.strip():
            continue
        if broken and turns and turns[-1]["role"] == ROLES[role]:
            turns[-1]["content"] += f"\n\n{text}"
        else:
            turns.append({"role": ROLES[role], "content": text})
        broken = bool(calls)
    last = value[-1]
    if ROLES[_speaker(last)[0]] == "tool" or last.get("tool_calls") or last.get("function_call"):  # type: ignore[index]
        raise RowError(f"{where}: the last turn is a tool's or calls one: there is no answer behind it")
    if last.get("weight") == 0:
        raise RowError(f"{where}: the last turn has weight 0: it is not to be learned")
    return turns


def _speaker(turn: Mapping[str, Any]) -> tuple[str, object] | None:
    """Return role and content of a turn in either of the two forms; None if it is a turn of neither."""
    for role, content in (("role", "content"), ("from", "value")):
        if isinstance(turn.get(role), str) and (content in turn or turn.get("tool_calls") or turn.get("function_call")):
            return turn[role].strip().lower(), turn.get(content)
    return None


def _content(content: object, place: str, left: Counter[str]) -> str:
    """Return the text of a turn: of a list of parts those with text, each on a line; the others are counted."""
    if content is None:
        return ""
    if not isinstance(content, list):
        return text_of(content, place) if _given(content) else ""
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        if isinstance(text, str) and (isinstance(part, str) or part.get("type", "text") in TEXT_PARTS):
            texts.append(text)
        else:
            kind = part.get("type", "other") if isinstance(part, dict) else type(part).__name__
            left[f"parts of type {short(kind)}"] += 1
    joined = "\n".join(texts)
    return text_of(joined, place) if joined.strip() else ""
