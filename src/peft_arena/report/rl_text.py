"""Reinforcement learning in the few sentences at the top of a page."""

from __future__ import annotations

from peft_arena.analyze.compare import AXES, Axis
from peft_arena.analyze.rl import TargetRL
from peft_arena.analyze.rl_pairs import ObjectivePair
from peft_arena.report.numbers import listed, p_text
from peft_arena.report.words import about_runs, judged_text, resolution, sentence, subject, words_text

_NAMES: dict[Axis, str] = {"gain": "gain", "retention": "mean retention"}


def pair_sentence(pair: ObjectivePair) -> str:
    """Return a pair in one sentence, with differences, intervals and corrected p-values."""
    both = pair.comparison
    judged = [both.on(axis) for axis in AXES]
    parts = []
    for axis, one in zip(AXES, judged, strict=True):
        if one.word == "not comparable":
            parts.append(f"not comparable in {_NAMES[axis]}")
            continue
        p = p_text(one.p_corrected)
        sign = "" if p.startswith("<") else "= "
        parts.append(f"{words_text(one)} in {_NAMES[axis]} ({judged_text(one)}, p {sign}{p}{resolution([one])})")
    who = sentence(subject([both.left], about_runs(judged)))
    return f"{who} against {both.right}: {'; '.join(parts)}."


def rl_sentence(rl: TargetRL) -> str:
    """Return what the pairs with supervised fine-tuning say; empty without one that can be compared."""
    known = [pair for pair in rl.pairs if pair.comparison.gain.word != "not comparable" and "sft" in pair.objectives]
    if len(known) < 2:
        return pair_sentence(known[0]) if known else ""
    parts = []
    for axis in AXES:
        words = [pair.comparison.on(axis).word for pair in known]
        counts = [f"{word} in {words.count(word)}" for word in dict.fromkeys(words)]
        found = resolution([pair.comparison.on(axis) for pair in known])
        parts.append(f"{_NAMES[axis]} {listed(counts)}{f' ({found[2:]})' if found else ''}")
    runs = about_runs([pair.comparison.on(axis) for pair in known for axis in AXES])
    start = "These runs of reinforcement learning" if runs else "Reinforcement learning"
    return f"{start} against fine-tuning of the same method, {len(known)} pairs: {'; '.join(parts)}."


def rl_caveat(rl: TargetRL) -> str:
    """Return how many checks gave a warning; empty without any."""
    if not rl.warnings:
        return ""
    arms = listed(list(dict.fromkeys(found.arm for found in rl.warnings)))
    checks = "check" if len(rl.warnings) == 1 else "checks"
    return f"{len(rl.warnings)} {checks} of reinforcement learning gave a warning ({arms}); see “Worth a look” there."
