"""Every setting is declared once, by `setting(...)`: its default, and what help, model cards, resumed runs and error messages need to know.

    @dataclass(frozen=True)
    class Drawing:
        draw: str = setting("sample", card=True)
        tau: float = setting(1.0, read_by=Reader("draw='sample'", lambda s: s.draw == "sample"))

        def __post_init__(self):
            check_read(self)

`Drawing(draw="greatest", tau=2.0)` is then refused: a setting that nothing would read cannot be given, so none can seem to have an effect.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from refine_nsp.errors import RefineError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True)
class Reader:
    """The condition under which a setting is read, on the object that holds it. `a & b` holds where both do."""

    words: str  # as an error message names it, such as "estimator='sampled'"
    holds: Callable[[Any], bool]  # takes the settings object
    others: tuple[Reader, ...] = ()  # the single conditions that must hold as well

    def __and__(self, other: Reader) -> Reader:
        return Reader(self.words, self.holds, (*self.others, other, *other.others))

    def __call__(self, settings: object) -> bool:
        return not self.missing(settings)

    def missing(self, settings: object) -> list[str]:
        """List the conditions that do not hold, in words; an empty list means that the setting is read."""
        return [reader.words for reader in (self, *self.others) if not reader.holds(settings)]


ALWAYS = Reader("any settings", lambda settings: True)


class Notes(UserDict[str, object]):
    """The metadata of a field: `common`, `card`, `resume`, `read_by`, `also` and `help` (see `setting`).

    Iterating gives `help` alone: transformers' HfArgumentParser hands `dict(field.metadata)` to argparse, which knows none of the others.
    """

    def __iter__(self) -> Iterator[str]:
        return iter([name for name in ("help",) if name in self.data])


def notes(**told: Any) -> Mapping[str, object]:
    """Make a field's metadata; the arguments are those of `setting`."""
    found: Mapping[str, object] = setting(**told).metadata
    return found


def setting(
    default: object = MISSING,
    *,
    default_factory: Callable[[], object] | None = None,
    read_by: Reader = ALWAYS,
    also: str = "",
    common: bool = False,
    card: bool = False,
    resume: bool = False,
    help: str | None = None,
) -> Any:
    """Declare a dataclass field with what is to be known of it.

    Args:
        default, default_factory: as `dataclasses.field` takes them.
        read_by: the condition under which the setting has an effect.
        also: who reads it wherever that condition fails, such as "validation"; then it may be given there too.
        common: shown by `--help`; the others only by `--help_all`.
        card: told by model cards.
        resume: the weights after a step depend on it, so a resumed run is compared by it.
        help: what the command line says of it, where the dataclass' docstring does not.
    """
    metadata = Notes(read_by=read_by, also=also, common=common, card=card, resume=resume)
    if help is not None:
        metadata["help"] = help
    if default_factory is not None:
        return field(default_factory=default_factory, metadata=metadata)
    return field(default=default, metadata=metadata)


class SettingError(RefineError):
    """Settings do not go with the others. names: which."""

    def __init__(self, message: str, names: Collection[str]) -> None:
        super().__init__(message)
        self.names = tuple(names)


def is_known(f: Field[Any]) -> bool:
    """Tell whether a field was declared by `setting`."""
    return "read_by" in f.metadata


def told(cls: type[DataclassInstance], key: Literal["common", "card", "resume"]) -> tuple[str, ...]:
    """List a dataclass' fields, in their order, whose metadata has `key`."""
    return tuple(f.name for f in fields(cls) if is_known(f) and f.metadata[key])


def default_of(f: Field[Any]) -> object:
    """Return the value that a field has unless another is given; MISSING where it must be given."""
    return f.default_factory() if f.default_factory is not MISSING else f.default


def live(settings: DataclassInstance) -> frozenset[str]:
    """Name the fields that these settings read. Fields not declared by `setting` count as read."""
    return frozenset(f.name for f in fields(settings) if not is_known(f) or f.metadata["read_by"](settings))


def check_read(settings: DataclassInstance) -> None:
    """Refuse settings that nothing reads, by a SettingError with the way out; their default is accepted everywhere."""
    by_reader: dict[str, dict[str, str]] = {}  # the conditions that do not hold, and what only they would read
    for f in fields(settings):
        given = is_known(f) and not f.metadata["also"] and getattr(settings, f.name) != default_of(f)
        if given and (missing := f.metadata["read_by"].missing(settings)):
            by_reader.setdefault(" and ".join(missing), {})[f.name] = f"{f.name}={getattr(settings, f.name)!r}"
    names = [f.name for f in fields(settings) if any(f.name in unread for unread in by_reader.values())]
    if names:
        said = [
            f"{', '.join(u.values())} ({'it needs' if len(u) == 1 else 'they need'} {needs})" for needs, u in by_reader.items()
        ]
        them = "it" if len(names) == 1 else "them"
        raise SettingError(f"nothing reads {', '.join(said)}; leave {them} out, or set what reads {them}", names)
