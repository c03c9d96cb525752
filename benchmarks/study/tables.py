"""Make docs/results.md, its plots and the page of the run from the jobs' figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev

from scipy import stats

from refine_nsp.environment import environment
from refine_nsp.evaluation.statistics import t_interval
from refine_nsp.files import write_atomically
from refine_nsp.report import html, plots
from refine_nsp.report.tables import Cell, Table

from . import twice
from .jobs import Figures, Job, Study, chosen, settings_of
from .schedule import arms_of, seeds_of, unfinished
from .settings import ARMS, CE, EXPECTED, MAIN, NTP, POST, POST_AFTER, SAME_TIME, SHARPENED, STARTS, TEST_TIME

PROTOCOLS = {"standard": "greedy", "published": "sampled as published"}
OF_ANSWERS = PROTOCOLS | {"log_p": "log p of the answer"}
NEEDLES_FROM = 1024  # tokens, of the primary outcome
MEAN = "mean of the bases"
HALF = "± half a 95 % t-interval over seeds; * beyond it"


# --- figures ----------------------------------------------------------------------------------------------------------


def needles(figures: Figures) -> float:
    """Compute the primary outcome: the mean over RULER's needle tasks of the mean over lengths from `NEEDLES_FROM` on."""
    tasks = [lengths for name, lengths in figures["ruler"].items() if name.startswith("niah")]
    return mean(mean(x for length, x in lengths.items() if int(length) >= NEEDLES_FROM) for lengths in tasks)


def questions(figures: Figures) -> float:
    """Compute the mean of RULER's questions on documents over tasks and lengths; nan where there were none."""
    found = [x for name, lengths in figures["ruler"].items() if name.startswith("qa") for x in lengths.values()]
    return mean(found) if found else float("nan")


def recall(key: str, held_out: bool, source: str = "probes") -> Callable[[Figures], float]:
    """Compute recall of probes in held-out wordings, or in wordings that are trained on."""
    return lambda f: mean(p[key] for name, p in f[source].items() if ("held_out" in name) == held_out)


def text(key: str, windows: str, source: str = "text") -> Callable[[Figures], float]:
    return lambda f: f[source][windows][key] if windows in f[source] else float("nan")


@dataclass(frozen=True)
class Column:
    """Hold a figure by its name, and whether it is shown in percent."""

    name: str
    of: Callable[[Figures], float]
    percent: bool = True


OUTCOMES = [
    Column("RULER needles", needles),
    Column("RULER questions", questions),
    Column("probes, greedy", recall("greedy", False)),
    Column("held-out wordings, greedy", recall("greedy", True)),
    Column("sampled", recall("sampled", True)),
    Column("log p", recall("log_p", True), False),
    Column("log p, best T", recall("log_p", True, "probes_best"), False),
]
TEXT_OUTCOMES = [
    Column("text loss", text("loss", "report"), False),
    Column("at best T", text("loss", "report", "text_best"), False),
    Column("accuracy", text("accuracy", "report")),
    Column("entropy", text("entropy", "report"), False),
    Column("novels: loss", text("loss", "novels"), False),
    Column("accuracy", text("accuracy", "novels")),
    Column("far tokens of text: loss", text("loss", "report", "far"), False),
    Column("at best T", text("loss", "report", "far_best"), False),
    Column("accuracy", text("accuracy", "report", "far")),
    Column("far tokens of novels: loss", text("loss", "novels", "far"), False),
    Column("at best T", text("loss", "novels", "far_best"), False),
    Column("accuracy", text("accuracy", "novels", "far")),
]


