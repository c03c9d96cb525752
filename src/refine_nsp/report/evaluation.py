"""Make the tables, plots and pages of evaluations and of their comparisons."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import isnan
from pathlib import Path
from statistics import mean
from typing import Any

from refine_nsp.evaluation import longbench
from refine_nsp.evaluation.documents import perplexity
from refine_nsp.evaluation.pairing import Settings, TaskPairs, pair_up
from refine_nsp.evaluation.run import TaskResult, summarise
from refine_nsp.evaluation.statistics import SHARES, Comparison, Estimate, bounds_of, compare_pairs
from refine_nsp.evaluation.tasks import Row
from refine_nsp.files import write_atomically
from refine_nsp.prompts import ruler
from refine_nsp.report import html, plots
from refine_nsp.report.tables import Cell, Table

SHOWN_EXAMPLES = 5
DEPTH_BINS = 5
UNKNOWN = "unknown"  # shown as the interval of a mean of which too few examples tell nothing


def show_number(x: float, figure: str, sign: str = "") -> str:
    """Write a figure as text, in percent where it is a share."""
    return f"{100 * x:{sign}.1f}" if figure in SHARES else f"{x:{sign}.4f}"


def show_estimate(e: Estimate, figure: str) -> str:
    """Write the mean ± its standard error, in percent where it is a share; with one example the mean alone."""
    error = f" ± {show_number(e.stderr, figure)}" if e.n > 1 else ""
    return f"{show_number(e.mean, figure)}{error}"


def results_table(results: Sequence[TaskResult]) -> Table:
    """List every figure of every task, the main one of a task first."""
    rows: list[list[Cell]] = []
    for r in results:
        for figure, e in r.estimates.items():
            rows.append([r.name, figure, show_estimate(e, figure), interval(e.low, e.high, figure), e.n])
            if figure in ("loss", "log_p"):
                sign = 1 if figure == "loss" else -1
                bounds = sorted((perplexity(sign * e.low), perplexity(sign * e.high)))
                shown = UNKNOWN if isnan(e.low) else "{:.4g} to {:.4g}".format(*bounds)
                rows.append([r.name, "perplexity", f"{perplexity(sign * e.mean):.4g}", shown, e.n])
    notes = [*(note for r in results for note in r.notes), *means(results), *reading_cost(results), *adaptation_cost(results)]
    return Table("Results", ["task", "figure", "mean ± standard error", "95 % interval", "examples"], rows, notes)


def adaptation_cost(results: Sequence[TaskResult]) -> list[str]:
    """Say what test-time training cost for each prompt, next to plain generation; return nothing where there was none."""
    if not (rows := _meta_with("adapt_seconds", results)):
        return []
    adapt, answer, extra = (mean(m[k] for m in rows) for k in ("adapt_seconds", "answer_seconds", "extra_bytes"))
    return [
        f"test-time training, per prompt: {adapt:.3f} s to adapt and {answer:.3f} s to answer (plain generation is the latter alone): "
        f"{(adapt + answer) / answer:.1f} times the time; {extra / 2**20:.1f} MiB kept beside the model"
    ]


def reading_cost(results: Sequence[TaskResult]) -> list[str]:
    """Say how long prompts became whose context was read twice; return nothing where all were read once."""
    if not (rows := _meta_with("once_tokens", results)):
        return []
    once, read = (mean(m[k] for m in rows) for k in ("once_tokens", "prompt_tokens"))
    longest = max(m["prompt_tokens"] for m in rows)
    return [
        f"contexts were read twice: {read:,.0f} tokens a prompt instead of {once:,.0f}, {longest:,} at most; lengths and limits are those "
        "of one reading"
    ]


def _meta_with(key: str, results: Sequence[TaskResult]) -> list[dict[str, Any]]:
    return [row.meta for r in results for row in r.rows if key in row.meta]


def interval(low: float, high: float, figure: str, sign: str = "") -> str:
    """Write both ends of an interval as text, or that it is unknown."""
    return UNKNOWN if isnan(low) else f"{show_number(low, figure, sign)} to {show_number(high, figure, sign)}"


def means(results: Sequence[TaskResult]) -> list[str]:
    """Compute the task-wise mean of each benchmark of which all tasks are there."""
    by_name = {r.name: next(iter(r.estimates.values())).mean for r in results if r.estimates}
    benchmarks: dict[str, Collection[str]] = {
        "RULER, mean of 13 tasks": ruler.TASKS, "RULER, mean of 8 needle tasks": ruler.NEEDLES,
        "LongBench, mean of the paper's 12 tasks": longbench.PAPER_TASKS, "LongBench, mean of 14 tasks": longbench.TASKS,
    }  # fmt: skip
    there = {title: names for title, names in benchmarks.items() if set(names) <= by_name.keys()}
    return [f"{title}: {100 * mean(by_name[n] for n in names):.1f}" for title, names in there.items()]


def by_length_table(results: Sequence[TaskResult]) -> Table | None:
    """Tabulate RULER's main figures by length; None when no task has lengths."""
    lengths = sorted({m["length"] for m in _meta_with("length", results)})
    rows: list[list[Cell]] = []
    for r in (r for r in results if any("length" in row.meta for row in r.rows)):
        figure = next(iter(r.estimates))
        groups = ([row for row in r.rows if row.meta.get("length") == n] for n in lengths)
        found = (summarise(r.name, group).estimates.get(figure) for group in groups)
        rows.append([r.name, *(show_estimate(e, figure) if e else "" for e in found)])
    return Table("By length", ["task", *(f"{n:,} tokens" for n in lengths)], rows) if rows else None


