"""The section on rewinding: claims, figures, tables, and the page of a single run."""

import json
import re
from dataclasses import replace

import polars as pl
import pytest

from peft_arena.analyze.study import analyze_study
from peft_arena.analyze.view import Margin
from peft_arena.core.errors import UserError
from peft_arena.core.specs import OWN, PathSpec
from peft_arena.paths.rules import rule_spec
from peft_arena.report.build import build_report
from peft_arena.report.paths import path_figures, write_paths
from peft_arena.report.paths_plane import TRAJECTORY
from peft_arena.report.paths_text import claim_sentence, factors_text, overshoot_sentence
from tests.analyze.synthetic_paths import Walk, build_walks, saturating, straight
from tests.report.test_report import HOSTILE, Page

GRID = (0.0, 0.2, 0.4, 1.0, 1.2)
STRAIGHT = PathSpec(way="linear")
OVER = tuple(range(6))
ALL: dict[int, float | None] = dict.fromkeys(OVER, 0.4)
WALKS = [
    Walk("over", method="oft", seeds=OVER, save_points=(100,), grid=GRID, paths=(OWN, STRAIGHT), forced=ALL),
    Walk("tight", gain=straight(0.6), forget=straight(-0.1), grid=(0.2, 0.5)),
    Walk("wrecked", gain=straight(-0.15), forget=straight(-0.8), grid=GRID, forced={0: 0.2}),
    Walk("fooled", gain=straight(0.6), forced={0: 0.2}, grid=(0.2, 0.5)),
    Walk(HOSTILE, seeds=(0, 1), unscanned=(1,), grid=(0.4,)),
    Walk("even", gain=saturating(0.4), forget=straight(0.0), seeds=(0, 1), grid=(0.4,), forced={0: 0.4, 1: None}),
]  # fmt: skip


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    made = build_walks(tmp_path_factory.mktemp("runs"), WALKS, validation=40, test=200, seed=1)
    return replace(made, view=replace(made.view, margin=Margin(target=12.0)))


