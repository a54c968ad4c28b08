"""The report's geometry: figures draw the records' numbers, the pages stand alone, what is missing is said."""

import base64
import json
import re
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas

from peft_arena.analyze.correlate import Point, correlate
from peft_arena.analyze.geometry import ArmGeometry, TargetGeometry, make_run
from peft_arena.analyze.profiles import moving_average, window_of
from peft_arena.analyze.study import analyze_study
from peft_arena.core.errors import UserError
from peft_arena.report.build import build_report
from peft_arena.report.figures import look, style
from peft_arena.report.geometry import correlation_table, geometry_figures, value_text, write_geometry_page
from peft_arena.report.geometry_charts import every_chart
from peft_arena.report.geometry_lines import DASHES, depth_figure, grid_figure, legend_above, profile_figure, spread
from peft_arena.report.geometry_points import correlation_figure, drift_figure, kl_figure, narrow_log
from tests.analyze.synthetic import Truth, build_synthetic
from tests.analyze.synthetic_geometry import KINDS, add_geometry, make_arrays, make_record
from tests.report.test_report import HOSTILE, Page

FORGET = {"lora": -0.1, "oft": -0.02, "full": -0.4, "dora": -0.2, HOSTILE: -0.3, "prompt": -0.05, "later": -0.1}
NAMED = {"lora", "oft", "full", "dora", HOSTILE, "prompt"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    truths = [Truth(label, f"m{place}", forget=FORGET[label], seeds=(0, 1)) for place, label in enumerate(FORGET)]
    study = build_synthetic(root / "runs", truths, items=60, corpus=False)
    strength = {label: -forget for label, forget in FORGET.items()}
    study = add_geometry(study, strength, weightless=("prompt",), missing=("later",))
    summary = build_report(study.store, study.view, root / "out", draws=100)
    return root / "out", summary, study


@pytest.fixture(scope="module")
def geometry(made):
    return analyze_study(made[2].store, made[2].view, draws=50).targets[0].geometry


def section(text):
    start = text.index('<h2 id="geometry-1">')
    return text[start : text.index("</section>", start)]


def drawn(function, *arguments):
    with style():
        return function(*arguments)


def test_the_report_has_the_section_with_tables_and_figures(made):
    text = (made[0] / "index.html").read_text()
    page = Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    own = section(text)
    for title in ("Geometry of every arm", "Geometry against forgetting and gain, over arms"):
        assert title in own
    assert "is not a cause" in own
    assert "n/a" in own
    assert 'title="not measured yet"' in own
    assert 'href="geometry.html"' in own
    assert "<script" not in text
    for name in ("against", "overview", "profiles", "grid", "rank", "entropy", "drift", "kl"):
        for end in ("svg", "png"):
            assert (made[0] / "figures" / f"geometry-{name}-1.{end}").stat().st_size > 1000
    assert own.count('role="img"') == 8


def test_the_table_shows_means_and_never_a_number_for_a_method_without_weights(made):
    own = section((made[0] / "index.html").read_text())
    table = own[own.index("Geometry of every arm") :]
    rows = {row[: row.index("<")]: row for row in table.split('<th scope="row">')[1:]}
    cells = re.findall(r'<td class="num"[^>]*>(.*?)</td>', rows["lora"])
    assert cells[:2] == ["2", "0.095<small>0.09–0.1</small>"]
    cells = re.findall(r'<td class="num"[^>]*>(.*?)</td>', rows["prompt"])
    assert [re.sub("<.*?>", "", cell) for cell in cells[1:8]] == ["n/a"] * 7
    assert not any("n/a" in cell for cell in cells[8:])


def test_the_summary_and_the_tables_hold_the_numbers(made):
    out, summary, study = made
    geometry = json.loads((out / "summary.json").read_text())["targets"][0]["geometry"]
    assert geometry == summary["targets"][0]["geometry"]
    table = pl.read_csv(out / "tables" / "geometry.csv")
    assert table.columns == [
        "target", "run", "arm", "seed", "what", "module", "block", "prompts", "quantity", "value", "reason",
    ]  # fmt: skip
    run = study.view.arms[0].runs[1]
    one = table.filter(
        pl.col("run") == run.run_id,
        pl.col("quantity") == "l2_relative",
        pl.col("module").str.ends_with("2.mlp.up_proj"),
    )
    assert one.select("seed", "block", "value").row(0) == (1, 2, pytest.approx(0.05))
    absent = table.filter(pl.col("arm") == "prompt", pl.col("what") == "spectra")
    assert absent["value"].to_list() == [None, None]
    assert absent["reason"].str.starts_with("not applicable").all()
    found = pl.read_csv(out / "tables" / "geometry_correlations.csv")
    row = found.filter(pl.col("metric") == "kl_general", pl.col("outcome") == "forgetting").row(0, named=True)
    entry = next(
        one for one in geometry["correlations"] if (one["metric"], one["outcome"]) == ("kl_general", "forgetting")
    )
    assert row["spearman"] == pytest.approx(entry["value"])
    assert (row["arms"], row["p_corrected"]) == (6, None)


def test_totals_of_a_model_are_in_the_table_of_everything(made):
    table = pl.read_csv(made[0] / "tables" / "geometry.csv").filter(pl.col("quantity") == "global_l2_relative")
    assert table["arm"].n_unique() == 5
    lora = table.filter(pl.col("arm") == "lora").sort("seed")
    assert lora["value"].to_list() == pytest.approx([0.09, 0.1])


def test_a_number_says_what_it_is_a_mean_of(made):
    own = section((made[0] / "index.html").read_text())
    assert 'title="2 runs; mean over modules">0.095' in own


def test_correlations_with_the_gain_say_their_own_number_of_arms():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 10))
    points = [Point(str(n), {"kl_general": x}, y if n < 8 else None, z) for n, (x, y, z) in enumerate(values.T)]
    cells = re.findall("<td[^>]*>(.*?)</td>", table_of(points))
    assert cells[0] == "8 to 10"
    assert "forgetting: 8 arms, 2 arms left out" in table_of(points)
    points = [Point(point.arm, point.values, None, point.gain) for point in points]
    assert re.findall("<td[^>]*>(.*?)</td>", table_of(points))[0] == "10"


