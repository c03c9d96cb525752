"""Estimate the memory and the time of a training step before anything large is loaded (`refine-nsp estimate`).

Weights, gradients and the optimizer's state are arithmetic. Activations, states, rollouts and blocks of logits are counted on small steps
(`small_steps.py`). Time is the counted matrix products over a stated share of the device's peak, which is an assumption.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig

from refine_nsp.errors import RefineError, closest, first_line
from refine_nsp.estimate.few_layers import Blueprint, WithAdapters, kinds_of_layers, parameter_bytes
from refine_nsp.estimate.small_steps import count_steps
from refine_nsp.estimate.teacher import Taught
from refine_nsp.models.load import load_config
from refine_nsp.ops.memory import OutOfMemory
from refine_nsp.training.arguments import ReFINEConfig
from refine_nsp.training.memory_rate import check_memory


@dataclass(frozen=True)
class Device:
    """Hold what an accelerator has: `flops`, dense bfloat16 operations a second at its peak, by its maker; `bytes` of memory."""

    flops: float
    bytes: float


DEVICES = {
    "b200": Device(2250e12, 180e9),
    "h200": Device(989e12, 141e9),
    "h100": Device(989e12, 80e9),
    "a100": Device(312e12, 80e9),
    "mi300x": Device(1307e12, 192e9),
    "l40s": Device(362e12, 48e9),
    "rtx4090": Device(165e12, 24e9),
}
# Bytes a parameter of optimizers whose state is not AdamW's two moments.
MOMENTS = {"sgd": 0, "adafactor": 0, "adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2}
# Code of other libraries fails in these ways where a model cannot be counted.
FOREIGN_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def device_named(name: str) -> Device:
    """Look a device up. RefineError for a name that is not in `DEVICES`."""
    if name not in DEVICES:
        raise RefineError(f"device={name!r}: known are {', '.join(DEVICES)}{closest(name, DEVICES)}")
    return DEVICES[name]


@dataclass(frozen=True)
class Estimate:
    """Hold the bytes on each device, and what an optimizer step takes."""

    weights: float
    gradients: float
    optimizer: float
    activations: float  # of the objective, at their peak
    ntp_activations: float  # of the cross-entropy alone
    flops: float  # of an optimizer step on one device
    tokens: int  # of an optimizer step, on all devices
    dtype: torch.dtype  # of the weights
    uncounted: str | None = None  # why activations and flops could not be counted and are 0
    validation: float = 0.0  # bytes of a validation, 0 where the run has none
    teacher: float = 0.0  # bytes of its weights, which `weights` holds too

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + max(self.activations, self.validation)


def estimate(
    config: PreTrainedConfig, args: ReFINEConfig, processes: int = 1, sharded: bool = False, adapters: WithAdapters | None = None,
    dtype: torch.dtype | None = None, progress: Callable[[str], None] = lambda line: None,
) -> Estimate:  # fmt: skip
    """Estimate one optimizer step.

    Args:
        config: of a causal language model; its weights are not needed.
        args: the run's settings. processes: devices. sharded: weights, gradients and optimizer state are shared out (FSDP2, ZeRO-3).
        adapters: a function that wraps a model in LoRA adapters, or None. dtype: of the weights (default: as `dtype_of`).
        progress: told before every small step how many there are.
    """
    blueprint = Blueprint(config, dtype_of(config, args) if dtype is None else dtype, prepares(args, adapters))
    whole = blueprint.on_meta()
    kinds, weights, trained = kinds_of_layers(whole), parameter_bytes(whole), parameter_bytes(whole, trainable=True)
    taught = None
    if args.objective in ("distill", "transfer") and args.teacher is not None:
        theirs = load_config(args.teacher)
        taught = Taught.of(args, whole, Blueprint(theirs, dtype_of(theirs, args, "auto")))
    peak = ntp = flops = validation = 0.0
    uncounted = None
    try:
        (peak, flops), (ntp, _), (validation, _) = count_steps(blueprint, args, kinds, progress, taught)
    except OutOfMemory as error:
        uncounted = str(error)
    except RefineError:
        raise
    except FOREIGN_ERRORS as error:
        uncounted = f"{type(error).__name__}: {first_line(error)}"
    share = processes if sharded else 1
    # With gradients to add up to, they are there all through the next micro-batch; else they come as activations go.
    accumulated = args.gradient_accumulation_steps > 1 or uncounted is not None
    gathered = weights / max(1, len(kinds)) if sharded and processes > 1 else 0  # a layer at a time
    moments = MOMENTS.get(str(getattr(args.optim, "value", args.optim)))
    elements = sum(p.numel() for p in whole.parameters() if p.requires_grad)
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    # Every process holds a frozen model whole.
    reference = weights if args.nsp.kl_coef > 0 and args.phase.samples else 0
    teacher = 0 if taught is None else parameter_bytes(taught.blueprint.on_meta())
    return Estimate(
        weights=weights / share + gathered + reference + teacher,
        gradients=trained / share if accumulated else 0.0,
        optimizer=(2 * trained if moments is None else moments * elements) / share,
        activations=peak,
        ntp_activations=ntp,
        flops=flops * args.gradient_accumulation_steps,
        tokens=rows * args.max_length * processes,
        dtype=blueprint.dtype,
        uncounted=uncounted,
        validation=validation,
        teacher=teacher,
    )


def prepares(args: ReFINEConfig, adapters: WithAdapters | None) -> WithAdapters:
    """Return what a run does to a model before it trains it: wrap it in adapters, or freeze all but its memory."""

    def prepare(model: nn.Module) -> nn.Module:
        made = model if adapters is None else adapters(model)
        check_memory(made, args, own_optimizer=False)
        return made

    return prepare


def dtype_of(config: PreTrainedConfig, args: ReFINEConfig, asked: str | None = None) -> torch.dtype:
    """Return the dtype that the trainer loads weights in; where it takes the checkpoint's own, the one that the configuration names."""
    named = args.weights_dtype(asked)
    if named in (None, "auto"):
        own = config.dtype or config.get_text_config(decoder=True).dtype
        return own if isinstance(own, torch.dtype) else getattr(torch, str(own or "float32"))
    return getattr(torch, str(named))
