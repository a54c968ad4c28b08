"""What a rule is: a card, a strict config, and how it moves tuned weights to a point of its path.

Shared code asks a rule's card, never its name. Importing a rule's module never imports torch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict

from peft_arena.core.errors import UserError
from peft_arena.methods.base import Capability

if TYPE_CHECKING:
    from peft_arena.weights.effective import EffectiveWeights
    from peft_arena.weights.svd import SvdCache

Progress = Callable[[float, str], None]
"""Called with the fraction that is done and what is being done."""
Plan = Callable[[float], "EffectiveWeights"]
"""From a factor, at least 0, to the weights at that point; cheap, everything it needs is measured."""
PRETRAINED, TUNED = "pretrained", "tuned"


class RuleCard(BaseModel):
    """What a reader must know about a rule."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    title: str
    paper: str
    """Authors, year, title; or ``none``."""
    url: str
    description: str
    zero: str
    """What factor 0 is: ``pretrained`` for the pretrained model itself, else in words."""
    one: str
    """What factor 1 is: ``tuned`` for the tuned model itself, else in words."""
    needs: frozenset[Capability] = frozenset()
    """What a method's card must declare for the rule, besides weights."""
    deviations: tuple[str, ...] = ()
    """Where this implementation differs from the paper."""

    @property
    def from_base(self) -> bool:
        """Whether factor 0 is the pretrained model."""
        return self.zero == PRETRAINED

    @property
    def to_tuned(self) -> bool:
        """Whether factor 1 is the tuned model."""
        return self.one == TUNED


class RuleConfig(BaseModel):
    """Settings of a rule; each rule subclasses it. Unknown keys are errors.

    The docstring below a field is its description in the documentation.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def quiet(fraction: float, what: str) -> None:
    """Say nothing of progress."""


class Rule(ABC):
    """One way to go from a tuned model to other points, with its settings."""

    card: ClassVar[RuleCard]
    Config: ClassVar[type[RuleConfig]] = RuleConfig

    def __init__(self, config: RuleConfig | None = None, *, cache: SvdCache | None = None) -> None:
        """Create the rule with its settings.

        Args:
            config: an instance of :attr:`Config`; the defaults where none is given.
            cache: keeps decompositions of pretrained weights; None for the usual place.
        """
        self.config = config if config is not None else self.Config()
        self._cache = cache
        self._held: tuple[EffectiveWeights, Plan] | None = None

    @property
    def cache(self) -> SvdCache:
        """What keeps the decompositions of pretrained weights."""
        if self._cache is None:
            from peft_arena.weights.svd import SvdCache, default_root

            self._cache = SvdCache(default_root())
        return self._cache

    def refuses(self, weights: EffectiveWeights) -> str:
        """Return in one line why the rule cannot work on these weights; empty if it can."""
        return ""

    @abstractmethod
    def plan(self, weights: EffectiveWeights, progress: Progress) -> Plan:
        """Measure what the rule needs of tuned weights, once, for any number of factors.

        Args:
            weights: at factor 1 of their way, which :meth:`refuses` has nothing against.
            progress: told the fraction done and the module.

        Raises:
            UserError: what was measured leaves the rule without an answer.
        """

    def prepare(self, weights: EffectiveWeights, progress: Progress = quiet) -> Plan:
        """Return the plan for tuned weights; the one made last is kept as long as the same object is given.

        Raises:
            UserError: the rule cannot work on these weights.
        """
        if self._held is None or self._held[0] is not weights:
            reason = self.refuses(weights)
            if reason:
                raise UserError(f"rule {self.card.name} cannot be used here: {reason}")
            self._held = None
            self._held = (weights, self.plan(weights, progress))
        return self._held[1]

    def apply(self, weights: EffectiveWeights, factor: float) -> EffectiveWeights:
        """Return the point of the rule at a factor.

        Args:
            weights: the tuned ones, at factor 1 of their way (``along`` already applied). Give the same object for
                every factor of a grid: it is measured once.
            factor: at least 0; the card says what 0 and 1 are.

        Raises:
            UserError: the factor is negative or not finite, or the rule cannot work on these weights.
        """
        if not (math.isfinite(factor) and factor >= 0):
            raise UserError(f"rule {self.card.name}: a factor is a finite number of at least 0, got {factor:g}")
        return self.prepare(weights)(factor)


class LayerRule(Rule):
    """A rule that gives each parameter a factor of its own, times the global one: factor 0 is the pretrained model."""

    @abstractmethod
    def factors(self, weights: EffectiveWeights, progress: Progress) -> Mapping[str, float]:
        """Return the factor of each parameter at global factor 1; those that are left out have 1.

        Args:
            weights: as for :meth:`plan`.
            progress: told the fraction done and the module.

        Raises:
            UserError: what was measured leaves the rule without an answer.
        """

    def plan(self, weights: EffectiveWeights, progress: Progress) -> Plan:
        """Measure the factors; see :meth:`Rule.plan`."""
        factors = self.factors(weights, progress)
        point = weights.scaled(factors) if factors else weights
        return point.interpolated


def of_blocks(weights: EffectiveWeights, factors: Mapping[int, float]) -> dict[str, float]:
    """Return the factor of every parameter inside the given blocks, norms and biases too.

    Args:
        weights: whose parameters.
        factors: by the index of a transformer block.
    """
    from peft_arena.methods.targets import block_of

    found: dict[str, float] = {}
    for name in weights.parameters():
        block = block_of(name)
        if block is not None and block in factors:
            found[name] = factors[block]
    return found
