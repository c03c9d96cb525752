"""Declare a command by dataclasses, describe it for the table that command lines are read by, and fill the dataclasses of a call.

    COMMAND = Command("Count the words of a file.", (Settings(CountArguments),), positional=("file",))

    def run(call: Call, arguments: CountArguments) -> None: ...

Every setting is declared once, in its dataclass. After a change run `python -m refine_nsp.commands.table`.
"""

from __future__ import annotations

import enum
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_type_hints

from refine_nsp.commands.command_line import Call, command_line
from refine_nsp.commands.parser import method_of, parse
from refine_nsp.config import PRESETS, NSPConfig
from refine_nsp.errors import RefineError
from refine_nsp.fields import ALWAYS, default_of
from refine_nsp.values import Value, accepted

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# Text that names a file or folder although its type does not say so.
FILES = set(
    "answer_dataset config data dataset_name documents essays file hotpotqa longbench model output output_dir prompts squad short_context "
    "validation_dataset".split()
)
FILE_ENDINGS = ("_file", "_path")
PRESET_HELP = "settings to start from: the paper's by phase, or ours (start with `likelihood`)."


@dataclass(frozen=True)
class Settings:
    """Say how a command shows a dataclass."""

    cls: type[DataclassInstance]
    group: str = "flags"  # the heading in help
    prefix: str = ""  # stands before the names of its flags
    skip: tuple[str, ...] = ()  # fields that are not flags
    preset: str | None = None  # what an `NSPConfig` starts from; a flag `preset` names another
    nsp: Settings | None = None  # how the field `nsp` of the dataclass is shown

    @property
    def is_method(self) -> bool:
        """Tell whether these are the method's own settings, which have presets."""
        return self.cls is NSPConfig

    def flags(self) -> dict[str, Field[object]]:
        """Return the fields by the names of their flags."""
        shown = [f for f in fields(self.cls) if f.init and f.name not in (*self.skip, "nsp")]
        return {self.prefix + f.name: f for f in shown}

    def rows(self, positional: Sequence[str]) -> dict[str, dict[str, object]]:
        """Return the table's row of every flag (`parser.Flag`)."""
        hints, docs = get_type_hints(self.cls), described(self.cls)
        # Where no field says whether it is common, all are.
        marked = any(f.metadata.get("common") for f in self.flags().values())
        rows = {}
        if self.is_method:
            rows[f"{self.prefix}preset"] = _row(
                kinds=["choice", "none"], choices=tuple(PRESETS), default=self.preset, help=PRESET_HELP, group=self.group,
                common=True,
            )  # fmt: skip
        for flag, f in self.flags().items():
            accepts, foreign = accepted(hints[f.name]), _is_foreign(self.cls, f.name)
            choices = accepts.choices or tuple(f.metadata.get("choices") or ())
            kinds = ["choice" if choices and kind == "text" else kind for kind in accepts.kinds]
            in_files = {*kinds} <= {"mapping", "other", "list of mapping", "list of other", "none"}
            default = default_of(f)
            rows[flag] = _row(
                kinds=kinds, choices=choices, default=None if default is MISSING or in_files else _plain(default),
                required=default is MISSING, group=self.group,
                help=docs.get(f.name, ""),
                read_by=_readers(f),
                common=bool(f.metadata.get("common")) or not marked,
                positional=f.name in positional, bare=kinds[0] == "bool" or "const" in dict(f.metadata),
                file="path" in " ".join(kinds) or f.name in FILES or f.name.endswith(FILE_ENDINGS),
                code="code" in kinds, in_files=in_files, foreign=foreign,
            )  # fmt: skip
        return rows

    def fill(self, given: Mapping[str, Value]) -> object:
        """Return the dataclass with the values that were given by flags, files and presets; its own defaults serve for the others."""
        if self.is_method:
            return method_of(given, self.prefix)
        hints = get_type_hints(self.cls)
        values = {f.name: _typed(given[flag], hints[f.name]) for flag, f in self.flags().items() if flag in given}
        if self.nsp is not None:
            values["nsp"] = self.nsp.fill(given)
        make: Callable[..., object] = self.cls
        with in_one_line("these settings do not go together", Exception):  # transformers refuses its Trainer's in its own words
            return make(**values)


