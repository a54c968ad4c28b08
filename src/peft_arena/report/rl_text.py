"""Reinforcement learning in the few sentences at the top of a page."""

from __future__ import annotations

from peft_arena.analyze.compare import AXES
from peft_arena.analyze.rl import TargetRL
from peft_arena.report.numbers import listed

_NAMES = {"gain": "gain", "retention": "mean retention"}
_WORDS = {"better": "significantly higher", "worse": "significantly lower", "tied": "no significant difference"}


def rl_sentence(rl: TargetRL) -> str:
    """Return what the pairs with supervised fine-tuning say; empty without one that can be compared."""
    known = [pair for pair in rl.pairs if pair.comparison.gain.verdict != "unknown" and "sft" in pair.objectives]
    if len(known) < 2:
        return known[0].sentence if known else ""
    parts = []
    for axis in AXES:
        verdicts = [pair.comparison.on(axis).verdict for pair in known]
        counts = [f"{words} in {verdicts.count(verdict)}" for verdict, words in _WORDS.items() if verdict in verdicts]
        if counts:
            parts.append(f"{_NAMES[axis]} {listed(counts)}")
    return f"Reinforcement learning against fine-tuning of the same method, {len(known)} pairs: {'; '.join(parts)}."


def rl_caveat(rl: TargetRL) -> str:
    """Return how many checks gave a warning; empty without any."""
    if not rl.warnings:
        return ""
    arms = listed(list(dict.fromkeys(found.arm for found in rl.warnings)))
    checks = "check" if len(rl.warnings) == 1 else "checks"
    return f"{len(rl.warnings)} {checks} of reinforcement learning gave a warning ({arms}); see “Worth a look” there."
