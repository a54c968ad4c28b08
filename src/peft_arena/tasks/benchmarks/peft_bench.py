"""PEFT-Bench's 27 data sets as tasks: instructions, exact labels, F1 and correlations, equations, CodeBLEU.

The table of the sets is :mod:`peft_arena.tasks.benchmarks.peft_bench_sets`; ``docs/peft-bench.md`` shows it. Where
PEFT-Bench's own scoring is known to be wrong, ours differs, and the cards say so:

* an answer outside the labels is wrong whatever the order of the labels (PEFT-Bench turns it into the first or the
  second label, also where there are more than two);
* answers are compared whole (PEFT-Bench compares 16 characters);
* an equation of SVAMP must give the gold number (PEFT-Bench takes any true equation, such as ``(1 + 1) = 2``);
* no row that was trained on is tested.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from fractions import Fraction
from typing import ClassVar

from peft_arena.tasks.base import (
    ACCURACY,
    FRACTION,
    Generation,
    Item,
    Kind,
    Message,
    Metric,
    Part,
    Prompt,
    Role,
    Score,
    TaskCard,
)
from peft_arena.tasks.benchmarks.base import Benchmark, HubSplit
from peft_arena.tasks.benchmarks.peft_bench_judging import (
    EQUATION_CHARACTERS,
    LARGEST,
    NUMBER,
    THOUGHT,
    arithmetic,
    canonical,
    close,
    farther_end,
    marked_number,
    parenthesised,
    plain,
    similarity,
    words_f1,
)
from peft_arena.tasks.benchmarks.peft_bench_sets import SHEETS, CodeSheet, LabelSheet, Sheet
from peft_arena.tasks.codebleu import codebleu
from peft_arena.tasks.data import Row
from peft_arena.tasks.label_metrics import (
    f1,
    macro_f1,
    pearson,
    settle_linearised,
    settle_other,
    spearman,
)
from peft_arena.tasks.scorers import FINAL_ANSWER_MARK, canonical_number, normalise_answer
from peft_arena.tasks.splits import Keyed

PREFIX = "bench-"
EXACT_MATCH = Metric(name="exact_match", unit=FRACTION, better="higher")
EXTRACT_CHARACTERS = 2000
_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:\n```|\Z)", re.DOTALL)
_SEVERAL = "an F1 or a correlation is of one answer to each item, and there are several samples"
_UNVERIFIED = "The hub was not reached: columns and splits are as public code reads them."


class SheetTask(Benchmark):
    """A data set of PEFT-Bench: one user turn with an instruction and a row."""

    sheet: ClassVar[Sheet]
    metrics: ClassVar[tuple[Metric, ...]] = (ACCURACY,)
    asks: ClassVar[str] = ""
    """What the prompt says after the instruction."""
    judges: ClassVar[str]
    """How answers are judged, a clause."""
    departs: ClassVar[str]
    """Where that is not PEFT-Bench's way, a clause."""
    guess: ClassVar[float | None] = 0.0
    version: ClassVar[int] = 1
    """Of the card; raised when the way of judging changes."""

    def read(self, row: Row, where: HubSplit) -> Keyed | None:
        """Read a row; one without a gold answer is left out."""
        sheet = self.sheet
        shown = sheet.show(row)
        key = "\n".join(str(row[column]) for column in sheet.groups) or shown
        item = self.item(row, shown)
        return None if item is None or not shown else Keyed(key, item)

    @abstractmethod
    def item(self, row: Row, shown: str) -> Item | None:
        """Make the item of a row, whose shown part is given; None leaves the row out."""

    def prompt(self, item: Item) -> Prompt:
        """Return the instruction, an empty line and the row."""
        asked = f"{self.sheet.instruction} {self.asks}".strip()
        return (Message("user", f"{asked}\n\n{item.question}"),)

    @classmethod
    def make_card(cls, sheet: Sheet) -> TaskCard:
        """Return the card of a data set."""
        tokens = cls.generation.max_new_tokens
        pins = dict.fromkeys(f"{split.hub}@{split.revision}" for split in (sheet.train, sheet.test))
        protocol = (
            "Protocol: zero-shot; one user turn of the model's chat template, an instruction with the allowed answers "
            f"and the row; greedy, at most {tokens} new tokens, no stop string; {cls.judges}; a tenth of the train "
            f"split is validation and the test split is the hub's '{sheet.test.split}'."
        )
        differs = "; ".join(filter(None, ("the instruction is in words of our own", cls.departs, sheet.differs)))
        return TaskCard(
            name=f"{PREFIX}{sheet.name}",
            title=f"PEFT-Bench {sheet.title}",
            version=cls.version,
            role=Role.TARGET,
            kind=Kind.GENERATE,
            metrics=cls.metrics,
            chance=cls.guess,
            source=f"{sheet.test.hub}{f', {sheet.test.subset}' if sheet.test.subset else ''} ({sheet.train.split}, "
            f"{sheet.test.split})",
            revision=", ".join(pins),
            licence=sheet.licence,
            citation=f"{sheet.citation}; PEFT-Bench (kinit-sk/PEFT-Factory)",
            description=f"{sheet.rows} {protocol} Differs: {differs}. {_UNVERIFIED}",
        )


