"""A retention task in the manner of IFEval: whether an answer obeys checkable constraints.

The prompts of IFEval are in no Python package, so these are synthetic: a subject, one or two constraints, and the
constraints' own sentences from lm-eval's instruction classes, whose checkers also judge. Deviations from IFEval:

* 20 of its 25 instruction types: those that a text of about 70 words can obey, with small numbers (three bullet
  points, not ten);
* two constraints at most, and only pairs that both lm-eval's table of conflicts and length allow;
* a value that a checker could not compute is unscored, with the reason.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import peft_arena.assets.wheel_files as assets
from peft_arena.core.errors import UserError, unknown
from peft_arena.core.ids import seed_for
from peft_arena.tasks.base import (
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
    Split,
    Task,
    TaskCard,
)
from peft_arena.tasks.splits import Keyed, cut

T = TypeVar("T")

VERSION = 1
LM_EVAL = "0.4.13"
SIZES: Mapping[str, int | None] = {"validation": 60, "test": 200}

_SUBJECTS = (
    "rain in the mountains", "the first day at a new school", "how bread is baked", "a walk along the river",
    "the use of bicycles in cities", "growing tomatoes on a balcony", "a lost umbrella", "the night train",
    "keeping bees", "the history of paper", "a visit to the dentist", "the colours of autumn", "repairing a chair",
    "a football match in the rain", "the smell of coffee", "learning to swim", "the lighthouse keeper",
    "travelling with a small dog", "how bridges are built", "the old clock in the kitchen", "a market in the morning",
    "why leaves fall", "writing letters by hand", "a broken elevator", "the moon and the tides",
    "a neighbour who plays the violin", "the first snow", "packing for a long journey", "how glass is made",
    "a garden behind the library", "choosing a birthday present", "the sound of the sea",
)  # fmt: skip
_OPENINGS = (
    "Write two or three sentences about {subject}.",
    "Write a short paragraph about {subject}.",
    "Briefly describe {subject}.",
    "Tell a friend in a few sentences about {subject}.",
)
_WORDS = ("bridge", "winter", "window", "garden", "silver", "music", "letter", "morning", "quiet", "yellow", "river",
          "station", "pepper", "orange", "ladder", "market")  # fmt: skip
_COMMON = ("very", "people", "important", "always", "great", "every", "world", "many", "often", "beautiful")
_LETTERS = "bgkvwyz"


class _Kind(NamedTuple):
    """An instruction type of lm-eval and how its numbers are drawn."""

    name: str
    draw: Callable[[random.Random], dict[str, Any]]


def _pick(rng: random.Random, values: Sequence[T]) -> T:
    return values[int(rng.random() * len(values))]


def _two(rng: random.Random, values: Sequence[str]) -> list[str]:
    left = sorted(set(values))
    first = left.pop(int(rng.random() * len(left)))
    return sorted([first, _pick(rng, left)])


_KINDS = (
    _Kind("keywords:existence", lambda rng: {"keywords": _two(rng, _WORDS)}),
    _Kind(
        "keywords:frequency",
        lambda rng: {"keyword": _pick(rng, _WORDS), "frequency": _pick(rng, (2, 3)), "relation": "at least"},
    ),
    _Kind("keywords:forbidden_words", lambda rng: {"forbidden_words": _two(rng, _COMMON)}),
    _Kind(
        "keywords:letter_frequency",
        lambda rng: {"letter": _pick(rng, _LETTERS), "let_frequency": _pick(rng, (3, 4)), "let_relation": "at least"},
    ),
    _Kind(
        "length_constraints:number_sentences",
        lambda rng: {"num_sentences": _pick(rng, (3, 4)), "relation": _pick(rng, ("less than", "at least"))},
    ),
    _Kind(
        "length_constraints:number_words",
        lambda rng: _pick(rng, ({"num_words": 25, "relation": "less than"}, {"num_words": 40, "relation": "less than"},
                                {"num_words": 40, "relation": "at least"})),
    ),
    _Kind("length_constraints:number_paragraphs", lambda rng: {"num_paragraphs": _pick(rng, (2, 3))}),
    _Kind("detectable_content:number_placeholders", lambda rng: {"num_placeholders": _pick(rng, (1, 2, 3))}),
    _Kind("detectable_content:postscript", lambda rng: {"postscript_marker": _pick(rng, ("P.S.", "P.P.S"))}),
    _Kind("detectable_format:number_bullet_lists", lambda rng: {"num_bullets": _pick(rng, (2, 3, 4))}),
    _Kind("detectable_format:number_highlighted_sections", lambda rng: {"num_highlights": _pick(rng, (1, 2, 3))}),
    _Kind("detectable_format:multiple_sections", lambda rng: {"section_spliter": "Section", "num_sections": 2}),
    _Kind("detectable_format:json_format", lambda rng: {}),
    _Kind("detectable_format:title", lambda rng: {}),
    _Kind("startend:end_checker", lambda rng: {"end_phrase": _pick(rng, ("That is all.", "Any other questions?"))}),
    _Kind("startend:quotation", lambda rng: {}),
    _Kind("change_case:english_lowercase", lambda rng: {}),
    _Kind("change_case:english_capital", lambda rng: {}),
    _Kind(
        "change_case:capital_word_frequency",
        lambda rng: {"capital_frequency": _pick(rng, (2, 3)), "capital_relation": "at least"},
    ),
    _Kind("punctuation:no_comma", lambda rng: {}),
)  # fmt: skip

_AT_ENDS = frozenset({"startend:end_checker", "startend:quotation", "detectable_content:postscript"})
_LOWER = "change_case:english_lowercase"
_CAPITAL = "change_case:english_capital"
_OWN_CONFLICTS: Mapping[str, frozenset[str]] = {
    _LOWER: frozenset(
        {"detectable_content:postscript", "startend:end_checker", "detectable_format:multiple_sections",
         "change_case:capital_word_frequency"}
    ),
    _CAPITAL: frozenset(
        {"startend:end_checker", "detectable_format:multiple_sections", "length_constraints:number_words"}
    ),
    "length_constraints:number_sentences": frozenset(
        {"detectable_format:number_bullet_lists", "detectable_format:multiple_sections",
         "length_constraints:number_paragraphs", "detectable_content:postscript"}
    ),
    "detectable_format:number_bullet_lists": frozenset(
        {"length_constraints:number_paragraphs", "detectable_format:number_highlighted_sections"}
    ),
    "length_constraints:number_paragraphs": frozenset({"detectable_format:number_highlighted_sections"}),
}  # fmt: skip
"""Pairs that lm-eval's table allows and that cannot both be obeyed in 96 tokens, or only by luck of the checker."""


