"""Make the section on carried states in docs/results.md from the kept figures of its jobs (`benchmarks/carried_study.py`)."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from scipy import stats

from refine_nsp.errors import RefineError
from refine_nsp.files import write_atomically
from refine_nsp.report import plots
from refine_nsp.report.tables import Cell, Table

from .settings import BASES
from .tables import HALF, MEAN, difference, paired, spread

WINDOW, SPAN, LANES = 1024, 8, 8  # tokens; windows that are measured; rows of a step
NEEDLE_WINDOWS = (2, 4, 8)
RECORD = Path(__file__).resolve().parent / "records" / "carried.json.gz"
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "results.md"
PICTURE = "carried_states.svg"
TITLE, NEXT = "Carried states", "\n\n## Reading twice\n"
BASE, WINDOWS, CARRIED, FULL = "base", "windows", "carried", "full"
# Settings of a ReFINEConfig; all arms read the same tokens in a step.
ARMS: dict[str, dict[str, Any]] = {
    WINDOWS: {"max_length": WINDOW, "per_device_train_batch_size": LANES},
    CARRIED: {"max_length": WINDOW, "per_device_train_batch_size": LANES, "carry_states": True},
    FULL: {"max_length": SPAN * WINDOW, "per_device_train_batch_size": 1},
}
IN_BOTH_WAYS = (WINDOWS, CARRIED)  # are read in windows too
CONTRASTS = ((CARRIED, WINDOWS), (CARRIED, FULL), (FULL, WINDOWS))  # the first is tested, the others are described
Figures = dict[str, Any]


def name_of(kind: str, *arguments: Any) -> str:
    """Name a job, as its file is called."""
    return "-".join(str(part).replace(" ", "_") for part in (kind, *arguments))


class Record:
    """Read kept figures. seeds: those whose arms are all trained. asked, windowed: those that have all needles, or were read in
    windows too."""

    def __init__(self, path: Path) -> None:
        held = json.loads(gzip.decompress(path.read_bytes()))
        self.settings, self.jobs = held["settings"], held["jobs"]
        self.seeds = self._whole("train", tuple(ARMS))
        self.asked = self._whole("needles", (BASE, *ARMS))
        self.windowed = self._whole("windowed", IN_BOTH_WAYS)
        if not self.seeds:
            raise RefineError("no seed has all of its arms yet, so there is no table; run it again without --so_far")

    def _whole(self, kind: str, arms: Sequence[str]) -> list[int]:
        """List the seeds of which every base and arm has left figures."""
        seeds = sorted({int(name.rsplit("-", 1)[1]) for name in self.jobs if name.startswith(f"{kind}-")})
        return [s for s in seeds if all(name_of(kind, base, arm, s) in self.jobs for base in BASES for arm in arms)]

    def losses(self, base: str, arm: str, seed: int) -> list[float]:
        """Return the loss in each stretch of WINDOW positions, a mean over the held-out novels."""
        return mean_by_position(self.jobs[name_of("train", base, arm, seed)]["one_pass"])

    def contrast(self, arm: str, other: str, of: Callable[[list[float]], float]) -> dict[str, list[float]]:
        """Compute arm - other by seed, of `MEAN` and of each base. of: the figure that losses by position give."""
        found = {base: paired(*([of(self.losses(base, a, seed)) for seed in self.seeds] for a in (arm, other))) for base in BASES}
        return {MEAN: [mean(x) for x in zip(*found.values(), strict=True)], **found}


def mean_by_position(novels: Sequence[Sequence[float]]) -> list[float]:
    return [mean(losses) for losses in zip(*novels, strict=True)]


def beyond(losses: Sequence[float]) -> float:
    """Return the primary outcome, the mean loss from position WINDOW on."""
    return mean(losses[1:])


def within(losses: Sequence[float]) -> float:
    return losses[0]


# --- tables -----------------------------------------------------------------------------------------------------------


def gain_table(record: Record) -> Table:
    """Tabulate what there was to be gained: the untouched bases in one pass and in windows."""
    rows: list[list[Cell]] = []
    for base in BASES:
        figures = record.jobs[name_of("base", base)]
        one_pass, windows = (mean_by_position(figures[key]) for key in ("one_pass", "windows"))
        rows += [
            [base, "one pass", *(f"{x:.3f}" for x in one_pass)],
            ["", "one pass - windows", *map("{:+.3f}".format, paired(one_pass, windows))],
        ]
    note = f"a stretch of {SPAN * WINDOW} tokens of each of 8 novels; windows of {WINDOW}, the first half only context"
    return Table("Something to gain: loss of held-out novels before training", ["", "", *positions()], rows, [note])


def positions() -> list[str]:
    """Name the stretches of positions, in windows."""
    return ["0 to W", "W to 2W", *(f"{i}W to {i + 1}W" for i in range(2, SPAN))]


def outcome_table(record: Record) -> tuple[Table, str]:
    """Tabulate the test decided beforehand and the described differences, and say the test's outcome in a sentence."""
    rows: list[list[Cell]] = []
    p = stats.ttest_1samp(record.contrast(CARRIED, WINDOWS, beyond)[MEAN], 0.0).pvalue if len(record.seeds) > 1 else float("nan")
    for title, of in ((f"W to {SPAN}W", beyond), ("within W", within)):
        for i, (arm, other) in enumerate(CONTRASTS):
            tested = i == 0 and of is beyond
            found = record.contrast(arm, other, of)
            rows.append([title, f"{arm} - {other}", *map(difference, found.values()), f"{p:.4f}" if tested else ""])
    note = (
        f"nats, {len(record.seeds)} seeds; {HALF}; p: paired t-test over seeds, of the one difference that was decided beforehand"
    )
    shown = difference(record.contrast(CARRIED, WINDOWS, beyond)[MEAN])
    verdict = "significant" if p < 0.05 else "not significant"
    where = f"from position {WINDOW} to {SPAN * WINDOW}"
    sentence = f"Loss of held-out novels {where}, {CARRIED} - {WINDOWS}: {shown} nats (p = {p:.3f}, {verdict} at 5 %)."
    return Table("Loss of held-out novels, differences", ["positions", "", MEAN, *BASES, "p"], rows, [note]), sentence


