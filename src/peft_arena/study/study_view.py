"""From a study file's runs to what the analysis needs to know."""

from __future__ import annotations

from peft_arena.analyze.view import Arm, Refusal, SeedSd, StudyView
from peft_arena.store.published import find_tables
from peft_arena.study.labels import shown_labels
from peft_arena.study.model import Study


def view_of(study: Study) -> StudyView:
    """Return the analysis' view of a study: arms, evaluations, refusals."""
    arms = list(zip(shown_labels(study.arms), study.arms, strict=True))
    shown = {arm.label: label for label, arm in arms}
    return StudyView(
        name=study.file.name,
        title=study.file.title,
        description=study.file.description,
        base=study.base,
        arms=tuple(
            Arm(
                label,
                arm.runs,
                arm.target,
                "" if arm.spent is None else str(arm.spent),
                study.sampled.get(arm.target.id, arm.target if arm.target.sampling else None),
            )
            for label, arm in arms
            if not arm.refused
        ),
        retention=study.retention,
        labels=study.labels,
        every_save_point=study.file.evaluate_at == "save_points",
        geometry={run.run_id: tuple(spec.key for spec in study.geometry(run)) for arm in study.arms for run in arm.runs}
        if study.geometry_plan is not None
        else {},
        paths={run.run_id: tuple(study.scans(run)) for arm in study.arms for run in arm.runs}
        if study.paths_plan is not None
        else {},
        pscp=None if study.file.pscp is None else study.file.pscp.choice,
        margin=study.margin,
        seed_sd=None
        if study.file.seed_sd is None
        else SeedSd(**study.file.seed_sd.model_dump(), unit=study.margin.unit),
        primary=tuple((shown[left], shown[right]) for left, right in study.file.primary),
        published=tuple(table for name in study.file.published for table in find_tables(name)),
        refused=tuple(Refusal(label=label, reason=arm.refused) for label, arm in arms if arm.refused),
    )