class InstructionLibrary(NamedTuple):
    """What is used of lm-eval's instruction following."""

    classes: Mapping[str, Any]
    conflicts: Mapping[str, set[str]]
    judge: Callable[[dict[str, Any], list[str]], Mapping[str, Any]]


def load_library() -> InstructionLibrary:
    """Import lm-eval's instruction classes with their sentence splitter in place.

    The splitter comes out of a pinned wheel before the import, which would otherwise try to download it. The language
    detector is random unless seeded, and logs every text too short for it.

    Raises:
        UserError: a package is missing or the splitter cannot be had.
    """
    folder = "llama_index/core/_static/nltk_cache"
    try:
        import langdetect
        import nltk
    except ImportError as error:
        raise UserError(f"task instruction_following needs {error.name}: pip install peft-arena[eval]") from None
    for name in ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt"):
        found = assets.member_path(assets.PUNKT, f"{folder}/tokenizers/punkt_tab/english/{name}")
    root = str(found.parents[3])
    if root not in nltk.data.path:
        nltk.data.path.insert(0, root)
    langdetect.DetectorFactory.seed = 0
    try:
        from lm_eval.tasks.ifeval import instructions_registry, utils
    except ImportError as error:
        raise UserError(f"task instruction_following needs {error.name}: pip install peft-arena[eval]") from None
    logging.getLogger("lm_eval.tasks.ifeval.instructions").setLevel(logging.CRITICAL)
    return InstructionLibrary(
        classes=instructions_registry.INSTRUCTION_DICT,
        conflicts=instructions_registry.INSTRUCTION_CONFLICTS,
        judge=utils.process_results,
    )


def follow(library: InstructionLibrary, item: Item, completion: str) -> Score:
    """Judge which of an item's instructions a completion follows, by lm-eval's checkers, strictly and loosely.

    The headline is the share of instructions followed strictly; its weight is their number.

    Args:
        library: what :func:`load_library` returns.
        item: its data has ``instruction_id_list`` and, for each of these, the checker's arguments in ``kwargs``.
        completion: what the model wrote.
    """
    count = len(item.data["instruction_id_list"])
    document = {"key": 0, "prompt": item.question, **item.data}
    try:
        judged = library.judge(document, [completion])
    except Exception as error:  # noqa: BLE001 - third-party checkers on any text: whatever they raise, the item is unscored
        reason = f"a checker failed: {type(error).__name__}: {str(error)[:200]}"
        return Score(None, extracted=completion, reason=reason, weight=count)
    strict, loose = judged["inst_level_strict_acc"], judged["inst_level_loose_acc"]
    others = {
        "prompt_strict": Part(float(judged["prompt_level_strict_acc"])),
        "instruction_loose": Part(sum(map(float, loose)) / count, weight=count),
        "prompt_loose": Part(float(judged["prompt_level_loose_acc"])),
    }
    return Score(sum(map(float, strict)) / count, extracted=completion, weight=count, others=others)


