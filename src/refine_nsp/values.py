"""Say what values a setting accepts, and what a value means that is written in a file, on a command line or in Python."""

from __future__ import annotations

import enum
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin

from refine_nsp.errors import RefineError

# What a setting holds once it was read from a file or a command line.
Value: TypeAlias = "bool | int | float | str | list[Value] | dict[str, Value] | None"

KINDS = {str: "text", int: "int", float: "number", bool: "bool", NoneType: "none", dict: "mapping", Path: "path", Any: "other"}
# How messages call the kinds; text is what is left.
IN_WORDS = {"number": "a number", "int": "a whole number", "bool": "true or false", "mapping": "a mapping", "code": "a name"}
TRUE, FALSE = ("true", "yes", "on", "1", "t", "y"), ("false", "no", "off", "0", "f", "n")
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Accepted:
    """Hold what values a setting accepts."""

    kinds: tuple[
        str, ...
    ]  # of `KINDS`, and `choice` (one of `choices`), `code` (a callable, which text names) and `list of KIND`
    choices: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """Name the kinds as a reader of YAML knows them."""
        named = [
            ", ".join(self.choices) if kind == "choice" else "a list" if kind.startswith("list") else IN_WORDS.get(kind, "text")
            for kind in self.kinds
            if kind != "none"
        ]
        return " or ".join(dict.fromkeys(named))

    def holds(self, value: object) -> bool:
        """Return whether a file's value can be meant; text is converted, or refused, later."""
        if isinstance(value, str) or "other" in self.kinds:
            return True
        if isinstance(value, list):
            inner = [Accepted((kind.removeprefix("list of "),)) for kind in self.kinds if kind.startswith("list")]
            return any(all(part.holds(item) for item in value) for part in inner)
        if isinstance(value, bool):
            return "bool" in self.kinds
        wanted = {NoneType: ("none",), int: ("int", "number"), float: ("number",), dict: ("mapping",)}.get(type(value), ())
        return any(kind in self.kinds for kind in wanted)

    def meant(self, name: str, value: object) -> Any:
        """Return a value as its setting wants it, where text or a number says it plainly: "1e-4", "10", 10.0, "true", a `no` of YAML."""
        if value is False and name.endswith("report_to"):
            return "none"
        if value is False and "bool" not in self.kinds and "no" in self.choices:
            return "no"  # YAML makes False of a bare `no`
        numbers = {"int", "number", "bool"} & {*self.kinds}
        if isinstance(value, str) and numbers and not {"text", "choice", "path"} & {*self.kinds}:
            return _from_text(name, value, self.kinds)
        if isinstance(value, float) and "int" in numbers and "number" not in numbers:
            if not value.is_integer():
                raise RefineError(f"{name} is {value}; expected a whole number")
            return int(value)
        return _plain_values(value) if isinstance(value, dict) else value


def accepted(hint: object) -> Accepted:
    """Return what a field accepts, by its annotation."""
    kinds: list[str] = []
    choices: list[str] = []
    for part in get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,):
        part = get_args(part)[0] if get_origin(part) is Annotated else part
        origin = get_origin(part) or part
        if get_origin(part) in (Union, UnionType):  # an alias that is a union itself
            inner = accepted(part)
            kinds, choices = [*kinds, *inner.kinds], [*choices, *inner.choices]
        elif origin is Literal:
            words = [value for value in get_args(part) if isinstance(value, str)]
            choices += words
            kinds += ["choice"] if words else [KINDS.get(type(value), "other") for value in get_args(part)]
        elif isinstance(origin, type) and issubclass(origin, enum.Enum):
            choices += [str(member.value) for member in origin]
            kinds.append("choice")
        elif origin in (list, tuple):
            item = accepted((get_args(part) or (str,))[0])
            kinds.append(f"list of {'text' if item.choices else item.kinds[0]}")
        elif isinstance(origin, type) and origin.__name__ == "Callable":
            kinds.append("code")
        else:
            kinds.append(KINDS.get(origin, "other"))
    if "choice" in kinds:  # `SomeEnum | str` takes the members' values, not any text
        kinds = [kind for kind in kinds if kind != "text"]
    return Accepted(tuple(dict.fromkeys(kinds)), tuple(dict.fromkeys(choices)))


def _from_text(name: str, text: str, kinds: tuple[str, ...]) -> Value:
    word = text.strip().lower()
    if "bool" in kinds and word in (*TRUE, *FALSE):
        return word in TRUE
    if "none" in kinds and word in ("none", "null", ""):
        return None
    try:
        number = float(word)
        if "number" in kinds:
            return number
        if "int" in kinds and number.is_integer():
            return int(number)
    except (ValueError, OverflowError):
        pass
    wanted = next(IN_WORDS[kind] for kind in ("number", "int", "bool") if kind in kinds)
    raise RefineError(f"{name} is {text!r}; expected {wanted}")


def _plain_values(value: object) -> object:
    """Return a mapping with numbers and truth values where text says them, as YAML leaves `1e-5`."""
    if isinstance(value, dict):
        return {key: _plain_values(inner) for key, inner in value.items()}
    if not isinstance(value, str):
        return value
    if NUMBER.fullmatch(value):
        return int(value) if value.lstrip("+-").isdecimal() else float(value)
    return {"true": True, "false": False}.get(value.lower(), value)


def word_reader(accepts: Accepted) -> Callable[[str], Value]:
    """Return what makes a value of one word of the command line; argparse names it in its errors by `__name__`."""
    kinds = [kind.removeprefix("list of ") for kind in accepts.kinds]
    kind = next((k for k in ("text", "choice", "path", "number", "int", "bool") if k in kinds), "text")
    makers: dict[str, Callable[[str], Value]] = {"int": int, "number": float, "bool": _truth}
    make = makers.get(kind, str)
    may_be_none = "none" in kinds and not {"text", "path"} & {*kinds} and "none" not in accepts.choices

    def read(word: str) -> Value:
        if may_be_none and word.lower() in ("none", "null"):
            return None
        if {"text", "bool"} <= {*kinds} and word.lower() in ("true", "false"):
            return word.lower() == "true"
        return make(word)

    read.__name__ = "bool" if kind == "bool" else make.__name__
    return read


def _truth(word: str) -> bool:
    if word.lower() not in (*TRUE, *FALSE):
        raise ValueError(word)
    return word.lower() in TRUE
