"""`refine-nsp report RUN...`: write one self-contained page that compares runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from refine_nsp.commands.grammar import Call, Command, Settings
from refine_nsp.report.runs import report


@dataclass
class ReportArguments:
    """Name the runs to compare.

    Attributes:
        runs: output folders of runs.
        output: the page to write.
    """

    runs: list[Path]
    output: Path = Path("report.html")


COMMAND = Command("Write one HTML page that compares runs.", (Settings(ReportArguments),), positional=("runs",))


def run(call: Call, arguments: ReportArguments) -> None:
    """Write the page and name it."""
    Console().print(f"page: {report(arguments.runs, arguments.output)}")
