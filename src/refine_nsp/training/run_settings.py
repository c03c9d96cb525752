"""A run tells its settings: a model card those that made the model, a checkpoint those that a resumed run must have again."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import datasets
from torch import nn
from transformers import TrainingArguments

from refine_nsp.config import NSPConfig
from refine_nsp.errors import RefineError
from refine_nsp.fields import is_known, live, told
from refine_nsp.training.arguments import ReFINEConfig
from refine_nsp.training.checkpoints import Checkpoint

SETTINGS_FILE = "settings.json"
# These schedules know no last step.
ENDLESS = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau", "greedy")
EXAMPLES = 16  # so many examples of the training data are compared


def settings_of(args: ReFINEConfig, method: Mapping[str, Any], model: str, data: object) -> dict[str, Any]:
    """List what the weights of a run depend on, by the names of flags, as plain values: its settings, `method` (the fields of `NSPConfig`
    that its phase reads), the model (see `model_of`) and the training data (see `data_of`)."""
    theirs = {f.name for f in fields(TrainingArguments)}
    # A user's subclass may have fields of its own, of which nothing is said.
    of_a_subclass = {f.name for f in fields(args) if f.name not in theirs and not is_known(f)}
    compared = ({*told(type(args), "resume")} & live(args)) | of_a_subclass
    settings = {name: getattr(args, name) for name in sorted(compared)}
    settings["max_steps"] = args.max_steps if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    settings |= {name: method[name] for name in told(NSPConfig, "resume") if name in method}
    settings |= {"model": model, "training_data": data_of(data)}
    return dict(json.loads(json.dumps(settings, default=str)))


def told_of(args: ReFINEConfig, method: Mapping[str, Any], preset: object, adapters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a model card tells, in its order: those that say how the model came about, where they had an effect.

    Args:
        method: the fields of `NSPConfig` that the run's phase reads, with their values. preset: what these started from, where known.
        adapters: PEFT's configurations, by the adapters' names; empty where the weights themselves were trained.
    """
    own = {name: getattr(args, name) for name in told(type(args), "card") if name in live(args)}
    del own["num_train_epochs" if args.max_steps > 0 else "max_steps"]
    nsp = {name: method[name] for name in told(NSPConfig, "card") if name in method}
    if "reward_funcs" in nsp:
        nsp = {"preset": preset, **nsp, "reward_funcs": args.nsp.reward_names}
    lora = {"use_peft": True, "lora_r": next(getattr(a, "r", None) for a in adapters.values())} if adapters else {}
    everything = {"objective": args.objective, **nsp, **own, **lora}
    return {name: value for name, value in everything.items() if value is not None and value is not False}


def model_of(model: nn.Module) -> str:
    """Name a model by its kind and size, since a checkpoint of another would be loaded in part, in silence."""
    kind = model(step=lambda m: m.config.model_type)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{kind}, {trained:,} of {sum(p.numel() for p in model.parameters()):,} parameters trained"


def data_of(data: object) -> str | None:
    """Name the training data by content: their number, and a checksum of some; None where they cannot be looked up."""
    if not isinstance(data, datasets.Dataset):
        return None
    columns = [name for name in data.column_names if name != "context_scores"]
    some = data.select_columns(columns).select(range(0, len(data), max(1, len(data) // EXAMPLES)))
    text = json.dumps([some[i] for i in range(len(some))], sort_keys=True, default=str)
    return f"{len(data)} examples ({zlib.crc32(text.encode()):08x})"


def check_settings(checkpoint: Checkpoint, own: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that was made with other settings, or has made more steps than there are to be (RefineError). Another number of
    steps will do where the learning rate's schedule does not depend on it."""
    done = checkpoint.step
    if isinstance(own["max_steps"], int) and done > own["max_steps"]:
        raise RefineError(f"{checkpoint} has made {done} steps, more than max_steps={own['max_steps']}")
    path = checkpoint.path / SETTINGS_FILE
    if not path.exists():  # another program made the checkpoint
        return
    made = json.loads(path.read_text(encoding="utf-8"))
    changed = [name for name in made if name in own and made[name] != own[name]]
    kind = own["lr_scheduler_type"]
    if kind == "constant" or (kind in ENDLESS and not 0 < own["warmup_steps"] < 1):
        changed = [name for name in changed if name != "max_steps"]
    if changed:
        why = f" (lr_scheduler_type={kind} follows it)" if "max_steps" in changed else ""
        shown = "; ".join(f"{name} was {made[name]!r}, now {own[name]!r}" for name in changed)
        raise RefineError(
            f"{checkpoint} was made with other settings: {shown}{why}. Resume with those it was made with, or begin a new run: in "
            f"another output_dir, or from its weights (model_name_or_path={checkpoint})"
        )