def test_of_few_arms_the_table_gives_the_value_alone():
    points = [Point(str(n), {"kl_general": n + 2.0**n}, n + 2.0**n, None) for n in range(12)]
    few = table_of(points[:7])
    assert "7 arms: no interval" in few and "nothing can be said" in few
    assert "<b>" not in few
    assert "<b>1.00</b>" in table_of(points)


def table_of(points):
    return correlation_table(TargetGeometry((), correlate(points, ["kl_general"])))


def test_missing_records_are_listed_as_gaps(made):
    gaps = [(gap["who"], gap["what"]) for gap in made[1]["gaps"] if gap["what"].startswith("geometry")]
    assert ("later, seed 0", "geometry drift") in gaps
    assert len(gaps) == 6


def test_without_geometry_the_report_is_as_before(tmp_path):
    study = build_synthetic(tmp_path / "runs", [Truth("a", seeds=(0,)), Truth("b", seeds=(0,))], items=10)
    summary = build_report(study.store, study.view, tmp_path / "out", draws=50)
    assert "eometry" not in (tmp_path / "out" / "index.html").read_text()
    assert "geometry" not in summary["targets"][0]
    assert not [path for path in (tmp_path / "out").rglob("*") if "geometry" in path.name or "plotly" in path.name]


def test_the_interactive_page_needs_nothing_but_the_file_beside_it(made):
    text = (made[0] / "geometry.html").read_text()
    page = Page(text)
    assert page.open == []
    assert sorted(page.references) == ["index.html", "plotly.min.js"]
    assert "plotly.js v" in (made[0] / "plotly.min.js").read_text()[:200]
    assert not re.search(r"https?:|url\(|@import", text)
    assert "showSendToCloud: false" in text, "plotly's own button would send the data away"
    assert "<script>alert" not in text
    assert len(text) < 1_500_000
    charts = json.loads(re.search(r'id="charts">(.*?)</script>', text).group(1))
    assert [chart["id"] for chart in charts] == ["t1-against", "t1-profiles", "t1-depth", "t1-drift"]
    assert all(0 <= trace["style"] < len(chart["styles"]) for chart in charts for choice in chart["choices"]
               for trace in choice["data"] if "style" in trace)  # fmt: skip


def unpacked(array):
    return np.frombuffer(base64.b64decode(array["bdata"]), dtype=f"<{array['dtype']}")


def test_the_interactive_profiles_are_those_of_the_records(made, geometry):
    chart = next(chart for chart in every_chart(geometry, NAMED, "") if chart.id == "profiles")
    choice = next(choice for choice in chart.choices if choice.name == "model.layers.2.mlp.down_proj")
    trace = next(trace for trace in choice.data if chart.styles[trace["style"]]["name"] == "oft")
    x, y = unpacked(choice.places[trace["x"]]), unpacked(trace["y"])
    smooth = []
    for run in made[2].view.arms[1].runs:
        directory = made[2].store.run(run)
        arrays = pl.read_parquet(next(directory.path.glob("records/*/geometry-spectra-*.parquet")))
        smooth.append(
            moving_average(arrays.filter(pl.col("module") == "model.layers.2.mlp.down_proj")["deviation"].to_numpy(), 5)
        )
    np.testing.assert_array_equal(x, np.arange(96))
    np.testing.assert_allclose(y, np.mean(smooth, axis=0), rtol=1e-5)
    assert len(chart.choices) == 7 + 28


