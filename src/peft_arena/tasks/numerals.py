r"""Reading numbers by value: ``.5``, ``1/2``, ``1e3``, ``2 1/2``, ``1,00,000`` and their kin, as exact fractions.

A text is cut into forms. A form is a run of digits with everything that belongs to its value: sign, grouping, exponent,
the other half of a fraction, the other end of a range. A form has a value, or it is one that is not understood
(``12:30``, ``3-5``, ``2024-05-01``, ``1,23``, ``1e999``), and then no part of it is ever read as a number.

Where forms differ between countries the English reading counts (``1.000`` is one), or none (``1,23``). A percent sign
is a unit like any other: ``50%`` is 50, and neither ``0.5`` nor ``1/2`` equals it. Words that scale are read
(``3 million``, ``5k``, ``2 dozen``); those that may scale are not understood (``5M``).
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from peft_arena.tasks.number_text import (
    CODES,
    COUNT_BEHIND,
    CURRENCY,
    SHARED_SCALE,
    UNREAD_BEFORE,
    UNREAD_BEHIND,
    plain_text,
)

LARGEST_EXPONENT = 300
"""A number with a larger power of ten, or more digits, is not understood: nothing of it is computed."""
FEW_WORDS = 4
"""A text with more words beside its numbers is a sentence, and its last number is meant."""
SEARCHED_CHARACTERS = 4000
"""Only the end of a longer text is searched for numbers."""


class Form(NamedTuple):
    """One form of a text."""

    value: Fraction | None
    """None: the form is not understood."""
    start: int
    end: int
    """Where it stands in the text in plain form (:func:`plain_text`)."""
    text: str
    """The form as found there."""


_RUN = re.compile(
    r"(?:[0-9]++(?:[.,:'_][0-9]++)*+(?: [0-9]++(?:[.,:'_][0-9]++)*+(?! ?/ ?[0-9]))*+|\.[0-9]++(?:[.,:'_][0-9]++)*+)"
    r"(?:\.?[eE][-+]?[0-9]++)?"
)
_DECIMAL = re.compile(
    r"(?P<whole>[1-9][0-9]{0,2}(?:,[0-9]{3})+|[1-9][0-9]?(?:,[0-9]{2})+,[0-9]{3}|[1-9][0-9]{0,2}(?:'[0-9]{3})+|"
    r"[1-9][0-9]{0,2}(?:_[0-9]{3})+|[1-9][0-9]{0,2}(?: [0-9]{3})+|[0-9]+)?"
    r"(?:\.(?P<fraction>[0-9]*))?(?:[eE](?P<exponent>[-+]?[0-9]+))?"
)
_GROUPING = str.maketrans("", "", ",'_ ")

_BARE = re.compile(r"\s*([-+]?[0-9]{1,15}(?:\.[0-9]{1,15})?)\s*", re.ASCII)
_CUT_WORD = re.compile(r"^[\w.,:'^*/+-]+", re.ASCII)
_NEXT = re.compile(r"[,;&]|\band\b")
_WORDS = re.compile(r"[^\W\d_]{2,}")
_STATED = re.compile(
    r"\banswers?(?:\s+(?:is|are|was|equals?|(?:would|must|should)\s+be|comes?\s+to|to\s+\w+(?:\s\w+)?\s+is)|\s*[:=])+"
    r"(?:\s+(?:about|approximately|around|exactly|simply|just|only|indeed|therefore|thus|now|equal\s+to))*[\s:=≈~*_{(\[\"']*\Z",
    re.IGNORECASE,
)
_STATED_CHARACTERS = 100
_EQUALS = re.compile(r"[^\w\n]{0,12}=\s*[^\w\n]{0,4}")
_CORRECTED = re.compile(
    r"\b(?:wait|actually|correction|corrected|sorry|oops|mistake|hmm|instead)\b|\bno[,.:]|\blet me\b", re.IGNORECASE
)

# What may stand between two runs of one form.
_SLASH = re.compile(r" ?/ ?")
_POWER = re.compile(r"( ?)(?:\^|\*\*)\1(?:\( ?)?([-+]?)")
_TIMES = re.compile(r" ?[*×xX] ?")
_FRACTION_FOLLOWS = re.compile(r" ?/ ?[0-9]")
_SPACE = r"[ \t]*"
_OPENS = rf"[-+(\[{{{re.escape(CURRENCY)} ]*"
_LINK = re.compile(
    rf"[)\]}}%°'\"{re.escape(CURRENCY)}]*{_SPACE}(?:[-+*/×÷^±~—∶xX]|\.+|…| : | (?:plus|minus|times|divided by|"
    rf"multiplied by|over|to|or|out of|"
    rf"mod|choose|to the|to the power(?: of)?|raised to) |[eECP][ ]?[-+]?){_SPACE}{_OPENS}|"
    rf"[(\[{{][-+]?|[)\]}}][(\[{{][-+]?|[}})][0-9^]*[-+*/^×]\(?|"
    r"\.?[\u0300-\u036f\u20d0-\u20ff]|[年月日時时分秒点點万萬億亿千百]"
)
_LINK_CHARACTERS = 24
_PARTS = (
    "years?|yrs?|months?|weeks?|days?|hours?|hrs?|h|minutes?|mins?|m|seconds?|secs?|s",
    "feet|foot|ft|'|inches|inch|in|yards?|yd|\"",
    "kilometers?|kilometres?|km|meters?|metres?|m|centimeters?|centimetres?|cm|millimeters?|millimetres?|mm",
    "dollars?|euros?|pounds?|cents?|pence|francs?|rupees?|paise|yuan|jiao",
    "pounds?|lbs?|ounces?|oz|stones?|st|kilograms?|kilos?|kg|grams?|g",
    "gallons?|quarts?|pints?|cups?|liters?|litres?|l|milliliters?|millilitres?|ml",
)
_COMPOUND = tuple(
    (
        re.compile(rf"[ ]?(?:{units})\.?,?(?:[ ]and)?[ ]?", re.IGNORECASE),
        re.compile(rf"[ ]?(?:{units})(?![A-Za-z])", re.I),
    )
    for units in _PARTS
)
_MONEY_PARTS = re.compile(r" and ")
_SMALL_MONEY = re.compile(r"[ ]?(?:cents?|pence|paise|¢)(?![A-Za-z])", re.IGNORECASE)

# What stands before a form.
_BEFORE_CHARACTERS = 40
_OPENERS = "([{*_\"'`"
_SIGNED = re.compile(
    rf"(?:(?P<outer>[-+])(?P<gap>[ \t]{{0,8}}))?(?:(?P<currency>(?<![A-Za-z])[A-Z]{{0,3}}[{re.escape(CURRENCY)}]|"
    rf"(?<![A-Za-z])(?:{CODES})\.?)[ ]?)?(?:(?P<inner>[-+])(?P<space>[ \t]{{0,8}}))?\Z"
)
_MINUS_WORD = re.compile(r"(?:^|[^A-Za-z])(?:minus|negative)[ ]+\Z", re.IGNORECASE)
_NEGATED = re.compile(r"(?:\bnot|n't)\s+(?:exactly\s+|equal\s+to\s+)?\Z", re.IGNORECASE)
_BOUND = re.compile(
    r"\b(?:more|less|fewer|greater|larger|smaller|higher|lower|bigger|rather)\s+than\s+\Z|\bat\s+(?:least|most)\s+\Z|"
    r"\bup\s+to\s+\Z",
    re.IGNORECASE,
)
_SIGN_MAY_FOLLOW = re.compile(
    r"(?:^|[=:(<\[{|≈→*\"'])\Z|\b(?:is|are|be|was|were|equals?|gives?|gets?|yields?|answer)\Z", re.IGNORECASE
)
_TAG_OR_ARROW = re.compile(r"(?:<[^<>\n]*|[-=>])>\Z")
_BETWEEN = re.compile(r"\bbetween\s+\S{0,2}\Z", re.IGNORECASE)

# What stands behind a form.
_LETTERS = re.compile(r"[^\W\d_]+")
_SCALES = {
    "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12,
    "lakh": 10**5, "lac": 10**5, "crore": 10**7, "mn": 10**6, "bn": 10**9, "tn": 10**12, "k": 1000, "mio": 10**6,
    "mrd": 10**9, "mln": 10**6, "bln": 10**9,
}  # fmt: skip
_SCALE = re.compile(rf"(?:-|[ \t]{{0,4}})((?i:{'|'.join(name for name in _SCALES if name != 'k')})|k)s?(?![A-Za-z])")
_ATTACHED_SCALES = _SCALES | {"K": 1000}
_MONEY_SCALES = _ATTACHED_SCALES | {"m": 10**6, "M": 10**6, "b": 10**9, "B": 10**9, "t": 10**12, "T": 10**12}
_MONEY_SCALES |= {"MM": 10**6}
_SHORT = re.compile(
    rf"(?P<gap>[ ]?)(?P<word>[kKmMbBtT]|MM|mm)(?![^\W_]|[/^])"
    rf"(?P<behind>[ ]?(?:[{re.escape(CURRENCY.replace('$', ''))}]|(?:{CODES}|euros?|dollars?)(?![A-Za-z])))?"
)
_CLOSED = re.compile(r"[ ]?[^\s$]{0,16}\$(?![0-9])")
"""What began with a dollar sign is mathematics, not money."""
_HAN_SCALES = {"百": 100, "千": 1000, "万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}
_MAY_SCALE = frozenset("MBGTP")
_NO_UNITS = frozenset("xyznqijeEXYZπθαβλμρφω") | {"pi", "am", "pm", "AM", "PM"}
"""Behind a number these are variables, exponents without digits, or times of day."""
_PART_WORD = re.compile(
    r"[ -](?:[ap]\.?m|o'clock|hal(?:f|ves)|thirds?|(?:four|fif|six|seven|eigh|nin|ten|hundred|thousand|million)ths?)"
    r"(?![A-Za-z])",
    re.IGNORECASE,
)
_AND_PART = re.compile(
    r" and (?:(?P<half>(?:a |one )?half)|(?P<three>three quarters)|(?:(?:a|one) quarter))(?![A-Za-z])"
)
_RAISED_UNIT = re.compile(r"\^\{?(?:th|st|nd|rd|o|°)\}?(?![A-Za-z])")
_GOES_ON = re.compile(
    r"\s?\\[A-Za-z]|[ ]?(?:√|∛|π|pi(?![A-Za-z]))|_\w|\+|-(?:\s|\Z)|[ ]?[+*×][ ]?(?:[b-zB-HJ-Z](?![A-Za-z])|\(|√|π)|"
    r"[ ]?[-/][ ]?[xyzn](?![A-Za-z])|\^"
)


def written(value: Fraction) -> str:
    """Return a value in canonical form: a decimal number where it has an end, else numerator and denominator."""
    rest, twos, fives = value.denominator, 0, 0
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    places = max(twos, fives)
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    sign = "-" if value < 0 else ""
    return f"{sign}{digits[:-places]}.{digits[-places:]}" if places else f"{sign}{digits}"


class Forms(NamedTuple):
    """The forms of a text, in order."""

    plain: str
    """The text in plain form (:func:`peft_arena.tasks.number_text.plain_text`), only the end of a long one."""
    found: list[Form]
    """Digits inside of words (``B12``) and negated numbers (``not 5``) are no forms."""

    def answer(self) -> Form | None:
        """Return the form that the text gives as its answer; None without any.

        That is the one directly behind the last ``answer is``, ``answer:`` or ``answer =``, and of an equation there
        its last side, unless a word like ``wait`` or ``actually`` comes later; else the last form of the text.
        """
        stated = self._stated()
        return stated if stated is not None or not self.found else self.found[-1]

    def undecided(self) -> bool:
        """Say whether a short text has several forms and nothing that says which is meant: ``3 and 5``, ``(3, 4)``."""
        if len(self.found) < 2 or self._stated() is not None:
            return False
        if self.found[-2].value == self.found[-1].value:
            return False
        gap = self.plain[self.found[-2].end : self.found[-1].start]
        if gap.rstrip(f" {CURRENCY}").endswith("=") and not _NEXT.search(gap):
            return False
        edges = [0, *(edge for form in self.found for edge in (form.start, form.end)), len(self.plain)]
        beside = " ".join(self.plain[edges[place] : edges[place + 1]] for place in range(0, len(edges), 2))
        return len(_WORDS.findall(beside)) <= FEW_WORDS

    def _stated(self) -> Form | None:
        if "answer" not in self.plain.lower():
            return None
        for place in reversed(range(len(self.found))):
            start = self.found[place].start
            if not _STATED.search(self.plain[max(0, start - _STATED_CHARACTERS) : start]):
                continue
            while place + 1 < len(self.found) and _EQUALS.fullmatch(
                self.plain, self.found[place].end, self.found[place + 1].start
            ):
                place += 1
            return None if _CORRECTED.search(self.plain, self.found[place].end) else self.found[place]
        return None


def find_forms(text: str) -> Forms:
    """Return every form of a text. Total: any text gives some or none, in bounded time."""
    if bare := _BARE.fullmatch(text):
        return Forms(text, [Form(Fraction(bare[1]), bare.start(1), bare.end(1), bare[1])])
    if len(text) > SEARCHED_CHARACTERS:
        text = _CUT_WORD.sub("", text[-SEARCHED_CHARACTERS:])
    plain = plain_text(text)
    runs = [(found.start(), found.end()) for found in _RUN.finditer(plain)]
    forms: list[Form] = []
    place = 0
    while place < len(runs):
        first, last, shape = place, place, "n"
        while last + 1 < len(runs) and (joint := _joint(plain, runs, last)):
            last, shape = last + 1, f"{shape}{joint}n"
        place = last + 1
        found = _form(plain, runs[first : last + 1], shape)
        if found is not None:
            forms.append(found)
    return Forms(plain, [_accounted(plain, forms[0])] if len(forms) == 1 else forms)


def _form(plain: str, runs: list[tuple[int, int]], shape: str) -> Form | None:
    """Return the form that some runs make; None if they are part of a word, or said not to be the number."""
    start, end = runs[0][0], runs[-1][1]
    before = _before(plain, start)
    if before is None:
        return None
    value = None if before.sign == 0 else _value(shape, [_decimal(plain[a:b]) for a, b in runs])
    after = _after(plain, end, money=before.money) if value is not None else None
    if value is None or after is None:
        return Form(None, before.start, end, plain[before.start : end])
    if before.sign < 0 and plain[before.start - 1 : before.start] == plain[after.end : after.end + 1] == "|":
        return Form(None, before.start, after.end, plain[before.start : after.end])
    value = before.sign * (value * after.factor + after.more)
    return Form(value, before.start, after.end, plain[before.start : after.end])


def _decimal(run: str) -> Fraction | None:
    """Return the value of one run of digits; None if it is not understood."""
    found = _DECIMAL.fullmatch(run)
    if found is None or len(run) > LARGEST_EXPONENT:
        return None
    whole, fraction = (found["whole"] or "").translate(_GROUPING), found["fraction"] or ""
    exponent = found["exponent"] or "0"
    if len(exponent) > 5 or abs(int(exponent)) > LARGEST_EXPONENT:
        return None
    return Fraction(int(whole + fraction)) * Fraction(10) ** (int(exponent) - len(fraction))


def _joint(plain: str, runs: list[tuple[int, int]], place: int) -> str:
    """Return how a run and the next belong together; empty if they do not.

    That is ``/``, ``^``, ``m`` (an exponent with a minus sign), ``x``, a space before a fraction, or ``o`` for others.
    """
    start, end = runs[place][1], runs[place + 1][0]
    if end - start > _LINK_CHARACTERS:
        return ""
    if start == end:
        return "o"
    gap = plain[start:end]
    if _SLASH.fullmatch(gap):
        return "/"
    if power := _POWER.fullmatch(gap):
        return "m" if power[2] == "-" else "^"
    if _TIMES.fullmatch(gap):
        return "x"
    if (gap == " and " or not gap.strip(" ")) and _FRACTION_FOLLOWS.match(plain, runs[place + 1][1]):
        return " "
    if _LINK.fullmatch(gap) or _compound(plain, gap, runs[place], runs[place + 1][1]):
        return "o"
    return ""


def _compound(plain: str, gap: str, run: tuple[int, int], end: int) -> bool:
    """Say whether two runs are one quantity in two units (``2 hours 30 minutes``), or the ends of a range."""
    if gap == " and ":
        before = plain[max(0, run[0] - _BEFORE_CHARACTERS) : run[0]]
        return bool(_BETWEEN.search(before)) or bool(_SMALL_MONEY.match(plain, end))
    return any(first.fullmatch(gap) and second.match(plain, end) for first, second in _COMPOUND)


def _value(shape: str, parts: list[Fraction | None]) -> Fraction | None:
    """Return the value of runs that are joined in one of the shapes understood; else None."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    if shape == "n":
        return known[0]
    if shape == "n/n":
        return known[0] / known[1] if known[1] else None
    if shape == "n n/n":
        whole, above, below = known
        proper = all(part.denominator == 1 for part in known) and 0 < above < below
        return whole + above / below if proper else None
    if shape in ("n^n", "nmn"):
        return _power(known[0], known[1], negative=shape == "nmn")
    if shape in ("nxn^n", "nxnmn") and known[1] == 10:
        power = _power(known[1], known[2], negative=shape == "nxnmn")
        return None if power is None else known[0] * power
    return None


