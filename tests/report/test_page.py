"""Pages in a real browser: on a phone and on a desk, in the light and in the dark."""

import json
import random
from dataclasses import asdict
from pathlib import Path

import pytest

from refine_nsp.cli import main
from refine_nsp.evaluation.run import TaskResult, rows_path, summarise
from refine_nsp.evaluation.tasks import Row
from refine_nsp.files import append_json_lines, write_atomically
from refine_nsp.report import html, plots
from refine_nsp.report.evaluation import write_evaluation
from refine_nsp.report.runs import report
from refine_nsp.tiny import quickstart
from refine_nsp.tiny.measures import write_curves
from tests.report.browser import CHROMIUM, Browser, browser

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="NO PAGE WAS LOOKED AT: no Chromium here; install one, or name one in the variable CHROMIUM"
)
LONG = "deltanet_context_lambda0.2_positions8_rollouts8_temperature1.0_learningrate3e-4_seed0_second_try"
NAMES = ("a/mid", "b/mid", LONG, "<b>bold<script>alert(1)<", "e", "f", "g", "no_evaluation", "i")
PAGES = ("nine", "drawings", "evaluation", "comparison", "inspect", "quickstart", "pretraining")
SIZES = [(width, dark) for width in (390, 768, 1440) for dark in (False, True)]

# Contrast of every piece of text with what lies behind it: backgrounds of its ancestors, and in a drawing the shape under its middle.
CONTRAST = """(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = css => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = css; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].map(x => x / 255); };
  const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3]));
  const light = c => { const [r, g, b] = c.slice(0, 3).map(x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b; };
  const behind = element => { let layers = [];
    for (let e = element; e; e = e.parentElement) layers.push(rgba(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((under, top) => over(top, under), [1, 1, 1]); };
  const bad = []; let seen = 0;
  for (const details of document.querySelectorAll('details')) details.open = true;
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; node = walk.nextNode();) {
    const element = node.parentElement;
    if (!node.data.trim() || element.closest('style,defs')) continue;
    const drawn = element.closest('svg'), style = getComputedStyle(element);
    let ground = behind(element);
    if (drawn) {
      element.scrollIntoView({block: 'center', inline: 'center'});
      const box = element.getBoundingClientRect();
      const shape = document.elementsFromPoint(box.x + box.width / 2, box.y + box.height / 2)
        .find(e => e.tagName === 'path' && getComputedStyle(e).fill !== 'none' && e.closest('[id^=QuadMesh]'));
      if (shape) ground = rgba(getComputedStyle(shape).fill);
    }
    const [a, b] = [light(over(rgba(drawn ? style.fill : style.color), ground)), light(ground)].sort((x, y) => y - x);
    seen += 1;
    if ((a + .05) / (b + .05) < 4.5) bad.push([node.data.slice(0, 40), ((a + .05) / (b + .05)).toFixed(2)]);
  }
  return {seen, bad};
})()"""
# Of lines, keys and axes: no less than 3 to 1 against the page, but for the grid (.6 wide).
LINES = """[...document.querySelectorAll('.drawing [id^=line2d] > path, .legend path')].map(e => getComputedStyle(e))
  .filter(s => s.stroke !== 'none' && parseFloat(s.strokeWidth) > .7).map(s => s.stroke)"""
OVERLAPS = """[...document.querySelectorAll('.drawing svg, .drawing > svg')].flatMap(svg => {
  const boxes = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
  return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([b, q]) =>
    p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 1 && q.top < p.bottom - 1).map(([b, q]) => [a, b])); })"""
# Words of tables, headings and notes that run into others or out of their cell.
HTML_OVERLAPS = """(() => {
  const shown = [...document.querySelectorAll('h1,h2,p,li,td,th,figcaption,summary,caption')].filter(e => !e.closest('svg') &&
    e.textContent.trim() && !e.querySelector('p,li,td,th,figcaption,summary,svg'));
  const boxes = shown.map(e => { const range = document.createRange(); range.selectNodeContents(e);
    return [e, range.getBoundingClientRect()]; });
  const pinned = e => getComputedStyle(e).position === 'sticky';
  const bad = boxes.filter(([e, p]) => e.matches('td,th') && p.right > e.getBoundingClientRect().right + 1)
    .map(([e]) => ['out of its cell', e.textContent.slice(0, 40)]);
  for (let i = 0; i < boxes.length; i++) for (let j = i + 1; j < boxes.length; j++) {
    const [a, p] = boxes[i], [b, q] = boxes[j];
    if (!pinned(a) && !pinned(b) && !a.contains(b) && !b.contains(a) && p.left < q.right - 1 && q.left < p.right - 1 &&
        p.top < q.bottom - 2 && q.top < p.bottom - 2 && a.closest('table') === b.closest('table'))
      bad.push([a.textContent.slice(0, 40), b.textContent.slice(0, 40)]);
  }
  return bad.slice(0, 5);
})()"""
OPEN = "document.querySelectorAll('details').forEach(d => d.open = true)"
CUT = """[...document.querySelectorAll('.drawing > svg')].flatMap(svg => { const s = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text')].filter(t => { const r = t.getBoundingClientRect();
    return r.left < s.left - 1 || r.right > s.right + 1 || r.top < s.top - 1 || r.bottom > s.bottom + 1; }).map(t => t.textContent); })"""


