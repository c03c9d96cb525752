"""Share what the training commands do once data and model are there: train from where a run stands, save, report."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from datasets import Dataset, IterableDataset
from rich.console import Console
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from refine_nsp.commands.grammar import Call, in_one_line
from refine_nsp.commands.shared import ModelArguments
from refine_nsp.config import check_choice
from refine_nsp.environment import environment
from refine_nsp.errors import RefineError
from refine_nsp.files import write_atomically
from refine_nsp.models.load import load_model
from refine_nsp.report.runs import report
from refine_nsp.report.tables import Cell, Table
from refine_nsp.training import ReFINEConfig, ReFINETrainer
from refine_nsp.training.run_folder import RunFolder
from refine_nsp.training.sources import Held
from refine_nsp.values import Value

Rows: TypeAlias = Dataset | IterableDataset
REFUSED = "these settings cannot be trained with"  # what transformers says of settings stands behind it


def train_and_save(
    kind: type[ReFINETrainer], call: Call, source: ModelArguments, model: nn.Module, tokenizer: PreTrainedTokenizerBase,
    args: ReFINEConfig, rows: tuple[Rows, Held], data: Sequence[str],
) -> None:  # fmt: skip
    """Run the training from where it stands; then write its model, its last figures, its card and its report.

    Args:
        rows: to train on, and to validate on. data: the names of their sources, for the card.
    """
    if rows[1] is None and args.do_eval:  # eval_strategy sets it too
        asks = "do_eval" if args.eval_strategy == "no" else "eval_strategy"
        raise RefineError(f"{asks} asks for validation, but there is none; set validation_dataset")
    dtype = args.weights_dtype(source.dtype)
    reference = load_model(source.model_name_or_path, dtype=dtype) if args.nsp.kl_coef > 0 else None
    with in_one_line(REFUSED, ValueError, ImportError):
        trainer = kind(
            model=model,
            args=args,
            train_dataset=rows[0],
            eval_dataset=rows[1],
            processing_class=tokenizer,
            reference_model=reference,
        )
    out = Path(str(args.output_dir))
    trainer.add_callback(SettingsWriter(call.resolved()))
    trainer.describe(source.model_name_or_path, data, call.values)
    with in_one_line(REFUSED, ImportError):  # the package of an optimizer may not be installed
        trainer.train(resume_from_checkpoint=resume_from(trainer.args) or False)
    save(trainer, out)  # before anything else can go wrong
    page = write_report(trainer, out)
    if validates_at_the_end(trainer, call):
        trainer.evaluate()
        trainer.save_state()
        page = write_report(trainer, out)  # once more: with the last figures
    if page is not None:
        Console(stderr=True).print(f"model: {out}   report: {page}")


def validates_at_the_end(trainer: ReFINETrainer, call: Call) -> bool:
    """Tell whether the trained model is to be validated: it was asked for (eval_strategy, do_eval, or a wish what to validate on), and the
    last step has not done so already."""
    if trainer.eval_dataset is None:
        return False
    logs = [log for log in trainer.state.log_history if log["step"] == trainer.state.global_step]
    done = any(name.startswith("eval_") and name.endswith("_runtime") for log in logs for name in log)
    asked = trainer.args.do_eval or not {"validation_dataset", "validation_fraction"}.isdisjoint(call.changed())
    return asked and (not done or trainer.args.load_best_model_at_end)


def write_report(trainer: ReFINETrainer, out: Path) -> Path | None:
    """Write the run's card and its report with the figures so far; None in all processes but the main one."""
    if not trainer.is_world_process_zero():
        return None
    trainer.write_card(out)
    return report([out], out / "report.html")


class SettingsWriter(TrainerCallback):
    """Write settings and environment into the run's folder, once it is known to be this run's, in the main process."""

    def __init__(self, config: Mapping[str, Value]) -> None:
        self.config = config

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            out = Path(str(args.output_dir))
            write_atomically(out / "config.yaml", yaml.safe_dump(dict(self.config), sort_keys=True))
            write_atomically(out / "environment.json", json.dumps(environment(args.seed), indent=1) + "\n")


def check_reporting(args: ReFINEConfig) -> None:
    """RefineError for a place of --report_to whose package is not installed."""
    there = ("none", *get_available_reporting_integrations())
    for name in args.report_to or []:
        check_choice("report_to", name, (*INTEGRATION_TO_CALLBACK, "none"))
        if name not in there:
            raise RefineError(f"--report_to {name} needs a package that is not installed: pip install {name}")


def resume_from(args: ReFINEConfig) -> str | None:
    """Return the checkpoint that --resume_from_checkpoint means: a folder, or the last one; None where there is none."""
    given = args.resume_from_checkpoint
    if given not in ("True", "true", "last"):
        return given
    if last := RunFolder(Path(str(args.output_dir))).last_complete():
        return str(last)
    # Schedulers repeat the same command line, also of a run that was stopped before its first checkpoint.
    warnings.warn(f"{args.output_dir} has no checkpoint to resume from: the run begins anew", stacklevel=2)
    return None


def save(trainer: ReFINETrainer, out: Path) -> None:
    """Write the final model into the run's folder; say in one line when it cannot be written."""
    try:
        trainer.save_model(str(out))
        trainer.save_state()
    except (OSError, RuntimeError, SafetensorError) as error:
        raise RefineError(f"could not save the model in {out}: {error}; the last checkpoint there is whole") from error


def dry_run_table(rows: list[list[Cell]], call: Call) -> Table:
    """Return the table that a dry run shows: the rows, and every setting that differs from its default."""
    settings: list[list[Cell]] = [[f"config: {name}", str(value)] for name, value in sorted(call.resolved().items())]
    return Table("Dry run: nothing was trained or written", ["what", "value"], [*rows, *settings])
