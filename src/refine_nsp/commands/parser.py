"""Read a command line, and print help, from the table of all commands: without torch, transformers or any command's own module.

`table.json` is made from the dataclasses that declare each command's settings (`refine_nsp.commands.table`). Running a command fills these
dataclasses with what was read here, so help, completion and behaviour cannot differ.
Flags win over the file of `--config`, the file over a preset.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from refine_nsp.config import NSPConfig, check_choice, preset_settings
from refine_nsp.errors import RefineError, closest
from refine_nsp.values import Accepted, Value, word_reader

TABLE = Path(__file__).with_name("table.json")
# The first place is a wheel's, the second a checkout's.
RECIPES = (Path(__file__).resolve().parents[1] / "recipes", Path(__file__).resolve().parents[3] / "recipes")
USAGE = 2  # exit code of a command line that cannot be read
NEW_RUN = "resume_from_checkpoint"  # a configuration that is kept describes a run from its beginning
HELP = ("--help", "-h", "--help_all")
KINDS = {"text": "TEXT", "path": "FILE", "int": "INT", "number": "NUMBER", "bool": "BOOL"}
MARGIN, WIDTH = 38, 130  # columns of help before the descriptions, and in all


@dataclass(frozen=True)
class Flag:
    """A setting as the command line shows it.

    Attributes:
        kinds, choices: the values it accepts, as `Accepted` has them.
        default: its value where neither a flag, a file nor a preset gives one. required: there is no default.
        help: its description. read_by: what reads it, where that depends on other settings.
        group: the heading it stands under. common: shown by `--help`; others only by `--help_all`.
        positional: it is given by a word without a flag. bare: the flag alone means true. file: it names a file or folder.
        code: text that names code to import. in_files: files of settings alone hold it. foreign: it belongs to transformers' Trainer.
    """

    name: str
    kinds: tuple[str, ...]
    choices: tuple[str, ...] = ()
    default: Value = None
    required: bool = False
    help: str = ""
    read_by: str = ""
    group: str = ""
    common: bool = False
    positional: bool = False
    bare: bool = False
    file: bool = False
    code: bool = False
    in_files: bool = False
    foreign: bool = False

    @property
    def accepts(self) -> Accepted:
        """Its values."""
        return Accepted(tuple(self.kinds), tuple(self.choices))

    @property
    def repeated(self) -> bool:
        """Whether it takes several words."""
        return any(kind.startswith("list") for kind in self.kinds)

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Add the flag to a parser of argparse, and the word without a flag that may stand for it."""
        several: dict[str, Any] = {"type": word_reader(self.accepts)}
        if self.positional:
            choices = {"choices": list(self.choices)} if self.required and self.choices else {}
            how = ("+" if self.repeated else None) if self.required else "?"
            parser.add_argument(self.name, metavar=self.name, nargs=how, default=argparse.SUPPRESS, **several, **choices)  # type: ignore[arg-type]
        if self.positional and self.required:
            return
        if self.repeated or self.bare:
            several |= {"nargs": "+"} if self.repeated else {"nargs": "?", "const": True}
        parser.add_argument(*spellings(self.name), dest=self.name, default=argparse.SUPPRESS, **several)
        if self.default is True:
            parser.add_argument(*spellings(f"no_{self.name}"), dest=self.name, action="store_false", default=argparse.SUPPRESS)