def test_a_large_page_leaves_modules_out_and_says_so(monkeypatch, geometry):
    monkeypatch.setattr("peft_arena.report.geometry_charts.MOST_VALUES", 10_000)
    chart = next(chart for chart in every_chart(geometry, NAMED, "") if chart.id == "profiles")
    assert len(chart.choices) == 7 + 0
    assert "28 modules are left out" in chart.text
    values = sum(len(unpacked(trace["y"])) for choice in chart.choices for trace in choice.data)
    assert values <= 10_000


def test_the_profile_figure_draws_the_smoothed_means_on_a_log_scale(geometry):
    figure = drawn(profile_figure, geometry, NAMED, "x", KINDS[6])
    axis = figure.canvas.axes[0]
    assert axis.get_yscale() == "log"
    line = next(line for line in axis.get_lines() if line.get_label() == "full")
    expected = geometry.arms[2].profile(KINDS[6])
    np.testing.assert_allclose(
        line.get_ydata(), moving_average(expected.values["deviation"], window_of(expected.directions))
    )
    assert {text.get_text() for text in axis.texts} >= {"lora", "oft", "full", "dora"}
    assert "prompt" not in {text.get_text() for text in axis.texts}
    assert "moving average over 5 directions" in figure.caption
    assert "n = 5 arms" in figure.caption


def test_names_at_the_ends_of_lines_do_not_overlap():
    places = spread([10.0, 10.0, 11.0, 50.0, 99.0, 99.5], 8.0, 0.0, 100.0)
    assert np.all(np.diff(places) >= 8.0 - 1e-9)
    assert places[0] >= 0 and places[-1] <= 100
    assert places[3] == 50.0


def test_ranks_are_drawn_by_block_and_kind(geometry):
    figure = drawn(depth_figure, geometry, NAMED, "x", "stable_rank")
    panels = [axis for axis in figure.canvas.axes if axis.get_visible()]
    assert [axis.get_title(loc="left") for axis in panels] == [kind.rpartition(".")[2] for kind in KINDS]
    line = panels[3].get_lines()[2]
    rows = [
        row for run in geometry.arms[2].runs for row in run.records["spectra"].rows if row.module.endswith(KINDS[3])
    ]
    expected = [np.mean([row.values["stable_rank"] for row in rows if row.block == block]) for block in range(4)]
    np.testing.assert_array_equal(line.get_xdata(), range(4))
    np.testing.assert_allclose(line.get_ydata(), expected)


def test_lines_differ_in_grey_too(geometry):
    figure = drawn(depth_figure, geometry, NAMED, "x", "stable_rank")
    lines = figure.canvas.axes[0].get_lines()
    assert len({(line.get_marker(), str(line.get_linestyle())) for line in lines}) == len(lines) == 5
    assert len({(look(place)[1], place % len(DASHES)) for place in range(60)}) == 60


def test_the_names_above_panels_have_the_dashes_of_their_lines(geometry):
    canvas = drawn(depth_figure, geometry, NAMED, "x", "stable_rank").canvas
    shown = canvas.legends[0].get_lines()
    assert [line._unscaled_dash_pattern for line in shown] == [
        line._unscaled_dash_pattern for line in canvas.axes[0].get_lines()
    ]


@pytest.mark.parametrize("lines", [True, False])
@pytest.mark.parametrize("label", ["a12", "lora lr=1e-3", "W" * 30])
def test_the_names_above_panels_fit_the_figure(label, lines):
    canvas = Canvas(figsize=(10.4, 4.3), layout="constrained")
    FigureCanvasAgg(canvas)
    canvas.subplots(1, 2)
    with style():
        legend_above(canvas, [ArmGeometry(label, place, ()) for place in range(12)], lines)
        canvas.draw_without_rendering()
    assert canvas.legends[0].get_window_extent().x1 <= canvas.bbox.x1


