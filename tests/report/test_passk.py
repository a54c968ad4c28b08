"""The report's section on pass@k."""

import json
from dataclasses import replace

import polars as pl
import pytest

from peft_arena.analyze.study import analyze_study
from peft_arena.report.build import build_report, draw_figures
from peft_arena.report.headline import headline
from peft_arena.report.passk import passk_figure, passk_table
from tests.analyze.synthetic import Truth, build_synthetic
from tests.analyze.synthetic_passk import add_samples, chances
from tests.report.test_report import Page


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    truths = [Truth(label, seeds=(0, 1)) for label in ("sharpened", "better", "same")]
    plain = build_synthetic(tmp_path_factory.mktemp("passk"), truths, items=30, corpus=False)
    return add_samples(plain, chances())


@pytest.fixture(scope="module")
def out(made, tmp_path_factory):
    found = tmp_path_factory.mktemp("report")
    build_report(made.store, made.view, found, draws=300)
    return found


def test_the_section_has_sentences_a_figure_and_a_table(out):
    text = (out / "index.html").read_text()
    page = Page(text)
    assert page.open == [] and "passk-1" in page.ids
    said = "".join(page.text)
    assert "Sampled answers: pass@k" in said and "16 answers to each of 300 test items of operator" in said
    assert said.count("sharpened: pass@1 (+") == 2, "in the headline and in the section"
    assert said.count("better: pass@1 (+") == 1, "only in the section"
    assert (out / "figures" / "passk-1.png").exists()


def test_the_summary_and_the_csv_have_the_numbers(out):
    found = json.loads((out / "summary.json").read_text())
    assert [arm["label"] for arm in found["targets"][0]["passk"]["arms"]] == ["sharpened", "better", "same"]
    assert any("worse than before: a single answer is right more often" in sentence for sentence in found["headline"])
    frame = pl.read_csv(out / "tables" / "passk.csv")
    assert frame.height == 3 + 3 * 3 and frame["samples"].unique().to_list() == [16]
    base = frame.filter(pl.col("arm").is_null())
    assert base["k"].to_list() == [1, 4, 16] and base["change_value"].null_count() == 3
    worse = frame.filter((pl.col("arm") == "sharpened") & (pl.col("k") == 16))
    assert worse["change_high"][0] < 0 < worse["value"][0] < 1


def test_a_study_without_samples_has_no_section(made, tmp_path):
    plain = build_synthetic(tmp_path / "runs", [Truth("lora", seeds=(0,))], items=20, corpus=False)
    build_report(plain.store, plain.view, tmp_path / "report", draws=100)
    assert "pass@" not in (tmp_path / "report" / "index.html").read_text()
    assert not (tmp_path / "report" / "tables" / "passk.csv").exists()


def test_the_figure_names_arms_and_says_how_many_are_not(made):
    result = analyze_study(made.store, made.view, draws=200)
    drawn = passk_figure(result.targets[0].passk, {"same"}, "passk-1")
    assert "2 other arms" in drawn.caption and "sharpened: pass@1 (+" in drawn.alt
    assert drawn.canvas.legends[0].get_texts()[0].get_text() == "same"
    assert [figure.name for figure in draw_figures(result)["operator"] if figure.name.startswith("passk")]
    assert sum("pass@" in sentence for sentence in headline(result)) == 1


def test_the_note_says_which_answers_the_gain_is_of(made):
    greedy = analyze_study(made.store, made.view, draws=50).targets[0].passk
    arms = tuple(replace(arm, target=arm.sampled) for arm in made.view.arms)
    sampled = analyze_study(made.store, replace(made.view, arms=arms), draws=50).targets[0].passk
    assert (greedy.judges, sampled.judges) == (False, True)
    assert "Gain above is of greedy answers" in str(passk_table(greedy))
    assert "Gain above is of the mean over these answers" in str(passk_table(sampled))