def run_folder(path: Path, i: int) -> Path:
    path.mkdir(parents=True)
    records = [
        {"step": s, "loss_ntp": 3.0 / s + 0.1 * i, "reward_cosine": 0.01 * s * i, "grad_norm": 1e-6 * i} for s in range(1, 7)
    ]
    if path.name != "no_evaluation":
        records += [{"step": s, "eval_loss": 2.5 - 0.1 * s + 0.05 * i} for s in (2, 4, 6)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (path / "config.yaml").write_text("a: " + "long_value_" * 30)
    told = {
        "step": 1,
        "position": 3,
        "prefix": "x" * 80,
        "truth": "<i>",
        "rollout": "a b " * 30,
        "reward": 0.5,
        "advantage": -0.1,
    }
    (path / "completions.jsonl").write_text(json.dumps(told) + "\n")
    return path


def evaluation(folder: Path, seed: int) -> tuple[Path, list[TaskResult]]:
    """What an evaluation leaves: needles, questions with long answers, documents, ready-made prompts."""
    rng, tasks = random.Random(seed), {}
    for task in ("niah_single_1", "niah_multikey_2", "hotpotqa", LONG):
        tasks[task] = []
        for i in range(12):
            scores = {"fraction_match": rng.random(), "any_match": float(i % 2)}
            meta = {
                "length": 2 ** (9 + i % 4),
                "depth": i % 5 / 5,
                "adapt_seconds": 1.5,
                "answer_seconds": 0.1,
                "extra_bytes": 2**24,
            }
            tasks[task].append(Row(f"{task}/{i}", "an answer that goes on " * 6, ["the reference", "<b>"], scores, meta=meta))
    figures = [{"loss": 2 + rng.random(), "accuracy": rng.random()} for _ in range(4)]
    tasks["ntp"] = [Row(f"ntp/{i}", "", [], f, 100.0, {"buckets": {"0": f, "1024": f}}) for i, f in enumerate(figures)]
    for task, rows in tasks.items():
        append_json_lines(rows_path(folder, task, None), [asdict(r) for r in rows])
    (folder / "results.json").write_text(json.dumps({"tasks": [{"name": task} for task in tasks]}))
    return folder, [summarise(task, rows) for task, rows in tasks.items()]


def pretraining(folder: Path) -> Path:
    folder.mkdir()
    probes = {
        f"eval_recall_{family}_{n}_{figure}": value
        for family in ("facts", "listing_held_out")
        for n in (256, 1024)
        for figure, value in {"greedy": 0.5, "tokens": 0.6, "log_p": -1.0}.items()
    }
    for s in (1, 2, 3):
        append_json_lines(folder / "metrics.jsonl", [{"step": s, "loss_ntp": 3 / s}, {"step": s, "eval_loss": 3.1 / s, **probes}])
    return write_curves(folder)


def quickstart_page(folder: Path) -> Path:
    rng, settings = random.Random(0), quickstart.settings(False)
    for i, arm in enumerate(("ntp", "expected")):
        run_folder(folder / f"{arm}-seed0", i)
    results = {}
    for arm in (quickstart.BASE, *quickstart.ARMS):
        grid = [[rng.random() for _ in settings.lengths] for _ in settings.depths]
        text = {"text_loss": rng.random(), "text_beyond": rng.random(), "unseen_greedy": rng.random(), "seconds": 60.0}
        results[arm] = [{"map": grid, **text} for _ in range(1 if arm == quickstart.BASE else 3)]
    return quickstart.write_report(folder, settings, results, "refine-nsp/tiny-gated-deltanet", None)


def picture(folder: Path) -> Path:
    (folder / "text.py").write_text("".join(f"def function_{i}(argument):\n    return argument + {i}\n\n" for i in range(30)))
    argv = ["inspect", "refine-nsp/tiny-delta-net", str(folder / "text.py"), "--num_generations", "2", "--max_tokens", "300"]
    assert main([*argv, "--output", str(folder / "inspect.html")]) == 0
    return folder / "inspect.html"


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """A report of nine runs, and a page with the other kinds of drawing."""
    folder = tmp_path_factory.mktemp("pages")
    runs = [run_folder(folder / name, i) for i, name in enumerate(NAMES)]
    values = [[100.0 * (i + j) / 11 for j in range(8)] for i in range(5)]
    heat = plots.heat_map(values, [f"{2**i:,},000" for i in range(8)], list("abcde"), "found, %", "tokens", "depth")
    points = {name: [(1.0, 2.0), (-0.01, 0.001), (100.0, 5.0)] for name in ("NTP only", "exact preset")}
    labels = ["recall: greedy exact match", "held-out text: loss", "log p of the answer"]
    forest = plots.forest_plot(points, labels, "difference", "percentage points above NTP")
    other = html.page("Drawings", "two kinds", [html.Section("Where", html.plots(heat, forest))])
    (a, results), (b, _) = evaluation(folder / "one", 0), evaluation(folder / LONG, 1)
    assert main(["compare", str(a), str(b), "--output", str(folder / "comparison.html")]) == 0
    return {
        "evaluation": write_evaluation(
            a, results, "tasks:\n- " + "niah_single_1 " * 30, json.dumps({"torch": "2.13.0"}, indent=1)
        ),
        "comparison": folder / "comparison.html",
        "inspect": picture(folder),
        "quickstart": quickstart_page(folder / "quickstart"),
        "pretraining": pretraining(folder / "pretraining"),
        "nine": report(runs, folder / "nine.html"),
        "drawings": write_atomically(folder / "drawings.html", other),
    }


@pytest.fixture(scope="module")
def chromium():
    with browser() as one:
        yield one


@pytest.mark.parametrize("name", PAGES)
def test_nothing_scrolls_sideways_overlaps_complains_or_is_fetched(chromium: Browser, pages: dict[str, Path], name: str):
    for width, dark in SIZES:
        chromium.open(pages[name], width, dark)
        chromium.run(OPEN)
        assert chromium.run("document.documentElement.scrollWidth") <= width
        assert chromium.run("document.documentElement.clientWidth") == width
        assert chromium.run(
            "[...document.querySelectorAll('caption > *')].every(c => c.getBoundingClientRect().right <= innerWidth)"
        )
        assert chromium.run(OVERLAPS) == [] and chromium.run(CUT) == [] and chromium.run(HTML_OVERLAPS) == []
        assert chromium.complaints() == [] and chromium.requests() == [pages[name].resolve().as_uri()]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", PAGES)
def test_text_and_lines_stand_out(chromium: Browser, pages: dict[str, Path], name: str, dark: bool):
    chromium.open(pages[name], 1440, dark)
    background = chromium.run("getComputedStyle(document.body).backgroundColor")
    assert (rgb_luminance(background) < 0.1) == dark
    found = chromium.run(CONTRAST)
    assert found["seen"] > 40 and found["bad"] == []
    lines = set(chromium.run(LINES))
    assert lines or name == "comparison"
    for colour in lines:
        assert contrast(colour, background) >= 3, colour


def test_the_legend_names_every_run_in_a_style_of_its_own(chromium: Browser, pages: dict[str, Path]):
    chromium.open(pages["nine"], 390, False)
    legends = chromium.run(
        "[...document.querySelectorAll('.plot')].map(p => [...p.querySelectorAll('.legend li')].map(li => [li.innerText.trim(), "
        "li.querySelector('path[style*=stroke]').getAttribute('style')]))"
    )
    names = [n if n.endswith("/mid") else Path(n).name for n in NAMES]
    assert [n for n, _ in legends[0]] == names and len({style for _, style in legends[0]}) == 9
    by_name = dict(legends[0])
    for legend in legends:
        assert legend and all(by_name[n] == style for n, style in legend)
    validation = chromium.run("[...document.querySelectorAll('.plot')].find(p => p.innerText.includes('validation')).innerText")
    assert "no_evaluation" not in validation and "b/mid" in validation


def test_a_message_on_the_console_is_heard(chromium: Browser, tmp_path: Path):
    """What the checks above rely on."""
    bad = tmp_path / "bad.html"
    bad.write_text("<p style='width:900px'>x</p><img src='missing.png'><script>console.error('oh')</script>")
    chromium.open(bad, 390, False)
    assert chromium.run("document.documentElement.scrollWidth") > 390
    assert chromium.complaints() and any(url.endswith("missing.png") for url in chromium.requests())


def rgb_luminance(css: str) -> float:
    values = [float(x) / 255 for x in css[css.index("(") + 1 : css.index(")")].split(",")[:3]]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in values)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a: str, b: str) -> float:
    high, low = sorted((rgb_luminance(a), rgb_luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)
