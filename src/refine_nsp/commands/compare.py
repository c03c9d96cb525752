"""Compare evaluations example by example: differences with intervals and significance."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Path, help="output_dir of the `refine-nsp evaluate` that the others are held against")
    parser.add_argument("b", type=Path, nargs="+", help="output_dir of another, or of several; differences are b - a")
    parser.add_argument("--output", type=Path, help="also write the tables there (.html: a page, else Markdown)")


def run(args: argparse.Namespace) -> None:
    """Print the paired comparison of every task that each has in common with the first."""
    from refine_nsp.evaluation.run import read_results, read_settings
    from refine_nsp.files import write_atomically
    from refine_nsp.report import html
    from refine_nsp.report.evaluation import comparison_tables
    from refine_nsp.report.runs import names_of

    folders = [args.a, *args.b]
    names = names_of(folders)
    tables = comparison_tables([read_results(f) for f in folders], names, [read_settings(f) for f in folders])
    for table in tables:
        Console().print(table.rich())
    if args.output is not None:
        sections = [
            html.Section("Differences", "".join(t.html() for t in tables[:-1])),
            html.Section("Figures", tables[-1].html()),
        ]
        page = html.page("Comparison", f"{', '.join(names[1:])} against {names[0]}", sections)
        write_atomically(args.output, page if args.output.suffix == ".html" else "\n".join(t.markdown() for t in tables))
