"""From the jobs' figures to docs/results.md, its plots, and the page of the run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev

from refine_nsp.environment import environment
from refine_nsp.evaluation.statistics import t_interval
from refine_nsp.files import write_atomically
from refine_nsp.report import html, plots
from refine_nsp.report.tables import Cell, Table

from .jobs import Figures, Job, Study, settings_of
from .measuring import NEEDLE_TASKS
from .settings import ABLATIONS, BASES, CONTEXT, EXTRA, MID, MID_OF_TABLE_4, NTP, PAPER, POST, SAME_TIME, TEST_TIME

PROTOCOLS = {"standard": "greedy", "published": "sampled as published"}
SHARPENED = "NTP, at ReFINE's entropy"
TEXT = {"text loss": ("text", "loss"), "accuracy": ("text", "accuracy"), "sampled accuracy": ("text", "sampled_accuracy"),
        "entropy": ("text", "entropy"), "recall greedy": ("recall", "greedy"), "recall log p": ("recall", "log_p"),
        "recall sampled": ("recall", "sampled")}  # fmt: skip


class Results:
    """Figures by seed, read from the jobs."""

    def __init__(self, study: Study, family: str) -> None:
        self.study, self.family = study, family

    def base(self) -> Figures:
        return self.study.result(Job("base", (self.family,)))

    def seeds(self, kind: str, start: str | None = None, *after: str) -> list[Figures]:
        """One of each seed. start, after: a job's arguments before and after its seed."""
        first = () if start is None else (start,)
        return [self.study.result(Job(kind, (self.family, *first, s, *after))) for s in range(self.study.scale.seeds)]


def spread(values: Sequence[float], percent: bool = False) -> str:
    """mean +- standard deviation over seeds."""
    k, digits = (100, 1) if percent else (1, 4)
    text = f"{k * mean(values):.{digits}f}"
    return f"{text} ± {k * stdev(values):.{digits}f}" if len(values) > 1 else text


def difference(values: Sequence[float], against: Sequence[float], percent: bool = False) -> str:
    """Mean difference paired by seed, half its 95 % t-interval, * where the difference exceeds it."""
    k, digits = (100, 1) if percent else (1, 4)
    d, half = t_interval([a - b for a, b in zip(values, against, strict=True)])
    return f"{k * d:+.{digits}f} ± {k * half:.{digits}f}" + (" *" if abs(d) > half else "")


# --- tables -----------------------------------------------------------------------------------------------------------


def qa_mean(figures: Figures, key: str, protocol: str) -> float:
    return mean(figures["qa"][key][protocol])


def table_4(results: Results, protocol: str) -> Table:
    """Multi-document questions: base, mid-training, post-training; all questions."""
    first = results.base()
    keys = list(first["qa"])
    rows: list[list[Cell]] = [["none", "none", *(spread([qa_mean(first, k, protocol)], True) for k in keys)]]
    rows[0].append(spread([mean(qa_mean(first, k, protocol) for k in keys)], True))

    def add(start: str, variant: str, figures: list[Figures]) -> None:
        cells = [spread([qa_mean(f, k, protocol) for f in figures], True) for k in keys]
        overall = spread([mean(qa_mean(f, k, protocol) for k in keys) for f in figures], True)
        rows.append([start, variant, *cells, overall])

    for title, arm in MID_OF_TABLE_4.items():
        add(title, "none", results.seeds("mid", arm))
        for variant in POST:
            add(title, variant, results.seeds("post", arm, variant))
    notes = []
    if protocol == "published":
        controls = results.seeds("sharpen_answers")
        add("NTP", f"SFT, temperature {mean(c['temperature'] for c in controls):.2f}", controls)
        notes = ["last row: the control, at the temperature that gives its answers the entropy of ReFINE + Nested ReFINE"]
    title = f"{results.family}: questions on documents, % right, {PROTOCOLS[protocol]}"
    return Table(title, ["mid-training", "post-training", *keys, "mean"], rows, notes)


