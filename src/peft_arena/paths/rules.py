"""Every rule by name; nothing is imported until a name is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peft_arena.core.build import build
from peft_arena.core.registry import Registry
from peft_arena.core.specs import RuleSpec
from peft_arena.paths.base import Rule, RuleCard, RuleConfig

if TYPE_CHECKING:
    from peft_arena.weights.svd import SvdCache

GROUP = "peft_arena.rules"
"""Entry points of this group are rules of installed plug-ins."""


def problem_of(name: str, found: object) -> str:
    """Say why an object cannot be the rule of a name; empty if it can."""
    if not (isinstance(found, type) and issubclass(found, Rule)):
        return "it is not a subclass of peft_arena.paths.base.Rule"
    card, config = getattr(found, "card", None), getattr(found, "Config", None)
    if not isinstance(card, RuleCard):
        return "it has no card"
    if not (isinstance(config, type) and issubclass(config, RuleConfig)):
        return "its Config is not a subclass of RuleConfig"
    return "" if card.name == name else f"its card says the rule is called '{card.name}'"


RULES: Registry[type[Rule]] = Registry(
    "rule",
    {
        "intruder": "peft_arena.paths.intruder:Intruder",
        "lines": "peft_arena.paths.lines:Lines",
        "min": "peft_arena.paths.weakest:Weakest",
        "safe": "peft_arena.paths.safe:Safe",
        "uniform": "peft_arena.paths.uniform:Uniform",
    },
    group=GROUP,
    problem=problem_of,
)
"""Name to rule class. Listing the names imports no rule."""


def rule_spec(name: str, config: Mapping[str, Any] | None = None, where: str = "") -> RuleSpec:
    """Return the spec of a rule, every default written out.

    Args:
        name: one of ``RULES.names()``.
        config: the rule's own settings; what is not given takes its default.
        where: file and line, or the option, the request was read from, for messages.

    Raises:
        UserError: unknown name, unknown key or forbidden value.
    """
    rule = make_rule(name, config, where=where)
    return RuleSpec(name=name, config=rule.config.model_dump(mode="json"), plugin=RULES.plugin(name))


def make_rule(
    rule: RuleSpec | str,
    config: Mapping[str, Any] | None = None,
    *,
    where: str = "",
    cache: SvdCache | None = None,
) -> Rule:
    """Return a rule with its settings checked.

    Args:
        rule: a spec, which holds the settings, or one of ``RULES.names()``.
        config: the settings where ``rule`` is a name; what is not given takes its default.
        where: file and line, or the option, the request was read from, for messages.
        cache: keeps decompositions of pretrained weights; None for the usual place.

    Raises:
        UserError: unknown name, unknown key or forbidden value; or the rule of the spec now comes from another
            plug-in, or version of it.
        ValueError: settings beside a spec.
    """
    if isinstance(rule, RuleSpec):
        if config is not None:
            raise ValueError("a spec holds its settings")
        RULES.check_plugin(rule.name, rule.plugin)
        return make_rule(rule.name, rule.config, where=where, cache=cache)
    kind = RULES.get(rule, where)
    place = f"rule {rule}" + (f", {where}" if where else "")
    return kind(build(kind.Config, config or {}, where=place), cache=cache)
