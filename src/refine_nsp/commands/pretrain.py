"""`refine-nsp pretrain`: make a tiny base model from the text every Python installation has."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from refine_nsp.commands.midtrain import Noting, check_reporting, in_one_line, resume_from
from refine_nsp.commands.options import Options, Settings
from refine_nsp.report.tables import Cell, Table
from refine_nsp.tiny.pretrain import pretrain
from refine_nsp.tiny.pretrain_settings import PretrainConfig

COMMON = (
    "output_dir model_type start_from hidden_size num_hidden_layers num_heads intermediate_size vocab_size window max_length "
    "max_steps per_device_train_batch_size gradient_accumulation_steps learning_rate warmup_steps weight_decay bf16 store_dtype "
    "eval_steps probe_lengths probes_per_kind logging_steps save_steps resume_from_checkpoint seed"
).split()
# Settings that a pretraining has no use for: it learns by its own phase, from rows that it makes itself.
UNUSED = (
    "objective", "steps_per_generation", "context_scores", "log_completions", "num_completions_to_print", "num_train_epochs",
    "train_sampling_strategy", "length_column_name",
)  # fmt: skip


def options_of() -> Options:
    """Declare the command's flags."""
    summary = "Make a tiny base model from the text every Python installation has and from generated documents (recipes/pretrain_*.yaml)."
    return Options("pretrain", summary, (Settings(PretrainConfig, skip=UNUSED),), COMMON)


def run(argv: Sequence[str]) -> None:
    """Pretrain (or resume), and say where the model is."""
    options = options_of()
    args, dry_run = options.parse(argv)
    check_reporting(args)
    if dry_run:
        Console().print(plan(args).rich())
        return
    with in_one_line():
        out = pretrain(args, resume_from(args) or False, [Noting(options.resolved())])
    Console(stderr=True).print(f"model: {out}   curves: {out / 'curves.html'}")


def plan(args: PretrainConfig) -> Table:
    """Make the table that a dry run shows."""
    tokens = args.max_length * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    rows: list[list[Cell]] = [["optimizer steps", f"{args.max_steps:,}"], ["training tokens", f"{args.max_steps * tokens:,}"]]
    rows += [[f"phase {i}", str(phase)] for i, phase in enumerate(args.phases, 1)]
    rows += [[name, str(getattr(args, name))] for name in ("model_type", "start_from", "learning_rate", "seed", "output_dir")]
    return Table("Dry run: nothing was trained or written", ["what", "value"], rows)
