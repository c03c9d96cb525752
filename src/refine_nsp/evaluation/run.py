"""Run tasks on a model: write each row to disk as it comes, so that a run can be resumed by example, then estimate the figures.

A run's folder holds `settings.json`, `examples/TASK.jsonl` (a line for each example) and `results.json`. Under `accelerate launch` every
process answers its share and writes a file of its own.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from math import inf, isfinite
from pathlib import Path

from accelerate import PartialState

from refine_nsp.errors import RefineError
from refine_nsp.evaluation.statistics import Estimate, bounds_of, estimate
from refine_nsp.evaluation.tasks import Context, Row, Task
from refine_nsp.files import append_json_lines, expecting, read_json, read_json_lines, write_atomically
from refine_nsp.ops.memory import part
from refine_nsp.processes import process_state
from refine_nsp.progress import step_progress

# Whatever part of an answer finds no memory, these are the settings that an evaluation has for it.
REMEDIES = {"evaluation": "lower batch_tokens or lengths"}


@dataclass(frozen=True)
class TaskResult:
    """Hold what a task gave: its examples in order, an estimate for each figure, and notes to stand under a table of it.

    Estimates are fractions of 1 (or nats), the main figure's first.
    """

    name: str
    rows: list[Row]
    estimates: dict[str, Estimate]
    notes: list[str] = field(default_factory=list)


def evaluate(
    tasks: Sequence[Task], context: Context, out: Path, settings: dict[str, object], quiet: bool = False
) -> list[TaskResult]:
    """Answer the examples that have no answer yet, then summarise all.

    Answers depend on the settings. A folder with others is refused by a RefineError, so that no answers of two kinds are mixed.
    """
    state = process_state()
    with state.main_process_first():
        claim_folder(out, settings)
        missing = {task.name: missing_ids(task, out) for task in tasks}
    state.wait_for_everyone()  # nobody writes while another still reads
    started = time.monotonic()
    for task in tasks:
        answer_missing(task, missing[task.name], context, out, state, quiet)
    state.wait_for_everyone()
    answers = {task.name: read_rows(out, task.name) for task in tasks}
    results = [summarise(task.name, [answers[task.name][i] for i in task.questions()], task.notes) for task in tasks]
    if state.is_main_process:
        record = {"seconds": time.monotonic() - started, "tasks": [as_json(r) for r in results]}
        write_atomically(out / "results.json", json.dumps(record, indent=1) + "\n")
    return results


def claim_folder(out: Path, settings: dict[str, object]) -> None:
    """Write the settings into a new folder, or check that they are those of the run that is resumed in it."""
    path, wanted = out / "settings.json", json.loads(json.dumps(settings))
    if not path.exists():
        write_atomically(path, json.dumps(wanted, indent=1) + "\n")
        return
    known = read_json(path, "the settings of an evaluation")
    if changed := sorted(k for k in {*known, *wanted} if known.get(k) != wanted.get(k)):
        shown = "; ".join(f"{k} was {known.get(k)!r}, now {wanted.get(k)!r}" for k in changed[:3])
        raise RefineError(f"{out} holds an evaluation with other settings ({shown}); choose another --output_dir, or remove it")


def missing_ids(task: Task, out: Path) -> list[str]:
    """List the examples without a row, in the task's order. Raises RefineError where a row answers another question of that id."""
    known, asked = read_rows(out, task.name), task.questions()
    if other := next((i for i, row in known.items() if i not in asked or row.question not in ("", asked[i])), None):
        raise RefineError(
            f"{out} holds an answer called {other!r} to a question that is not asked any more (its prompt, references or text changed "
            "since, or an earlier release named it); choose another --output_dir, or remove it"
        )
    return [i for i in asked if i not in known]


