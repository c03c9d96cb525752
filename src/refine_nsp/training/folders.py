"""A run and its folder: what its checkpoints were made with, and what a run before it left there."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
from torch import nn
from transformers import TrainingArguments

from refine_nsp.errors import RefineError
from refine_nsp.files import append_json_lines, read_json_lines, write_atomically
from refine_nsp.training.arguments import ReFINEConfig
from refine_nsp.training.checkpoints import PLAIN_FILES, checkpoints_of, step_of

SETTINGS_FILE = "settings.json"
# Of transformers' settings, what the weights after a step depend on; the rest is logging, saving, validating, places, speed and memory.
MATTER = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "optim_target_modules",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "neftune_noise_alpha", "bf16", "fp16", "seed",
    "data_seed", "train_sampling_strategy", "length_column_name", "dataloader_drop_last",
)  # fmt: skip
# Of ours, what they do not depend on, or beyond rounding not.
MAY_DIFFER = (
    "nsp", "log_completions", "num_completions_to_print", "max_skipped_steps", "answer_metric", "max_new_tokens", "schedule",
    "segment_tokens",
)  # fmt: skip
ENDLESS = (
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "greedy",
)  # schedules that know no last step
EXAMPLES = 16  # of the training data that are compared

EARLIER = "earlier-{}"
# What a run writes beside its checkpoints; of a model's files those that come with weights.
WRITTEN = (
    "metrics.jsonl", "completions.jsonl", "config.yaml", "environment.json", "trainer_state.json", "training_args.bin", "README.md",
    "curves.svg", "report.html", "model*.safetensors*", "adapter_*",
)  # fmt: skip


# --- settings ---------------------------------------------------------------------------------------------------------
def settings_of(args: ReFINEConfig, method: Mapping[str, Any], model: str, data: Any) -> dict[str, Any]:
    """List what a run's weights depend on, by the names of flags, as plain values; `method`: those of the phase."""
    own = {f.name for f in fields(args)} - {f.name for f in fields(TrainingArguments)} - set(MAY_DIFFER)
    settings = {name: getattr(args, name) for name in sorted({*MATTER, *own})}
    settings["max_steps"] = args.max_steps if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    settings |= {k: v for k, v in method.items() if k not in MAY_DIFFER}
    settings |= {"model": model, "training_data": data_of(data)}
    return dict(json.loads(json.dumps(settings, default=str)))


def model_of(model: nn.Module) -> str:
    """A model in words: its kind and size. A checkpoint of another would be loaded in part, in silence."""
    kind = model(step=lambda m: m.config.model_type)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{kind}, {trained:,} of {sum(p.numel() for p in model.parameters()):,} parameters trained"


def data_of(data: Any) -> str | None:
    """The training data in words, by content: their number, and a checksum of some; None where they cannot be looked up."""
    if not isinstance(data, datasets.Dataset):
        return None
    columns = [name for name in data.column_names if name != "context_scores"]
    some = data.select_columns(columns).select(range(0, len(data), max(1, len(data) // EXAMPLES)))
    text = json.dumps([some[i] for i in range(len(some))], sort_keys=True, default=str)
    return f"{len(data)} examples ({zlib.crc32(text.encode()):08x})"


def save_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Into a checkpoint."""
    write_atomically(folder / SETTINGS_FILE, json.dumps(settings, indent=1) + "\n")


def check_settings(checkpoint: Path, own: Mapping[str, Any]) -> None:
    """RefineError where a checkpoint was made with other settings, which names them, or has made more steps than there are to be.

    More or fewer steps will do where the learning rate's schedule does not depend on their number.
    """
    done = step_of(checkpoint)
    if isinstance(own["max_steps"], int) and done > own["max_steps"]:
        raise RefineError(f"{checkpoint} has made {done} steps, more than max_steps={own['max_steps']}")
    path = checkpoint / SETTINGS_FILE
    if not path.exists():  # of another program
        return
    made = json.loads(path.read_text(encoding="utf-8"))
    changed = [name for name in made if name in own and made[name] != own[name]]
    follows = own["lr_scheduler_type"] not in ENDLESS or (own["lr_scheduler_type"] != "constant" and 0 < own["warmup_steps"] < 1)
    if not follows:
        changed = [name for name in changed if name != "max_steps"]
    if changed:
        why = f" (lr_scheduler_type={own['lr_scheduler_type']} follows it)" if "max_steps" in changed else ""
        shown = "; ".join(f"{name} was {made[name]!r}, now {own[name]!r}" for name in changed)
        raise RefineError(
            f"{checkpoint} was made with other settings: {shown}{why}. Go on with those it was made with, or begin a new run: in "
            f"another output_dir, or from its weights (model_name_or_path={checkpoint})"
        )


# --- an earlier run's files -------------------------------------------------------------------------------------------
def ours(path: Path) -> bool:
    """Whether a file of a run's folder is not the user's own model card."""
    from refine_nsp.report.card import is_ours

    return path.name != "README.md" or is_ours(path)


def set_aside(folder: Path, own: Sequence[Mapping[str, Any]]) -> Path | None:
    """Move what an earlier run left in a folder into one of its own inside it; that folder, or None where there was nothing.

    Args:
        own: records that this run has written itself, before it began.
    """
    records = read_json_lines(folder / "metrics.jsonl")
    if len(records) <= len(own) and not checkpoints_of(folder):
        return None
    weights = [*folder.glob("model*.safetensors"), *folder.glob("adapter_*")]
    patterns = (*WRITTEN, *(PLAIN_FILES if weights else ()))
    found = sorted({*checkpoints_of(folder), *(p for pattern in patterns for p in folder.glob(pattern) if ours(p))})
    number = next(n for n in range(1, 10**6) if not (folder / EARLIER.format(n)).exists())
    aside = folder / EARLIER.format(number)
    aside.mkdir()
    for path in found:
        os.replace(path, aside / path.name)
    if own:
        write_atomically(aside / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in records[: len(records) - len(own)]))
        append_json_lines(folder / "metrics.jsonl", records[len(records) - len(own) :])
    return aside
