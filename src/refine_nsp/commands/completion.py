"""`refine-nsp completion SHELL`: a script for the shell, so that Tab completes commands, flags, choices and files.

The script is plain text, made once from the parsers: completing starts no Python. Keep it in a file, since making it loads all libraries.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import shtab

from refine_nsp.commands import COMMANDS, FROM_DATACLASSES

SHELLS = ("bash", "zsh", "fish")
# Text that names a file or folder; what is declared as a Path needs no word here.
FILES = (
    "config dataset_name documents essays file hotpotqa longbench model output output_dir prompts squad short_context validation_dataset"
).split()
FILE_ENDINGS = ("_file", "_path")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "shell", choices=SHELLS, help="bash: refine-nsp completion bash > ~/.refine-nsp.bash, and source that file in ~/.bashrc"
    )


def run(args: argparse.Namespace) -> None:
    """Write the script to standard output."""
    sys.stdout.write(shtab.complete(whole_parser(), args.shell) + "\n")


def whole_parser() -> argparse.ArgumentParser:
    """Every command with its flags as argparse has them, to be read and not to be parsed with."""
    whole = argparse.ArgumentParser(prog="refine-nsp")
    commands = whole.add_subparsers(dest="command")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, conflict_handler="resolve")
        command.add_argument("--debug", action="store_true", help="a traceback instead of one line when something is wrong")
        module = importlib.import_module(f"refine_nsp.commands.{name}")
        if name in FROM_DATACLASSES:
            _add_options(command, module.options_of())
        else:
            module.add_arguments(command)
        for action in command._actions:
            if action.type is Path or action.dest in FILES or action.dest.endswith(FILE_ENDINGS):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    return whole


def _add_options(command: argparse.ArgumentParser, options: Any) -> None:
    for own in ("help_all", "dry_run", "allow_code_in_config"):
        command.add_argument(f"--{own}", action="store_true")
    command.add_argument("--config", help="YAML with any of these as keys; flags win")
    for name, action in options.actions.items():
        if name in options.choices:  # elsewhere the dataclass checks them
            action.choices = [str(c) for c in options.choices[name] if c is not None]
        if name in options.docs:
            action.help = options.docs[name].replace("%", "%%")  # argparse fills in what stands behind a single one
        action.option_strings = [s for s in action.option_strings if "-" not in s[2:]]  # one spelling of two
        command._add_action(action)