class LabelTask(SheetTask):
    """Answers are labels; the headline is F1 of the positive label, or macro-F1."""

    samples_refused = _SEVERAL

    generation = Generation(max_new_tokens=32, stop=())

    @property
    def labels(self) -> LabelSheet:
        """The set's table, with labels."""
        assert isinstance(self.sheet, LabelSheet)
        return self.sheet

    def item(self, row: Row, shown: str) -> Item | None:
        """Make an item whose answer is the label."""
        gold = self.labels.gold(row)
        return None if gold is None else Item(shown, answer=gold, data={"gold": gold})

    def score(self, item: Item, completion: str) -> Score:
        """Compare the whole answer with the label; ``extracted`` is the answer as compared."""
        return _exact(item.data["gold"], plain(completion))

    def settle(self, items: Sequence[Item], scores: Sequence[Score]) -> Sequence[Score]:
        """Turn right and wrong answers into the values whose mean is F1 or macro-F1."""
        known = _known(scores)
        if refused := self._sampled(scores):
            return [_unscored(score, refused) for score in scores]
        golds = [items[place].data["gold"].lower() for place in known]
        said = [scores[place].extracted for place in known]
        sheet = self.labels
        names = tuple(label.lower() for label in sheet.labels)
        if sheet.positive is None:
            found = macro_f1(golds, said, names)
        else:
            found = f1(golds, said, (names[0], names[1]), sheet.positive.lower())
        return settle_linearised(scores, found, known)

    def _sampled(self, scores: Sequence[Score]) -> str:
        named = {metric.name for metric in self.card.metrics}
        return _SEVERAL if any(set(score.others) - named for score in scores) else ""


class F1Task(LabelTask):
    """Two labels; F1 of the positive one."""

    metrics = (Metric(name="f1", unit=FRACTION, better="higher"), EXACT_MATCH)


class MacroF1Task(LabelTask):
    """Several labels; the mean of their F1."""

    metrics = (Metric(name="macro_f1", unit=FRACTION, better="higher"), EXACT_MATCH)


