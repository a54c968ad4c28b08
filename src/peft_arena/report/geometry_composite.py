"""One figure that shows an arm's geometry from four sides: profile, rank over depth, norms, drift."""

from __future__ import annotations

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas

from peft_arena.analyze.geometry import ArmGeometry, TargetGeometry
from peft_arena.analyze.profiles import short_names, window_of
from peft_arena.report.figures import INK, Drawn, settle
from peft_arena.report.geometry_lines import (
    COLUMN_TITLES,
    draw_depth,
    draw_profiles,
    legend_above,
    main_kind,
    wide_scale,
)
from peft_arena.report.geometry_points import Series, draw_dots, draw_drift, pairs_of

_MOST_ROWS = 16


def composite_figure(geometry: TargetGeometry, named: set[str], name: str) -> Drawn | None:
    """Draw what there is of profile, rank over depth, norms and drift; None with fewer than two of them."""
    kind = main_kind(geometry)
    profiles = [(arm, found) for arm in geometry.arms if kind and (found := arm.profile(kind)) is not None]
    depths = [(arm, _over_kinds(arm)) for arm in geometry.arms]
    depths = [(arm, found) for arm, found in depths if found]
    pairs = pairs_of(geometry, "drift_relative_target", "drift_relative_general")
    sized = [arm for arm in geometry.arms if arm.label in named and arm.mean("l2_relative").value is not None]
    panels = [bool(profiles), bool(depths), bool(sized), bool(pairs)]
    if sum(panels) < 2:
        return None
    tall = 1.0 + 0.1 * max(0, min(len(sized), _MOST_ROWS) - 8)
    canvas = Canvas(figsize=(10.4, 4.3 + 3.6 * tall * (sum(panels) > 2)), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = list(canvas.subplots(-(-sum(panels) // 2), 2, squeeze=False).flat)
    hovers: dict[str, str] = {}
    said = []
    if profiles and kind:
        axis = axes.pop(0)
        draw_profiles(axis, profiles, named, "deviation")
        axis.set_title(COLUMN_TITLES["deviation"], fontsize=10, color=INK, loc="left")
        axis.set_xlabel(f"singular direction of {short_names(geometry.kinds)[kind]}")
        window = window_of(profiles[0][1].directions)
        said.append(f"how far each singular direction of {kind} moved (moving average over {window} directions)")
    if depths:
        axis = axes.pop(0)
        draw_depth(axis, depths, named)
        wide_scale(axis, [value for _, found in depths for value in found.values()])
        axis.set_title("stable rank of the change, mean over kinds", fontsize=10, color=INK, loc="left")
        axis.set_xlabel("transformer block")
        said.append("the stable rank ||D||_F² / ||D||_2² of the change D over the blocks")
    if sized:
        axis = axes.pop(0)
        series = (
            Series("l2_relative", "relative L2 norm", True),
            Series("spectral_norm_relative", "relative spectral norm", False),
        )
        hovers |= draw_dots(axis, sized[:_MOST_ROWS], series, f"{name}-norm", size=8.5)
        axis.set_title("size of the change relative to the weight", fontsize=10, color=INK, loc="left")
        axis.set_xlabel("filled: L2 norm, open: spectral norm")
        left = f", the first {_MOST_ROWS} arms" if len(sized) > _MOST_ROWS else ""
        said.append(f"the norms of D over those of W0, mean over the linear layers a method changed{left}")
    if pairs:
        axis = axes.pop(0)
        hovers |= draw_drift(axis, pairs, named, f"{name}-drift")
        axis.set_title("drift: general against target", fontsize=10, color=INK, loc="left")
        said.append("the relative drift on general against target prompts")
    for axis in axes:
        axis.set_visible(False)
    known = [arm for arm in geometry.arms if _is_shown(arm)]
    legend_above(canvas, [arm for arm in known if arm.label in named])
    settle(canvas)
    return Drawn(
        name=name,
        canvas=canvas,
        alt=f"{len(said)} sides of the geometry of {len(known)} arms: {'; '.join(said)}.",
        caption=(
            f"The same arms from {len(said)} sides: {'; '.join(said)}. Means over runs, n = {len(known)} arms; methods "
            "without weights of their own are not in it."
        ),
        hovers=hovers,
    )


def _is_shown(arm: ArmGeometry) -> bool:
    return any(run.records for run in arm.runs) and any(
        arm.mean(metric).value is not None for metric in ("l2_relative", "drift_relative_general", "stable_rank")
    )


def _over_kinds(arm: ArmGeometry) -> dict[int, float]:
    """Return the mean stable rank over all kinds of module by block."""
    blocks: dict[int, list[float]] = {}
    for found in arm.depth("stable_rank").values():
        for block, value in found.items():
            blocks.setdefault(block, []).append(value)
    return {block: float(np.mean(values)) for block, values in sorted(blocks.items())}
