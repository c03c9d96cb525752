"""Show the progress of long work: a bar with tokens per second and time left, or a plain line now and then where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

PLAIN_LINE_SECONDS = 30.0
PATIENCE_SECONDS = 3.0  # work that is done before shows nothing
T = TypeVar("T")


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


def counted(items: Iterable[T], title: str) -> Iterator[T]:
    """Yield every item, and show the progress once they have taken more than a few seconds."""
    known, start, progress = list(items), time.monotonic(), None
    with ExitStack() as shown:
        for done, item in enumerate(known):
            if progress is None and time.monotonic() - start > PATIENCE_SECONDS:
                progress = shown.enter_context(step_progress(len(known), done, title))
            yield item
            if progress is not None:
                progress.advance(0)


def as_ours(bar: Callable[..., object], args: tuple[Iterable[object], ...], kwargs: Mapping[str, object]) -> object:
    """Show what a library counts by a bar of its own (tqdm) as ours: a hook of transformers, which loads and saves weights one by one.

    Args:
        bar: the library's own, which a bar over nothing that can be counted keeps. args: what it is over. kwargs: `desc`, its title.
    """
    return counted(args[0], str(kwargs.get("desc") or "work").lower()) if args else bar(**kwargs)