class Similarity(SheetTask):
    """STS-B: answers are numbers from 0 to 5; the headline is Pearson's correlation with the gold numbers."""

    samples_refused = _SEVERAL

    generation = Generation(max_new_tokens=32, stop=())
    metrics = (
        Metric(name="pearson", unit="correlation", better="higher"),
        Metric(name="spearman", unit="correlation", better="higher"),
        Metric(name="closeness", unit=FRACTION, better="higher"),
    )
    asks = "Respond only with the number."
    judges = (
        "the whole answer must be a number, cut to 0 to 5; any other answer counts as the end of the range that is "
        "farther from the gold number, and where no answer is a number there is no correlation; closeness is 1 less a "
        "fifth of the distance"
    )
    departs = "PEFT-Bench counts an answer that is no number as -1, which may be a good answer"

    def item(self, row: Row, shown: str) -> Item | None:
        """Make an item whose answer is the score with at most three decimals, which is what the set has."""
        gold = round(float(row["label"]), 3)
        return Item(shown, answer=f"{gold:g}", data={"gold": gold}) if 0 <= gold <= LARGEST else None

    def score(self, item: Item, completion: str) -> Score:
        """Return 1 less a fifth of the distance; 0 for what is no number."""
        said = plain(completion)
        number = similarity(said)
        value = 0.0 if number is None else 1 - abs(number - item.data["gold"]) / LARGEST
        return Score(value, extracted=said[:EXTRACT_CHARACTERS], others={"closeness": Part(value)})

    def metrics_of(self, item: Item) -> tuple[str, ...]:
        """Only closeness is of an item alone."""
        return ("closeness",)

    def settle(self, items: Sequence[Item], scores: Sequence[Score]) -> Sequence[Score]:
        """Turn answers into the values whose means are the two correlations."""
        known = _known(scores)
        if any(set(score.others) - {"closeness"} for score in scores):
            return [_unscored(score, _SEVERAL) for score in scores]
        golds: list[float] = [items[place].data["gold"] for place in known]
        read = [similarity(scores[place].extracted) for place in known]
        if all(number is None for number in read):
            return [_unscored(score, "no correlation: no answer is a number") for score in scores]
        said = [farther_end(gold) if number is None else number for gold, number in zip(golds, read, strict=True)]
        settled = settle_other(scores, "spearman", spearman(said, golds), known)
        return settle_linearised(settled, pearson(said, golds), known)


class Entity(SheetTask):
    """ReCoRD: the answer is an entity of the passage; F1 of words and exact match, each the best over right answers."""

    generation = Generation(max_new_tokens=64, stop=())
    metrics = (Metric(name="f1", unit=FRACTION, better="higher"), EXACT_MATCH)
    guess = None
    judges = (
        "the whole answer is compared with every right answer, without case, punctuation and articles: f1 is the "
        "highest F1 of the words in common, exact_match asks for all of them; both are means over queries, in train "
        "the first right answer is the target"
    )
    departs = "PEFT-Bench repeats a query for each of its right answers, so that queries with many count more"

    def item(self, row: Row, shown: str) -> Item | None:
        """Make an item with all right answers."""
        answers = list(dict.fromkeys(answer for answer in row["answers"] if normalise_answer(answer)))
        return Item(shown, answer=answers[0], data={"answers": answers}) if answers else None

    def score(self, item: Item, completion: str) -> Score:
        """Return the best F1 of words."""
        said = plain(completion)
        words = normalise_answer(said).split()
        golds = [normalise_answer(answer).split() for answer in item.data["answers"]]
        value = max(words_f1(gold, words) for gold in golds)
        return Score(value, extracted=said[:200], others={"exact_match": Part(float(words in golds))})


class MarkedNumber(SheetTask):
    """GSM8K: the number after the mark."""

    generation = Generation(max_new_tokens=512, stop=())
    judges = (
        f"the first form with digits after the last {FINAL_ANSWER_MARK} is compared with the gold number by value, and "
        "without the mark an answer is wrong; the target is the set's own solution"
    )
    departs = "PEFT-Bench wants nothing but the number after the mark"
    version = 2

    def item(self, row: Row, shown: str) -> Item | None:
        """Make an item whose answer is the whole solution."""
        answer = str(row["answer"]).strip()
        gold = marked_number(answer)
        return Item(shown, answer=answer, data={"gold": gold}) if gold else None

    def score(self, item: Item, completion: str) -> Score:
        """Compare the numbers after the marks."""
        said = marked_number(completion)
        return Score(float(bool(said) and Fraction(said) == Fraction(item.data["gold"])), extracted=said[:200])


