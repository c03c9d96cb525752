"""`refine-nsp completion SHELL`: write a script for the shell, so that Tab completes commands, flags, choices and files.

The script is plain text, made from the table of all commands: neither making it nor completing loads a library.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Literal

import shtab

from refine_nsp.commands.command_line import Call, Flag, commands
from refine_nsp.commands.grammar import Command, Settings


@dataclass
class CompletionArguments:
    """Name the shell to write a script for.

    Attributes:
        shell: bash: `refine-nsp completion bash > ~/.refine-nsp.bash`, and source that file in ~/.bashrc.
    """

    shell: Literal["bash", "zsh", "fish"]


COMMAND = Command(
    "Write a script for bash, zsh or fish that completes commands, flags and choices.",
    (Settings(CompletionArguments),),
    positional=("shell",),
)


def run(call: Call, arguments: CompletionArguments) -> None:
    """Write the script to standard output."""
    sys.stdout.write(shtab.complete(whole_parser(), arguments.shell) + "\n")


def whole_parser() -> argparse.ArgumentParser:
    """Return every command with its flags as argparse has them, to be read by shtab and not to be parsed with."""
    whole = argparse.ArgumentParser(prog="refine-nsp")
    parsers = whole.add_subparsers(dest="command")
    for name, line in commands().items():
        command = parsers.add_parser(name, help=_text(line.summary), conflict_handler="resolve")
        for head, text in (line.own | {"help_all": "Show all flags."}).items():
            action = "store" if " " in head else "store_true"
            _complete_files(command.add_argument(f"--{head.split()[0]}", help=_text(text), action=action), " " in head)
        for flag in line.flags.values():
            _add(command, flag)
    return whole


def _add(command: argparse.ArgumentParser, flag: Flag) -> None:
    """Add a flag in one of its two spellings, and the word without a flag that may stand for it."""
    text, choices, several = _text(flag.help), flag.choices or None, "+" if flag.repeated else None
    if flag.positional:
        nargs = several if flag.required or flag.repeated else "?"
        _complete_files(command.add_argument(flag.name, help=text, choices=choices, nargs=nargs), flag.file)
    if not flag.in_files and not (flag.positional and flag.required):
        nargs = "?" if flag.bare else several
        _complete_files(command.add_argument(f"--{flag.name}", help=text, choices=choices, nargs=nargs), flag.file)


def _complete_files(action: argparse.Action, names_a_file: bool) -> None:
    if names_a_file:
        action.complete = shtab.FILE  # type: ignore[attr-defined]


def _text(text: str) -> str:
    """Return help as argparse takes it: it fills in what stands behind a single percent sign."""
    return text.replace("%", "%%")
