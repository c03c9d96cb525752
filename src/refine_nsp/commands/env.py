"""`refine-nsp env`: what is installed, which devices there are, and what computes each operation and why."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console

from refine_nsp.environment import devices, environment
from refine_nsp.ops.kernels import by_operation
from refine_nsp.report.tables import Cell, Table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> None:
    """Print the facts."""
    found: dict[str, Any] = environment()
    kernels = by_operation()
    if args.json:
        operations = {name: {"runs_on": runs_on, "why": why} for name, (runs_on, why) in kernels.items()}
        Console().print_json(json.dumps({"environment": found, "devices": devices(), "kernels": operations}))
        return
    facts: list[list[Cell]] = [[name, "-" if value is None else str(value)] for name, value in found.items() if name != "seed"]
    machines: list[list[Cell]] = [[*machine.values()] for machine in devices()]
    operations_rows: list[list[Cell]] = [[name, runs_on, why] for name, (runs_on, why) in kernels.items()]
    for table in (
        Table("Environment", ["what", "value"], facts),
        Table("Devices", ["device", "name", "memory", "bfloat16"], machines),
        Table("Kernels", ["operation", "runs on", "why"], operations_rows),
    ):
        Console().print(table.rich())
