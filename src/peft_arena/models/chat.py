"""Chat templates: how a conversation is rendered, how the template ends a turn, and what a thought looks like.

A template is asked in one place, with the keywords and the date that the study fixed. transformers gives templates a
function that tells today's date; here it tells the study's, or else always the same one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, time
from functools import lru_cache
from string import ascii_letters
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from peft_arena.core.errors import UserError, first_line
from peft_arena.core.limits import time_limit
from peft_arena.core.specs import ChatSpec, ModelSpec
from peft_arena.models.trial import SECONDS, trial

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENDERING = 2
"""Version of how prompts and answers become tokens; runs of models that are not our own state it."""
FIXED_DATE = date(2024, 7, 26)
"""What templates that ask for the date are told where the study states none: what Llama 3's falls back to."""
CLOCK = "strftime_now"
DATES = {"date_string": "%d %b %Y", "date": "%Y-%m-%d"}
"""Variables that some templates read a date from instead, and how they write it."""
TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
"""What thoughts begin and end with, in the templates of models that think."""
ASKED, SAID = "Say it.", "What is said."
_SETTINGS = "peft_arena_settings"

Turns = Sequence[Mapping[str, str]]


class Settings(NamedTuple):
    """What a study fixed about a tokenizer's template."""

    chat: ChatSpec | None
    outdated: str = ""
    """Name of the model, if the run is one from before prompts were rendered as they are now."""


class Thought(NamedTuple):
    """What thoughts begin and end with."""

    opening: str
    closing: str


class Form(NamedTuple):
    """What a template makes of a short conversation."""

    prompt: str
    """Without the answer; empty if the template cannot render it."""
    full: str
    """With the answer."""
    marks: Mapping[str, int]
    """The tokenizer's added tokens and their ids."""


_FORMS: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[object, Form]] = WeakKeyDictionary()


def configure(tokenizer: PreTrainedTokenizerBase, spec: ModelSpec, rendering: int | None) -> PreTrainedTokenizerBase:
    """Fix how a tokenizer's template is rendered, and return the tokenizer.

    Args:
        tokenizer: of the model; all that is rendered with this object is rendered so.
        spec: says which keywords and which date the template is given.
        rendering: what a run of this model states now; a pinned spec that states another is of an older version.

    Raises:
        UserError: the template never mentions a keyword, or uses no date where one is stated.
    """
    if spec.chat is not None:
        check_keywords(tokenizer, spec.chat, spec.name)
    outdated = spec.revision is not None and spec.rendering != rendering
    setattr(tokenizer, _SETTINGS, Settings(spec.chat, spec.name if outdated else ""))
    return tokenizer


def check_keywords(tokenizer: PreTrainedTokenizerBase, chat: ChatSpec, model: str) -> None:
    """Refuse keywords that the template does not read, because they would change a run's id and nothing else.

    Raises:
        UserError: one of them is not in the template, or there is no template; names those that it reads.
    """
    if tokenizer.chat_template is None:
        raise UserError(f"model.chat cannot be used: the tokenizer of model '{model}' has no chat template")
    template = _template(tokenizer)
    known = _keywords(template)
    for name in chat.keywords:
        if name not in known:
            read = ", ".join(sorted(known)) or "none"
            raise UserError(
                f"model.chat.{name}: the chat template of model '{model}' has no such keyword. Known: {read}"
            )
    if chat.date is not None and not uses_date(tokenizer):
        raise UserError(f"model.chat.date is {chat.date}: the chat template of model '{model}' uses no date")


def uses_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Say whether the chat template writes a date."""
    if tokenizer.chat_template is None:
        return False
    template = _template(tokenizer)
    return _asks_clock(template) or any(name in _keywords(template) for name in DATES)


def settings_of(tokenizer: PreTrainedTokenizerBase) -> Settings:
    """Return what the study fixed; nothing, where :func:`configure` was not called."""
    found = getattr(tokenizer, _SETTINGS, None)
    return found if isinstance(found, Settings) else Settings(None)


def date_of(tokenizer: PreTrainedTokenizerBase) -> date:
    """Return the date that templates are told."""
    chat = settings_of(tokenizer).chat
    return FIXED_DATE if chat is None or chat.date is None else chat.date


def apply_template(tokenizer: PreTrainedTokenizerBase, turns: Turns, **how: bool) -> str:
    """Render a conversation through the tokenizer's own template, with the study's keywords and date.

    Args:
        tokenizer: has a chat template.
        turns: the conversation, objects with ``role`` and ``content``.
        how: ``add_generation_prompt`` or ``continue_final_message``.

    Raises:
        UserError: the template refuses the conversation.
    """
    chat = settings_of(tokenizer).chat
    given: dict[str, Any] = dict(how)
    if isinstance(tokenizer.chat_template, (str, dict)):
        template = _template(tokenizer)
        if chat is not None and chat.date is not None:
            given |= {name: chat.date.strftime(form) for name, form in DATES.items() if name in _keywords(template)}
        if _asks_clock(template):
            given["chat_template"] = _clock(date_of(tokenizer), _codes(template)) + template
    given |= {} if chat is None else chat.keywords
    try:
        with time_limit(SECONDS):
            return str(tokenizer.apply_chat_template([dict(turn) for turn in turns], tokenize=False, **given))
    except Exception as error:  # noqa: BLE001 - a template is the model's own program and raises anything
        stated = "" if chat is None else f" with chat {chat.canonical()}"
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} cannot render a conversation of "
            f"{', '.join(turn['role'] for turn in turns)}{stated}: {first_line(error)}"
        ) from None


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that the chat template puts after an answer; None if there is none."""
    form = _form(tokenizer)
    rest = form.full.rpartition(SAID)[2].lstrip() if SAID in form.full else ""
    mark = leading_token(tokenizer, rest)
    return None if mark is None else form.marks[mark]


