"""The report's figures, drawn with matplotlib; legible in grey, as every arm has its own marker and a direct label."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from peft_arena.analyze.costs import PEAK_MEMORY, TRAINABLE
from peft_arena.analyze.estimate import Estimate
from peft_arena.report.labels import Box, place_labels
from peft_arena.report.numbers import estimate_text, quantity, signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from peft_arena.analyze.effects import ArmEffects
    from peft_arena.analyze.study import TargetResult

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#5b3a8c", "#333333")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
INK, FAINT = "#1f2328", "#8c959f"
DOT: dict[str, Any] = {"marker": "o", "color": FAINT, "markersize": 4.5, "alpha": 0.8}
"""How an arm is drawn that is not named in a figure."""
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "peft-arena",
    "font.family": ["Liberation Sans", "Arial", "Helvetica", "DejaVu Sans"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.linewidth": 0.8,
    "grid.color": "#d8dee4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
}


@dataclass(frozen=True)
class Drawn:
    """A figure with what a page needs beside it."""

    name: str
    """File-name-safe."""
    canvas: Canvas
    alt: str
    """What the figure shows, for those who cannot see it."""
    caption: str
    hovers: dict[str, str] = field(default_factory=dict)
    """Id of a drawn element to the text shown when the pointer is on it."""


class Placed(Protocol):
    """An arm at its position among the arms of a target, which gives it its colour and mark."""

    @property
    def label(self) -> str:
        """Shown to the reader."""

    @property
    def place(self) -> int:
        """Position."""


MANY = 24
"""Above this number of arms only some are named in a figure and have their intervals drawn; the rest are dots."""


def prominent(target: TargetResult) -> set[str]:
    """Return the arms to name in a figure: all of a few; of many those most likely on the Pareto front.

    Where few are likely to be on it, those with the highest sum of gain and mean retention are added.
    """
    if len(target.arms) <= MANY:
        return {arm.label for arm in target.arms}
    standing = {label: (found.on_front, found.probability or 0.0) for label, found in target.pareto.items()}
    likely = [label for label, (front, share) in standing.items() if front or share > 0]
    likely.sort(key=lambda label: standing[label], reverse=True)
    both = [(arm.gain.delta.value + arm.mean.value, arm.label) for arm in target.arms if _placed(arm)]  # type: ignore[union-attr]
    likely += [label for _, label in sorted(both, reverse=True) if label not in likely]
    return set(likely[: MANY // 2])


def _placed(arm: ArmEffects) -> bool:
    return arm.gain is not None and arm.gain.delta is not None and arm.mean is not None


@contextmanager
def style() -> Iterator[None]:
    """Apply the report's look to everything drawn or saved inside the block."""
    import logging

    from matplotlib import font_manager

    logger = logging.getLogger(font_manager.__name__)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with rc_context(_STYLE):
            yield
    finally:
        logger.setLevel(before)


def look(index: int) -> tuple[str, str]:
    """Return colour and marker of the arm at a position; the same in all figures of a report."""
    return COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]


def ends_of(found: Estimate) -> tuple[float, float]:
    """Return the ends of the interval; both are the value where there is none."""
    return (found.value if found.low is None else found.low, found.value if found.high is None else found.high)


def text_sizes(axis: Axes, texts: Sequence[str]) -> list[tuple[float, float]]:
    """Return width and height of some labels in pixels, with a little room."""
    figure = axis.get_figure()
    renderer = figure.canvas.get_renderer()  # type: ignore[union-attr]
    sizes = []
    for text in texts:
        drawn = axis.text(0, 0, text, fontsize=9.5)
        box = drawn.get_window_extent(renderer)
        sizes.append((box.width + 4, box.height + 2))
        drawn.remove()
    return sizes


def shorten(text: str, most: int = 28) -> str:
    """Return text for a figure: not too long, and no dollar sign begins a formula."""
    short = text if len(text) <= most else f"{text[: most - 1]}…"
    return short.replace("$", r"\$")