@dataclass(frozen=True)
class CommandLine:
    """What can be given to a command, as the table holds it.

    Attributes:
        name: the command's. summary: one sentence. description: a paragraph for its help.
        flags: by name. groups of the help are in their order.
        methods: prefix and first preset of every `NSPConfig` among the settings.
        exclusive: flags of which one may be given, and whether one must be.
        fixed: values that the command sets where others would take a default. dry_run: it can show what it would do.
    """

    name: str
    summary: str
    description: str
    flags: dict[str, Flag]
    methods: tuple[tuple[str, str | None], ...] = ()
    exclusive: tuple[tuple[tuple[str, ...], bool], ...] = ()
    fixed: Mapping[str, Value] = field(default_factory=dict)
    dry_run: bool = False

    @property
    def program(self) -> str:
        """The words that start the command."""
        return f"refine-nsp {self.name}"

    @property
    def presets(self) -> list[str]:
        """The flags that name presets."""
        return [f"{prefix}preset" for prefix, _ in self.methods]

    @property
    def defaults(self) -> dict[str, Any]:
        """Every setting's default."""
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
    """A command line that was read: plain values by the names of flags.

    Attributes:
        given: what a preset, a file or a flag sets. values: the same over the defaults. from_presets: what the presets set.
    """

    line: CommandLine
    given: dict[str, Any]
    from_presets: dict[str, Any]
    dry_run: bool = False

    @property
    def values(self) -> dict[str, Any]:
        """Every setting's value."""
        return self.line.defaults | self.given

    def changed(self) -> dict[str, Any]:
        """Return every setting that has another value than a command line without words would give it."""
        usual = self.line.defaults | _preset_values(self.line, {})
        return {name: value for name, value in self.values.items() if value != usual[name]}

    def resolved(self) -> dict[str, Any]:
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
    rows = json.loads(TABLE.read_text(encoding="utf-8"))["commands"]
    return {name: command_line(name, row) for name, row in rows.items()}


def command_line(name: str, row: Mapping[str, Any]) -> CommandLine:
    """Return a row of the table as the records above."""
    return CommandLine(name, **{**row, "flags": {flag: Flag(flag, **given) for flag, given in row["flags"].items()}})


# --- reading ----------------------------------------------------------------------------------------------------------
def parse(line: CommandLine, argv: Sequence[str]) -> Call:
    """Read a command's words. Prints help and ends where it is asked for.

    Raises:
        RefineError: an unknown flag or key, a value that is none of the choices, two settings of which one may be given, or settings of
            the method that it refuses.
        SystemExit: a value of another type, or one that is missing.
    """
    words = _spelled_out(line, argv)
    asked = {*HELP} & {*words}
    # Help is given whatever else is wrong with the command line.
    parser = line.parser(line.presets if asked else None)
    for name in ("dry_run", "allow_code_in_config", "help", "help_all"):
        if name.startswith("help") or name in line.own:
            parser.add_argument(*spellings(name), *(["-h"] if name == "help" else []), dest=f"{name} ", action="store_true")
    namespace, unknown = parser.parse_known_args(words)
    flags = vars(namespace)
    own = {name: flags.pop(f"{name} ", False) for name in ("dry_run", "allow_code_in_config", "help", "help_all")}
    path = flags.pop("config")
    from_file = read_config(line, path) if path is not None else {}
    if not own["allow_code_in_config"]:
        _refuse_code(line, path, from_file)
    from_presets = _preset_values(line, from_file | flags)
    if asked:
        sys.stdout.write(help_text(line, own["help_all"], from_presets | from_file))
        raise SystemExit(0)
    _refuse_unknown(line, unknown)
    for name, value in flags.items():
        if line.flags[name].repeated and "text" in line.flags[name].kinds and len(value) == 1:
            flags[name] = value[0]  # one name and a list of one mean the same, and the plain one reads better
    call = Call(line, {**line.fixed, **from_presets, **from_file, **flags}, from_presets, own["dry_run"])
    _check(call)
    return call


def _spelled_out(line: CommandLine, argv: Sequence[str]) -> list[str]:
    """Return the words with `--flag` as `--flag=true` where no truth value follows, so that a flag never takes a MODEL behind it."""
    bare = {s for flag in line.flags.values() if flag.kinds[0] == "bool" and flag.bare for s in spellings(flag.name)}
    truths = {"true", "false", "yes", "no", "on", "off", "1", "0", "t", "f", "y", "n", "none", "null"}
    takes_words = any(flag.positional for flag in line.flags.values())
    return [
        f"{word}=true" if takes_words and word in bare and [*argv, ""][i + 1].lower() not in truths else word
        for i, word in enumerate(argv)
    ]


