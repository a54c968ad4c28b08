"""Where a text names options by their letters: every mention is marked, and what only looks like one is not.

Articles (``A vitamin``), pronouns (``I think``), initials (``Dr. A. Smith``), species (``C. difficile``) and compounds
(``vitamin C``, ``B cells``, ``A-level``) are no mentions. Small letters are mentions where they can be nothing else: as
the whole answer, as its label, in brackets, and behind ``answer`` or ``option``.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

LETTERS = "ABCDEFGHIJ"
"""Letters that options can have."""
_FIRST = 0xE000
"""Mentions are marked by characters of a private area, which are taken out of the text before."""
MARKS = f"[{chr(_FIRST)}-{chr(_FIRST + len(LETTERS) - 1)}]"
_PRIVATE = re.compile("[\ue000-\uf8ff\u200b-\u200f\u2060\ufeff\u00ad]")
_SPACES = re.compile(r"[^\S\n]+")
_STRUCK = re.compile(r"~~[^~\n]{1,200}~~|<(del|s|strike)>[^<\n]{1,200}</\1>")
_SHORT_IS = re.compile(
    r"(?<![A-Za-z0-9])([A-J])['\u2019]s (?=(?:not |definitely |clearly |the |also )?"
    r"(?:wrong|incorrect|false|out|right|correct|"
    r"true|best|answer|better|worse)\b)"
)
_WRAP = re.compile(r"\\(?:text(?:bf|it|rm|sf|tt)?|math(?:rm|bf|it|sf)|bf|rm|displaystyle|left|right)(?![A-Za-z]) ?")
_DECORATION = re.compile(r"[*`$]|(?<![A-Za-z0-9])_+|_+(?![A-Za-z0-9])|</?[a-z]{1,8}>|[\"\u201c\u201d\u00ab\u00bb]")
_QUOTED = re.compile(r"['\u2018\u2019\u300c\u300d]([A-Ja-j])['\u2018\u2019\u300c\u300d]")
_LATIN = "A-Za-z0-9\u00c0-\u024f"

_ONLY_LETTERS = re.compile(r"(?:\W*\b(?:[a-j]|and|or|but|not|nor|neither|either|both)\b\W*)+")
_LETTER = re.compile(r"\b[a-j]\b")
_LABEL = re.compile(r"\A\s*[(\[{]?([a-j])(?:[)\]}:]|\.(?=\s|\Z))(?=\s*\S)")
_BRACKETED = re.compile(r"[(\[{]([a-j])[)\]}](?![A-Za-z])")
_NAMED = re.compile(
    r"\b(?:answers?|ans|options?|choices?|letters?)(?: (?:is|are|was|choice|option|letter|would be|must be))*[ :=-]*"
    r"(?:(?:not|either|both|neither|option|choice|the) )*[(\[{]?([a-j])[)\]}]?"
    r"((?:(?: ?[,/&] ?| (?:or|and|nor|but|but not) )[(\[{]?[a-j][)\]}]?(?![A-Za-z0-9']))*)"
    r"(?= ?(?:[.,;:!?\n]|\Z|because\b|since\b|and\b|or\b|but\b|is\b))",
    re.IGNORECASE,
)

_FOLLOWS_A = (
    "because|since|as|is|was|are|were|be|due|and|or|but|nor|not|would|will|seems|makes|fits|matches|describes|which|"
    "with|"
    "can|cannot|could|should|may|might|must|has|have|had|does|do|did|looks|appears|remains|over|than|rather|instead|"
    "if|so|"
    "vs|versus|too|also|alone|only|in|on|at|for|to|from|by|of|when|while|though|although|unless|explains|states|says|shows|"
    "contains|refers|represents|causes|leads|gives|wins|works|sounds|feels|then|over|isn|doesn|wasn|contradicts|fails|"
    "est|ist|es|oder|ou|und|et|y|o|i"
)
_NOUNS = (
    "vitamins?|hepatitis|types?|groups?|grade|stages?|factors?|figure|fig\\.|table|influenza|protein|class|team|plan|"
    "appendix|schedule|strain|category|level|immunoglobulin|chapter|section|exhibit|titles?|blood|degrees?"
)
_TITLES = r"(?:Dr|Mr|Mrs|Ms|Prof|Sir|St|Professor|Doctor|Miss)\.? "
_STARTERS = (
    "Answer|Option|Choice|Letter|So|Therefore|Thus|Hence|Pick|Choose|Select|Correct|Final|Definitely|Probably|Clearly|"
    "Obviously|Maybe|Perhaps|Actually|Likely|Say|It|Is|Not|Only|Both|Either|Neither|And|Or|But|Then|Finally|Solution"
)
_MENTION = re.compile(
    rf"(?<![{_LATIN}'\u2019+#])(?<![{_LATIN}][-.])[(\[{{<]?(?P<letter>[A-J])(?P<close>[)\]}}>]?)"
    rf"(?![{_LATIN}'\u2019+#]|-[A-Za-z]|\.[A-Za-z]\b)"
)
_NOT_BEFORE = re.compile(rf"(?:\b(?:{_NOUNS}) |° ?|[0-9] )\Z", re.IGNORECASE)
_NOT_BEHIND = re.compile(r" (?:cells?|lymphocytes?|fib(?:er|re)s?|major|minor|flat|sharp|chromosomes?)\b")
_INITIAL = re.compile(r"\. ?(?:[A-Z][a-z]|[A-Z]\.)")
_NAME_BEFORE = re.compile(rf"(?:{_TITLES}|(?<![A-Za-z])(?!(?:{_STARTERS}) )[A-Z][a-z]+ |[A-Z]\. ?)\Z")
_SPECIES = re.compile(r"\. [a-z]{4,}")
_MAY_BE_LABELLED = re.compile(
    rf"(?:\A|\n|[:=(>\"\u3002\uff0c,;-]|\b(?:is|are|be|answer|option|choice|letter|{MARKS}))\s*\Z", re.I
)
_ARTICLE = re.compile(rf" (?!(?:{_FOLLOWS_A})\b|[a-z]{{2,}}[^suia]s\b)[a-z]")
"""An ``A`` before a word in small letters, unless no noun can begin there; verbs of the third person end in s."""
_NAMING = re.compile(r"\b(?:option|choice|letter|answer|pick|choose|select|says?)\Z", re.IGNORECASE)


def mark_of(letter: str) -> str:
    """Return the character that stands for a mention of a letter."""
    return chr(_FIRST + LETTERS.index(letter))


def letter_of(mark: str) -> str:
    """Return the letter that a mark stands for."""
    return LETTERS[ord(mark) - _FIRST]


def plain(text: str) -> str:
    """Return a text without decoration around its letters, with single spaces; full-width letters become plain."""
    text = _PRIVATE.sub("", unicodedata.normalize("NFKC", text))
    text = _DECORATION.sub("", _WRAP.sub("", _SHORT_IS.sub(r"\1 is ", _STRUCK.sub(" ", text))))
    return _QUOTED.sub(r"\1", _SPACES.sub(" ", text)).strip()


def marked(text: str) -> str:
    """Return a plain text with every mention of an option's letter marked, the brackets around it taken away.

    Args:
        text: in plain form; it may hold marks already.
    """
    return _MENTION.sub(_judged, _raised(text))


def mark_options(text: str, options: Sequence[str]) -> str:
    """Mark the options' own texts where they stand as the whole text or right behind ``answer is``.

    Labels before them are left, so that ``B. iron`` holds two marks, of one letter if label and text agree.
    """
    folded = [fold(option) for option in options]
    known = {option: place for place, option in enumerate(folded) if len(option) > 1 and folded.count(option) == 1}
    if not known:
        return text
    if fold(text) in known:
        return mark_of(LETTERS[known[fold(text)]])
    labelled = _LABELLED.fullmatch(text)
    if labelled and fold(labelled[2]) in known:
        return _agreed(labelled[1].upper(), LETTERS[known[fold(labelled[2])]])
    names = "|".join(re.escape(name).replace(r"\ ", r"\s+") for name in sorted(known, key=len, reverse=True))
    whole = re.compile(rf"(?<![{_LATIN}])(?:{names}){_OPTION_ENDS}", re.IGNORECASE)

    def mark(found: re.Match[str]) -> str:
        return mark_of(LETTERS[known[fold(found[0])]])

    def clause(found: re.Match[str]) -> str:
        inside = whole.sub(mark, found[2])
        return found[1] + _LABELLED_MARK.sub(lambda pair: _agreed(pair[1].upper(), letter_of(pair[2])), inside)

    return _CLAUSE.sub(clause, text)


_LABELLED = re.compile(r"[(\[]?([A-Ja-j])(?:[)\].:]+|\s[-–—])\s*(.*)", re.DOTALL)
_LABELLED_MARK = re.compile(rf"\b([A-Ja-j])(?:[)\].:]+|\s[-–—])\s*({MARKS})")
_OPTION_ENDS = r"(?=\s*(?:[.,;:!?)\n]|\Z|(?:because|since|as|but|and|or|not|is)\b))"
_CLAUSE = re.compile(
    r"(\b(?:answer|(?:correct|best|right) (?:option|choice|one))(?: is| was|:)+)((?: "
    r"?[(\[]?[A-Ja-j][)\].:]+)?[^.;\n]*)",
    re.IGNORECASE,
)


def _agreed(label: str, letter: str) -> str:
    """Return what stands for a label with an option's text: one mention if they agree, else two."""
    return mark_of(letter) if label == letter else f"{mark_of(label)}, {mark_of(letter)}"


