"""Define the one error for everything a user can get wrong. The command line prints it as one line, without a traceback."""

import difflib
from collections.abc import Iterable


class RefineError(ValueError):
    """Report bad input: the message says what was seen, what was expected and how to mend it."""


def closest(name: object, options: Iterable[str]) -> str:
    """Suggest the option nearest to `name`, which need not be text, as ` (did you mean 'x'?)`; return an empty text when none is near."""
    near = difflib.get_close_matches(str(name), list(options), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type: as much of another library's error as fits into one of ours."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