@pytest.fixture(scope="module")
def written(walked, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return out, write_paths(walked.store, walked.view, out)


@pytest.fixture(scope="module")
def paths(walked):
    return analyze_study(walked.store, walked.view, draws=300).targets[0].paths


def drawn_of(paths, named):
    return {figure.name: figure for figure in path_figures(paths, "sums", named)}


@pytest.fixture(scope="module")
def figures(paths):
    return drawn_of(paths, set(paths.labels))


def test_the_page_stands_alone(written):
    text = (written[0] / "paths.html").read_text()
    page = Page(text)
    assert page.open == []
    assert not any(not reference.startswith("#") for reference in page.references)
    assert len(page.ids) == len(set(page.ids))
    assert text.count("<svg") == 2
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "not scanned yet" in text[text.index("<h2>Missing") :]


def test_every_file_of_a_run_is_written_and_the_summary_is_returned(written):
    out, summary = written
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    figures = {f"figures/paths-{name}-1.{end}" for name in ("plane", "strength") for end in ("svg", "png")}
    assert found == {".written.json", "paths.html", "paths.csv", "rewinds.csv", "summary.json", *figures}
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert [gap["reason"] for gap in summary["gaps"]] == ["not scanned yet"]


def test_without_a_directory_nothing_is_written(walked, tmp_path, monkeypatch, written):
    monkeypatch.chdir(tmp_path)
    assert write_paths(walked.store, walked.view, None) == written[1]
    assert not list(tmp_path.iterdir())


def test_a_view_without_scans_is_refused(walked):
    with pytest.raises(UserError, match="asks for no scan"):
        write_paths(walked.store, replace(walked.view, paths={}), None)


def test_tables_have_a_row_for_every_point_and_for_every_claim(written):
    points, claims = (pl.read_csv(written[0] / f"{name}.csv") for name in ("paths", "rewinds"))
    over = points.filter((pl.col("arm") == "over") & (pl.col("way") == "own"))
    assert over["point"].to_list() == ["path"] * 5 + ["tuned", "save point"]
    assert over["factor"].to_list() == [*GRID, 1.0, None]
    assert over["step"].to_list() == [None] * 6 + [100.0]
    assert over["chosen_by"].to_list() == [0, 0, 6, 0, 0, 0, 0]
    assert len(claims) == 7
    rows = {(row["arm"], row["way"]): row for row in claims.iter_rows(named=True)}
    assert rows["over", "own"]["verdict"] == "overshoot"
    assert rows["over", "own"]["chosen"] == "; ".join(f"seed {seed}: 0.4" for seed in OVER)
    assert rows["even", "own"]["kept_tuned"] == 1
    assert rows["tight", "own"]["target_value"] is None
    assert rows[HOSTILE, "own"]["missing"] == "seed 1: not scanned yet"


def test_sentences_say_what_was_found_and_no_more(paths):
    said = {arm.label: claim_sentence(arm, "sums") for arm in paths.arms if arm.words == "own parameters"}
    assert said["over"].startswith("over overshot: at factor 0.4 (6 seeds) of its path")
    assert "sums is no worse within 12 (" in said["over"]
    assert "sums is no worse within 12" in said["wrecked"]
    assert said["wrecked"].endswith("The tuned model itself gained nothing on sums that validation items show.")
    assert "gained nothing" not in said["over"]
    assert (
        "the tuned model stays: on validation items the target of the largest factor tried, 0.5, changes by"
        in said["tight"]
    )
    assert "the target is worse after all" in said["fooled"]
    assert "nothing can be claimed: seed 1: not scanned yet" in said[HOSTILE]
    assert "undecided whether it overshot (retention undecided" in said["even"]
    assert factors_text(next(arm for arm in paths.arms if arm.label == "even")) == "0.4 (1 seed), none (1 seed)"


def test_the_headline_names_the_clearest_overshoot_and_the_others(paths):
    sentence = overshoot_sentence(paths, "sums")
    assert sentence.startswith("over overshot: at factor 0.4 (6 seeds) of its path"), "what learned nothing comes last"
    assert re.search(r"mean retention on test items is better than the tuned model's \(\+\d+\.\d points \[\+", sentence)
    assert sentence.endswith("So did wrecked.")


def test_the_report_of_a_study_has_the_section_and_the_headline(walked, tmp_path):
    summary = build_report(walked.store, walked.view, tmp_path, draws=300)
    text = (tmp_path / "index.html").read_text()
    assert ">Rewinding<" in text
    assert text.index("wrecked</th>") < text.index("Chosen points against the tuned models")
    section = text[text.index("Chosen points against the tuned models") :]
    assert section.index("over<") < section.index("wrecked") < section.index("tight"), "overshoots come first"
    assert any(line.startswith("over overshot") for line in summary["headline"])
    assert (tmp_path / "tables" / "rewinds.csv").exists()
    assert (tmp_path / "figures" / "paths-plane-1.png").exists()
    assert summary["targets"][0]["paths"]


def test_a_study_without_overshoot_says_nothing_of_it(tmp_path):
    walked = build_walks(tmp_path / "runs", [WALKS[1]], validation=30, test=30)
    summary = build_report(walked.store, walked.view, tmp_path / "out", draws=100)
    assert not any("overshot" in line for line in summary["headline"])


def test_the_plane_shows_path_training_and_choice(figures):
    figure = figures["paths-plane"]
    panels = {axis.get_title(loc="left").split(" (")[0]: axis for axis in figure.canvas.axes if axis.get_visible()}
    lines = panels["over"].lines
    rings = [line for line in lines if line.get_markersize() == 13]
    assert len(rings) == 2, "one for each path"
    assert sum(line.get_color() == TRAJECTORY and line.get_marker() == "x" for line in lines) == 1
    dashed = [line for line in lines if line.get_linestyle() == "--" and len(line.get_xdata()) == 2]
    assert len(dashed) == 2, "from the tuned model to 1.2 on both paths"
    assert sum(line.get_markerfacecolor() == "white" for line in lines) == 2
    solid = [line for line in panels["tight"].lines if len(line.get_xdata()) == 4]
    assert (solid[0].get_xdata()[0], solid[0].get_ydata()[0]) == (0.0, 0.0)
    assert {text.get_text() for text in panels["over"].texts} >= {"0.4", "1.2"}
    assert any("factor 0.2" in text for text in figure.hovers.values())
    assert "chosen factor 0.4" in figure.alt


def test_an_arm_far_off_has_axes_of_its_own(figures):
    axes = {axis.get_title(loc="left"): axis for axis in figures["paths-plane"].canvas.axes}
    assert "wrecked (own axes)" in axes
    assert axes["over"].get_ylim() == axes["tight"].get_ylim()
    assert axes["over"].get_ylim() != axes["wrecked (own axes)"].get_ylim()


def test_only_named_arms_are_drawn(paths):
    few = drawn_of(paths, {"over"})
    assert [axis.get_title(loc="left") for axis in few["paths-plane"].canvas.axes] == ["over"]
    assert "5 of 6 arms" in few["paths-plane"].caption
    assert drawn_of(paths, set()) == {}


def test_an_arm_with_many_paths_has_a_panel_for_each(tmp_path):
    rules = tuple(PathSpec(rule=rule_spec(name)) for name in ("min", "safe"))
    walks = [Walk("a", grid=(0.4,), paths=(OWN, *rules)), Walk("b", grid=(0.4,))]
    walked = build_walks(tmp_path, walks, validation=20, test=20)
    paths = analyze_study(walked.store, walked.view, draws=50).targets[0].paths
    plane = drawn_of(paths, {"a", "b"})["paths-plane"]
    titles = [axis.get_title(loc="left").split(" (")[0] for axis in plane.canvas.axes]
    words = ("own parameters", "own parameters, rule Min", "own parameters, rule Safe")
    assert titles == [*(f"a\n{text}" for text in words), f"b\n{words[0]}"]
    assert "per arm and path" in plane.caption
    assert "2 arms" in plane.alt


def test_strengths_are_drawn_before_and_after(figures):
    figure = figures["paths-strength"]
    titles = [axis.get_title(loc="left") for axis in figure.canvas.axes if axis.get_visible()]
    assert "tight" not in titles
    over = figure.canvas.axes[titles.index("over")]
    assert over.get_yscale() == "log"
    tuned, chosen = over.lines[0], over.lines[1]
    assert list(chosen.get_ydata()) == pytest.approx([0.4 * value for value in tuned.get_ydata()])
    assert any("block 5" in text for text in figure.hovers.values())


def test_why_a_factor_may_not_be_chosen_is_told(written):
    text = (written[0] / "paths.html").read_text()
    assert "beyond the tuned model: shown, never chosen" in text
    assert "the tuned model itself" in text