def questions_against_ntp(results: Results) -> Table:
    """What ReFINE changes at each stage, paired by seed."""

    def row(title: str, ours: list[Figures], theirs: list[Figures]) -> list[Cell]:
        cells: list[Cell] = [title]
        for figure in ("standard", "published", "log_p"):
            a, b = ([mean(qa_mean(f, k, figure) for k in f["qa"]) for f in figures] for figures in (ours, theirs))
            cells.append(difference(a, b, figure != "log_p"))
        return cells

    def of(arm: str, variant: str) -> list[Figures]:
        return results.seeds("mid", arm) if variant == "none" else results.seeds("post", arm, variant)

    rows = [row(f"ReFINE - NTP mid-training, then {v}", of(CONTEXT, v), of(NTP, v)) for v in ("none", *POST)]
    for title, arm in MID_OF_TABLE_4.items():
        rows += [row(f"{v} - SFT, after {title}", of(arm, v), of(arm, "SFT")) for v in list(POST)[1:]]
    rows.append(
        row(
            "ReFINE + Nested ReFINE - NTP + SFT at the same entropy",
            of(CONTEXT, "Nested ReFINE"),
            results.seeds("sharpen_answers"),
        )
    )
    notes = ["percentage points (log p: nats), mean over the question sets; ± half a 95 % t-interval over seeds; * beyond it"]
    return Table(
        f"{results.family}: differences on questions", ["", "greedy", "sampled as published", "log p of the answer"], rows, notes
    )


def test_time_table(results: Results, figure: str) -> Table:
    """Test-time training on the first questions of each source; "none" on the same questions."""
    n, length = results.study.scale.test_time_prompts, results.study.scale.qa_lengths[0]

    def plain(figures: Figures) -> list[float]:
        return [x for k in figures["qa"] if k.endswith(f" {length}") for x in figures["qa"][k][figure][:n]]

    rows: list[list[Cell]] = []
    for title, arm in MID_OF_TABLE_4.items():
        for v in ("none", *POST):
            before = results.seeds("mid", arm) if v == "none" else results.seeds("post", arm, v)
            none = [mean(plain(f)) for f in before]
            percent = figure != "log_p"
            cells: list[Cell] = [title, v, spread(none, percent)]
            for method in TEST_TIME:
                after = [mean(f[figure]) for f in results.seeds("ttt", arm, v, method)]
                cells += [spread(after, percent), difference(after, none, percent)]
            rows.append(cells)
    rates = {m: results.study.result(Job("rate", (results.family, m)))["chosen"] for m in TEST_TIME}
    notes = [
        f"the first {n} questions of each source at {length} tokens, one step on each prompt, restored after it; learning rates "
        f"{rates['ntp']:g} (NTP) and {rates['refine']:g} (ReFINE) were chosen on other questions"
    ]
    title = (
        f"{results.family}: test-time training, {'log p of the answer' if figure == 'log_p' else '% right, ' + PROTOCOLS[figure]}"
    )
    return Table(title, ["mid-training", "post-training", "none", "NTP", "NTP - none", "ReFINE", "ReFINE - none"], rows, notes)


def table_3(results: Results, protocol: str) -> Table:
    """Needles by task, mean over lengths."""

    def cells(figures: list[Figures]) -> list[Cell]:
        def share(f: Figures, task: str) -> float:
            return mean(x for k, x in f["needles"][protocol].items() if k.startswith(f"{task} "))

        return [spread([share(f, t) for f in figures], True) for t in NEEDLE_TASKS]

    rows: list[list[Cell]] = [["base", *cells([results.base()])]]
    rows += [[arm, *cells(results.seeds("mid", arm))] for arm in (*MID, SAME_TIME)]
    if protocol == "published":
        rows.append([SHARPENED, *cells(results.seeds("sharpen_text"))])
    scale = results.study.scale
    lengths = ", ".join(map(str, scale.needle_lengths))
    notes = [
        f"mean over prompts of {lengths} tokens; S: one fact; MK: one of {scale.needles}; MQ: four asked; MV: four of one name"
    ]
    return Table(f"{results.family}: needles, % found, {PROTOCOLS[protocol]}", ["", *NEEDLE_TASKS], rows, notes)


def column(figures: list[Figures], path: tuple[str, str]) -> list[float]:
    return [f[path[0]][path[1]] for f in figures]