def fold(text: str) -> str:
    """Return a text without case, surplus white space and a full stop at its end."""
    return " ".join(_DECORATION.sub("", text).casefold().split()).rstrip(".")


def _raised(text: str) -> str:
    """Return a text in which the small letters that name options are capital."""
    if _ONLY_LETTERS.fullmatch(text):
        return _LETTER.sub(lambda found: found[0].upper(), text)
    for pattern in (_LABEL, _BRACKETED):
        text = pattern.sub(lambda found: found[0].upper(), text)
    return _NAMED.sub(_named, text)


def _named(found: re.Match[str]) -> str:
    """Return what names an option by a small letter, and others beside it, with capital letters."""
    start = found.start(1) - found.start()
    head, tail = found[0][:start], found[0][start:]
    return head + _LETTER.sub(lambda letter: letter[0].upper(), tail)


def _judged(found: re.Match[str]) -> str:
    """Return the mark of a mention, or what was found where it is none."""
    text, letter = found.string, found["letter"]
    before, behind = text[max(0, found.start() - 40) : found.start()], text[found.end() : found.end() + 24]
    bracketed = found[0][0] in "([{<" and bool(found["close"])
    if bracketed:
        return mark_of(letter)
    named = _NAMING.search(before.rstrip(" :"))
    if _NOT_BEFORE.search(before) or _NOT_BEHIND.match(behind):
        return found[0]
    if _INITIAL.match(behind) and _NAME_BEFORE.search(before):
        return found[0]
    if _SPECIES.match(behind) and not _MAY_BE_LABELLED.search(before):
        return found[0]
    if letter == "A" and not found["close"] and _ARTICLE.match(behind) and not named:
        return found[0]
    if letter == "I" and not found["close"] and re.match(r" (?!is\b)[a-z]", behind):
        return found[0]
    opened = found[0][0] if found[0][0] in "([{<" else ""
    return opened + mark_of(letter)