def _power(base: Fraction, exponent: Fraction, *, negative: bool) -> Fraction | None:
    """Return a power of bounded size; None beyond, and for exponents that are no whole number."""
    digits = max(len(str(abs(base.numerator))), len(str(base.denominator)))
    if exponent.denominator != 1 or exponent > LARGEST_EXPONENT or exponent * (digits - 1 or 1) > LARGEST_EXPONENT:
        return None
    if negative and not base:
        return None
    return base ** (-int(exponent) if negative else int(exponent))


class _Before(NamedTuple):
    """What stands before a form and belongs to it."""

    sign: int
    """1 or -1; 0: it makes the form one that is not understood."""
    start: int
    money: bool = False


def _before(plain: str, start: int) -> _Before | None:
    """Read sign and currency before a form; None where its digits are part of a word, or negated."""
    refused = _Before(0, start)
    place = start
    while place and plain[place - 1] in _OPENERS:
        place -= 1
    last = plain[place - 1] if place else ""
    if place < start:
        if plain[place] == "_" and (last.isalnum() or last in ")]}"):
            return None
        if (plain[place] in "([{*" and (_lettered(last) or last in tuple(")]}"))) or plain[place : place + 2] == "^(":
            return refused
    window = plain[max(0, place - _BEFORE_CHARACTERS) : place]
    found = _SIGNED.search(window)
    assert found is not None  # every part of the pattern is optional
    money = bool(found["currency"])
    if not money and place == start and _lettered(last):
        return refused if plain[start] == "." else None
    prior = window[: found.start()]
    sign = found["outer"] or found["inner"]
    if found["outer"] and found["inner"]:
        return refused
    if sign:
        judged = _sign(prior, found["gap"] if found["outer"] else found["space"])
        if judged is None:
            return None
        if not judged:
            return refused
    head = prior if sign or money else window
    if UNREAD_BEFORE.search(head if sign else _MINUS_WORD.sub(" ", head)) or (not sign and _long_minus(head)):
        return refused
    if _MINUS_WORD.search(head):
        sign = "-" if not sign else ""
        if not sign:
            return refused
    if _NEGATED.search(head):
        return None
    tail = head.rstrip(" \t")
    if (
        tail.endswith(("<", "≤", "≥", "≠", "√", "∛", "∜", "!=", "<=", ">=", "/", "±"))
        and not tail.endswith(("<<", "</"))
    ) or (tail.endswith(">") and not _TAG_OR_ARROW.search(tail)):
        return refused
    if tail.endswith("^") or (tail.endswith("_") and not sign):
        return None
    if _BOUND.search(head) or (tail and tail == head and tail[-1] == "." and tail[-2:-1].isalpha() and not money):
        return refused
    return _Before(-1 if sign == "-" else 1, max(0, place - _BEFORE_CHARACTERS) + found.start(), money)


