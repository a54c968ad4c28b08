"""What is measured of the geometry of a fine-tuned model, with every default written out: part of a record's key."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from peft_arena.core.specs import Spec, TaskSpec

Pattern = Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$")]
Modules = Literal["all-linear"] | Annotated[tuple[Pattern, ...], Field(min_length=1)]
"""``all-linear`` (every linear layer but the output layer) or module names, each a whole name or its last parts."""
Blocks = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
What = Literal["spectra", "drift", "activations"]


class PromptSpec(Spec):
    """Where prompts come from: a task's items or a file. Exactly one of the two."""

    task: TaskSpec | None = None
    """The prompts of a task, without answers, rendered as in training and evaluation."""
    split: Literal["train", "validation", "test"] = "test"
    """Which items of the task."""
    file: str | None = None
    """A txt (one prompt per line), jsonl or json file."""
    sha256: str | None = None
    """Of the file's content, so that a changed file is another set."""

    @model_validator(mode="after")
    def _one(self) -> PromptSpec:
        if (self.task is None) == (self.file is None):
            raise ValueError("give exactly one of task and file")
        return self

    @property
    def name(self) -> str:
        """How the source is called in tables."""
        return self.task.name if self.task is not None else str(self.file)


class MeasuredSpec(Spec):
    """Base of the three: what it is called, and on which modules."""

    what: What
    modules: Modules = "all-linear"
    layers: Blocks | None = None
    """Only inside these transformer blocks, counted from 0; None for all."""

    @property
    def key(self) -> str:
        """File-name-safe key of the record: what, and a hash of every setting."""
        return f"{self.what}-{self.id}"

    @property
    def needs_weights(self) -> bool:
        """Whether a point must have weights of its own, as prompts do not."""
        return self.what != "activations"


class SpectraSpec(MeasuredSpec):
    """Weight-space spectra of the linear layers."""

    what: Literal["spectra"] = "spectra"
    precision: Literal["float32", "float64"] = "float32"
    """Type of the arithmetic."""
    alignment: Literal["free", "all"] = "free"
    """Singular-vector alignment where the change is a rotation, or by a second SVD for every method."""


class PromptedSpec(MeasuredSpec):
    """What is measured on prompts."""

    general: tuple[PromptSpec, ...]
    """Prompts of what the model could before; those of several sources are taken in turn."""
    target: tuple[PromptSpec, ...]
    """Prompts of what it was tuned for."""
    prompts: int = Field(default=300, ge=1)
    """Most prompts of each of the two sets."""
    max_length: int = Field(default=1024, ge=1)
    """Longest prompt in tokens; longer ones are cut and counted."""


class DriftSpec(PromptedSpec):
    """Capability-conditioned drift: what the weight change does to the inputs that prompts cause."""

    what: Literal["drift"] = "drift"


class ActivationsSpec(PromptedSpec):
    """Activation geometry, and the forward KL divergence of the next-token distributions."""

    what: Literal["activations"] = "activations"
    preset: Literal["none", "paper8"] = "paper8"
    """``paper8``: query, key, value and down projections at two depths; it stands for modules and layers."""
    tokens: int = Field(default=4096, ge=1)
    """Most tokens of each set, drawn evenly from all of its tokens."""
    gram_tokens: int = Field(default=1024, ge=2)
    """Of these the most that Gram matrices are made of."""
    pca: tuple[Annotated[int, Field(ge=1)], ...] = (32, 64)
    """Dimensions of the principal subspaces."""
    seed: int = Field(default=0, ge=0)
    """Draws the tokens."""

    @model_validator(mode="after")
    def _either(self) -> ActivationsSpec:
        if self.preset != "none" and (self.modules != "all-linear" or self.layers is not None):
            raise ValueError(f"preset {self.preset} stands for modules and layers; set it to none to choose them")
        return self


GeometrySpec = SpectraSpec | DriftSpec | ActivationsSpec
