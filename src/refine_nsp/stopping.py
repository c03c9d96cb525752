"""Being asked to stop: Ctrl-C, and SIGTERM, which a scheduler sends. What is under way is finished and saved first."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

TERMINATED_CODE = 128 + signal.SIGTERM  # as a shell counts it
TERMINATIONS: list[int] = []  # signals that `terminate` has handled


class Terminated(SystemExit):
    """SIGTERM asked for an end: the exit code is the one a process has that it ended."""

    def __init__(self) -> None:
        super().__init__(TERMINATED_CODE)


class StopRequest:
    """Notes the first SIGINT or SIGTERM while it watches, instead of breaking off; a second one breaks off at once.

    Attributes:
        asked: the signal's number, None as long as there was none.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self.asked = None
        try:
            self.previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: whoever is decides what signals mean
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
        """Do what was asked for: KeyboardInterrupt or `Terminated`; nothing where nothing was."""
        if self.asked == signal.SIGINT:
            raise KeyboardInterrupt
        if self.asked == signal.SIGTERM:
            raise Terminated


def terminate(number: int, frame: FrameType | None) -> None:
    """A handler of SIGTERM that ends the process with its clean-up: temporary folders go, the terminal is left in order.

    What is under way may make another error of it (a module that is being imported: ImportError); TERMINATIONS tells."""
    TERMINATIONS.append(number)
    raise Terminated
