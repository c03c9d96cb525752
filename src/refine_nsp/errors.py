"""One error type for everything a user can get wrong: the command line prints it as one line, without a traceback."""

import difflib
from collections.abc import Iterable


class RefineError(ValueError):
    """Bad input. The message says what was seen, what was expected and how to mend it."""


def closest(name: object, options: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the option nearest to `name` (a key of YAML need not be text), or an empty string when none is near."""
    near = difflib.get_close_matches(str(name), list(options), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def first_line(error: BaseException) -> str:
    """Of its message, or its type: what of another library's error belongs in one of ours."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