class Results:
    """Read figures by seed from the jobs."""

    def __init__(self, study: Study, family: str) -> None:
        self.study, self.family = study, family

    def base(self, seeds: Iterable[int] | None = None) -> list[Figures]:
        """Read the untouched base's figures on each seed's prompts."""
        wanted = range(self.study.scale.seeds) if seeds is None else seeds
        return [self.study.result(Job("base", (self.family, s))) for s in wanted]

    def mid(self, arm: str, seeds: Iterable[int] | None = None) -> list[Figures]:
        return [self._of("mid", arm, s) for s in (seeds_of(self.study, arm) if seeds is None else seeds)]

    def sharpened(self, arm: str) -> list[Figures]:
        return [self._of("sharpen", arm, s) for s in range(self.study.scale.seeds)]

    def _of(self, kind: str, arm: str, seed: int) -> Figures:
        return self.study.result(Job(kind, (self.family, arm, seed)))

    def arms(self) -> list[str]:
        """List the arms of which every seed has been trained."""
        planned = arms_of(self.family) + [SAME_TIME] * (self.family == MAIN)
        return [a for a in planned if all(self.study.done("mid", self.family, a, s) for s in seeds_of(self.study, a))]

    def differences(self, column: Column, arm: str, against: str) -> list[float]:
        """Compute differences, paired by seed, over the seeds that both arms have."""
        seeds = min(seeds_of(self.study, arm), seeds_of(self.study, against), key=len)
        pairs = zip(self.mid(arm, seeds), self.mid(against, seeds), strict=True)
        return [column.of(a) - column.of(b) for a, b in pairs]


def spread(values: Sequence[float], percent: bool = False) -> str:
    """Write the mean ± standard deviation over seeds."""
    if values[0] != values[0]:
        return ""
    k, digits = (100, 1) if percent else (1, 3)
    shown = f"{k * mean(values):.{digits}f}"
    return f"{shown} ± {k * stdev(values):.{digits}f}" if len(values) > 1 else shown


def difference(values: Sequence[float], percent: bool = False) -> str:
    """Write the mean of paired differences, half its 95 % t-interval, and * where the mean exceeds that."""
    if values[0] != values[0]:
        return ""
    k, digits = (100, 1) if percent else (1, 3)
    d, half = t_interval(values)
    return f"{k * d:+.{digits}f} ± {k * half:.{digits}f}" + (" *" if abs(d) > half else "")


Row = list[tuple[float, float]]  # of a plot: means with half-widths, a panel each


def in_points(values: Sequence[float]) -> tuple[float, float]:
    """Write a mean and half a t-interval as percentages."""
    d, half = t_interval(values)
    return 100 * d, 100 * half


