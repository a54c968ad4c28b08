"""Write the numbers of the README and the docs from what is kept in ``results/``.

A page has blocks between ``<!-- results: NAME -->`` and ``<!-- end -->``. Each is made by the function of that name in
:mod:`scripts.study_blocks` or :mod:`scripts.benchmark_blocks`, and by nothing else: kept records are unpacked and
analysed by this version. Numbers that a study or a benchmark measured stand in blocks only.

    python -m scripts.numbers             # writes all blocks (make readme)
    python -m scripts.numbers --check     # says which blocks are out of date; exit code 1 if one is
    python -m scripts.numbers --figures   # also draws the pictures of the docs again
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path

from peft_arena.report.build import build_report
from scripts import benchmark_blocks, study_blocks
from scripts.sources import ROOT, Sources

BLOCK = re.compile(r"(?P<start><!-- results: (?P<name>[a-z0-9-]+) -->\n)(?P<text>.*?)(?P<end><!-- end -->)", re.DOTALL)
BLOCKS = {**study_blocks.BLOCKS, **benchmark_blocks.BLOCKS}
FIGURES = {
    "demo": {"tradeoff-1": "demo/tradeoff"},
    "all-methods": {"tradeoff-1": "all-methods/tradeoff", "geometry-against-1": "all-methods/geometry"},
    "micro-rl": {"tradeoff-1": "rl/micro", "rl-1": "rl/micro-curves"},
    "micro": {"paths-plane-1": "rewinding/micro"},
}
"""Study to the figures of its report that the docs show, and where below ``docs``."""


def pages() -> list[Path]:
    """Return every page that may have blocks."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def written(text: str, sources: Sources) -> str:
    """Return a page with its blocks made anew.

    Raises:
        KeyError: a block has a name that nothing makes.
    """
    return BLOCK.sub(lambda found: f"{found['start']}{BLOCKS[found['name']](sources)}\n{found['end']}", text)


def draw(sources: Sources) -> None:
    """Copy the pictures that the docs show out of the reports of the kept studies."""
    for study, wanted in FIGURES.items():
        with tempfile.TemporaryDirectory() as folder:
            store, view = sources.store_and_view(study)
            build_report(store, view, Path(folder))
            for name, place in wanted.items():
                shutil.copyfile(Path(folder) / "figures" / f"{name}.png", ROOT / "docs" / f"{place}.png")


def main() -> None:
    """Write or check the blocks of all pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--figures", action="store_true")
    args = parser.parse_args()
    stale = []
    with Sources() as sources:
        for page in pages():
            text = page.read_text(encoding="utf-8")
            new = written(text, sources)
            if new != text:
                stale.append(str(page.relative_to(ROOT)))
                if not args.check:
                    page.write_text(new, encoding="utf-8")
        if args.figures:
            draw(sources)
    verb = "out of date, run make readme" if args.check else "written"
    print(f"{', '.join(stale)}: {verb}" if stale else "all numbers are those of results/")  # noqa: T201
    sys.exit(1 if args.check and stale else 0)


if __name__ == "__main__":
    main()
