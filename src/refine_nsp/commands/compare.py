"""Compare two evaluations example by example: differences with intervals and significance."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Path, help="output_dir of the first `refine-nsp evaluate`")
    parser.add_argument("b", type=Path, help="output_dir of the second; differences are b - a")
    parser.add_argument("--output", type=Path, help="also write the table there (.html: a page, else Markdown)")


def run(args: argparse.Namespace) -> None:
    """Print the paired comparison of every task the two have in common."""
    from refine_nsp.evaluation.run import read_results
    from refine_nsp.files import write_atomically
    from refine_nsp.report import html
    from refine_nsp.report.evaluation import compare_results, comparison_table

    comparisons = compare_results(read_results(args.a), read_results(args.b))
    table = comparison_table(comparisons, (args.a.name, args.b.name))
    Console().print(table.rich())
    if args.output is not None:
        page = html.page("Comparison", table.title, [html.Section("Differences", table.html())])
        write_atomically(args.output, page if args.output.suffix == ".html" else table.markdown())
