"""Count small steps of a training and follow them up to its size.

A step of a layer of each kind, or two, and of few tokens, twice as many of each, is run for its shapes; the straight line through both is
followed up to the model's own sizes, because between two layers, two tokens or two sequences nothing but their number differs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import cast

import torch

from refine_nsp.estimate.counter import Counter
from refine_nsp.estimate.few_layers import Blueprint, few_layers, kinds_of_layers
from refine_nsp.estimate.shapes import ShapesOnly, allocate
from refine_nsp.estimate.teacher import Taught
from refine_nsp.models.adapters import without_adapters
from refine_nsp.models.blocks import FastWeightForCausalLM
from refine_nsp.nsp.context import TOKENS_AT_ONCE
from refine_nsp.nsp.records import Batch
from refine_nsp.nsp.seeds import generator_of
from refine_nsp.ops.linear_cross_entropy import block_tokens
from refine_nsp.ops.memory import part
from refine_nsp.training.arguments import ReFINEConfig
from refine_nsp.training.phases import PHASES, MicroBatch, Phase

Figures = dict[str, float]  # peak bytes by part of the step, and flops
FLOPS, VALIDATION, TEACHER = "flops", "validation", "its teacher"
TOKENS = 512  # the least that are counted of a sequence without segments; and twice as many
SEGMENT_TOKENS = (256, 512)  # of one segment, where there are some
SEGMENTS = 2  # the least number of them; and twice as many


def count_steps(
    blueprint: Blueprint,
    args: ReFINEConfig,
    kinds: Sequence[Hashable],
    progress: Callable[[str], None],
    taught: Taught | None = None,
) -> tuple[tuple[float, float], tuple[float, float], tuple[float, float]]:
    """Return the bytes at their peak and the flops of a micro-batch: of the run's objective, of the cross-entropy alone, and of a batch of
    validation where the run has any."""
    shapes, numbers = ShapesOnly(), itertools.count(1)
    sizes, corners = sizes_of(args, blueprint.config.get_text_config(decoder=True).vocab_size)
    own_kinds = dict.fromkeys((args.objective, "ntp", *([VALIDATION] if args.do_eval else [])), kinds)
    if args.objective == "distill" and taught is not None:
        own_kinds[TEACHER] = kinds_of_layers(taught.blueprint.on_meta())
    corner_count = 2 ** sum(value > corners[name][1] for name, value in sizes.items())
    steps = corner_count * sum(1 + len(few_layers(kinds)[1]) for kinds in own_kinds.values())

    def run(what: str, layers: Sequence[int], given: Mapping[str, int]) -> Figures:
        progress(f"counting small step {next(numbers)} of {steps}: {what}, {len(layers)} layers")
        if what == TEACHER and taught is not None:
            peaks, flops = taught.measure(args, layers, shapes, **given)
            return {**peaks, FLOPS: flops}
        return measure_step(blueprint, args, what, layers, shapes, taught=taught, **given)

    def all_layers(what: str, **given: int) -> Figures:
        few, more = few_layers(own_kinds[what])
        least = run(what, few, given)
        total = dict(least)
        for layer, times in more.items():
            for name, value in run(what, sorted([*few, layer]), given).items():
                total[name] = total.get(name, 0.0) + times * (value - least.get(name, 0.0))
        return total

    found = {VALIDATION: (0.0, 0.0), TEACHER: (0.0, 0.0)}
    for what in own_kinds:
        own = sizes | ({"rows": args.per_device_eval_batch_size} if what == VALIDATION else {})
        figures = extrapolate(partial(all_layers, what), own, corners)
        flops = figures.pop(FLOPS)
        found[what] = max(figures.values()), flops
    (peak, flops), (teacher_peak, teacher_flops) = found[args.objective], found[TEACHER]
    return (max(peak, teacher_peak), flops + teacher_flops), found["ntp"], found[VALIDATION]


def sizes_of(args: ReFINEConfig, vocabulary: int) -> tuple[dict[str, int], dict[str, tuple[int, int]]]:
    """Return a run's sizes by name, and the two smaller values that each is counted at."""
    nsp, T = args.nsp, args.max_length
    sizes, corners = {"rows": args.per_device_train_batch_size}, {"rows": (1, 2)}
    online = args.phase.reads_scores and args.context_scores == "online"
    # From this length on blocks of tokens are full, and the next block is made before the last one is gone.
    full = max(2 * block_tokens(vocabulary, torch.device("cpu")), TOKENS_AT_ONCE["cpu"] if online else 0)
    if nsp.segment_tokens is None or nsp.segment_tokens >= T:
        least = max(TOKENS, full, args.phase.shortest + nsp.positions_per_sequence)
        return sizes | {"tokens": T}, corners | {"tokens": (least, 2 * least)}
    segments, least = -(-T // nsp.segment_tokens), max(SEGMENTS, -(-full // SEGMENT_TOKENS[0]))
    return (
        sizes | {"segment": nsp.segment_tokens, "segments": segments},
        corners | {"segment": SEGMENT_TOKENS, "segments": (least, 2 * least)},
    )


def extrapolate(measure: Callable[..., Figures], at: Mapping[str, int], corners: Mapping[str, tuple[int, int]]) -> Figures:
    """Find each figure of `measure(**sizes)` at the sizes `at` (by name) from its values at all corners, two smaller values for each.

    Figures are linear in each size that is beyond its upper corner; a size that is not is measured as it is.
    """
    far = [name for name, value in at.items() if value > corners[name][1]]
    near = {name: value for name, value in at.items() if name not in far}
    shares = [(at[name] - corners[name][0]) / (corners[name][1] - corners[name][0]) for name in far]
    total: Figures = {}
    for ends in itertools.product((0, 1), repeat=len(far)):
        sizes = {name: corners[name][end] for name, end in zip(far, ends, strict=True)}
        weight = math.prod(share if end else 1 - share for share, end in zip(shares, ends, strict=True))
        for name, value in measure(**near, **sizes).items():
            total[name] = total.get(name, 0.0) + weight * value
    return total


def measure_step(
    blueprint: Blueprint, args: ReFINEConfig, objective: str, layers: Sequence[int] | None = None, shapes: ShapesOnly | None = None,
    rows: int = 1, tokens: int = 0, segment: int = 0, segments: int = 0, taught: Taught | None = None,
) -> Figures:  # fmt: skip
    """Measure one micro-batch's forward and backward pass, or a batch of `VALIDATION`, computed, or run for its `shapes`.

    Returns the peak of bytes beyond the weights and what was there before, by part of the step; and flops.
    """
    torch.manual_seed(0)
    built = blueprint.build(layers) if shapes is None else allocate(blueprint.on_meta(layers))
    if args.gradient_checkpointing:
        built.gradient_checkpointing_enable()
    if args.gradient_accumulation_steps > 1:  # gradients of earlier micro-batches are there
        for p in built.parameters():
            p.grad = (torch.zeros_like if shapes is None else torch.empty_like)(p) if p.requires_grad else None
    model = cast(FastWeightForCausalLM, without_adapters(built))  # steps call the model inside the wrapper
    nsp = args.nsp if not segment else replace(args.nsp, segment_tokens=segment)
    made = args.objective if objective == VALIDATION else objective
    if taught is not None and made != "ntp":
        phase: Phase = taught.phase(made, nsp, layers)
    else:  # the model stands for the frozen one of a KL term, which takes as much
        phase = PHASES[made](nsp, model)
    ids = torch.randint(0, model.config.vocab_size, (rows, tokens or segment * segments))
    scores = torch.rand(ids.shape) if args.context_scores != "online" or made == "distill" else None
    batch = MicroBatch(Batch.of(ids, scores=scores), [generator_of(0, 0, row, 0) for row in range(rows)])
    autocast = torch.autocast("cpu", torch.bfloat16) if args.bf16 else nullcontext()
    with shapes or nullcontext(), Counter() as counter, autocast:
        model.eval()
        if objective == VALIDATION:
            phase.validate(model, [{"input_ids": ids, "lengths": torch.full((rows,), ids.shape[1])}])
            return {**counter.peaks, FLOPS: counter.flops}
        with torch.no_grad():
            phase.prepare(lambda step: step(model), [batch])  # type: ignore[arg-type]
        model.train()
        batch.totals = {name: count or 1.0 for name, count in phase.count(batch).items()}
        loss = phase.loss(model, batch)[0]
        with part("backward"):
            loss.backward()
    return {**counter.peaks, FLOPS: counter.flops}
