"""Shows many runs at once: one line for all of them, one for each that is being worked on."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Board:
    """A progress display on standard error; plain lines where that is not a terminal."""

    def __init__(self, runs: int, quiet: bool = False) -> None:
        """Prepare a display for so many runs; ``quiet`` shows nothing."""
        self._console = Console(stderr=True, quiet=quiet, soft_wrap=True)
        self._live = self._console.is_terminal and not quiet
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[stage]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._live,
        )
        self._runs = runs
        self._ended = 0
        self._all: TaskID | None = None
        self._lines: dict[str, TaskID] = {}
        self._stages: dict[str, str] = {}

    def __enter__(self) -> Board:
        """Start the display."""
        self._progress.start()
        self._all = self._progress.add_task("[bold]runs", total=self._runs, stage=f"0/{self._runs}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the display."""
        self._progress.stop()

    def started(self, run_id: str) -> None:
        """Add a line for a run."""
        if run_id not in self._lines:
            self._lines[run_id] = self._progress.add_task(run_id, total=1.0, stage="starting")

    def progress(self, run_id: str, stage: str, fraction: float, detail: str) -> None:
        """Update the line of a run; a new stage is printed where there is no live display."""
        if not self._live and self._stages.get(run_id) != stage:
            self._print(f"{run_id}: {stage}")
        self._stages[run_id] = stage
        line = self._lines.get(run_id)
        if line is not None:
            self._progress.update(line, completed=fraction, stage=f"{stage[:70]} {detail}")

    def note(self, text: str) -> None:
        """Print a line that concerns all runs."""
        self._print(text, style="yellow")

    def ended(self, run_id: str, problem: str) -> None:
        """Remove the line of a run and count it."""
        self._ended += 1
        line = self._lines.pop(run_id, None)
        if line is not None:
            self._progress.remove_task(line)
        if self._all is not None:
            self._progress.update(self._all, completed=self._ended, stage=f"{self._ended}/{self._runs}")
        word = "failed" if problem else "done"
        text = f"{word} {self._ended}/{self._runs} {run_id}" + (f": {problem}" if problem else "")
        self._print(text, style="red" if problem else None)

    def _print(self, text: str, style: str | None = None) -> None:
        """Print a line; where the terminal is gone (but no reader of a pipe) the work goes on without."""
        try:
            self._console.print(text, style=style, highlight=False, markup=False)
        except BrokenPipeError:
            raise  # as of any command whose reader has left
        except OSError:
            self._console.quiet = True
