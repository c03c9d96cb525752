"""`refine-nsp env`: show what is installed, which devices there are, and what computes each operation and why."""

from __future__ import annotations

import json
from dataclasses import dataclass

from rich.console import Console

from refine_nsp.commands.grammar import Call, Command, Settings
from refine_nsp.environment import devices, environment
from refine_nsp.ops.kernels import by_operation
from refine_nsp.report.tables import Cell, Table


@dataclass
class EnvArguments:
    """Choose the form of the answer.

    Attributes:
        json: print JSON instead of tables.
    """

    json: bool = False


COMMAND = Command(
    "Show what is installed, which devices there are, and what computes each operation and why.", (Settings(EnvArguments),)
)


def run(call: Call, arguments: EnvArguments) -> None:
    """Print the facts."""
    found, kernels = environment(), by_operation()
    if arguments.json:
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
