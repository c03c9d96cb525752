"""Describe what can be given to each command, as the table of all commands holds it, and hold what was given.

`table.json` is made from the dataclasses that declare each command's settings (`refine_nsp.commands.table`). Running a command fills these
dataclasses with what was read by the table, so help, completion and behaviour cannot differ.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from refine_nsp.config import preset_settings
from refine_nsp.values import Accepted, Value, word_reader

TABLE = Path(__file__).with_name("table.json")
USAGE = 2  # exit code of a command line that cannot be read
NEW_RUN = "resume_from_checkpoint"  # a configuration that is kept describes a run from its beginning


@dataclass(frozen=True)
class Flag:
    """A setting as the command line shows it."""

    name: str
    kinds: tuple[str, ...]  # of the values it accepts, as `Accepted` has them
    choices: tuple[str, ...] = ()
    default: Value = None  # its value where neither a flag, a file nor a preset gives one
    required: bool = False  # there is no default
    help: str = ""
    read_by: str = ""  # what reads it, where that depends on other settings
    group: str = ""  # the heading it stands under
    common: bool = False  # shown by `--help`; others only by `--help_all`
    positional: bool = False  # it is given by a word without a flag
    bare: bool = False  # the flag alone means true
    file: bool = False  # it names a file or folder
    code: bool = False  # text that names code to import
    in_files: bool = False  # files of settings alone hold it
    foreign: bool = False  # it belongs to transformers' Trainer

    @property
    def accepts(self) -> Accepted:
        return Accepted(tuple(self.kinds), tuple(self.choices))

    @property
    def repeated(self) -> bool:
        """Tell whether it takes several words."""
        return any(kind.startswith("list") for kind in self.kinds)

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Add the flag to a parser of argparse, and the word without a flag that may stand for it."""
        read, several = word_reader(self.accepts), "+" if self.repeated else None
        if self.positional:
            choices = self.choices if self.required and self.choices else None
            words = several if self.required else "?"
            parser.add_argument(self.name, metavar=self.name, type=read, nargs=words, choices=choices, default=argparse.SUPPRESS)
            if self.required:
                return
        several, alone = ("?", True) if self.bare and not self.repeated else (several, None)
        parser.add_argument(
            *spellings(self.name), dest=self.name, type=read, nargs=several, const=alone, default=argparse.SUPPRESS
        )
        if self.default is True:
            parser.add_argument(*spellings(f"no_{self.name}"), dest=self.name, action="store_false", default=argparse.SUPPRESS)


@dataclass(frozen=True)
class CommandLine:
    """Declare what can be given to a command, as the table holds it."""

    name: str
    summary: str  # one sentence
    description: str  # a paragraph for its help
    flags: dict[str, Flag]  # by name; groups of the help are in their order
    methods: tuple[tuple[str, str | None], ...] = ()  # prefix and first preset of every `NSPConfig` among the settings
    exclusive: tuple[tuple[tuple[str, ...], bool], ...] = ()  # flags of which one may be given, and whether one must be
    fixed: Mapping[str, Value] = field(default_factory=dict)  # values that the command sets where others would take a default
    dry_run: bool = False  # it can show what it would do

    @property
    def program(self) -> str:
        """Return the words that start the command."""
        return f"refine-nsp {self.name}"

    @property
    def presets(self) -> list[str]:
        """Name the flags that choose presets."""
        return [f"{prefix}preset" for prefix, _ in self.methods]

    @property
    def defaults(self) -> dict[str, Value]:
        """Return every setting's default."""
        return {name: flag.default for name, flag in self.flags.items()}

    @property
    def own(self) -> dict[str, str]:
        """Flags that are about the command line itself, and their descriptions."""
        shown = {"config FILE": "YAML with any of these as keys, or the package's recipes/NAME.yaml; flags win."}
        if self.dry_run:
            shown["dry_run"] = "Show what would run, and touch nothing."
        if any(flag.code for flag in self.flags.values()):
            shown["allow_code_in_config"] = "Let the file of --config name code to import, such as a reward of yours."
        return shown | {"debug": "Show a traceback instead of one line when something is wrong."}

    def preset_values(self, given: Mapping[str, Value]) -> dict[str, Value]:
        """Return what the presets set that are given, or that the command starts from: defaults below the file and the flags."""
        values: dict[str, Value] = {}
        for prefix, usual in self.methods:
            name = given.get(f"{prefix}preset", usual)
            if name is not None:
                settings = preset_settings(str(name))
                values |= {f"{prefix}preset": name} | {prefix + setting: value for setting, value in settings.items()}
        return values

    def parser(self, names: Iterable[str] | None = None) -> Parser:
        """Return a parser of the command's flags, or of some; it gives no defaults."""
        made = Parser(prog=self.program, description=self.description, add_help=False, allow_abbrev=False)
        made.add_argument("--config", type=Path)
        for name in self.flags if names is None else names:
            if not self.flags[name].in_files:
                self.flags[name].add_to(made)
        return made


@dataclass(frozen=True)
class Call:
    """A command line that was read: plain values by the names of flags."""

    line: CommandLine
    given: dict[str, Value]  # what a preset, a file or a flag sets
    from_presets: dict[str, Value]
    dry_run: bool = False

    @property
    def values(self) -> dict[str, Value]:
        """Return every setting's value."""
        return self.line.defaults | self.given

    def changed(self) -> dict[str, Value]:
        """Return every setting that has another value than a command line without words would give it."""
        usual = self.line.defaults | self.line.preset_values({})
        return {name: value for name, value in self.values.items() if value != usual[name]}

    def resolved(self) -> dict[str, Value]:
        """Return every setting that differs from its default, with the preset or without: what `--config` needs for the same run, in a
        folder of its own, from its beginning."""
        usual = self.line.defaults | dict.fromkeys(self.line.presets)
        preset = self.line.defaults | self.from_presets
        return {k: v for k, v in self.values.items() if (v != usual[k] or v != preset[k]) and k != NEW_RUN}


class Parser(argparse.ArgumentParser):
    """argparse's parser, which says what is wrong in one line as all our errors are; its usage is for --help."""

    def error(self, message: str) -> NoReturn:
        refuse(self.prog, message)


def refuse(program: str, message: str) -> NoReturn:
    """End because flags cannot be read."""
    text = " ".join(message.split())
    sys.stderr.write(f"refine-nsp: {text if len(text) <= 600 else text[:600] + '…'}; `{program} --help` explains the flags\n")
    raise SystemExit(USAGE)


def spellings(name: str) -> list[str]:
    """Return a flag with underscores, and with hyphens where these differ."""
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


@lru_cache
def commands() -> dict[str, CommandLine]:
    """Read the table: every command by its name."""
    return {name: command_line(name, row) for name, row in json.loads(TABLE.read_text(encoding="utf-8"))["commands"].items()}


def command_line(name: str, row: Mapping[str, Any]) -> CommandLine:
    """Return a row of the table as the records above."""
    return CommandLine(name, **{**row, "flags": {flag: Flag(flag, **given) for flag, given in row["flags"].items()}})
