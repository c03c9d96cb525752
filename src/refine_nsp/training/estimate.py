"""Memory and time of a training step before anything large is loaded (`refine-nsp estimate`).

Weights, gradients and the optimizer's state are arithmetic. Activations, states, rollouts and blocks of logits are counted on a layer of
each kind, or two, and few tokens (`training/simulation.py`), by the shapes of PyTorch's operations (`training/shapes.py`): kernels of a GPU
keep no more. Nothing of the model's size is computed or kept, so a model of any size is counted. Time is the counted matrix products
over a stated share of the device's peak, which is an assumption: what does not use it (memory-bound operations, waiting) is in that share.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from refine_nsp.config import NSPConfig
from refine_nsp.errors import RefineError, closest, first_line
from refine_nsp.models.adapters import without_adapters
from refine_nsp.models.families import FAMILIES
from refine_nsp.models.hybrid import with_states
from refine_nsp.nsp.context import TOKENS_AT_ONCE
from refine_nsp.nsp.records import Batch
from refine_nsp.nsp.seeds import generator_of
from refine_nsp.ops.linear_cross_entropy import block_tokens
from refine_nsp.ops.memory import OutOfMemory, part
from refine_nsp.training.arguments import ReFINEConfig
from refine_nsp.training.phases import PHASES, MicroBatch
from refine_nsp.training.shapes import ShapesOnly, allocate
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
TOKENS = 512  # at least, of a sequence without segments; and twice as many
SEGMENT, SEGMENTS = (256, 512), 2  # counted, where there are segments: their tokens; how many at least, and twice as many
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
            device. tokens: of an optimizer step, on all devices. dtype: of the weights. uncounted: why activations and flops could not
            be counted and are 0; else None.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    ntp_activations: float
    flops: float
    tokens: int
    dtype: torch.dtype
    uncounted: str | None = None

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


def estimate(
    config: Any, args: ReFINEConfig, processes: int = 1, sharded: bool = False, adapters: Any = None, dtype: torch.dtype | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Estimate:  # fmt: skip
    """Of one optimizer step.

    Args:
        config: of a causal language model; its weights are not needed.
        args: the run's settings. processes: devices. sharded: weights, gradients and optimizer state are shared out (FSDP2, ZeRO-3).
        adapters: a function that wraps a model in LoRA adapters, or None. dtype: of the weights (default: as `dtype_of`).
        progress: told before every small step how many there are.
    """
    dtype = dtype_of(config, args) if dtype is None else dtype
    whole: Any = on_meta(config, dtype, adapters)
    kinds = kinds_of_layers(whole)
    weights, trained = parameter_bytes(whole), parameter_bytes(whole, trainable=True)
    peak = ntp = flops = 0.0
    uncounted = None
    try:
        (peak, flops), (ntp, _) = counts(config, args, kinds, dtype, adapters, progress)
    except OutOfMemory as error:
        uncounted = str(error)
    except RefineError:
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        uncounted = f"{type(error).__name__}: {first_line(error)}"  # as foreign code fails
    share = processes if sharded else 1
    # With gradients to add up to, they are there all through the next micro-batch; else they come as activations go.
    accumulated = args.gradient_accumulation_steps > 1 or uncounted is not None
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
        dtype=dtype,
        uncounted=uncounted,
    )


def counts(
    config: Any, args: ReFINEConfig, kinds: Sequence[Any], dtype: torch.dtype, adapters: Any, progress: Callable[[str], None]
) -> list[tuple[float, float]]:
    """Bytes at their peak, and flops, of the run's objective and of the cross-entropy alone."""
    shapes, done = ShapesOnly(), 0
    sizes, corners = sizes_of(args, config.get_text_config(decoder=True).vocab_size)
    few, more = few_layers(kinds)
    objectives = list(dict.fromkeys((args.objective, "ntp")))
    corner_count = 2 ** sum(value > corners[name][1] for name, value in sizes.items())
    steps = len(objectives) * corner_count * (1 + len(more))

    def run(objective: str, layers: Sequence[int], given: dict[str, int]) -> Figures:
        nonlocal done
        done += 1
        progress(f"counting small step {done} of {steps}: {objective}, {len(layers)} layers")
        return measure_step(config, args, objective, dtype, adapters, layers, shapes, **given)

    def count(objective: str) -> tuple[float, float]:
        def deep(**given: int) -> Figures:
            least = run(objective, few, given)
            total = dict(least)
            for layer, times in more.items():
                for name, value in run(objective, sorted([*few, layer]), given).items():
                    total[name] = total.get(name, 0.0) + times * (value - least.get(name, 0.0))
            return total

        found = extrapolate(deep, sizes, corners)
        flops = found.pop(FLOPS)
        return max(found.values()), flops

    found = {objective: count(objective) for objective in objectives}
    return [found[args.objective], found["ntp"]]


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


def kinds_of_layers(model: Any) -> list[Any]:
    """What tells the layers of a model apart: the names that its configuration has for them, and the shapes of their weights."""
    names = layer_kinds(model.config)
    shapes = [tuple((name, tuple(p.shape)) for name, p in layer.named_parameters()) for layer in layers_of(model)]
    return list(zip(names, shapes, strict=True))


