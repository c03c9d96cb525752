"""`refine-nsp export RUN FOLDER`: a plain model folder from LoRA adapters (merged), or from a checkpoint in shards (FSDP)."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        type=Path,
        help="a run with --use_peft, or a checkpoint with adapters or with sharded weights",
    )
    parser.add_argument("folder", type=Path, help="where the plain model goes")


def run(args: argparse.Namespace) -> None:
    """Write the folder and name it."""
    from rich.console import Console

    from refine_nsp.training.export import export_checkpoint

    export_checkpoint(args.checkpoint, args.folder)
    Console(stderr=True).print(f"model: {args.folder}")
