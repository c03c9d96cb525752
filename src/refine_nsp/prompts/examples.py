"""Examples to be answered, and ready-made prompt files: one record for RULER, LongBench and a user's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refine_nsp.errors import RefineError
from refine_nsp.files import expecting
from refine_nsp.text.reading import read_documents

PROMPT_COLUMNS = ("prompt", "input")
ANSWER_COLUMNS = ("answers", "answer", "outputs", "output")


@dataclass(frozen=True)
class Example:
    """A prompt with its references (any is right, or all are asked for: the task's metric decides).

    budget: tokens that may be generated. meta: what a table or a plot may group by (length, depth, ...).
    """

    id: str
    prompt: str
    references: list[str]
    budget: int
    meta: dict[str, Any] = field(default_factory=dict)


def read_prompts(name: str, default_budget: int, split: str = "test") -> dict[str, list[Example]]:
    """Ready-made prompts from a file, by the `task` column (or the file's name).

    Columns: prompt; answers (or answer, outputs) as a string or a list; optional id or index, task, max_gen_tokens, max_seq_length.

    Raises:
        RefineError: no prompt or answer column, an empty prompt, a row without answers.
    """
    data = read_documents(name, PROMPT_COLUMNS, split=split)
    prompt_column = next(c for c in PROMPT_COLUMNS if c in data.column_names)
    answer_column = next((c for c in ANSWER_COLUMNS if c in data.column_names), None)
    if answer_column is None:
        raise RefineError(f"{name} has no answers: expected a column {', '.join(ANSWER_COLUMNS)}, got {data.column_names}")
    examples: dict[str, list[Example]] = {}
    for i, row in enumerate(data):
        references = as_answers(row[answer_column], f"{name}, row {i}")
        if not str(row[prompt_column]).strip():
            raise RefineError(f"{name}, row {i}: the prompt is empty")
        task = str(row.get("task") or Path(name).stem)
        meta = {k: row[k] for k in ("max_seq_length", "prompt_length") if row.get(k) is not None}
        if "max_seq_length" in meta:
            meta["length"] = meta.pop("max_seq_length")
        name_of_row = row.get("id", row.get("_id", row.get("index", i)))
        with expecting("a whole number in max_gen_tokens", f"{name}, row {i}"):
            budget = int(row.get("max_gen_tokens") or default_budget)
        example = Example(f"{task}/{name_of_row}", str(row[prompt_column]), references, budget, meta)
        examples.setdefault(task, []).append(example)
    for task, of_task in examples.items():
        check_unique(task, of_task)
    return examples


def as_answers(value: Any, where: str) -> list[str]:
    """A string, a list of strings, or SQuAD's {"text": [...]} as a list without repeats; RefineError when nothing is in it."""
    if isinstance(value, Mapping):
        value = value.get("text", [])
    given = [value] if isinstance(value, str) else value or []
    if not isinstance(given, list | tuple) or not all(
        isinstance(a, str | int | float) or "text" in a for a in given if a is not None
    ):
        raise RefineError(f"{where}: the answer is {str(value)[:60]!r}; expected text, or a list of texts of which any is right")
    answers = [str(a["text"] if isinstance(a, Mapping) else a) for a in given if a is not None]
    kept = list(dict.fromkeys(a for a in answers if a.strip()))
    if not kept:
        raise RefineError(f"{where}: no answer; every example needs at least one that is not empty")
    return kept


def check_unique(task: str, examples: Sequence[Example]) -> None:
    """RefineError when two examples share an id: results are resumed and compared by it."""
    seen: set[str] = set()
    for e in examples:
        if e.id in seen:
            raise RefineError(f"{task}: two examples are called {e.id!r}; ids must differ")
        seen.add(e.id)
