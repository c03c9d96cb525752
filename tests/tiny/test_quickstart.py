"""The quickstart on a job of seconds: all arms on the same rows, a table, a page; interrupted and run again it repeats nothing."""

import json
from dataclasses import replace
from statistics import mean

import pytest
from rich.console import Console

from refine_nsp.tiny import quickstart as q

BASE = "refine-nsp/tiny-gated-deltanet"
TINY = replace(
    q.Settings(), seeds=2, steps=1, sequences_per_step=2, max_length=160, document_windows=(1, 2), lengths=(160, 256),
    unseen_lengths=(160,), depths=(0.0, 1.0), prompts_per_cell=2, text_windows=2,
)  # fmt: skip


@pytest.fixture
def library(monkeypatch):
    texts = q.standard_library(held_out=True)
    monkeypatch.setattr(q, "standard_library", lambda held_out: texts[:1] if held_out else texts[1:3])


def test_quickstart(tmp_path, library, monkeypatch, capsys):
    q.quickstart(TINY, str(tmp_path), BASE, None, "text")
    found = json.loads((tmp_path / "results.json").read_text())
    assert set(found["figures"]) == {"base", *q.ARMS}
    assert all(len(f) == (1 if arm == "base" else 2) for arm, f in found["figures"].items())
    page, out = (tmp_path / "report.html").read_text(), capsys.readouterr().out
    printed = " ".join(out.split())
    assert "<svg" in page and "needles found, %, by length" in page and "Needles by length, before and after" in page
    assert "by chance" in printed and " ".join(found["finding"].split()) in printed
    assert all(f"needles {length}" in printed for length in TINY.lengths)
    assert [len(found["figures"][arm][0]["map"]) for arm in q.MAPPED] == [2, 2, 2, 2]

    def never(*args, **kwargs):
        raise AssertionError("a finished arm was trained again")

    monkeypatch.setattr(q, "ReFINETrainer", never)
    q.quickstart(TINY, str(tmp_path), BASE, None, "text")
    q.quickstart(replace(TINY, seeds=1), str(tmp_path), BASE, None, "text")  # the number of seeds changes no arm
    with pytest.raises(AssertionError, match="trained again"):
        q.quickstart(replace(TINY, learning_rate=1e-5), str(tmp_path), BASE, None, "text")


def test_all_arms_see_the_same_windows_step_by_step(library):
    _, tokenizer = q.load(BASE)
    s = replace(TINY, steps=4)  # a block of documents of one window, one of two, and one of one
    sources = q.prepare(s, tokenizer, None, "text").sources
    rows = [q.training_rows(s, 0, sources)["input_ids"] for _ in range(2)]
    assert rows[0] == rows[1] != q.training_rows(s, 1, sources)["input_ids"]
    assert len(rows[0]) == 8 and all(len(row) == 160 for row in rows[0])
    carried = q.training_rows(s, 0, sources, carried=True)
    assert carried["begins"] == [True, True, True, False, True, False, True, True]
    lanes: list[list[list[int]]] = [[], []]
    lane = lanes[0]
    for row, begins in zip(carried["input_ids"], carried["begins"], strict=True):
        lane = min(lanes, key=len) if begins else lane  # whose document ended takes the next
        lane.append(row)
    assert [row for step in zip(*lanes, strict=True) for row in step] == rows[0]
    assert lanes[0][1][-1] == lanes[0][2][0]  # windows of a document share a token


def test_a_needle_stands_where_its_depth_says(library):
    _, tokenizer = q.load(BASE)
    places = []
    for (probes,) in q.prepare(replace(TINY, prompts_per_cell=12, lengths=(512,)), tokenizer, None, "text").needles:
        assert all(len(prompt) == 512 for prompt in probes.prompts)
        texts = [(tokenizer.decode(p), tokenizer.decode(a).strip()) for p, a in zip(probes.prompts, probes.answers, strict=True)]
        assert all(value in text for text, value in texts)
        places.append(mean(text.index(value) / len(text) for text, value in texts))
    assert places[0] < 0.4 and places[1] > 0.6, places


def figures(needles: float = 0.0, text: float = 0.0) -> q.Figures:
    grid = [[0.0, needles] for _ in TINY.depths]
    return {"map": grid, "unseen_greedy": 0.0, "text_loss": text, "text_beyond": 0.0, "seconds": 1.0}


def known(**gains: tuple[float, float, float]) -> dict[str, list[q.Figures]]:
    """Figures of three seeds whose needles at the longest length are given for some arms."""
    return {q.BASE: [figures()], **{arm: [figures(x) for x in gains.get(arm, (0.0, 0.0, 0.0))] for arm in q.ARMS}}


def test_the_finding_says_what_the_figures_say():
    results = known(expected=(0.10, 0.11, 0.09))
    said = q.compared(results, TINY, q.EXPECTED, q.CARRIED)
    assert "+10.0 ± 2.5 points of needles at 256 tokens, more than chance" in said
    assert "+0.0 ± 0.0 points of needles at 160 tokens, no more than chance" in said
    assert all(q.compared(results, TINY, *pair) in q.finding(results, TINY) for pair in q.CONTRASTS)
    noisy = q.compared(known(expected=(-0.1, 0.11, 0.09)), TINY, q.EXPECTED, q.CARRIED)
    assert noisy.count("no more than chance") == 2
    one = q.finding({arm: seeds[:1] for arm, seeds in results.items()}, TINY)
    assert "one seed" in one and "chance" not in one


def test_differences_are_paired_and_marked_only_beyond_their_interval():
    results = known(carried=(0.1, 0.11, 0.09), expected=(0.2, -0.1, 0.4))
    for f, loss in zip(results[q.NTP], (1.0, 1.1, 0.9), strict=True):
        f["text_loss"] = loss
    d, half = q.difference(results, q.CARRIED, q.NTP, lambda f: f["text_loss"])
    assert d == pytest.approx(-1.0) and half == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3)
    cells = {row[0]: row[1:] for row in q.differences_table(results, TINY).rows}
    marked = {name: [cell.endswith("*") for cell in row] for name, row in cells.items()}
    assert marked["needles 256"] == [True, True, False, True]  # to the base, to NTP; expected's is noise; likelihood lacks it
    assert marked["text to 160"] == [False, True, False, False]


def test_the_tables_fit_into_80_columns():
    s, results = q.settings(False), {}
    for arm in (q.BASE, *q.ARMS):
        grids = [[[share] * 3 for _ in range(5)] for share in (0.0, 0.1, 0.9)]
        texts = [
            {"text_loss": 2.8 + x, "text_beyond": 2.5 - x, "seconds": 1234.0, "unseen_greedy": 0.1 + x} for x in (0.0, 0.1, 0.02)
        ]
        results[arm] = [{"map": grid, **text} for grid, text in zip(grids, texts, strict=True)][: 1 if arm == q.BASE else 3]
    for table in (q.results_table(results, s), q.differences_table(results, s)):
        console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(table.rich())
        lines = console.export_text().splitlines()
        for name, *cells in table.rows:
            line = next(line for line in lines if line.startswith(str(name)))
            assert all(str(cell) in line for cell in cells), line  # no cell is folded
        assert max(map(len, lines)) <= 80


def test_too_little_text_is_refused(tmp_path):
    (tmp_path / "short.txt").write_text("def f(): pass\n" * 50)
    with pytest.raises(ValueError, match="too little text"):
        q.quickstart(TINY, str(tmp_path / "out"), BASE, str(tmp_path / "short.txt"), "text")
