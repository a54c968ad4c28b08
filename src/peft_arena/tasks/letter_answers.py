r"""Which letter a text gives as its answer to a question with lettered options; an ambiguous text gives none.

In the last closed ``\boxed{}`` stands the answer, where there is one. Else every mention of a letter is weighed: one
that is said to be the answer (``the answer is``, ``the best choice is``, ``so C``, ``I would pick``, ``B is right``, a
letter at the beginning), one that is rejected (``not A``, ``rules out C``, ``A is wrong``) and one that is only named.
What is said to be the answer counts; said of two letters, the later one counts if a word between them turns to it
(``but``, ``so``, ``wait``, ``finally``), and else none. If behind it another letter is named that is neither rejected
nor conceded nor part of its reason (``the answer is A if young, otherwise B``), there is no answer. Where nothing is
said to be the answer, the only letter that is not rejected counts. What is not understood gives no answer rather than
another letter than the one given.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from peft_arena.tasks.letter_text import LETTERS, MARKS, fold, letter_of, mark_options, marked, plain
from peft_arena.tasks.scorers import last_box

SHORT_CHARACTERS = 400
"""In a longer text only ``answer is`` and its kin count: reasoning names letters in too many ways."""
SEARCHED_CHARACTERS = 10_000
"""Only the end of a longer text is read, or its beginning where that is asked for."""
THOUGHT_END = "</think>"
_WINDOW = 90

_JOINED = (
    r"(?: ?(?:,|/|&|\+|;) ?(?:and |or |and/or |nor )?| (?:and|or|and/or|nor|as well as|oder|und|ou|et|y|o) | |"
    r"[和或与、])"
)
_MARK = re.compile(MARKS)
_HEDGED = re.compile(
    rf"[ ,(]*(?:or |and )?(?:possibly|maybe|perhaps|probably|alternatively|also|even) (?:even |also )?({MARKS})",
    re.IGNORECASE,
)
_AT_FIRST = re.compile(r"\b(?:initially|originally|first|before|earlier)\b", re.IGNORECASE)
_GOES_ON = re.compile(
    rf",(?! ?(?:because|since|as|given|not|rather|instead)\b)[^.;!?\n]*{MARKS}|\s*\n\s*{MARKS}\s*(?:\n|\Z)", re.I
)
"""Behind a letter at the beginning another follows that is meant as much."""
_GROUP = re.compile(rf"{MARKS}(?:{_JOINED}(?:(?:option|choice|answer) )?{MARKS})*")
_FILLER = (
    r"(?:(?:the|a|an|options?|choices?|answers?|letters?|be|is|it|likely|probably|most|simply|clearly|definitely|"
    r"actually|now|"
    r"really|indeed|therefore|thus|correct|best|right|one|with|for|that|statement|number|obviously|certainly|surely|"
    r"option:|la|le|el|die|der|das|opción|opzione|lettre|letra)(?: |(?=[:(]))|[ :(\[{\n]|[选項项選])*"
)
_NOUN = (
    r"(?:\b(?:answers?|ans|guess|response|verdict|conclusion|solution|r[ée]ponse|antwort|respuesta|risposta|resposta|"
    r"antwoord|svar(?:et)?|odpowiedź|ответ|відповідь|cevap|jawaban|đáp án|vastaus|svaret)|"
    r"答案|答え|回答|正解|정답|답|उत्तर|الجواب|الإجابة)"
)
_QUALITY = (
    r"\b(?:correct|best|right|true|only|remaining|final|chosen|most \w+|appropriate|my|better|preferred|left|last) "
    r"(?:remaining |possible |correct |plausible |likely |best |multiple )?(?:options?|choices?|letters?|ones?|"
    r"candidate|pick|"
    r"selection|statement|diagnosis|treatment|alternative|possibility|ending|sentence|explanation|completion|match|fit)"
)
_IS = (
    r"(?: (?:choice|option|letter|here|left|to (?:this|the) question|for (?:this|the) question|that (?:remains|fits|"
    r"is left)))*"
    r"(?: ?(?:'s|\bis|\bare|\bwas|\bwould be|\bshould be|\bmust be|\bwill be|\bhas to be|\bhave to be|\bseems? to be|"
    r"\bappears? to be|\bseems|\bappears|\bremains|\best|\bist|\blautet|\bes|\bè|\bé|\bär|\badalah|\bjest|\bla|=|:|"
    r"—|–|-|->|→|是|"
    r"为|為|は|은|는|이|应该|应|選|选|也|就))+"
)
_SAID = re.compile(rf"(?:{_NOUN}|{_QUALITY}){_IS}{_FILLER}\Z", re.IGNORECASE)
_FINAL = re.compile(r"\b(?:final|finally|conclusion|conclude)\b[^.;\n]{0,40}\Z", re.IGNORECASE)
_BAD_NOUN = re.compile(
    rf"\b(?:wrong|incorrect|worst|false|other|another|tempting|distractor|common|popular|unlikely|bad|weakest|first|"
    rf"second|possible|initial|original) (?:\w+ )?(?:answer|option|choice|one|letter|guess|response|distractor)s?{_IS}"
    rf"{_FILLER}\Z",
    re.IGNORECASE,
)
_CHOSEN = re.compile(
    rf"(?:\b(?:picks?|picked|choose|chose|choosing|selects?|selected|selecting|go(?:es|ing)? with|went with|opt(?:s|"
    rf"ed)? for|"
    rf"settled? on|prefer|vote for|leaves?|leaving|left with|says?|concludes?|concluded|favou?rs?|points? to|"
    rf"pointing to|"
    rf"must be|has to be|would be|stick(?:ing)? with|switch(?:ing)? to|chang(?:e|ed|ing) (?:my answer |it )?to|make it|"
    rf"indicates?|suggests?|going for|go for|think|believe|mean|it's|it is|that's|that is|this is)|[选選]){_FILLER}\Z",
    re.IGNORECASE,
)
_SO = re.compile(
    rf"(?:(?:\b(?:so|therefore|thus|hence|ergo|consequently|accordingly|in conclusion|finally|overall|in short)\b|∴|"
    rf"⇒|=>|所以|因此)"
    rf"[,:]? ?(?:I (?:say|think|believe|choose|pick) )?){_FILLER}\Z",
    re.IGNORECASE,
)
_CORRECTED = re.compile(
    rf"\b(?:actually|wait|no|nope|sorry|correction|oops|i mean|i meant|scratch that|rather|on second thoughts?|hm+|"
    rf"make that|or rather|instead|(?:just )?kidding|edit|update|"
    rf"er+m?|u[hm]+|never ?mind|strike that)\b[ ,.:;!…—–-]+(?:(?:no|wait|actually|i mean|i meant|sorry|it's|it is|"
    rf"make that)[ ,.:;!…—–-]+)*"
    rf"{_FILLER}\Z",
    re.IGNORECASE,
)
_BUT = re.compile(
    rf"\b(?:but|however|now|sondern|mais|sino)\b,? (?:rather |instead )?{_FILLER}\Z|而是\Z", re.IGNORECASE
)
_NEGATED = re.compile(
    rf"(?:\b(?:not(?! only| just)|never|cannot be|rul(?:e|es|ed|ing) out|eliminat(?:e|es|ed|ing)|exclud(?:e|es|ed|ing)|"
    rf"reject(?:s|ed|ing)?|discard(?:s|ed|ing)?|dismiss(?:es|ed|ing)?|rather than|instead of|neither|nor|cross(?:es|"
    rf"ed|ing)? out|"
    rf"(?:anything|everything|all|any|every)(?: \w+)? (?:but|except|besides|other than|apart from)|"
    rf"unlike|opposed to|against|over|than|without|avoid|doubt|excepting|nicht|kein|pas|non)|n't|不是|"
    rf"不选|不選|排除|并非|不|ではなく) "
    rf"?(?:be )?{_FILLER}\Z",
    re.IGNORECASE,
)
_UNCHOSEN = re.compile(
    r"(?:\bnot|n't|\bnever|\bavoid|\bno longer|\bno one|\bnobody|\brefuse|\bwrong)\b[^.,;\n]{0,16}\Z", re.IGNORECASE
)
_CONCEDED = re.compile(r"\b(?:although|though|while|whereas|if|whether|unless)\b[^.,;:\n]{0,30}\Z", re.IGNORECASE)
_ADVERBS = (
    r"(?:(?:also|both|all|clearly|obviously|definitely|probably|likely|just|simply|certainly|completely|therefore|thus|"
    r"usually|generally|a|an|the|common|tempting|popular|good|obvious|mere|very|too|quite|rather|somewhat|equally|more|"
    r"most|far|much|known|classic|factually|partially|partly|only|least|less|single) )*"
)
_VERB = (
    r"(?:(?:is|are|was|were|would be|must be|can be|could be|should be|has been|have been|seems?(?: to be)?|"
    r"appears?(?: to be)?|"
    r"looks?|gets?|being) |[:(=-] ?)"
)
_REJECTED_WORD = (
    r"(?:wrong|incorrect|false|untrue|ruled out|eliminated|excluded|out(?=[ .,;!)\n]|\Z)|rejected|unlikely|implausible|"
    r"distract\w+|traps?\b|decoys?\b|mistaken|invalid|impossible|irrelevant|inappropriate|contraindicated|worse|less\b|"
    r"unsupported|tempting|unrelated|inaccurate|off\b|no\b(?=[,.;)\n]|\Z)|✗|❌|✘|x\b(?=[,.;)\n]|\Z))"
)
_NOT_VERB = (
    r"(?:(?:is|are|was|were|does|do|did|can|could|would|should|will|has|have|must)(?:n't|n\u2019t| not)|cannot|"
    r"can't|won't|never|"
    r"fails?|contradicts?|lacks?|isn't)\b(?! (?:wrong|incorrect|false|a distractor|ruled out|excluded|only|just))"
)
_IS_REJECTED = re.compile(
    rf"[ ,]*(?:which|that) (?:I|we) (?:reject|rule out|exclude|eliminate|dismiss|discard)|"
    rf"[ ,)–—]*(?:(?:which|it|that|this|they|both|all) )?(?:{_VERB}{_ADVERBS}{_REJECTED_WORD}|{_NOT_VERB})|\? ?(?:no|"
    rf"nope|wrong)\b|"
    rf"[^.;!?\n{MARKS[1:-1]}]{{0,40}}\b(?:but|however|though|although|yet)[, ]+(?:it|that|this|they|those|these|which)?"
    rf"(?:'s| is| are| was| were)? ?(?:(?:n't|not) (?!only|just)|{_ADVERBS}{_REJECTED_WORD}|{_NOT_VERB})|"
    rf"不对|错|不正确|ist falsch|est faux",
    re.IGNORECASE,
)
_DOUBLE = re.compile(r" (?:is|are|was|were)(?:n't| not) (?:wrong|incorrect|false)", re.IGNORECASE)
_IS_RIGHT = re.compile(
    rf"[ ,–—]*(?:{_VERB}(?:(?:the|clearly|definitely|probably|most|likely|therefore|thus|also|indeed|a|only|single|"
    rf"more|obviously|always|"
    rf"certainly|much|really|actually|my|final) )*(?:correct|right\b(?! (?:next|after|before))|best|true|better|"
    rf"answer|accurate|"
    rf"choice|(?<=most )(?:plausible|appropriate|likely)|✓|✅|✔|yes\b)|(?:fits?|works?|matches|makes|describes|"
    rf"explains)(?: it| this)? (?:the )?(?:best|most)|wins\b|"
    rf"must be (?:it|right|the)|(?:is|does)(?=[.!]|\Z))|"
    rf"\? ?(?:yes|yep|correct|right)\b|正确|是对的|ist richtig|est correcte?",
    re.IGNORECASE,
)
_TURN = re.compile(
    r"\b(?:so|therefore|thus|hence|but|however|final(?:ly)?|actually|wait|no|later|instead|rather|correct(?:ion)?|"
    r"conclude|conclusion|now|sorry|oops|then|ultimately|overall|yet|though|still|revis\w+|chang\w+|on second thought|"
    r"reflection)\b|[所因但]",
    re.IGNORECASE,
)
_LEADS = re.compile(r"\Z|\n|[.:,;!)\]}–—-]|[ ](?:because|since|as|–|—|-|,)|[ ]?[(]|[。，：、]", re.IGNORECASE)
_LABEL_LINE = re.compile(rf"(?:\A|\n)[(\[]?{MARKS}[.):]")
_NEXT_QUESTION = re.compile(r"\n\s*(?:question|q|problem|user|human|问题|题目)\s*[:：.]", re.IGNORECASE)
_ASKED = re.compile(r"[^.;!:\n]{0,80}\?")


_ONLY_IF = re.compile(r"[^.;!?\n]{0,40}\b(?:only (?:if|when|for|in)|if|unless)\b", re.IGNORECASE)
_REPLY = re.compile(r"\?\s*[(\[]?\Z")
_CONCEDED_LATER = re.compile(r"\b(?:although|though)\b[^.;:!?\n]{0,30}\Z", re.IGNORECASE)
_REASON = re.compile(r"\b(?:because|since|as)(?: (?:both|all|the|options?|choices?|answers?))* [(\[]?\Z", re.IGNORECASE)
_HAS_VERB = re.compile(
    r"[)\]]? (?:is|are|was|were|does|do|did|has|have|would|could|can|only|never|[a-z]{3,}s)\b", re.IGNORECASE
)


class _Said(NamedTuple):
    """What is said of the letters of one group of mentions."""

    letters: frozenset[str]
    start: int
    end: int
    rejected: bool = False
    chosen: bool = False
    turns: bool = False
    """It replaces what was chosen before."""


def given_letter(text: str, count: int, options: Sequence[str] = (), *, first: bool = False) -> str:
    r"""Return the letter of the option that a text gives as its answer; empty where it gives none, or several.

    Args:
        text: what a model wrote; of a thought that ends in ``</think>`` what follows.
        count: number of options; letters beyond them are no answer.
        options: their texts, where they are known: an answer may be one of them instead of its letter.
        first: read the beginning of a long text instead of its end.
    """
    text = text.rpartition(THOUGHT_END)[2]
    held = last_box(text) if "boxed" in text else None
    if held is not None:
        found = _boxed(held[:SEARCHED_CHARACTERS], options)
    else:
        text = plain(text[:SEARCHED_CHARACTERS] if first else text[-SEARCHED_CHARACTERS:])
        text = marked(mark_options(text, options))
        found = _weighed(_NEXT_QUESTION.split(text, maxsplit=1)[0] if first else text, text)
    return found if found and LETTERS.index(found) < count else ""


def _weighed(text: str, whole: str) -> str:
    """Return the letter that the mentions of a marked text give."""
    text = text if _GROUP.search(text) else whole
    brief = len(text) <= SHORT_CHARACTERS
    said = [_said(text, start, end, brief=brief) for found in _GROUP.finditer(text) for start, end in _parts(found)]
    chosen = _chosen(text, said)
    if chosen is not None:
        return chosen
    if not brief:
        return ""
    rejected = {letter for group in said if group.rejected for letter in group.letters}
    named = {letter for group in said if not group.rejected for letter in group.letters}
    left = named - rejected if len(named) > 1 else named
    return next(iter(left)) if len(left) == 1 and not (named & rejected and len(named) == 1) else ""


def _chosen(text: str, said: Sequence[_Said]) -> str | None:
    """Return the letter said to be the answer, empty where that is ambiguous; None where nothing is said to be."""
    current: _Said | None = None
    conflict = False
    for group in said:
        if group.rejected:
            conflict = conflict or (current is not None and bool(current.letters & group.letters))
            continue
        if not group.chosen:
            continue
        between = text[current.end : group.start] if current is not None else ""
        if current is None or current.letters == group.letters:
            conflict = False if group.turns or current is None else conflict
        elif group.turns or len(current.letters) > 1 or _TURN.search(between):
            conflict = False
        else:
            conflict = True
        current = group
    if current is None:
        return None
    if len(text) - current.end <= SHORT_CHARACTERS and any(_rivals(text, current, group) for group in said):
        return ""
    return "" if conflict or len(current.letters) > 1 else next(iter(current.letters))


def _rivals(text: str, current: _Said, group: _Said) -> bool:
    """Say whether letters named behind what was chosen may be meant instead of it."""
    if group.start < current.end or group.rejected or group.letters <= current.letters:
        return False
    before = text[max(current.end, group.start - _WINDOW) : group.start]
    excused = _CONCEDED_LATER.search(before) or _REASON.search(before)
    return not (excused and _HAS_VERB.match(text, group.end) and not _IS_RIGHT.match(text, group.end))


def _parts(found: re.Match[str]) -> list[tuple[int, int]]:
    """Return where the lists of a group of mentions begin and end; a letter named again begins another list."""
    parts: list[tuple[int, int]] = []
    seen: set[str] = set()
    for mark in _MARK.finditer(found[0]):
        start, end = found.start() + mark.start(), found.start() + mark.end()
        if not parts or mark[0] in seen:
            parts.append((start, end))
            seen = set()
        parts[-1] = (parts[-1][0], end)
        seen.add(mark[0])
    return parts


def _said(text: str, start: int, end: int, *, brief: bool) -> _Said:
    """Return what a text says of one list of mentions."""
    before, behind = text[max(0, start - _WINDOW) : start], text[end : end + _WINDOW]
    letters = frozenset(letter_of(mark) for mark in _MARK.findall(text[start:end]))
    if hedge := _HEDGED.match(behind):
        letters |= {letter_of(hedge[1])}
    clause = re.split(r"[.;!?\n]", before)[-1]
    group = _Said(letters, start, end)
    if (
        _NEGATED.search(before)
        or _BAD_NOUN.search(before)
        or (_IS_REJECTED.match(behind) and not _DOUBLE.match(behind))
    ):
        return group._replace(rejected=True)
    if _DOUBLE.match(behind):
        return group
    corrected = bool(_CORRECTED.search(before))
    stated = bool(_SAID.search(before))
    if stated or corrected:
        return group._replace(chosen=True, turns=corrected or bool(_FINAL.search(before)))
    leads = not text[:start].strip(" ([{\n") and len(letters) == 1 and _LEADS.match(behind)
    if leads and not _GOES_ON.match(behind) and len(_LABEL_LINE.findall(text)) < 2:
        return group._replace(chosen=True)
    if not brief or _CONCEDED.search(before):
        return group
    if _CHOSEN.search(before):
        if _AT_FIRST.search(re.split(r",|\bbut\b", clause)[-1]):
            return group
        unchosen = bool(_UNCHOSEN.search(_CHOSEN.sub("", clause)))
        return group._replace(chosen=not unchosen, rejected=unchosen)
    if _SO.search(before):
        return group._replace(chosen=True, turns=True)
    if _BUT.search(before) and re.match(r"[.,;!)\n]|\Z", behind):
        return group._replace(chosen=True, turns=True)
    if _REPLY.search(before) and re.fullmatch(r"[)\]]?[.!]?\s*", text[end:]):
        return group._replace(chosen=True, turns=True)
    right = _IS_RIGHT.match(behind)
    if right and not _ONLY_IF.match(behind, right.end()) and not (_ASKED.match(behind) and "?" not in behind[:2]):
        return group._replace(chosen=True)
    return group


_BOX_LETTER = re.compile(
    r"(?:(?:option|choice|answer)\s*:?\s+)?[(\[]?([A-J])(?:[)\].:]+(?P<rest>.*))?", re.DOTALL | re.IGNORECASE
)
_BOX_WITH_TEXT = re.compile(r"[(\[]?([A-J])[)\].:]*[\s-]+(?P<rest>.*)", re.DOTALL)
_BOX_FURTHER = re.compile(r"(?:\b(?:and|or)\b|[,/&])\s*[(\[]?[A-J](?![A-Za-z])")
"""A second letter beside the first: no answer."""


def _boxed(held: str, options: Sequence[str]) -> str:
    """Return the letter that the content of a box gives: a letter, or exactly one option's text.

    A text that is one option's counts as that option even where it begins like a letter (``C. difficile``).
    """
    content = plain(held.replace("{", " ").replace("}", " ") if "\\" in held else held)
    same = [LETTERS[place] for place, option in enumerate(options) if fold(option) == fold(content)]
    letter = _BOX_LETTER.fullmatch(content)
    if letter and not letter["rest"]:
        return letter[1].upper()
    if len(same) == 1:
        return same[0]
    if letter and not _BOX_FURTHER.search(letter["rest"]):
        return letter[1].upper()
    named = _BOX_WITH_TEXT.fullmatch(content)
    place = LETTERS.index(named[1].upper()) if named else len(options)
    if named and place < len(options) and fold(named["rest"]) == fold(options[place]):
        return named[1].upper()
    return ""
