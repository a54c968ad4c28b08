"""From a study file's runs to what the analysis needs to know."""

from __future__ import annotations

import re

from peft_arena.analyze.view import Arm, Refusal, StudyView
from peft_arena.execute.study import Arm as StudyArm
from peft_arena.execute.study import Study


def view_of(study: Study) -> StudyView:
    """Return the analysis' view of a study: arms, evaluations, refusals.

    Where arms were trained in several ways, labels that do not say in which get it added: ``lora (grpo)``.
    """
    several = len({_objective(arm) for arm in study.arms}) > 1
    return StudyView(
        name=study.file.name,
        title=study.file.title,
        description=study.file.description,
        base=study.base,
        arms=tuple(
            Arm(
                _label(arm, several),
                arm.runs,
                arm.target,
                "" if arm.spent is None else str(arm.spent),
                study.sampled.get(arm.target.id),
            )
            for arm in study.arms
            if not arm.refused
        ),
        retention=study.retention,
        every_save_point=study.file.evaluate_at == "save_points",
        geometry={run.run_id: tuple(spec.key for spec in study.geometry(run)) for arm in study.arms for run in arm.runs}
        if study.geometry_plan is not None
        else {},
        paths={run.run_id: tuple(study.scans(run)) for arm in study.arms for run in arm.runs}
        if study.paths_plan is not None
        else {},
        refused=tuple(Refusal(label=_label(arm, several), reason=arm.refused) for arm in study.arms if arm.refused),
    )


def _objective(arm: StudyArm) -> str:
    train = arm.runs[0].train
    return "" if train is None else train.objective


def _label(arm: StudyArm, several: bool) -> str:
    objective = _objective(arm)
    said = objective in re.findall(r"[a-z0-9]+", arm.label.lower())
    return f"{arm.label} ({objective})" if several and objective and not said else arm.label
