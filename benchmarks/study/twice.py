"""Make the table of reading twice in docs/results.md from the kept scores of every prompt (`benchmarks/read_twice.py`)."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from refine_nsp.environment import environment
from refine_nsp.errors import RefineError
from refine_nsp.evaluation.statistics import Comparison, compare_pairs, estimate
from refine_nsp.files import write_atomically, write_bytes_atomically
from refine_nsp.report.tables import Cell, Table

from .settings import BASES

RECORD = Path(__file__).resolve().parent / "records" / "read_twice.json.gz"
TITLE = "Reading twice"
ONCE, TWICE = "once", "twice"
ADAPTED, ADAPTED_TWICE = "adapted, once", "adapted, twice"
SHARES = (0.0, 1.0)
SEED = 42  # of the prompts
LAST = "\n\n## Earlier bases"
Scores = dict[str, list[float]]  # by "task tokens", in the order of the prompts
Record = dict[str, dict[str, Scores]]  # by base and way of reading


def read_record(path: Path = RECORD) -> tuple[Record, dict[str, str]]:
    """Read the scores of every prompt, and what the table says of how they were made."""
    held = json.loads(gzip.decompress(path.read_bytes()))
    return held["scores"], held["notes"]


def keep(scores: Record, notes: dict[str, str], path: Path) -> None:
    """Keep scores, cut to the number of prompts that all bases have in both ways, once and twice; the same scores give the same bytes."""
    kept: Record = {base: {} for base in scores}
    counts = {}
    for ways in ((ONCE, TWICE), (ADAPTED, ADAPTED_TWICE)):
        cells = [scores[base].get(way, {}) for base in scores for way in ways]
        fewest = min(len(x) for s in cells for x in s.values()) if all(cells) else 0
        counts[ways[0]] = fewest
        for base in scores if fewest else ():
            for way in ways:
                kept[base][way] = {cell: x[:fewest] for cell, x in scores[base][way].items()}
    if not counts[ONCE]:
        raise RefineError("a cell has no answer yet, so there is no table; run it again without --so_far")
    told = {name: note.format(once=counts[ONCE], adapted=counts[ADAPTED]) for name, note in notes.items()}
    packed = json.dumps({"scores": kept, "notes": told}, separators=(",", ":"))
    write_bytes_atomically(path, gzip.compress(packed.encode(), mtime=0))


def notes_of(essays: str, learning_rate: float, seconds: dict[str, tuple[float, float, float]]) -> dict[str, str]:
    """Say how the figures were made; {once} and {adapted} stand for the numbers of prompts."""
    env = environment(SEED)
    machine = ", ".join(f"{name} {env[name]}" for name in ("python", "torch", "transformers", "machine", "cpus"))
    return {
        "prompts": f"{{once}} prompts a cell (seed {SEED}, essays: {essays}), the same in both columns; `python benchmarks/read_twice.py`, "
        f"one thread ({machine}). The context stands twice, the question once; tokens are those of one reading with its answer. Each base "
        "is one checkpoint and decoding is greedy: ± is the standard error over prompts",
        "difference": "differences are paired by prompt, with a 95 % t-interval; * beyond it. About one in twenty is beyond it by chance",
        "adapted": f"the 8 needle tasks, the first {{adapted}} prompts of each cell; adapted: one NTP step (AdamW, {learning_rate}) on the "
        "prompt read once, restored after it; paired by prompt, with a 95 % t-interval; * beyond it",
        "seconds": "seconds a prompt, one by one, medians: "
        + "; ".join(f"{base} {a:.2f} to adapt, {b:.2f} to answer, {c:.2f} read twice" for base, (a, b, c) in seconds.items()),
    }


def cells_of(scores: Scores, length: str, needles: bool) -> list[str]:
    """List the cells of a length: those of needle tasks, or the others."""
    return [c for c in scores if c.split()[1] == length and c.startswith("niah") == needles]


def pooled(scores: Scores, cells: Sequence[str]) -> list[float]:
    """Join the scores of several cells of equally many prompts, so that the mean is the mean over tasks."""
    return [x for cell in cells for x in scores[cell]]


def show_mean(values: Sequence[float]) -> str:
    """Write a mean in percent with its standard error."""
    e = estimate(values, bounds=SHARES)
    return f"{100 * e.mean:.1f} ± {100 * e.stderr:.1f}"


def show_difference(a: Sequence[float], b: Sequence[float]) -> str:
    """Write b - a in points with its 95 % interval, paired by prompt; a star where the interval is beyond 0."""
    c: Comparison = compare_pairs(a, b, bounds=SHARES)
    star = " *" if c.low > 0 or c.high < 0 else ""
    return f"{100 * c.difference:+.1f} ({100 * c.low:+.1f} to {100 * c.high:+.1f}){star}"


def lengths_of(record: Record) -> list[str]:
    return sorted({cell.split()[1] for ways in record.values() for scores in ways.values() for cell in scores}, key=int)


def summary_table(record: Record, notes: dict[str, str]) -> Table:
    """Tabulate each base at each length: the needle tasks together, and the other tasks together."""
    rows: list[list[Cell]] = []
    for base in (b for b in BASES if b in record):
        ways = record[base]
        for length in lengths_of(record):
            for name, needles in (("needles", True), ("vt, fwe", False)):
                cells = cells_of(ways[ONCE], length, needles)
                if cells:
                    once, twice = (pooled(ways[way], cells) for way in (ONCE, TWICE))
                    rows.append(
                        [base, length, f"{name} ({len(cells)})", show_mean(once), show_mean(twice), show_difference(once, twice)]
                    )
    columns = ["base", "tokens", "tasks", "once", "twice", "twice - once"]
    return Table("Reading twice, % right, greedy", columns, rows, [notes["prompts"], notes["difference"]])


def adapted_table(record: Record, notes: dict[str, str]) -> Table | None:
    """Tabulate reading twice next to test-time training, on the prompts that all four ways have; None where no base was adapted."""
    rows: list[list[Cell]] = []
    for base in (b for b in BASES if ADAPTED in record.get(b, {})):
        ways = record[base]
        for length in lengths_of(record):
            cells = cells_of(ways[ADAPTED], length, True)
            n = min(len(ways[ADAPTED][c]) for c in cells)
            once, twice, adapted, both = (
                [x for c in cells for x in ways[way][c][:n]] for way in (ONCE, TWICE, ADAPTED, ADAPTED_TWICE)
            )
            differences = [show_difference(once, other) for other in (twice, adapted, both)]
            rows.append([base, length, show_mean(once), *differences, show_difference(adapted, twice)])
    columns = ["base", "tokens", "once", "twice - once", "adapted - once", "adapted, read twice - once", "twice - adapted"]
    return (
        Table(
            "Reading twice next to test-time training, % right, greedy",
            columns,
            rows,
            [notes["adapted"], notes["seconds"]],
        )
        if rows
        else None
    )


def tasks_table(record: Record) -> Table:
    """Tabulate every task: the mean of one reading, and the difference, for each base."""
    bases = [b for b in BASES if b in record]
    rows: list[list[Cell]] = []
    for cell in record[bases[0]][ONCE]:
        figures: list[Cell] = []
        for base in bases:
            once, twice = (record[base][way][cell] for way in (ONCE, TWICE))
            figures += [f"{100 * mean(once):.1f}", show_difference(once, twice)]
        rows.append([*cell.split(), *figures])
    columns = ["task", "tokens", *(c for base in bases for c in (f"{base}, once", "twice - once"))]
    return Table("Reading twice, by task, % right, greedy", columns, rows)


def tables_of(path: Path = RECORD) -> list[Table]:
    """List the section's tables; an empty list where nothing was measured."""
    if not path.exists():
        return []
    record, notes = read_record(path)
    adapted = adapted_table(record, notes)
    return [summary_table(record, notes), *([adapted] if adapted else []), tasks_table(record)]


def section(path: Path = RECORD) -> str:
    """Write the section as Markdown, heading included; an empty text where nothing was measured."""
    tables = tables_of(path)
    return "\n".join([f"\n## {TITLE}\n", "", *(t.markdown() for t in tables)]) if tables else ""


def write(record: Path, document: Path) -> None:
    """Put the section into the document, before its last one, in the place of an earlier one."""
    text = document.read_text(encoding="utf-8")
    before, found, old = text.partition(f"\n\n## {TITLE}\n")
    if found:
        text = before + LAST + old.partition(LAST)[2]
    before, _, last = text.partition(LAST)
    write_atomically(document, f"{before}\n{section(record)}{LAST}{last}")
