"""The records: what is written once, kept, and read by every table, report and recommendation."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from peft_arena.core.measure import Measure
from peft_arena.core.paths import Expressed, ScanSpec
from peft_arena.core.specs import OWN, EvalSpec, ModelSpec, PathSpec, RunSpec

Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
"""How many there are of something, or which step: what a column of whole numbers can hold."""
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(ge=0)]
SCHEMA: Literal[1] = 1
"""Version of every record below; a change of meaning raises it and adds a migration."""


FROZEN = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
"""Of every record and its parts: an unknown field, and a number that is not finite, is an error."""


def _moment(text: str) -> str:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        raise ValueError("must be a time of ISO 8601 such as 2026-07-26T10:00:00+00:00") from None
    return text


Moment = Annotated[str, AfterValidator(_moment)]


class Record(BaseModel):
    """Base of every record: frozen, strict, versioned."""

    model_config = FROZEN

    schema_version: Literal[1] = SCHEMA

    @field_validator("schema_version", mode="before")
    @classmethod
    def _a_number(cls, value: object) -> object:
        if isinstance(value, bool):  # which equals 1
            raise ValueError("must be a whole number")
        return value


class RunRecord(Record):
    """``run.json``: what the run is. Written before any work."""

    kind: Literal["run"] = "run"
    spec: RunSpec
    created: Moment
    """UTC time, ISO 8601."""
    provenance: dict[str, Any]


class ItemRecord(BaseModel):
    """One item of an evaluation, kept because base and tuned model answer the same items."""

    model_config = FROZEN

    id: str
    value: float | None
    """Headline value, of several samples their mean; None: could not be scored, and ``reason`` says why."""
    weight: Positive = 1.0
    others: dict[str, tuple[float, Positive]] = Field(default_factory=dict)
    """Further metrics: name to (value, weight)."""
    extracted: str = ""
    reason: str = ""
    output: str = ""
    """What the model wrote; empty for likelihood tasks, and where it was asked for several answers."""
    group: str = Field(default="", exclude_if=lambda group: not group)
    """What the item shares with others, see :class:`peft_arena.tasks.base.Item`; empty, and then not written down, for
    an item that stands alone and in older records."""
    outputs: tuple[str, ...] = Field(default=(), exclude_if=lambda texts: not texts)
    """Every sampled answer, in the order of the samples; empty, and then not written down, without sampling."""


class Written(BaseModel):
    """How the answers that a model wrote ended."""

    model_config = FROZEN

    answers: Count
    """Written answers: one for each item that was asked, of sampled answers several."""
    met_limit: Count
    """Of these, how many went on until the limit of new tokens."""
    limit: Count | None
    """Most new tokens of an answer; None where the task's own source decides it."""


DECODING, READING = "decoding", "reading"
"""What an engine says of itself where answers were not written with a cache, or texts not read side by side."""


class EvaluationRecord(Record):
    """All items and metrics of one task at one point."""

    kind: Literal["evaluation"] = "evaluation"
    run_id: str
    step: Count
    factor: float
    path: PathSpec = OWN
    """Along which the factor moves the weights."""
    spec: EvalSpec
    card: dict[str, Any]
    """The task card (tasks of other sources: the same keys)."""
    metrics: tuple[Measure, ...]
    """One per metric of the card, the headline first; then pass@k of sampled answers."""
    items: tuple[ItemRecord, ...]
    written: Written | None = Field(default=None, exclude_if=lambda written: written is None)
    """How the answers ended; None, and then not written down, in older records and where nothing is written."""
    engine: dict[str, Any]
    """Engine, version, batch size, device, dtype: what must not change the result; where the model had to be run
    slowly, how and why (:data:`DECODING`, :data:`READING`)."""
    provenance: dict[str, Any]

    @property
    def called(self) -> str:
        """What people call the task: the name on its card."""
        return str(self.card.get("name") or self.spec.task.name)


