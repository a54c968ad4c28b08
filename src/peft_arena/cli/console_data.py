"""What `peft-arena data` prints."""

from __future__ import annotations

from rich.console import Console

from peft_arena.commands.data_command import Lengths, Looked
from peft_arena.core.text import few

SHOWN_LABELS = 10


def show_data(found: Looked) -> None:
    """Print what a file holds, a line for each thing, and the task to paste."""
    console = Console(highlight=False, soft_wrap=True)
    for line in lines_of(found):
        console.print(line, markup=False)


def lines_of(found: Looked) -> list[str]:
    """Return the lines."""
    columns = ", ".join(f"{use} from '{column}'" for use, column in found.columns.items())
    splits = ", ".join(f"{count:,} {split}" for split, count in found.items.items())
    lines = [
        f"{found.file}: {found.rows:,} rows, read as {found.form}",
        f"columns: {columns}",
        f"items: {splits} (by the default shares, by content)",
        f"prompts: {_lengths(found.prompts)}",
        f"answers: {_lengths(found.answers)}",
        f"duplicates: {found.duplicates:,} rows with the prompt and answer of another",
        f"near duplicates: {found.near_duplicates:,} prompts that only letter case, spaces, accents, quotation marks "
        "or signs at the end of words set apart from another",
    ]
    if found.unused_columns:
        lines.insert(2, f"not used: {', '.join(found.unused_columns)}")
    if found.left_out:
        lines.append("left out: " + ", ".join(f"{count:,} {what}" for what, count in sorted(found.left_out.items())))
    lines.append(f"different answers to one prompt: {found.several_answers:,} prompts{_first(found.several_first)}")
    if found.labels:
        total = sum(found.labels.values())
        shown = [f"{label} {count:,} ({count / total:.0%})" for label, count in found.labels.items()]
        lines.append(f"labels: {few(shown, SHOWN_LABELS)}")
    lines.append(f"scorer: {found.scorer} ({found.scorer_why})")
    if not found.refused and not found.unfit:
        lines.append("refused: nothing")
    lines += [
        f"refused: {one.rows:,} row{'s' if one.rows > 1 else ''}: {one.reason}; first {one.first}"
        for one in found.refused
    ]
    if found.unfit:
        lines.append(f"refused as a whole: {found.unfit}")
    return [*lines, "", "for the targets of a study:", "", *(f"  {line}" for line in found.entry.splitlines())]


def _first(place: str) -> str:
    return f", the first in {place}" if place else ""


def _lengths(lengths: Lengths) -> str:
    return (
        f"median {lengths.median:,}, 95 % up to {lengths.p95:,}, longest {lengths.longest:,} {lengths.unit} "
        f"(of {lengths.of:,})"
    )
