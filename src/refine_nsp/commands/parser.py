"""Read a command line by the table of all commands, and print help: without torch, transformers or any command's own module.

Flags win over the file of `--config`, the file over a preset.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path

from refine_nsp.commands.command_line import TABLE, Call, CommandLine, Flag, commands, spellings
from refine_nsp.config import NSPConfig, check_choice
from refine_nsp.environment import installed
from refine_nsp.errors import RefineError, closest
from refine_nsp.values import FALSE, TRUE, Value

# The first place is a wheel's, the second a checkout's.
RECIPES = (Path(__file__).resolve().parents[1] / "recipes", Path(__file__).resolve().parents[3] / "recipes")
HELP = ("--help", "-h", "--help_all", "--help-all")
KINDS = {"text": "TEXT", "path": "FILE", "int": "INT", "number": "NUMBER", "bool": "BOOL"}
MARGIN, WIDTH = 38, 130  # columns of help before the descriptions, and in all


def parse(line: CommandLine, argv: Sequence[str]) -> Call:
    """Read a command's words. Prints help and ends where it is asked for.

    Raises:
        RefineError: an unknown flag or key, a value that is none of the choices, or settings that do not go together.
        SystemExit: a value of another type, or one that is missing.
    """
    asked = {*HELP} & {*argv}
    # Help is given whatever else is wrong with the command line.
    parser = line.parser(line.presets if asked else None)
    for name in ("dry_run", "allow_code_in_config"):
        if name in line.own:
            parser.add_argument(*spellings(name), dest=f"{name} ", action="store_true")
    namespace, unknown = parser.parse_known_args(_spelled_out(line, [word for word in argv if word not in asked]))
    flags = vars(namespace)
    dry_run, code_is_allowed, path = flags.pop("dry_run ", False), flags.pop("allow_code_in_config ", False), flags.pop("config")
    from_file = read_config(line, path) if path is not None else {}
    if not code_is_allowed:
        _refuse_code(line, path, from_file)
    from_presets = line.preset_values(from_file | flags)
    if asked:
        sys.stdout.write(help_text(line, bool(asked - {"--help", "-h"}), from_presets | from_file))
        raise SystemExit(0)
    _refuse_unknown(line, unknown)
    for name, value in flags.items():
        if isinstance(value, list) and "text" in line.flags[name].kinds and len(value) == 1:
            flags[name] = value[0]  # one name and a list of one mean the same, and the plain one reads better
    call = Call(line, {**line.fixed, **from_presets, **from_file, **flags}, from_presets, dry_run)
    _check(call)
    return call


def _spelled_out(line: CommandLine, argv: Sequence[str]) -> list[str]:
    """Return the words with `--flag` as `--flag=true` where no truth value follows, so that a flag never takes a MODEL behind it."""
    if not any(flag.positional for flag in line.flags.values()):
        return list(argv)
    bare = {s for flag in line.flags.values() if flag.kinds[0] == "bool" and flag.bare for s in spellings(flag.name)}
    truths = {*TRUE, *FALSE, "none", "null"}
    return [
        f"{word}=true" if word in bare and after.lower() not in truths else word
        for word, after in zip(argv, [*argv[1:], ""], strict=False)
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


def method_of(given: Mapping[str, Value], prefix: str) -> NSPConfig:
    """Return the method's settings among what was given. RefineError where they refuse it, with what the preset has to do with it."""
    values = {f.name: given[prefix + f.name] for f in fields(NSPConfig) if prefix + f.name in given}
    preset = given.get(f"{prefix}preset")
    make: Callable[..., NSPConfig] = NSPConfig if preset is None else partial(NSPConfig.preset, str(preset))
    return make(**values)


def _same_transformers() -> bool:
    """Return whether the choices of transformers' settings in the table are those of the release that is installed."""
    return bool(json.loads(TABLE.read_text(encoding="utf-8"))["transformers"] == installed("transformers"))


def read_config(line: CommandLine, path: Path) -> dict[str, Value]:
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


def _refuse_code(line: CommandLine, path: Path, data: Mapping[str, Value]) -> None:
    """RefineError where a file names code: it may have come from anywhere, and does not decide which code is imported."""
    for flag in (f.name for f in line.flags.values() if f.code):
        named = data.get(flag)
        paths = [n for n in (named if isinstance(named, list) else [named]) if isinstance(n, str) and re.search("[.:]", n)]
        if paths:
            raise RefineError(
                f"{path}: {flag} names code to import ({', '.join(paths)}); give it on the command line (--{flag} {paths[0]}), or "
                "--allow_code_in_config where you trust the file"
            )


def found_config(path: Path) -> Path:
    """Return the file itself, or the shipped one where its name begins with `recipes/`. RefineError when there is neither."""
    if path.is_file():
        return path
    if path.parts[:1] != ("recipes",):
        raise RefineError(f"no configuration file {path}; those of the package are named recipes/NAME.yaml, wherever you are")
    shipped = next((folder for folder in RECIPES if folder.is_dir()), RECIPES[0])
    inside = shipped.joinpath(*path.parts[1:])
    if ".." not in path.parts and inside.is_file():
        return inside
    names = sorted(f"recipes/{p.name}" for p in shipped.glob("*.yaml"))
    raise RefineError(f"no configuration file {path}, here or in the package{closest(path, names)}; it has {', '.join(names)}")


def read_yaml(path: Path) -> dict[str, Value]:
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


def help_text(line: CommandLine, everything: bool, values: Mapping[str, Value]) -> str:
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
