"""Rules that scale blocks down to a strength, and the search for the factor at which a block has it."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from peft_arena.core.errors import UserError
from peft_arena.methods.base import PathKind
from peft_arena.paths.base import LayerRule, Progress, RuleConfig, of_blocks, quiet
from peft_arena.paths.strength import NO_LINEAR, Kind, block_strengths, refuses

if TYPE_CHECKING:
    from peft_arena.weights.effective import EffectiveWeights
    from peft_arena.weights.svd import SvdCache

TOLERANCE = 0.005
"""Largest relative difference between the strength that is found and the one that is wanted."""
STEPS = 40
"""Most measurements of a block; halving alone would find its factor to 1e-12."""


class MatchConfig(RuleConfig):
    """Settings of every rule that goes by strength."""

    strength: Kind = "relative_norm"
    """What strength is: ``relative_norm``, ``spectral``, or ``angle`` for rotations."""


class MatchRule(LayerRule):
    """Scale each block that is stronger than a target down to it; leave the others.

    All parameters of a block, norms and biases too, get its factor; parameters outside blocks have the global one.
    Strengths are those of the tuned model and factors are found there: at other global factors than 1 the strengths
    of blocks are as flat as their path is straight.
    """

    Config: ClassVar[type[RuleConfig]] = MatchConfig
    config: MatchConfig

    @abstractmethod
    def target(self, strengths: Sequence[float]) -> float:
        """Return the strength that no block may exceed, above 0.

        Args:
            strengths: of the changed blocks, in the model's order; at least one, all above 0.
        """

    def refuses(self, weights: EffectiveWeights) -> str:
        """Return why blocks of these weights have no strength; empty if they have."""
        return refuses(weights, self.config.strength)

    def factors(self, weights: EffectiveWeights, progress: Progress) -> Mapping[str, float]:
        """Measure every block and match those above the target; see :meth:`LayerRule.factors`."""
        kind = self.config.strength
        cache = self.cache if kind == "spectral" else None
        found = block_strengths(weights, kind, cache=cache, progress=progress)
        changed = [strength for strength in found.values() if strength > 0]
        if not changed:
            raise UserError(f"rule {self.card.name} cannot be used here: {NO_LINEAR}")
        target = self.target(changed)
        matched = matching_factors(weights, kind, found, target, cache=cache, progress=progress)
        return of_blocks(weights, matched)


def matching_factors(
    weights: EffectiveWeights,
    kind: Kind,
    strengths: Mapping[int, float],
    target: float,
    *,
    cache: SvdCache | None = None,
    progress: Progress = quiet,
) -> dict[int, float]:
    """Return, for every block that is stronger than a target, the factor that brings it down to it.

    It is the ratio, exactly, where the path is straight. Elsewhere the ratio is a first guess, which is measured and,
    where it is off by more than :data:`TOLERANCE`, corrected by secant steps in log strength over log factor.

    Args:
        weights: the tuned ones, at factor 1 of their way.
        kind: of strength.
        strengths: of the blocks of ``weights``.
        target: above 0.
        cache: keeps decompositions of pretrained weights.
        progress: told the fraction of the current round of measurements.

    Raises:
        UserError: no factor was found for a block.
    """
    stronger = {block: strength for block, strength in strengths.items() if strength > target}
    if weights.way == "linear" or weights.path_kinds() == {PathKind.LINEAR}:
        return {block: target / strength for block, strength in stronger.items()}
    searches = {block: _Search(target, strength) for block, strength in stronger.items()}
    for _ in range(STEPS):
        unsure = {block: search.factor for block, search in searches.items() if not search.done}
        if not unsure:
            break
        point = weights.scaled(of_blocks(weights, unsure))
        measured = block_strengths(point, kind, blocks=unsure.keys(), cache=cache, progress=progress)
        for block, strength in measured.items():
            searches[block].learn(strength)
    lost = [block for block, search in searches.items() if not search.done]
    if lost:
        raise UserError(f"no factor brings block {lost[0]} to a strength ({kind}) of {target:g}: its strength jumps")
    return {block: search.factor for block, search in searches.items()}


class _Search:
    """For the factor, between 0 and 1, of one block."""

    def __init__(self, target: float, strength: float) -> None:
        self.target = target
        self.below, self.above = 0.0, 1.0
        self.last = (1.0, strength)
        self.factor = target / strength
        self.done = False

    def learn(self, strength: float) -> None:
        """Take the strength measured at the current factor and choose the next one."""
        if abs(strength - self.target) <= TOLERANCE * self.target:
            self.done = True
            return
        if strength > self.target:
            self.above = self.factor
        else:
            self.below = self.factor
        guess = self._secant(strength)
        self.last = (self.factor, strength)
        self.factor = guess if self.below < guess < self.above else (self.below + self.above) / 2

    def _secant(self, strength: float) -> float:
        """Return where strength = c factor^p through the last two points has the target; nan without such a p."""
        factor, before = self.last
        if strength <= 0 or before <= 0 or factor == self.factor:
            return math.nan
        power = math.log(strength / before) / math.log(self.factor / factor)
        return self.factor * (self.target / strength) ** (1 / power) if power > 0.05 else math.nan