def mid_table(results: Results) -> Table:
    """Text and recall of every mid-training arm and control."""
    rows: list[list[Cell]] = [["base", *(spread(column([results.base()], p)) for p in TEXT.values()), "", ""]]
    for arm in (*MID, SAME_TIME):
        figures = results.seeds("mid", arm)
        cost = [f"{mean(f['steps'] for f in figures):.0f}", f"{mean(f['seconds'] for f in figures):.0f}"]
        rows.append([arm, *(spread(column(figures, p)) for p in TEXT.values()), *cost])
    controls = results.seeds("sharpen_text")
    name = f"{SHARPENED}, temperature {mean(c['temperature'] for c in controls):.3f}"
    rows.append([name, *(spread(column(controls, p)) for p in TEXT.values()), "", ""])
    return Table(f"{results.family}: mid-training arms and controls", ["", *TEXT, "steps", "seconds"], rows)


def mid_differences(results: Results) -> Table:
    against = results.seeds("mid", NTP)
    arms = {arm: results.seeds("mid", arm) for arm in (*MID, SAME_TIME) if arm != NTP}
    rows: list[list[Cell]] = [
        [arm, *(difference(column(f, p), column(against, p)) for p in TEXT.values())] for arm, f in arms.items()
    ]
    controls = results.seeds("sharpen_text")
    cells = [difference(column(arms[CONTEXT], p), column(controls, p)) for p in TEXT.values()]
    rows.append([f"{CONTEXT}, against {SHARPENED}", *cells])
    notes = ["paired by seed; ± half a 95 % t-interval; * beyond it. About one in twenty is beyond it by chance."]
    return Table(f"{results.family}: differences to NTP", ["", *TEXT], rows, notes)


def ablation_table(results: Results) -> Table:
    """One setting of the recommended preset changed at a time."""
    ours = {CONTEXT: results.seeds("mid", CONTEXT)}
    ours |= {arm: results.seeds("mid", arm) for arm in (*ABLATIONS, "ReFINE, uniform", "ReFINE, entropy", "ReFINE, context_gain")}
    rows: list[list[Cell]] = []
    for arm, figures in ours.items():
        name = f"{arm} (K 5, P 8, hybrid)" if arm == CONTEXT else arm.replace("ReFINE, ", "selection ")
        cells: list[Cell] = [spread(column(figures, p)) for p in TEXT.values()]
        change = (
            "" if arm == CONTEXT else difference(column(figures, ("recall", "log_p")), column(ours[CONTEXT], ("recall", "log_p")))
        )
        rows.append([name, *cells, change])
    return Table(f"{results.family}: ablations of the recommended preset", ["", *TEXT, "recall log p, against the preset"], rows)


# --- plots ------------------------------------------------------------------------------------------------------------


def curve_plots(results: Results) -> dict[str, str]:
    """Figure 4: accuracy over steps, of the argmax and of a sampled token, mean over seeds."""
    drawn = {}
    for figure in ("accuracy", "sampled_accuracy"):
        curves: dict[str, plots.Curve] = {}
        for arm in (NTP, PAPER, CONTEXT, EXTRA):
            seeds = results.seeds("mid", arm)
            steps = [p["step"] for p in seeds[0]["curve"]]
            curves[arm] = (steps, [mean(s["curve"][i][figure] for s in seeds) for i in range(len(steps))])
        title = f"{results.family}: {'argmax' if figure == 'accuracy' else 'sampled'} accuracy on held-out text"
        drawn[figure] = plots.line_plot(curves, title, "step", "share of tokens")
    return drawn


def arms_plot(results: Results, arms: Sequence[str], title: str) -> str:
    """Differences to NTP in recall, with their intervals."""
    against = results.seeds("mid", NTP)
    keys: dict[str, Callable[[Figures], float]] = {
        "greedy exact match": lambda f: f["recall"]["greedy"],
        "log p of the answer (nats)": lambda f: f["recall"]["log_p"],
        "sampled exact match": lambda f: f["recall"]["sampled"],
    }
    groups = {
        arm: [
            t_interval([key(a) - key(b) for a, b in zip(results.seeds("mid", arm), against, strict=True)])
            for key in keys.values()
        ]
        for arm in arms
    }
    return plots.forest_plot(groups, list(keys), title, "difference to NTP, paired by seed, with 95 % t-intervals")


