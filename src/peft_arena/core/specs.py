"""Frozen descriptions of what is run. A run's id is a hash of its spec, so a label cannot differ from what ran."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from peft_arena.core.ids import canonical_json, content_id

Table = dict[str, Any]
Name = Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$")]


class Spec(BaseModel):
    """Base of every spec: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def canonical(self) -> str:
        """Return the canonical JSON of the spec, every default written out."""
        return canonical_json(self.model_dump(mode="json"))

    @property
    def id(self) -> str:
        """Twelve hex digits that change whenever any field does."""
        return content_id(self.model_dump(mode="json"))


class ModelSpec(Spec):
    """A causal language model at a fixed revision."""

    name: str = Field(min_length=1)
    """``micro``, a hub id or a local directory."""
    revision: str | None = None
    """Hub commit or tag, or what :func:`peft_arena.models.load.pin` fills in; None before that."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the frozen weights and of the arithmetic; trained weights are float32 under mixed precision."""


class CodeSpec(Spec):
    """Base of what stands for code: ours, or that of an installed plug-in."""

    plugin: str | None = None
    """Distribution and version of the plug-in the code is from; None, and then not written down, if it is ours."""

    @model_serializer(mode="wrap")
    def _leave_out_none(self, dump: SerializerFunctionWrapHandler) -> Table:
        table: Table = dump(self)
        if self.plugin is None:
            table.pop("plugin", None)
        return table


class MethodSpec(CodeSpec):
    """A fine-tuning method with its complete, validated configuration."""

    name: Name
    config: Table = Field(default_factory=dict)


class TaskSpec(CodeSpec):
    """A task with its complete, validated configuration."""

    name: Name
    version: int = 1
    revision: str = ""
    """Version of the task's data, from its card: other data is another task."""
    config: Table = Field(default_factory=dict)


class Schedule(Spec):
    """How long to train: exactly one of steps, tokens and epochs."""

    steps: int | None = Field(default=None, ge=1)
    tokens: int | None = Field(default=None, ge=1)
    """Real (not padded) input tokens, rounded up to whole steps."""
    epochs: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _one(self) -> Schedule:
        given = [name for name in ("steps", "tokens", "epochs") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of steps, tokens, epochs; given: {', '.join(given) or 'none'}")
        return self


class TrainSpec(Spec):
    """Supervised fine-tuning of one run. Every field is part of the run's identity."""

    objective: Literal["sft"] = "sft"
    task: TaskSpec
    examples: int | None = Field(default=None, ge=1)
    """Use the first so many training items; None for all."""
    schedule: Schedule
    batch_size: int = Field(default=8, ge=1)
    """Examples in one optimizer step."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Examples in one forward pass; must divide batch_size. None: the whole batch."""
    learning_rate: float = Field(gt=0, allow_inf_nan=False)
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    max_grad_norm: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    max_length: int = Field(default=1024, ge=8)
    """Longest example in tokens."""
    overlong: Literal["drop", "error"] = "drop"
    """What happens to examples longer than max_length; dropped ones are counted in the record."""
    loss_on: Literal["answer", "all"] = "answer"
    packing: bool = False
    """Concatenate examples up to max_length in one row, each attending only to itself."""
    group_by_length: bool = False
    """Put examples of similar length into the same batch."""
    save_points: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (1.0,)
    """Fractions of training at which a checkpoint is kept; the last must be 1."""
    validation_items: int = Field(default=64, ge=0)
    """Validation items for the held-out loss; 0 turns it off."""
    log_every: int = Field(default=5, ge=1)
    """Steps between two logged training losses."""
    validate_every: float = Field(default=0.25, gt=0, le=1)
    """Fraction of training between two held-out losses."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainSpec:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}")
        if (
            not self.save_points
            or self.save_points[-1] != 1.0
            or list(self.save_points) != sorted(set(self.save_points))
        ):
            raise ValueError(f"save_points must increase and end in 1.0, got {list(self.save_points)}")
        return self


class RunSpec(Spec):
    """One run: a model, a method, how it was trained, and the seed. The base model is the run without training."""

    model: ModelSpec
    method: MethodSpec
    train: TrainSpec | None = None
    seed: int = Field(default=0, ge=0)

    @property
    def run_id(self) -> str:
        """A readable name and twelve hex digits of the canonical JSON. Only the hash identifies."""
        parts = [self.model.name.rstrip("/").rsplit("/", 1)[-1], self.method.name]
        if self.train is not None:
            parts += [self.train.task.name, f"s{self.seed}"]
        readable = re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")
        return f"{readable}-{self.id}"

    @property
    def is_base(self) -> bool:
        """Whether this is the pretrained model itself."""
        return self.train is None


class EvalSpec(Spec):
    """One evaluation: which items of which task. Batch size and hardware are in the record, not in the identity."""

    task: TaskSpec
    split: Literal["validation", "test"] = "test"
    items: int | None = Field(default=None, ge=1)
    """The first so many items of the split, in the task's own order; None for all."""

    @property
    def key(self) -> str:
        """File-name-safe key of the record: task name and hash."""
        return f"{re.sub(r'[^A-Za-z0-9]+', '-', self.task.name)}-{self.id}"


Way = Literal["own", "sqrt", "linear"]


class RuleSpec(CodeSpec):
    """A rule that turns one factor into a factor for each layer, with its complete, validated configuration."""

    name: Name = "uniform"
    config: Table = Field(default_factory=dict)


class PathSpec(Spec):
    """A path from the pretrained model to a tuned one."""

    way: Way = "own"
    """``own``: by the method's own parameters; ``sqrt``: the same, a rotation's generator times the square root of the
    factor; ``linear``: straight from W0 to W1."""
    rule: RuleSpec = RuleSpec()

    @property
    def readable(self) -> str:
        """Way and rule in words, safe in file names."""
        return "-".join(([] if self.way == "own" else [self.way]) + [self.rule.name])


OWN = PathSpec()
"""The method's own path, the same factor everywhere."""


class Point(Spec):
    """One set of weights: a run at a step, moved a factor along a path (1 is the trained weights if it is uniform)."""

    run_id: str
    step: int = Field(ge=0)
    factor: float = 1.0
    path: PathSpec = OWN

    @property
    def key(self) -> str:
        """Directory name of the point's records."""
        place = f"{self.step:06d}-{self.factor:.12g}"
        return place if self.path == OWN else f"{place}-{self.path.readable}-{self.path.id}"