def cost_figure(target: TargetResult, name: str) -> Drawn | None:
    """Draw the gain against trainable parameters (log scale) and the peak memory; None where neither is known."""
    costs = [target.costs[arm.label] for arm in target.arms]
    counted = [
        (index, arm.label, cost.value, arm.gain.delta)
        for index, arm in enumerate(target.arms)
        if (cost := costs[index].get(TRAINABLE)) and cost.value and arm.gain and arm.gain.delta
    ]
    memory = [
        (index, arm.label, cost)
        for index, arm in enumerate(target.arms)
        if (cost := costs[index].get(PEAK_MEMORY)) and cost.value is not None
    ]
    if not counted and not memory:
        return None
    panels = bool(counted) + bool(memory)
    height = max(3.6, (0.28 if len(memory) <= MANY else 0.19) * len(memory) + 1.2)
    canvas = Canvas(figsize=(5.2 * panels, height), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = list(canvas.subplots(1, panels, squeeze=False)[0])
    hovers: dict[str, str] = {}
    caption = ["Gain against the number of trained parameters, with 95 % intervals."] if counted else []
    caption += ["Bars: peak training memory, mean over seeds."] if memory else []
    if counted:
        _gain_by_size(axes.pop(0), counted, prominent(target), name, hovers)
    if memory:
        axis = axes.pop(0)
        order = sorted(memory, key=lambda entry: -(entry[2].value or 0.0))
        for row, (index, label, cost) in enumerate(order):
            (bar,) = axis.barh(row, (cost.value or 0.0) / 2**30, color=look(index)[0], height=0.62, alpha=0.85)
            axis.text((cost.value or 0.0) / 2**30, row, f" {quantity(cost.value, cost.unit)}", va="center", fontsize=9)
            bar.set_gid(f"{name}-mem-{index}")
            hovers[f"{name}-mem-{index}"] = f"{label}: {quantity(cost.value, cost.unit)}, {cost.how}, {cost.runs} runs"
        axis.set_yticks(range(len(order)), [shorten(label, 22) for _, label, _ in order])
        axis.set_xlabel("peak training memory (GiB)")
        axis.margins(x=0.18, y=0.01)
        axis.set_xlim(left=0)
        axis.tick_params(axis="y", length=0)
    settle(canvas)
    listed = "; ".join(f"{label}: {quantity(size, 'parameters')} parameters" for _, label, size, _ in counted)
    return Drawn(
        name=name,
        canvas=canvas,
        alt=f"Gain against the number of trainable parameters, and peak training memory. {listed}.",
        caption=" ".join(caption),
        hovers=hovers,
    )


def settle(canvas: Canvas) -> None:
    """Lay the figure out once; without this every file it is saved to costs another layout."""
    canvas.draw_without_rendering()
    canvas.set_layout_engine("none")


def _gain_by_size(
    axis: Axes,
    counted: Sequence[tuple[int, str, float, Estimate]],
    named: set[str],
    name: str,
    hovers: dict[str, str],
) -> None:
    axis.set_xscale("log")
    axis.grid(True)
    axis.axhline(0, color=FAINT, linewidth=0.9)
    for index, label, size, gain in counted:
        colour, marker = look(index)
        if label in named:
            axis.plot([size, size], ends_of(gain), color=colour, linewidth=1.5, alpha=0.75)
        kind: dict[str, Any] = {"marker": marker, "color": colour, "markersize": 8} if label in named else DOT
        (mark,) = axis.plot(size, gain.value, linestyle="none", **kind)
        mark.set_gid(f"{name}-par-{index}")
        hovers[f"{name}-par-{index}"] = (
            f"{label}: {quantity(size, 'parameters')} parameters, gain {estimate_text(gain)}"
        )
    sizes = [size for _, _, size, _ in counted]
    axis.set_xlim(min(sizes) / 3, max(sizes) * 3)
    wide = max(sizes) > 100 * min(sizes)
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("trained parameters (log scale)")
    axis.set_ylabel(f"gain ({counted[0][3].unit})")
    axis.margins(y=0.12)
    canvas = axis.get_figure()
    canvas.draw_without_rendering()  # type: ignore[union-attr]
    counted = [entry for entry in counted if entry[1] in named]
    points = [tuple(axis.transData.transform((size, gain.value))) for _, _, size, gain in counted]
    solid = [Box(x - 7, y - 7, x + 7, y + 7) for x, y in points]
    soft = []
    for (x, _), (_, _, size, gain) in zip(points, counted, strict=True):
        low, high = ends_of(gain)
        to_pixels = axis.transData.transform
        soft.append(Box(x - 2, to_pixels((size, low))[1], x + 2, to_pixels((size, high))[1]))
    texts = [shorten(label, 22) for _, label, _, _ in counted]
    label_sizes = text_sizes(axis, texts)
    frame = Box(*axis.get_window_extent().extents)
    for text, place, extent in zip(
        texts, place_labels(points, label_sizes, frame, solid, soft), label_sizes, strict=True
    ):
        middle = axis.transData.inverted().transform((place.x + extent[0] / 2, place.y + extent[1] / 2))
        axis.text(float(middle[0]), float(middle[1]), text, ha="center", va="center", fontsize=9, color=INK)


def curves_figure(target: TargetResult, name: str) -> Drawn | None:
    """Draw training and held-out loss, one panel per arm on common axes, one line per seed; None without a log.

    Arms of reinforcement learning are not in it: their loss is no cross-entropy.
    """
    arms = [
        (index, arm.label, [run.training for run in arm.evidence.runs if run.training and run.training.log])
        for index, arm in enumerate(target.arms)
        if not arm.evidence.arm.is_rl
    ]
    arms = [entry for entry in arms if entry[2]]
    if not arms:
        return None
    columns = min(4, len(arms)) if len(arms) > 6 else min(3, len(arms))
    rows = -(-len(arms) // columns)
    canvas = Canvas(figsize=(10.0, 0.5 + 2.15 * rows), layout="constrained")
    FigureCanvasAgg(canvas)
    grid = canvas.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    firsts, tops, lows = [], [], []
    for place, axis in enumerate(grid.flat):
        if place >= len(arms):
            axis.set_visible(False)
            continue
        index, label, records = arms[place]
        for record in records:
            train = [(entry.step, entry.loss) for entry in record.log if entry.loss is not None]
            held = [(entry.step, entry.validation_loss) for entry in record.log if entry.validation_loss is not None]
            if train:
                axis.plot(*zip(*train, strict=True), color=FAINT, linewidth=0.8, alpha=0.8)
                firsts.append(train[0][1])
            if held:
                axis.plot(
                    *zip(*held, strict=True), color=look(index)[0], linewidth=1.3, marker=look(index)[1], markersize=3.5
                )
            values = [loss for _, loss in (*train, *held)]
            tops.append(max(values, default=0.0))
            lows.append(min(values, default=0.0))
        axis.set_title(shorten(label), fontsize=10, color=INK, loc="left")
        axis.grid(True)
    top = min(max(tops), 1.6 * max(firsts)) if firsts else max(tops)
    room = 0.05 * (top - min(lows) or 1.0)
    grid.flat[0].set_ylim(min(0.0, min(lows)) - room if min(lows) < room else min(lows) - room, top + room)
    canvas.supxlabel("optimizer step", fontsize=10, color=INK)
    canvas.supylabel("loss (nats per answer token)", fontsize=10, color=INK)
    settle(canvas)
    cut = " Lines that leave a panel go on above it." if max(tops) > top else ""
    if any(arm.evidence.arm.is_rl for arm in target.arms):
        cut += " Arms of reinforcement learning have no such loss; their curves are in their own section."
    ends = "; ".join(f"{label}: {_ending(records)}" for _, label, records in arms)
    return Drawn(
        name=name,
        canvas=canvas,
        alt=f"Training and held-out loss by step for {len(arms)} arms, one line per seed. Last held-out loss: {ends}.",
        caption=f"Grey: training loss. Coloured with marks: held-out loss. One line per seed, common axes.{cut}",
    )


def _ending(records: Sequence[object]) -> str:
    """Return the last held-out losses of some trainings as text."""
    values = []
    for record in records:
        held = [entry.validation_loss for entry in record.log if entry.validation_loss is not None]  # type: ignore[attr-defined]
        values += held[-1:]
    return ", ".join(signed(value, 2).lstrip("+") for value in values) or "not measured"
