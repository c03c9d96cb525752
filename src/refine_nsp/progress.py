"""Show the progress of long work: a bar with tokens per second and time left, or a plain line now and then where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

PLAIN_LINE_SECONDS = 30.0


class StepProgress:
    """Count steps and tokens; `advance` is called once for each step."""

    def __init__(self, total: int, done: int, title: str, bar: Progress) -> None:
        self.total, self.done, self.title, self.bar = total, done, title, bar
        self.tokens, self.first = 0, done
        self.start = self.last_line = time.monotonic()
        self.task = bar.add_task(title, total=total, completed=done, figures="")

    def advance(self, tokens: int, steps: int = 1, figures: Mapping[str, float] | None = None) -> None:
        """Count `steps` that processed `tokens`, and show `figures` next to the bar."""
        self.done += steps
        self.tokens += tokens
        rate = f"{self.tokens_per_second:,.0f} tok/s  " if self.tokens else ""
        text = rate + "  ".join(f"{name} {value:.4g}" for name, value in (figures or {}).items())
        if not self.bar.disable:
            self.bar.update(self.task, completed=self.done, figures=text)
        elif time.monotonic() - self.last_line > PLAIN_LINE_SECONDS:
            self.last_line = time.monotonic()
            left = (self.last_line - self.start) / max(1, self.done - self.first) * (self.total - self.done)
            sys.stderr.write(f"{self.title}: {self.done}/{self.total}  {text}  {left / 60:.1f} min left\n")
            sys.stderr.flush()

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(1e-9, time.monotonic() - self.start)


@contextmanager
def step_progress(total: int, done: int = 0, title: str = "train", quiet: bool = False) -> Iterator[StepProgress]:
    """Display the progress of `total` steps, of which `done` are done already; with `quiet` by lines now and then, without a bar."""
    console = Console(stderr=True)
    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}")]
    columns += [TextColumn("{task.fields[figures]}"), TimeRemainingColumn()]
    bar = Progress(*columns, console=console, disable=quiet or not console.is_terminal)
    with nullcontext() if bar.disable else bar:
        yield StepProgress(total, done, title, bar)
