"""`refine-nsp midtrain`: train a pretrained fast-weight model on long text with ReFINE, or by the cross-entropy alone."""

from __future__ import annotations

from datasets import Dataset
from rich.console import Console
from torch import nn

from refine_nsp.commands.grammar import Call, Command, Settings
from refine_nsp.commands.shared import MODEL, ModelArguments, load_to_train
from refine_nsp.commands.training_run import Rows, check_reporting, dry_run_table, train_and_save
from refine_nsp.config import NSPConfig
from refine_nsp.nsp.rewards import wants_columns
from refine_nsp.report.tables import Cell
from refine_nsp.training import DataArguments, ReFINEConfig, ReFINETrainer, prepare_data
from refine_nsp.training.sources import Held
from refine_nsp.training.teacher import check_tokens

COMMAND = Command(
    "Train a pretrained model on long text with ReFINE (or --objective ntp, or distill with --teacher).",
    (
        MODEL,
        Settings(DataArguments, "data"),
        Settings(ReFINEConfig, "training", nsp=Settings(NSPConfig, "next-sequence prediction")),
    ),
    dry_run=True,
)


def run(call: Call, source: ModelArguments, data: DataArguments, args: ReFINEConfig) -> None:
    """Load the model and the data, train, save and report."""
    check_reporting(args)
    model, tokenizer = load_to_train(source, args)
    if args.teacher is not None:
        check_tokens(args.teacher, tokenizer, model)  # before text is tokenized, not after
    with args.main_process_first(desc="tokenize"):  # the other processes of a machine read what the first one leaves in the cache
        train, validation = prepare_data(
            data, tokenizer, args.max_length, args.nsp.shortest, wants_columns(args.nsp), args.carry_states
        )
    if call.dry_run:
        Console().print(dry_run_table(plan(model, train, validation, args), call).rich())
        return
    train_and_save(ReFINETrainer, call, source, model, tokenizer, args, (train, validation), data.all_names)


def plan(model: nn.Module, train: Rows, validation: Held, args: ReFINEConfig) -> list[list[Cell]]:
    """Return rows of a dry run's table: the sizes of the model, the data and the run."""
    parameters = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rows: list[list[Cell]] = [["parameters", f"{parameters:,}"], ["trainable", f"{trainable:,}"]]
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if isinstance(train, Dataset):
        steps = args.max_steps if args.max_steps > 0 else int(len(train) // per_step * args.num_train_epochs)
        tokens = sum(len(x) for x in train["input_ids"])
        rows += [["training windows", f"{len(train):,}"], ["training tokens", f"{tokens:,}"], ["optimizer steps", f"{steps:,}"]]
    sets = validation if isinstance(validation, dict) else {"": validation} if validation is not None else {}
    windows = ", ".join(f"{name} {len(rows):,}".strip() for name, rows in sets.items()) or "none"
    return [*rows, ["validation windows", windows], ["sequences per step", per_step]]
