"""Tables, plots and pages of evaluations, and of two compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from refine_nsp.errors import RefineError, closest
from refine_nsp.evaluation import longbench
from refine_nsp.evaluation.documents import perplexity
from refine_nsp.evaluation.run import TaskResult, grouped
from refine_nsp.evaluation.statistics import Comparison, Estimate, compare_pairs, estimate
from refine_nsp.evaluation.tasks import Row
from refine_nsp.files import write_atomically
from refine_nsp.prompts import ruler
from refine_nsp.report import html, plots
from refine_nsp.report.tables import Cell, Table

SHOWN_EXAMPLES = 5
DEPTH_BINS = 5


# Figures that are shares of 1, shown in percent; the others are nats or whatever lm-eval measures.
SHARES = frozenset(
    "any_match fraction_match exact_match f1 rouge_l similarity accuracy sampled_accuracy acc acc_norm match_random "
    "match_high_entropy".split()
)


def show_number(x: float, figure: str, sign: str = "") -> str:
    return f"{100 * x:{sign}.1f}" if figure in SHARES else f"{x:{sign}.4f}"


def show_estimate(e: Estimate, figure: str) -> str:
    """mean +- standard error, in percent where it is a share."""
    return f"{show_number(e.mean, figure)} ± {show_number(e.stderr, figure)}"


def results_table(results: Sequence[TaskResult]) -> Table:
    """Every figure of every task; the main one of a task stands first."""
    rows: list[list[Cell]] = []
    for r in results:
        for figure, e in r.estimates.items():
            rows.append([r.name, figure, show_estimate(e, figure), interval(e.low, e.high, figure), e.n])
            if figure in ("loss", "log_p"):
                sign = 1 if figure == "loss" else -1
                bounds = sorted((perplexity(sign * e.low), perplexity(sign * e.high)))
                rows.append([r.name, "perplexity", f"{perplexity(sign * e.mean):.4g}", "{:.4g} to {:.4g}".format(*bounds), e.n])
    return Table(
        "Results",
        ["task", "figure", "mean ± standard error", "95 % interval", "examples"],
        rows,
        [*means(results), *adaptation_cost(results)],
    )


def adaptation_cost(results: Sequence[TaskResult]) -> list[str]:
    """Of test-time training, per prompt, beside plain generation; nothing without it."""
    rows = [row.meta for r in results for row in r.rows if "adapt_seconds" in row.meta]
    if not rows:
        return []
    adapt, answer, extra = (mean(m[k] for m in rows) for k in ("adapt_seconds", "answer_seconds", "extra_bytes"))
    return [
        f"test-time training, per prompt: {adapt:.3f} s to adapt and {answer:.3f} s to answer (plain generation is the latter alone): "
        f"{(adapt + answer) / answer:.1f} times the time; {extra / 2**20:.1f} MiB kept beside the model"
    ]


def interval(low: float, high: float, figure: str, sign: str = "") -> str:
    return f"{show_number(low, figure, sign)} to {show_number(high, figure, sign)}"


def means(results: Sequence[TaskResult]) -> list[str]:
    """Task-wise means of the benchmarks, where all of a benchmark's tasks are there."""
    by_name = {r.name: next(iter(r.estimates.values())).mean for r in results if r.estimates}
    notes = []
    for title, names in (
        ("RULER, mean of 13 tasks", ruler.TASKS),
        ("RULER, mean of 8 needle tasks", tuple(ruler.NEEDLES)),
        ("LongBench, mean of the paper's 12 tasks", longbench.PAPER_TASKS),
        ("LongBench, mean of 14 tasks", tuple(longbench.TASKS)),
    ):
        if all(n in by_name for n in names):
            notes.append(f"{title}: {100 * mean(by_name[n] for n in names):.1f}")
    return notes


def by_length_table(results: Sequence[TaskResult]) -> Table | None:
    """RULER's main figures by length; None when nothing has lengths."""
    lengths = sorted({n for r in results for n in grouped(r.rows, "length")})
    if not lengths:
        return None
    rows: list[list[Cell]] = []
    for r in (r for r in results if grouped(r.rows, "length")):
        cells = [main_estimate(r, grouped(r.rows, "length").get(n, [])) for n in lengths]
        rows.append([r.name, *(show_estimate(e, next(iter(r.estimates))) if e else "" for e in cells)])
    return Table("By length", ["task", *(f"{n:,} tokens" for n in lengths)], rows)


def main_estimate(result: TaskResult, rows: Sequence[Row]) -> Estimate | None:
    figure = next(iter(result.estimates))
    return estimate([row.scores[figure] for row in rows]) if rows else None


