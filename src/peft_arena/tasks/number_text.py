r"""How a text that may hold numbers is brought into plain form: digits of all scripts, signs, spaces, LaTeX.

What comes out has ASCII digits, ``-`` for every minus sign, ``/`` in every fraction, ``^`` before every exponent, one
kind of space and no LaTeX that is only typesetting. Commands that change a value (``\sqrt``) stay, to be refused.
"""

from __future__ import annotations

import html
import re
import unicodedata
from functools import cache

CURRENCY = "$€£¥₹₽₩₺₫₪฿₴₦₱¢"
_EDGE = "\u2063"
"""Marks where a fraction begins and ends, until it is known whether a digit stands beside it."""
_BESIDE_DIGIT = re.compile(f"(?<=[0-9]){_EDGE}(?=[0-9])")
_FRACTIONS = "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞↉"
_SPACES = "\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
_INVISIBLE = (
    "\u00ad\u200b\u200c\u200d\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2063\u2066\u2067\u2068\u2069\ufeff"
    "\ufe0e\ufe0f\u20e3"
)
_MINUS = "\u2010\u2011\u2012\u2013\u2212\ufe63\u02d7\u2796"
_APOSTROPHES = "\u2018\u2019\u02bc"
_OTHERS = {"\u2044": "/", "\u2215": "/", "\u066c": ",", "\u066b": ".", "\u066a": "%", "￥": "¥", "￡": "£", "⋅": "×"}
_OTHERS |= {"·": "×", "∙": "×", "✕": "×", "✖": "×", "∼": "~", "﹒": ".", "﹐": ",", "﹪": "%", "﹩": "$"}
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_RAISED = re.compile("[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_LOWERED = re.compile("[₀-₉]+")
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9A-Fa-f]{1,6}|[A-Za-z][A-Za-z0-9]{1,11});")
_FOREIGN_DIGIT = re.compile(r"(?![0-9])\d")

_NUMERAL = r"\s*([-+]?[0-9][0-9.,]*)\s*"
_FRACTION = re.compile(
    rf"(?P<before>[0-9]?)\\[cdt]?frac\s*(?:\{{{_NUMERAL}\}}\s*\{{{_NUMERAL}\}}|([0-9])\s*([0-9])|"
    rf"\{{{_NUMERAL}\}}\s*([0-9])|\s([0-9])\s*\{{{_NUMERAL}\}})"
)
_LATEX = (
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\!"), ""),
    (re.compile(r"\\\\"), "\n"),
    (re.compile(r"\\[,;: ]|\\q?quad(?![A-Za-z])"), " "),
    (re.compile(r"\\([$%#&_{}])"), r"\1"),
    (re.compile(r"\^\s*\{?\s*\\circ(?![A-Za-z])\s*\}?|\\degree(?![A-Za-z])"), "°"),
    (re.compile(r"\s*\\(?:times|cdot|ast)(?![A-Za-z])\s*"), " × "),
    (re.compile(r"\s*\\div(?![A-Za-z])\s*"), " ÷ "),
    (re.compile(r"\\pm(?![A-Za-z])"), "±"),
    (re.compile(r"\\leq?(?![A-Za-z])"), "≤"),
    (re.compile(r"\\geq?(?![A-Za-z])"), "≥"),
    (re.compile(r"\\neq?(?![A-Za-z])"), "≠"),
    (re.compile(r"\\(?:approx|sim)(?![A-Za-z])"), "≈"),
    (re.compile(r"\\(?:to|rightarrow|Rightarrow|implies|therefore)(?![A-Za-z])"), "→"),
    (re.compile(r"\\l?dots(?![A-Za-z])"), "..."),
    (re.compile(r"\\(?:euro|EUR)(?![A-Za-z])"), "€"),
    (re.compile(r"\\pounds(?![A-Za-z])"), "£"),
    (re.compile(r"\\[()\[\]]"), " "),
    (
        re.compile(
            r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt)|mbox|f?boxed|fbox|bf|rm|displaystyle|left|right|"
            r"[bB]igg?[lr]?)(?![A-Za-z])[ ]*"
        ),
        "",
    ),
)
_BASE_POWER = re.compile(r"(\^|\*\*) ?\{ ?([-+]?) ?([0-9]+) ?\}")


