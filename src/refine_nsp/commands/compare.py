"""`refine-nsp compare`: compare evaluations example by example."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from refine_nsp.commands.grammar import Call, Command, Settings
from refine_nsp.evaluation.run import read_results, read_settings
from refine_nsp.files import write_atomically
from refine_nsp.report import html
from refine_nsp.report.evaluation import comparison_tables
from refine_nsp.report.runs import names_of


@dataclass
class CompareArguments:
    """Name the evaluations to compare.

    Attributes:
        a: output_dir of the `refine-nsp evaluate` that the others are compared with.
        b: output_dir of another, or of several; differences are b - a.
        output: also write the tables there (.html: a page, else Markdown).
    """

    a: Path
    b: list[Path]
    output: Path | None = None


COMMAND = Command(
    "Compare evaluations example by example: differences with intervals and significance.",
    (Settings(CompareArguments),),
    positional=("a", "b"),
)


def run(call: Call, arguments: CompareArguments) -> None:
    """Print the paired comparison of every task that each has in common with the first."""
    folders = [arguments.a, *arguments.b]
    names = names_of(folders)
    tables = comparison_tables([read_results(f) for f in folders], names, [read_settings(f) for f in folders])
    for table in tables:
        Console().print(table.rich())
    if arguments.output is not None:
        text = "\n".join(t.markdown() for t in tables)
        if arguments.output.suffix == ".html":
            differences = html.Section("Differences", "".join(t.html() for t in tables[:-1]))
            sections = [differences, html.Section("Figures", tables[-1].html())]
            text = html.page("Comparison", f"{', '.join(names[1:])} against {names[0]}", sections)
        write_atomically(arguments.output, text)
