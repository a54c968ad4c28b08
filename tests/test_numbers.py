"""The numbers of the README and the docs are those of the kept records, and stand in blocks."""

import json
import re
import subprocess
import sys

import pytest

from peft_arena.analyze.study import analyze_study
from peft_arena.assets.wheel_files import SMOLLM2
from peft_arena.testing.tasks import need_wheel
from scripts.kept import keep, unpack
from scripts.numbers import BLOCK, BLOCKS, ROOT, pages, written
from scripts.sources import Sources
from tests.analyze.synthetic import Truth, build_synthetic

INTERVAL = re.compile(r"\[[+\N{MINUS SIGN}-]?\d+(\.\d+)?, [+\N{MINUS SIGN}-]?\d+(\.\d+)?\]")


def outside_of_blocks(text):
    """Return what people wrote: no blocks, no code."""
    text = BLOCK.sub("", text)
    return re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)


@pytest.mark.slow
def test_every_block_is_up_to_date():
    need_wheel(SMOLLM2)
    done = subprocess.run(
        [sys.executable, "-m", "scripts.numbers", "--check"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_block_is_used_and_known():
    used = {found["name"] for page in pages() for found in BLOCK.finditer(page.read_text(encoding="utf-8"))}
    assert used == set(BLOCKS)


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_measured_intervals_stand_in_blocks_only(page):
    found = [match.group() for match in INTERVAL.finditer(outside_of_blocks(page.read_text(encoding="utf-8")))]
    assert found == []


def test_a_block_that_is_out_of_date_is_seen(monkeypatch):
    monkeypatch.setitem(BLOCKS, "made", lambda sources: "42")
    text = "before\n<!-- results: made -->\n41\n<!-- end -->\nafter"
    with Sources() as sources:
        assert written(text, sources) == text.replace("41", "42")
        assert written(text.replace("41\n", ""), sources) == text.replace("41", "42")
        with pytest.raises(KeyError):
            written("<!-- results: unheard-of -->\n<!-- end -->", sources)


def test_a_kept_study_is_analysed_as_it_was(tmp_path, monkeypatch):
    truths = [Truth("a", gain=0.4, seeds=(0, 1)), Truth("b", forget=-0.3, seeds=(0, 1))]
    made = build_synthetic(tmp_path / "runs", truths, items=60, unscored=0.02, passage=3)

    class Kept:
        file = made.view

        @staticmethod
        def runs():
            return [made.view.base, *(run for arm in made.view.arms for run in arm.runs)]

    kept = keep(Kept, tmp_path / "runs")
    unpack(json.loads(json.dumps(kept)), tmp_path / "again")
    again = build_synthetic(tmp_path / "other", truths, items=60).store.__class__(tmp_path / "again")
    one, two = (analyze_study(store, made.view, draws=50).summary() for store in (made.store, again))
    assert one == two
    texts = sum(len(file.read_text()) for file in (tmp_path / "runs").rglob("*.json"))
    assert len(json.dumps(kept)) < texts / 3
