"""The quickstart on a job of seconds: all arms on the same rows, a table, a page; interrupted and run again it repeats nothing."""

import json
from dataclasses import replace
from statistics import mean

import pytest

from refine_nsp.tiny import quickstart as q

TINY = replace(
    q.Settings(), seeds=2, steps=1, sequences_per_step=2, max_length=160, lengths=(256,), depths=(0.0, 1.0), prompts_per_cell=2,
    text_windows=2,
)  # fmt: skip


@pytest.fixture
def library(monkeypatch):
    texts = q.standard_library(held_out=True)
    monkeypatch.setattr(q, "standard_library", lambda held_out: texts[:1] if held_out else texts[1:3])


def test_quickstart(tmp_path, library, monkeypatch, capsys):
    q.quickstart(TINY, str(tmp_path), "refine-nsp/tiny-delta-net", None, "text")
    found = json.loads((tmp_path / "results.json").read_text())
    assert set(found["figures"]) == {"base", *q.ARMS}
    assert all(len(f) == (1 if arm == "base" else 2) for arm, f in found["figures"].items())
    page, printed = (tmp_path / "report.html").read_text(), " ".join(capsys.readouterr().out.split())
    assert "<svg" in page and "needles found" in page
    assert "Exceeding the spread" in printed and found["finding"] in printed
    assert [len(found["figures"][arm][0]["map"]) for arm in ("base", *q.MAPPED)] == [2, 2, 2, 2]

    def never(*args, **kwargs):
        raise AssertionError("a finished arm was trained again")

    monkeypatch.setattr(q, "ReFINETrainer", never)
    q.quickstart(TINY, str(tmp_path), "refine-nsp/tiny-delta-net", None, "text")
    with pytest.raises(AssertionError, match="trained again"):
        q.quickstart(replace(TINY, learning_rate=1e-5), str(tmp_path), "refine-nsp/tiny-delta-net", None, "text")


def test_all_arms_see_the_same_rows(library):
    _, tokenizer = q.load("refine-nsp/tiny-delta-net")
    sources = q.prepare(TINY, tokenizer, None, "text").sources
    rows = [q.training_rows(TINY, 0, sources)["input_ids"] for _ in range(2)]
    assert rows[0] == rows[1] != q.training_rows(TINY, 1, sources)["input_ids"]
    assert len(rows[0]) == 2 and all(len(row) == 160 for row in rows[0])


def test_a_needle_stands_where_its_depth_says(library):
    _, tokenizer = q.load("refine-nsp/tiny-delta-net")
    places = []
    for (probes,) in q.prepare(replace(TINY, prompts_per_cell=12, lengths=(512,)), tokenizer, None, "text").needles:
        assert all(len(prompt) == 512 for prompt in probes.prompts)
        texts = [(tokenizer.decode(p), tokenizer.decode(a).strip()) for p, a in zip(probes.prompts, probes.answers, strict=True)]
        assert all(value in text for text, value in texts)
        places.append(mean(text.index(value) / len(text) for text, value in texts))
    assert places[0] < 0.4 and places[1] > 0.6, places


def test_the_finding_says_what_the_figures_say():
    keys = dict.fromkeys(q.FIGURES, 0.0)
    results = {arm: [dict(keys) for _ in range(3)] for arm in ("base", *q.ARMS)}
    for i, gain in enumerate((0.10, 0.11, 0.09)):
        results[q.EXPECTED][i] |= {"recall_greedy": gain, "text_loss": 0.01}
    assert "+10.0 ± 2.5 points of greedy recall over 3 seeds, more than chance" in q.against_baseline(results, q.EXPECTED)
    assert "+0.0 ± 0.0 points of greedy recall over 3 seeds, no more than chance" in q.against_baseline(results, q.LIKELIHOOD)
    assert all(q.against_baseline(results, arm) in q.finding(results) for arm in (q.EXPECTED, q.LIKELIHOOD))
    results[q.EXPECTED][0]["recall_greedy"] = -0.1
    assert "no more than chance" in q.against_baseline(results, q.EXPECTED)
    assert "one seed" in q.finding({arm: figures[:1] for arm, figures in results.items()})


def test_differences_are_paired_and_marked_only_beyond_their_interval():
    keys = dict.fromkeys(q.FIGURES, 0.0)
    results = {arm: [dict(keys, seconds=1.0) for _ in range(3)] for arm in ("base", *q.ARMS)}
    arm = "paper"
    for i, (clear, noisy) in enumerate([(1.0, 1.0), (1.1, -2.0), (0.9, 3.0)]):
        results[arm][i] |= {"text_loss": clear, "recall_greedy": noisy}
    d, half = q.paired(results, arm, "text_loss")
    assert d == pytest.approx(1.0) and half == pytest.approx(4.303 * 0.1 / 3**0.5)
    cells = {row[0]: row[1] for row in q.differences_table(results).rows}
    assert cells["text: NTP loss"].endswith("*") and not cells["recall: greedy EM"].endswith("*")


def test_too_little_text_is_refused(tmp_path):
    (tmp_path / "short.txt").write_text("def f(): pass\n" * 50)
    with pytest.raises(ValueError, match="too little text"):
        q.quickstart(TINY, str(tmp_path / "out"), "refine-nsp/tiny-delta-net", str(tmp_path / "short.txt"), "text")
