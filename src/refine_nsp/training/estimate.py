"""Memory and time of a training step before anything large is loaded (`refine-nsp estimate`).

Weights, gradients and the optimizer's state are arithmetic. Activations, states, rollouts and blocks of logits are counted on a few layers
and tokens (`training/simulation.py`), on PyTorch's operations: kernels of a GPU keep no more. Time is the counted matrix products
over a stated share of the device's peak, which is an assumption: what does not use it (memory-bound operations, waiting) is in that share.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from refine_nsp.config import NSPConfig
from refine_nsp.errors import RefineError, closest
from refine_nsp.models.families import FAMILIES
from refine_nsp.models.hybrid import with_states
from refine_nsp.nsp.context import TOKENS_AT_ONCE
from refine_nsp.nsp.records import Batch
from refine_nsp.nsp.seeds import generator_of
from refine_nsp.ops.linear_cross_entropy import block_tokens
from refine_nsp.ops.memory import part
from refine_nsp.training.arguments import ReFINEConfig
from refine_nsp.training.phases import PHASES, MicroBatch
from refine_nsp.training.simulation import Figures, counted, extrapolate, parameter_bytes


@dataclass(frozen=True)
class Device:
    """flops: dense bfloat16 products a second at its peak, as the maker states. bytes: of memory."""

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
FLOPS = "flops"
LARGEST_COUNTED = 4e9  # parameters of the few layers that are run here
TOKENS = 512  # at least, of a sequence without segments; and twice as many
SEGMENT, SEGMENTS = (256, 512), (2, 4)  # counted, where there are segments: their tokens, and how many
MOMENTS = {
    "sgd": 0,
    "adafactor": 0,
    "adamw_8bit": 2,
    "adamw_bnb_8bit": 2,
    "paged_adamw_8bit": 2,
}  # bytes a parameter; AdamW: two moments


@dataclass(frozen=True)
class Estimate:
    """Bytes on each device, and what an optimizer step takes.

    Attributes:
        activations: of the objective, at their peak; ntp_activations: of the cross-entropy alone. flops: of an optimizer step on one
            device. tokens: of an optimizer step, on all devices.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    ntp_activations: float
    flops: float
    tokens: int

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


def estimate(
    config: Any, args: ReFINEConfig, processes: int = 1, sharded: bool = False, adapters: Any = None, dtype: str | None = None
) -> Estimate:
    """Of one optimizer step.

    Args:
        config: of a causal language model; its weights are not needed.
        args: the run's settings. processes: devices. sharded: weights, gradients and optimizer state are shared out (FSDP2, ZeRO-3).
        adapters: a function that wraps a model in LoRA adapters, or None. dtype: of the weights (default: the configuration's).

    Raises:
        RefineError: the few layers that would be counted are larger than a computer without accelerators takes.
    """
    kinds = layer_kinds(config)
    period = period_of(kinds)
    whole: Any = on_meta(config, len(kinds), dtype, adapters)
    weights, trained = parameter_bytes(whole), parameter_bytes(whole, trainable=True)
    largest = sum(p.numel() for p in on_meta(config, min(2 * period, len(kinds)), dtype, adapters).parameters())
    if largest > LARGEST_COUNTED:
        raise RefineError(
            f"{min(2 * period, len(kinds))} layers of this model have {largest / 1e9:.1f} B parameters, more than is run here to count a "
            f"step; its weights take {weights / 1e9:.1f} GB, AdamW's state {2 * trained / 1e9:.1f} GB"
        )
    sizes, corners = sizes_of(args, len(kinds), period, whole.config.vocab_size)

    def count(objective: str) -> tuple[float, float]:
        """Bytes at their peak, and flops."""
        found = extrapolate(lambda **given: measure_step(config, args, objective, dtype, adapters, **given), sizes, corners)
        flops = found.pop(FLOPS)
        return max(found.values()), flops

    ntp, ntp_flops = count("ntp")
    peak, flops = (ntp, ntp_flops) if args.objective == "ntp" else count(args.objective)
    share = processes if sharded else 1
    # With gradients to add up to, they are there all through the next micro-batch; else they come as activations go.
    accumulated = args.gradient_accumulation_steps > 1
    gathered = weights / max(1, len(kinds)) if sharded and processes > 1 else 0  # a layer at a time
    moments = MOMENTS.get(str(getattr(args.optim, "value", args.optim)))
    elements = sum(p.numel() for p in whole.parameters() if p.requires_grad)
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return Estimate(
        weights=weights / share + gathered,
        gradients=trained / share if accumulated else 0.0,
        optimizer=(2 * trained if moments is None else moments * elements) / share,
        activations=peak,
        ntp_activations=ntp,
        flops=flops * args.gradient_accumulation_steps,
        tokens=rows * args.max_length * processes,
    )


# --- a few layers -----------------------------------------------------------------------------------------------------