class RolloutEntry(BaseModel):
    """What reinforcement learning did since the last log entry; means are over completions unless said otherwise.

    Where ``completions`` is 0 there was no new rollout: what is said of completions is then that of the one trained on.
    """

    model_config = FROZEN

    reward: float
    """Mean of the weighted sum of all rewards."""
    reward_std: Positive
    """Standard deviation of the same over completions."""
    rewards: dict[str, float]
    """Mean of each reward by name, not weighted."""
    unscored: Fraction
    """Fraction of completions whose task score had no value; they count as reward 0."""
    length: Positive
    """Mean tokens of a completion, its end token included."""
    ended: Fraction
    """Fraction of completions that ended before the limit of new tokens."""
    zero_variance: Fraction
    """Fraction of groups whose completions all had the same reward, and so taught nothing."""
    entropy: float | None
    """Nats per token, of the policy that was updated; None where no token was trained on."""
    clip_low: Fraction | None
    """Fraction of tokens (rloo: completions) whose ratio met the lower bound with a negative advantage."""
    clip_high: Fraction | None
    """The same for the upper bound with a positive advantage."""
    kl: float | None
    """Nats per token from the reference, by the estimate r - log r - 1 (Schulman 2020), r the reference's probability
    over the policy's; None where it was not measured."""
    completions: Count
    generated_tokens: Count
    rollout_seconds: Positive
    """Wall time of generating and scoring."""
    update_seconds: Positive
    """Wall time of everything else in the optimizer steps, the reference's passes among it."""


class LogEntry(BaseModel):
    """One point of a learning curve."""

    model_config = FROZEN

    step: Count
    tokens: Count
    """Real input tokens trained on so far."""
    loss: float | None = None
    """Mean training loss since the last entry, nats per answer token."""
    validation_loss: float | None = None
    learning_rate: Positive | None = None
    grad_norm: Positive | None = None
    rollout: RolloutEntry | None = None
    """Of reinforcement learning; None for supervised fine-tuning."""
    validation_reward: float | None = None
    """Mean task score of greedy answers to the validation items."""


class SampledCompletion(BaseModel):
    """One completion that was trained on."""

    model_config = FROZEN

    text: str
    tokens: Count
    ended: bool
    """Whether it ended before the limit of new tokens."""
    reward: float
    rewards: dict[str, float]
    advantage: float
    extracted: str = ""
    """What the task's score judged."""
    reason: str = ""
    """Why the task's score had no value; empty if it had one."""


class SampledGroup(BaseModel):
    """One prompt of a rollout and what was made of it."""

    model_config = FROZEN

    step: Count
    """Optimizer steps done before."""
    item: str
    """Id of the task's item."""
    prompt: str
    answer: str
    """The item's gold answer."""
    completions: tuple[SampledCompletion, ...]


class Rollouts(BaseModel):
    """All rollouts of a training together."""

    model_config = FROZEN

    engine: dict[str, Any]
    """What generated: name, version, settings."""
    completions: Count
    groups: Count
    prompt_tokens: Count
    generated_tokens: Count
    unscored: Count
    """Completions whose task score had no value."""
    rollout_seconds: Positive
    """Wall time of generating and scoring."""
    scoring_seconds: Positive
    """Wall time of scoring alone."""
    update_seconds: Positive
    """Wall time of everything else in the optimizer steps."""
    samples: tuple[SampledGroup, ...]
    """A few groups from the beginning, the middle and the end."""


class Start(BaseModel):
    """What training began at, if not at the pretrained model."""

    model_config = FROZEN

    run_id: str
    step: Count
    how: str
    """In what form and type the other run's weights were put in place."""
    sha256: str
    """Over every tensor of the model that training began at."""


class TrainingRecord(Record):
    """What training did."""

    kind: Literal["training"] = "training"
    run_id: str
    steps: Count
    tokens: Count
    """Real input tokens trained on."""
    padded_tokens: Count
    """Tokens processed, padding included."""
    examples: Count
    """Distinct training examples available after dropping."""
    dropped: Count
    """Examples dropped for their length."""
    validation_items: Count | None = Field(default=None, exclude_if=lambda items: items is None)
    """Validation items behind the held-out loss or reward, at most as many as the spec says; None, and then not written
    down, in older records."""
    calibration_examples: Count | None = Field(default=None, exclude_if=lambda examples: examples is None)
    """Training examples the method was shown to choose its start, at most as many as its settings say; None, and then
    not written down, in older records and for methods that ask for none."""
    data: str = Field(default="", exclude_if=lambda data: not data)
    """Revision of the task's data as it was loaded; empty, and then not written down, in older records."""
    log: tuple[LogEntry, ...]
    save_points: tuple[Count, ...]
    """Steps with a checkpoint."""
    resumed_at: Count | None = None
    """Step the last process resumed from; None if undisturbed."""
    rollouts: Rollouts | None = None
    """Of reinforcement learning; None for supervised fine-tuning."""
    start: Start | None = None
    """None: training began at the pretrained model."""
    provenance: dict[str, Any]


