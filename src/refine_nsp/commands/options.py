"""Flags and YAML from dataclasses: flags win over the file, the file over a preset, unknown keys are refused naming the nearest.

Every setting is declared in one dataclass. `Settings` says how a command shows it: all of its fields or not, under a prefix, starting
from a preset.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from refine_nsp.commands import Parser, refuse
from refine_nsp.config import PRESETS, NSPConfig, choices_of, preset_settings
from refine_nsp.errors import RefineError, closest
from refine_nsp.training.settings import as_meant

# In the wheel, and in a checkout.
RECIPES = (Path(__file__).resolve().parents[1] / "recipes", Path(__file__).resolve().parents[3] / "recipes")
# What transformers' own words for its settings leave out, of those that --help shows.
HELP = {
    "output_dir": "folder of the run: checkpoints, the final model, its card, its report",
    "max_steps": "optimizer steps; default: num_train_epochs decides",
    "num_train_epochs": "times the data is gone through, where max_steps is not given",
    "per_device_train_batch_size": "sequences that go through the model together, on each device",
    "gradient_accumulation_steps": "so many of these batches make an optimizer step",
    "eval_strategy": "validate never (no), every eval_steps (steps), or after every epoch (epoch)",
    "eval_steps": "optimizer steps between validations; below 1: a share of all steps. Default: logging_steps",
    "save_steps": "optimizer steps between checkpoints; below 1: a share of all steps",
    "save_strategy": "checkpoints every save_steps (steps), after every epoch (epoch), with every best validation (best), or never (no)",
    "resume_from_checkpoint": "`last`: go on from the newest whole checkpoint in output_dir; or the folder of one",
    "bf16": "matrix products in bfloat16; weights and optimizer state keep their precision",
    "gradient_checkpointing": "keep no activations of blocks, but compute them again going backward: less memory, more time",
    "report_to": "where figures go beside metrics.jsonl: none, tensorboard, trackio, wandb, or several",
    "use_cpu": "on the CPU, even where there is a GPU",
    "seed": "of all randomness of training",
}


class FlagParser(HfArgumentParser):
    """HfArgumentParser with errors in one line."""

    def error(self, message: str) -> NoReturn:
        refuse(self.prog, message)


@dataclass(frozen=True)
class Settings:
    """A dataclass as a command shows it.

    Attributes:
        cls: the dataclass. prefix: before the names of its flags. skip: fields that are not flags.
        preset: of an `NSPConfig`: the preset it starts from, or None; there is a flag `preset` then.
        nsp: of a dataclass with a field `nsp`: how that is shown, beside its own flags.
    """

    cls: Any
    prefix: str = ""
    skip: tuple[str, ...] = ()
    preset: str | None = None
    nsp: Settings | None = None

    @property
    def has_preset(self) -> bool:
        """Whether a preset can be named."""
        return self.cls is NSPConfig

    @property
    def preset_flag(self) -> str:
        """Name of the flag that names it."""
        return f"{self.prefix}preset"

    def flags(self) -> dict[str, dataclasses.Field]:
        """Fields by the name of their flag."""
        shown = [f for f in dataclasses.fields(self.cls) if f.init and f.name not in (*self.skip, "nsp")]
        return {self.prefix + f.name: f for f in shown}

    def view(self) -> type:
        """The flags as a dataclass of their own, which HfArgumentParser can read."""
        hints = get_type_hints(self.cls)
        made: list[Any] = []
        for flag, f in self.flags().items():
            kept: dict[str, Any] = {"metadata": dict(f.metadata)}
            if f.default_factory is not MISSING:
                kept["default_factory"] = f.default_factory
            elif f.default is not MISSING:
                kept["default"] = f.default
            made.append((flag, _parseable(hints[f.name]), dataclasses.field(**kept)))
        if self.has_preset:
            made.append((self.preset_flag, str | None, dataclasses.field(default=self.preset)))
        return dataclasses.make_dataclass(f"{self.cls.__name__}Flags", made)

    def fill(self, values: dict[str, Any]) -> Any:
        """The dataclass from parsed flags."""
        given = {f.name: values[flag] for flag, f in self.flags().items()}
        if self.has_preset and isinstance(given["reward_funcs"], list) and len(given["reward_funcs"]) == 1:
            given["reward_funcs"] = given["reward_funcs"][0]
        if self.nsp is not None:
            given["nsp"] = self.nsp.fill(values)
        try:
            return self.cls(**given)
        except RefineError:
            raise
        except Exception as error:  # of transformers' Trainer settings, in its words
            raise RefineError(f"these settings do not go together: {' '.join(str(error).split())}") from error


def _parseable(hint: Any) -> Any:
    """A type argparse can fill: what may be a callable is named by a string, or several."""
    return list[str] | None if any(_is_callable(part) for part in get_args(hint)) else hint


def _takes(hint: Any, value: Any) -> bool:
    """Whether a file's value can be meant for a field of this type; text is converted or refused later, as on the command line."""
    if isinstance(value, str):
        return True
    if value is None:
        return hint in (Any, type(None)) or type(None) in get_args(hint)
    if hint is type(None) or _is_callable(hint):
        return False
    if get_origin(hint) in (Union, UnionType):
        return any(_takes(part, value) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    kind = get_origin(hint) or hint
    if kind is list or kind is tuple:
        return isinstance(value, list) and all(any(_takes(part, v) for part in get_args(hint) or [object]) for v in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return not isinstance(kind, type) or not issubclass(kind, str | bool | dict | enum.Enum) or isinstance(value, kind)


def check_types(settings: Any, cls: Any) -> None:
    """RefineError for a value of a file that cannot be meant for the dataclass' field of its name."""
    if not isinstance(settings, dict):
        raise RefineError(f"{str(settings)[:60]!r} is no mapping of settings to values")
    hints = get_type_hints(cls)
    for name, value in settings.items():
        if name in hints and ((isinstance(value, str) and hints[name] in (int, float)) or not _takes(hints[name], value)):
            raise RefineError(f"{name} is {value!r}, a {type(value).__name__}; expected {_named(hints[name])}")


def _named(hint: Any) -> str:
    """A type as a reader of YAML knows it."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(dict.fromkeys(_named(part) for part in get_args(hint) if part is not type(None)))
    if get_origin(hint) is Literal:
        return ", ".join(str(choice) for choice in get_args(hint))
    if _is_callable(hint):
        return "a name"
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "text", list: "a list", dict: "a mapping"}
    return names.get(get_origin(hint) or hint, "text")


def _is_callable(hint: Any) -> bool:
    origin = getattr(hint, "__origin__", hint)
    return origin is Callable or getattr(origin, "__name__", "") == "Callable"


def attribute_docs(cls: type) -> dict[str, str]:
    """Descriptions in the `Attributes:` part of a dataclass' docstring, by field (several fields may share one)."""
    text = (cls.__doc__ or "").partition("Attributes:")[2].partition("Raises:")[0]
    docs: dict[str, str] = {}
    for block in re.split(r"\n {8}(?=\w)", text):
        names, _, rest = block.strip().partition(": ")
        for name in re.split(r",\s*", names):
            if name.isidentifier():
                docs[name] = " ".join(rest.split())
    return docs


class Options:
    """Parses several dataclasses from flags and `--config`.

    Args:
        command: name, for the usage line.
        summary: one paragraph under it.
        settings: the dataclasses, or `Settings` of them, filled in this order.
        common: flags shown by --help; the rest by --help_all.
    """

    def __init__(self, command: str, summary: str, settings: Sequence[Any], common: Sequence[str]) -> None:
        self.command, self.summary, self.common = command, summary, list(common)
        self.settings = [s if isinstance(s, Settings) else Settings(s) for s in settings]
        self.shown = [part for s in self.settings for part in (s, s.nsp) if part is not None]
        views: list[Any] = [s.view() for s in self.shown]
        self.parser = FlagParser(views, add_help=False, allow_abbrev=False, prog=f"refine-nsp {command}")
        self.docs: dict[str, str] = dict(HELP)
        self.choices: dict[str, tuple[Any, ...]] = {}
        for s in self.shown:
            docs: dict[str, str] = {}
            for base in reversed(s.cls.__mro__):
                docs |= attribute_docs(base)
            choices = choices_of(s.cls)
            for flag, f in s.flags().items():
                self.docs |= {flag: docs[f.name]} if f.name in docs else {}
                self.choices |= {flag: choices[f.name]} if f.name in choices else {}
            if s.has_preset:
                self.docs[s.preset_flag] = "settings to start from: the paper's by phase, or ours (start with `likelihood`)"
                self.choices[s.preset_flag] = tuple(PRESETS)
        # Of several actions for a flag the first: for a boolean that is true there is a --no_ form too, whose default means nothing.
        self.actions = {a.dest: a for a in reversed(self.parser._actions)}
        self.known = set(self.actions)
        self.defaults = vars(self.parser.parse_args([])) | {s.preset_flag: None for s in self.shown if s.has_preset}
        hints = {flag: get_type_hints(s.cls)[f.name] for s in self.shown for flag, f in s.flags().items()}
        self.hints = hints | {s.preset_flag: str | None for s in self.shown if s.has_preset}
        self.code = [flag for flag, hint in hints.items() if any(_is_callable(part) for part in get_args(hint))]
        for flag, action in self.actions.items():
            if flag in self.choices:
                action.choices = None  # the dataclass checks them, in the words of all our errors
            # "none" is a word of its own where strings are taken.
            if type(None) in get_args(hints.get(flag)) and action.type in (int, float):
                action.type = _or_none(action.type)

    def parse(self, argv: Sequence[str]) -> tuple[Any, ...]:
        """The filled dataclasses, and whether --dry_run was given. Prints help and exits where asked; RefineError for unknowns."""
        first = Parser(prog=self.parser.prog, add_help=False, allow_abbrev=False)
        first.add_argument("--config", type=Path)
        for flag in ("--help", "-h", "--help_all", "--dry_run", "--allow_code_in_config"):
            first.add_argument(flag, action="store_true", dest=flag.strip("-"))
        own, rest = first.parse_known_args(list(argv))
        from_file = self._read(own.config) if own.config is not None else {}
        if not own.allow_code_in_config:
            self._refuse_code(own.config, from_file)
        self._start_from_presets(rest, from_file)
        self.preset_defaults = vars(self.parser.parse_args([]))
        self.parser.set_defaults(**from_file)
        if own.help or own.h or own.help_all:
            sys.stdout.write(self.help(own.help_all))
            raise SystemExit(0)
        # A bare `--flag` of a boolean field, `--flag value` and `--flag=value` are argparse's business; unknown names are ours.
        namespace, unknown = self.parser.parse_known_args(rest)
        for word in unknown:
            name = word.lstrip("-").partition("=")[0]
            if word.startswith("-"):
                raise RefineError(
                    f"unknown flag --{name}{closest(name, self.known)}; `refine-nsp {self.command} --help_all` lists all"
                )
            raise RefineError(f"unexpected argument {word!r}")
        self.values = vars(namespace)
        return (*(s.fill(self.values) for s in self.settings), own.dry_run)

    def _start_from_presets(self, words: Sequence[str], from_file: dict[str, Any]) -> None:
        """A preset is a set of defaults, below the file and the flags."""
        for s in (s for s in self.shown if s.has_preset):
            only = Parser(prog=self.parser.prog, add_help=False, allow_abbrev=False)
            only.add_argument(f"--{s.preset_flag}", default=from_file.get(s.preset_flag, s.preset))
            name = getattr(only.parse_known_args(list(words))[0], s.preset_flag)
            if name is None:
                continue
            values = preset_settings(name)
            self.parser.set_defaults(**{flag: values[f.name] for flag, f in s.flags().items() if f.name in values})

    def resolved(self) -> dict[str, Any]:
        """Every flag of the latest parse that differs from its default, with the preset or without: what `--config` needs for the same
        run, in a folder of its own, from its beginning."""
        set_here = {k: v for k, v in self.values.items() if v != self.defaults[k] or v != self.preset_defaults[k]}
        return {k: _plain(v) for k, v in set_here.items() if k != "resume_from_checkpoint"}

    def _read(self, path: Path) -> dict[str, Any]:
        data = read_yaml(path)
        for key in data:
            if key not in self.known:
                raise RefineError(f"{path}: unknown key {key!r}{closest(key, self.known)}")
            if key in self.hints:
                data[key] = as_meant(f"{path}: {key}", data[key], self.hints[key])
            if key in self.hints and not _takes(self.hints[key], data[key]):
                raise RefineError(
                    f"{path}: {key} is {data[key]!r}, a {type(data[key]).__name__}; expected {_named(self.hints[key])}"
                )
        return data

    def _refuse_code(self, path: Path, data: dict[str, Any]) -> None:
        """A file may have come from anywhere: it does not decide which code is imported."""
        for flag in self.code:
            named = data.get(flag) or []
            paths = [n for n in ([named] if isinstance(named, str) else named) if isinstance(n, str) and ("." in n or ":" in n)]
            if paths:
                raise RefineError(
                    f"{path}: {flag} names code to import ({', '.join(paths)}); give it on the command line (--{flag} {paths[0]}), or "
                    "--allow_code_in_config where you trust the file"
                )

    def help(self, everything: bool) -> str:
        """Usage, then one flag a line with its default."""
        lines = [f"usage: refine-nsp {self.command} [--config FILE.yaml] [flags]", "", self.summary, ""]
        own = [
            ("config FILE", "YAML with any of these as keys, or the package's recipes/NAME.yaml; flags win"),
            ("dry_run", "show what would run, touch nothing"),
            ("allow_code_in_config", "let the file of --config name code to import, such as a reward of yours"),
            ("debug", "a traceback instead of one line when something is wrong"),
        ]
        lines += [line for head, text in own for line in _paragraph(head, text)]
        names = sorted(self.actions) if everything else [n for n in self.common if n in self.actions]
        lines += [line for name in names for line in self._explain(name)]
        if not everything:
            lines += [
                "",
                f"`refine-nsp {self.command} --help_all` lists all {len(self.actions)} flags, with those of transformers' Trainer.",
            ]
        return "\n".join(lines) + "\n"

    def _explain(self, name: str) -> list[str]:
        """Lines of help for a flag: what it takes, what it does, and its default after the preset."""
        action = self.actions[name]
        default = action.default.value if isinstance(action.default, enum.Enum) else action.default
        text = self.docs.get(name, action.help or "")
        text = "" if text == argparse.SUPPRESS else " ".join(text.split())
        if default not in (None, "", dataclasses.MISSING):
            text += f" [{default}]"
        kind = "|".join(str(c) for c in self.choices[name] if c is not None) if name in self.choices else _kind(action)
        return _paragraph(f"{name} {kind}".rstrip(), text)


def _paragraph(head: str, text: str) -> list[str]:
    """A flag in the margin, or above where it is too long for that, and its text."""
    indent = 38
    lines = textwrap.wrap(text, 130 - indent) or [""]
    margin = f"  --{head}"
    first = [margin.ljust(indent) + lines.pop(0)] if len(margin) < indent else [margin]
    return first + [" " * indent + line for line in lines]


def found_config(path: Path) -> Path:
    """The file itself; else the shipped one, where its name begins with `recipes/`. RefineError when there is neither."""
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
    """A YAML mapping. RefineError when the file is missing or is something else."""
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


def _or_none(convert: Any) -> Callable[[str], Any]:
    """`none` on the command line is None where a field may be None, as `null` is in a file."""

    def converted(text: str) -> Any:
        return None if text.lower() in ("none", "null") else convert(text)

    converted.__name__ = getattr(convert, "__name__", "value")  # argparse names the type in its errors
    return converted


def _kind(action: argparse.Action) -> str:
    """What a flag takes, for the help."""
    name = getattr(action.type, "__name__", "")
    name = {"str": "TEXT", "int": "INT", "float": "NUMBER", "string_to_bool": "BOOL"}.get(name, "VALUE" if name else "")
    return f"{name} ..." if action.nargs in ("+", "*") else name


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value if isinstance(value, bool | int | float | str) or value is None else str(value)