def few_layers(kinds: Sequence[Any]) -> tuple[list[int], dict[int, int]]:
    """The first layer of each kind, and the second of each: how often what it adds is there beyond the first."""
    by_kind: dict[Any, list[int]] = {}
    for i, kind in enumerate(kinds):
        by_kind.setdefault(kind, []).append(i)
    return [same[0] for same in by_kind.values()], {same[1]: len(same) - 1 for same in by_kind.values() if len(same) > 1}


def layers_of(model: Any) -> nn.ModuleList:
    """The list of a model's layers."""
    count = len(layer_kinds(model.config))
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)


def keep_layers(model: Any, which: Sequence[int]) -> None:
    """Make a model one of these of its layers, in place, and its configuration too."""
    layers, config, count = layers_of(model), model.config, len(layer_kinds(model.config))
    kept = [layers[i] for i in which]
    del layers[:]
    layers.extend(kept)
    for i, layer in enumerate(kept):
        for module in layer.modules():
            if "layer_idx" in vars(module):
                module.layer_idx = i  # type: ignore[assignment]
    for name, value in vars(config).items():
        if isinstance(value, list | tuple) and len(value) == count and not name.endswith("_indices"):
            setattr(config, name, [value[i] for i in which])
    if vars(config).get("attn_layer_indices"):
        config.attn_layer_indices = [new for new, old in enumerate(which) if old in config.attn_layer_indices]
    config.num_hidden_layers = len(which)


def dtype_of(config: Any, args: ReFINEConfig, asked: str | None = None) -> torch.dtype:
    """What the trainer loads weights in (`ReFINEConfig.weights_dtype`); for a checkpoint's own what its configuration names, or float32."""
    named = args.weights_dtype(asked)
    if named in (None, "auto"):
        own = config.dtype or config.get_text_config(decoder=True).dtype
        return own if isinstance(own, torch.dtype) else getattr(torch, str(own or "float32"))
    return getattr(torch, str(named))


def build(config: Any, layers: Sequence[int] | None, dtype: torch.dtype, adapters: Any) -> nn.Module:
    """A random model of these of the layers, or of all."""
    config = copy.deepcopy(config.get_text_config(decoder=True))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if layers is not None:
        keep_layers(model, layers)
    model = model if config.model_type in FAMILIES else with_states(model)
    return model if adapters is None else adapters(model)


def on_meta(config: Any, dtype: torch.dtype, adapters: Any, layers: Sequence[int] | None = None) -> nn.Module:
    """The same without memory for its weights. Random ones would fail the check that `with_states` makes; these are not checked."""
    with torch.device("meta"):
        return build(config, layers, dtype, adapters)


def sizes_of(args: ReFINEConfig, vocabulary: int) -> tuple[dict[str, int], dict[str, tuple[int, int]]]:
    """A run's sizes, and those they are counted at."""
    nsp, T = args.nsp, args.max_length
    sizes, corners = {"rows": args.per_device_train_batch_size}, {"rows": (1, 2)}
    # From where on blocks of tokens are full, and the next one is made before the last one is gone.
    online = args.phase.reads_scores and args.context_scores == "online"
    full = max(2 * block_tokens(vocabulary, torch.device("cpu")), TOKENS_AT_ONCE["cpu"] if online else 0)
    if nsp.segment_tokens is None or nsp.segment_tokens >= T:
        least = max(TOKENS, full, nsp.shortest + nsp.positions_per_sequence)
        return sizes | {"tokens": T}, corners | {"tokens": (least, 2 * least)}
    segments, least = -(-T // nsp.segment_tokens), max(SEGMENTS, -(-full // SEGMENT[0]))
    return (
        sizes | {"segment": nsp.segment_tokens, "segments": segments},
        corners | {"segment": SEGMENT, "segments": (least, 2 * least)},
    )


def measure_step(
    config: Any, args: ReFINEConfig, objective: str, dtype: torch.dtype, adapters: Any, layers: Sequence[int] | None = None,
    shapes: ShapesOnly | None = None, rows: int = 1, tokens: int = 0, segment: int = 0, segments: int = 0,
) -> Figures:  # fmt: skip
    """Peak bytes beyond the weights and what was there before, by part of the step, and flops, of one micro-batch's forward and backward
    pass, computed, or run for its `shapes`."""
    torch.manual_seed(0)
    if shapes is None:
        model: Any = build(config, layers, dtype, adapters).train()
    else:
        model = allocate(on_meta(config, dtype, adapters, layers)).train()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    for p in model.parameters():
        p.grad = (
            (torch.zeros_like if shapes is None else torch.empty_like)(p)
            if p.requires_grad and args.gradient_accumulation_steps > 1
            else None
        )
    model = without_adapters(model)  # steps call ours
    nsp = args.nsp if not segment else NSPConfig(**{**vars(args.nsp), "segment_tokens": segment})
    ids = torch.randint(0, model.config.vocab_size, (rows, tokens or segment * segments))
    scores = torch.rand(ids.shape) if args.context_scores == "cached" else None
    phase = PHASES[objective](nsp)
    batch = MicroBatch(Batch.of(ids, scores=scores), [generator_of(0, 0, row, 0) for row in range(rows)])
    autocast = torch.autocast("cpu", torch.bfloat16) if args.bf16 else nullcontext()
    with shapes or nullcontext(), counted() as counter, autocast:
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
