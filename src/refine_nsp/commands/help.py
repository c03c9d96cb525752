"""Print what commands there are, and what can be given to one, from the table of all commands."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from refine_nsp.commands.command_line import CommandLine, Flag, commands
from refine_nsp.values import Value

HELP = ("--help", "-h", "--help_all", "--help-all")
KINDS = {"text": "TEXT", "path": "FILE", "int": "INT", "number": "NUMBER", "bool": "BOOL"}
MARGIN, WIDTH = 38, 130  # columns of help before the descriptions, and in all


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