class Equation(SheetTask):
    """SVAMP: one equation that gives the gold number."""

    generation = Generation(max_new_tokens=64, stop=())
    metrics = (ACCURACY, Metric(name="equation_match", unit=FRACTION, better="higher"))
    judges = (
        "the whole answer must be one equation with parentheses around its left side and a number on its right; it is "
        "right if the left side evaluates to the gold number and the right side is that number, so an equation that "
        "is always the same is right only where it gives the gold number; equation_match asks besides that its left "
        "side is the gold one but for the order of sums and products"
    )
    departs = "PEFT-Bench takes every true equation for right, whatever the gold number"

    def item(self, row: Row, shown: str) -> Item | None:
        """Make an item whose answer is the gold equation and number."""
        number = NUMBER.fullmatch(str(row["Answer"]).strip().replace(",", ""))
        left = str(row["Equation"]).strip()
        if number is None or arithmetic(left) is None:
            return None
        gold = canonical_number(number[0])
        left = left if left.startswith("(") and left.endswith(")") else f"({left})"
        item = Item(shown, answer=f"{left} = {gold}", data={"gold": gold, "equation": left})
        return item if self.score(item, item.answer).value == 1.0 else None  # a gold that is false teaches nothing

    def score(self, item: Item, completion: str) -> Score:
        """Evaluate the equation by rules of our own; nothing is executed."""
        said = plain(completion)
        left, equals, right = said.partition("=")
        left, right = left.strip(), right.strip().replace(",", "")
        right_form = bool(equals) and bool(NUMBER.fullmatch(right)) and parenthesised(left)
        found = arithmetic(left) if right_form and len(said) <= EQUATION_CHARACTERS else None
        gold = Fraction(item.data["gold"])
        value = found is not None and close(found, gold) and close(Fraction(right), gold)
        same = value and canonical(left) == canonical(item.data["equation"])
        return Score(float(value), extracted=said[:EQUATION_CHARACTERS], others={"equation_match": Part(float(same))})


class Code(SheetTask):
    """Python programs, compared with reference programs by CodeBLEU; none is executed."""

    generation = Generation(max_new_tokens=512, stop=())
    metrics: ClassVar[tuple[Metric, ...]] = (Metric(name="codebleu", unit=FRACTION, better="higher"), EXACT_MATCH)
    guess = None
    judges = (
        "the first block between ``` fences, or the whole answer where there is none, is compared with the reference "
        "by CodeBLEU (peft_arena.tasks.codebleu), the best one where there are several, and the mean is over items; "
        "nothing is executed; an answer that is no Python has no syntax and no data flow"
    )
    departs = (
        "PEFT-Bench pools n-grams over the set, splits tokens at white space, puts programs in lower case, and uses a "
        "package in which a data flow without a match counts in full: an empty answer has 0.25"
    )

    def item(self, row: Row, shown: str) -> Item | None:
        """Make an item with its reference programs."""
        assert isinstance(self.sheet, CodeSheet)
        references = [found for program in self.sheet.references(row) if (found := program.strip())]
        if not references or THOUGHT in references[0]:
            return None
        return Item(shown, answer=references[0], data={"references": references})

    def score(self, item: Item, completion: str) -> Score:
        """Return the best CodeBLEU."""
        references: list[str] = item.data["references"]
        said = self.code_of(item, completion)
        same = said in references
        value = 1.0 if same else max(codebleu(reference, said).value for reference in references)
        return Score(value, extracted=said[:200], others={"exact_match": Part(float(same))})

    def code_of(self, item: Item, completion: str) -> str:
        """Return the program of an answer: its first block between fences, or all of it."""
        whole = completion.rpartition(THOUGHT)[2].strip()
        fence = None if whole in item.data["references"] else _FENCE.search(whole)
        return whole if fence is None else fence[1].strip()


