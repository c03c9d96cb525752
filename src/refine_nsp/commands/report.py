"""`refine-nsp report RUN...`: one self-contained page that compares runs."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of runs")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="the page to write [report.html]")


def run(args: argparse.Namespace) -> None:
    from rich.console import Console

    from refine_nsp.report.runs import report

    Console().print(f"page: {report(args.runs, args.output)}")
