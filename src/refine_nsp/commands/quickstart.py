"""`refine-nsp quickstart`: do the main job on what is here."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from refine_nsp.commands.grammar import Call, Command, Settings
from refine_nsp.tiny.quickstart import quickstart, settings


@dataclass
class QuickstartArguments:
    """Choose the size of the job, its text and its place.

    Attributes:
        output_dir: where arms, table and report go.
        data: your own text (file, folder, glob) instead of the standard library's.
        text_column: its column, for jsonl and parquet.
        model: the base to start from.
        full: more seeds, steps and prompts (hours on 2 cores).
        seeds: number of seeds.
        steps: optimizer steps per arm.
    """

    output_dir: str = "runs/quickstart"
    data: str | None = None
    text_column: str = "text"
    model: str = "refine-nsp/tiny-gated-deltanet"
    full: bool = False
    seeds: int | None = None
    steps: int | None = None


COMMAND = Command(
    "Mid-train a shipped base by several ways, compare, and write a report (minutes, offline).",
    (Settings(QuickstartArguments),),
    dry_run=True,
)


def run(call: Call, arguments: QuickstartArguments) -> None:
    """Run every arm, print the table and write the page."""
    chosen = settings(arguments.full, arguments.seeds, arguments.steps)
    if call.dry_run:
        Console().print(str(chosen))
        return
    quickstart(chosen, arguments.output_dir, arguments.model, arguments.data, arguments.text_column)
