"""Pair the answers that two evaluations gave to the same questions, and say where their settings differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from refine_nsp.errors import RefineError, closest
from refine_nsp.evaluation.arguments import EvaluationArguments
from refine_nsp.evaluation.run import TaskResult
from refine_nsp.evaluation.tasks import Row

Settings = Mapping[str, object]  # those that differ from their defaults, by name


@dataclass(frozen=True)
class TaskPairs:
    """Hold a task's answers in two evaluations, example by example, and the figures that both have."""

    name: str
    rows: list[tuple[Row, Row]]
    figures: list[str]


def pair_up(
    a: Sequence[TaskResult], b: Sequence[TaskResult], settings_a: Settings | None = None, settings_b: Settings | None = None
) -> tuple[list[TaskPairs], list[str]]:
    """Pair what two evaluations have in common. Return the pairs of each task, and sentences to print under a comparison.

    A RefineError says that they share no task, or no example of a task, or that one id stands for different questions.
    """
    others, notes = {r.name: r for r in b}, []
    shared = [r for r in a if r.name in others]
    if not shared:
        near = closest(a[0].name, others) if a else ""
        raise RefineError(
            f"the two evaluations have no task in common: {', '.join(r.name for r in a)} and {', '.join(others)}{near}"
        )
    differences = differing_settings(settings_a or {}, settings_b or {})
    if differences:
        notes.append(f"their settings differ: {'; '.join(differences)}")
    if settings_a is None or settings_b is None:
        notes.append("an evaluation keeps no settings, so that they are the same was not checked")
    paired = []
    for mine, theirs in ((r, others[r.name]) for r in shared):
        if not mine.rows or not theirs.rows:
            notes.append(f"{mine.name} has no examples in one of them")
            continue
        pairs = _pairs(mine, theirs, differences)
        if len(pairs) < max(len(mine.rows), len(theirs.rows)):
            notes.append(f"{mine.name}: {len(pairs)} examples are in both, of {len(mine.rows)} and {len(theirs.rows)}")
        paired.append(TaskPairs(mine.name, pairs, [f for f in mine.estimates if f in theirs.estimates]))
    if any(not row.question for task in paired for pair in task.rows for row in pair):
        notes.append(
            "an evaluation by an earlier release keeps no prompts: that both asked the same was checked by the references alone"
        )
    return paired, notes


def differing_settings(a: Settings, b: Settings) -> list[str]:
    """Name each setting that differs, with both values, except the checksum of the weights, which differs by design."""
    known = {name: repr(value) for name, value in asdict(EvaluationArguments()).items()}
    x, y = (known | {name: repr(value) for name, value in settings.items()} for settings in (a, b))
    names = [name for name in dict.fromkeys((*a, *b)) if name != "weights"]
    both = [(name, x.get(name, "its default"), y.get(name, "its default")) for name in names]
    return [f"{name} {mine} and {theirs}" for name, mine, theirs in both if mine != theirs]


def _pairs(mine: TaskResult, theirs: TaskResult, differences: Sequence[str]) -> list[tuple[Row, Row]]:
    there = {row.id: row for row in theirs.rows}
    pairs = [(row, there[row.id]) for row in mine.rows if row.id in there]
    where = f"; their settings differ: {'; '.join(differences)}" if differences else ""
    if not pairs:
        seen = f"one has {mine.rows[0].id!r}, the other {theirs.rows[0].id!r}"
        raise RefineError(f"{mine.name}: the two evaluations share no example ({seen}){where}")
    cut_otherwise = any(d.startswith("max_prompt_tokens ") for d in differences)
    for x, y in pairs:
        if reason := _other_question(x, y, cut_otherwise):
            raise RefineError(f"{mine.name}: the two evaluations cannot be paired: {reason} ({x.id}){where}; evaluate both alike")
    return pairs


def _other_question(a: Row, b: Row, cut_otherwise: bool) -> str:
    """Say why two answers of one id are not to the same question; empty where they are."""
    if a.question and b.question and a.question != b.question:
        return "their prompts, references or texts differ"
    if a.references != b.references:
        return "their references differ"
    if a.weight != b.weight or a.meta.get("tokens") != b.meta.get("tokens"):
        return "their documents are of different tokens"
    if cut_otherwise and _once_tokens(a) != _once_tokens(b):
        return "their prompts were cut to different lengths"
    return ""


def _once_tokens(row: Row) -> object:
    """Return the tokens of a prompt as it is read once, whether or not its context was read twice."""
    return row.meta.get("once_tokens", row.meta.get("prompt_tokens"))
