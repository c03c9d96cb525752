"""`refine-nsp pretrain`: make a tiny base model from the text every Python installation has."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from refine_nsp.commands.options import check_types, read_yaml
from refine_nsp.errors import RefineError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, help="YAML with the fields of PretrainConfig (recipes/pretrain_delta_net.yaml)")
    parser.add_argument("--output_dir")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--learning_rate", type=float)
    parser.add_argument("--tokens_per_step", type=int)
    parser.add_argument(
        "--stop_after", type=int, metavar="STEPS", help="measure and save the model after so many steps; run again to go on"
    )
    parser.add_argument("--restart", action="store_true", help="do not go on from the checkpoint in output_dir")
    parser.add_argument("--dry_run", action="store_true", help="show what would run, touch nothing")


def run(args: argparse.Namespace) -> None:
    """Pretrain (or go on), and say where the model is."""
    from refine_nsp.tiny.pretrain import pretrain
    from refine_nsp.tiny.pretrain_settings import PretrainConfig, PretrainPhase

    settings = read_yaml(args.config) if args.config is not None else {}
    for name in ("output_dir", "seed", "learning_rate", "tokens_per_step"):
        if (value := getattr(args, name)) is not None:
            settings[name] = value
    try:
        check_types(settings, PretrainConfig)
        for phase in settings.get("phases") or []:
            check_types(phase, PretrainPhase)
        config = PretrainConfig.read(settings)
    except RefineError as error:
        raise RefineError(f"{args.config or 'pretrain'}: {error}") from error
    if args.dry_run:
        Console().print(config, f"\n{config.total_steps} steps, {config.total_steps * config.tokens_per_step:,} tokens")
        return
    Console(stderr=True).print(f"model: {pretrain(config, resume=not args.restart, stop_after=args.stop_after)}")
