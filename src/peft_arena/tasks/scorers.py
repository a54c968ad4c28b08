"""Judging a completion against the accepted answers: total functions, any text gives a score and none raises."""

from __future__ import annotations

import logging
import re
import string
import threading
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from types import MappingProxyType

from peft_arena.core.errors import UserError
from peft_arena.core.registry import Registry
from peft_arena.tasks.base import Score
from peft_arena.tasks.numerals import Form, find_forms, written

Scorer = Callable[[Sequence[str], str], Score]
"""From the accepted answers and the completion to a score of 0 or 1, or None with a reason."""

FINAL_ANSWER_MARK = "####"
"""What a rationale writes before its final answer."""
MATH_SECONDS = 5
MATH_CHARACTERS = 4000
"""Only the end of a longer completion is compared: an answer stands there, and parsing time is bounded."""

SHOWN_CHARACTERS = 60
LINE_CHARACTERS = 10_000
"""Only the beginning of a longer line is compared as text: putting accents in order takes quadratic time."""
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
MATH_BRACKETS = 200
"""A completion that opens more brackets is not compared: parsing time grows out of bounds with nesting."""
_HUGE_POWER = re.compile(r"(\^|\*\*)\s*[{(]?\s*[-+]?([0-9]{5,}|[0-9]+\s*[})]?\s*(\^|\*\*))|[0-9]{4,}\s*!")
BOX_CHARACTERS = 1000
"""A longer box holds no answer: it is wrong without being read."""
_BOX_TOKEN = re.compile(r"(?P<box>\\{1,2}boxed\s?\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)
_FILLED_MATRIX = re.compile(r"\\operatorname\W*(?:eye|zeros|ones)(?![A-Za-z])")


def canonical_number(text: str) -> str:
    """Return a number without plus sign, commas and needless zeros: ``+01,000.50`` gives ``1000.5``."""
    sign = "-" if text.startswith("-") else ""
    whole, _, fraction = text.lstrip("+-").replace(",", "").partition(".")
    whole = whole.lstrip("0") or "0"
    fraction = fraction.rstrip("0")
    number = f"{whole}.{fraction}" if fraction else whole
    return number if number == "0" else sign + number


def find_numbers(text: str) -> list[str]:
    """Return every number of a text by value, in canonical form and in order (:mod:`peft_arena.tasks.numerals`).

    Forms that are not understood are left out, and no part of them is read: ``12:30`` holds no number.
    """
    return [written(form.value) for form in find_forms(text).found if form.value is not None]


def first_line(text: str) -> str:
    """Return the first line that holds anything but white space, or an empty text."""
    return first_lines(text, 1)


def first_lines(text: str, count: int) -> str:
    """Return so many of the first lines that hold anything but white space, each without it around."""
    return "\n".join(islice((line.strip() for line in text.splitlines() if line.strip()), count))


def _lines(text: str) -> int:
    """Return how many lines of a text hold anything but white space; at least 1."""
    return max(sum(1 for line in text.splitlines() if line.strip()), 1)


def number_form(text: str) -> Form | None:
    r"""Return the form with digits that a text gives as its answer; None if there is none.

    That is the first form after the last ``####``; in a text without that mark the only one in the last
    ``\\boxed{...}``; without a box the one directly behind the last ``answer is`` or ``answer:``; else the last of the
    text. The form may be one that is not understood (:mod:`peft_arena.tasks.numerals`).
    """
    form, _ = _number_form(text)
    return form


def _number_form(text: str) -> tuple[Form | None, bool]:
    """Return the form given, and whether others beside it might be meant as well."""
    _, mark, after = text.rpartition(FINAL_ANSWER_MARK)
    if mark:
        return next(iter(find_forms(after[:LINE_CHARACTERS]).found), None), False
    held = last_box(text) if "boxed" in text else None
    if held is not None:
        inside = find_forms(held).found
        return inside[0] if len(inside) == 1 else None, False
    forms = find_forms(text)
    return forms.answer(), forms.undecided()


def extract_number(text: str) -> str:
    """Return the number a completion gives as its answer (:func:`number_form`) by value, in canonical form.

    It is empty where there is no form with digits, or the one given is not understood: then no other is taken.
    """
    form = number_form(text)
    return "" if form is None or form.value is None else written(form.value)


def normalise_answer(text: str) -> str:
    """Return the text in lower case without punctuation, English articles and surplus white space.

    The usual normalisation of open question answering (Rajpurkar et al. 2016, SQuAD). Normalising twice changes
    nothing: the text is composed (NFC) before punctuation is looked for, since a few signs compose to punctuation, and
    again once it is gone, since a letter and the accent behind it may have stood on either side of it.
    """
    plain = unicodedata.normalize("NFC", text).lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", unicodedata.normalize("NFC", plain)).split())


def _composed(text: str) -> str:
    """Return a text without white space around, its accents composed (NFC) unless it is too long for that."""
    return unicodedata.normalize("NFC", text.strip()) if len(text) <= LINE_CHARACTERS else text.strip()


def exact_match(golds: Sequence[str], completion: str) -> Score:
    """Compare literally, after white space around both is removed; a letter and its accent are one sign or two."""
    said = _composed(completion)
    return Score(float(any(said == _composed(gold) for gold in golds)), extracted=said)


def normalised_match(golds: Sequence[str], completion: str) -> Score:
    """Compare the first line after :func:`normalise_answer`.

    Of an accepted answer of several lines as many of the completion's first lines.
    """
    right = any(_said_as(gold, _begin(gold, completion)) for gold in golds)
    return Score(float(right), extracted=_begin(max(golds, key=_lines, default=""), completion))


def contains(golds: Sequence[str], completion: str) -> Score:
    """Ask whether the first line holds an accepted answer as whole words, after :func:`normalise_answer`.

    Of an accepted answer of several lines as many of the completion's first lines. An answer of which nothing is left
    (``The The``) must be the whole line, literally.
    """
    held = any(_holds(_begin(gold, completion), gold) for gold in golds)
    return Score(float(held), extracted=_begin(max(golds, key=_lines, default=""), completion))


def _holds(said: str, gold: str) -> bool:
    plain = normalise_answer(gold)
    return f" {plain} " in f" {normalise_answer(said)} " if plain else said == gold.strip()


def _begin(gold: str, completion: str) -> str:
    """Return as many of the first lines of a completion as an accepted answer has, of bounded length."""
    return first_lines(completion, _lines(gold))[:LINE_CHARACTERS]


def _said_as(gold: str, said: str) -> bool:
    plain = normalise_answer(gold)
    return said == first_lines(gold, _lines(gold)) or (bool(plain) and normalise_answer(said) == plain)


def numeric(golds: Sequence[str], completion: str) -> Score:
    """Compare the completion's number (:func:`number_form`) by value with that of each accepted answer.

    Values are exact, and forms do not matter: ``.5``, ``1/2`` and ``5e-1`` are equal. A percent sign is a unit, so that
    ``50%`` equals ``50`` and not ``0.5``. A form that is not understood (``12:30``, ``3-5``) is no number on either
    side. A completion without a number is wrong, not unscored; accepted answers without any are no answers.
    """
    said = number_form(completion)
    value = None if said is None else said.value
    extracted = "" if value is None else written(value)
    read = [_accepted(gold) for gold in golds]
    accepted = {form.value for form, why in read if form is not None and not why}
    unread = any(form is not None for form, why in read if why) and completion not in golds
    if accepted or (unread and value is not None):  # a number is none of the forms that are no number
        return Score(float(value is not None and value in accepted), extracted=extracted)
    return Score(None, extracted=extracted, reason=next((why for _, why in read), "there is no accepted answer"))


def _accepted(gold: str) -> tuple[Form | None, str]:
    """Return the form an accepted answer gives, and why it is no number; no reason where it is one."""
    form, several = _number_form(gold)
    shown = repr(gold if len(gold) <= SHOWN_CHARACTERS else f"{gold[:SHOWN_CHARACTERS]}...")
    if form is None:
        return None, f"the answer {shown} holds no number"
    if form.value is None:
        return form, f"the answer {shown} is no number that this scorer reads"
    return form, f"the answer {shown} holds several numbers" if several else ""


def math_verify(golds: Sequence[str], completion: str) -> Score:
    r"""Compare as mathematics with the math-verify package: ``1/2``, ``0.5`` and ``\frac{1}{2}`` are equal.

    Its time limit works through signals and so only in the main thread; elsewhere there is none, and therefore huge
    powers and factorials and masses of brackets, which may take for ever, are unscored everywhere; so are matrices
    given by their size, which may fill the memory.

    No text is executed: math-verify hands only digits, operators, points, spaces and brackets to sympy's
    ``parse_expr``, which uses ``eval``; everything else goes through a grammar of LaTeX.
    """
    try:
        from math_verify import parse, verify
    except ImportError:
        raise UserError("scorer math_verify needs math-verify: pip install peft-arena[eval]") from None

    text = completion[-MATH_CHARACTERS:]
    if _HUGE_POWER.search(text):
        return Score(None, reason="the completion holds a power or factorial too large to evaluate")
    if _FILLED_MATRIX.search(text):
        return Score(None, reason="the completion gives a matrix by its size")
    if sum(map(text.count, "([{")) > MATH_BRACKETS:
        return Score(None, reason=f"the completion opens more than {MATH_BRACKETS} brackets")
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it logs whole texts it cannot read
    seconds = MATH_SECONDS if threading.current_thread() is threading.main_thread() else None
    try:
        said = parse(text, parsing_timeout=seconds)
        if not said:
            return Score(0.0)
        accepted = [parse(_as_latex(gold), parsing_timeout=seconds) for gold in golds]
        if not any(accepted):
            return Score(None, extracted=str(said[-1]), reason="no accepted answer can be read as mathematics")
        right = any(verify(gold, said, timeout_seconds=seconds) for gold in accepted if gold)
        return Score(float(right), extracted=str(said[-1]))
    except Exception as error:  # noqa: BLE001 - sympy raises nearly anything on odd input; a score must not
        return Score(None, reason=f"math-verify failed: {type(error).__name__}: {str(error)[:200]}")


def last_box(text: str) -> str | None:
    r"""Return what stands in the last ``\boxed{...}`` of a text; None without one.

    Braces are balanced, and ``\{`` and ``\}`` are no braces. Of boxes in each other the inner one counts, and a box
    that is never closed, as where a text was cut off, is none.
    """
    found: tuple[int, str] | None = None
    opened: list[int | None] = []
    for token in _BOX_TOKEN.finditer(text):
        if token["box"]:
            opened.append(token.end())
        elif token["open"]:
            opened.append(None)
        elif token["close"] and opened:
            start = opened.pop()
            if start is not None and (found is None or start > found[0]):
                found = (start, text[start : token.start()])
    return None if found is None else found[1].strip()


def boxed(golds: Sequence[str], completion: str) -> Score:
    r"""Compare what stands in the completion's last ``\boxed{...}`` as mathematics (:func:`math_verify`).

    A completion without a box is wrong, whatever else it says. Asterisks around and a full stop after what stands in
    the box are dropped, of it and of an accepted answer. Of an accepted answer that has a box itself, as a whole
    solution does, what stands in its last one counts.
    """
    said = last_box(completion)
    if not said:
        return Score(0.0)
    if len(said) > BOX_CHARACTERS:
        return Score(0.0, extracted=said[:BOX_CHARACTERS])
    accepted = [_tidy(held if (held := last_box(gold)) is not None else gold) for gold in golds]
    judged = math_verify(accepted, f"\\boxed{{{_tidy(said)}}}")
    return replace(judged, extracted=said)


def _tidy(held: str) -> str:
    """Return what stands in a box without asterisks around it and a full stop after it, degrees as a circle."""
    return held.strip("* ").removesuffix(".").replace("\\degree", "^\\circ")


def _as_latex(gold: str) -> str:
    """Mark a bare expression as mathematics, as math-verify wants it; an escaped dollar sign marks nothing."""
    return gold if "$" in gold.replace("\\$", "") or "\\boxed" in gold else f"${gold}$"


WANTS: Mapping[str, str] = MappingProxyType(
    {
        "boxed": "reads the last \\boxed{...} of an answer, and an answer without one is wrong",
        "contains": "looks for the answer as whole words in as many first lines as it has",
        "exact_match": "compares the whole answer literally",
        "math_verify": "reads the answer as mathematics",
        "normalised_match": "compares as many first lines as the answer has, without case, punctuation and articles",
        "numeric": "compares the answer's number by value",
    }
)
"""What each scorer does with an answer, in a clause, for messages."""
GAMED_BY: Mapping[str, str] = MappingProxyType(
    {
        "contains": "an answer that lists many candidates in its first line has the full score if one of them is right",
    }
)
"""How answers can win a scorer without being right, for scorers of which a way is known; said where one is a reward."""

SCORERS: Registry[Scorer] = Registry(
    "scorer",
    {
        name: f"{__name__}:{name}"
        for name in ("boxed", "contains", "exact_match", "math_verify", "normalised_match", "numeric")
    },
)
"""The scorers a user may choose for data of their own."""
