"""Flags and YAML from dataclasses: flags win over the file, unknown keys are refused naming the nearest, help shows what is used first."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from refine_nsp.errors import RefineError, closest


def attribute_docs(cls: type) -> dict[str, str]:
    """Descriptions in the `Attributes:` part of a dataclass' docstring, by field (several fields may share one)."""
    text = (cls.__doc__ or "").partition("Attributes:")[2].partition("Raises:")[0]
    found: dict[str, str] = {}
    for block in re.split(r"\n {8}(?=\w)", text):
        names, _, rest = block.strip().partition(": ")
        for name in re.split(r",\s*", names):
            if name.isidentifier():
                found[name] = " ".join(rest.split())
    return found


class Options:
    """Parses several dataclasses from flags and `--config`.

    Args:
        command: name, for the usage line.
        summary: one paragraph under it.
        classes: the dataclasses, filled in this order.
        common: flags shown by --help; the rest by --help_all.
        described_by: more dataclasses whose docstrings explain fields.
    """

    def __init__(
        self, command: str, summary: str, classes: Sequence[Any], common: Sequence[str], described_by: Sequence[type] = ()
    ) -> None:
        self.command, self.summary, self.classes, self.common = command, summary, list(classes), list(common)
        self.parser = HfArgumentParser(self.classes, add_help=False, allow_abbrev=False, prog=f"refine-nsp {command}")
        self.docs: dict[str, str] = {}
        for cls in (*described_by, *self.classes):
            for base in reversed(cls.__mro__):
                self.docs |= attribute_docs(base)
        self.known = {a.dest for a in self.parser._actions}

    def parse(self, argv: Sequence[str]) -> tuple[Any, ...]:
        """The filled dataclasses, and whether --dry_run was given. Prints help and exits where asked; RefineError for unknowns."""
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--config", type=Path)
        for flag in ("--help", "-h", "--help_all", "--dry_run"):
            first.add_argument(flag, action="store_true", dest=flag.strip("-"))
        own, rest = first.parse_known_args(list(argv))
        if own.help or own.h or own.help_all:
            sys.stdout.write(self.help(own.help_all))
            raise SystemExit(0)
        if own.config is not None:
            self.parser.set_defaults(**self._read(own.config))
        # A bare `--flag` of a boolean field, `--flag value` and `--flag=value` are argparse's business; unknown names are ours.
        namespace, unknown = self.parser.parse_known_args(rest)
        for word in unknown:
            name = word.lstrip("-").partition("=")[0]
            if word.startswith("-"):
                raise RefineError(
                    f"unknown flag --{name}{closest(name, self.known)}; `refine-nsp {self.command} --help_all` lists all"
                )
            raise RefineError(f"unexpected argument {word!r}")
        values = vars(namespace)
        filled = [cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.init}) for cls in self.classes]
        return (*filled, own.dry_run)

    def _read(self, path: Path) -> dict[str, Any]:
        data = read_yaml(path)
        for key in data:
            if key not in self.known:
                raise RefineError(f"{path}: unknown key {key!r}{closest(key, self.known)}")
        return data

    def help(self, everything: bool) -> str:
        """Usage, then one flag a line with its default."""
        lines = [f"usage: refine-nsp {self.command} [--config FILE.yaml] [flags]", "", self.summary, ""]
        own = [
            ("config FILE", "YAML with any of these as keys; flags win"),
            ("dry_run", "show what would run, touch nothing"),
            ("debug", "a traceback instead of one line when something is wrong"),
        ]
        lines += [f"  --{name:<34} {text}" for name, text in own]
        shown = {a.dest: a for a in self.parser._actions}
        names = sorted(shown) if everything else [n for n in self.common if n in shown]
        for name in names:
            default = shown[name].default
            default = default.value if isinstance(default, enum.Enum) else default
            text = self.docs.get(name, shown[name].help or "")
            text = "" if text == argparse.SUPPRESS else " ".join(text.split())
            text = text if len(text) < 300 else text[:300].rsplit(" ", 1)[0] + " ..."
            lines.append(f"  --{name:<34} {text}" + (f" [{default}]" if default not in (None, "", dataclasses.MISSING) else ""))
        if not everything:
            lines += [
                "",
                f"`refine-nsp {self.command} --help_all` lists all {len(shown)} flags, those of transformers' Trainer included.",
            ]
        return "\n".join(lines) + "\n"


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping. RefineError when the file is missing or is something else."""
    if not path.is_file():
        raise RefineError(f"no configuration file {path}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RefineError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise RefineError(f"{path} must hold `key: value` lines, got a {type(data).__name__}")
    return data


def resolved(*filled: Any) -> dict[str, Any]:
    """Every field that differs from its default, plain enough for YAML: what `--config` needs to give the same run."""
    found: dict[str, Any] = {}
    for record in filled:
        reference = type(record)()
        for f in dataclasses.fields(record):
            value = getattr(record, f.name)
            if f.init and value != getattr(reference, f.name):
                found[f.name] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value if isinstance(value, bool | int | float | str) or value is None else str(value)
