"""A trainer checks, before it trains, whether the model and the data go with the run's settings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from datasets import Dataset
from torch import nn

from refine_nsp.config import NSPConfig
from refine_nsp.errors import RefineError, closest
from refine_nsp.models.adapters import without_adapters
from refine_nsp.models.protocols import Trunk
from refine_nsp.ops.precision import share_unmoved
from refine_nsp.training.arguments import ReFINEConfig
from refine_nsp.training.phases import Phase

HALF = (torch.bfloat16, torch.float16)
UNMOVED = 0.1  # a step may leave this share of weights as they are before that is said


def weights_problems(model: nn.Module, args: ReFINEConfig, sharded: bool) -> list[str]:
    """Say what does not go well with a run's weights: shards that were asked for and are not, or steps that round away."""
    problems = []
    if (args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP")) and not sharded:
        problems.append(
            "FSDP was asked for, but accelerate shards models only over several processes that have an accelerator each: every process "
            "holds the whole model"
        )
    # FSDP widens weights where products are narrower.
    widened = sharded and args.mixed_precision != "no"
    if not widened and (problem := rounding_problem(model, args.learning_rate)) is not None:
        problems.append(problem)
    return problems


def rounding_problem(model: nn.Module, learning_rate: float) -> str | None:
    """Say which trained weights are too coarse for the learning rate; None where a step moves them."""
    coarse = [p for p in model.parameters() if p.requires_grad and not p.is_meta and p.dtype in HALF]
    share = share_unmoved(coarse, learning_rate)
    if share <= UNMOVED:
        return None
    return (
        f"{sum(p.numel() for p in coarse):,} trained weights are in {str(coarse[0].dtype).removeprefix('torch.')}, in which a step "
        f"of learning_rate={learning_rate:g} rounds away for {100 * share:.0f} % of them: they would stay as they are. Load "
        "them in float32 (dtype), which bf16 (autocast) still multiplies in bfloat16, or raise learning_rate"
    )


def check_best_figure(wanted: str | None, phase: Phase, eval_dataset: Dataset | Mapping[str, Dataset] | None) -> None:
    """Refuse a figure that is to decide which checkpoint is best (`metric_for_best_model`) and that validation does not compute.

    Raises:
        RefineError: the figure, the nearest one that there is, and all others.
    """
    if not wanted:
        return
    try:
        figures = list(phase.summarise(defaultdict(float)))
    except Exception:  # a phase of the user's own may need real sums
        return
    sets = [f"{name}_" for name in eval_dataset] if isinstance(eval_dataset, Mapping) else [""]
    known = [f"{name}{figure}" for name in sets for figure in figures]
    if (name := wanted.removeprefix("eval_")) not in known:
        raise RefineError(
            f"metric_for_best_model={wanted!r} is no figure of validation{closest(name, known)}; it has {', '.join(known)}"
        )


def for_shards(model: nn.Module, nsp: NSPConfig) -> NSPConfig:
    """The method's settings for a model whose weights lie in parts with several processes, which must then make the same passes.

    Where states are taken between segments, how many are run again for them would differ from process to process, and gradients would
    reach weights through states alone, which FSDP does not see. Rollouts are therefore sampled in a pass of their own, without gradients
    (schedule `snapshot`), and learned from in one whose segments are as many everywhere: the same loss and gradients.

    Raises:
        RefineError: a model of transformers by `segment_tokens`: each segment would be cut at its positions.
    """
    base: Any = without_adapters(model)
    trunk: Trunk = base.model
    cut = trunk.cuts_at_positions
    if not nsp.samples_rollouts or not (cut or nsp.segment_tokens):
        return nsp
    if cut and nsp.segment_tokens:
        raise RefineError(
            f"segment_tokens={nsp.segment_tokens}: rollouts of {trunk.label} cut segments at their positions, which differ from process to "
            "process, and shards need every process in every pass; leave segment_tokens out (to save memory: gradient_checkpointing), or "
            "use estimator: closed_form (preset: likelihood), which needs no positions, or DDP"
        )
    return replace(nsp, schedule="snapshot")