@cache
def _table() -> dict[int, str | None]:
    """Return what each character of other forms is in plain form."""
    table: dict[int, str | None] = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
    table |= {ord(sign): " " for sign in _SPACES} | {ord(sign): None for sign in _INVISIBLE}
    table |= {ord(sign): "-" for sign in _MINUS} | {ord(sign): "'" for sign in _APOSTROPHES}
    table |= {ord(sign): plain for sign, plain in _OTHERS.items()}
    for sign in _FRACTIONS:
        written = unicodedata.normalize("NFKC", sign).replace("\u2044", "/")
        table[ord(sign)] = f"{_EDGE}{written}{_EDGE}"
    return table


def plain_text(text: str) -> str:
    """Return a text in plain form; texts of the same numbers become alike, words stay as they are."""
    if "&" in text:
        text = _ENTITY.sub(lambda found: html.unescape(found[0]), text)
    if not text.isascii():
        text = _RAISED.sub(lambda found: f"^{found[0].translate(_SUPERSCRIPTS)}", text)
        text = _LOWERED.sub(lambda found: f"_{unicodedata.normalize('NFKC', found[0])}", text)
        text = _FOREIGN_DIGIT.sub(lambda found: str(unicodedata.decimal(found[0])), text.translate(_table()))
        text = _apart(text)
    if "\\" in text or "{" in text:
        text = _without_latex(text)
    return text


def _without_latex(text: str) -> str:
    for pattern, plain in _LATEX:
        text = pattern.sub(plain, text)
    return _apart(_BASE_POWER.sub(r"\1\2\3", _FRACTION.sub(_slashed, text)))


def _apart(text: str) -> str:
    """Put a space between a fraction and the digit before or behind it, and nothing elsewhere."""
    return _BESIDE_DIGIT.sub(" ", text).replace(_EDGE, "") if _EDGE in text else text


def _slashed(found: re.Match[str]) -> str:
    """Write a fraction of LaTeX with a slash, a digit before it as the whole part of a mixed number."""
    above, below = [part for part in found.groups()[1:] if part]
    return f"{found['before']}{_EDGE}{above}/{below}{_EDGE}"