def drawings(results: Results, ablated: bool) -> dict[str, str]:
    """SVG by name."""
    arms = [a for a in (*MID, SAME_TIME) if a != NTP]
    drawn = {f"curve_{k}": v for k, v in curve_plots(results).items()}
    drawn["arms"] = arms_plot(results, arms, f"{results.family}: recall after mid-training")
    if ablated:
        drawn["ablations"] = arms_plot(results, [CONTEXT, *ABLATIONS], f"{results.family}: ablations of the preset")
    return drawn


# --- the document -----------------------------------------------------------------------------------------------------


def tables_of(results: Results, ablated: bool) -> dict[str, list[Table]]:
    """By section."""
    sections = {
        "Questions on documents (in the form of the paper's Table 4)": [
            *(table_4(results, p) for p in PROTOCOLS), questions_against_ntp(results),
        ],
        "Test-time training": [test_time_table(results, f) for f in ("standard", "published", "log_p")],
        "Needles (in the form of Table 3)": [table_3(results, p) for p in PROTOCOLS],
        "Mid-training arms and controls (Figure 4 and Table 7)": [mid_table(results), mid_differences(results)],
    }  # fmt: skip
    if ablated:
        sections["Ablations (in the form of Figure 5 and Table 6)"] = [ablation_table(results)]
    return sections


def write_results(study: Study, families: Sequence[str], ablated: Sequence[str], document: Path) -> Path:
    """The document with its plots beside it, and the run's page; returns the page's path."""
    lines, sections = [introduction(study)], []
    for family in families:
        results, with_ablations = Results(study, family), family in ablated
        drawn = drawings(results, with_ablations)
        lines.append(f"\n## {family} ({BASES[family]})\n")
        for title, tables in tables_of(results, with_ablations).items():
            lines.append(f"\n### {title}\n")
            lines += [t.markdown() for t in tables]
            sections.append(html.Section(f"{family}: {title}", "".join(t.html() for t in tables)))
        for name, svg in drawn.items():
            path = write_atomically(document.parent / document.stem / f"{family.lower()}_{name}.svg", svg)
            lines.append(f"![{family}: {name.replace('_', ' ')}]({document.stem}/{path.name})")
        sections.append(html.Section(f"{family}: plots", html.plots(*drawn.values())))
    write_atomically(document, "\n".join(lines) + "\n")
    return write_atomically(study.folder("report.html"), html.page("The paper's tables at small scale", "", sections))


def introduction(study: Study) -> str:
    """What the tables are, and how they were made."""
    s, facts = study.scale, environment()
    made = {k: facts[k] for k in ("python", "torch", "transformers", "machine", "cpus")}
    files = " ".join(f"--{k} {v}" for k, v in settings_of(study).items() if k != "scale" and v is not None)
    return f"""# Results at small scale

Written by `python benchmarks/paper_tables.py --scale small {files}` ({json.dumps(made)}; {s.seeds} seeds).

A base of about a million parameters is mid-trained for {s.mid_steps} steps of {s.mid_rows} x {s.mid_length} tokens (text of the standard
library; recall documents in {s.recall_share:.0%} of the rows), post-trained for {s.post_steps} steps of {s.post_prompts} prompts of
{s.post_length} tokens, and adapted at test time by one step a prompt. Questions: documents of 64 tokens, each a paragraph with
three generated facts `name = value value;`; one value is asked for by name; {s.qa_prompts} questions a column. All arms of a
seed see the same rows in the same order. "greedy": argmax, 8 tokens; "sampled as published": temperature 1 among the 50
likeliest tokens, 32 tokens, first line only. Figures are means ± standard deviations over seeds of training; differences are
paired by seed. ReFINE stands for the `context` preset (context_kl, N 8, leave-one-out with one global scale, hybrid reward,
lambda_rl 1) unless a row names another. Learning rates of mid- and post-training were fixed beforehand ({s.mid_learning_rate:g} and
{s.post_learning_rate:g}); those of test time and the temperatures of the controls were chosen on questions and text that
are not reported on.

What this cannot show: whether anything of it holds for models a thousand times larger, for real questions that need more than
the recall of a fact, or for contexts longer than {max(s.qa_lengths)} tokens. Intervals over {s.seeds} seeds are wide, and do not cover
the choice of probes: those are the same for all seeds. Sampled answers have draws of their own for each seed, shared by its arms.
"""