def positions_table(record: Record) -> Table:
    """Tabulate the loss by position, the growth of states and the time of a step for each base and arm."""
    rows: list[list[Cell]] = []
    for base in BASES:
        for arm in ARMS:
            jobs = [record.jobs[name_of("train", base, arm, seed)] for seed in record.seeds]
            losses = mean_by_position([record.losses(base, arm, seed) for seed in record.seeds])
            growth, seconds = (spread([job[key] for job in jobs]) for key in ("growth", "seconds"))
            rows.append([base, arm, *(f"{x:.3f}" for x in losses), growth, seconds])
    note = (
        f"means over seeds, ± standard deviations; growth: the norm of the states after {SPAN}W over that after W (LaCT keeps the norms of "
        "its fast weights)"
    )
    columns = ["", "", *positions(), "growth", "processor seconds a step"]
    return Table("Loss of held-out novels after training, by position", columns, rows, [note])


def ways_table(record: Record) -> Table | None:
    """Tabulate the loss from W on in one pass and in windows; the difference is what far text is worth. None where it was not measured."""
    rows: list[list[Cell]] = []
    for base in BASES if record.windowed else ():
        for arm in IN_BOTH_WAYS:
            one_pass = [beyond(record.losses(base, arm, seed)) for seed in record.windowed]
            windows = [beyond(mean_by_position(record.jobs[name_of("windowed", base, arm, seed)])) for seed in record.windowed]
            rows.append([base, arm, spread(one_pass), spread(windows), difference(paired(one_pass, windows))])
    note = f"not in the plan; {len(record.windowed)} seeds; a window's first half is context only; {HALF}"
    columns = ["", "", "one pass", "in windows of W", "one pass - windows"]
    return Table(f"Loss of held-out novels from W to {SPAN}W, read in two ways", columns, rows, [note]) if rows else None


def needles_table(record: Record) -> Table | None:
    """Tabulate RULER's needles, the mean of its eight tasks; None where no seed has all of them."""
    rows: list[list[Cell]] = []
    for base in BASES if record.asked else ():
        for arm in (BASE, *ARMS):
            jobs = [record.jobs[name_of("needles", base, arm, seed)] for seed in record.asked]
            cells = [[mean(task[str(n * WINDOW)] for task in job.values()) for job in jobs] for n in NEEDLE_WINDOWS]
            rows.append([base, arm, *(spread(values, True) for values in cells)])
    count = record.settings["needles"]
    note = f"mean of 8 tasks, {count} prompts a task, length and seed, {len(record.asked)} seeds; ± standard deviation over seeds"
    columns = ["", "", *(f"{n * WINDOW} tokens" for n in NEEDLE_WINDOWS)]
    return Table("RULER's needles, % right, greedy", columns, rows, [note]) if rows else None


def drawing(record: Record) -> plots.Plot:
    """Draw carried - windows and full - windows by position, for each base."""
    curves = {}
    for arm in (CARRIED, FULL):
        for base in BASES:
            losses = [mean_by_position([record.losses(base, a, seed) for seed in record.seeds]) for a in (arm, WINDOWS)]
            curves[f"{base}, {arm} - {WINDOWS}"] = ([(i + 0.5) * WINDOW for i in range(SPAN)], paired(*losses))
    return plots.line_plot(curves, "Loss of held-out novels: difference in nats", "position, tokens")


# --- the section ------------------------------------------------------------------------------------------------------


def introduction(record: Record) -> str:
    """Say what was done, and how."""
    s = record.settings
    made = ", ".join(f"{key} {value}" for key, value in s["made"].items())
    W, span = s["window"], s["span"]
    return f"""Planned in [benchmarks/study/carried_plan.md](../benchmarks/study/carried_plan.md), with its changes before any arm was run;
`python benchmarks/carried_study.py`, one thread ({made}).
{s["steps"]} steps of {s["lanes"]} x {W} tokens (W = {W}) of next-token prediction from the shipped bases, half the documents
novels, half generated, each {2 * span}W long: `{WINDOWS}` that each start from nothing, `{CARRIED}` in lanes, and `{FULL}` rows of
{span}W. All arms of a seed read the same targets in any {span} steps. Held-out novels are read in one pass.
"""


def section(record: Record, picture: str) -> str:
    """Write the section as Markdown, heading included. picture: where its plot is, as seen from the document."""
    test, sentence = outcome_table(record)
    found = [test, positions_table(record), gain_table(record), ways_table(record), needles_table(record)]
    tables = [table for table in found if table is not None]
    head = f"\n\n## {TITLE}\n\n{introduction(record)}\n**{sentence}**\n\n![{drawing(record).title}]({picture})\n\n"
    return head + "\n".join(table.markdown() for table in tables)


def write(record: Path, document: Path) -> str:
    """Put the section and its plot into the document, in the place of an earlier one or before the next; return the section."""
    held = Record(record)
    picture = write_atomically(document.parent / document.stem / PICTURE, drawing(held).svg())
    written = section(held, f"{document.stem}/{picture.name}")
    before, _, after = document.read_text(encoding="utf-8").partition(NEXT)
    before = before.partition(f"\n\n## {TITLE}\n")[0].rstrip()
    write_atomically(document, before + written + NEXT + after)
    return written