def paired(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


# --- the test ---------------------------------------------------------------------------------------------------------


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjust p-values for testing all of them (Holm, 1979)."""
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda n: p_values[n])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return adjusted


def contrasts(everything: Sequence[Results]) -> dict[str, dict[str, list[float]]]:
    """Compute the differences of the test by seed, for each contrast, of `MEAN` and of each base."""
    found = {}
    for other in (NTP, CE):
        of_bases = {r.family: r.differences(OUTCOMES[0], EXPECTED, other) for r in everything}
        found[f"expected - {other}"] = {MEAN: [mean(seed) for seed in zip(*of_bases.values(), strict=True)], **of_bases}
    return found


def primary(everything: Sequence[Results]) -> tuple[Table, str]:
    """Tabulate the test that was decided beforehand, and say its outcome in a sentence."""
    found = contrasts(everything)
    overall = {name: by_base[MEAN] for name, by_base in found.items()}
    p_values = {name: float(stats.ttest_1samp(d, 0.0).pvalue) for name, d in overall.items()}
    adjusted = holm(p_values)
    rows: list[list[Cell]] = []
    for name, by_base in found.items():
        shown = [difference(d, True) for d in by_base.values()]
        rows.append([name, *shown, f"{p_values[name]:.4f}", f"{adjusted[name]:.4f}"])
    both = {name: paired(*(by_base[name] for by_base in found.values())) for name in found[f"expected - {NTP}"]}
    rows.append([f"{CE} - {NTP} (described, not tested)", *(difference(d, True) for d in both.values()), "", ""])
    columns = ["", MEAN, *(r.family for r in everything), "p", "p, Holm"]
    notes = [
        f"percentage points of RULER's needles, greedy, {NEEDLES_FROM} tokens and more; {HALF}; p of the mean: paired t-test over seeds"
    ]
    return Table("The test decided beforehand", columns, rows, notes), sentence(overall, adjusted)


def drawing(everything: Sequence[Results]) -> plots.Plot:
    """Draw the test."""
    found = contrasts(everything)
    rows: dict[str, Row] = {name: [in_points(by_base[name]) for by_base in found.values()] for name in next(iter(found.values()))}
    label = "percentage points, paired by seed, with 95 % t-intervals"
    return plots.forest_plot(rows, list(found), "Greedy recall of RULER's needles", label)


def sentence(overall: Mapping[str, Sequence[float]], adjusted: Mapping[str, float]) -> str:
    """Say the outcome of the test in a sentence."""
    parts = []
    for name, values in overall.items():
        d, half = t_interval(values)
        verdict = "significant" if adjusted[name] < 0.05 else "not significant"
        parts.append(f"{name}: {100 * d:+.1f} ± {100 * half:.1f} points (p = {adjusted[name]:.3f} after Holm, {verdict} at 5 %)")
    return "Greedy recall of RULER's needles at 1,024 tokens and more, " + "; ".join(parts) + "."


# --- mid-training -----------------------------------------------------------------------------------------------------


def arms_table(results: Results, columns: Sequence[Column], title: str, with_steps: bool) -> Table:
    """Tabulate the base and the arms with means and standard deviations."""
    rows: list[list[Cell]] = []
    for name, figures in {"base": results.base(), **{arm: results.mid(arm) for arm in results.arms()}}.items():
        cells: list[Cell] = [spread([c.of(f) for f in figures], c.percent) for c in columns]
        if with_steps:
            cells.append(f"{mean(f['steps'] for f in figures):.0f}" if "steps" in figures[0] else "")
        rows.append([name, *cells, len(figures)])
    names = [c.name for c in columns] + ["steps"] * with_steps
    return Table(f"{results.family}: {title}", ["", *names, "seeds"], rows)


def differences_table(results: Results, columns: Sequence[Column], title: str) -> Table:
    """Tabulate the arms against NTP, and the closed form against its control."""
    pairs = [(arm, NTP) for arm in results.arms() if arm != NTP] + [(EXPECTED, CE)]
    rows: list[list[Cell]] = [
        [f"{arm} - {other}", *(difference(results.differences(c, arm, other), c.percent) for c in columns)]
        for arm, other in pairs
    ]
    notes = [f"paired by seed; {HALF}. About one in twenty is beyond it by chance"]
    return Table(f"{results.family}: {title}", ["", *(c.name for c in columns)], rows, notes)


def sharpened_table(results: Results) -> Table:
    """Tabulate the closed form against controls that are as sharp."""
    columns = [c for c in OUTCOMES if c.name in ("sampled", "log p")] + TEXT_OUTCOMES[:1]
    expected = results.mid(EXPECTED)
    rows: list[list[Cell]] = []
    for arm in SHARPENED:
        figures = results.sharpened(arm)
        cells = [difference(paired([c.of(f) for f in expected], [c.of(f) for f in figures]), c.percent) for c in columns]
        rows.append([f"expected - {arm} at temperature {mean(f['temperature'] for f in figures):.3f}", *cells])
    notes = [f"the temperature gives the control's text the entropy of `expected`; {HALF}"]
    return Table(f"{results.family}: at equal entropy", ["", *(c.name for c in columns)], rows, notes)


def lengths_table(results: Results) -> Table:
    """Tabulate RULER by task and length for the base, NTP, the control and the closed form."""
    arms = {"base": results.base(), **{arm: results.mid(arm) for arm in (NTP, CE, EXPECTED)}}
    first = arms["base"][0]["ruler"]
    rows: list[list[Cell]] = [
        [task, length, *(spread([f["ruler"][task][length] for f in figures], True) for figures in arms.values())]
        for task, lengths in first.items()
        for length in sorted(lengths, key=int)
    ]
    return Table(f"{results.family}: RULER, % right, greedy", ["task", "tokens", *arms], rows)


def settings_table(study: Study) -> Table:
    """Tabulate the settings that were chosen for every arm, and the number of trials."""
    rows: list[list[Cell]] = []
    for arm, spec in ARMS.items():
        if not all(study.done("trial", arm, i) for i in range(len(spec.trials))):
            continue
        tried = ", ".join(f"{k} {' '.join(f'{v:g}' for v in values)}" for k, values in spec.grid.items())
        rows.append([arm, ", ".join(f"{k} {v:g}" for k, v in chosen(study, arm).items()), tried, len(spec.trials)])
    return Table("Settings, chosen on a set that is not reported on", ["", "chosen", "tried", "trials"], rows)


# --- post-training and test time --------------------------------------------------------------------------------------


def qa_mean(figures: Figures, key: str, protocol: str) -> float:
    return mean(figures["qa"][key][protocol])


class PostResults:
    """Read the figures of post-training and of the models it starts from, by seed."""

    def __init__(self, study: Study) -> None:
        self.study, self.seeds = study, range(study.scale.post_seeds)

    def base(self) -> Figures:
        return self.study.result(Job("base", (MAIN, 0)))

    def of(self, start: str, variant: str) -> list[Figures]:
        if variant == "none":
            return [self.study.result(Job("mid", (MAIN, start, s))) for s in self.seeds]
        return [self.study.result(Job("post", (start, s, variant))) for s in self.seeds]

    def adapted(self, start: str, variant: str, method: str) -> list[Figures]:
        return [self.study.result(Job("ttt", (start, s, variant, method))) for s in self.seeds]

    def sharpened(self) -> list[Figures]:
        return [self.study.result(Job("sharpen_answers", (s,))) for s in self.seeds]


def table_4(results: PostResults, protocol: str) -> Table:
    """Tabulate multi-document questions after mid-training and post-training, over all questions."""
    first = results.base()
    keys = list(first["qa"])

    def row(start: str, variant: str, figures: list[Figures]) -> list[Cell]:
        cells = [spread([qa_mean(f, k, protocol) for f in figures], True) for k in keys]
        return [start, variant, *cells, spread([mean(qa_mean(f, k, protocol) for k in keys) for f in figures], True)]

    rows = [row("none", "none", [first])]
    for start, variants in POST_AFTER.items():
        rows.append(row(start, "none", results.of(start, "none")))
        for variant in variants:
            rows.append(row(start, variant, results.of(start, variant)))
    notes = [
        "questions about facts that were written into paragraphs of each source, laid out as RULER's",
        f"{CE}: added once the other rows had been seen",
    ]
    if protocol == "published":
        controls = results.sharpened()
        rows.append(row(NTP, f"SFT, temperature {mean(c['temperature'] for c in controls):.2f}", controls))
        notes.append(
            "last row: the control, at the temperature that gives its answers the entropy of `expected` + Nested expected"
        )
    title = f"{MAIN}: questions on documents, % right, {PROTOCOLS[protocol]}"
    return Table(title, ["mid-training", "post-training", *keys, "mean"], rows, notes)


def post_cost_table(study: Study) -> Table:
    """Tabulate the time that the inner update takes."""
    cost = study.result(Job("post_cost", ()))
    sft = cost["seconds"]["SFT"]
    rows: list[list[Cell]] = []
    for variant, seconds in cost["seconds"].items():
        ratios = [x / y for x, y in zip(seconds, sft, strict=True)]
        times = "" if variant == "SFT" else f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        rows.append([variant, f"{median(seconds):.2f}", times])
    notes = [f"{cost['steps']} steps of each by turns in a process of one thread, {len(sft)} turns: medians (least to greatest)"]
    return Table(f"{MAIN}: what a step of post-training takes", ["", "processor seconds", "times SFT"], rows, notes)


def question_contrasts(results: PostResults) -> dict[str, dict[str, list[float]]]:
    """Compute what the closed form and nesting change, by contrast and figure, over seeds."""

    def means(figures: list[Figures], key: str) -> list[float]:
        return [mean(qa_mean(f, k, key) for k in f["qa"]) for f in figures]

    def contrast(ours: list[Figures], theirs: list[Figures]) -> dict[str, list[float]]:
        return {key: paired(means(ours, key), means(theirs, key)) for key in OF_ANSWERS}

    found = {
        f"{ours} - {theirs}, then {v}": contrast(results.of(ours, v), results.of(theirs, v))
        for ours, theirs in ((EXPECTED, NTP), (EXPECTED, CE), (CE, NTP))
        for v in ("none", *POST)
        if v == "none" or (v in POST_AFTER[ours] and v in POST_AFTER[theirs])
    }
    for start in STARTS:
        sft = results.of(start, "SFT")
        found |= {f"{v} - SFT, after {start}": contrast(results.of(start, v), sft) for v in POST if v != "SFT"}
    same_entropy = contrast(results.of(EXPECTED, "Nested expected"), results.sharpened())
    return found | {f"{EXPECTED}, Nested `expected` - NTP, SFT as sharp": same_entropy}


def questions_differences(results: PostResults) -> Table:
    rows: list[list[Cell]] = [
        [name, *(difference(values, key != "log_p") for key, values in by_figure.items())]
        for name, by_figure in question_contrasts(results).items()
    ]
    notes = [f"percentage points (log p: nats), mean over the question sets; {HALF}"]
    return Table(f"{MAIN}: differences on questions", ["", *OF_ANSWERS.values()], rows, notes)


def test_time_figures(results: PostResults, figure: str) -> dict[tuple[str, str], dict[str, list[float]]]:
    """Collect figures over seeds without an update ("none") and after one by each method, on the same questions."""
    n, length = results.study.scale.test_time_prompts, results.study.scale.qa_lengths[0]

    def plain(figures: Figures) -> float:
        return mean(x for k in figures["qa"] if k.endswith(f" {length}") for x in figures["qa"][k][figure][:n])

    return {
        (start, v): {"none": [plain(f) for f in results.of(start, v)]}
        | {method: [mean(f[figure]) for f in results.adapted(start, v, method)] for method in TEST_TIME}
        for start in STARTS
        for v in ("none", *POST)
    }


def test_time_table(results: PostResults, figure: str) -> Table:
    """Tabulate test-time training on the first questions of each source."""
    percent = figure != "log_p"
    rows: list[list[Cell]] = []
    for names, found in test_time_figures(results, figure).items():
        cells: list[Cell] = [*names, spread(found["none"], percent)]
        for method in TEST_TIME:
            cells += [spread(found[method], percent), difference(paired(found[method], found["none"]), percent)]
        rows.append(cells)
    rates = {m: results.study.result(Job("rate", (m,)))["chosen"] for m in TEST_TIME}
    seconds = {m: mean(x for f in results.adapted(NTP, "SFT", m) for x in f["seconds"]) for m in TEST_TIME}
    chosen_rates = ", ".join(f"{m} {rates[m]:g} ({seconds[m]:.2f} s a prompt)" for m in TEST_TIME)
    scale = results.study.scale
    tried = ", ".join(f"{rate:g}" for rate in scale.test_time_learning_rates)
    notes = [
        f"the first {scale.test_time_prompts} questions of each source at {scale.qa_lengths[0]} tokens, one step on each prompt, "
        f"restored after it; learning rates, chosen among {tried} on other questions: {chosen_rates}; {HALF}"
    ]
    what = "% right, " + PROTOCOLS[figure] if percent else OF_ANSWERS[figure]
    columns = [cell for m in TEST_TIME for cell in (m, f"{m} - none")]
    return Table(f"{MAIN}: test-time training, {what}", ["mid-training", "post-training", "none", *columns], rows, notes)


# --- plots ------------------------------------------------------------------------------------------------------------


def arms_drawing(results: Results) -> plots.Plot:
    wanted = [OUTCOMES[0], OUTCOMES[2], OUTCOMES[3]]
    rows: dict[str, Row] = {
        arm: [in_points(results.differences(c, arm, NTP)) for c in wanted] for arm in results.arms() if arm != NTP
    }
    title = f"{results.family}: greedy recall after mid-training"
    label = "percentage points above NTP, paired by seed, with 95 % t-intervals"
    return plots.forest_plot(rows, [c.name for c in wanted], title, label)


def questions_drawing(results: PostResults) -> plots.Plot:
    rows: dict[str, Row] = {
        name: [t_interval(values) if key == "log_p" else in_points(values) for key, values in by_figure.items()]
        for name, by_figure in question_contrasts(results).items()
    }
    label = "percentage points (log p: nats), paired by seed, with 95 % t-intervals"
    return plots.forest_plot(rows, list(OF_ANSWERS.values()), f"{MAIN}: differences on questions", label)


def test_time_drawing(results: PostResults) -> plots.Plot:
    rows: dict[str, Row] = {
        f"{start}, then {v}": [t_interval(paired(found[method], found["none"])) for method in TEST_TIME]
        for (start, v), found in test_time_figures(results, "log_p").items()
    }
    label = "log p of the answer, nats above no update, paired by seed, with 95 % t-intervals"
    return plots.forest_plot(rows, list(TEST_TIME), f"{MAIN}: what one step on the prompt changes", label)


def heat_maps(results: Results) -> dict[str, plots.Plot]:
    """Draw RULER's needles by task and length, before and after."""
    drawn = {}
    arms = {"base": results.base(), "NTP": results.mid(NTP), "CE": results.mid(CE), "expected": results.mid(EXPECTED)}
    for name, figures in arms.items():
        tasks = [t for t in figures[0]["ruler"] if t.startswith("niah")]
        lengths = sorted(figures[0]["ruler"][tasks[0]], key=int)
        grid = [[100 * mean(f["ruler"][t][n] for f in figures) for n in lengths] for t in tasks]
        labels, title = [t.removeprefix("niah_") for t in tasks], f"{results.family}, {name}: needles found, %"
        drawn[f"needles_{name.lower()}"] = plots.heat_map(grid, lengths, labels, title, "tokens", "task")
    return drawn


# --- the document -----------------------------------------------------------------------------------------------------


AFTER_POST, AFTER_TEST_TIME = {"post", "post_cost", "sharpen_answers"}, {"post", "rate", "ttt"}  # jobs of the last two sections


def has_sharpened(study: Study, family: str) -> bool:
    """Tell whether the controls have been measured at the entropy of `expected`, with every seed."""
    return not any(job.kind == "sharpen" and job.arguments[0] == family for job in unfinished(study))


@dataclass(frozen=True)
class Section:
    """Hold a section of the document, with its drawings by the name of their file."""

    title: str
    tables: list[Table]
    drawings: dict[str, plots.Plot]


def sections_of(study: Study, everything: Sequence[Results]) -> list[Section]:
    """List the sections that are complete, in the order of the document."""
    kinds = {job.kind for job in unfinished(study)}
    sections = [Section("The test", [primary(everything)[0], settings_table(study)], {"test": drawing(everything)})]
    for r in everything:
        tables = [
            arms_table(r, OUTCOMES, "recall", True), differences_table(r, OUTCOMES, "recall, differences"),
            arms_table(r, TEXT_OUTCOMES, "text", False), differences_table(r, TEXT_OUTCOMES, "text, differences"),
            *([sharpened_table(r)] if has_sharpened(study, r.family) else []), lengths_table(r),
        ]  # fmt: skip
        stem = r.family.lower().replace(" ", "_")
        drawn = {f"{stem}_{name}": plot for name, plot in {"arms": arms_drawing(r), **heat_maps(r)}.items()}
        sections.append(Section(f"Mid-training, {r.family}", tables, drawn))
    after = PostResults(study)
    if not kinds & AFTER_POST:
        tables = [*(table_4(after, p) for p in PROTOCOLS), questions_differences(after), post_cost_table(study)]
        drawn = {"post_training": questions_drawing(after)}
        sections.append(Section("Post-training (in the form of the paper's Table 4)", tables, drawn))
    if not kinds & AFTER_TEST_TIME:
        tables, drawn = [test_time_table(after, f) for f in OF_ANSWERS], {"test_time": test_time_drawing(after)}
        sections.append(Section("Test-time training", tables, drawn))
    return sections


def not_run_yet(study: Study) -> str:
    """Say in a sentence what the plan names and these tables lack; return an empty text if nothing."""
    missing = unfinished(study)
    kinds = {job.kind for job in missing}
    lacking = [f"the arm {arm}" for arm in (*ARMS, SAME_TIME) if any(j.kind == "mid" and j.arguments[1] == arm for j in missing)]
    lacking += [f"{f} at equal entropy" for f in study.scale.families if not has_sharpened(study, f)]
    lacking += ["post-training"] * bool(kinds & AFTER_POST) + ["test time"] * bool(kinds & AFTER_TEST_TIME)
    return f"Planned and not run yet: {'; '.join(lacking)}.\n" if lacking else ""


EARLIER_BASES = """
## Earlier bases

Two bases of 1.1 M parameters that were shipped before (DeltaNet, LaCT; 48 steps of 4 x 512 tokens, 3 seeds, no closed form)
showed the same picture. The paper's preset changed no recall beyond the spread (sampled recall -.003 ± .016 / +.001 ± .002
against NTP), nor did entropy positions; `context_kl` positions raised sampled recall (+.036 ± .040 / +.048 ± .005, and +.029 ±
.039 / +.041 ± .005 against NTP brought to the same entropy by a temperature) and not greedy recall (+.010 ± .013 / +.010 ± .078),
at +.010 ± .007 / +.017 ± .007 nats of text; cross-entropy once more at the same positions did about as well at half the seconds.
Plain SFT was not beaten by nested post-training (-1.7 to +0.3 / -2.6 to -0.9 points, greedy), and test-time training changed
nothing measurable after it and lowered log p of the answer before it. Their tables are in the history of this repository
(docs/results_first_bases.md).
"""


def write_results(study: Study, scale: str, document: Path) -> Path:
    """Write the document with its plots, and the run's page, once the test's jobs are done; return the page's path."""
    everything = [Results(study, family) for family in study.scale.families]
    finding = primary(everything)[1]
    lines = [introduction(study, scale), f"**{finding}**\n", not_run_yet(study)]
    page = [html.Section("Finding", f"<p>{finding}</p>")]
    for section in sections_of(study, everything):
        lines.append(f"\n## {section.title}\n")
        for name, plot in section.drawings.items():
            path = write_atomically(document.parent / document.stem / f"{name}.svg", plot.svg())
            lines.append(f"![{plot.title}]({document.stem}/{path.name})")
        lines += ["", *(t.markdown() for t in section.tables)]
        drawn = html.plots(*section.drawings.values())
        page.append(html.Section(section.title, drawn + "".join(t.html() for t in section.tables)))
    if scale == "medium" and twice.RECORD.exists():
        lines.append(twice.section())
        page.append(html.Section(twice.TITLE, "".join(t.html() for t in twice.tables_of())))
    lines.append(EARLIER_BASES)
    write_atomically(document, "\n".join(lines))
    return write_atomically(study.folder("report.html"), html.page(f"The study, {scale} scale", "", page))


def introduction(study: Study, scale: str) -> str:
    """Say what the tables are, and how they were made."""
    s, facts = study.scale, environment()
    made = {k: facts[k] for k in ("python", "torch", "transformers", "machine", "cpus")}
    files = " ".join(
        f"--{k} {Path(v).name}" for k, v in settings_of(study).items() if k in ("squad", "hotpotqa", "essays", "novels") and v
    )
    return f"""# Results at small scale

Written by `python benchmarks/paper_tables.py --scale {scale} {files}` ({json.dumps(made)}). What is tested, and how, was written down
before anything was run: [benchmarks/study/plan.md](../benchmarks/study/plan.md).

Bases of about two million parameters, pretrained on rows of up to 1,024 tokens, are mid-trained for {s.mid_steps} steps of
{s.mid_rows} x {s.mid_length} tokens (half the rows plain text of the standard library, half generated documents), with {s.seeds} seeds
for NTP, its control and `expected`, {s.other_seeds} for the other arms; {MAIN} is then post-trained for {s.post_steps} steps of
{s.post_prompts} prompts of {s.post_length} tokens ({s.post_seeds} seeds) and adapted at test time by one step a prompt. All arms of a
seed see the same rows in the same order, and are measured on the same prompts; other seeds have others. Every arm's settings were chosen
by as many trials of {s.trial_steps} steps, on rows, prompts and text that are not reported on. Far tokens: the 5 % whose prediction
by the untouched base depends most on context beyond 64 tokens. "Best T": each arm at the best of three temperatures, found
on the choosing set. Figures are means ± standard deviations over seeds of training; differences are paired by seed.

What this cannot show: whether anything of it holds for models a thousand times larger, for data that is not generated, or
for contexts longer than {max(*s.ruler_lengths, s.novel_length)} tokens. The bases have read RULER's wording of needles (with other keys
and values) in pretraining and in mid-training, so needles measure how far a known format is recalled; the held-out wordings do not.
"""