def answer_missing(task: Task, missing: Sequence[str], context: Context, out: Path, state: PartialState, quiet: bool) -> None:
    """Answer this process' share of the missing examples, and append each row to its file as it comes."""
    mine = missing[state.process_index :: state.num_processes]
    if not mine:
        return
    path = rows_path(out, task.name, state.process_index if state.num_processes > 1 else None)
    tokens = 0

    def count(n: int) -> None:
        nonlocal tokens
        tokens += n

    context.on_tokens, asked = count, task.questions()
    with step_progress(len(mine), 0, task.name, quiet) as progress, part("evaluation", REMEDIES):
        for row in task.rows(mine, context):
            append_json_lines(path, [asdict(replace(row, question=asked[row.id]))])
            progress.advance(tokens)
            tokens = 0


def rows_path(out: Path, task: str, rank: int | None) -> Path:
    safe = re.sub(r"[^\w.+=-]", "_", task)  # a task's name must not lead out of this folder
    return out / "examples" / (f"{safe}.jsonl" if rank is None else f"{safe}.rank{rank}.jsonl")


def read_rows(out: Path, task: str) -> dict[str, Row]:
    """Read all rows of a task, of every process, by id."""
    first = rows_path(out, task, None)
    rows: dict[str, Row] = {}
    for path in (first, *sorted(first.parent.glob(f"{first.stem}.rank*.jsonl"))):
        for record in read_json_lines(path):
            with expecting("an answer with its scores on every line", path):
                row = Row(**record)
                check_row(row)
                scores = {str(name): float(value) for name, value in row.scores.items()}
                rows.setdefault(str(row.id), replace(row, scores=scores, weight=float(row.weight), meta=dict(row.meta)))
    return rows


def check_row(row: Row) -> None:
    """Raise TypeError for an answer that no table could show."""
    places = [row.meta[name] for name in ("length", "depth") if name in row.meta]
    buckets = [value for bucket in row.meta.get("buckets", {}).values() for value in bucket.values()]
    if not isinstance(row.output, str) or not all(isinstance(r, str) for r in (row.question, *row.references)):
        raise TypeError("an answer that is not text")
    if not 0 < float(row.weight) < inf:
        raise TypeError(f"a weight of {row.weight}")
    if not all(isinstance(value, int | float) for value in (*places, *buckets)):
        raise TypeError("a place that is not a number")


def summarise(name: str, rows: Sequence[Row], notes: Sequence[str] = ()) -> TaskResult:
    """Estimate the mean of every figure, with its standard error and interval."""
    figures = list(rows[0].scores) if rows else []
    if odd := next((r for r in rows if set(r.scores) != set(figures)), None):
        raise RefineError(f"{name}: the answer {odd.id!r} has the figures {', '.join(odd.scores)}, others {', '.join(figures)}")
    weights = [r.weight for r in rows]
    found = {f: estimate([r.scores[f] for r in rows], weights, bounds_of(f)) for f in figures}
    return TaskResult(name, list(rows), found, list(notes))


def as_json(result: TaskResult) -> dict[str, object]:
    """Convert a result to what results.json keeps; null stands for nan, which JSON does not have."""
    estimates = {f: {k: v if isfinite(v) else None for k, v in asdict(e).items()} for f, e in result.estimates.items()}
    return {"name": result.name, "n": len(result.rows), "estimates": estimates, "notes": result.notes}


def read_results(out: Path) -> list[TaskResult]:
    """Read a finished evaluation. Raises RefineError when the folder holds none."""
    path, what = out / "results.json", "what an evaluation found"
    if not path.exists():
        raise RefineError(f"{out} holds no finished evaluation (results.json); run `refine-nsp evaluate` with that --output_dir")
    with expecting(what, path):
        notes = {str(t["name"]): [str(note) for note in t.get("notes", [])] for t in read_json(path, what)["tasks"]}
    return [summarise(name, list(read_rows(out, name).values()), said) for name, said in notes.items()]


def read_settings(out: Path) -> dict[str, object] | None:
    """Read the settings of an evaluation that differ from their defaults; None where the folder keeps none."""
    path = out / "settings.json"
    return read_json(path, "the settings of an evaluation") if path.exists() else None