def _sign(prior: str, gap: str) -> bool | None:
    """Say whether a sign is one, by what stands before it; None where it joins a word (``COVID-19``)."""
    last = prior[-1:]
    if _lettered(last) or last == "^":
        return None if not gap else False
    if last and (last in "-+)]}±." or last.isdigit()):
        return False
    if not gap:
        return True
    return bool(_SIGN_MAY_FOLLOW.search(prior.rstrip(" \t")))


def _long_minus(head: str) -> bool:
    """Say whether a long dash before a number may be its minus sign, as it is not behind a word."""
    dash = head.rstrip(" \t")
    prior = dash[:-1].rstrip(" \t") if dash != head else dash[:-1]
    return dash.endswith(("—", "―")) and (not prior[-1:].isalnum() or bool(_SIGN_MAY_FOLLOW.search(prior)))


def _lettered(sign: str) -> bool:
    """Say whether a character is a letter of a script that puts spaces between words."""
    return sign.isalpha() and sign < "\u0530"


class _After(NamedTuple):
    """What stands behind a form and belongs to its value."""

    factor: int
    end: int
    more: Fraction = Fraction(0)


def _after(plain: str, end: int, *, money: bool) -> _After | None:
    """Read scale words behind a form; None where something there makes it one that is not understood."""
    factor = 1
    money = money and not _CLOSED.match(plain, end)
    if short := _SHORT.match(plain, end):
        word = short["word"]
        if money or short["behind"]:
            if word == "mm" or (not money and word not in "KkMB"):
                return None
            factor, end = _MONEY_SCALES[word], short.end("word")
        elif short["gap"] and word in ("M", "B", "K", "MM"):
            return None
    letters = _LETTERS.match(plain, end)
    if letters and factor == 1:
        word = letters[0]
        hexadecimal = plain[end - 1] == "0" and word[0] in "xX"
        if plain[letters.end() : letters.end() + 1].isdigit() or word in _NO_UNITS or hexadecimal:
            return None
        scales = _MONEY_SCALES if money else _ATTACHED_SCALES
        if word in scales:
            factor, end = scales[word], letters.end()
        elif word in _MAY_SCALE:
            return None
        elif word[0] in _HAN_SCALES:
            for sign in word:
                if sign not in _HAN_SCALES:
                    break
                factor, end = factor * _HAN_SCALES[sign], end + 1
        if factor == 1 and not UNREAD_BEHIND.match(plain, end) and not _SCALE.match(plain, end):
            return None if plain[letters.end() : letters.end() + 1] == "_" else _After(1, end)
    scaled = factor > 1
    for _ in range(3):
        scale = _SCALE.match(plain, end)
        if scale is None:
            break
        factor, end, scaled = factor * _SCALES[scale[1].lower()], scale.end(), True
    if UNREAD_BEHIND.match(plain, end) and not _AND_PART.match(plain, end):
        return None
    if (scaled and COUNT_BEHIND.match(plain, end)) or (not money and SHARED_SCALE.match(plain, end)):
        return None
    if _PART_WORD.match(plain, end):
        return None
    if part := _AND_PART.match(plain, end):
        share = Fraction(1, 2) if part["half"] else Fraction(3 if part["three"] else 1, 4)
        return None if UNREAD_BEHIND.match(plain, part.end()) else _After(factor, part.end(), share * factor)
    if _GOES_ON.match(plain, end) and not _RAISED_UNIT.match(plain, end):
        return None
    return _After(factor, end)


def _accounted(plain: str, form: Form) -> Form:
    """Judge a form that is the whole text but for round brackets around it.

    With a currency it is a negative amount, as in accounts; else it may be one, and is not understood.
    """
    whole = plain.strip()
    bracketed = whole.endswith(")") and whole.startswith(("(", *(f"{sign}(" for sign in CURRENCY)))
    inside = whole.rstrip(")").lstrip(f"({CURRENCY} ")
    if not bracketed or form.value is None or form.value <= 0 or not re.fullmatch(r"[0-9][0-9.,]*", inside):
        return form
    money = any(sign in whole for sign in CURRENCY)
    return form._replace(value=-form.value if money else None, text=whole)
