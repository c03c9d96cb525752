"""`refine-nsp check MODEL` says what holds of a model's states, pads, packed documents and gradients, before it is trained."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

from rich.console import Console

from refine_nsp.commands.grammar import Call, Command, Settings
from refine_nsp.commands.shared import DEFAULT_MODEL
from refine_nsp.errors import RefineError, closest
from refine_nsp.fields import check_read, setting
from refine_nsp.models.checks.doctor import Diagnosis, Finding, diagnose
from refine_nsp.models.checks.lines import LINES
from refine_nsp.models.load import load_as_it_is, load_model
from refine_nsp.processes import to_device
from refine_nsp.progress import step_progress
from refine_nsp.report.tables import Cell, Table

NAMES = tuple(line.name for line in LINES)


@dataclass
class CheckArguments:
    """Name the model, and how closely it is looked at.

    Attributes:
        model_name_or_path: a shipped model, a folder or a hub name.
        quick: leave out the dearer checks, read fewer tokens, and ask one line alone in float64.
        with_states: check the model as this library calls it, with its states, instead of as transformers does.
        json: print JSON instead of a table.
        dtype: of the weights (float32, bfloat16); default: the checkpoint's.
        tokens: length of the sequences that are read; default: 96, or 20 with quick.
        only: names of the checks to run, as JSON has them; default: all.
    """

    model_name_or_path: str = setting(DEFAULT_MODEL, common=True)
    quick: bool = setting(False, common=True)
    with_states: bool = setting(False, common=True)
    json: bool = setting(False, common=True)
    dtype: str | None = setting(None)
    tokens: int | None = setting(None)
    only: list[str] | None = setting(None)

    def __post_init__(self) -> None:
        check_read(self)
        for name in self.only or ():
            if name not in NAMES:
                raise RefineError(f"no check {name!r}{closest(name, NAMES)}; there are {', '.join(NAMES)}")


COMMAND = Command(
    "Check what holds of a model: states, pads, packed documents, gradients, generation; exit code 1 where something fails.",
    (Settings(CheckArguments),),
    description="Any causal model that transformers loads: refine-nsp check MODEL --quick",
    positional=("model_name_or_path",),
)


def run(call: Call, arguments: CheckArguments) -> None:
    """Print what was found, and exit with code 1 where something fails."""
    load = load_model if arguments.with_states else load_as_it_is
    model = to_device(load(arguments.model_name_or_path, arguments.dtype))
    only = arguments.only or ()
    with step_progress(len(only or NAMES), title="check", quiet=arguments.json) as progress:
        found = diagnose(
            model, quick=arguments.quick, tokens=arguments.tokens, only=only, progress=lambda title: progress.advance(0)
        )
    if arguments.json:
        sys.stdout.write(json.dumps({"name": arguments.model_name_or_path} | found.as_json(), indent=1) + "\n")
    else:
        show(found, arguments.model_name_or_path)
    if found.failed:
        raise SystemExit(1)


def show(found: Diagnosis, name: str) -> None:
    """Print the table, then what each failure means and what to do."""
    console = Console(markup=False, highlight=False)
    console.print(table(found, name).rich())
    whys: dict[str, list[str]] = {}
    for finding in found.findings:
        if finding.status == "skipped":
            whys.setdefault(finding.why, []).append(finding.title)
    for why, titles in whys.items():
        console.print(f"not asked ({why}): {'; '.join(titles)}")
    for finding in found.failed:
        console.print(f"\nfails: {finding.title}{f' ({finding.why})' if finding.why else ''}")
        console.print(f"  for training: {finding.means}\n  what to do: {finding.mend}")


def table(found: Diagnosis, name: str) -> Table:
    """Lay the findings out. Errors are shares of what was expected."""
    rows = [row(finding) for finding in found.findings]
    asked = sum(f.status != "skipped" for f in found.findings)
    counts = f"{asked - len(found.failed)} of {asked} hold, {len(rows) - asked} do not apply or were left out"
    notes = [f"{counts}; {found.seconds:.1f} s", *found.notes]
    return Table(f"{name}: {found.model}, {found.dtype}", ["what", "", "error", "rounding", "float64"], rows, notes)


def row(finding: Finding) -> list[Cell]:
    """Write a finding as a row."""
    figures = ["" if x is None else f"{x:.0e}" if x else "0" for x in (finding.error, finding.rounding, finding.error_in_float64)]
    word = {"holds": "yes", "fails": "NO", "skipped": "-"}[finding.status]
    return [finding.title, word, *figures]
