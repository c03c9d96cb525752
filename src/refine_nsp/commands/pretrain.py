"""`refine-nsp pretrain`: make a tiny base model."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from refine_nsp.commands.grammar import Command, Settings
from refine_nsp.commands.parser import Call
from refine_nsp.fields import setting
from refine_nsp.tiny.pretrain import pretrain
from refine_nsp.tiny.pretrain_settings import PretrainConfig


def read_config(**settings: object) -> PretrainConfig:
    """Build the settings from plain values, as a file has them."""
    return PretrainConfig.read(settings)


@dataclass
class RunArguments:
    """How far to go, and from where.

    Attributes:
        stop_after: measure and save the model after so many steps; run again to continue.
        restart: start anew although output_dir has a checkpoint.
    """

    stop_after: int | None = setting(None, common=True)
    restart: bool = setting(False, common=True)


COMMAND = Command(
    "Make a tiny base model from the text that every Python installation has.",
    (Settings(PretrainConfig, "the base", make=read_config), Settings(RunArguments, "this run")),
    dry_run=True,
)


def run(call: Call, config: PretrainConfig, arguments: RunArguments) -> None:
    """Pretrain, or continue a run that was stopped, and say where the model is."""
    if call.dry_run:
        Console().print(config, f"\n{config.total_steps} steps, {config.total_steps * config.tokens_per_step:,} tokens")
        return
    out = pretrain(config, resume=not arguments.restart, stop_after=arguments.stop_after)
    Console(stderr=True).print(f"model: {out}")
