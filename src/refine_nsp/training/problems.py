"""What would go wrong with a model and its settings, in words for a warning or an error."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from refine_nsp.models.adapters import without_adapters
from refine_nsp.models.hybrid import StatefulTrunk
from refine_nsp.ops.precision import share_unmoved
from refine_nsp.training.arguments import ReFINEConfig

HALF = (torch.bfloat16, torch.float16)
UNMOVED = 0.1  # share of weights that a step may leave as they are, before that is said


def rounding_problem(model: nn.Module, learning_rate: float) -> str | None:
    """Which trained weights are too coarse for the learning rate, or None."""
    coarse = [p for p in model.parameters() if p.requires_grad and not p.is_meta and p.dtype in HALF]
    share = share_unmoved(coarse, learning_rate)
    if share <= UNMOVED:
        return None
    return (
        f"{sum(p.numel() for p in coarse):,} trained weights are in {str(coarse[0].dtype).removeprefix('torch.')}, in which a step "
        f"of learning_rate={learning_rate:g} rounds away for {100 * share:.0f} % of them: they would stay as they are. Load "
        "them in float32 (dtype), which bf16 (autocast) still multiplies in bfloat16, or raise learning_rate"
    )


def sharding_problem(model: nn.Module, args: ReFINEConfig) -> str | None:
    """Why processes that hold parts of a model could make different numbers of passes, and so wait for each other for ever, or None."""
    nsp = args.nsp
    if args.objective != "refine" or nsp.estimator != "sampled":
        return None
    base: Any = without_adapters(model)
    hybrid = isinstance(getattr(base, "model", None), StatefulTrunk)
    if nsp.segment_tokens is None and not hybrid:
        return None
    what = "segment_tokens" if nsp.segment_tokens is not None else "a model of transformers"
    return (
        f"rollouts with {what} run the segments that hold their positions, which differ from process to process, and shards need every "
        "process in every pass; use estimator: exact (preset: exact), which needs no positions, or DDP"
    )
