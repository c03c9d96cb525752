"""Tables, plots and the page of a run say what the run's files say."""

import json
import re

import pytest
from rich.console import Console

from refine_nsp.errors import RefineError
from refine_nsp.report import plots
from refine_nsp.report.runs import read_run, report
from refine_nsp.report.tables import Table

TABLE = Table("A title", ["what", "words", "figure"], [["a|b", "none", 0.123456], ["c", "SFT", None]], ["a note"])


def test_one_table_three_faces():
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
    svg = plots.heat_map([[100.0, None], [0.0, 50.0]], ["1k", "2k"], ["top", "end"], "found", "length", "depth")
    assert svg.startswith("<svg") and svg.count("<!-- 100 -->") == 1 and "None" not in svg and "nan" not in svg.lower()
