"""Stop when asked to, by Ctrl-C or by the SIGTERM that a scheduler sends, after the step under way is finished and saved."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType

TERMINATED_CODE = 128 + signal.SIGTERM  # the exit code that a shell gives a process that SIGTERM ended
TERMINATIONS: list[int] = []  # signals that `terminate` has handled


class Terminated(SystemExit):
    """End the process since SIGTERM asked for it, with the exit code that a shell gives such a process."""

    def __init__(self) -> None:
        super().__init__(TERMINATED_CODE)


class StopRequest:
    """Note the first SIGINT or SIGTERM instead of breaking off; a second one breaks off at once."""

    def __init__(self) -> None:
        self.asked: int | None = None  # the signal's number
        self.previous: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> StopRequest:
        self.asked = None
        try:
            self.previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # only the main thread may decide what signals do, and this is another thread
            self.previous = {}
        return self

    def __exit__(self, *failure: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None:
            self.asked = number
            self.end()
        self.asked = number

    def end(self) -> None:
        """Raise KeyboardInterrupt or `Terminated` as was asked for; do nothing where nothing was."""
        if self.asked == signal.SIGINT:
            raise KeyboardInterrupt
        if self.asked == signal.SIGTERM:
            raise Terminated


def terminate(number: int, frame: FrameType | None) -> None:
    """Handle SIGTERM by ending the process with its clean-up: temporary folders go, and the terminal is left in order.

    Code that is under way may turn the exception into another error (an import into ImportError); TERMINATIONS still tells.
    """
    TERMINATIONS.append(number)
    raise Terminated
