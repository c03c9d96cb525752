"""`refine-nsp convert SOURCE FOLDER`: give an attention model a memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from refine_nsp.commands.grammar import Call, Command, Settings
from refine_nsp.models.convert import MemorySettings, convert


@dataclass
class ConvertArguments:
    """Name the model to convert, and the place of the new one.

    Attributes:
        source: a folder, a hub name or a GGUF file of a Llama, Mistral or Qwen2.
        folder: where the LaCT model goes.
    """

    source: str
    folder: Path


COMMAND = Command(
    "Turn an attention model into a LaCT model that starts as itself within a window.",
    (Settings(ConvertArguments, "models"), Settings(MemorySettings, "the memory")),
    description="Weights are renamed and nothing is trained; what lies beyond the window is forgotten until the memory has learned.",
    positional=("source", "folder"),
)


def run(call: Call, arguments: ConvertArguments, settings: MemorySettings) -> None:
    """Write the folder, name it, and say what is new in it."""
    made = convert(arguments.source, arguments.folder, settings)
    share = f"{made.parameters:,} parameters, {made.new_parameters:,} of them new, in {made.seconds:.1f} s"
    Console(stderr=True).print(f"model: {arguments.folder} ({share})", highlight=False)