def layer_kinds(config: Any) -> list[str]:
    """What each layer is, by the names the configuration has for it."""
    text = config.get_text_config(decoder=True)
    for field in ("layer_types", "layers_block_type"):
        kinds = vars(text).get(field)
        if isinstance(kinds, Sequence) and not isinstance(kinds, str):
            return [str(k) for k in kinds]
    attention = vars(text).get("attn_layer_indices") or []
    return ["attention" if i in attention else "layer" for i in range(text.num_hidden_layers)]


def period_of(kinds: Sequence[str]) -> int:
    """After how many layers their kinds come again; all of them where they never do."""
    for period in range(1, len(kinds)):
        if all(kind == kinds[i % period] for i, kind in enumerate(kinds)):
            return period
    return len(kinds)


def shortened(config: Any, layers: int) -> Any:
    """The configuration with its first layers only."""
    text = copy.deepcopy(config.get_text_config(decoder=True))
    for field in ("layer_types", "layers_block_type"):
        if isinstance(vars(text).get(field), Sequence):
            setattr(text, field, list(vars(text)[field])[:layers])
    if vars(text).get("attn_layer_indices"):
        text.attn_layer_indices = [i for i in text.attn_layer_indices if i < layers]
    text.num_hidden_layers = layers
    return text


def build(config: Any, layers: int, dtype: str | None, adapters: Any) -> nn.Module:
    """A random model of the first layers."""
    small = shortened(config, layers)
    named = torch.float32 if dtype in (None, "auto") else getattr(torch, str(dtype))
    model = AutoModelForCausalLM.from_config(small, dtype=named)
    model = model if small.model_type in FAMILIES else with_states(model)
    return model if adapters is None else adapters(model)


def on_meta(config: Any, layers: int, dtype: str | None, adapters: Any) -> nn.Module:
    """The same without memory for its weights."""
    with torch.device("meta"):
        return build(config, layers, dtype, adapters)


def sizes_of(args: ReFINEConfig, layers: int, period: int, vocabulary: int) -> tuple[dict[str, int], dict[str, tuple[int, int]]]:
    """A run's sizes, and those they are counted at."""
    nsp, T = args.nsp, args.max_length
    sizes = {"layers": layers, "rows": args.per_device_train_batch_size}
    corners = {"layers": (period, 2 * period), "rows": (1, 2)}
    if nsp.segment_tokens is None or nsp.segment_tokens >= T:
        # From where on blocks of tokens are full, and the next one is made before the last one is gone.
        scored = nsp.score.startswith("context") if nsp.rolls_out or nsp.weights == "selected" else True
        online = scored and args.objective == "refine" and args.context_scores == "online"
        full = max(2 * block_tokens(vocabulary, torch.device("cpu")), TOKENS_AT_ONCE["cpu"] if online else 0)
        least = max(TOKENS, full, nsp.shortest + nsp.positions_per_sequence)
        return sizes | {"tokens": T}, corners | {"tokens": (least, 2 * least)}
    segments = -(-T // nsp.segment_tokens)
    return sizes | {"segment": nsp.segment_tokens, "segments": segments}, corners | {"segment": SEGMENT, "segments": SEGMENTS}


def measure_step(
    config: Any, args: ReFINEConfig, objective: str, dtype: str | None, adapters: Any,
    layers: int, rows: int, tokens: int = 0, segment: int = 0, segments: int = 0,
) -> Figures:  # fmt: skip
    """Peak bytes beyond the weights and what was there before, by part of the step, and flops, of one micro-batch's forward and backward
    pass."""
    torch.manual_seed(0)
    model: Any = build(config, layers, dtype, adapters).train()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad and args.gradient_accumulation_steps > 1 else None
    nsp = args.nsp if not segment else NSPConfig(**{**vars(args.nsp), "segment_tokens": segment})
    ids = torch.randint(0, model.config.vocab_size, (rows, tokens or segment * segments))
    scores = torch.rand(ids.shape) if args.context_scores == "cached" else None
    phase = PHASES[objective](nsp)
    batch = MicroBatch(Batch.of(ids, scores=scores), [generator_of(0, 0, row, 0) for row in range(rows)])
    autocast = torch.autocast("cpu", torch.bfloat16) if args.bf16 else nullcontext()
    with counted() as counter, autocast:
        model.eval()
        with torch.no_grad():
            phase.prepare(lambda step: step(model), [batch])  # type: ignore[arg-type]
        model.train()
        batch.totals = {name: count or 1.0 for name, count in phase.count(batch).items()}
        loss = phase.loss(model, batch)[0]
        with part("backward"):
            loss.backward()
    return {**counter.peaks, FLOPS: counter.flops}


def device_named(name: str) -> Device:
    """RefineError for a name that is not in `DEVICES`."""
    if name not in DEVICES:
        raise RefineError(f"device={name!r}: known are {', '.join(DEVICES)}{closest(name, DEVICES)}")
    return DEVICES[name]