class CostRecord(Record):
    """Measured and counted cost of a run."""

    kind: Literal["cost"] = "cost"
    run_id: str
    stage: Literal["training", "inference", "generation"]
    step: Count | None = Field(default=None, exclude_if=lambda step: step is None)
    """Of a generation benchmark: the point's step; None, and then not written down, for the others."""
    settings: dict[str, Any] = Field(default_factory=dict, exclude_if=lambda settings: not settings)
    """Of a generation benchmark: a GenerationSpec (:mod:`peft_arena.cost.generation`); empty for the others."""
    measures: tuple[Measure, ...]
    provenance: dict[str, Any]


class GeometryRow(BaseModel):
    """What was measured at one module, or of one parameter."""

    model_config = FROZEN

    module: str
    """Name in the model; empty for the model's output."""
    block: Count | None = None
    """Transformer block it is in."""
    prompts: Literal["", "general", "target", "ratio"] = ""
    """On which set of prompts; ``ratio``: general over target; empty where no prompts play a part."""
    values: dict[str, float | None]
    """Quantity (see :mod:`peft_arena.core.quantities`) to value; None where it is not defined."""
    reasons: dict[str, str] = Field(default_factory=dict)
    """Why a value is None, for each that is."""

    @model_validator(mode="after")
    def _explained(self) -> GeometryRow:
        absent = {name for name, value in self.values.items() if value is None}
        if absent != set(self.reasons):
            raise ValueError(f"{self.module}: reasons for {sorted(self.reasons)}, and none of {sorted(absent)}")
        if not all(value is None or math.isfinite(value) for value in self.values.values()):
            raise ValueError(f"{self.module}: a value is not finite")
        return self


class GeometryRecord(Record):
    """Spectra, drift or activation geometry of one point against the pretrained model."""

    kind: Literal["geometry"] = "geometry"
    subject: str
    """Run id, or the path of a checkpoint that is not a run of ours."""
    step: Count | None
    """None for a checkpoint that is not a run of ours."""
    base: ModelSpec | None = None
    """The pretrained model it was measured against, pinned; None in a record that was made before this was kept."""
    factor: float
    spec: dict[str, Any]
    """A SpectraSpec, DriftSpec or ActivationsSpec (:mod:`peft_arena.core.geometry`)."""
    summary: tuple[Measure, ...]
    """Means over modules, and totals."""
    rows: tuple[GeometryRow, ...]
    arrays: str | None = None
    """Name of the Parquet file of profiles beside this record."""
    arrays_sha256: str | None = None
    provenance: dict[str, Any]

    @property
    def what(self) -> str:
        """``spectra``, ``drift`` or ``activations``."""
        return str(self.spec["what"])


class PathRow(BaseModel):
    """What was found at one factor of a scan, on validation items; differences turned so that positive is better."""

    model_config = FROZEN

    factor: float
    target: float | None
    """Score on the target, in the task's unit."""
    target_change: tuple[float, float | None, float | None] | None
    """Against the tuned model: value and 95 % interval, in points for fractions, else in the task's unit."""
    retention_change: tuple[float, float | None, float | None] | None
    """Mean over the retention tasks that are fractions, against the tuned model, in points."""
    allowed: bool
    """Whether the point may be chosen: its target is not worse."""
    why: str
    """Why it may not be chosen; empty if it may."""


class Strength(BaseModel):
    """How far a transformer block is from the pretrained one."""

    model_config = FROZEN

    block: Count
    tuned: Positive
    """Root mean square over its linear layers of ||D||_F / ||W0||_F, in the tuned model."""
    chosen: Positive
    """The same at the chosen point."""


class PathRecord(Record):
    """A scan of a path: which point was chosen, and why."""

    kind: Literal["path"] = "path"
    run_id: str
    step: Count
    spec: ScanSpec
    chosen: float | None
    """Factor of the chosen point; None where no point but the tuned one may be chosen."""
    reason: str
    """Why this one, or why none."""
    rows: tuple[PathRow, ...]
    """One for each factor of the grid."""
    strengths: tuple[Strength, ...]
    """Of every block; empty where none was chosen."""
    expressed: Expressed
    """As what the chosen point, or else the tuned model, can be written."""
    orthogonality: float | None
    """Where the tuned weights are rotations: the largest ||R^T R - I||_F of a block of one, at any factor of the grid
    and in the tuned model; else None."""
    provenance: dict[str, Any]