def needle_map(results: Sequence[TaskResult]) -> plots.Plot | None:
    """Draw a heat map of the needle tasks' main figure over length and depth; None without needle tasks."""
    rows = [row for r in results if r.name in ruler.NEEDLES for row in r.rows if "depth" in row.meta and "length" in row.meta]
    if not rows:
        return None
    lengths = sorted({row.meta["length"] for row in rows})
    cells: dict[tuple[int, int], list[float]] = {}
    for row in rows:
        depth = min(DEPTH_BINS - 1, int(row.meta["depth"] * DEPTH_BINS))
        cells.setdefault((depth, lengths.index(row.meta["length"])), []).append(next(iter(row.scores.values())))
    values = [[100 * mean(cells[d, n]) if (d, n) in cells else None for n in range(len(lengths))] for d in range(DEPTH_BINS)]
    depths = [f"{100 * d // DEPTH_BINS}-{100 * (d + 1) // DEPTH_BINS} %" for d in range(DEPTH_BINS)]
    return plots.heat_map(
        values, [f"{n:,}" for n in lengths], depths, "needles found, %", "length, tokens", "depth of the needle"
    )


def bucket_plots(results: Sequence[TaskResult]) -> list[plots.Plot]:
    """Plot each next-token figure along the documents; as in the means, every target counts the same."""
    drawn = []
    for r in (r for r in results if r.name == "ntp"):
        for figure in r.estimates:
            buckets: dict[int, list[tuple[float, float]]] = {}
            for at, targets, figures in (bucket for row in r.rows for bucket in bucket_targets(row)):
                buckets.setdefault(at, []).append((targets, figures[figure]))
            points = sorted(buckets)
            curve = points, [sum(n * x for n, x in buckets[p]) / sum(n for n, _ in buckets[p]) for p in points]
            drawn.append(plots.line_plot({figure: curve}, f"{figure.replace('_', ' ')} by position", "position, tokens"))
    return drawn


def bucket_targets(row: Row) -> list[tuple[int, int, dict[str, float]]]:
    """List a document's buckets: the first position, the number of targets in it, their figures. Token 0 is not a target."""
    found = sorted(((int(at), figures) for at, figures in row.meta["buckets"].items()), key=lambda bucket: bucket[0])
    ends = [*(at for at, _ in found[1:]), int(row.weight) + 1]
    return [(at, max(1, end - max(at, 1)), figures) for (at, figures), end in zip(found, ends, strict=True)]


