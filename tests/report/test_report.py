"""Tables, plots and the page of a run say what the run's files say."""

import json
import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from refine_nsp.errors import RefineError
from refine_nsp.report import plots
from refine_nsp.report.runs import names_of, read_run, report
from refine_nsp.report.tables import Table

TABLE = Table("A title", ["what", "words", "figure"], [["a|b", "none", 0.123456], ["c", "SFT", None]], ["a note"])


def test_a_table_is_shown_in_three_ways():
    assert TABLE.prose() == [True, True, False]
    text = TABLE.markdown()
    assert "| a\\|b | none | 0.1235 |" in text and "| c | SFT |  |" in text and text.endswith("a note\n")
    page = Table("<t>", ["<b>"], [["<i>"]]).html()
    assert "&lt;t&gt;" in page and "&lt;b&gt;" in page and "&lt;i&gt;" in page


def test_in_a_narrow_terminal_nothing_is_cut():
    console = Console(width=30, record=True)
    console.print(Table("t", ["task", "figure", "difference"], [["niah_single_1", "fraction_match", "+0.123 ± 0.456"]]).rich())
    shown = console.export_text()
    assert "niah_single_1" in shown and "…" not in shown


def test_headings_of_seven_columns_of_figures_stay_whole_in_80_characters():
    console = Console(width=80, record=True)
    arms = ["base", "NTP only", "paper", "context", "expected", "likelihood"]
    rows = [["recall, unseen wordings: greedy EM", "-16.9838", *["-17.7199 ± 0.3320"] * 5]]
    console.print(Table("t", ["", *arms], rows).rich())
    shown = console.export_text().splitlines()
    assert all(arm in shown[1] for arm in arms) and max(map(len, shown)) <= 80, shown


def run_folder(path, records):
    path.mkdir()
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_a_resumed_run_counts_its_later_record(tmp_path):
    folder = run_folder(tmp_path / "a", [{"step": s, "loss_ntp": x} for s, x in ((1, 3.0), (2, 9.0), (2, 2.0), (3, 1.0))])
    assert read_run(folder).curve("loss_ntp") == ([1, 2, 3], [3.0, 2.0, 1.0])
    with pytest.raises(RefineError, match=r"has no metrics\.jsonl"):
        read_run(tmp_path)


def test_the_page_holds_every_run_and_fetches_nothing(tmp_path):
    records = [
        {"step": s, "loss_answer": 2.0 / s, "inner_reward_hybrid": 0.1 * s, "loss_policy": 1e-9, "eval_any_match": 0.5}
        for s in (1, 2)
    ]
    folders = [run_folder(tmp_path / name, records) for name in ("one", "two")]
    page = report(folders, tmp_path / "r.html").read_text()
    for title in ("cross-entropy of answers (training)", "inner reward hybrid", "answers: any match (validation)", "one", "two"):
        assert title in page
    assert "<svg" in page and not re.search(r"(src|href)=['\"]?http", page)
    assert page.count("policy loss") == 1  # in the table; a curve of rounding is not drawn


def test_a_heat_map_writes_its_values_and_leaves_gaps():
    plot = plots.heat_map([[100.0, None], [0.0, 50.0]], ["1k", "2k"], ["top", "end"], "found", "length", "depth")
    assert plot.drawing.count(">100<") == plot.drawing.count(">50<") == 1
    for figure in (plot.html(), plot.svg()):
        assert "None" not in figure and "nan" not in figure.lower() and "found" in figure


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [Path(p) for p in ("a/x/mid", "b/x/mid", "b/ntp", "b/ntp")]
    assert names_of(folders) == ["a/x/mid", "b/x/mid", "ntp", "ntp (2)"]
    assert names_of([Path(".")]) == [tmp_path.name]


def test_a_hundred_lines_are_all_different():
    styles = [plots.Style.of(i) for i in range(100)]
    assert len(set(styles)) == 100
    for a, b in pairwise(styles):
        assert a.colour != b.colour and a.dashes != b.dashes


def test_a_drawing_of_its_own_is_well_formed_and_has_no_variables():
    curves = {"a<b>": ([1, 2], [1.0, 2.0]), "c&d": ([1, 2], [2.0, 1.0])}
    text = plots.line_plot(curves, "<t> & u").svg()
    ElementTree.fromstring(text)
    assert "var(" not in text and "a&lt;b&gt;" in text and "c&amp;d" in text and "&lt;t&gt; &amp; u" in text


def test_the_legend_of_a_drawing_of_its_own_ends_inside_it():
    text = plots.line_plot({name: ([1, 2], [1.0, 2.0]) for name in "abcdef"}, "title").svg()
    tall = float(re.findall(r'viewBox="0 0 \S+ ([^"]+)"', text)[0])
    lowest = max(float(y) for y in re.findall(r"translate\(10,([^)]+)\)", text)) + 8  # where the last name stands
    assert lowest + 3 <= tall  # letters of 9 reach below their line by less than 3