def _exact(gold: str, said: str) -> Score:
    value = float(said == gold.lower())
    return Score(value, extracted=said[:EXTRACT_CHARACTERS], others={"exact_match": Part(value)})


def _known(scores: Sequence[Score]) -> list[int]:
    return [place for place, score in enumerate(scores) if score.value is not None]


def _unscored(score: Score, reason: str) -> Score:
    return Score(None, extracted=score.extracted, reason=score.reason or reason, others=score.others)


def task_of(sheet: Sheet, kind: type[SheetTask] | None = None) -> type[SheetTask]:
    """Return the task of a data set; the kind of one with labels follows from its table."""
    settings: dict[str, object] = {}
    if isinstance(sheet, LabelSheet):
        kind = MacroF1Task if sheet.positive is None else F1Task
        settings = _label_settings(sheet)
    assert kind is not None
    base: type[SheetTask] = type(kind.__name__, (kind,), settings)
    card = base.make_card(sheet)
    data = {"train": (sheet.train,), "test": (sheet.test,)}
    made: type[SheetTask] = type(f"Bench{sheet.name.title()}", (base,), {"sheet": sheet, "card": card, "data": data})
    made.__doc__ = f"{sheet.title}."
    return made


def _label_settings(sheet: LabelSheet) -> dict[str, object]:
    names = f"{', '.join(sheet.labels[:-1])} or {sheet.labels[-1]}"
    even = (
        "chance is that of even guesses among classes of equal size, which they nearly are"
        if sheet.chance is not None
        else "no chance level is given, since the classes are of unequal size"
    )
    if sheet.positive is not None:
        judged = f"f1 is that of '{sheet.positive}', and an answer that is no label counts as the wrong one"
        departs = "PEFT-Bench compares the first 16 characters"
    else:
        judged = "macro_f1 is the mean of the labels' F1, and an answer that is no label is a miss of the right one"
        departs = (
            "PEFT-Bench compares the first 16 characters, and turns an answer that is no label into the first or the "
            "second label, so that its macro-F1 depends on their order"
        )
    return {
        "asks": f"Respond only with {names}.",
        "judges": f"the whole answer, in lower case and without white space around it, must be a label; {judged}; "
        f"exact_match is the share of right answers; {even}",
        "departs": departs,
        "guess": sheet.chance,
    }


BoolQ = task_of(SHEETS["boolq"])
Cb = task_of(SHEETS["cb"])
CodeAlpacaPy = task_of(SHEETS["codealpacapy"], Code)
Cola = task_of(SHEETS["cola"])
Conala = task_of(SHEETS["conala"], Code)
Copa = task_of(SHEETS["copa"])
Gsm8k = task_of(SHEETS["gsm8k"], MarkedNumber)
HellaSwag = task_of(SHEETS["hellaswag"])
MathQa = task_of(SHEETS["math_qa"])
Mmlu = task_of(SHEETS["mmlu"])
Mnli = task_of(SHEETS["mnli"])
Mrpc = task_of(SHEETS["mrpc"])
MultiRc = task_of(SHEETS["multirc"])
OpenBookQa = task_of(SHEETS["openbookqa"])
Piqa = task_of(SHEETS["piqa"])
Qnli = task_of(SHEETS["qnli"])
Qqp = task_of(SHEETS["qqp"])
Record = task_of(SHEETS["record"], Entity)
Rte = task_of(SHEETS["rte"])
Siqa = task_of(SHEETS["siqa"])
Sst2 = task_of(SHEETS["sst2"])
Stsb = task_of(SHEETS["stsb"], Similarity)
Svamp = task_of(SHEETS["svamp"], Equation)
Wic = task_of(SHEETS["wic"])
WinoGrande = task_of(SHEETS["winogrande"])
Wsc = task_of(SHEETS["wsc"])