def _refuse_unknown(line: CommandLine, unknown: Sequence[str]) -> None:
    """RefineError for the first word that no flag takes, naming the nearest."""
    for word in unknown:
        name = word.lstrip("-").partition("=")[0]
        if name in line.flags:
            raise RefineError(f"{name} is given in a file of settings (--config), and has no flag")
        if word.startswith("-"):
            known = [*line.flags, *(own.split()[0] for own in line.own)]
            raise RefineError(f"unknown flag --{name}{closest(name, known)}; `{line.program} --help_all` lists all")
        raise RefineError(f"unexpected argument {word!r}")


def _preset_values(line: CommandLine, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the presets set: defaults below the file and the flags."""
    values: dict[str, Any] = {}
    for prefix, usual in line.methods:
        name = given.get(f"{prefix}preset", usual)
        if name is not None:
            values |= {f"{prefix}preset": name} | {prefix + setting: value for setting, value in preset_settings(name).items()}
    return values


def _check(call: Call) -> None:
    """RefineError for what can be known to be wrong before a library is loaded."""
    for name, value in call.given.items():
        flag = call.line.flags[name]
        known = name not in call.line.presets and isinstance(value, str) and (not flag.foreign or _same_transformers())
        if flag.choices and known:
            check_choice(name, value, flag.choices)
    for names, needed in call.line.exclusive:
        found = [name for name in names if call.given.get(name) is not None]
        if len(found) > 1 or (needed and not found):
            flags = " or ".join(f"--{name}" for name in names)
            raise RefineError(f"give {flags} (one of them)" if needed else f"give {flags}, not both")
    for prefix, _ in call.line.methods:
        method_of(call.given, prefix)


def method_of(given: Mapping[str, Any], prefix: str) -> NSPConfig:
    """Return the method's settings among what was given. RefineError where they refuse it, with what the preset has to do with it."""
    values = {f.name: given[prefix + f.name] for f in fields(NSPConfig) if prefix + f.name in given}
    preset = given.get(f"{prefix}preset")
    return NSPConfig(**values) if preset is None else NSPConfig.preset(preset, **values)


def _same_transformers() -> bool:
    """Return whether the choices of transformers' settings in the table are those of the release that is installed."""
    try:
        return bool(json.loads(TABLE.read_text(encoding="utf-8"))["transformers"] == version("transformers"))
    except PackageNotFoundError:
        return False


# --- files of settings ------------------------------------------------------------------------------------------------
def read_config(line: CommandLine, path: Path) -> dict[str, Any]:
    """Return a file's settings. RefineError for an unknown key, or for a value that cannot be meant for its setting."""
    data = read_yaml(path)
    for key in data:
        if key not in line.flags:
            raise RefineError(f"{path}: unknown key {key!r}{closest(key, line.flags)}")
        accepts = line.flags[key].accepts
        data[key] = accepts.meant(f"{path}: {key}", data[key])
        if not accepts.holds(data[key]):
            raise RefineError(f"{path}: {key} is {data[key]!r}, a {type(data[key]).__name__}; expected {accepts.words}")
    return data


def _refuse_code(line: CommandLine, path: Path, data: Mapping[str, Any]) -> None:
    """RefineError where a file names code: it may have come from anywhere, and does not decide which code is imported."""
    for flag in (f.name for f in line.flags.values() if f.code):
        named = data.get(flag) or []
        paths = [n for n in ([named] if isinstance(named, str) else named) if isinstance(n, str) and re.search("[.:]", n)]
        if paths:
            raise RefineError(
                f"{path}: {flag} names code to import ({', '.join(paths)}); give it on the command line (--{flag} {paths[0]}), or "
                "--allow_code_in_config where you trust the file"
            )


def found_config(path: Path) -> Path:
    """Return the file itself, or the shipped one where its name begins with `recipes/`. RefineError when there is neither."""
    shipped = next((folder for folder in RECIPES if folder.is_dir()), RECIPES[0])
    if path.is_file():
        return path
    if path.parts[:1] != ("recipes",):
        raise RefineError(f"no configuration file {path}; those of the package are named recipes/NAME.yaml, wherever you are")
    inside = shipped.joinpath(*path.parts[1:])
    if ".." in path.parts or not inside.is_file():
        names = sorted(f"recipes/{p.name}" for p in shipped.glob("*.yaml"))
        raise RefineError(
            f"no configuration file {path}, here or in the package{closest(path, names)}; it has {', '.join(names)}"
        )
    return inside


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping. RefineError when the file is missing or is something else."""
    import yaml  # help and completion need none

    path = found_config(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RefineError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise RefineError(f"{path} is nested too deeply; expected `key: value` lines") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise RefineError(f"{path} must hold `key: value` lines, got a {type(data).__name__}")
    return data


# --- help -------------------------------------------------------------------------------------------------------------
def overview() -> str:
    """Return what `refine-nsp --help` prints: every command with its summary."""
    lines = [
        "usage: refine-nsp COMMAND [words] [flags]", "", "Train fast-weight language models on next-sequence prediction (ReFINE).", "",
    ]  # fmt: skip
    for name, line in commands().items():
        lines += _paragraph(f"  {name}", line.summary, 14)
    ending = (
        "`refine-nsp COMMAND --help` explains a command, and `refine-nsp --version` names the release. --debug shows tracebacks."
    )
    return "\n".join([*lines, "", ending]) + "\n"


def help_text(line: CommandLine, everything: bool, values: Mapping[str, Any]) -> str:
    """Return usage, then a flag a line with its default, under the headings of its settings."""
    words = [_usage(flag) for flag in line.flags.values() if flag.positional]
    lines = [" ".join(["usage:", line.program, *words, "[--config FILE.yaml]", "[flags]"]), ""]
    lines += textwrap.wrap(line.description, WIDTH)
    shown = [flag for flag in line.flags.values() if everything or flag.common or flag.positional]
    for group in dict.fromkeys(flag.group for flag in shown):
        lines += ["", f"{group}:"]
        flags = [flag for flag in shown if flag.group == group]
        for flag in sorted(flags, key=lambda f: f.name) if everything else flags:
            lines += _explain(flag, values.get(flag.name, flag.default))
    lines += ["", "command line:"]
    for head, text in line.own.items():
        lines += _paragraph(f"  --{head}", text)
    if len(shown) < len(line.flags):
        others = ", with those of transformers' Trainer" if any(flag.foreign for flag in line.flags.values()) else ""
        lines += ["", f"`{line.program} --help_all` lists all {len(line.flags)} flags{others}."]
    return "\n".join(lines) + "\n"


def _usage(flag: Flag) -> str:
    name = "MODEL" if flag.name.startswith("model") else flag.name.upper()
    name = f"{name} ..." if flag.repeated else name
    return name if flag.required else f"[{name}]"


def _explain(flag: Flag, value: Value) -> list[str]:
    """Return lines of help for a flag: what it takes, what it does, what reads it, and its default with the preset."""
    text = " ".join(flag.help.split())
    text += f" (read by {flag.read_by})" if flag.read_by else ""
    if value not in (None, "", []):
        text += f" [{' '.join(map(str, value)) if isinstance(value, list) else value}]"
    kind = "|".join(flag.choices)
    if not kind:
        known = [kind.removeprefix("list of ") for kind in flag.kinds]
        kind = next((KINDS[k] for k in known if k in KINDS), "VALUE")
    head = f"  {_usage(flag)}" if flag.required else f"  --{flag.name} {kind}{' ...' if flag.repeated else ''}"
    return _paragraph(f"  {flag.name} (in a file)" if flag.in_files else head, text.strip())


def _paragraph(head: str, text: str, margin: int = MARGIN) -> list[str]:
    """Return a head in the margin, or above the text where it is too long for that."""
    lines = textwrap.wrap(text, WIDTH - margin) or [""]
    first = [(head.ljust(margin) + lines.pop(0)).rstrip()] if len(head) < margin - 1 else [head]
    return first + [" " * margin + line for line in lines]