def leading_token(tokenizer: PreTrainedTokenizerBase, text: str) -> str | None:
    """Return the longest added token that a text begins with; None if it begins with none."""
    found = [mark for mark in _form(tokenizer).marks if text.startswith(mark)]
    return max(found, key=len) if found else None


def opening(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what the template writes between its prompt and the words of an answer; mostly nothing.

    Hybrid models' templates put an empty thought there. A template whose prompt opens a thought gets the thought's end,
    where it does not say itself how such an answer goes on.
    """
    prompt, full, _ = _form(tokenizer)
    if full.startswith(prompt) and SAID in full[len(prompt) :]:
        return full[len(prompt) :].partition(SAID)[0]
    return thought_end(tokenizer, prompt)


def thought_end(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Return what ends the thought that a rendered prompt opened; nothing if it opened none."""
    thought = thought_of(tokenizer)
    opened = thought is not None and prompt.rstrip().endswith(thought.opening)
    return f"\n{thought.closing}\n\n" if thought is not None and opened else ""


def thought_of(tokenizer: PreTrainedTokenizerBase) -> Thought | None:
    """Return what thoughts begin and end with, if the chat template knows of thoughts."""
    if not isinstance(tokenizer.chat_template, (str, dict)):
        return None
    template = _template(tokenizer)
    return next((Thought(*pair) for pair in TAGS if pair[1] in template), None)


def _parts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return a short conversation as a prompt, and with its answer; empty where the template cannot render it."""
    if tokenizer.chat_template is None:
        return "", ""
    asked = {"role": "user", "content": ASKED}
    try:
        prompt = apply_template(tokenizer, [asked], add_generation_prompt=True)
        return prompt, apply_template(tokenizer, [asked, {"role": "assistant", "content": SAID}])
    except UserError:
        return "", ""


def _form(tokenizer: PreTrainedTokenizerBase) -> Form:
    """Return what is learned about a template once, and again if it, its keywords or the tokens change."""
    key = (tokenizer.chat_template, settings_of(tokenizer), len(tokenizer))
    kept = _FORMS.get(tokenizer)
    if kept is not None and kept[0] == key:
        return kept[1]
    added = tokenizer.added_tokens_decoder.items()
    form = Form(*_parts(tokenizer), {str(token): int(place) for place, token in added if str(token).strip()})
    _FORMS[tokenizer] = (key, form)
    return form


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the chat template, once a process of its own has shown that it ends.

    Raises:
        UserError: it does not, or the tokenizer has several and none to be taken.
    """
    try:
        template = str(tokenizer.get_chat_template())
    except ValueError as error:
        raise UserError(f"the chat template of {tokenizer.name_or_path} cannot be used: {first_line(error)}") from None
    if why := trial(template):
        raise UserError(f"the chat template of {tokenizer.name_or_path} cannot be used: {why}")
    return template


@lru_cache
def _keywords(template: str) -> frozenset[str]:
    """Return the variables that a template reads and a caller may give."""
    from jinja2 import TemplateError, meta
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        environment = _compile_jinja_template(template).environment
        found = meta.find_undeclared_variables(environment.parse(template))
    except TemplateError:
        return frozenset()
    return frozenset(name for name in found if name not in ChatSpec.RESERVED)


@lru_cache
def _asks_clock(template: str) -> bool:
    return re.search(rf"\b{CLOCK}\b", template) is not None


@lru_cache
def _codes(template: str) -> tuple[str, ...]:
    """Return the codes of a date that a template can ask for: those it writes, or all, where a form is no constant."""
    calls = len(re.findall(rf"\b{CLOCK}\s*\(", template))
    constant = len(re.findall(rf"\b{CLOCK}\s*\(\s*('[^']*'|\"[^\"]*\")\s*\)", template))
    if calls == constant == len(re.findall(rf"\b{CLOCK}\b(?!\s+is\b)", template)):
        return tuple(sorted(set(re.findall(r"%-?[a-zA-Z]", template))))
    return tuple(f"%{flag}{letter}" for flag in ("", "-") for letter in ascii_letters)


@lru_cache
def _clock(day: date, codes: tuple[str, ...]) -> str:
    """Return a macro that a template calls in the place of transformers' clock: midnight of a fixed day.

    transformers passes only plain values to a template, no functions. The macro ends in a line feed, which belongs to
    its last tag, so that the template behind it begins a line as it does alone.
    """
    moment = datetime.combine(day, time(), UTC).replace(tzinfo=None)
    table = {code: moment.strftime(code) for code in codes if code[-1] != "s"}
    table = {code: value for code, value in table.items() if value != code}
    pairs = ", ".join(f"({code!r}, {value!r})" for code, value in table.items())
    return (
        f"{{%- macro {CLOCK}(format) -%}}"
        "{%- set said = namespace(parts=[]) -%}"
        "{%- for part in format.split('%%') -%}"
        "{%- set piece = namespace(text=part) -%}"
        f"{{%- for code, value in [{pairs}] -%}}"
        "{%- set piece.text = piece.text.replace(code, value) -%}"
        "{%- endfor -%}"
        "{%- set said.parts = said.parts + [piece.text] -%}"
        "{%- endfor -%}"
        "{{- said.parts | join('%') -}}"
        "{%- endmacro %}\n"
    )
