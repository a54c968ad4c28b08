"""What is kept in ``results/``, read when it is first asked for."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from peft_arena.analyze.study import StudyResult, TargetResult, analyze_study
from peft_arena.analyze.view import StudyView
from peft_arena.store.store import Store
from peft_arena.study.read_study import find_study, read_study
from peft_arena.study.study_view import view_of
from scripts.kept import read_kept, unpack
from scripts.measure import FOLDER

ROOT = Path(__file__).resolve().parents[1]


class Sources:
    """The kept studies, analysed by this version, and the kept tables of benchmarks."""

    def __init__(self) -> None:
        """Open a directory for unpacked records."""
        self._folder = tempfile.TemporaryDirectory()
        self.result = cache(self._result)

    def __enter__(self) -> Sources:
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Remove the unpacked records."""
        self._folder.cleanup()

    def store_and_view(self, study: str) -> tuple[Store, StudyView]:
        """Return a kept study's records as a store, and its view."""
        runs = Path(self._folder.name) / study
        if not runs.exists():
            unpack(read_kept(study), runs)
        return Store(runs), view_of(read_study(find_study(study)))

    def _result(self, study: str) -> StudyResult:
        return analyze_study(*self.store_and_view(study))

    def date(self, study: str) -> str:
        """Return the day on which the records of a study were made."""
        return str(read_kept(study)["date"])

    def target(self, study: str) -> TargetResult:
        """Return the analysis of the one target of a kept study."""
        (target,) = self.result(study).targets
        return target

    def measured(self, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Return who measured and what a benchmark printed, of ``results/benchmarks/NAME.jsonl``."""
        text = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8")
        head, *lines = map(json.loads, text.splitlines())
        return head["made"], lines
