"""Frozen descriptions of what is run. A run's id is a hash of its spec, so a label cannot differ from what ran."""

from __future__ import annotations

import re
from datetime import date as Day  # noqa: N812 - a field is called date
from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
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


class OptionalSpec(Spec):
    """Base of specs with fields that came later: where they are None they are not written down, so ids stay."""

    later: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _leave_out_none(self, dump: SerializerFunctionWrapHandler) -> Table:
        table: Table = dump(self)
        return {key: value for key, value in table.items() if value is not None or key not in self.later}


class ChatSpec(Spec):
    """What a model's chat template is given besides the conversation: a date, and keywords of the template's own.

    Any other key is a keyword of the template, with a JSON value: ``enable_thinking: false``.
    """

    model_config = ConfigDict(frozen=True, extra="allow")
    RESERVED: ClassVar[frozenset[str]] = frozenset(
        [
            "add_generation_prompt",
            "chat_template",
            "continue_final_message",
            "conversation",
            "documents",
            "max_length",
            "messages",
            "padding",
            "raise_exception",
            "return_assistant_tokens_mask",
            "return_dict",
            "return_tensors",
            "sanitize_control_tokens",
            "strftime_now",
            "tokenize",
            "tokenizer_kwargs",
            "tools",
            "truncation",
            "bos_token",
            "eos_token",
            "unk_token",
            "sep_token",
            "pad_token",
            "cls_token",
            "mask_token",
            "additional_special_tokens",
            "extra_special_tokens",
        ]
    )
    """What transformers itself gives a template, or takes as an argument of its own."""
    date: Day | None = None
    """The day that a template which writes a date is told; None, and then not written down: always the same one."""

    @field_validator("date", mode="before")
    @classmethod
    def _a_day(cls, value: object) -> object:
        if value is None or isinstance(value, str) or (isinstance(value, Day) and not isinstance(value, datetime)):
            return value
        raise ValueError("must be a day, written as 2026-07-26")

    @model_validator(mode="after")
    def _keywords_of_a_template(self) -> Self:
        for name, value in self.keywords.items():
            if name in self.RESERVED:
                raise ValueError(f"'{name}' is given to every template as it is and cannot be set")
            try:
                canonical_json(value)
            except (TypeError, ValueError):
                raise ValueError(f"'{name}' must be a JSON value, got {value!r}") from None
        return self

    @model_serializer(mode="wrap")
    def _leave_out_no_date(self, dump: SerializerFunctionWrapHandler) -> Table:
        table: Table = dump(self)
        return {key: value for key, value in table.items() if key != "date" or value is not None}

    @property
    def keywords(self) -> Table:
        """The keywords of the template, the date not among them."""
        return dict(self.__pydantic_extra__ or {})


class ModelSpec(OptionalSpec):
    """A causal language model at a fixed revision, and how it is spoken to."""

    later: ClassVar[tuple[str, ...]] = ("chat", "rendering")
    name: str = Field(min_length=1)
    """``micro``, a hub id or a local directory."""
    revision: str | None = None
    """Hub commit or tag, or what :func:`peft_arena.models.load.pin` fills in; None before that."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the frozen weights and of the arithmetic; trained weights are float32 under mixed precision."""
    new_tokens: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(), exclude_if=lambda tokens: not tokens
    )
    """Tokens to add to the tokenizer, with a row of the embeddings each; see :mod:`peft_arena.models.extend`."""
    chat: ChatSpec | None = None
    """Keywords and date of the chat template; None, and then not written down, if there are none."""
    rendering: Literal[2] | None = None
    """Version of how prompts and answers become tokens, filled in with the revision. None, and then not written down:
    before that, and for the models to which the first version gave the same tokens."""

    @property
    def words(self) -> str:
        """Name, type, revision, new tokens and what the template is given, in words."""
        chat = "" if self.chat is None else f", chat {self.chat.canonical()}"
        rendering = "" if self.rendering is None else f", rendering {self.rendering}"
        tokens = f", new tokens {' '.join(self.new_tokens)}" if self.new_tokens else ""
        return f"{self.name} ({self.dtype}, {self.revision}{tokens}{chat}{rendering})"

    @field_validator("chat")
    @classmethod
    def _none_if_empty(cls, chat: ChatSpec | None) -> ChatSpec | None:
        return None if chat is None or not chat.model_dump() else chat


class CodeSpec(OptionalSpec):
    """Base of what stands for code: ours, or that of an installed plug-in."""

    later: ClassVar[tuple[str, ...]] = ("plugin",)
    plugin: str | None = None
    """Distribution and version of the plug-in the code is from; None, and then not written down, if it is ours."""


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