def examples_table(result: TaskResult) -> Table:
    rows: list[list[Cell]] = [
        [row.id, repr(row.output[:160])[1:-1], repr(" | ".join(row.references)[:160])[1:-1], *row.scores.values()]
        for row in result.rows[:SHOWN_EXAMPLES]
    ]
    return Table(result.name, ["example", "output", "references", *result.estimates], rows)


def write_evaluation(out: Path, results: Sequence[TaskResult], settings: str, environment: str) -> Path:
    """Write results.md and report.html of a run, and return the page's path."""
    tables = [t for t in (results_table(results), by_length_table(results)) if t is not None]
    write_atomically(out / "results.md", "\n".join(t.markdown() for t in tables))
    drawn = [plot for plot in (needle_map(results), *bucket_plots(results)) if plot is not None]
    sections = [
        html.Section("Results", "".join(t.html() for t in tables)),
        html.Section("Where", html.plots(*drawn) if drawn else ""),
        html.Section(
            "First examples",
            "".join(examples_table(r).html() for r in results if r.rows and (r.rows[0].output or r.rows[0].references)),
        ),
        html.Section("How it was made", html.preformatted("settings", settings) + html.preformatted("environment", environment)),
    ]
    lead = ", ".join(r.name for r in results)
    return write_atomically(out / "report.html", html.page("Evaluation", lead, [s for s in sections if s.html]))


def compare_all(paired: Sequence[TaskPairs]) -> list[tuple[str, str, Comparison]]:
    """Compare every figure of every task, each example counting as it does in the means."""
    compared = []
    for task, figure in ((t, figure) for t in paired for figure in t.figures):
        a, b = zip(*((x.scores[figure], y.scores[figure]) for x, y in task.rows), strict=True)
        compared.append((task.name, figure, compare_pairs(a, b, [x.weight for x, _ in task.rows], bounds_of(figure))))
    return compared


def comparison_table(
    comparisons: Sequence[tuple[str, str, Comparison]], names: tuple[str, str], said: Sequence[str] = ()
) -> Table:
    """Tabulate differences with their uncertainty; the sentences `said` go under the table."""
    rows: list[list[Cell]] = []
    for task, figure, c in comparisons:
        difference, bounds = show_number(c.difference, figure, "+"), interval(c.low, c.high, figure, "+")
        rows.append([task, figure, difference, bounds, f"{c.p_value:.4f}", f"{c.won} / {c.lost}", c.n])
    notes = [
        *said,
        f"difference: {names[1]} minus {names[0]}, paired by example, a document counting by its tokens; 95 % t-interval; p of the "
        "two-sided sign-flip test",
        f"{len(comparisons)} comparisons: about one in twenty falls below p = 0.05 by chance",
    ]
    title = f"{names[1]} against {names[0]}"
    return Table(title, ["task", "figure", "difference", "95 % interval", "p", "higher / lower", "examples"], rows, notes)


def figures_table(runs: Sequence[Sequence[TaskResult]], names: Sequence[str]) -> Table:
    """List every figure of every task with a column for each run; a cell is empty where a run lacks the figure."""
    found = [{(r.name, figure): e for r in results for figure, e in r.estimates.items()} for results in runs]
    rows: list[list[Cell]] = []
    for task, figure in dict.fromkeys(key for run in found for key in run):
        rows.append([task, figure, *(show_estimate(e, figure) if (e := run.get((task, figure))) else None for run in found)])
    return Table("Mean ± standard error", ["task", "figure", *names], rows, ["over all examples of each run, shared or not"])


def comparison_tables(
    runs: Sequence[Sequence[TaskResult]], names: Sequence[str], settings: Sequence[Settings | None] | None = None
) -> list[Table]:
    """Compare each run with the first, then list the figures of all. Raises RefineError as `pair_up` does."""
    kept = settings or [{} for _ in runs]
    tables = []
    for run, name, theirs in zip(runs[1:], names[1:], kept[1:], strict=True):
        paired, said = pair_up(runs[0], run, kept[0], theirs)
        tables.append(comparison_table(compare_all(paired), (names[0], name), said))
    return [*tables, figures_table(runs, names)]
