"""`refine-nsp export RUN FOLDER`: write a plain model folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from refine_nsp.commands.grammar import Call, Command, Settings
from refine_nsp.training.checkpoints import export_checkpoint


@dataclass
class ExportArguments:
    """Name the model to export, and its place.

    Attributes:
        checkpoint: a run with --use_peft, or a checkpoint with adapters or with sharded weights.
        folder: where the plain model goes.
    """

    checkpoint: Path
    folder: Path


COMMAND = Command(
    "Write a plain model folder from LoRA adapters (merged), or from a checkpoint in shards (FSDP).",
    (Settings(ExportArguments),),
    positional=("checkpoint", "folder"),
)


def run(call: Call, arguments: ExportArguments) -> None:
    """Write the folder and name it."""
    export_checkpoint(arguments.checkpoint, arguments.folder)
    Console(stderr=True).print(f"model: {arguments.folder}")
