"""`refine-nsp posttrain`: train a model to answer, each batch's prompts trained on first (nested), or by SFT alone."""

from __future__ import annotations

from contextlib import nullcontext

from datasets import Dataset
from rich.console import Console

from refine_nsp.commands.grammar import Call, Command, Settings
from refine_nsp.commands.shared import MODEL, ModelArguments, load_to_train
from refine_nsp.commands.training_run import check_reporting, dry_run_table, train_and_save
from refine_nsp.config import NSPConfig
from refine_nsp.errors import RefineError
from refine_nsp.report.tables import Cell
from refine_nsp.training.answers import AnswerArguments, prepare_answers
from refine_nsp.training.nested import PostTrainer, PostTrainingConfig

METHOD = Settings(NSPConfig, "next-sequence prediction", preset=PostTrainingConfig.default_preset)
TAUGHT = ("teacher", "lambda_context", "teacher_window")  # settings of mid-training alone
COMMAND = Command(
    "Train to answer prompts: by SFT, or nested with an update on each batch's prompts first.",
    (MODEL, Settings(AnswerArguments, "data"), Settings(PostTrainingConfig, "training", skip=TAUGHT, nsp=METHOD)),
    description="--objective says what a batch's prompts are trained on before its answers: refine (Nested ReFINE), ntp (Nested SFT) or "
    "none (SFT).",
    dry_run=True,
)


def run(call: Call, source: ModelArguments, data: AnswerArguments, args: PostTrainingConfig) -> None:
    """Load the model and the data, train, save and report."""
    check_reporting(args)
    model, tokenizer = load_to_train(source, args)
    # The other processes of a machine read what the first one leaves in the cache; questions that prompts are built of leave nothing.
    with args.main_process_first(desc="tokenize") if data.dataset_name is not None else nullcontext():
        train, validation = prepare_answers(data, tokenizer, args.max_length)
    shortest = min(len(ids) for ids in train["prompt_ids"])
    if shortest < (needed := args.phase.shortest):
        raise RefineError(f"the shortest prompt has {shortest} tokens; --objective {args.objective} needs {needed}")
    if call.dry_run:
        Console().print(dry_run_table(plan(train, validation), call).rich())
        return
    sources = [name for name in (data.dataset_name, data.squad, data.hotpotqa) if name is not None]
    train_and_save(PostTrainer, call, source, model, tokenizer, args, (train, validation), sources)


def plan(train: Dataset, validation: Dataset | None) -> list[list[Cell]]:
    """Return rows of a dry run's table: the sizes of the data."""
    prompts = [len(x) for x in train["prompt_ids"]]
    return [
        ["training prompts", f"{len(train):,}"],
        ["prompt tokens", f"{min(prompts):,} to {max(prompts):,}"],
        ["validation prompts", f"{len(validation):,}" if validation is not None else "none"],
    ]
