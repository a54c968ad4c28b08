"""The section ``pscp`` of a study file: the constants of the score. Reports alone go by it, never a run."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from peft_arena.core.specs import Spec
from peft_arena.cost.pscp import DEFAULT, Operations, PscpChoice, PscpConstants

Scale = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Exponent = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class PscpEntry(Spec):
    """The section as it is written; ``pscp: {}`` takes every default."""

    parameters: Scale = DEFAULT.parameters
    """C_p, trained parameters."""
    flops: Scale = DEFAULT.flops
    """C_f, operations of a forward pass of 1 x 512 tokens."""
    memory: Scale = DEFAULT.memory
    """C_m, bytes of peak training memory."""
    beta_parameters: Exponent = DEFAULT.beta_parameters
    beta_flops: Exponent = DEFAULT.beta_flops
    beta_memory: Exponent = DEFAULT.beta_memory
    operations: Operations = Operations.EXTRA
    """``extra``: operations above the base model, the paper's definition; ``total``: all of them."""

    @property
    def choice(self) -> PscpChoice:
        """What the analysis goes by."""
        constants = self.model_dump(exclude={"operations"})
        return PscpChoice(constants=PscpConstants(**constants), operations=self.operations)
