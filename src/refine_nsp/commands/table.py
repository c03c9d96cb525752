"""Write the table that command lines are read by: `python -m refine_nsp.commands.table`, or `make table`.

Importing all commands takes seconds, which an answer to `--help` should not. A test holds the table equal to the dataclasses.
"""

from __future__ import annotations

import importlib
import json
from importlib.metadata import version
from typing import Any

from refine_nsp.commands import NAMES
from refine_nsp.commands.command_line import TABLE
from refine_nsp.commands.grammar import Command
from refine_nsp.files import write_atomically


def table() -> dict[str, Any]:
    """Describe every command, by name. transformers: the release whose Trainer's settings are among them."""
    found: dict[str, Command] = {name: importlib.import_module(f"refine_nsp.commands.{name}").COMMAND for name in NAMES}
    made = {"transformers": version("transformers"), "commands": {name: command.row() for name, command in found.items()}}
    return dict(json.loads(json.dumps(made)))


def as_text(made: dict[str, Any]) -> str:
    """Return the table as JSON with a flag a line, so that a change of one flag is a change of one line."""
    commands = []
    for name, row in made["commands"].items():
        flags = ",\n".join(f"  {json.dumps(flag)}: {json.dumps(told)}" for flag, told in row["flags"].items())
        rest = json.dumps({key: value for key, value in row.items() if key != "flags"})
        commands.append(f'{json.dumps(name)}: {rest[:-1]}, "flags": {{\n{flags}\n}}}}')
    return f'{{"transformers": {json.dumps(made["transformers"])}, "commands": {{\n' + ",\n".join(commands) + "\n}}\n"


if __name__ == "__main__":
    write_atomically(TABLE, as_text(table()))
