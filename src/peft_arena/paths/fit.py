"""Which paths a method has, by its card alone."""

from __future__ import annotations

from peft_arena.core.specs import PathSpec
from peft_arena.methods.base import MethodCard, PathKind, has_weights
from peft_arena.paths.rules import RULES


def path_refusal(card: MethodCard, path: PathSpec) -> str:
    """Return why a method has no such path, in one line; empty if it has.

    Raises:
        UserError: the rule is unknown.
    """
    if not has_weights(card):
        return f"{card.name} has no weights of its own between which and the pretrained ones a path could lead"
    if path.way == "sqrt" and card.path != PathKind.CAYLEY:
        return f"{card.name} scales no generator of a rotation, whose square root way 'sqrt' takes; use 'own'"
    if path.way == "linear" and card.path == PathKind.LINEAR:
        return f"the own path of {card.name} is the straight one; use way 'own'"
    lacking = sorted(RULES.get(path.rule.name).card.needs - card.capabilities)
    if lacking:
        return f"rule {path.rule.name} is for methods with {', '.join(lacking)}, which {card.name} does not declare"
    return ""