CODES = "USD|EUR|GBP|JPY|CNY|RMB|INR|CHF|CAD|AUD|NZD|HKD|SGD|SEK|NOK|DKK|PLN|BRL|MXN|ZAR|KRW|TRY|RUB|Rs|RM|Rp|Fr|kr"
_TENS = "twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety"
_COUNTS = (
    f"one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen|{_TENS}"
)
_SCALES = (
    "hundreds?|thousands?|[mbt]r?illions?|dozens?|lakhs?|lacs?|crores?|mn|bn|tn|mln|bln|mio|mrd|"
    "millionen|billionen|milliard(?:e|en|s|er)?|tsd|hundert|tausend|dutzend|mil|mils|mille|mila|mill|thou|grand|"
    "score|gross|mill[oó]n(?:es)?|bill[oó]n(?:es)?|trill[oó]n(?:es)?|milh(?:ão|ões|ao|oes)|[bt]ilh(?:ão|ões|ao|oes)|"
    "milion[ei]?|milion(?:y|ów)|miliard[iaoy]?|miliardów|bilion[ei]?|milj(?:oen|ard|on|oner|arder)|mia|mld|"
    "centaines?|milliers?|millares|cientos|centinaia|douzaines?|doz|cr|docenas?|dúzias?|dozzin[ae]|dozijn|"
    "duizend|honderd|"
    "hundra|tusen|tusind|hundrede|tys|tysi[aą]c[ey]?|tysięcy|тыс|тысяч[аи]?|млн|млрд|миллион(?:а|ов)?|"
    "миллиард(?:а|ов)?|сот(?:ни|ен)?"
)
_SHARES = (
    rf"(?:(?:{_COUNTS})[ -])?(?:half|halfs|halves|quarters?|thirds?|"
    "(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|(?:thir|four|fif|six|seven|"
    "eigh|nine)teen|(?:twen|thir|for|fif|six|seven|eigh|nine)tie|hundred|thousand|[mb]illion)ths?|halbe?s?|"
    "drittel|viertel|fünftel|sechstel|siebtel|achtel|neuntel|zehntel|hundertstel|tausendstel|demie?s?|"
    "[a-z]+(?:-[a-z]+)?ièmes?|[a-z]+[eéè]sim[oaie]s?|medios?|tercios?|cuartos?|quintos?|d[eé]cim[oi]s?|"
    "mezz[oaie]|terzi|quart[io])"
)
_CHANGES = (
    "squared|cubed|factorial|doubled|tripled|halved|repeating|recurring|periodi(?:c|sch)|minus|plus|mod|modulo|"
    r"point(?= [0-9A-Za-z])|to the (?:power|[0-9]+\w*|second|third|\w+th|\w+ power)|choose (?=[0-9])|"
    r"negative(?=[^\w\s]*(?:\Z|\n))"
)
UNREAD_BEHIND = re.compile(
    rf"(?:(?:-|[ \t*_{{}}$\"')]{{0,6}})(?:{_CHANGES}|{_SCALES}|{_SHARES})|"
    rf"[ ]?(?:[{re.escape(CURRENCY)}]|{CODES})[ ]?(?:{_SCALES})|[ ]?\((?:{_CHANGES}|{_SCALES}|{_SHARES})\)|"
    rf" (?:and|&) (?:an? )?(?:{_COUNTS}|{_SCALES}|{_SHARES})|[ ]?[kMTGB](?:EUR|USD|GBP|CHF))(?![^\W\d_])|"
    rf"[ ]?(?:[{re.escape(CURRENCY)}]|{CODES})(?:-(?![\w(])| -\W*\Z)|[.,]-+(?![\w(])|,—|"
    r"[ ]-\s*\Z|[ ]?[十百千万萬亿億兆만억천조]|[\u0300-\u036f\u20d0-\u20ff]|"
    r"[^\w\n.,;]{0,3}(?:degrees?|°|[CF]| ){0,6}(?:(?:below|under) zero|below(?=\W*\Z)|unter null|"
    r"sous zéro|bajo cero|sotto zero|abaixo de zero)(?![^\W\d_])",
    re.IGNORECASE,
)
"""Directly behind digits: words that scale, divide or change a number, and signs of other countries. Scales and shares
that are read by value are looked for first."""
COUNT_BEHIND = re.compile(rf",?[ -](?:and )?(?:{_COUNTS}|{_SCALES})(?![^\W\d_])", re.IGNORECASE)
"""Behind a scale: its number goes on in words."""
SHARED_SCALE = re.compile(rf" (?:of )?(?:an? |the )(?:{_SCALES})(?![^\W\d_])", re.IGNORECASE)
_FUNCTIONS = r"(?:arc|ar|a)?(?:sin|cos|tan|cot)h?|log|ln|lg|exp|sqrt|cbrt|root"
_SHARES_BEFORE = "half|halb|quarters?|thirds?|(?:four|fif|six|seven|eigh|nin|ten|hundred|thousand)ths?"
UNREAD_BEFORE = re.compile(
    rf"(?<![^\W\d_])(?:(?:{_FUNCTIONS})(?:[_^]\{{?-?[0-9a-z]{{1,3}}\}}?|[0-9]{{1,2}})?|(?:roots?|"
    r"cube|square|factorial|negative|minus|"
    r"opposite|inverse|reciprocal|logarithm|log|sine|cosine|tangent|absolute value|double|triple)[ ]of(?:[ ]the)?|"
    rf"factorial|(?:{_SHARES_BEFORE}|hundreds?|thousands?|[mbt]r?illions?|dozens?)(?:[ ]and|[ ]of|[ ]past)?|{_TENS}|"
    r"quarter[ ]to|twice|double|triple|thrice|plus(?:[ ]or)?|times|"
    r"(?:divided|multiplied)[ ]by|to[ ]the[ ]power(?:[ ]of)?|mod|modulo|point|komma|comma|virgule|vírgula|virgola|coma|"
    r"moins|menos|meno|negativ|minus|negative|мінус|минус|neg)\s+(?:an?\s+)?[(\[{*_$]*\Z|"
    r"(?<![^\W\d_])(?:minus|negative)[^\w\n.,;!?]+\Z|\([-+]\)\s*\Z|[-+][ ]?[(\[{]+[ ]?[-+]?\Z|"
    r"(?<!-)-[ \t]*\n\s*\Z|[⁻₋]\s*\Z|"
    rf"(?:\A|[^\w)\]}}.,;%*\"'])[-+]?[{re.escape(CURRENCY)}]?[ ]?,\Z",
    re.IGNORECASE,
)
"""Directly before digits: functions, fractions, scales and signs that are not read by value."""