def needle_map(results: Sequence[TaskResult]) -> plots.Plot | None:
    """Heat map of the needle tasks' main figure over length and depth; None without needle tasks."""
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
    """Next-token figures along the documents, one plot a figure."""
    drawn = []
    for r in (r for r in results if r.name == "ntp"):
        for figure in r.estimates:
            buckets: dict[int, list[float]] = {}
            for row in r.rows:
                for at, values in row.meta["buckets"].items():
                    buckets.setdefault(int(at), []).append(values[figure])
            points = sorted(buckets)
            curve = (points, [mean(buckets[p]) for p in points])
            drawn.append(plots.line_plot({figure: curve}, f"{figure.replace('_', ' ')} by position", "position, tokens"))
    return drawn


def examples_table(result: TaskResult) -> Table:
    rows: list[list[Cell]] = [
        [row.id, repr(row.output[:160])[1:-1], repr(" | ".join(row.references)[:160])[1:-1], *row.scores.values()]
        for row in result.rows[:SHOWN_EXAMPLES]
    ]
    return Table(result.name, ["example", "output", "references", *result.estimates], rows)


def write_evaluation(out: Path, results: Sequence[TaskResult], settings: str, environment: str) -> Path:
    """results.md and report.html of a run; returns the page's path."""
    tables = [t for t in (results_table(results), by_length_table(results)) if t is not None]
    write_atomically(out / "results.md", "\n".join(t.markdown() for t in tables))
    sections = [html.Section("Results", "".join(t.html() for t in tables))]
    heat = needle_map(results)
    drawn = [*([heat] if heat else []), *bucket_plots(results)]
    if drawn:
        sections.append(html.Section("Where", html.plots(*drawn)))
    shown = "".join(examples_table(r).html() for r in results if r.rows and (r.rows[0].output or r.rows[0].references))
    if shown:
        sections.append(html.Section("First examples", shown))
    folded = html.preformatted("settings", settings) + html.preformatted("environment", environment)
    sections.append(html.Section("How it was made", folded))
    return write_atomically(out / "report.html", html.page("Evaluation", ", ".join(r.name for r in results), sections))


# --- runs compared ----------------------------------------------------------------------------------------------------


def compare_results(a: Sequence[TaskResult], b: Sequence[TaskResult]) -> list[tuple[str, str, Comparison]]:
    """(task, figure, comparison) for every figure both have, over the examples both have.

    Raises:
        RefineError: no task in common, or a task without a shared example.
    """
    others = {r.name: r for r in b}
    shared = [r for r in a if r.name in others]
    if not shared:
        raise RefineError(
            f"the two evaluations have no task in common: {', '.join(r.name for r in a)} and {', '.join(others)}"
            + (closest(a[0].name, others) if a else "")
        )
    comparisons = []
    for r in shared:
        mine, theirs = ({row.id: row for row in x.rows} for x in (r, others[r.name]))
        keys = [k for k in mine if k in theirs]
        if not keys:
            raise RefineError(f"{r.name}: the two evaluations share no example")
        for figure in (f for f in r.estimates if f in others[r.name].estimates):
            pairs = compare_pairs([mine[k].scores[figure] for k in keys], [theirs[k].scores[figure] for k in keys])
            comparisons.append((r.name, figure, pairs))
    return comparisons


def comparison_table(comparisons: Sequence[tuple[str, str, Comparison]], names: tuple[str, str]) -> Table:
    rows: list[list[Cell]] = []
    for task, figure, c in comparisons:
        bounds = interval(c.low, c.high, figure, "+")
        rows.append(
            [task, figure, show_number(c.difference, figure, "+"), bounds, f"{c.p_value:.4f}", f"{c.won} / {c.lost}", c.n]
        )
    notes = [
        f"difference: {names[1]} minus {names[0]}, paired by example; 95 % bootstrap interval; p of the two-sided sign-flip test",
        f"{len(comparisons)} comparisons: about one in twenty falls below p = 0.05 by chance",
    ]
    title = f"{names[1]} against {names[0]}"
    return Table(title, ["task", "figure", "difference", "95 % interval", "p", "higher / lower", "examples"], rows, notes)


def figures_table(runs: Sequence[Sequence[TaskResult]], names: Sequence[str]) -> Table:
    """Every figure of every task, one column a run; nothing where a run has not got it."""
    found = [{(r.name, figure): e for r in results for figure, e in r.estimates.items()} for results in runs]
    rows: list[list[Cell]] = []
    for task, figure in dict.fromkeys(key for run in found for key in run):
        rows.append([task, figure, *(show_estimate(e, figure) if (e := run.get((task, figure))) else None for run in found)])
    return Table("Mean ± standard error", ["task", "figure", *names], rows, ["over all examples of each run, shared or not"])


def comparison_tables(runs: Sequence[Sequence[TaskResult]], names: Sequence[str]) -> list[Table]:
    """Each run against the first, then the figures of all. RefineError as `compare_results`."""
    against = [
        comparison_table(compare_results(runs[0], run), (names[0], name)) for run, name in zip(runs[1:], names[1:], strict=True)
    ]
    return [*against, figures_table(runs, names)]
