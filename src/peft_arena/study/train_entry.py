"""How an arm is trained: settings gathered from a study file, and the run that training begins at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from pydantic import Field

from peft_arena.core.build import Locate, build
from peft_arena.core.errors import UserError, unknown
from peft_arena.core.specs import InitFrom, ModelSpec, Objective, RLSpec, RunSpec, Spec, Table, TaskSpec, TrainSpec
from peft_arena.core.yamlfile import KeyPath
from peft_arena.methods.base import Capability, Method
from peft_arena.methods.registry import method_of
from peft_arena.models.load import PACKAGED
from peft_arena.tasks.registry import task_of
from peft_arena.tasks.rewards import refusal, reward_of, reward_spec
from peft_arena.train.data import packing_refusal
from peft_arena.train.prompts import answer_limit
from peft_arena.train.schedule import save_steps
from peft_arena.train.vllm import vllm_refusal

OBJECTIVES: tuple[str, ...] = get_args(Objective)
SFT = "sft"
RL = "reinforcement learning (objective grpo or rloo)"
RL_RATIO, MICRO_RL_RATIO = 1 / 20, 1 / 4
"""Learning rate of reinforcement learning over that of supervised fine-tuning, where a card names none: 1e-5 to 2e-4
in the protocol of PEFT-Arena; on the packaged micro model an estimate."""

Layer = tuple[KeyPath, Table]
"""Where a table of settings is, and the table."""


class StartEntry(Spec):
    """Which run training begins at, as it is written."""

    arm: str | None = None
    """Label of another arm of the study; the run is its one of the same target and seed."""
    run: str | None = None
    """A run of the runs directory, where there is no study."""
    step: int | None = Field(default=None, ge=1)
    """One of its save points; its last unless given."""


class RewardEntry(Spec):
    """One term of the reward, as it is written."""

    name: str
    weight: float = 1.0
    config: Table = Field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """Training settings of an arm, gathered from all places of a study file."""

    label: str
    """Of the arm."""
    table: Mapping[str, Any]
    origin: Mapping[str, KeyPath]
    """Where each key is from: the path of the table that it was last stated in."""
    objective: str
    arm: KeyPath
    """Where the arm is."""
    locate_path: Locate = field(repr=False)

    @property
    def kind(self) -> type[TrainSpec] | type[RLSpec]:
        """What the settings are of."""
        return TrainSpec if self.objective == SFT else RLSpec

    def locate(self, path: KeyPath) -> str:
        """Return the place of a setting in the file."""
        head = self.origin.get(str(path[0]), ("train",)) if path else ("train",)
        return self.locate_path((*head, *path))

    @property
    def start(self) -> StartEntry | None:
        """Which run training begins at; None: at the pretrained model.

        Raises:
            UserError: an unknown key, or not exactly one of ``arm`` and ``run``.
        """
        table = self.table.get("init_from")
        if table is None:
            return None
        where = self.locate(("init_from",))
        if not isinstance(table, Mapping):
            raise UserError(
                f"init_from must be a table with arm: LABEL in a study, or run: RUN for a single run, got {table!r} "
                f"(in {where})"
            )
        found = build(StartEntry, table, where="init_from", locate=lambda path: self.locate(("init_from", *path)))
        if (found.arm is None) == (found.run is None):
            raise UserError(f"init_from names either an arm or a run, and exactly one of them (in {where})")
        return found


def gather(
    layers: Sequence[tuple[KeyPath, Table]],
    rl: Sequence[tuple[KeyPath, Table]],
    arm: KeyPath,
    label: str,
    locate: Locate,
) -> Settings:
    """Gather the training settings of an arm.

    Args:
        layers: tables of settings and where they are, each over those before it; the last is the arm's own.
        rl: tables that only reinforcement learning gets, over all but the arm's own.
        arm: where the arm is.
        label: of the arm.
        locate: gives the place of a key in the file.

    Raises:
        UserError: an unknown objective, or a key that has no place there.
    """
    for path, table in (*layers, *rl):
        if "task" in table:
            raise UserError(f"'task' is set by targets, not by {path[-1]} (in {locate((*path, 'task'))})")
    for path, table in rl:
        if "objective" in table:
            raise UserError(f"'objective' is set by train, not by rl (in {locate((*path, 'objective'))})")
    objective, at = SFT, arm
    for path, table in layers:
        if "objective" in table:
            objective, at = str(table["objective"]), (*path, "objective")
    if objective not in OBJECTIVES:
        raise unknown("objective", objective, OBJECTIVES, locate(at))
    used = layers if objective == SFT else (*layers[:-1], *rl, layers[-1])
    merged: dict[str, Any] = {}
    origin: dict[str, KeyPath] = {}
    for path, table in used:
        for key, value in table.items():
            merged[key] = value
            origin[key] = path
    found = Settings(label, merged, origin, objective, arm, locate)
    _refuse_others(found)
    return found


def _refuse_others(settings: Settings) -> None:
    """Refuse settings that are of the other way of training."""
    other = RLSpec if settings.kind is TrainSpec else TrainSpec
    for key in settings.table:
        if key in settings.kind.model_fields or key not in other.model_fields:
            continue
        of, cure = (RL, "under rl") if other is RLSpec else ("objective sft", "in the train of the arms it is for")
        raise UserError(
            f"'{key}' is a setting of {of}, and arm '{settings.label}' has objective {settings.objective} "
            f"(in {settings.locate((key,))}); give it {cure}"
        )


def train_spec(
    settings: Settings, task: TaskSpec, method: Method, model: ModelSpec, start: InitFrom | None
) -> TrainSpec | RLSpec:
    """Return how one run of an arm is trained.

    Raises:
        UserError: an unknown or impossible setting, no learning rate, or a reward that cannot judge the task.
    """
    table = dict(settings.table)
    rate = documented_rate(method, model, settings.objective)
    if "learning_rate" not in table:
        raise UserError(
            f"train.learning_rate is required (in {settings.locate_path(settings.arm)}); "
            f"'documented' stands for that of {method.card.name}, {rate}"
        )
    if table["learning_rate"] == "documented":
        table["learning_rate"] = rate
    if settings.kind is TrainSpec:
        return build(TrainSpec, {**table, "task": task.model_dump()}, where="train", locate=settings.locate)
    table.pop("init_from", None)
    if "rewards" in table:
        table["rewards"] = _rewards(table["rewards"], settings)
    if start is not None:
        table["init_from"] = start
    found = build(RLSpec, {**table, "task": task.model_dump()}, where="train", locate=settings.locate)
    judged = task_of(task)
    for reward in found.rewards:
        reason = refusal(reward_of(reward), judged, answer_limit(found, judged))
        if reason:
            raise UserError(f"arm '{settings.label}' cannot be trained by {settings.objective}: {reason}")
    return found


def _rewards(given: Any, settings: Settings) -> list[Table]:
    """Return the rewards with their settings checked and written out."""
    if not isinstance(given, Sequence) or isinstance(given, str):
        where = settings.locate(("rewards",))
        raise UserError(
            f"rewards must be a list of names, or of tables with name and weight, got {given!r} (in {where})"
        )
    found = []
    for place, entry in enumerate(given):
        path: KeyPath = ("rewards", place)

        def locate(keys: KeyPath, path: KeyPath = path) -> str:
            return settings.locate((*path, *keys))

        table = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(table, Mapping):
            raise UserError(f"a reward is a name, or a table with name and weight, got {entry!r} (in {locate(())})")
        reward = build(RewardEntry, table, where="rewards", locate=locate)
        found.append(reward_spec(reward.name, reward.weight, reward.config, locate(())).model_dump())
    return found


def documented_rate(method: Method, model: ModelSpec, objective: str = SFT) -> float | None:
    """Return the learning rate that a method's card documents for a model: its own for the packaged micro model.

    For reinforcement learning that of the card where it names one, else a share of the one for supervised fine-tuning.
    """
    card = method.card
    micro = model.name in PACKAGED
    usual = (card.micro_learning_rate if micro else None) or card.learning_rate
    if objective == SFT or usual is None:
        return usual
    own = card.micro_rl_learning_rate if micro else card.rl_learning_rate
    ratio = MICRO_RL_RATIO if micro and card.micro_learning_rate else RL_RATIO
    return own if own is not None else float(f"{usual * ratio:.6g}")


def training_refusal(method: Method, settings: Settings, model: ModelSpec) -> str:
    """Return why a method cannot be trained as asked, by its capabilities; empty if it can."""
    if settings.objective == SFT:
        virtual = Capability.VIRTUAL_TOKENS in method.card.capabilities
        if virtual and settings.table.get("packing") is True:
            return packing_refusal(method.card.name)
        return ""
    if Capability.ONLINE_RL not in method.card.capabilities:
        return f"{method.card.name} cannot be trained by {settings.objective}: its card does not declare online_rl"
    return vllm_refusal(method.card, model) if str(settings.table.get("rollouts", "")).startswith("vllm") else ""


def start_at(settings: Settings, entry: StartEntry, source: RunSpec, model: ModelSpec, named: str) -> InitFrom:
    """Return where a run begins, if it can begin there.

    Args:
        settings: of the arm that begins there.
        entry: what the file says.
        source: the run to begin at.
        model: the arm's.
        named: what the source is called in messages.

    Raises:
        UserError: the source has no weights that could be merged, is of another model, or saves no such step.
    """
    from peft_arena.weights.start import start_refusal

    where = settings.locate(("init_from",))
    wrong = f"arm '{settings.label}' cannot begin at {named} (in {where})"
    if source.train is None:
        raise UserError(f"{wrong}: that is the pretrained model; leave init_from out")
    if source.model != model:
        raise UserError(f"{wrong}: it is of {source.model.words}, and this is {model.words}")
    reason = start_refusal(method_of(source.method))
    if reason:
        raise UserError(f"{wrong}: {reason}")
    steps = source.train.schedule.steps
    if entry.step is not None and steps is not None:
        saved = save_steps(source.train, steps)
        if entry.step not in saved:
            raise UserError(f"{wrong}: it saves no step {entry.step}. Known: {', '.join(map(str, saved))}")
    return InitFrom(run=source, step=entry.step)
