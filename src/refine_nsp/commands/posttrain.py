"""`refine-nsp posttrain`: train a model to answer, each batch's prompts trained on first (nested), or by SFT alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from datasets import Dataset
from rich.console import Console

from refine_nsp.commands.midtrain import check_reporting, train_and_save
from refine_nsp.commands.model_options import ModelArguments, build_model
from refine_nsp.commands.options import Options, Settings
from refine_nsp.config import NSPConfig
from refine_nsp.errors import RefineError
from refine_nsp.models.load import check_vocabulary, load_tokenizer
from refine_nsp.report.tables import Cell, Table
from refine_nsp.training.answers import AnswerArguments, prepare_answers
from refine_nsp.training.nested import PostTrainer, PostTrainingConfig

COMMON = (
    "model_name_or_path dataset_name squad hotpotqa ruler_length ruler_samples question_column output_dir objective preset "
    "inner_steps reference answer_metric max_length max_answer_tokens max_new_tokens max_steps num_train_epochs "
    "per_device_train_batch_size gradient_accumulation_steps learning_rate positions_per_sequence rollout_length "
    "num_generations estimator order selection reward_funcs lambda_rl validation_dataset eval_strategy eval_steps logging_steps "
    "save_steps resume_from_checkpoint apply_chat_template bf16 use_peft seed"
).split()


def options_of() -> Options:
    """The command's flags."""
    summary = (
        "Post-train a model on prompts and answers. --objective refine (Nested ReFINE), ntp (Nested SFT) or none (SFT): what a batch's "
        "prompts are trained on before its answers."
    )
    nsp = Settings(NSPConfig, preset=PostTrainingConfig.default_preset)
    return Options("posttrain", summary, (ModelArguments, AnswerArguments, Settings(PostTrainingConfig, nsp=nsp)), COMMON)


def run(argv: Sequence[str]) -> None:
    """Parse, load, train, save, report."""
    options = options_of()
    model_args, data_args, args, dry_run = options.parse(argv)
    check_reporting(args)
    model = build_model(model_args, args)
    tokenizer = load_tokenizer(model_args.tokenizer)
    check_vocabulary(model, tokenizer)
    # The other processes of a machine read what the first one leaves in the cache; questions that prompts are built of leave nothing.
    with args.main_process_first(desc="tokenize") if data_args.dataset_name is not None else nullcontext():
        train, validation = prepare_answers(data_args, tokenizer, args.max_length)
    shortest = min(len(ids) for ids in train["prompt_ids"])
    if shortest < (needed := args.phase.shortest):
        raise RefineError(f"the shortest prompt has {shortest} tokens; --objective {args.objective} needs {needed}")
    if dry_run:
        Console().print(plan(train, validation, options.resolved()).rich())
        return
    sources = [name for name in (data_args.dataset_name, data_args.squad, data_args.hotpotqa) if name is not None]
    train_and_save(PostTrainer, options, model_args, model, tokenizer, args, (train, validation), sources)


def plan(train: Dataset, validation: Dataset | None, config: dict[str, Any]) -> Table:
    """What a dry run shows."""
    prompts = [len(x) for x in train["prompt_ids"]]
    rows: list[list[Cell]] = [
        ["training prompts", f"{len(train):,}"],
        ["prompt tokens", f"{min(prompts):,} to {max(prompts):,}"],
        ["validation prompts", f"{len(validation):,}" if validation is not None else "none"],
    ]
    rows += [[f"config: {k}", str(v)] for k, v in sorted(config.items())]
    return Table("Dry run: nothing was trained or written", ["what", "value"], rows)