class InstructionFollowing(Task):
    """Short texts under one or two checkable constraints, as one user turn."""

    generation = Generation(max_new_tokens=96, stop=())
    card = TaskCard(
        name="instruction_following",
        title="Instruction following (synthetic IFEval)",
        version=VERSION,
        role=Role.RETENTION,
        kind=Kind.GENERATE,
        metrics=(
            Metric(name="instruction_strict", unit=FRACTION, better="higher"),
            Metric(name="prompt_strict", unit=FRACTION, better="higher"),
            Metric(name="instruction_loose", unit=FRACTION, better="higher"),
            Metric(name="prompt_loose", unit=FRACTION, better="higher"),
        ),
        chance=None,
        source=f"generated by peft_arena with the instruction classes of lm-eval {LM_EVAL}",
        revision=f"generator {VERSION}, lm_eval {LM_EVAL}, punkt_tab of {assets.PUNKT.pin}",
        licence="Apache-2.0",
        citation="after Zhou et al. 2023, Instruction-Following Evaluation for Large Language Models",
        description=(
            "A subject and one or two constraints of 20 types that a text of 96 tokens can obey; synthetic, so not "
            "comparable with published IFEval numbers. instruction_strict: share of all instructions followed; "
            "prompt_strict: share of prompts with all of them followed; the loose values also accept the text without "
            "its first or last line or asterisks. An empty text follows nothing. No chance value: some constraints "
            "are met by most texts."
        ),
    )

    def items(self, split: Split) -> Sequence[Item]:
        """Return all prompts of a split, in a fixed order, the same on every machine.

        Raises:
            UserError: there is no such split, or lm-eval's classes cannot be had.
        """
        if split not in SIZES:
            raise unknown("split", split, SIZES, where=f"task {self.card.name}")
        return self._parts[split]

    def prompt(self, item: Item) -> Prompt:
        """Return the prompt as one user turn."""
        return (Message("user", item.question),)

    def score(self, item: Item, completion: str) -> Score:
        """Judge by lm-eval's checkers, strictly and loosely."""
        return follow(self._library, item, completion)

    @cached_property
    def _library(self) -> InstructionLibrary:
        return load_library()

    @cached_property
    def _parts(self) -> dict[str, tuple[Item, ...]]:
        wanted = sum(size or 0 for size in SIZES.values())
        made: dict[str, Keyed] = {}
        draw = 0
        while len(made) < wanted:
            item = self._make(draw)
            made.setdefault(item.question, Keyed(item.question, item))
            draw += 1
        return cut(made.values(), SIZES)

    def _make(self, draw: int) -> Item:
        """Make the prompt of one draw; the types take turns, so that all are equally frequent."""
        rng = random.Random(seed_for(VERSION, "instruction_following", draw))
        first = _KINDS[draw % len(_KINDS)]
        chosen = [first]
        partners = [kind for kind in _KINDS if not self._conflict(first.name, kind.name)]
        if partners and rng.random() < 0.5:
            chosen.append(_pick(rng, partners))
        opening = _pick(rng, _OPENINGS).format(subject=_pick(rng, _SUBJECTS))
        sentences, settings = [opening], []
        for kind in chosen:
            instruction = self._library.classes[kind.name](kind.name)
            sentences.append(instruction.build_description(**kind.draw(rng)))
            settings.append(instruction.get_instruction_args() or {})
        names = [kind.name for kind in chosen]
        return Item(" ".join(sentences), data={"instruction_id_list": names, "kwargs": settings})

    def _conflict(self, one: str, other: str) -> bool:
        """Say whether two types must not be combined."""
        table = self._library.conflicts
        official = other in table.get(one, ()) or one in table.get(other, ())
        own = other in _OWN_CONFLICTS.get(one, ()) or one in _OWN_CONFLICTS.get(other, ())
        ends = one in _AT_ENDS and other in _AT_ENDS
        return one == other or official or own or ends
