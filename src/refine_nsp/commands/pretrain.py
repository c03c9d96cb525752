"""`refine-nsp pretrain`: make a tiny base model from the text every Python installation has."""

from __future__ import annotations

from rich.console import Console

from refine_nsp.commands.grammar import Call, Command, Settings, in_one_line
from refine_nsp.commands.training_run import REFUSED, SettingsWriter, check_reporting, resume_from
from refine_nsp.report.tables import Cell, Table
from refine_nsp.tiny.pretrain import pretrain
from refine_nsp.tiny.pretrain_settings import PretrainConfig

# Settings that a pretraining has no use for: it learns by its own phase, from rows that it makes itself.
UNUSED = (
    "objective", "steps_per_generation", "context_scores", "log_completions", "num_completions_to_print", "num_train_epochs",
    "train_sampling_strategy", "length_column_name", "teacher", "lambda_context", "teacher_window",
)  # fmt: skip


COMMAND = Command(
    "Make a tiny base model from the text every Python installation has, and from generated documents.",
    (Settings(PretrainConfig, "base and training", skip=UNUSED),),
    description="The shipped bases' settings are recipes/pretrain_*.yaml.",
    dry_run=True,
)


def run(call: Call, args: PretrainConfig) -> None:
    """Pretrain (or resume), and say where the model is."""
    check_reporting(args)
    if call.dry_run:
        Console().print(plan(args).rich())
        return
    with in_one_line(REFUSED, ValueError, ImportError):
        out = pretrain(args, resume_from(args) or False, [SettingsWriter(call.resolved())])
    Console(stderr=True).print(f"model: {out}   curves: {out / 'curves.html'}")


def plan(args: PretrainConfig) -> Table:
    """Make the table that a dry run shows."""
    tokens = args.max_length * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    rows: list[list[Cell]] = [["optimizer steps", f"{args.max_steps:,}"], ["training tokens", f"{args.max_steps * tokens:,}"]]
    rows += [[f"phase {i}", str(phase)] for i, phase in enumerate(args.phases, 1)]
    rows += [[name, str(getattr(args, name))] for name in ("model_type", "start_from", "learning_rate", "seed", "output_dir")]
    return Table("Dry run: nothing was trained or written", ["what", "value"], rows)
