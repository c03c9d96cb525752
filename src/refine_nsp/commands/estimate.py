"""`refine-nsp estimate MODEL` tells what a mid-training needs on a device, before anything is loaded or bought."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import monotonic

import torch
from rich.console import Console
from transformers import PreTrainedConfig

from refine_nsp.commands.grammar import Call, Command, Settings
from refine_nsp.commands.shared import MODEL, ModelArguments, with_adapters
from refine_nsp.config import NSPConfig
from refine_nsp.estimate.memory_and_time import Estimate, device_named, dtype_of, estimate
from refine_nsp.fields import Reader, check_read, setting
from refine_nsp.models.families import FAMILIES
from refine_nsp.models.load import load_config
from refine_nsp.report.tables import Cell, Table
from refine_nsp.training import ReFINEConfig


@dataclass
class EstimateArguments:
    """Say where the training would run, and how long.

    Attributes:
        device: b200, h200, h100, a100, mi300x, l40s or rtx4090.
        num_processes: devices, one process each.
        sharded: weights, gradients and optimizer state are shared out over them (FSDP2, ZeRO-3).
        utilisation: share of the device's bfloat16 peak that the run is assumed to reach; measure yours with `benchmarks/gpu.py`.
        total_tokens: of the whole run, for its hours.
    """

    device: str = setting("h100", common=True)
    num_processes: int = setting(1, common=True)
    sharded: bool = setting(False, read_by=Reader("num_processes above 1", lambda a: a.num_processes > 1), common=True)
    utilisation: float = setting(0.35, common=True)
    total_tokens: float = setting(200e6, common=True)

    def __post_init__(self) -> None:
        check_read(self)


COMMAND = Command(
    "Estimate memory and time of a mid-training step on a device, before anything is loaded.",
    (
        MODEL,
        Settings(EstimateArguments, "device"),
        Settings(ReFINEConfig, "training", nsp=Settings(NSPConfig, "next-sequence prediction")),
    ),
    description="It takes midtrain's flags: refine-nsp estimate MODEL --max_length 16384",
    positional=("model_name_or_path",),
    fixed={"use_cpu": True},  # the device is elsewhere
    dry_run=True,
)


def run(call: Call, model_args: ModelArguments, where: EstimateArguments, args: ReFINEConfig) -> None:
    """Count, and print the table, with a warning where the training does not fit."""
    device = device_named(where.device)
    if call.dry_run:
        Console().print(str(call.resolved()))
        return
    config, console = load_config(model_args.model_name_or_path), Console()
    adapters = partial(with_adapters, arguments=model_args, seed=args.seed) if model_args.use_peft else None
    dtype = dtype_of(config, args, model_args.dtype)
    found = estimate(config, args, where.num_processes, where.sharded, adapters, dtype, progress=Patience(console.print))
    console.print(table(found, where, notes_of(config, args, model_args.dtype, dtype)).rich())
    if found.uncounted is not None:
        console.print(f"warning: activations and time are missing: a step of this model could not be counted ({found.uncounted})")
    if found.total > device.bytes:
        console.print(
            f"warning: {found.total / 1e9:.1f} GB do not fit into {device.bytes / 1e9:.0f} GB of a {where.device}; "
            f"{remedy(found, where, args)}"
        )


class Patience:
    """Hand a line on now and then, once a few seconds have passed."""

    def __init__(self, tell: Callable[[str], None], every_seconds: float = 4.0) -> None:
        self.tell, self.every, self.last = tell, every_seconds, monotonic()

    def __call__(self, line: str) -> None:
        if monotonic() - self.last >= self.every:
            self.last = monotonic()
            self.tell(line)


def remedy(found: Estimate, where: EstimateArguments, args: ReFINEConfig) -> str:
    """Say what would make the largest part smaller."""
    if found.weights + found.gradients + found.optimizer > found.activations:
        shared = "use more devices, or use_peft"
        return shared if where.sharded else "use_peft, an optim with a smaller state, or sharded over more devices"
    if args.per_device_train_batch_size > 1:
        return "lower per_device_train_batch_size and raise gradient_accumulation_steps"
    return "set gradient_checkpointing, or segment_tokens for long sequences"


def notes_of(config: PreTrainedConfig, args: ReFINEConfig, asked: str | None, dtype: torch.dtype) -> list[str]:
    """Say what the figures assume of the weights and of what computes them."""
    text = config.get_text_config(decoder=True)
    if asked not in (None, "auto"):
        why = "dtype"
    elif args.weights_dtype(asked) is not None:
        why = "autocast keeps them so"
    else:
        why = "the configuration's" if config.dtype or text.dtype else "assumed: the configuration names no dtype"
    notes = [f"weights in {str(dtype).removeprefix('torch.')} ({why})"]
    if text.model_type not in FAMILIES:
        notes.append("layers are counted on transformers' PyTorch code; kernels for recurrent ones, where installed, keep less")
    return notes


def table(found: Estimate, where: EstimateArguments, notes: Sequence[str] = ()) -> Table:
    """Lay the estimate out: bytes by part, on one device, then what a step and the whole run take."""
    known, device = found.uncounted is None, device_named(where.device)
    parts = {
        "weights": found.weights,
        **({"  of these the teacher's": found.teacher} if found.teacher else {}),
        "gradients kept between micro-batches" if known else "gradients": found.gradients,
        "optimizer state": found.optimizer,
    }
    if known:
        parts["activations and gradients at their peak"] = found.activations
        parts["  of these beyond next-token prediction's"] = found.activations - found.ntp_activations
    if found.validation:
        parts["activations of a validation at their peak"] = found.validation
    parts["in all, on each device" if known else "in all without activations"] = found.total
    parts[f"memory of {where.device}"] = device.bytes
    rows: list[list[Cell]] = [[name, f"{value / 1e9:.2f} GB"] for name, value in parts.items()]
    rows.append(["tokens a step, on all devices", f"{found.tokens:,}"])
    if known:
        seconds = found.flops / (device.flops * where.utilisation)
        hours = where.total_tokens / found.tokens * seconds / 3600
        rows += [
            ["matrix products a step, on each device", f"{found.flops / 1e12:.1f} TFLOP"],
            ["seconds a step", f"{seconds:.2f}"],
            ["tokens a second, on all devices", f"{found.tokens / seconds:,.0f}"],
            [f"hours for {where.total_tokens / 1e6:,.0f} M tokens", f"{hours:.2f}"],
        ]
        rate = f"{where.utilisation:.0%} of {device.flops / 1e12:,.0f} bfloat16 TFLOP/s"
        notes = [*notes, f"counted on PyTorch's operations; time assumes {rate}, and nothing for exchange between devices"]
    title = f"Estimate: {where.num_processes} x {where.device}{', sharded' if where.sharded else ''}"
    return Table(title, ["what", "how much"], rows, list(notes))