@dataclass(frozen=True)
class Command:
    """Declare what can be given to a command."""

    summary: str  # one sentence, for the list of commands
    settings: tuple[Settings, ...] = ()  # dataclasses; `run` gets each, filled, after the call itself
    description: str = ""  # what its help adds to the summary
    positional: tuple[str, ...] = ()  # fields that words without a flag fill, in this order
    exclusive: tuple[tuple[tuple[str, ...], bool], ...] = ()  # names of flags of which one may be given, and whether one must be
    fixed: dict[str, Value] = field(default_factory=dict)  # values that take the place of defaults
    dry_run: bool = False  # `run` looks at `call.dry_run`

    def row(self) -> dict[str, object]:
        """Return the command's row of the table (`parser.CommandLine`)."""
        parts = [part for settings in self.settings for part in (settings, settings.nsp) if part is not None]
        rows = {flag: row for part in parts for flag, row in part.rows(self.positional).items()}
        for flag, value in self.fixed.items():
            rows[flag]["default"] = value
        first = {name: rows.pop(name) for name in self.positional}
        return {
            "summary": self.summary,
            "description": f"{self.summary} {self.description}".strip(),
            "methods": [(part.prefix, part.preset) for part in parts if part.is_method],
            "exclusive": self.exclusive,
            "fixed": self.fixed,
            "dry_run": self.dry_run,
            "flags": first | rows,
        }

    def fill(self, call: Call) -> tuple[object, ...]:
        """Return the filled dataclasses of a call."""
        return tuple(settings.fill(call.given) for settings in self.settings)

    def call(self, argv: Sequence[str], name: str = "COMMAND") -> tuple[Call, tuple[object, ...]]:
        """Read a command line by the declaration itself, without the table; returns the call and the filled dataclasses."""
        call = parse(command_line(name, self.row()), argv)
        return call, self.fill(call)


@contextmanager
def in_one_line(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Raise another library's errors of these kinds in its words, but as our error, which says `what` is wrong."""
    try:
        yield
    except RefineError:
        raise
    except kinds as error:
        raise RefineError(f"{what}: {' '.join(str(error).split())}") from error


def described(cls: type) -> dict[str, str]:
    """Return what a dataclass and those it extends say of their fields: in metadata, and in the `Attributes:` of docstrings."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        own = fields(base) if is_dataclass(base) else ()
        docs |= {f.name: " ".join(f.metadata["help"].split()) for f in own if f.metadata.get("help")}
        text = (base.__doc__ or "").partition("Attributes:")[2].partition("Raises:")[0]
        for block in re.split(r"\n {8}(?=\w)", text):
            names, _, rest = block.strip().partition(": ")
            docs |= {name: " ".join(rest.split()) for name in re.split(r",\s*", names) if name.isidentifier()}
    return docs


def _is_foreign(cls: type, name: str) -> bool:
    """Return whether a field was last declared by transformers."""
    declaring = next((base for base in cls.__mro__ if name in inspect.get_annotations(base)), cls)
    return declaring.__module__.startswith("transformers.")


def _readers(f: Field[object]) -> str:
    """Say in words what reads a field; nothing where all settings do."""
    reader, also = f.metadata.get("read_by", ALWAYS), f.metadata.get("also")
    words = " and ".join(each.words for each in (reader, *reader.others))
    return "" if reader is ALWAYS else words + (f", and by {also}" if also else "")


def _row(**told: object) -> dict[str, object]:
    """Leave out of a row what is usual."""
    return {name: value for name, value in told.items() if value or (name == "default" and value is not None)}


def _plain(value: object) -> object:
    """Return a default as JSON has it."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, enum.Enum) else str(value) if isinstance(value, Path) else value


def _typed(value: Value, hint: object) -> object:
    """Return a plain value as its field has it: paths are text until here."""
    kinds = accepted(hint).kinds
    if isinstance(value, list) and "list of path" in kinds:
        return [Path(str(item)) for item in value]
    return Path(str(value)) if "path" in kinds and value is not None else value
