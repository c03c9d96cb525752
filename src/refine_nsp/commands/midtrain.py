"""`refine-nsp midtrain`: train a pretrained fast-weight model on long text with ReFINE, or with the cross-entropy alone."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, IterableDataset
from rich.console import Console
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from refine_nsp.commands.model_options import ModelArguments, build_model
from refine_nsp.commands.options import Options, Settings
from refine_nsp.config import NSPConfig, check_choice
from refine_nsp.environment import environment
from refine_nsp.errors import RefineError
from refine_nsp.files import write_atomically
from refine_nsp.models.load import check_vocabulary, load_model, load_tokenizer
from refine_nsp.nsp.rewards import wants_columns
from refine_nsp.report.runs import report
from refine_nsp.report.tables import Cell, Table
from refine_nsp.training import DataArguments, ReFINEConfig, ReFINETrainer, prepare_data
from refine_nsp.training.run_folder import RunFolder

COMMON = (
    "model_name_or_path dataset_name text_column output_dir objective preset max_length max_steps num_train_epochs "
    "per_device_train_batch_size gradient_accumulation_steps learning_rate positions_per_sequence rollout_length "
    "num_generations estimator order token_weights selection reward_funcs schedule lambda_rl context_scores steps_per_generation "
    "validation_dataset eval_strategy eval_steps logging_steps log_completions save_steps resume_from_checkpoint bf16 "
    "gradient_checkpointing packing streaming dataset_num_proc use_peft seed"
).split()


def options_of() -> Options:
    """The command's flags."""
    summary = "Mid-train a fast-weight model on next-sequence prediction (ReFINE), or by next-token prediction: --objective ntp."
    return Options("midtrain", summary, (ModelArguments, DataArguments, Settings(ReFINEConfig, nsp=Settings(NSPConfig))), COMMON)


def run(argv: Sequence[str]) -> None:
    """Parse, load, train, save, report."""
    options = options_of()
    model_args, data_args, args, dry_run = options.parse(argv)
    check_reporting(args)
    model = build_model(model_args, args)
    tokenizer = load_tokenizer(model_args.tokenizer)
    check_vocabulary(model, tokenizer)
    nsp = args.nsp
    with args.main_process_first(desc="tokenize"):  # the other processes of a machine read what the first one leaves in the cache
        train, validation = prepare_data(data_args, tokenizer, args.max_length, nsp.shortest, wants_columns(nsp))
    if dry_run:
        Console().print(plan(model, train, validation, args, options.resolved()).rich())
        return
    train_and_save(ReFINETrainer, options, model_args, model, tokenizer, args, (train, validation), [str(data_args.dataset_name)])


def train_and_save(
    kind: type[ReFINETrainer], options: Options, source: ModelArguments, model: nn.Module, tokenizer: PreTrainedTokenizerBase,
    args: ReFINEConfig, rows: tuple[Any, Any], data: Sequence[str],
) -> None:  # fmt: skip
    """The run itself, from where it stands; then its model, its last figures, its card and its report.

    Args:
        rows: to train on, and to validate on (or None). data: where they come from, for the card.
    """
    if rows[1] is None and args.eval_strategy != "no":
        raise RefineError("eval_strategy asks for validation, but there is none; set validation_dataset")
    dtype = args.weights_dtype(source.dtype)
    reference = load_model(source.model_name_or_path, dtype=dtype) if args.nsp.kl_coef > 0 else None
    with in_one_line():
        trainer = kind(
            model=model,
            args=args,
            train_dataset=rows[0],
            eval_dataset=rows[1],
            processing_class=tokenizer,
            reference_model=reference,
        )
    out = Path(str(args.output_dir))
    trainer.add_callback(Noting(options.resolved()))
    trainer.describe(source.model_name_or_path, data, options.values)
    with in_one_line((ImportError,)):  # an optimizer of a package that is not installed
        trainer.train(resume_from_checkpoint=resume_from(trainer.args) or False)
    save(trainer, out)  # before anything else can go wrong
    if trainer.eval_dataset is not None:
        trainer.evaluate()
        trainer.save_state()
    if trainer.is_world_process_zero():
        trainer.write_card(out)  # once more: with the last figures
        Console(stderr=True).print(f"model: {out}   report: {report([out], out / 'report.html')}")


class Noting(TrainerCallback):
    """Settings and environment into the run's folder, once it is known to be this run's."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            out = Path(str(args.output_dir))
            write_atomically(out / "config.yaml", yaml.safe_dump(self.config, sort_keys=True))
            write_atomically(out / "environment.json", json.dumps(environment(args.seed), indent=1) + "\n")


@contextmanager
def in_one_line(kinds: tuple[type[Exception], ...] = (ValueError, ImportError)) -> Iterator[None]:
    """What transformers has against settings, in its words but as our error."""
    try:
        yield
    except RefineError:
        raise
    except kinds as error:
        raise RefineError(f"these settings cannot be trained with: {' '.join(str(error).split())}") from error


def check_reporting(args: ReFINEConfig) -> None:
    """RefineError for a place of --report_to whose package is not here."""
    here = get_available_reporting_integrations()
    for name in list(args.report_to or []):
        check_choice("report_to", name, (*INTEGRATION_TO_CALLBACK, "none"))
        if name != "none" and name not in here:
            raise RefineError(
                f"--report_to {name} needs a package that is not installed: pip install {name}; or --report_to none"
            )


def resume_from(args: ReFINEConfig) -> str | None:
    """What --resume_from_checkpoint means: a folder, or the last checkpoint. A run that was stopped before its first has none, and the
    same command line, as schedulers repeat it, begins it anew."""
    given = args.resume_from_checkpoint
    if given not in ("True", "true", "last"):
        return given
    last = RunFolder(Path(str(args.output_dir))).last_complete()
    if last is None:
        warnings.warn(f"{args.output_dir} has no checkpoint to resume from: the run begins anew", stacklevel=2)
    return None if last is None else str(last)


def save(trainer: ReFINETrainer, out: Path) -> None:
    """The final model in the run's folder; one clear line when it cannot be written."""
    try:
        trainer.save_model(str(out))
        trainer.save_state()
    except (OSError, RuntimeError, SafetensorError) as error:
        raise RefineError(f"could not save the model in {out}: {error}; the last checkpoint there is whole") from error


def plan(
    model: nn.Module,
    train: Dataset | IterableDataset,
    validation: Dataset | None,
    args: ReFINEConfig,
    config: dict[str, Any],
) -> Table:
    """What a dry run shows."""
    parameters = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rows: list[list[Cell]] = [["parameters", f"{parameters:,}"], ["trainable", f"{trainable:,}"]]
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if isinstance(train, Dataset):
        steps = args.max_steps if args.max_steps > 0 else int(len(train) // per_step * args.num_train_epochs)
        tokens = sum(len(x) for x in train["input_ids"])
        rows += [["training windows", f"{len(train):,}"], ["training tokens", f"{tokens:,}"], ["optimizer steps", f"{steps:,}"]]
    rows += [
        ["validation windows", f"{len(validation):,}" if validation is not None else "none"],
        ["sequences per step", per_step],
    ]
    rows += [[f"config: {k}", str(v)] for k, v in sorted(config.items())]
    return Table("Dry run: nothing was trained or written", ["what", "value"], rows)