class TrainBase(OptionalSpec):
    """What every way of training has. Every field is part of the run's identity."""

    task: TaskSpec
    examples: int | None = Field(default=None, ge=1)
    """Use the first so many training items; None for all."""
    schedule: Schedule
    batch_size: int = Field(default=8, ge=1)
    """Examples (of reinforcement learning: completions) in one optimizer step."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Examples in one forward pass; must divide batch_size. None: the whole batch."""
    learning_rate: float = Field(gt=0, allow_inf_nan=False)
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    max_grad_norm: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    max_length: int = Field(default=1024, ge=8)
    """Longest example in tokens, of prompt and answer together."""
    overlong: Literal["drop", "error"] = "drop"
    """What happens to examples longer than max_length; dropped ones are counted in the record."""
    save_points: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (1.0,)
    """Fractions of training at which a checkpoint is kept; the last must be 1."""
    validation_items: int = Field(default=64, ge=0)
    """Validation items for the held-out loss or reward; 0 turns it off."""
    log_every: int = Field(default=5, ge=1)
    """Steps between two logged training losses."""
    validate_every: float = Field(default=0.25, gt=0, le=1)
    """Fraction of training between two held-out losses or rewards."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}")
        if (
            not self.save_points
            or self.save_points[-1] != 1.0
            or list(self.save_points) != sorted(set(self.save_points))
        ):
            raise ValueError(f"save_points must increase and end in 1.0, got {list(self.save_points)}")
        return self


class TrainSpec(TrainBase):
    """Supervised fine-tuning of one run."""

    objective: Literal["sft"] = "sft"
    loss_on: Literal["answer", "every", "all"] = "answer"
    """The answer (``last`` says the same), every assistant turn of a conversation, or every token."""
    packing: bool = False
    """Concatenate examples up to max_length in one row, each attending only to itself."""
    group_by_length: bool = False
    """Put examples of similar length into the same batch."""

    @field_validator("loss_on", mode="before")
    @classmethod
    def _one_word(cls, value: object) -> object:
        return "answer" if value == "last" else value


class RewardSpec(CodeSpec):
    """One term of a reward, with its complete, validated configuration."""

    name: Name = "task"
    weight: float = Field(default=1.0, allow_inf_nan=False)
    config: Table = Field(default_factory=dict)


class InitFrom(Spec):
    """Where training begins, if not at the pretrained model: another run, merged into the pretrained weights."""

    run: RunSpec
    step: int | None = Field(default=None, ge=1)
    """One of its save points; None: its last."""


Objective = Literal["sft", "grpo", "rloo"]


class RLSpec(TrainBase):
    """Reinforcement learning with verifiable rewards, of one run.

    A rollout is ``group_size`` completions of each of ``prompts_per_rollout`` prompts; its completions are shuffled and
    trained on in optimizer steps of ``batch_size``, ``updates_per_rollout`` times over. Shao et al. 2024, DeepSeekMath
    (GRPO); Ahmadian et al. 2024, Back to Basics (RLOO); Liu et al. 2025, Understanding R1-Zero-Like Training (dr_grpo);
    Yu et al. 2025, DAPO (dapo, clip_high).
    """

    later: ClassVar[tuple[str, ...]] = ("init_from",)
    objective: Literal["grpo", "rloo"]
    batch_size: int = Field(default=64, ge=2)
    """Completions in one optimizer step."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "constant"
    group_size: int = Field(default=8, ge=2)
    """Completions of one prompt, compared with each other."""
    prompts_per_rollout: int | None = Field(default=None, ge=1)
    """Prompts answered before the weights move; None: as many as one optimizer step takes."""
    updates_per_rollout: int = Field(default=1, ge=1)
    """Passes over the completions of a rollout."""
    loss: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "grpo"
    """How tokens are averaged: per completion first (grpo), over all tokens of a forward pass (bnpo) or of a rollout
    (dapo), or with a constant length (dr_grpo). RLOO has its own and takes none of them."""
    advantage_scale: Literal["group", "batch", "none"] = "group"
    """Standard deviation that advantages are divided by: of the group, of the rollout, or not at all."""
    clip_low: float = Field(default=0.2, gt=0, le=1)
    clip_high: float = Field(default=0.2, gt=0, allow_inf_nan=False)
    kl: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight of the divergence from the reference."""
    kl_reference: Literal["pretrained", "start"] = "pretrained"
    """The pretrained model, or the one that init_from names; the same without init_from."""
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    """Sample among so many most likely tokens; 0: among all."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Longest completion; None: the task's own limit."""
    truncated: Literal["keep", "mask"] = "keep"
    """Whether completions that met the limit are trained on, with the reward they got, or left out of the loss."""
    rewards: tuple[RewardSpec, ...] = Field(default=(RewardSpec(),), min_length=1)
    """Added up with their weights."""
    rollouts: Literal["transformers", "vllm_colocate", "vllm_server"] = "transformers"
    """What generates the completions."""
    log_every: int = Field(default=1, ge=1)
    """Steps between two log entries."""
    init_from: InitFrom | None = None
    """Begin at another run's weights; None, and then not written down: at the pretrained model."""

    @property
    def loss_on(self) -> Literal["answer"]:
        """Of examples shown to a method for calibration."""
        return "answer"

    @property
    def rollout_size(self) -> int:
        """Completions of one rollout."""
        return self.batch_size if self.prompts_per_rollout is None else self.prompts_per_rollout * self.group_size

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps between two rollouts."""
        return self.rollout_size // self.batch_size * self.updates_per_rollout

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.rollout_size % self.group_size:
            raise ValueError(f"group_size {self.group_size} does not divide batch_size {self.batch_size}")
        if self.rollout_size % self.batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide the {self.rollout_size} completions of a rollout "
                f"(prompts_per_rollout {self.prompts_per_rollout} times group_size {self.group_size})"
            )
        if self.schedule.tokens is not None:
            raise ValueError("schedule.tokens cannot be used: how many tokens are generated is not known before")
        if self.objective == "rloo" and (self.loss != "grpo" or self.advantage_scale != "group"):
            raise ValueError("rloo has its own loss and advantages: leave loss and advantage_scale out")
        if len({reward.name for reward in self.rewards}) < len(self.rewards):
            raise ValueError(f"a reward is named twice: {[reward.name for reward in self.rewards]}")
        if not any(reward.weight for reward in self.rewards):
            raise ValueError("every reward has weight 0: there is nothing to learn from")
        if self.kl_reference == "start" and self.init_from is None:
            raise ValueError("kl_reference 'start' needs init_from; without it training starts at the pretrained model")
        return self


class RunSpec(Spec):
    """One run: a model, a method, how it was trained, and the seed. The base model is the run without training."""

    model: ModelSpec
    method: MethodSpec
    train: Annotated[TrainSpec | RLSpec, Field(discriminator="objective")] | None = None
    seed: int = Field(default=0, ge=0)

    @property
    def run_id(self) -> str:
        """A readable name and twelve hex digits of the canonical JSON. Only the hash identifies."""
        parts = [self.model.name.rstrip("/").rsplit("/", 1)[-1], self.method.name]
        if self.train is not None:
            objective = [] if self.train.objective == "sft" else [self.train.objective]
            parts += [*objective, self.train.task.name, f"s{self.seed}"]
        readable = re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")
        return f"{readable}-{self.id}"

    @property
    def is_base(self) -> bool:
        """Whether this is the pretrained model itself."""
        return self.train is None


InitFrom.model_rebuild()
RLSpec.model_rebuild()
RunSpec.model_rebuild()


class Sampling(Spec):
    """Several sampled answers to each item instead of one greedy one."""

    samples: int = Field(ge=2)
    """Answers to each item."""
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    """Sample among so many most likely tokens; 0: among all."""
    seed: int = Field(default=0, ge=0)
    k: tuple[Annotated[int, Field(ge=1)], ...] = (1,)
    """pass@k is reported for these k."""

    @property
    def words(self) -> str:
        """What tokens are drawn from, in words."""
        cuts = f", top_k {self.top_k}" if self.top_k else ""
        cuts += f", top_p {self.top_p:g}" if self.top_p < 1 else ""
        return f"temperature {self.temperature:g}{cuts}"

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if not self.k or max(self.k) > self.samples or list(self.k) != sorted(set(self.k)):
            raise ValueError(f"k must increase and not exceed samples {self.samples}, got {list(self.k)}")
        return self


class EvalSpec(OptionalSpec):
    """One evaluation: which items of which task. Batch size and hardware are in the record, not in the identity."""

    later: ClassVar[tuple[str, ...]] = ("sampling",)
    task: TaskSpec
    split: Literal["validation", "test"] = "test"
    items: int | None = Field(default=None, ge=1)
    """The first so many items of the split, in the task's own order; None for all."""
    sampling: Sampling | None = None
    """Sample several answers; None, and then not written down: one greedy answer, or a likelihood."""

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
