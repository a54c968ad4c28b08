"""Sample rollouts for a page: what a model wrote while it was trained, with nothing in it that the browser obeys."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from peft_arena.analyze.rl_curves import RLArm, RLRun
from peft_arena.report.markup import Markup, cell, escape, join, table, tag
from peft_arena.report.numbers import NONE, plain, signed
from peft_arena.store.records import SampledCompletion, SampledGroup

MOST_PROMPT, MOST_COMPLETION, MOST_ANSWER = 1200, 700, 300
"""Characters of a text that are shown."""
MOST_GROUPS = 2
"""Groups shown of each of the beginning, the middle and the end."""
MOST_COMPLETIONS = 8
_SHOWN_END = 0.4
"""Share of what is shown of a long text that is taken from its end, where the answer is."""
RECORDED = 4000
"""Characters of a completion that a record holds; a longer one ends with a note of what was cut."""
_CUT = re.compile(r" \[…(\d+) more characters\]\Z")
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Unicode categories of characters that show nothing or act on others."""


_MASKED = (
    "Completions that met the limit were left out of the loss (truncated: mask); their rewards still count in the "
    "advantages of their group."
)


def visible(text: str) -> Markup:
    """Return text for a page with every control character, surrogate and direction mark written out."""
    parts: list[str] = []
    plain_text: list[str] = []
    for character in text:
        if character == "\n" or unicodedata.category(character) not in _HIDDEN:
            plain_text.append(character)
            continue
        parts += [escape("".join(plain_text)), tag("span", _named(ord(character)), class_="ctl")]
        plain_text = []
    return Markup("".join([*parts, escape("".join(plain_text))]))


def _named(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"U+{code:04X}"


def cut(text: str, most: int) -> Markup:
    """Return a text as a block of a page: its beginning and its end, with a note of what is left out between.

    Of a text that the record itself holds only the beginning of, that is all that is shown.
    """
    if not text:
        return tag("p", "(empty)", class_="note")
    text, missing = _recorded(text)
    if missing:
        note = tag("span", f" … {len(text[most:]) + missing} characters left out, the end among them", class_="cut")
        return tag("pre", visible(text[:most]), note, class_="text")
    if len(text) <= most:
        return tag("pre", visible(text), class_="text")
    end = int(_SHOWN_END * most)
    note = tag("span", f" … {len(text) - most} characters left out … ", class_="cut")
    return tag("pre", visible(text[: most - end]), note, visible(text[-end:]), class_="text")


def _recorded(text: str) -> tuple[str, int]:
    """Return what a record holds of a text, and how many characters of it are not in the record."""
    found = _CUT.search(text, RECORDED)
    return (text[:RECORDED], int(found[1])) if found and found.start() == RECORDED else (text, 0)


def _begins(text: str) -> Markup:
    """Return the beginning of a text in a line, with a note of what is left out."""
    text, missing = _recorded(text)
    left = len(text[MOST_ANSWER:]) + missing
    note = tag("span", f" … {left} characters left out", class_="cut") if left else Markup("")
    return join([visible(text[:MOST_ANSWER]), note])


def samples_section(arms: Sequence[RLArm]) -> Markup | None:
    """Return the sample rollouts of every arm, folded; None where no record has any."""
    found = [shown for arm in arms if (shown := _arm(arm)) is not None]
    if not found:
        return None
    note = (
        "Completions of the training as they were sampled, cut where a note says so. Characters that would be "
        "invisible are written out in boxes. More groups and seeds are in records/training.json of the runs."
    )
    return join([tag("h3", "Sample rollouts"), tag("p", note, class_="note"), *found])


def _arm(arm: RLArm) -> Markup | None:
    """Return the samples of the arm's first run that has some."""
    for run in arm.runs:
        if run.training.rollouts is not None and run.training.rollouts.samples:
            title = f"{arm.label}, seed {run.seed}"
            masked = run.spec.truncated == "mask"
            note = tag("p", _MASKED, class_="note") if masked else Markup("")
            return tag(
                "details", tag("summary", title), note, *_groups(run, run.training.rollouts.samples), class_="samples"
            )
    return None


def _groups(run: RLRun, samples: Sequence[SampledGroup]) -> list[Markup]:
    """Return the first groups of the first, of the middle and of the last step there are samples of."""
    steps = sorted({group.step for group in samples})
    shown = dict.fromkeys((steps[0], steps[len(steps) // 2], steps[-1]))
    found = []
    for step in shown:
        groups = [group for group in samples if group.step == step]
        found.append(tag("h4", f"After {step} of {run.training.steps} steps"))
        found += [_group(group) for group in groups[:MOST_GROUPS]]
    return found


def _group(group: SampledGroup) -> Markup:
    completions = group.completions[:MOST_COMPLETIONS]
    left = len(group.completions) - len(completions)
    rows = [_row(completion) for completion in completions]
    head = ["reward", "advantage", "rewards", "tokens", "completion", "what was judged"]
    note = f"{left} more completions of this group are not shown." if left else ""
    caption = f"{len(group.completions)} completions, compared with each other"
    return join(
        [
            tag("p", tag("b", "Item ", visible(group.item))),
            tag("p", "Prompt", class_="note"),
            cut(group.prompt, MOST_PROMPT),
            tag("p", "Gold answer", class_="note"),
            cut(group.answer, MOST_ANSWER),
            table(caption, head, rows, "rollouts", note, text=(2, 4, 5)),
        ]
    )


def _row(found: SampledCompletion) -> list[Markup]:
    parts = ", ".join(f"{name}\N{NO-BREAK SPACE}{value:.3g}" for name, value in found.rewards.items())
    limit = Markup("") if found.ended else tag("small", "met the limit", class_="worse")
    judged = _begins(found.extracted) if found.extracted else escape(NONE)
    why = tag("small", "no score: ", _begins(found.reason)) if found.reason else Markup("")
    return [
        escape(plain(found.reward, 2)),
        cell(signed(found.advantage, 2)),
        cell(visible(parts), "txt"),
        cell(join([found.tokens, limit])),
        cell(cut(found.text, MOST_COMPLETION), "txt"),
        cell(join([judged, why]), "txt"),
    ]