@pytest.mark.parametrize("span", [30, 40, 100, 1000, 1e6])
def test_labels_of_a_narrow_logarithmic_axis_stay_apart(span):
    canvas = Canvas(figsize=(2.4, 2.4))
    FigureCanvasAgg(canvas)
    axis = canvas.subplots()
    values = [0.16, 0.16 * span]
    axis.plot(values, [0, 1])
    narrow_log(axis, values)
    axis.tick_params(labelsize=8.5)
    canvas.draw_without_rendering()
    low, high = axis.get_xlim()
    found = [tick.label1 for tick in axis.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    boxes = [label.get_window_extent() for label in found if label.get_text()]
    assert len(boxes) >= 2
    assert all(one.x1 < other.x0 for one, other in pairwise(boxes))
    assert not any(tick.label1.get_text() for tick in axis.xaxis.get_minor_ticks())


def test_the_grid_has_a_row_for_each_arm_and_leaves_out_what_is_not_there(geometry):
    figure = drawn(grid_figure, geometry, NAMED, "x")
    assert len(figure.canvas.axes) == 5 * 3
    singular = figure.canvas.axes[2].get_lines()[0].get_ydata()
    assert np.isfinite(singular).sum() == 4, "LoRA of rank 4 has four singular values"


def test_points_are_where_the_records_say(geometry):
    figure = drawn(drift_figure, geometry, NAMED, "d")
    marks = {line.get_gid(): line for line in figure.canvas.axes[0].get_lines() if line.get_gid()}
    lora = geometry.arms[0]
    assert marks["d-0"].get_xdata()[0] == lora.mean("drift_relative_target").value
    assert marks["d-0"].get_ydata()[0] == lora.mean("drift_relative_general").value
    assert figure.hovers["d-0"].startswith("lora: general ")
    assert "n = 5 arms" in figure.caption
    figure = drawn(kl_figure, geometry, NAMED, "k")
    marks = {line.get_gid(): line for line in figure.canvas.axes[0].get_lines() if line.get_gid()}
    assert marks["k-0-5"].get_xdata()[0] == geometry.arms[5].mean("kl_general").value
    assert marks["k-1-5"].get_xdata()[0] == geometry.arms[5].mean("kl_target").value
    assert marks["k-0-5"].get_markerfacecolor() != marks["k-1-5"].get_markerfacecolor() == "white"


def test_the_correlation_figure_shows_every_run_and_the_coefficients(geometry):
    figure = drawn(correlation_figure, geometry, NAMED, "c")
    found = {one.metric: one for one in geometry.correlations if one.outcome == "forgetting"}
    axis = figure.canvas.axes[2]
    assert axis.get_xlabel() == "linear CKA, general"
    points = {(line.get_xdata()[0], line.get_ydata()[0]) for line in axis.get_lines()}
    assert points == {(run.measures["cka_general"].value, run.forgetting) for run in geometry.runs}
    assert f"{found['cka_general'].value:.2f}".replace("-", "\N{MINUS SIGN}") in axis.get_title(loc="left")
    assert "over 5 to 6 arms" in figure.caption


def test_of_many_arms_only_some_are_named():
    found = [(make_record("spectra", 0.1 + n), make_arrays(0.1 + n, directions=30)) for n in range(30)]
    runs = [make_run(str(n), str(n), 0, [(record, arrays)]) for n, (record, arrays) in enumerate(found)]
    geometry = TargetGeometry(tuple(ArmGeometry(run.label, place, (run,)) for place, run in enumerate(runs)))
    figure = drawn(profile_figure, geometry, {"3", "4"}, "x")
    assert {text.get_text() for text in figure.canvas.axes[0].texts} == {"3", "4"}
    assert "28 other arms" in figure.caption


def test_checkpoints_of_no_study_get_figures_and_a_page(tmp_path):
    records = [
        ("one", make_record("spectra", 0.1, step=None, subject="/models/one"), make_arrays(0.1)),
        ("one", make_record("drift", 0.1, step=None), None),
        ("two & co", make_record("spectra", 0.3, step=None), make_arrays(0.3, seed=1)),
    ]
    written = write_geometry_page(records, tmp_path / "out")
    assert written[0] == tmp_path / "out" / "geometry.html"
    assert all(path.stat().st_size > 0 for path in written)
    names = {path.stem for path in written}
    assert {"geometry-overview", "geometry-profiles", "geometry-rank", "geometry-drift"} <= names
    assert "geometry-against" not in names
    page = Page(written[0].read_text())
    assert page.open == []
    assert page.references == ["plotly.min.js"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the figures"):
        write_geometry_page(records[1:2], tmp_path / "file" / "out")


@pytest.mark.parametrize("part", ["spectra", "drift", "activations"])
def test_one_record_of_any_part_is_enough(tmp_path, part):
    unchanged = make_record(part, 1.0, changed=False)
    written = write_geometry_page([("same", unchanged, None)], tmp_path)
    assert Page(written[0].read_text()).open == []
    geometry = TargetGeometry((ArmGeometry("same", 0, (make_run("same", "", None, [(unchanged, None)]),)),))
    assert geometry_figures(geometry, {"same"}) == []


def test_values_as_text():
    assert value_text(None) == "\N{EN DASH}"
    assert value_text(0.0) == "0"
    assert value_text(0.012345) == "0.0123"
    assert value_text(1234.5) == "1234"
    assert value_text(-2.5e-7) == "\N{MINUS SIGN}2.50e\N{MINUS SIGN}7"
    assert value_text(0.25, 1) == "0.2"
