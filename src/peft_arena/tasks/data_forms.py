"""The forms in which people export data, recognised by the names of their columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from peft_arena.core.errors import UserError
from peft_arena.tasks.data_files import Rows


class Form(NamedTuple):
    """One form: which columns it has, and what they are for."""

    title: str
    columns: Mapping[str, str]
    """Use to column; every one must be there."""
    optional: Mapping[str, str] = {}
    """Use to column, where it is there."""
    turns: tuple[str, str] | None = None
    """Keys of a turn, where the first column is a chat."""


_CHOICES = [
    Form(f"multiple choice ({question}, {choices}, {gold})", {"prompt": question, "choices": choices, "gold": gold})
    for question in ("question", "prompt")
    for choices in ("choices", "options")
    for gold in ("answer", "gold", "label", "answer_idx", "answerKey")
]
_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "answer"),
    ("question", "answer"),
    ("question", "response"),
    ("question", "reply"),
    ("query", "response"),
    ("problem", "solution"),
    ("problem", "answer"),
    ("input", "output"),
    ("input", "target"),
    ("source", "target"),
    ("text", "label"),
)
FORMS: tuple[Form, ...] = (
    *(
        Form(title, {"messages": column}, {"system": "system"}, turns)
        for title, column, turns in (
            ("OpenAI chat (messages of role and content)", "messages", ("role", "content")),
            ("ShareGPT (conversations of from and value)", "conversations", ("from", "value")),
            ("chat (conversations of role and content)", "conversations", ("role", "content")),
            ("chat (messages of from and value)", "messages", ("from", "value")),
        )
    ),
    *_CHOICES,
    Form(
        "Alpaca (instruction, input, output)",
        {"prompt": "instruction", "response": "output"},
        {"input": "input", "system": "system"},
    ),
    Form(
        "Dolly (instruction, context, response)",
        {"prompt": "instruction", "response": "response"},
        {"input": "context"},
    ),
    *(
        Form(f"prompts and accepted answers ({prompt}, {answers})", {"prompt": prompt, "accepted": answers})
        for prompt in ("question", "prompt")
        for answers in ("answers", "accepted")
    ),
    *(Form(f"pairs ({prompt}, {answer})", {"prompt": prompt, "response": answer}) for prompt, answer in _PAIRS),
)
"""In the order in which they are looked for: the first that fits most rows is taken."""


class Recognised(NamedTuple):
    """What was recognised in a file."""

    title: str
    columns: Mapping[str, str]
    """Use to column."""


def recognise(rows: Rows) -> Recognised:
    """Return the form that most rows of a source have; a row without its columns cannot be used.

    Raises:
        UserError: there are no rows, none is an object, or no form fits; the message says which columns there are.
    """
    if not rows.rows:
        raise UserError(f"{rows.source} holds no rows")
    whole = [row for row in rows.rows if isinstance(row, dict)]
    if not whole:
        rows.read()
    counts = Counter(name for row in whole for name in row)
    shared = {name for name, count in counts.items() if 2 * count > len(whole)}
    for form in FORMS:
        first = next((row for row in whole if set(form.columns.values()) <= set(row)), None)
        if set(form.columns.values()) <= shared and first is not None and _holds(form, first):
            found = {use: column for use, column in form.optional.items() if column in counts}
            return Recognised(form.title, {**form.columns, **found})
    names = ", ".join(sorted(map(str, shared))) or "none that most rows have"
    raise UserError(
        f"{rows.source}: cannot tell which columns hold prompt and answer; its columns are {names}; name them, for "
        "example columns: {prompt: question, response: answer}"
    )


def unused(rows: Sequence[Any], columns: Mapping[str, str]) -> list[str]:
    """Return the columns of a source that nothing is read from, in alphabetical order."""
    names = {str(name) for row in rows if isinstance(row, dict) for name in row}
    return sorted(names - set(columns.values()))


def _holds(form: Form, row: Mapping[str, Any]) -> bool:
    """Say whether a row fits what the form's first column holds."""
    if "choices" in form.columns:
        choices = row[form.columns["choices"]]
        return isinstance(choices, list) or (isinstance(choices, str) and choices.lstrip().startswith("["))
    if "accepted" in form.columns:
        return isinstance(row[form.columns["accepted"]], list | str)
    if form.turns is None:
        return True
    turns = row[form.columns["messages"]]
    if isinstance(turns, str):
        return all(f'"{key}"' in turns for key in form.turns)
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and form.turns[0] in turns[0]
